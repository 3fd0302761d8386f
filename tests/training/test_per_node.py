"""Node by node: the same training as in one program, with one executable a model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from random_variables import random_variables
from tiny_models import Staged, Tiny

import ktg_jax as ktg
from ktg_jax import Graph, GraphState, InputError, Node, NodeFns, Parallel
from ktg_jax.cpu.convolution import cpu_convolution, formulation
from ktg_jax.training import programs
from ktg_jax.training.batches import Arrays, Batches
from ktg_jax.training.engines import choose_engine
from ktg_jax.training.evaluation import make_evaluator
from ktg_jax.training.fused_engine import FusedEngine
from ktg_jax.training.per_node import per_node_step
from ktg_jax.training.per_node_engine import PerNodeEngine
from ktg_jax.training.per_node_evaluation import per_node_eval
from ktg_jax.training.placement import Placement, balanced, forward_cost, place
from ktg_jax.training.task import Engine, Task

DEVICES = jax.local_devices()
RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.random((8, 8, 8, 3), np.float32))
LABELS = jnp.arange(8) % 5
OPTIMIZER = ktg.sgd(0.1)
TINY = ktg.from_linen(Tiny(5))
CNN = ktg.build_model("cnn", 5)

# Every gate, a frozen node, and two nodes of the same model.
GRAPH = Graph(
    (Node("tiny", "a"), Node("cnn", "b"), Node("tiny", "c"), Node("tiny", "teacher")),
    (
        ("through", "correct", "linear", "through"),
        ("negative_linear", "correct", "through", "correct"),
        ("correct", "cutoff", "linear", "negative_linear"),
        ("cutoff", "cutoff", "cutoff", "cutoff"),
    ),
    temperature=2.0,
)
NODE_FNS = (TINY, CNN, TINY, TINY)
STAGED, WIDE = ktg.from_linen(Staged(5)), ktg.from_linen(Staged(5, (8, 12)))


class Case(NamedTuple):
    """Networks, and what the graph's transfer edges carry."""

    node_fns: tuple[NodeFns, ...] = NODE_FNS
    loss: "str | dict[str, float]" = "kl"

    @property
    def edges(self) -> ktg.EdgeArrays:
        return GRAPH.carrying(self.loss).edge_arrays


