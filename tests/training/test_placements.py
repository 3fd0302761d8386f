"""One training in many places: strategies, placements, parts of a batch, rematerialisation."""

import math
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import How, fused
from jax._src.ad_checkpoint import saved_residuals
from random_variables import random_variables
from tiny_models import Staged, Tiny

import ktg_jax as ktg
import ktg_jax.training.placement as placement_module
from ktg_jax import Edge, Graph, GraphState, InputError, Node, Parallel
from ktg_jax.models.network import NO_NETWORK
from ktg_jax.recording import Header, Recording, RecordingWriter
from ktg_jax.training.batches import Arrays, Batches, data_key
from ktg_jax.training.engines import choose_engine
from ktg_jax.training.fused_engine import FusedEngine
from ktg_jax.training.per_node import per_node_step
from ktg_jax.training.per_node_engine import PerNodeEngine
from ktg_jax.training.placement import Place, devices_of, grouped, place, place_of, split, whole
from ktg_jax.training.state import with_averages
from ktg_jax.training.task import Task

DEVICES = jax.local_devices()
BOTH = place_of(DEVICES[:2])
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (21, 8, 8, 3), np.uint8)  # no multiple of the number of devices
LABELS = np.asarray(np.arange(21) % 5, np.int32)
STEPS = 4
OPTIMIZER = ktg.sgd(0.1)

# Every gate, losses on pairs and on whole batches, and a node of each kind.
GRAPH = Graph(
    (
        Node("tiny", "a"),
        Node("staged", "b"),
        Node("tiny", "c"),
        Node("tiny", "teacher"),
        Node(name="told", outputs="there"),
        Node(name="both", ensemble=("a", "b")),
        Node(name="mean", average="c", decay=0.5),
    ),
    (
        ("through", "correct", "linear", "through", "correct", "through", "linear"),
        ("negative_linear", "correct", "through", "correct", "linear", "cutoff", "cutoff"),
        (
            "correct",
            Edge(loss="jensen_shannon", weight=0.5),
            *("linear", "cutoff", "cutoff", "cutoff", "through"),
        ),
        *[("cutoff",) * 7] * 4,
    ),
    temperature=2.0,
)


@flax.struct.dataclass
class Pull:
    """A prior that pulls all parameters to 0."""

    strength: jax.Array

    def add_to(self, gradients: Any, params: Any, progress: Any) -> tuple[Any, jax.Array]:
        size = sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(params))
        strength = self.strength * (1 - progress)
        return jax.tree.map(lambda g, p: g + strength * p, gradients, params), jnp.stack([size])


PRIORS = (Pull(jnp.float32(0.1)), *[None] * 6)


def node_fns(axis_name: str | None = None) -> list[ktg.NodeFns]:
    tiny = ktg.from_linen(Tiny(5, axis_name=axis_name))
    staged = ktg.from_linen(Staged(5, axis_name=axis_name))
    return [tiny, staged, tiny, tiny, NO_NETWORK, NO_NETWORK, tiny]


def started() -> GraphState:
    drawn = [
        ({}, {}) if fns == NO_NETWORK else random_variables(fns, IMAGES[:1], i)
        for i, fns in enumerate(node_fns())
    ]
    params, model_state = zip(*jax.tree.map(jnp.asarray, drawn), strict=True)
    opt_state = tuple(OPTIMIZER.init(p) if i < 3 else None for i, p in enumerate(params))
    state = GraphState(params, model_state, opt_state, jnp.zeros((), jnp.int32))
    return with_averages(state, GRAPH.derived)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    folder = tmp_path_factory.mktemp("told") / "recording"
    with RecordingWriter(folder, Header("images", {}, rows=21, classes=5, dtype="float32")) as out:
        out.add(RNG.standard_normal((21, 5)).astype(np.float32))
    return Recording(folder)


def task_of(axis_name: str | None = None, **options: Any) -> Task:
    batches = Batches(21, batch_size=8, max_offset=1, flip=True, mixup=0.5)
    fixed = node_fns(axis_name), OPTIMIZER, batches, (8, 8, 3), STEPS, GRAPH.derived
    return Task(*fixed, **options)


