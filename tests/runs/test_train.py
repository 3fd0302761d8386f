"""The training command: what it writes, and what its options do."""

import json
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from runs import (
    Ended,
    assert_same_arrays,
    end_of,
    finished,
    in_process,
    metrics,
    options,
    result,
    saved_state,
    small,
    start,
    train,
)

import ktg_jax as ktg
from experiments import evaluate
from experiments import train as train_module
from experiments.runs.workdir import Workdir
from ktg_jax.errors import InputError
from ktg_jax.io.trees import FlatTree
from ktg_jax.training.checkpoint_reading import read_nodes


def node_arrays(workdir: Path, epoch: int, name: str) -> FlatTree:
    """A node's params and statistics in a checkpoint."""
    prefix = f"nodes.{name}."
    arrays = saved_state(workdir, epoch)
    found = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    assert found
    return found


# --- without arguments


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """`python -m experiments.train` in an empty folder."""
    folder = tmp_path_factory.mktemp("default")
    ended = end_of(start("experiments.train", cwd=folder, devices=1))
    assert ended.code == 0, ended.err
    (workdir,) = (folder / "runs").iterdir()
    return workdir, ended


def test_without_arguments_the_command_teaches_digits(default_run: tuple[Path, Ended]) -> None:
    workdir, ended = default_run
    assert result(workdir)["target"]["test_accuracy"] > 0.9
    assert ended.err == ""
    assert "3 nodes (cnn, cnn, cnn), 6 transfer edges" in ended.out
    assert f"{100 * result(workdir)['target']['test_accuracy']:.2f} %" in ended.out
    assert ended.out.endswith(f"runs/{workdir.name}.\n")
    assert workdir.name.startswith("digits-mutual-")


def test_a_run_says_what_it_is(default_run: tuple[Path, Ended]) -> None:
    workdir, _ = default_run
    assert ktg.Graph.load(workdir / "graph.json") == ktg.graphs.mutual(["cnn", "cnn", "cnn"])
    content = json.loads((workdir / "config.json").read_text())
    config = content["config"]
    for field, value in (
        ("data", "digits"),
        ("epochs", 15),
        ("batch_size", 64),
        ("learning_rate", 0.1),
        ("schedule", "step"),
        ("seed", 0),
        ("val_fraction", 0.1),
        ("parallel", "jit"),
    ):
        assert config[field] == value
    assert [node["name"] for node in config["graph"]["nodes"]] == ["cnn-0", "cnn-1", "cnn-2"]
    facts = config["data_facts"]
    assert (facts["train"], facts["val"], facts["test"]) == (1294, 144, 359)
    versions = content["versions"]
    assert versions["jax"] == sys.modules["jax"].__version__
    assert {"python", "ktg_jax", "flax", "optax", "orbax-checkpoint", "numpy"} < versions.keys()


def test_a_run_has_a_line_of_metrics_an_epoch(default_run: tuple[Path, Ended]) -> None:
    lines = (default_run[0] / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["epoch"], r["step"]) for r in records] == [(e, 20 * e) for e in range(1, 16)]
    for record in records:
        assert record.keys() == {"epoch", "step", "seconds", "images_per_second", "nodes"}
        assert record["seconds"] > 0
        assert record["images_per_second"] > 0
        assert [node["name"] for node in record["nodes"]] == ["cnn-0", "cnn-1", "cnn-2"]
        for node in record["nodes"]:
            assert node.keys() == {
                *("name", "train_loss", "train_accuracy", "val_loss", "val_accuracy"),
                "edge_losses",
            }
            assert len(node["edge_losses"]) == 3
            np.testing.assert_allclose(sum(node["edge_losses"]), node["train_loss"], rtol=1e-5)
    first, last = records[0]["nodes"][0], records[-1]["nodes"][0]
    assert last["train_loss"] < first["train_loss"]
    assert last["val_accuracy"] > 0.9


