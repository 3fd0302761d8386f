"""A run is told by what it is made of: files may be moved, but what is in them must not change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import Ended, in_process, metrics, options, own_cache, result, small, train

from experiments import evaluate
from experiments import train as train_module
from experiments.runs.config import TrainConfig, default_workdir, resolved
from experiments.runs.graphs import build_graph
from experiments.runs.identity import differences, identity
from experiments.runs.workdir import Workdir
from ktg_jax.data.dataset import Split, hold_out
from ktg_jax.errors import InputError

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (80, 8, 8, 1), np.uint8)
LABELS = np.arange(80) % 4
OPTIONS: dict[str, Any] = {"train_limit": None, "epochs": 1, "models": ("tiny",)}


def write(path: Path, **changes: Any) -> Path:
    arrays: dict[str, Any] = {"images": IMAGES, "labels": LABELS}
    arrays |= {"test_images": IMAGES[:40], "test_labels": LABELS[:40]}
    np.savez(path, **arrays | changes)
    return path


def write_folder(root: Path) -> Path:
    for split, images in (("train", IMAGES), ("test", IMAGES[:40])):
        for i, image in enumerate(images):
            path = root / split / str(LABELS[i]) / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(path)
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and a finished run on it; to be copied."""
    folder = tmp_path_factory.mktemp("made")
    write(folder / "data.npz")
    train(folder / "run", data=f"npz:{folder}/data.npz", **OPTIONS)
    return folder


@pytest.fixture
def moved(made: Path, tmp_path: Path) -> Path:
    """The run and its data in another place, each for itself."""
    shutil.copytree(made / "run", tmp_path / "moved" / "run")
    shutil.copy(made / "data.npz", tmp_path / "moved" / "other.npz")
    content = json.loads((tmp_path / "moved" / "run" / "config.json").read_text())
    content["config"]["data"] = "npz:/nowhere/data.npz"
    (tmp_path / "moved" / "run" / "config.json").write_text(json.dumps(content))
    return tmp_path / "moved"


def stop(workdir: Path) -> None:
    (workdir / "result.json").unlink()


def accuracy(ended: Ended) -> float:
    assert (ended.code, ended.err) == (0, "")
    return float(ended.out.splitlines()[-1].split()[-2])


def assert_refused(ended: Ended, *parts: str) -> None:
    assert ended.code == 2, ended
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    for part in parts:
        assert part in ended.err


# --- moved data


def test_a_run_whose_data_was_moved_is_evaluated(made: Path, moved: Path) -> None:
    expected = round(100 * result(made / "run")["target"]["test_accuracy"], 2)
    run = moved / "run"
    assert_refused(in_process(evaluate.main, run), "npz:/nowhere/data.npz", "--data npz:PATH")
    for places in (
        ["--data", f"npz:{moved}/other.npz"],
        ["--data-dir", moved / "other.npz"],
    ):
        assert accuracy(in_process(evaluate.main, run, *places)) == expected
    (moved / "other.npz").rename(moved / "data.npz")
    assert accuracy(in_process(evaluate.main, run, "--data-dir", moved)) == expected
    for data in ("digits", f"folder:{moved}"):
        assert_refused(in_process(evaluate.main, run, "--data", data), "npz:PATH")