def trained(how: How, told: Recording, task: Task) -> tuple[Any, Any, Any]:
    """The state, the metrics and the means over the data, after some steps."""
    state = started()
    engine, count = how(task, state)
    data, state = engine.load(Arrays(IMAGES, LABELS)), engine.place(state)
    step = engine.make_step(data, GRAPH.edge_arrays, data_key(0), PRIORS, {4: told})
    metrics: Any = {}
    for _ in range(0, STEPS, count):
        state, metrics = step(state, count)
    if count > 1:
        metrics = jax.tree.map(lambda x: x[-1], metrics)
    return jax.device_get(state), jax.device_get(metrics), engine.evaluate(state, data)


def per_node(placement: str) -> How:
    return lambda task, state: (PerNodeEngine(task, state, DEVICES[:2], placement), 1)


MAPPED = {"shard_map", "pmap"}
ARRANGEMENTS: dict[str, How] = {
    **{
        f"{strategy}, {n} devices": fused(strategy=strategy, devices=DEVICES[:n])
        for strategy in ("jit", "shard_map", "pmap")
        for n in (1, 2)
    },
    "jit, two a call": fused(2, devices=DEVICES[:2]),
    "shard_map, two a call": fused(2, strategy="shard_map", devices=DEVICES[:2]),
    **{f"per node, {placement}": per_node(placement) for placement in ("data", "nodes")},
    "per node, nodes+data": per_node("nodes+data"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "again": {"remat": True},
    "in parts": {"accumulate": 2, "remat": True},
}
SEVERAL = [name for name in ARRANGEMENTS if "1 devices" not in name and "two a call" not in name]


@pytest.fixture(scope="module")
def expected(told: Recording) -> dict[str, Any]:
    """The same steps on one device, by options."""
    alone = fused(devices=DEVICES[:1])
    return {name: trained(alone, told, task_of(**options)) for name, options in OPTIONS.items()}


def check_equal(found: Any, wanted: Any) -> None:
    chex.assert_trees_all_close(found[0], wanted[0], rtol=1e-3, atol=2e-5)
    chex.assert_trees_all_close(found[1], wanted[1], rtol=1e-3, atol=2e-5)
    chex.assert_trees_all_close(found[2], wanted[2], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, "") for name in ARRANGEMENTS), *((name, "in parts") for name in SEVERAL)],
)
def test_all_places_train_alike(
    name: str, options: str, told: Recording, expected: dict[str, Any]
) -> None:
    axis_name = "data" if name.partition(",")[0] in MAPPED else None
    task = task_of(axis_name, **OPTIONS[options])
    check_equal(trained(ARRANGEMENTS[name], told, task), expected[options])


@pytest.mark.slow
def test_what_is_compared_has_moved_and_parts_have_statistics_of_their_own(
    expected: dict[str, Any],
) -> None:
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(expected[""][0].params[:3], started().params[:3], atol=1e-2)
    chex.assert_trees_all_close(expected[""][0], expected["again"][0], rtol=1e-4, atol=1e-6)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(
            expected[""][0].params, expected["in parts"][0].params, atol=1e-3
        )