CASES = {
    "logits": Case(),
    "stages": Case((STAGED, WIDE, STAGED, WIDE), {"kl": 0.5, "attention": 20.0}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def started(node_fns: Sequence[NodeFns] = NODE_FNS, frozen: Sequence[int] = (3,)) -> GraphState:
    variables = [random_variables(fns, IMAGES, i) for i, fns in enumerate(node_fns)]
    params, model_state = zip(*jax.tree.map(jnp.asarray, variables), strict=True)
    opt_state = tuple(None if i in frozen else OPTIMIZER.init(p) for i, p in enumerate(params))
    return GraphState(params, model_state, opt_state, jnp.zeros((), jnp.int32))


def stepped(
    state: GraphState,
    gates: Any,
    node_fns: Sequence[NodeFns],
    placement: Placement,
    k: int = 0,
) -> tuple[GraphState, dict[str, jax.Array]]:
    """The k-th of four steps; each has a batch of its own."""
    batch = jnp.roll(IMAGES, k, axis=2)
    images = {device: jax.device_put(batch, device) for device in placement}
    labels = jax.device_put(LABELS, placement[0])
    fixed: dict[str, Any] = {"placement": placement, **options(Case(tuple(node_fns)))}
    return per_node_step(state, images, labels, gates, (k + 1) / 4, **fixed)


def options(case: Case) -> dict[str, Any]:
    return {"optimizer": OPTIMIZER, "temperature": 2.0, "node_fns": case.node_fns}


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the programs that are compiled within it."""
    found: list[str] = []

    def note(event: str, duration_secs: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(str(details.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


# --- the step


@pytest.fixture(scope="module")
def expected(case: Case) -> tuple[GraphState, list[Any]]:
    """Four steps of the whole graph in one program."""

    @jax.jit
    def step(state: GraphState, images: jax.Array, progress: float) -> Any:
        return ktg.train_step(state, images, LABELS, case.edges, progress, **options(case))

    state, history = started(case.node_fns), []
    for k in range(4):
        state, metrics = step(state, jnp.roll(IMAGES, k, axis=2), (k + 1) / 4)
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history


@pytest.mark.slow
@pytest.mark.parametrize("devices", [(0, 0, 0, 0), (0, 1, 1, 0), (1, 0, 1, 0)], ids=str)
def test_training_node_by_node_is_that_of_one_program(
    devices: tuple[int, ...], case: Case, expected: tuple[GraphState, list[Any]]
) -> None:
    placement = tuple(DEVICES[i] for i in devices)
    before = started(case.node_fns)
    state, history = place(before, placement), []
    for k in range(4):
        state, metrics = stepped(state, case.edges, case.node_fns, placement, k)
        history.append(jax.device_get(metrics))
    expected_state, expected_history = expected
    chex.assert_trees_all_close(history, expected_history, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(jax.device_get(state), expected_state, rtol=1e-4, atol=1e-5)
    assert state.step == 4
    for i, device in enumerate(placement):
        for leaf in jax.tree.leaves((state.params[i], state.model_state[i], state.opt_state[i])):
            assert leaf.devices() == {device}

    assert state.frozen == (3,)
    chex.assert_trees_all_equal(jax.device_get(state.params[3]), before.params[3])
    chex.assert_trees_all_equal(jax.device_get(state.model_state[3]), before.model_state[3])
    # The test can fail: the weights have moved by much more than its tolerance.
    for i in range(3):
        with pytest.raises(AssertionError):
            chex.assert_trees_all_close(
                jax.device_get(state.params[i]), before.params[i], atol=1e-2
            )


@pytest.mark.slow
def test_what_edges_carry_counts_node_by_node() -> None:
    case, placement = CASES["stages"], (DEVICES[0],) * 4
    losses = []
    for edges in (GRAPH.edge_arrays, case.edges):
        given = place(started(case.node_fns), placement), edges, case.node_fns, placement
        losses.append(stepped(*given)[1]["edge_losses"])
    diagonal = np.eye(4, dtype=bool)
    open_edges = (GRAPH.gate_codes != ktg.gates.CUTOFF) & ~diagonal
    plain, ours = losses
    np.testing.assert_allclose(ours[diagonal], plain[diagonal], rtol=1e-5)
    assert (ours - 0.5 * plain)[open_edges].min() > 0.01
    np.testing.assert_array_equal(ours[3], 0)


def test_a_network_without_stages_is_refused_node_by_node() -> None:
    edges = GRAPH.carrying("attention").edge_arrays
    given = place(started(), (DEVICES[0],) * 4), edges, NODE_FNS, (DEVICES[0],) * 4
    with pytest.raises(InputError, match=r"^stages: got 'Tiny'; allowed: a module with submodules"):
        stepped(*given)


def test_evaluation_node_by_node_is_that_of_one_program() -> None:
    state, mask = started(), jnp.arange(8) < 6
    sums = jax.jit(lambda s: ktg.eval_step(s, IMAGES, LABELS, mask, node_fns=NODE_FNS))(state)
    placement = (DEVICES[0], DEVICES[1], DEVICES[1], DEVICES[0])
    ours = per_node_eval(
        place(state, placement),
        {device: jax.device_put(IMAGES, device) for device in DEVICES[:2]},
        LABELS,
        mask,
        node_fns=NODE_FNS,
        placement=placement,
    )
    chex.assert_trees_all_close(jax.device_get(ours), jax.device_get(sums), rtol=1e-5, atol=1e-5)


# --- executables


def linear(classes: int = 5) -> NodeFns:
    """Another model on every call, though all are alike."""
    return ktg.from_linen(nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(classes)]))


def run_steps(graph_gates: Any, node_fns: Sequence[NodeFns], frozen: Sequence[int]) -> None:
    placement = (DEVICES[0],) * len(node_fns)
    variables = [fns.init(jax.random.key(0), IMAGES) for fns in node_fns]
    params, model_state = zip(*variables, strict=True)
    opt_state = tuple(None if i in frozen else OPTIMIZER.init(p) for i, p in enumerate(params))
    state = GraphState(params, model_state, opt_state, jnp.zeros((), jnp.int32))
    state = place(state, placement)
    for k in range(2):
        state, _ = stepped(state, graph_gates, node_fns, placement, k)


@pytest.mark.slow
def test_equal_nodes_share_one_forward_and_one_backward_pass() -> None:
    fns = linear()
    forward: Any = programs.forward_with_pullback(fns, False, cpu_convolution().name, False)
    update: Any = programs.backward_and_update(OPTIMIZER)
    before = update._cache_size()
    run_steps(np.zeros((7, 7), int), (fns,) * 7, frozen=())
    assert forward._cache_size() == 1
    assert update._cache_size() == before + 1


@pytest.mark.slow
def test_a_graph_over_compiled_models_compiles_only_its_loss() -> None:
    a, b = linear(), linear()
    # Each has learnt and taught: there are forward passes for both.
    run_steps(np.zeros((3, 3), int), (a, b, a), frozen=(1,))
    run_steps(np.zeros((3, 3), int), (b, a, a), frozen=(1,))
    with compilations() as compiled:
        run_steps(np.full((5, 5), 3), (a, b, b, a, b), frozen=(0, 2))
    assert compiled == ["jit(graph_gradients)"]
    with compilations() as compiled:
        run_steps(np.ones((5, 5), int), (b, b, a, a, a), frozen=())
    assert compiled == []
    with compilations() as compiled:  # the test can fail
        run_steps(np.ones((5, 5), int), (b, b, a, a, linear()), frozen=())
    assert len(compiled) >= 2


# --- where the nodes are


def test_the_dearest_nodes_are_placed_first() -> None:
    a, b = DEVICES[:2]
    assert balanced([], [a, b]) == ()
    assert balanced([1, 1, 1], [a]) == (a, a, a)
    # 4 to a; 3 to b; 3 to b, which has 3 against 4; 2 to a (4 against 6); 1 to a or b (6 and 6).
    assert balanced([3, 4, 2, 3, 1], [a, b]) == (b, a, a, b, a)
    assert balanced([1, 1, 1, 1], [a, b]) == (a, b, a, b)
    assert balanced([0, 0, 5], [a, b]) == (b, b, a)


def test_the_cost_of_a_forward_pass_by_hand() -> None:
    def apply(params: Any, state: Any, images: jax.Array, train: bool) -> Any:
        x = images.reshape(len(images), -1)
        for matrix in params:
            x = x @ matrix
        return x, state

    params = (jnp.ones((192, 20)), jnp.ones((20, 5)))
    fns = NodeFns(init=lambda rng, images: (params, {}), apply=apply)
    # A multiplication and an addition for each entry of the matrices.
    assert forward_cost(fns, params, {}, (8, 8, 3)) == 2 * (192 * 20 + 20 * 5)


def test_a_convolution_costs_what_xla_says_whatever_computes_it() -> None:
    costs = {}
    params, model_state = random_variables(CNN, IMAGES, 0)
    for name in ("xla", "chunked"):
        with formulation(name):
            costs[name] = forward_cost(CNN, params, model_state, (8, 8, 3))
    # Of the three convolutions: a multiplication and an addition for each pair of channels, pixel
    # and position in the kernel that is not beyond the image's edge; and little else.
    inner = 2 * (22 * 22 * 3 * 16 + 11 * 11 * 16 * 32 + 5 * 5 * 32 * 64)
    assert costs["xla"] == costs["chunked"]
    assert inner < costs["xla"] < 1.3 * inner


def test_what_was_traced_with_one_convolution_is_not_used_with_another() -> None:
    """Else a training would depend on what its process computed before."""
    traced = []

    def apply(params: Any, model_state: Any, images: Any, train: bool) -> Any:
        traced.append(cpu_convolution().name)
        return images.mean((1, 2, 3))[:, None] * params, model_state

    fns = NodeFns(init=lambda rng, images: (jnp.ones(5), {}), apply=apply)
    state = GraphState((jnp.ones(5),), ({},), (None,), jnp.zeros((), jnp.int32))
    for name in ("xla", "chunked", "xla"):
        with formulation(name):
            given = state, {DEVICES[0]: IMAGES}, LABELS
            per_node_eval(*given, node_fns=(fns,), placement=(DEVICES[0],))
    assert traced == ["xla", "chunked"]


# --- the engines

BATCHES = Batches(num_images=23, batch_size=8, max_offset=1, flip=True)
DATA = Arrays(RNG.integers(0, 256, (23, 8, 8, 3), np.uint8), np.arange(23, dtype=np.int32) % 5)


def task_of(case: Case, batches: Batches = BATCHES) -> Task:
    return Task(case.node_fns, OPTIMIZER, batches, (8, 8, 3), total_steps=6)


def fused(parallel: Parallel, case: Case) -> Engine:
    return FusedEngine(task_of(case), parallel)


def by_node(num_devices: int, case: Case) -> Engine:
    return PerNodeEngine(task_of(case), started(case.node_fns), DEVICES[:num_devices])


def trained(engine: Engine, case: Case) -> tuple[GraphState, list[Any], Any, list[str]]:
    """After four steps: state, metrics, evaluation, and what was compiled after the first step."""
    step = engine.make_step(engine.load(DATA), case.edges, jax.random.key(3))
    state, metrics = step(engine.place(started(case.node_fns)), 1)
    history = [jax.device_get(metrics)]
    with compilations() as compiled:
        for _ in range(3):
            state, metrics = step(state, 1)
            history.append(jax.device_get(metrics))
    means = engine.evaluate(state, engine.load(DATA))
    return jax.device_get(state), history, means, compiled


@pytest.fixture(scope="module")
def fused_result(case: Case) -> tuple[GraphState, list[Any], Any, list[str]]:
    return trained(fused(Parallel("jit", DEVICES[:2]), case), case)


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [1, 2])
def test_the_engines_agree(num_devices: int, case: Case, fused_result: Any) -> None:
    engine = by_node(num_devices, case)
    assert engine.name == "per_node"
    assert engine.summary == f"{num_devices} x cpu (node by node)"
    state, history, means, compiled = trained(engine, case)
    expected_state, expected_history, expected_means, _ = fused_result
    chex.assert_trees_all_close(history, expected_history, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(state, expected_state, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(means, expected_means, rtol=1e-4)
    assert compiled == []

    data = Arrays(*map(jnp.asarray, DATA))
    plain = make_evaluator(case.node_fns, Parallel("jit", DEVICES[:1]), 7)(state, data)
    chex.assert_trees_all_close(means, plain, rtol=1e-5)


@pytest.mark.slow
def test_the_engine_with_nodes_of_one_network_in_one_pass_agrees(
    case: Case, fused_result: Any
) -> None:
    engine = FusedEngine(task_of(case), Parallel("jit", DEVICES[:2]), batched=True)
    assert engine.name == "batched"
    *found, compiled = trained(engine, case)
    chex.assert_trees_all_close(tuple(found), fused_result[:3], rtol=1e-4, atol=1e-5)
    assert compiled == []


@pytest.mark.slow
def test_the_fused_step_is_compiled_once(fused_result: Any) -> None:
    assert fused_result[3] == []
    assert fused(Parallel("pmap", DEVICES[:2]), Case()).summary == "2 x cpu (pmap)"


def test_a_task_refuses_a_batch_that_cannot_be_made() -> None:
    with pytest.raises(InputError, match=r"^batch_size: got 24; allowed: 1 to the 23 training"):
        task_of(Case(), BATCHES._replace(batch_size=24))


@pytest.mark.parametrize(
    ("name", "strategy", "steps_per_call", "chosen"),
    [
        ("auto", "jit", 1, "per_node"),
        ("auto", "jit", 2, "fused"),
        ("auto", "pmap", 1, "fused"),
        ("fused", "jit", 3, "fused"),
        ("fused", "pmap", 1, "fused"),
        ("batched", "pmap", 3, "batched"),
        ("per_node", "jit", 1, "per_node"),
    ],
)
def test_an_engine_is_chosen(name: str, strategy: str, steps_per_call: int, chosen: str) -> None:
    assert choose_engine(name, Parallel(strategy), steps_per_call) == chosen


@pytest.mark.parametrize(
    ("name", "strategy", "steps_per_call", "message"),
    [
        ("nodes", "jit", 1, "engine: got 'nodes'; allowed: auto, fused, batched, per_node"),
        ("per_node", "pmap", 1, "parallel: got 'pmap'; allowed: jit with the engine per_node"),
        ("per_node", "jit", 2, "steps_per_call: got 2; allowed: 1 with the engine per_node"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(
    name: str, strategy: str, steps_per_call: int, message: str
) -> None:
    with pytest.raises(InputError) as error:
        choose_engine(name, Parallel(strategy), steps_per_call)
    assert str(error.value) == message