def test_a_run_whose_data_was_moved_goes_on_and_remembers_the_place(
    made: Path, moved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(moved / "run")
    (moved / "link.npz").symlink_to("other.npz")
    monkeypatch.chdir(moved)
    said = train("run", data="npz:./link.npz", **OPTIONS)
    assert "Resuming after epoch 1 of 1" in said
    assert result(moved / "run") == result(made / "run")
    monkeypatch.chdir("/")
    accuracy(in_process(evaluate.main, moved / "run"))  # where it is now, from anywhere
    assert "is finished" in train(moved / "run", data=f"npz:{moved}/other.npz", **OPTIONS)
    (moved / "link.npz").unlink()
    accuracy(in_process(evaluate.main, moved / "run"))


def test_data_in_the_home_folder_is_found_there(
    moved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(moved))
    stop(moved / "run")
    assert "Resuming" in train("~/run", data="npz:~/other.npz", **OPTIONS)
    accuracy(in_process(evaluate.main, moved / "run"))


def test_a_folder_of_images_may_be_moved(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "images")
    train(tmp_path / "run", data=f"folder:{data}", **OPTIONS)
    there = tmp_path / "there"
    there.mkdir()
    data.rename(there / "images")
    assert_refused(in_process(evaluate.main, tmp_path / "run"), "--data folder:PATH")
    for place in (there, there / "images"):
        accuracy(in_process(evaluate.main, tmp_path / "run", "--data-dir", place))
    assert "is finished" in train(tmp_path / "run", data=f"folder:{there}/images", **OPTIONS)


def test_a_finished_run_is_finished_when_its_data_is_gone(moved: Path) -> None:
    assert "is finished" in train(moved / "run", data="npz:/nowhere/data.npz", **OPTIONS)
    with pytest.raises(InputError, match="a file that exists"):
        train(moved / "run", data="npz:/nowhere/typo.npz", **OPTIONS)


# --- changed data


def without_first_of(split: str) -> np.ndarray:
    """The images, the first of a split being black."""
    _, val = hold_out(Split(IMAGES, LABELS.astype(np.int32)), 0.1, seed=0)
    assert val is not None
    is_val = np.array([any(np.array_equal(image, v) for v in val.images) for image in IMAGES])
    index = np.flatnonzero(is_val == (split == "val"))[0]
    return np.where(np.arange(80)[:, None, None, None] == index, 0, IMAGES).astype(np.uint8)


CHANGES: dict[str, dict[str, Any]] = {
    "test_crc32": {"test_labels": (LABELS[:40] + 1) % 4},
    "train_crc32": {"images": without_first_of("train")},
    "val_crc32": {"images": without_first_of("val")},
    "class_names_crc32": {"class_names": np.array(["a", "b", "c", "d"])},
}


@pytest.mark.parametrize("field", CHANGES)
def test_data_that_changed_is_refused(moved: Path, field: str) -> None:
    data = f"npz:{write(moved / 'data.npz', **CHANGES[field])}"
    for split in ("test", "val"):
        ended = in_process(evaluate.main, moved / "run", "--data", data, "--split", split)
        if split == "val" and field == "test_crc32":
            accuracy(ended)  # nobody looks at test images then
        else:
            assert_refused(ended, f"what the run was trained on ({field}: ")
    for is_finished in (True, False):
        if not is_finished:
            stop(moved / "run")
        command = options(small(moved / "run", data=data, **OPTIONS))
        refused = in_process(train_module.main, *command)
        assert_refused(refused, f"(differing: data_facts.{field}: ")
        assert refused.err.count(", now ") == 1


def test_a_run_of_former_times_has_fewer_checksums(moved: Path) -> None:
    path = moved / "run" / "config.json"
    content = json.loads(path.read_text())
    for field in ("class_names_crc32", "val_crc32", "test_crc32"):
        del content["config"]["data_facts"][field]
    del content["cwd"]
    path.write_text(json.dumps(content))
    data = f"npz:{moved}/other.npz"
    accuracy(in_process(evaluate.main, moved / "run", "--data", data))
    stop(moved / "run")
    assert "Resuming" in train(moved / "run", data=data, **OPTIONS)
    facts = json.loads(path.read_text())["config"]["data_facts"]
    assert {"val_crc32", "test_crc32", "class_names_crc32"} <= facts.keys()


# --- weights


def distilling(workdir: Path, weights: str, **changes: Any) -> str:
    models = {"graph": "distillation", "models": ("tiny", "tiny"), "epochs": 1}
    return train(workdir, **models, weights=("none", weights), **changes)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and its student; to be copied."""
    folder = tmp_path_factory.mktemp("taught")
    for name, seed in (("teacher", 0), ("another", 1)):
        train(folder / name, models=("tiny", "tiny"), epochs=1, seed=seed)
    distilling(folder / "student", str(folder / "teacher"))
    return folder


def test_a_teacher_may_be_moved_but_not_be_another(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(taught / "student", tmp_path / "student")
    shutil.copytree(taught / "teacher", tmp_path / "a:b")
    stop(tmp_path / "student")
    monkeypatch.chdir(tmp_path)
    assert "Resuming" in distilling(tmp_path / "student", "./a:b")
    for source in (str(tmp_path / "a:b"), "a:b:tiny-0"):
        assert "is finished" in distilling(tmp_path / "student", source)
    graph = json.loads((tmp_path / "student" / "graph.json").read_text())
    assert graph["nodes"][1]["weights"] == "a:b:tiny-0"
    for source in ("a:b:tiny-1", str(taught / "another")):
        with pytest.raises(InputError, match=r"weights_facts\.tiny-1: "):
            distilling(tmp_path / "student", source)


def test_without_checksums_weights_are_told_by_their_path() -> None:
    def fields(path: str | None, **facts: Any) -> dict[str, Any]:
        return {"graph": {"nodes": [{"name": "a", "weights": path}]}, **facts}

    known = {"weights_facts": {"a": 1}}
    assert differences(fields("x"), fields("y"))
    assert not differences(fields("x", **known), fields("y"))
    assert differences(fields("x", **known), fields(None))
    assert not differences(fields("x", **known), fields("y", **known))
    assert differences(fields("x", **known), fields("y", weights_facts={"a": 2}))
    assert identity(fields("x", **known)) == identity(fields("y", **known))


# --- default folders


@pytest.fixture
def default(moved: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Trains without a workdir; returns the name of the folder."""
    monkeypatch.chdir(moved)

    def run(**changes: Any) -> str:
        fields = vars(small("unused", **OPTIONS | changes)) | {"workdir": None}
        ended = in_process(train_module.main, *options(TrainConfig(**fields)))
        assert (ended.code, ended.err) == (0, "")
        folders = sorted((moved / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        said = [path.name for path in folders if path.name in ended.out]
        assert len(said) == 1
        return said[0]

    return run


def test_default_folders_are_named_by_contents(
    default: Callable[..., str], moved: Path, taught: Path
) -> None:
    write(moved / "b.npz", images=IMAGES[::-1])
    first = default(data="npz:other.npz")
    assert default(data=f"npz:{moved}/other.npz") == first
    (moved / "other.npz").rename(moved / "c.npz")
    assert default(data="npz:c.npz") == first
    assert default(data="npz:b.npz") != first

    (moved / "g.json").write_text((taught / "student" / "graph.json").read_text())
    shutil.copytree(taught / "teacher", moved / "teacher")
    text = (moved / "g.json").read_text()
    (moved / "h.json").write_text(text.replace(str(taught / "teacher"), "teacher"))
    graph = {"models": (), "data": "digits", "train_limit": 200}
    second = default(graph="g.json", **graph)
    assert second.startswith("digits-g-")
    assert default(graph="h.json", **graph) == second


def test_folders_that_were_named_by_paths_are_found(
    moved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(moved)
    config = TrainConfig(**vars(small("unused", **OPTIONS)) | {"data": "npz:other.npz"})
    fields = resolved(config, build_graph(config))
    facts = {"data_facts": Workdir("run").config["data_facts"]}
    former, now = default_workdir(config, fields), default_workdir(config, fields | facts)
    assert former != now
    former.parent.mkdir()
    shutil.copytree("run", former)
    assert default_workdir(config, fields | facts) == former


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "digits-mutual-a3a000c3"),
        (
            {"graph": "independent", "models": ("resnet20",), "data": "cifar10"},
            "cifar10-independent-d1834ae4",
        ),
    ],
)
def test_names_without_paths_are_as_ever(options: dict[str, Any], name: str) -> None:
    config = TrainConfig(**options)
    assert default_workdir(config, resolved(config, build_graph(config))).name == name


def test_a_network_is_not_trained_again_where_the_data_was_moved(
    moved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = moved / "cache"
    home.mkdir()
    monkeypatch.setenv("KTG_CACHE_DIR", str(own_cache(home)))
    own = OPTIONS | {"models": ("tiny", "tiny"), "data": f"npz:{moved}/other.npz"}
    pretrained = own | {"graph": "distillation", "weights": ("none", "pretrained")}
    assert "trained first" in train(moved / "first", **pretrained)
    (moved / "other.npz").rename(moved / "z.npz")
    pretrained["data"] = f"npz:{moved}/z.npz"
    assert "trained first" not in train(moved / "second", **pretrained)
    assert metrics(moved / "first") == metrics(moved / "second")
