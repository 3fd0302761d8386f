"""Files that anybody may hand in, damaged or made up: they are read, or one clear error says no.

Nothing in them is run, and reading takes bounded time. `KTG_FUZZ_EXAMPLES` sets how many of each
kind are tried.
"""

import json
import os
import pickle
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import ktg_jax as ktg
from ktg_jax import GraphState, InputError, RunError
from ktg_jax.data.npz import load_npz
from ktg_jax.recording import Header, Recording, RecordingWriter
from ktg_jax.training.checkpoint import Checkpoints
from ktg_jax.training.checkpoint_reading import read_nodes

EXAMPLES = int(os.environ.get("KTG_FUZZ_EXAMPLES", "60"))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=10_000,  # ms, of one example
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)
FEW = settings(FUZZ, max_examples=max(EXAMPLES // 10, 5), deadline=None)
"""Of what takes long to read."""

RAN = Path(tempfile.gettempdir()) / f"ktg_fuzz_ran_{os.getpid()}"
"""Made by code that a file brings, if that is run."""


@pytest.fixture(autouse=True)
def nothing_is_run_and_memory_is_bounded() -> Iterator[None]:
    RAN.unlink(missing_ok=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**20, f"{grown} KiB more than before"  # a gigabyte
    assert not RAN.exists()


def read_or_refused(read: Callable[[], Any]) -> bool:
    """Whether something is read; else it is refused with one line."""
    said = ""
    try:
        read()
    except (InputError, RunError) as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 5000
    return not said


# --- damage to bytes

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "insert", "swap"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(max_size=9),
    ),
    min_size=1,
    max_size=6,
)


def damaged(data: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    for kind, share, new in edits:
        at = int(share * len(data))
        if kind == "set":
            data = data[:at] + new + data[at + len(new) :]
        elif kind == "cut":
            data = data[:at] + data[at + 40 * len(new) :] if new else data[:at]
        elif kind == "insert":
            data = data[:at] + new + data[at:]
        else:
            data = data[at:] + data[:at]
    return data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# --- graphs

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["cnn", "through", "correct", "kl", "a", "conv", "gate", "loss", "\ud800"]),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["gate", "loss", "weight", "delay", "model", "x"]), inner)
    ),
    max_leaves=8,
)
EXAMPLE: dict[str, Any] = {
    "nodes": [
        {"name": "a", "model": "cnn", "weights": None, "prior_weight": 1.0},
        {"name": "b", "model": "cnn", "optimizer": "adamw", "clip": 1.0, "input": "imagenet"},
        {"name": "mean", "average": "b", "decay": 0.9},
        {"name": "both", "ensemble": ["a", "b"]},
    ],
    "gates": [
        [
            "through",
            {"gate": "linear", "loss": {"kl": 1, "dist": 0.5}, "delay": 3},
            "correct",
            "cutoff",
        ],
        [
            {"gate": "through", "loss": "attention", "connector": "conv"},
            "through",
            "cutoff",
            "linear",
        ],
        ["cutoff"] * 4,
        ["cutoff"] * 4,
    ],
    "temperature": 2.0,
}


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def with_changes(tree: Any, changes: list[tuple[float, Any]]) -> Any:
    tree = json.loads(json.dumps(tree))
    for share, value in changes:
        options = [place for place in places(tree) if place]
        if not options:
            return value
        *way, last = options[int(share * len(options))]
        inner = tree
        for key in way:
            inner = inner[key]
        inner[last] = value
    return tree


CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), JSON), min_size=1, max_size=3)


@FUZZ
@given(changes=CHANGES)
def test_graphs_with_anything_anywhere(changes: list[tuple[float, Any]]) -> None:
    text = json.dumps(with_changes(EXAMPLE, changes))
    if read_or_refused(lambda: ktg.Graph.from_json(text)):
        graph = ktg.Graph.from_json(text)
        assert ktg.Graph.from_json(graph.to_json()) == graph
        read_or_refused(graph.canonical)


@FUZZ
@given(edits=EDITS)
def test_graph_files_with_damaged_bytes(edits: Any, folder: Path) -> None:
    path = folder / "graph.json"
    path.write_bytes(damaged(json.dumps(EXAMPLE).encode(), edits))
    read_or_refused(lambda: ktg.Graph.load(path))


# --- arrays


class Bomb:
    """Pickled, it makes a file where it is read."""

    def __reduce__(self) -> Any:
        return Path.touch, (RAN,)


DTYPES = st.sampled_from(["u1", "i1", "i4", "i8", "f4", "f8", "c8", "?", "S3", "U2", "M8[s]", "V5"])
SHAPES = st.lists(st.integers(0, 5), max_size=5).map(tuple)
NAMES = st.sampled_from(
    ["images", "labels", "val_images", "val_labels", "test_images", "class_names", "x", "a/b", ""]
)