def test_a_node_on_a_group_beside_others_on_one_device() -> None:
    placement: tuple[Place, ...] = (DEVICES[0], BOTH, DEVICES[1], BOTH)
    graph = Graph(
        GRAPH.nodes[:4], tuple(row[:4] for row in GRAPH.edges[:4]), temperature=GRAPH.temperature
    )
    first = started()
    state = GraphState(
        first.params[:4], first.model_state[:4], first.opt_state[:4], jnp.zeros((), jnp.int32)
    )
    images, labels = jnp.asarray(IMAGES[:8] / 255, jnp.float32), jnp.asarray(LABELS[:8])
    how: dict[str, Any] = {"node_fns": node_fns()[:4], "optimizer": OPTIMIZER}
    given = graph.edge_arrays, 0.5
    placed = {to: jax.device_put(images, split(to)) for to in set(placement)}
    metrics: Any = None
    wanted: Any = None
    ours, theirs = place(state, placement), jax.tree.map(jnp.copy, state)
    for _ in range(2):
        ours, metrics = per_node_step(ours, placed, labels, *given, placement=placement, **how)
        theirs, wanted = ktg.train_step(theirs, images, labels, *given, **how)
    chex.assert_trees_all_close(metrics, wanted, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(
        jax.device_get(ours.params), jax.device_get(theirs.params), rtol=1e-4, atol=1e-5
    )
    for i, to in enumerate(placement):
        for leaf in jax.tree.leaves((ours.params[i], ours.opt_state[i])):
            assert leaf.devices() == set(devices_of(to))
            assert leaf.sharding.is_fully_replicated


def test_gradients_in_parts_are_those_of_the_whole_where_samples_do_not_meet() -> None:
    def apply(params: Any, state: Any, images: jax.Array, train: bool) -> Any:
        return images.reshape(len(images), -1) @ params, state

    linear = ktg.NodeFns(lambda rng, images: (jnp.zeros((192, 5)), {}), apply)
    weights = [jnp.asarray(RNG.standard_normal((192, 5)), jnp.float32) * 0.1 for _ in range(2)]
    graph = ktg.graphs.mutual(["linear", "linear"])
    images, labels = jnp.asarray(IMAGES[:8] / 255, jnp.float32), jnp.asarray(LABELS[:8])
    where = jnp.array([True, False, True, True, True, False, False, True])
    made = []
    for parts in (1, 2, 4):
        opt_state = tuple(OPTIMIZER.init(w) for w in weights)
        state = GraphState(tuple(weights), ({}, {}), opt_state, jnp.zeros((), jnp.int32))
        how: dict[str, Any] = {"where": where, "accumulate": parts, "optimizer": OPTIMIZER}
        step = jax.jit(lambda *a, how=how: ktg.train_step(*a, node_fns=(linear, linear), **how))
        made.append(step(state, images, labels, graph.gate_codes, 0.5))
    chex.assert_trees_all_close(made[1], made[0], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(made[2], made[0], rtol=1e-5, atol=1e-6)


def test_with_remat_only_what_blocks_put_out_is_kept() -> None:
    fns = ktg.build_model("resnet14", 5)
    images = jnp.zeros((8, 16, 16, 3))
    params, model_state = fns.init(jax.random.key(0), images)

    def kept(remat: bool) -> int:
        def loss(params: Any) -> jax.Array:
            made = ktg.node_forward(params, model_state, images, fns=fns, remat=remat)
            return jnp.sum(jnp.asarray(made[0]))

        residuals: Any = saved_residuals(loss, params)
        return sum(math.prod(aval.shape) for aval, where in residuals if "argument" not in where)

    blocks = 2 * 8 * (16 * 16 * 16 + 8 * 8 * 32 + 4 * 4 * 64)
    assert blocks <= kept(True) < 1.3 * blocks
    assert kept(False) > 3 * blocks


# --- statistics


@pytest.mark.parametrize("strategy", ["shard_map", "pmap"])
def test_statistics_of_devices_are_those_of_their_shares(strategy: str) -> None:
    parallel = Parallel(strategy, DEVICES[:2], batch_stats="device")
    assert parallel.axis_name == "data"
    assert parallel.statistics_axis is None
    images = jnp.asarray(IMAGES[:8] / 255, jnp.float32)
    tiny = node_fns(parallel.statistics_axis)[0]
    first = started()
    state = GraphState(
        first.params[:1], first.model_state[:1], first.opt_state[:1], jnp.zeros((), jnp.int32)
    )
    halves = [
        tiny.apply(state.params[0], state.model_state[0], x, True)[1]
        for x in (images[:4], images[4:])
    ]
    graph = ktg.graphs.independent(["tiny"])

    def step(state: GraphState, images: Any, labels: Any) -> Any:
        return ktg.train_step(
            state,
            parallel.shard(images),
            parallel.shard(labels),
            graph.gate_codes,
            1.0,
            node_fns=[tiny],
            optimizer=OPTIMIZER,
            axis_name=parallel.axis_name,
        )

    made, _ = parallel.compile(step)(
        parallel.replicate(state), *parallel.replicate((images, jnp.asarray(LABELS[:8])))
    )
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    chex.assert_trees_all_close(jax.device_get(made.model_state[0]), mean, rtol=1e-5, atol=1e-6)


# --- who computes where


def test_groups_are_larger_for_nodes_that_cost_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement_module, "place_of", tuple)  # no machine has so many devices
    devices: Any = range(8)
    assert grouped([1.0] * 3, devices, 64) == ((0, 1, 2, 3), (4, 5), (6, 7))
    assert grouped([8.0, 1.0, 0.0], devices, 64) == ((0, 1, 2, 3), (4, 5, 6, 7), (0, 1, 2, 3))
    assert grouped([1.0] * 7, devices, 64) == ((0, 1), *((i,) for i in range(2, 8)))
    assert grouped([1.0, 2.0], devices, 7) == ((0,), (1, 2, 3, 4, 5, 6, 7))
    assert grouped([1.0] * 9, devices, 64) == (*range(8), 0)


def test_a_part_of_the_images_is_on_each_device() -> None:
    for engine in (
        FusedEngine(task_of(), Parallel("jit", DEVICES[:2])),
        FusedEngine(task_of("data"), Parallel("shard_map", DEVICES[:2])),
    ):
        images = engine.load(Arrays(IMAGES, LABELS)).images
        assert [shard.data.shape[0] for shard in images.addressable_shards] == [11, 11]
    data = PerNodeEngine(task_of(), started(), DEVICES[:2], "data").load(Arrays(IMAGES, LABELS))
    assert list(data) == [BOTH]
    assert [shard.data.shape[0] for shard in data[BOTH].images.addressable_shards] == [11, 11]


@pytest.mark.parametrize(
    ("name", "placement", "chosen"),
    [
        ("auto", None, "per_node"),
        ("auto", "nodes", "per_node"),
        ("auto", "nodes+data", "per_node"),
        ("auto", "data", "per_node"),
        ("fused", "data", "fused"),
        ("per_node", "data", "per_node"),
    ],
)
def test_a_placement_has_its_engine(name: str, placement: str | None, chosen: str) -> None:
    assert choose_engine(name, Parallel("jit"), placement=placement) == chosen


@pytest.mark.parametrize(
    ("engine", "strategy", "placement", "message"),
    [
        ("auto", "jit", "host", "placement: got 'host'; allowed: data, nodes, nodes.data"),
        ("fused", "jit", "nodes", "placement: got 'nodes'; allowed: data with the engine fused"),
        ("auto", "pmap", "nodes+data", "parallel: got 'pmap'; allowed: jit with the engine"),
    ],
)
def test_a_placement_that_cannot_be_had_is_refused(
    engine: str, strategy: str, placement: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        choose_engine(engine, Parallel(strategy), placement=placement)


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(InputError, match="accumulate: got 3; allowed: a divisor of 8, the images"):
        task_of(accumulate=3)
    allowed = r"a multiple of 16, the number of devices \(2\) times that of parts \(8\)"
    for engine in (
        lambda: FusedEngine(task_of(accumulate=8), Parallel("jit", DEVICES[:2])),
        lambda: PerNodeEngine(task_of(accumulate=8), started(), DEVICES[:2], "data"),
    ):
        with pytest.raises(InputError, match=f"batch_size: got 8; allowed: {allowed}"):
            engine()
    with pytest.raises(InputError, match="batch_stats: got 'device'; allowed: global with jit"):
        Parallel("jit", batch_stats="device")
    with pytest.raises(InputError, match="batch_stats: got 'host'; allowed: global, device"):
        Parallel("pmap", batch_stats="host")
    assert whole(DEVICES[0]) == split(DEVICES[0]) == DEVICES[0]
