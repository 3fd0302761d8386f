"""Runs whose nodes have priors: trained, resumed, evaluated, refused."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import (
    assert_same_end,
    end_of,
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
from ktg_jax.priors import PRIOR_FILE, normalised, stage_kernels

pytestmark = pytest.mark.slow

EPOCHS = 4
DIGITS: dict[str, Any] = {"student": "staged", "num_classes": 10, "image_shape": (8, 8, 1)}
PRIOR: dict[str, Any] = {"prior_weight": 5.0, "prior_quantile": 0.5, "prior_matching": "none"}
PATHS = ("stage1_conv.kernel", "stage2_conv.kernel")


@pytest.fixture(scope="module")
def prior_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prior of random kernels."""
    folder = tmp_path_factory.mktemp("prior")
    params, _ = ktg.build_model("staged", 10).init(jax.random.key(5), jnp.zeros((1, 8, 8, 1)))
    shapes, rng = stage_kernels(params), np.random.default_rng(5)
    kernels = tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes.values())
    ktg.save_prior(folder / PRIOR_FILE, ktg.Prior(kernels, tuple(shapes)), **DIGITS)
    return folder


def graph_file(folder: Path, *priors: dict[str, Any] | None) -> str:
    """A mutual graph of staged nodes, each with or without a prior."""
    nodes = [{"model": "staged", **(prior or {})} for prior in priors]
    gates = [["through"] * len(nodes)] * len(nodes)
    path = folder / "graph.json"
    path.write_text(json.dumps({"nodes": nodes, "gates": gates}))
    return str(path)


def changes(graph: str, **more: Any) -> dict[str, Any]:
    return {"graph": graph, "models": (), "epochs": EPOCHS, "learning_rate": 0.05, **more}


def distances(workdir: Path, node: int = 0) -> np.ndarray:
    """A node's distance from its prior, `[epochs, stages]`."""
    return np.array([record["nodes"][node]["prior_distance"] for record in metrics(workdir)])


