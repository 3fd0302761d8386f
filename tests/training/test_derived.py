"""Ensembles and averages: what they put out, what they teach, and that both engines agree."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import How, fused, per_node, trained
from runs import (
    assert_same_end,
    in_process,
    metrics,
    options,
    result,
    saved_state,
    small,
)
from tiny_models import Tiny

import ktg_jax as ktg
from experiments import evaluate, train
from ktg_jax import Graph, GraphState, InputError, Node
from ktg_jax.models.network import NO_NETWORK
from ktg_jax.training.batches import Arrays, Batches
from ktg_jax.training.derived import combined, moved
from ktg_jax.training.evaluation import eval_step
from ktg_jax.training.task import Task

CUT = ["cutoff"] * 4
STUDENT: dict[str, Any] = {"name": "student", "model": "tiny"}
PEER: dict[str, Any] = {"name": "peer", "model": "tiny"}
TEAM: dict[str, Any] = {"name": "team", "ensemble": ["student", "peer"], "of": "probabilities"}
MEAN: dict[str, Any] = {"name": "mean", "average": "student", "decay": 0.75}
FIELDS = {
    "nodes": [STUDENT, PEER, TEAM, MEAN],
    "gates": [["through", "cutoff", "through", "correct"],
              ["through", "linear", "cutoff", "cutoff"], CUT, CUT],
    "temperature": 2.0,
}  # fmt: skip
GRAPH = Graph.from_json(FIELDS)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (16, 8, 8, 1), np.uint8)
LABELS = np.asarray(np.arange(16) % 5, np.int32)
TINY = ktg.from_linen(Tiny(5))
FNS = (TINY, TINY, NO_NETWORK, TINY)
OPTIMIZER = ktg.sgd(0.1)


def initial() -> GraphState:
    return ktg.init_state(GRAPH, FNS, OPTIMIZER, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


# --- by hand


def test_an_ensemble_is_a_sum_of_logits_or_a_mean_of_probabilities() -> None:
    z = [jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.9, 0.1]]))]
    np.testing.assert_allclose(jnp.exp(combined(z, "probabilities")), [[0.7, 0.3]], rtol=1e-6)
    np.testing.assert_allclose(combined(z, "logits"), z[0] + z[1], rtol=1e-6)


def test_an_average_moves_by_its_decay_and_keys_stay() -> None:
    key = jax.random.key(3)
    found = moved({"w": jnp.full(2, 8.0), "key": key}, {"w": jnp.zeros(2), "key": key}, 0.75)
    assert found["w"].tolist() == [6.0, 6.0]
    assert found["key"] is key


def test_a_step_teaches_with_both_and_moves_the_average() -> None:
    state, images = initial(), jnp.asarray(IMAGES / np.float32(255))
    chex.assert_trees_all_equal(state.params[3], state.params[0])
    assert (state.params[2], state.frozen) == ({}, (2, 3))
    step = partial(ktg.train_step, node_fns=FNS, optimizer=OPTIMIZER, derived=GRAPH.derived)
    new, found = step(state, images, LABELS, GRAPH.edge_arrays, 0.5)

    logits = [TINY.apply(state.params[i], state.model_state[i], images, True)[0] for i in (0, 1)]
    stored, _ = TINY.apply(state.params[3], state.model_state[3], images, False)
    whole = [*logits, combined(logits, "probabilities"), stored]
    expected = ktg.edge_losses(whole, LABELS, GRAPH.edge_arrays, 0.5)
    np.testing.assert_allclose(found["edge_losses"], expected, rtol=1e-5, atol=1e-6)
    for part in ("params", "model_state"):
        before, after = getattr(state, part), getattr(new, part)
        target = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, before[0], after[0])
        chex.assert_trees_all_close(after[3], target, rtol=1e-6)
    with pytest.raises(InputError, match="the logits of node 2, too"):
        step(
            state,
            images,
            LABELS,
            GRAPH.edge_arrays,
            0.5,
            derived=ktg.Graph(["cnn"], [["through"]]).derived,
        )


def test_both_are_evaluated() -> None:
    state, images = initial(), jnp.asarray(IMAGES / np.float32(255))
    sums = eval_step(state, images, LABELS, node_fns=FNS, ensembles=GRAPH.derived.ensembles)
    logits = [
        TINY.apply(state.params[i], state.model_state[i], images, False)[0] for i in (0, 1, 3)
    ]
    team = combined(logits[:2], "probabilities")
    each = [*logits[:2], team, logits[2]]
    losses = [float(jnp.sum(ktg.cross_entropy(z, LABELS))) for z in each]
    np.testing.assert_allclose(sums["loss"], losses, rtol=1e-5)
    everything = float(jnp.sum(ktg.cross_entropy(sum(logits), LABELS)))
    np.testing.assert_allclose(sums["ensemble_loss"], everything, rtol=1e-5)


# --- engines


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [per_node, fused(2), fused(batched=True)],
    ids=["per node", "two a call", "batched"],
)
def test_all_engines_train_alike(how: How) -> None:
    task = Task(FNS, OPTIMIZER, Batches(16, 8, 1, True), (8, 8, 1), 4, GRAPH.derived)
    data = Arrays(IMAGES, LABELS)
    (expected, means), (found, others) = (
        trained(each, task, GRAPH, initial(), data) for each in (fused(), how)
    )
    chex.assert_trees_all_close(found.params, expected.params, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(others, means, rtol=1e-4)
    assert not np.isnan(means["accuracy"]).any()


# --- graphs


def test_they_are_written_as_they_are_read_and_needed_by_whom_they_teach() -> None:
    assert json.loads(GRAPH.to_json())["nodes"][2:] == [TEAM, MEAN]
    assert Graph.from_json(GRAPH.to_json()) == GRAPH
    assert GRAPH.pruned().derived == GRAPH.derived
    alone = Graph([Node(**STUDENT), Node(**PEER), Node(**TEAM)],
                  [["cutoff", "cutoff", "through"], ["through"] * 3, ["cutoff"] * 3])  # fmt: skip
    assert alone.needed_nodes() == (0, 1, 2)
    assert GRAPH.model_of(3) == "tiny"
    with pytest.raises(InputError, match="no ensembles or averages in a canonical graph"):
        GRAPH.canonical()
    target = Graph([Node(**TEAM), Node(**STUDENT), Node(**PEER)],
                   [["cutoff"] * 3, ["through"] * 3, ["cutoff", "cutoff", "through"]])  # fmt: skip
    assert target.derived.ensembles[0].members == (1, 2)


@pytest.mark.parametrize(
    ("node", "field", "allowed"),
    [
        ({"ensemble": []}, "nodes[2].ensemble", "at least one"),
        ({"ensemble": "student"}, "nodes[2].ensemble", "names of other nodes"),
        ({"ensemble": ["peer", "peer"]}, "nodes[2].ensemble", "each node once"),
        ({"ensemble": ["x"]}, "nodes[2].ensemble", "student, peer, x2"),
        ({"ensemble": ["x2"]}, "nodes[2].ensemble", "other nodes than itself"),
        ({"ensemble": ["peer"], "of": "votes"}, "nodes[2].of", "logits, probabilities"),
        ({"ensemble": ["peer"], "model": "cnn"}, "nodes[2].model", "an object with ensemble"),
        ({"average": "x"}, "nodes[2].average", "a node that learns: student, peer"),
        ({"average": "x2"}, "nodes[2].average", "a node that learns: student, peer"),
        ({"average": "teacher"}, "nodes[2].average", "a node that learns: student, peer"),
        ({"average": "peer", "decay": 1}, "nodes[2].decay", "below 1"),
        ({"average": "peer", "weights": "w"}, "nodes[2].weights", "an object with average"),
        ({"model": "cnn", "decay": 0.5}, "nodes[2].decay", "an object with model"),
    ],
)
def test_what_cannot_be_is_refused(node: dict[str, Any], field: str, allowed: str) -> None:
    teacher = {"name": "teacher", "model": "tiny", "weights": "w"}
    nodes = [STUDENT, PEER, {"name": "x2", **node}, teacher]
    with pytest.raises(InputError) as caught:
        Graph.from_json({"nodes": nodes, "gates": [["through"] * 4] * 2 + [CUT] * 2})
    assert (caught.value.field, allowed in caught.value.allowed) == (field, True), caught.value


@pytest.mark.parametrize("special", [TEAM, MEAN])
def test_they_hear_nobody_and_an_ensemble_has_no_stages(special: dict[str, Any]) -> None:
    nodes = [STUDENT, PEER, special]
    with pytest.raises(InputError, match=r"gates\[2\]: .*cutoff alone: the node is an"):
        Graph.from_json({"nodes": nodes, "gates": [["through"] * 3] * 3})
    if special is TEAM:
        rows = [["through", "through", {"gate": "through", "loss": "attention"}], ["through"] * 3]
        with pytest.raises(InputError, match=r"gates\[0\]\[2\].loss: .*without stages"):
            Graph.from_json({"nodes": nodes, "gates": [*rows, ["cutoff"] * 3]})


# --- runs


def run_of(workdir: Path, fields: dict[str, Any], **changes: Any) -> Any:
    file = workdir.with_suffix(".json")
    file.write_text(json.dumps(fields))
    config = small(workdir, graph=str(file), models=(), **{"epochs": 2} | changes)
    ended = in_process(train.main, *options(config))
    assert (ended.code, ended.err) == (0, "")
    return ended


@pytest.mark.slow
def test_a_run_with_both_is_resumed_bit_for_bit_and_evaluated(tmp_path: Path) -> None:
    run_of(tmp_path / "whole", FIELDS)
    run_of(tmp_path / "again", FIELDS)
    (tmp_path / "again" / "result.json").unlink()
    for epoch in (tmp_path / "again" / "checkpoints").iterdir():
        if epoch.name == "2":
            epoch.rename(tmp_path / "gone")
    run_of(tmp_path / "again", FIELDS)
    assert_same_end(tmp_path / "whole", tmp_path / "again")
    state = saved_state(tmp_path / "whole", 2)
    assert not any(".team." in path and "params" in path for path in state)
    names = [node["name"] for node in metrics(tmp_path / "whole")[-1]["nodes"]]
    assert names == ["student", "peer", "team", "mean"]
    found = {node["name"]: node for node in result(tmp_path / "whole")["nodes"]}
    assert all(node["test_accuracy"] is not None for node in found.values())
    ended = in_process(evaluate.main, tmp_path / "whole", "--export", tmp_path / "mean.safetensors",
                       "--node", "mean")  # fmt: skip
    assert ended.code == 0
    assert f"{100 * found['mean']['test_accuracy']:.2f} %" in ended.out
    _, params, _ = ktg.load_node(tmp_path / "mean.safetensors")
    kernel = state["nodes.mean.params.hidden.kernel"]
    np.testing.assert_array_equal(params["hidden"]["kernel"], kernel)


@pytest.mark.slow
def test_an_ensemble_may_be_the_target(tmp_path: Path) -> None:
    fields = {"nodes": [TEAM | {"of": "logits"}, STUDENT, PEER],
              "gates": [["cutoff"] * 3, ["through", "through", "cutoff"],
                        ["through", "cutoff", "through"]]}  # fmt: skip
    run_of(tmp_path / "run", fields)
    found = result(tmp_path / "run")
    assert found["target"]["name"] == "team"
    assert found["target"]["test_accuracy"] == found["ensemble"]["test_accuracy"]
    ended = in_process(evaluate.main, tmp_path / "run", "--export", tmp_path / "x.safetensors")
    assert ended.code == 2
    assert ended.err.startswith("error: node: got None; allowed: student, peer: the target is")