def test_a_result_has_the_last_and_the_best_epoch(default_run: tuple[Path, Ended]) -> None:
    workdir, _ = default_run
    found, records = result(workdir), metrics(workdir)
    assert found["target"] == found["nodes"][0]
    assert (found["epochs"], found["steps"]) == (15, 300)
    scores = [record["nodes"][0]["val_accuracy"] for record in records]
    best = 1 + scores.index(max(scores))
    for i, node in enumerate(found["nodes"]):
        assert (node["name"], node["model"], node["frozen"]) == (f"cnn-{i}", "cnn", False)
        assert node["best"]["epoch"] == best
        for numbers, epoch in ((node, 15), (node["best"], best)):
            recorded = records[epoch - 1]["nodes"][i]
            assert numbers["val_accuracy"] == recorded["val_accuracy"]
            assert numbers["val_loss"] == recorded["val_loss"]
            assert 0.9 < numbers["test_accuracy"] <= 1
            assert 0 < numbers["test_loss"] < 1
    assert found["ensemble"].keys() == found["target"].keys() - {"name", "model", "frozen"}


def test_a_run_keeps_its_best_and_last_two_checkpoints(default_run: tuple[Path, Ended]) -> None:
    workdir, _ = default_run
    best = result(workdir)["target"]["best"]["epoch"]
    epochs = {int(path.name) for path in (workdir / "checkpoints").iterdir()}
    assert epochs == {best, 14, 15}
    for epoch in epochs:
        assert tuple(read_nodes(workdir / "checkpoints", epoch)[1]) == ("cnn-0", "cnn-1", "cnn-2")


def test_a_run_has_pictures(default_run: tuple[Path, Ended]) -> None:
    workdir, _ = default_run
    for name in ("graph.png", "curves.png"):
        with Image.open(workdir / name) as image:
            image.verify()
    for name in ("graph.svg", "curves.svg"):
        assert ElementTree.parse(workdir / name).getroot().tag.endswith("svg")


# --- options


def test_a_run_depends_on_its_seed(tmp_path_factory: pytest.TempPathFactory) -> None:
    first = finished(tmp_path_factory, "tiny")
    other = finished(tmp_path_factory, "tiny-seed-1", seed=1)
    for a, b in zip(metrics(first), metrics(other), strict=True):
        assert a["nodes"] != b["nodes"]


@pytest.mark.slow
def test_without_validation_there_is_no_best_epoch(tmp_path: Path) -> None:
    said = train(tmp_path / "run", val_fraction=0.0, models=("tiny",), epochs=4)
    node = result(tmp_path / "run")["target"]
    assert node["val_accuracy"] is node["val_loss"] is None
    assert "best" not in node
    assert "200 training, 359 test images" in said
    assert [n["val_loss"] for r in metrics(tmp_path / "run") for n in r["nodes"]] == [None] * 4
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"3", "4"}


@pytest.mark.slow
def test_mixed_precision_computes_in_bfloat16_and_keeps_float32(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    train(tmp_path / "run", mixed_precision=True)
    arrays = saved_state(tmp_path / "run", 3)
    kinds = {array.dtype for array in arrays.values() if array.dtype.kind not in "iu"}
    assert kinds == {np.dtype(np.float32)}
    full = finished(tmp_path_factory, "tiny")
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(full), strict=True):
        for a, b in zip(ours["nodes"], theirs["nodes"], strict=True):
            assert a["train_loss"] != b["train_loss"]
            np.testing.assert_allclose(a["train_loss"], b["train_loss"], rtol=0.05)


