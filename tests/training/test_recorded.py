"""Recorded nodes in the step: the same training as with the network itself, in both engines."""

from functools import partial
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import How, fused, per_node
from tiny_models import Tiny

import ktg_jax as ktg
from ktg_jax import Graph, GraphState, InputError, Node
from ktg_jax.models.network import NO_NETWORK
from ktg_jax.recording import Header, Recording, RecordingWriter
from ktg_jax.training.batches import Arrays, Batches, data_key, take_batch
from ktg_jax.training.evaluation import eval_step
from ktg_jax.training.host_batches import BatchStream
from ktg_jax.training.record import Network, record_batches, record_images
from ktg_jax.training.task import Task

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (24, 8, 8, 1), np.uint8)
LABELS = np.asarray(np.arange(24) % 5, np.int32)
BATCHES = Batches(24, batch_size=8, max_offset=2, flip=True)
STREAM = BatchStream(IMAGES, LABELS, BATCHES, data_seed=3)
STEPS = 6
TINY = ktg.from_linen(Tiny(5))
OPTIMIZER = ktg.sgd(0.1)
GATES = (("through", "correct"), ("cutoff", "cutoff"))
LIVE = Graph([Node("tiny", "student"), Node("tiny", "teacher")], GATES, temperature=2.0)
TAUGHT = Graph([Node("tiny", "student"), Node(name="teacher", outputs="there")], GATES, 2.0)


def initial(graph: Graph, *node_fns: ktg.NodeFns) -> GraphState:
    sample = jnp.zeros((1, 8, 8, 1))
    return ktg.init_state(graph, node_fns, OPTIMIZER, jax.random.key(1), sample)


LIVE_STATE = initial(LIVE, TINY, TINY)
TEACHER = Network(TINY, LIVE_STATE.params[1], LIVE_STATE.model_state[1])


def recording(folder: Path, kind: str = "batches") -> Recording:
    facts = STREAM.facts
    rows = STEPS if kind == "batches" else len(IMAGES)
    header = Header(kind, facts, rows=rows, classes=5, dtype="float32")  # type: ignore[arg-type]
    made = (
        record_batches(TEACHER, STREAM, range(STEPS))
        if kind == "batches"
        else record_images(TEACHER, STREAM)
    )
    with RecordingWriter(folder, header) as writer:
        for logits in made:
            writer.add(logits)
    return Recording(folder)


ENGINES = {
    "fused": fused(),
    "fused, three a call": fused(3),
    "pmap": fused(strategy="pmap"),
    "per node": per_node,
}


def trained(
    how: How,
    graph: Graph,
    state: GraphState,
    fns: ktg.NodeFns,
    recordings: dict[int, Recording] | None = None,
    batches: Batches = BATCHES,
    split_at: int | None = None,
) -> GraphState:
    task = Task((TINY, fns), OPTIMIZER, batches, (8, 8, 1), STEPS)
    state = jax.tree.map(jnp.copy, state)  # it is consumed
    engine, count = how(task, state)
    data = engine.load(Arrays(IMAGES, LABELS))
    state = engine.place(state)
    for first, last in ((0, split_at or STEPS), (split_at or STEPS, STEPS)):
        step = engine.make_step(data, graph.edge_arrays, data_key(3), None, recordings)
        for _ in range(first, last, count):
            state, _ = step(state, count)
    assert int(state.step) == STEPS
    return jax.device_get(state)


