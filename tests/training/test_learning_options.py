"""How each node is updated: its optimiser, rate, decay and clipping, and which parameters learn."""

import json
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from engines import How, fused, per_node, trained
from runs import assert_same_end, in_process, options, saved_state, small
from tiny_models import Tiny

import ktg_jax as ktg
from experiments import train
from ktg_jax import Graph, GraphState, InputError
from ktg_jax.io.trees import flatten
from ktg_jax.training.batches import Arrays, Batches
from ktg_jax.training.optimizers import adamw, clipped, trainable
from ktg_jax.training.task import Task

TARGET: dict[str, Any] = {"name": "target", "model": "tiny", "optimizer": "adamw",
                          "learning_rate": 0.01, "weight_decay": 0.5, "clip": 0.25}  # fmt: skip
PEER: dict[str, Any] = {"name": "peer", "model": "tiny", "trainable": ["classifier.*", "*.bias"]}
FIELDS: dict[str, Any] = {"nodes": [TARGET, PEER], "gates": [["through"] * 2] * 2}
GRAPH = Graph.from_json(FIELDS)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (16, 8, 8, 1), np.uint8)
LABELS = np.asarray(np.arange(16) % 5, np.int32)
TINY = ktg.from_linen(Tiny(5))
OPTIMIZERS = (clipped(adamw(0.01, 0.5), 0.25), trainable(ktg.sgd(0.1), PEER["trainable"]))


def initial() -> GraphState:
    return ktg.init_state(
        GRAPH, (TINY, TINY), OPTIMIZERS, jax.random.key(0), jnp.zeros((1, 8, 8, 1))
    )


def meant(params: Any) -> Any:
    """Without the bias that the normalisation takes away: Adam makes steps of its rounding."""
    return {path: value for path, value in flatten(params).items() if path != "hidden.bias"}


# --- by hand


def test_adamw_decays_apart_from_its_gradient() -> None:
    params = {"w": jnp.array([2.0, -4.0])}
    optimizer = adamw(0.1, 0.25)
    updates, _ = optimizer.update({"w": jnp.array([5.0, 1e-3])}, optimizer.init(params), params)
    # The first step of Adam is the gradient's sign; the decay is 0.1 x 0.25 x w.
    np.testing.assert_allclose(updates["w"], [-0.15, 0.0], atol=1e-5)


def test_the_norm_of_all_gradients_together_is_clipped() -> None:
    optimizer = clipped(optax.sgd(1.0), 1.0)
    gradients = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}
    updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
    np.testing.assert_allclose([updates["a"][0], updates["b"][0, 0]], [-0.6, -0.8], rtol=1e-6)
    small, _ = optimizer.update({"a": jnp.array([0.3]), "b": jnp.array([[0.4]])},
                                optimizer.init(gradients), gradients)  # fmt: skip
    np.testing.assert_allclose(small["a"], [-0.3], rtol=1e-6)


def test_a_step_updates_each_node_in_its_own_way() -> None:
    state, images = initial(), jnp.asarray(IMAGES / np.float32(255))
    new, _ = ktg.train_step(
        state, images, LABELS, GRAPH.edge_arrays, 0.5, node_fns=(TINY, TINY), optimizer=OPTIMIZERS
    )

    def loss(i: int, params: Any) -> Any:
        each = [state.params[0], state.params[1]]
        each[i] = params
        logits = [
            TINY.apply(p, s, images, True)[0] for p, s in zip(each, state.model_state, strict=True)
        ]
        return ktg.node_losses(logits, LABELS, GRAPH.edge_arrays, 0.5)[i]

    gradients = [jax.grad(lambda p, i=i: loss(i, p))(state.params[i]) for i in (0, 1)]
    norm = optax.tree.norm(gradients[0])
    assert norm > 0.25
    scaled = jax.tree.map(lambda g: g * 0.25 / norm, gradients[0])
    plain = optax.adamw(0.01, weight_decay=0.5)
    updates, _ = plain.update(scaled, plain.init(state.params[0]), state.params[0])
    expected = optax.apply_updates(state.params[0], updates)
    chex.assert_trees_all_close(meant(new.params[0]), meant(expected), rtol=1e-3, atol=1e-6)
    before, after = (flatten(each.params[1]) for each in (state, new))
    for path, value in after.items():
        learns = path.startswith("classifier.") or path.endswith(".bias")
        assert np.array_equal(value, before[path]) != learns, path
    whole = ktg.sgd(0.1)
    updates, _ = whole.update(gradients[1], whole.init(state.params[1]), state.params[1])
    kernel = state.params[1]["classifier"]["kernel"] + updates["classifier"]["kernel"]
    np.testing.assert_allclose(new.params[1]["classifier"]["kernel"], kernel, rtol=1e-5)