@pytest.fixture(scope="module")
def whole(prior_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mutual run on digits whose target has a prior, node by node."""
    folder = tmp_path_factory.mktemp("whole")
    graph = graph_file(folder, {"prior": str(prior_folder)} | PRIOR, None)
    train(folder / "run", **changes(graph))
    return folder


def test_a_prior_draws_its_node_and_its_distance_is_recorded(
    whole: Path, prior_folder: Path, tmp_path: Path
) -> None:
    ours = distances(whole / "run")
    assert ours.shape == (EPOCHS, 2)
    assert (ours[-1] < 0.7 * ours[0]).all()
    for record in metrics(whole / "run"):
        assert "prior_distance" not in record["nodes"][1]
    # The same graph with a weight of 0 knows the distance, and stays where it is.
    idle = {"prior": str(prior_folder)} | PRIOR | {"prior_weight": 0.0}
    train(tmp_path / "run", **changes(graph_file(tmp_path, idle, None)))
    assert (distances(tmp_path / "run")[-1] > 1.5 * ours[-1]).all()


@pytest.mark.parametrize("matching", ["initialise", "assignment"])
def test_a_node_begins_by_its_matching(prior_folder: Path, tmp_path: Path, matching: str) -> None:
    prior = {"prior": str(prior_folder / PRIOR_FILE), "prior_matching": matching}
    graph = graph_file(tmp_path, prior | {"prior_weight": 0.0})
    train(tmp_path / "run", **changes(graph, epochs=1, learning_rate=1e-9))
    (distance,) = distances(tmp_path / "run")
    if matching == "initialise":
        np.testing.assert_allclose(distance, 0, atol=1e-5)
        arrays = saved_state(tmp_path / "run", 1)
        for path, kernel in zip(PATHS, ktg.load_prior(prior_folder).kernels, strict=True):
            stored = arrays[f"nodes.staged-0.params.{path}"]
            np.testing.assert_allclose(normalised(stored), normalised(kernel), rtol=1e-4, atol=1e-6)
    else:
        assert (distance > 0.1).all()
        assert (distance < 2.0).all()  # what random filters have in the mean


def test_both_engines_train_alike(whole: Path, tmp_path: Path) -> None:
    graph = str(whole / "graph.json")
    train(tmp_path / "run", **changes(graph, engine="fused", batch_size=32))
    np.testing.assert_allclose(
        distances(tmp_path / "run"), distances(whole / "run"), rtol=1e-2, atol=1e-3
    )
    for record, other in zip(metrics(tmp_path / "run"), metrics(whole / "run"), strict=True):
        for node, same in zip(record["nodes"], other["nodes"], strict=True):
            np.testing.assert_allclose(node["train_loss"], same["train_loss"], rtol=1e-2)


def test_a_run_is_evaluated_without_its_priors(
    whole: Path, tmp_path: Path, prior_folder: Path
) -> None:
    shutil.copytree(whole / "run", tmp_path / "run")
    text = (tmp_path / "run" / "graph.json").read_text()
    assert str(prior_folder) in text
    (tmp_path / "run" / "graph.json").write_text(text.replace(str(prior_folder), "gone"))
    ended = in_process(evaluate.main, tmp_path / "run")
    assert (ended.code, ended.err) == (0, "")
    assert f"{100 * result(whole / 'run')['target']['test_accuracy']:.2f} %" in ended.out


# --- interrupted


@pytest.mark.parametrize(
    ("matching", "engine"), [("initialise", "fused"), ("assignment", "per_node")]
)
def test_a_stopped_run_ends_where_it_would_have(
    prior_folder: Path,
    tmp_path: Path,
    matching: str,
    engine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prior = {"prior": str(prior_folder), "prior_matching": matching, "prior_weight": 2.0}
    run = changes(graph_file(tmp_path, prior, None), engine=engine, epochs=3)
    train(tmp_path / "whole", **run)
    append = Workdir.append_record

    def append_and_stop(self: Workdir, record: dict[str, Any]) -> None:
        append(self, record)
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workdir, "append_record", append_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", **run)
    assert "Resuming after epoch 1 of 3" in train(tmp_path / "run", **run)
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_a_killed_run_ends_where_it_would_have(whole: Path, tmp_path: Path) -> None:
    config = small(tmp_path / "run", **changes(str(whole / "graph.json")))
    process = start("experiments.train", *options(config), cwd=tmp_path, cache=tmp_path / "cache")
    checkpoint, until = tmp_path / "run" / "checkpoints" / "1", time.monotonic() + 200
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert end_of(process).code == -signal.SIGKILL
    assert not (tmp_path / "run" / "result.json").exists()
    assert "Resuming after epoch" in train(tmp_path / "run", **changes(str(whole / "graph.json")))
    assert_same_end(tmp_path / "run", whole / "run")


def test_a_run_whose_prior_changed_is_not_resumed(prior_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(prior_folder, tmp_path / "prior")
    run = changes(graph_file(tmp_path, {"prior": str(tmp_path / "prior")}), epochs=1)
    train(tmp_path / "run", **run)
    (tmp_path / "run" / "result.json").unlink()
    prior = ktg.load_prior(prior_folder)
    changed = prior.replace(kernels=tuple(-k for k in prior.kernels))  # type: ignore[attr-defined]
    ktg.save_prior(tmp_path / "prior" / PRIOR_FILE, changed, **DIGITS)
    with pytest.raises(ktg.InputError, match=r"prior_facts\.staged-0: ") as error:
        train(tmp_path / "run", **run)
    assert error.value.field == "workdir"


# --- bad input

BAD = [
    ({"prior": "gone"}, "nodes[0].prior: got 'gone'; allowed: a whole .safetensors file"),
    ({"prior": "{cnn}"}, "nodes[0].prior: got '{cnn}'; allowed: a prior fitted for this student"),
    ({"prior": "{fitted}", "prior_quantile": 2}, "nodes[0].prior_quantile: got 2; allowed: "),
    ({"prior_weight": 2.0}, "nodes[0].prior_weight: got 2.0; allowed: nothing"),
]


@pytest.mark.parametrize(("node", "message"), BAD, ids=lambda x: str(x)[:40])
def test_a_bad_prior_is_refused_and_leaves_nothing(
    node: dict[str, Any], message: str, prior_folder: Path, tmp_path: Path
) -> None:
    cnn = tmp_path / "cnn.safetensors"
    paths = {"cnn": cnn, "fitted": prior_folder}
    other = ktg.Prior((np.ones((3, 3, 1, 16), np.float32),), PATHS[:1])  # type: ignore[arg-type]
    ktg.save_prior(cnn, other, **DIGITS)
    given = {k: v.format(**paths) if isinstance(v, str) else v for k, v in node.items()}
    config = small(tmp_path / "run", **changes(graph_file(tmp_path, given)))
    ended = in_process(train_module.main, *options(config))
    assert ended.code == 2
    assert ended.err.startswith(f"error: {message.format(**paths)}")
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