@pytest.mark.slow
@pytest.mark.parametrize("how", ENGINES.values(), ids=ENGINES)
def test_a_recorded_teacher_teaches_as_the_live_one_does(tmp_path: Path, how: How) -> None:
    recorded = {1: recording(tmp_path / "new")}
    state = initial(TAUGHT, TINY, NO_NETWORK)
    chex.assert_trees_all_equal(state.params[0], LIVE_STATE.params[0])
    assert state.params[1] == {}
    expected = trained(how, LIVE, LIVE_STATE, TINY)
    for split_at in (None, 3):  # resumed, the recording goes on where the state is
        found = trained(how, TAUGHT, state, NO_NETWORK, recorded, split_at=split_at)
        chex.assert_trees_all_close(found.params[0], expected.params[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("how", ENGINES.values(), ids=ENGINES)
def test_a_static_one_teaches_what_the_images_as_they_are_would(tmp_path: Path, how: How) -> None:
    plain = BATCHES._replace(max_offset=0, flip=False)
    recorded = {1: recording(tmp_path / "new", "images")}
    state = initial(TAUGHT, TINY, NO_NETWORK)
    expected = trained(how, LIVE, LIVE_STATE, TINY, batches=plain)
    found = trained(how, TAUGHT, state, NO_NETWORK, recorded, batches=plain)
    chex.assert_trees_all_close(found.params[0], expected.params[0], rtol=1e-4, atol=1e-5)


# --- the batches on the host


@pytest.mark.parametrize("max_offset", [0, 2, 7])
def test_the_batches_on_the_host_are_those_of_the_step(max_offset: int) -> None:
    batches = BATCHES._replace(max_offset=max_offset)
    stream = BatchStream(IMAGES, LABELS, batches, data_seed=5)
    for step, (images, labels) in zip(range(2, 6), stream.host(2, 6), strict=True):
        plan = batches.plan(data_key(5), step)
        expected, expected_labels = take_batch(jnp.asarray(IMAGES), jnp.asarray(LABELS), plan)
        assert images.dtype == np.float32
        np.testing.assert_allclose(images, expected, rtol=2.0**-23)
        np.testing.assert_array_equal(labels, expected_labels)


def test_facts_tell_streams_apart() -> None:
    others = [
        BatchStream(IMAGES[::-1], LABELS, BATCHES, 3),
        BatchStream(IMAGES, LABELS[::-1], BATCHES, 3),
        BatchStream(IMAGES, LABELS, BATCHES._replace(flip=False), 3),
        BatchStream(IMAGES, LABELS, BATCHES, 4),
    ]
    assert all(other.facts != STREAM.facts for other in others)
    assert BatchStream(IMAGES.copy(), LABELS.copy(), BATCHES, 3).facts == STREAM.facts


def test_several_crops_are_the_mean_of_views_and_do_not_depend_on_where_one_begins() -> None:
    whole = np.concatenate(list(record_images(TEACHER, STREAM, crops=3)))
    np.testing.assert_array_equal(
        np.concatenate(list(record_images(TEACHER, STREAM, crops=3, first=5))), whole[5:]
    )
    key, everything = data_key(3), BATCHES._replace(batch_size=24)
    views = []
    for crop in range(3):
        plan = everything.plan(jax.random.fold_in(key, crop), 0)
        plan = plan._replace(image_index=jnp.arange(24))
        images, _ = take_batch(jnp.asarray(IMAGES), jnp.asarray(LABELS), plan)
        views.append(TINY.apply(TEACHER.params, TEACHER.model_state, images, False)[0])
    np.testing.assert_allclose(whole, np.mean(views, axis=0), rtol=1e-4, atol=1e-5)


# --- what the step is given


def step_with(recorded: Any, *node_fns: ktg.NodeFns, state: GraphState = LIVE_STATE) -> Any:
    step = partial(ktg.train_step, node_fns=node_fns, optimizer=OPTIMIZER, recorded=recorded)
    edges = ktg.graphs.distillation("tiny", "tiny").edge_arrays
    return step(state, jnp.ones((4, 8, 8, 1)), jnp.arange(4), edges, 1.0)


def test_recorded_logits_take_the_place_of_a_frozen_networks() -> None:
    logits = jnp.asarray(RNG.standard_normal((4, 5)), jnp.float32)
    state, metrics = step_with({1: logits}, TINY, TINY)
    other, _ = step_with({1: -logits}, TINY, TINY)
    assert float(metrics["accuracy"][1]) == np.mean(np.argmax(logits, 1) == np.arange(4))
    biases = [each.params[0]["classifier"]["bias"] for each in (state, other)]
    assert not np.array_equal(*biases)
    chex.assert_trees_all_equal(state.params[1], LIVE_STATE.params[1])


@pytest.mark.parametrize(
    ("recorded", "node_fns", "message"),
    [
        (None, (TINY, NO_NETWORK), r"recorded: got \[\]; allowed: the logits of node 1, too"),
        ({0: jnp.zeros((4, 5))}, (TINY, TINY), "recorded: got 0; allowed: frozen nodes alone: 1"),
        ({2: jnp.zeros((4, 5))}, (TINY, TINY), "recorded: got 2; allowed: frozen nodes alone: 1"),
        ({1: jnp.zeros((3, 5))}, (TINY, TINY), r"logits: got float32\[3, 5\].*\(node 1\)"),
        ({1: jnp.zeros((4, 5), int)}, (TINY, TINY), r"logits: got int32\[4, 5\].*\(node 1\)"),
    ],
)
def test_bad_recorded_logits_are_refused(recorded: Any, node_fns: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        step_with(recorded, *node_fns)


def test_a_recorded_node_is_not_evaluated() -> None:
    state = initial(TAUGHT, TINY, NO_NETWORK)
    images = jnp.asarray(RNG.random((6, 8, 8, 1)), jnp.float32)
    labels = jnp.arange(6) % 5
    sums = eval_step(state, images, labels, node_fns=(TINY, NO_NETWORK))
    alone = eval_step(
        GraphState(state.params[:1], state.model_state[:1], (None,), state.step),
        images,
        labels,
        node_fns=(TINY,),
    )
    assert np.isnan(sums["loss"][1])
    assert np.isnan(sums["correct"][1])
    np.testing.assert_allclose(sums["loss"][0], alone["loss"][0], rtol=1e-6)
    np.testing.assert_allclose(sums["ensemble_loss"], alone["ensemble_loss"], rtol=1e-6)