def test_as_many_optimizers_as_nodes_or_one() -> None:
    with pytest.raises(InputError, match="optimizer: got 1; allowed: one, or 2, one a node"):
        ktg.init_state(
            GRAPH, (TINY, TINY), OPTIMIZERS[:1], jax.random.key(0), jnp.zeros((1, 8, 8, 1))
        )


# --- engines


@pytest.mark.slow
@pytest.mark.parametrize("how", [per_node, fused(2)], ids=["per node", "two a call"])
def test_all_engines_train_alike(how: How) -> None:
    task = Task((TINY, TINY), OPTIMIZERS, Batches(16, 8, 1, True), (8, 8, 1), 4)
    data = Arrays(IMAGES, LABELS)
    (expected, _), (found, _) = (
        trained(each, task, GRAPH, initial(), data) for each in (fused(), how)
    )
    given = meant(found.params[0]), meant(expected.params[0])
    chex.assert_trees_all_close(*given, rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_close(found.params[1], expected.params[1], rtol=1e-4, atol=1e-5)


# --- graphs


def test_they_are_written_as_they_are_read_and_tell_graphs_apart() -> None:
    nodes = json.loads(GRAPH.to_json())["nodes"]
    assert nodes == [each | {"weights": None} for each in (TARGET, PEER)]
    assert Graph.from_json(GRAPH.to_json()) == GRAPH
    plain = Graph.from_json({"nodes": [{"model": "tiny"}] * 2, "gates": FIELDS["gates"]})
    assert not GRAPH.equivalent(plain)


@pytest.mark.parametrize(
    ("node", "field", "allowed"),
    [
        ({"optimizer": "adam"}, "optimizer", "sgd, adamw, or null; did you mean 'adamw'?"),
        ({"optimizer": 3}, "optimizer", "sgd, adamw, or null"),
        ({"learning_rate": 0}, "learning_rate", "above 0"),
        ({"learning_rate": "0.1"}, "learning_rate", "above 0"),
        ({"weight_decay": -1}, "weight_decay", "at least 0"),
        ({"clip": 0}, "clip", "above 0"),
        ({"trainable": []}, "trainable", "at least one"),
        ({"trainable": "classifier.*"}, "trainable", "patterns of parameters' paths"),
        ({"trainable": [3]}, "trainable", "patterns of parameters' paths"),
    ],
)
def test_what_cannot_be_is_refused(node: dict[str, Any], field: str, allowed: str) -> None:
    with pytest.raises(InputError) as caught:
        Graph.from_json({"nodes": [{"model": "tiny", **node}], "gates": [["through"]]})
    assert caught.value.field == f"nodes[0].{field}"
    assert allowed in caught.value.allowed


@pytest.mark.parametrize("field", ["optimizer", "learning_rate", "weight_decay", "clip"])
def test_a_frozen_node_has_none_of_them(field: str) -> None:
    nodes = [{"model": "tiny"}, {"model": "tiny", field: TARGET[field]}]
    with pytest.raises(InputError, match=rf"nodes\[1\].{field}: .*null: .*it never learns"):
        Graph.from_json({"nodes": nodes, "gates": [["through"] * 2, ["cutoff"] * 2]})


# --- runs


def run_of(workdir: Path, fields: dict[str, Any], **changes: Any) -> Any:
    file = workdir.with_suffix(".json")
    file.write_text(json.dumps(fields))
    return in_process(train.main, *options(small(workdir, graph=str(file), models=(), **changes)))


def test_a_pattern_that_matches_nothing_is_said_before_anything_is_computed(tmp_path: Path) -> None:
    peer = PEER | {"trainable": ["head.*"]}
    ended = run_of(tmp_path / "run", FIELDS | {"nodes": [TARGET, peer]})
    assert ended.code == 2
    said = "error: nodes[1].trainable: got 'head.*'; allowed: a pattern of a path, such as "
    assert ended.err.startswith(f"{said}classifier.bias, "), ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    for name in ("whole", "again"):
        ended = run_of(tmp_path / name, FIELDS, epochs=2)
        assert (ended.code, ended.err) == (0, "")
    (tmp_path / "again" / "result.json").unlink()
    (tmp_path / "again" / "checkpoints" / "2").rename(tmp_path / "gone")
    assert run_of(tmp_path / "again", FIELDS, epochs=2).code == 0
    assert_same_end(tmp_path / "whole", tmp_path / "again")
    first, second = (saved_state(tmp_path / "whole", epoch) for epoch in (1, 2))
    path = "nodes.peer.params.{}.kernel".format
    np.testing.assert_array_equal(first[path("hidden")], second[path("hidden")])
    assert not np.array_equal(first[path("classifier")], second[path("classifier")])