def test_a_model_that_cannot_be_mixed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"got 'staged'; allowed: for bfloat16"):
        train(tmp_path / "run", mixed_precision=True, models=("tiny", "staged"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_pmap_and_jit_agree(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    train(tmp_path / "run", parallel="pmap")
    under_jit = finished(tmp_path_factory, "tiny")
    arrays = saved_state(under_jit, 3)
    for name, array in saved_state(tmp_path / "run", 3).items():
        np.testing.assert_allclose(array, arrays[name], rtol=1e-3, atol=1e-4, err_msg=name)
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(under_jit), strict=True):
        for a, b in zip(ours["nodes"], theirs["nodes"], strict=True):
            for key in ("train_loss", "val_loss", "edge_losses"):
                np.testing.assert_allclose(a[key], b[key], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_prune_leaves_out_nodes_that_do_not_matter_and_no_others(tmp_path: Path) -> None:
    graph = ktg.Graph(
        tuple(ktg.Node("tiny", name) for name in ("target", "aside", "helper")),
        (
            ("through", "cutoff", "correct"),
            ("through", "linear", "cutoff"),
            ("cutoff", "cutoff", "through"),
        ),
    )
    graph.save(tmp_path / "graph.json")
    changes = {"graph": str(tmp_path / "graph.json"), "models": ()}
    for prune in (False, True):
        train(tmp_path / str(prune), prune=prune, **changes)
    assert [node["name"] for node in result(tmp_path / "True")["nodes"]] == ["target", "helper"]
    assert len(result(tmp_path / "False")["nodes"]) == 3
    for name in ("target", "helper"):
        whole = node_arrays(tmp_path / "False", 3, name)
        for key, array in node_arrays(tmp_path / "True", 3, name).items():
            np.testing.assert_allclose(array, whole[key], rtol=1e-3, atol=1e-5, err_msg=key)


def test_imported_modules_can_register_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_models.py").write_text(
        "import flax.linen as nn\n"
        "import ktg_jax as ktg\n\n\n"
        "class Linear(nn.Module):\n"
        "    num_classes: int\n\n"
        "    @nn.compact\n"
        "    def __call__(self, images):\n"
        "        return nn.Dense(self.num_classes)(images.reshape(len(images), -1))\n\n\n"
        'ktg.register_model("my_own_linear", Linear)\n'
    )
    with pytest.raises(InputError, match=r"^models\[0\]: got 'my_own_linear'"):
        train(tmp_path / "run", models=("my_own_linear",), imports=(), epochs=1)
    monkeypatch.syspath_prepend(tmp_path)
    train(tmp_path / "run", models=("my_own_linear",), imports=("my_own_models",), epochs=1)
    assert result(tmp_path / "run")["target"]["model"] == "my_own_linear"
    assert node_arrays(tmp_path / "run", 1, "my_own_linear-0").keys() == {
        "params.Dense_0.bias",
        "params.Dense_0.kernel",
    }


# --- engines and the process


KEPT = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "edge_losses")


@pytest.mark.slow
def test_the_engines_train_alike(tmp_path: Path) -> None:
    said = {
        engine: train(tmp_path / engine, engine=engine, steps_per_call=calls)
        for engine, calls in (("fused", 3), ("batched", 3), ("per_node", 1))
    }
    assert "epochs on 2 x cpu (jit)." in said["fused"]
    assert "epochs on 2 x cpu (node by node)." in said["per_node"]
    assert "epochs on 2 x cpu (jit, batched)." in said["batched"]
    for other in ("batched", "per_node"):
        pairs = zip(metrics(tmp_path / "fused"), metrics(tmp_path / other), strict=True)
        for ours, theirs in pairs:
            for a, b in zip(ours["nodes"], theirs["nodes"], strict=True):
                for key in KEPT:
                    np.testing.assert_allclose(a[key], b[key], rtol=1e-3, atol=1e-5)
    # The engine is no part of what the run is.
    assert "is finished" in train(tmp_path / "fused", engine="per_node")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps_per_call": 2}, "steps_per_call: got 2; allowed: 1 with the engine per_node"),
        ({"parallel": "pmap"}, "parallel: got 'pmap'; allowed: jit with the engine per_node"),
        ({"cpu_devices": 3}, "cpu_devices: got 3; allowed: set before JAX starts"),
    ],
)
def test_what_an_engine_or_process_cannot_do_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = small(tmp_path / "run", engine="per_node", **changes)
    ended = in_process(train_module.main, *options(config))
    assert ended.code == 2
    assert ended.err.startswith(f"error: {message}")
    assert ended.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_compiled_programs_are_kept_unless_they_should_not_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("KTG_CPU_CONVOLUTION", "chunked")
    started = []
    for cached in (True, False):
        (tmp_path / str(cached)).mkdir()
        monkeypatch.setenv("KTG_CACHE_DIR", str(tmp_path / str(cached)))
        config = small("run", epochs=1, compile_cache=cached, cpu_devices=2)
        started.append(
            start("experiments.train", *options(config), cwd=tmp_path / str(cached), devices=1)
        )
    for process, cached in zip(started, (True, False), strict=True):
        ended = end_of(process)
        assert (ended.code, ended.err) == (0, "")
        assert "epochs on 2 x cpu (node by node)." in ended.out
        assert "\nConvolutions: chunked (chosen by KTG_CPU_CONVOLUTION).\n" in ended.out
        compiled = tmp_path / str(cached) / "compiled"
        assert (len(list(compiled.glob("*"))) > 10) if cached else (not compiled.exists())