@FUZZ
@given(arrays=st.dictionaries(NAMES, st.tuples(DTYPES, SHAPES), max_size=5), bombs=st.booleans())
def test_npz_files_of_any_arrays(arrays: Any, bombs: bool, folder: Path) -> None:
    path, rng = folder / "any.npz", np.random.default_rng(0)
    made: dict[str, Any] = {
        name: np.frombuffer(rng.bytes(int(np.prod(shape)) * np.dtype(kind).itemsize), kind).reshape(
            shape
        )
        for name, (kind, shape) in arrays.items()
    }
    if bombs:
        made["images"] = np.array([Bomb(), Bomb()], object)
    np.savez(path, **made)
    read_or_refused(lambda: load_npz(path))


@pytest.fixture(scope="module")
def npz(folder: Path) -> bytes:
    path = folder / "whole.npz"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 4, 4, 1), np.uint8)
    np.savez_compressed(path, images=images, labels=np.arange(6) % 3)
    return path.read_bytes()


@FUZZ
@given(edits=EDITS)
def test_npz_files_with_damaged_bytes(edits: Any, npz: bytes, folder: Path) -> None:
    path = folder / "damaged.npz"
    path.write_bytes(damaged(npz, edits))
    read_or_refused(lambda: load_npz(path))


def test_a_pickle_in_place_of_a_file_is_not_run(folder: Path) -> None:
    path = folder / "bomb"
    path.write_bytes(pickle.dumps(Bomb()))
    readers: list[Callable[[], Any]] = [
        lambda: load_npz(path),
        lambda: ktg.load_node(path),
        lambda: ktg.load_prior(path),
        lambda: ktg.load_state_dict(path, "resnet8"),
        lambda: ktg.Graph.load(path),
    ]
    for read in readers:
        assert not read_or_refused(read)


# --- weights


@pytest.fixture(scope="module")
def exported(folder: Path) -> bytes:
    fns = ktg.build_model("cnn", 3)
    params, state = fns.init(jax.random.key(0), jax.numpy.zeros((1, 8, 8, 1)))
    path = folder / "whole.safetensors"
    ktg.save_node(path, params, state, model="cnn", num_classes=3, image_shape=(8, 8, 1))
    return path.read_bytes()


@FUZZ
@given(edits=EDITS)
def test_weights_with_damaged_bytes(edits: Any, exported: bytes, folder: Path) -> None:
    path = folder / "damaged.safetensors"
    # Most of a file is numbers, of which any are as good: most damage is to be in the header.
    head = 2500
    path.write_bytes(damaged(exported[:head], edits) + exported[head:])
    read_or_refused(lambda: ktg.load_node(path))
    read_or_refused(lambda: ktg.load_state_dict(path, "resnet8"))
    read_or_refused(lambda: ktg.load_prior(path))


TEXTS = st.dictionaries(
    st.sampled_from(
        ["model", "num_classes", "image_shape", "input", "input_divisor", "format", "x"]
    ),
    st.one_of(
        st.text(max_size=12), JSON.map(json.dumps), st.sampled_from(["cnn", "3", "[8, 8, 1]"])
    ),
)


@FUZZ
@given(texts=TEXTS, names=st.lists(st.text(max_size=10), max_size=3, unique=True), shape=SHAPES)
def test_weights_of_any_names_and_texts(
    texts: dict[str, str], names: list[str], shape: tuple[int, ...], folder: Path
) -> None:
    path = folder / "any.safetensors"
    tensors = {
        name.encode("utf-8", "replace").decode(): np.zeros(shape, np.float32) for name in names
    }
    texts = {key: value.encode("utf-8", "replace").decode() for key, value in texts.items()}
    save_file(tensors, path, texts)
    read_or_refused(lambda: ktg.load_node(path))
    read_or_refused(lambda: ktg.load_state_dict(path, "resnet8"))


# --- recordings


@pytest.fixture(scope="module")
def recorded(folder: Path) -> Path:
    path = folder / "recorded"
    header = Header("batches", {"batch_size": 4, "images": 8}, rows=6, classes=3, dtype="float16")
    with RecordingWriter(path, header) as writer:
        for step in range(6):
            writer.add(np.full((4, 3), step, np.float32))
    return path


@FUZZ
@given(edits=EDITS, which=st.integers(0, 9))
def test_recordings_with_damaged_files(
    edits: Any, which: int, recorded: Path, folder: Path
) -> None:
    copy = folder / "recording"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(recorded, copy)
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    path = files[which % len(files)]
    path.write_bytes(damaged(path.read_bytes(), edits))
    read_or_refused(lambda: Recording(copy).rows(0, 6))


# --- checkpoints


@pytest.fixture(scope="module")
def saved(folder: Path) -> Path:
    graph, optimizer = ktg.graphs.independent(["cnn"]), ktg.sgd(0.1)
    fns = [ktg.build_model("cnn", 3)]
    state: GraphState = ktg.init_state(
        graph, fns, optimizer, jax.random.key(0), jax.numpy.zeros((1, 8, 8, 1))
    )
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(1, state, ["a"], 0.5)
    return folder / "checkpoints"


@FEW
@given(edits=EDITS, which=st.integers(0, 99))
def test_checkpoints_with_damaged_files(edits: Any, which: int, saved: Path, folder: Path) -> None:
    copy = folder / "damaged"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(saved, copy)
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    path = files[which % len(files)]
    path.write_bytes(damaged(path.read_bytes(), edits))
    read_or_refused(lambda: read_nodes(copy))