# --- TensorBoard


def event_values(folder: Path) -> dict[str, dict[int, float]]:
    """The scalars in TensorBoard's event files, by tag and step."""
    values: dict[str, dict[int, float]] = defaultdict(dict)
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        for event in events(path):
            for value in event.summary.value:
                values[value.tag][event.step] = value.simple_value
    return values


def events(path: Path) -> Iterator[Any]:
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])  # then 4 bytes of checksum, the data, 4 more
        yield event_pb2.Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_tensorboard_files_have_what_the_metrics_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboardX")
    append = Workdir.append_record

    def append_and_stop(self: Workdir, record: dict[str, Any]) -> None:
        append(self, record)
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workdir, "append_record", append_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", tensorboard=True)
    train(tmp_path / "run", tensorboard=True)

    values = event_values(tmp_path / "run" / "tensorboard")
    records = metrics(tmp_path / "run")
    for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        for i, name in enumerate(("tiny-0", "tiny-1")):
            expected = {r["epoch"]: np.float32(r["nodes"][i][key]) for r in records}
            assert values[f"{key}/{name}"] == expected


def test_without_tensorboardx_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    ended = in_process(train_module.main, *options(small(tmp_path / "run", tensorboard=True)))
    assert ended.code == 2
    assert ended.err.startswith("error: tensorboard: got True; allowed: ")
    assert "ktg_jax[tensorboard]" in ended.err
    assert ended.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- teachers


@pytest.mark.slow
def test_a_frozen_teacher_stays_what_it_was(tmp_path: Path) -> None:
    teacher = {"graph": "independent", "models": ("cnn",), "epochs": 1}
    train(tmp_path / "teacher", **teacher)
    before = node_arrays(tmp_path / "teacher", 1, "cnn-0")
    changes = {"models": ("tiny", "cnn"), "weights": ("none", str(tmp_path / "teacher"))}
    train(tmp_path / "run", graph="distillation", temperature=4.0, epochs=2, **changes)

    for epoch in (1, 2):
        assert_same_arrays(node_arrays(tmp_path / "run", epoch, "cnn-1"), before)
    arrays = saved_state(tmp_path / "run", 2)
    assert [name for name in arrays if name.startswith("training.opt_state.tiny-0")]
    assert not [name for name in arrays if name.startswith("training.opt_state.cnn-1")]
    student, frozen = result(tmp_path / "run")["nodes"]
    assert (student["frozen"], frozen["frozen"]) == (False, True)
    alone = result(tmp_path / "teacher")["target"]
    for key in ("val_accuracy", "test_accuracy"):
        assert frozen[key] == alone[key]
    for record in metrics(tmp_path / "run"):
        np.testing.assert_allclose(record["nodes"][1]["val_loss"], alone["val_loss"], rtol=1e-5)
        assert record["nodes"][1]["edge_losses"] == [0, 0]
        assert record["nodes"][0]["edge_losses"][1] > 0


@pytest.mark.slow
def test_weights_come_from_runs_their_nodes_and_files(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = finished(tmp_path_factory, "tiny")
    file = tmp_path / "teacher.safetensors"
    assert in_process(evaluate.main, run, "--export", file, "--node", "tiny-1").code == 0
    changes: dict[str, Any] = {
        "models": ("tiny",) * 4,
        "weights": ("none", str(run), f"{run}:tiny-1", str(file)),
    }
    train(tmp_path / "run", graph="distillation", epochs=1, **changes)
    for name, source in (("tiny-1", "tiny-0"), ("tiny-2", "tiny-1"), ("tiny-3", "tiny-1")):
        found = node_arrays(tmp_path / "run", 1, name)
        assert_same_arrays(found, node_arrays(run, 3, source))

    nodes = [
        {"model": "tiny", "weights": None if source == "none" else source}
        for source in changes["weights"]
    ]
    cutoffs = [["cutoff"] * 4] * 3
    graph = {"nodes": nodes, "gates": [["through"] * 4, *cutoffs]}
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    same = {"graph": str(tmp_path / "graph.json"), "models": (), "epochs": 1}
    assert "is finished; nothing to do" in train(tmp_path / "run", **same)
    train(tmp_path / "again", **same)
    assert_same_arrays(saved_state(tmp_path / "again", 1), saved_state(tmp_path / "run", 1))


def test_a_node_that_learns_starts_from_its_weights(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = finished(tmp_path_factory, "tiny")
    changes = {"models": ("tiny",), "weights": (f"{run}:tiny-1",), "learning_rate": 1e-30}
    train(tmp_path / "run", epochs=1, **changes)
    ours, theirs = node_arrays(tmp_path / "run", 1, "tiny-0"), node_arrays(run, 3, "tiny-1")
    params = [name for name in theirs if name.startswith("params.")]
    assert_same_arrays({n: ours[n] for n in params}, {n: theirs[n] for n in params})
    statistics = "model_state.batch_stats.norm.mean"
    assert np.any(ours[statistics] != theirs[statistics])


# --- losses on stages


def distilling(folder: Path, attention: float) -> dict[str, Any]:
    """A student that hears its label, and looks where a frozen teacher looks."""
    nodes = [{"model": "staged"}, {"model": "staged_wide", "weights": str(folder / "teacher")}]
    edge = {"gate": "through", "loss": {"attention": attention}}
    graph = {"nodes": nodes, "gates": [["through", edge], ["cutoff"] * 2]}
    path = folder / f"{attention}.json"
    path.write_text(json.dumps(graph))
    return {"graph": str(path), "models": (), "epochs": 4}


ATTENTIVE = 1000.0


@pytest.fixture(scope="module")
def attentive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher of other widths, and a student that looks where it looks."""
    folder = tmp_path_factory.mktemp("attentive")
    train(folder / "teacher", graph="independent", models=("staged_wide",), epochs=1)
    train(folder / "run", **distilling(folder, ATTENTIVE))
    return folder


def heard(workdir: Path) -> np.ndarray:
    """The loss of the edge from the teacher to its student, an epoch each."""
    return np.array([record["nodes"][0]["edge_losses"][1] for record in metrics(workdir)])


@pytest.mark.slow
def test_a_student_comes_to_look_where_its_teacher_looks(attentive: Path, tmp_path: Path) -> None:
    ignored = distilling(attentive, 1e-6)
    train(tmp_path / "run", **ignored)
    distance, without = heard(attentive / "run") / 1000, heard(tmp_path / "run") / 1e-6
    assert 0 < distance[-1] < 0.5 * without.min()
    # Two stages of 16 positions; maps of norm 1 without negative entries.
    assert without.max() < 2 * 2 / 16


@pytest.mark.slow
def test_losses_on_stages_leave_the_teacher_and_are_recorded(attentive: Path) -> None:
    teacher = node_arrays(attentive / "teacher", 1, "staged_wide-0")
    assert_same_arrays(node_arrays(attentive / "run", 4, "staged_wide-1"), teacher)
    for record in metrics(attentive / "run"):
        student, frozen = record["nodes"]
        np.testing.assert_allclose(sum(student["edge_losses"]), student["train_loss"], rtol=1e-5)
        assert frozen["edge_losses"] == [0, 0]
    graph = ktg.Graph.load(attentive / "run" / "graph.json")
    assert graph.edges[0][1].losses == {"attention": 1000.0}


@pytest.mark.slow
def test_the_engines_train_alike_on_stages(attentive: Path, tmp_path: Path) -> None:
    changes = distilling(attentive, ATTENTIVE)
    train(tmp_path / "run", engine="fused", steps_per_call=3, **changes)
    np.testing.assert_allclose(heard(tmp_path / "run"), heard(attentive / "run"), rtol=1e-2)


@pytest.mark.slow
def test_edges_that_carry_something_else_make_another_run(attentive: Path) -> None:
    assert "is finished" in train(attentive / "run", **distilling(attentive, ATTENTIVE))
    with pytest.raises(InputError, match=r"graph\.gates: ") as error:
        train(attentive / "run", **distilling(attentive, 999.0))
    assert error.value.field == "workdir"
