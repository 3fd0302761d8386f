"""Priors in a step: gradients by hand, no other node touched, both engines alike."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_variables import random_variables
from tiny_models import Staged, Tiny

import ktg_jax as ktg
from ktg_jax import Graph, GraphState, InputError, NodePrior, Parallel, Prior
from ktg_jax.edge_arrays import edge_arrays
from ktg_jax.io.trees import by_path, replaced
from ktg_jax.priors import normalised, prior_distance, prior_loss, save_prior
from ktg_jax.training import programs
from ktg_jax.training.batches import Arrays, Batches
from ktg_jax.training.fused_engine import FusedEngine, fused_step
from ktg_jax.training.loop import train_epochs
from ktg_jax.training.per_node import per_node_step
from ktg_jax.training.per_node_engine import PerNodeEngine
from ktg_jax.training.placement import place
from ktg_jax.training.task import Engine, Task

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.random((8, 8, 8, 1), np.float32))
LABELS = jnp.arange(8) % 5
STAGED, TINY = ktg.from_linen(Staged(5)), ktg.from_linen(Tiny(5))
NODE_FNS = (STAGED, TINY, STAGED)
PATHS = ("stage1_conv.kernel", "stage2_conv.kernel")
SHAPES = ((3, 3, 1, 4), (1, 1, 4, 6))
SGD = optax.sgd(1.0)  # an update is the gradient itself, with the other sign
GRAPH = Graph(
    (ktg.Node("staged", "a"), ktg.Node("tiny", "b"), ktg.Node("staged", "c")),
    (
        ("through", "correct", "linear"),
        ("negative_linear", "through", "through"),
        ("through", "cutoff", "through"),
    ),
    temperature=2.0,
)
DEVICES = jax.local_devices()


def random_prior(seed: int = 0, stages: int = 2) -> Prior:
    rng = np.random.default_rng(seed)
    kernels = tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in SHAPES[:stages])
    return Prior(kernels, PATHS[:stages])


PRIORS = (NodePrior(random_prior(), weight=2.0, quantile=0.5), None, None)


@functools.cache
def variables_of(seed: int) -> tuple[Any, Any]:
    return jax.tree.map(jnp.asarray, random_variables(NODE_FNS[seed], IMAGES, seed))


def started(
    optimizer: optax.GradientTransformation = SGD, frozen: Sequence[int] = ()
) -> GraphState:
    params, model_state = zip(*map(variables_of, range(3)), strict=True)
    opt_state = tuple(None if i in frozen else optimizer.init(p) for i, p in enumerate(params))
    return jax.tree.map(
        jnp.array, GraphState(params, model_state, opt_state, jnp.zeros((), jnp.int32))
    )


GATES = GRAPH.gate_codes
OPTIONS: dict[str, Any] = {"node_fns": NODE_FNS, "optimizer": SGD, "temperature": 2.0}


@functools.partial(jax.jit, static_argnames="node_fns")
def fused(
    state: GraphState, progress: Any, priors: Any = None, gates: Any = GATES, **more: Any
) -> Any:
    options = OPTIONS | {"priors": priors} | more
    return ktg.train_step(state, IMAGES, LABELS, gates, progress, **options)


def by_node(
    state: GraphState,
    progress: Any,
    priors: Any = None,
    placement: Sequence[jax.Device] | None = None,
    gates: Any = GATES,
    **more: Any,
) -> Any:
    placed = tuple(placement or DEVICES[:1] * len(state.params))
    images = {to: jax.device_put(IMAGES, to) for to in placed}
    labels = jax.device_put(LABELS, placed[0])
    options = OPTIONS | {"placement": placed, "priors": priors} | more
    return per_node_step(place(state, placed), images, labels, gates, progress, **options)


STEPS: dict[str, Callable[..., Any]] = {"fused": fused, "per_node": by_node}


# --- one node's gradient


def by_hand(params: Any, path: str, kernel: jax.Array, quantile: float) -> np.ndarray:
    """The penalised gradient of (1/2) (1/out) sum_i (2 - 2 cos_i), two stages, filter by filter."""
    w = np.asarray(by_path(params)[path], np.float64)
    a = np.asarray(kernel, np.float64)
    gradient = np.zeros_like(w)
    for i in range(w.shape[-1]):
        ours, theirs = (k[..., i] / np.linalg.norm(k[..., i]) for k in (w, a))
        cosine = (ours * theirs).sum()
        gradient[..., i] = -2 * (theirs - cosine * ours) / np.linalg.norm(w[..., i])
    gradient /= 2 * w.shape[-1]
    magnitudes = np.sort(np.abs(gradient), axis=None)
    cut_off = round(quantile * gradient.size)
    threshold = magnitudes[cut_off - 1] if cut_off else 0.0
    return np.sign(gradient) * np.maximum(np.abs(gradient) - threshold, 0)


@pytest.mark.parametrize(
    ("schedule", "progress", "strength"),
    [("linear", 0.25, 3 * 0.75), ("constant", 0.25, 3.0), ("linear", 1.0, 0.0)],
)
@pytest.mark.parametrize("quantile", [0.0, 0.7, 1.0])
def test_what_is_added_is_the_thresholded_gradient_times_the_scheduled_weight(
    schedule: str, progress: float, strength: float, quantile: float
) -> None:
    params, _ = variables_of(0)
    own = jax.tree.map(lambda leaf: 0.1 * jnp.cos(leaf), params)
    prior = NodePrior(random_prior(), 3.0, quantile, schedule)
    total, distance = jax.jit(prior.add_to)(own, params, progress)
    np.testing.assert_allclose(distance, prior_distance(params, prior.prior), rtol=1e-6)
    total, own = by_path(total), by_path(own)
    for path, kernel in zip(PATHS, prior.prior.kernels, strict=True):
        added = strength * by_hand(params, path, kernel, quantile)
        np.testing.assert_allclose(total.pop(path) - own.pop(path), added, rtol=1e-3, atol=1e-6)
    chex.assert_trees_all_equal(total, own)


@pytest.mark.slow
def test_one_filter_by_hand() -> None:
    # cos = 0, |w| = 2: the gradient is -2 a / |w| = (0, -1), and 1 - 0.4 of the weight is left.
    params = {"stage1_conv": {"kernel": jnp.array([[[[2.0], [0.0]]]])}}
    kernel = jnp.array([[[[0.0], [5.0]]]])
    prior = NodePrior(Prior((kernel,), PATHS[:1]), weight=10.0, quantile=0.5)
    own = {"stage1_conv": {"kernel": jnp.array([[[[1.0], [1.0]]]])}}
    total, distance = prior.add_to(own, params, 0.4)
    np.testing.assert_allclose(total["stage1_conv"]["kernel"].ravel(), [1.0, -5.0], rtol=1e-6)
    np.testing.assert_allclose(distance, [2.0], rtol=1e-6)
    # The quantile of 1/2 is the smaller magnitude, 0 here: it took nothing; at 1 nothing is left.
    total, _ = prior.replace(quantile=1.0).add_to(own, params, 0.4)  # type: ignore[attr-defined]
    chex.assert_trees_all_equal(total, own)


@pytest.mark.slow
def test_half_precision_keeps_its_dtype() -> None:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables_of(0)[0])
    total, distance = NodePrior(random_prior()).add_to(half, half, 0.5)
    chex.assert_trees_all_equal_dtypes(total, half)
    assert distance.dtype == jnp.float32


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_descent_with_the_penalty_comes_nearer_to_the_prior(schedule: str) -> None:
    prior, params = NodePrior(random_prior(), 20.0, 0.7, schedule), variables_of(0)[0]
    nothing = jax.tree.map(jnp.zeros_like, params)
    start = float(prior_loss(params, prior.prior))
    add_to = jax.jit(prior.add_to)
    for k in range(1, 101):
        gradient, _ = add_to(nothing, params, k / 100)
        params = jax.tree.map(lambda p, g: p - g, params, gradient)
    assert prior_loss(params, prior.prior) < 0.5 * start


# --- in the step


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_step_adds_the_prior_to_its_own_node_alone(name: str) -> None:
    step = STEPS[name]
    (plain, losses), (state, metrics) = (step(started(), 0.25, p) for p in (None, PRIORS))
    expected, _ = PRIORS[0].add_to(
        jax.tree.map(jnp.zeros_like, plain.params[0]), started().params[0], 0.25
    )
    # The optimiser subtracts the gradient.
    both = jax.tree.map(lambda p, e: p - e, plain.params[0], expected)
    chex.assert_trees_all_close(state.params[0], both, rtol=1e-4, atol=1e-5)
    assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(expected)) > 1e-2

    compare = chex.assert_trees_all_equal if name == "per_node" else close
    for part in ("params", "model_state", "opt_state"):
        compare(getattr(state, part)[1:], getattr(plain, part)[1:])
    compare(state.model_state, plain.model_state)
    distance = np.asarray(metrics.pop("prior_distance"))
    compare(metrics, losses)
    assert distance.shape == (3, 2)
    expected_distance = prior_distance(started().params[0], PRIORS[0].prior)
    np.testing.assert_allclose(distance[0], expected_distance, rtol=1e-5)
    assert np.isnan(distance[1:]).all()


def part_of(state: GraphState, nodes: slice) -> GraphState:
    """Some of the nodes."""
    params, model_state, opt_state = state.params[nodes], state.model_state[nodes], state.opt_state
    return GraphState(params, model_state, opt_state[nodes], state.step)


close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [(0, 0, 0), (0, 1, 1), (1, 0, 0)], ids=str)
def test_both_engines_take_the_same_steps(devices: tuple[int, ...]) -> None:
    priors = (*PRIORS[:2], NodePrior(random_prior(3, stages=1), 0.5, 0.9, "constant"))
    placement = [DEVICES[i] for i in devices]
    ours, reference = started(), started()
    for k in (1, 2):
        ours, metrics = by_node(ours, k / 4, priors, placement)
        reference, expected = fused(reference, k / 4, priors)
        chex.assert_trees_all_close(
            jax.device_get((ours, metrics)),
            jax.device_get((reference, expected)),
            rtol=1e-4,
            atol=1e-5,
        )
    distance = np.asarray(metrics["prior_distance"])
    assert np.isnan(distance).tolist() == [[False] * 2, [True] * 2, [False, True]]


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_the_gradients_of_attention_and_of_a_prior_add_up(name: str) -> None:
    def gradient_and_metrics(attention: float, *priors: NodePrior | None) -> Any:
        before, gates = part_of(started(), slice(0, 3, 2)), GATES[::2, ::2]
        weights = jnp.array([1.0, 1.0, attention])[:, None, None] * jnp.ones((2, 2))
        edges = edge_arrays(gates, 2.0, ("cross_entropy", "kl", "attention"), weights)
        more = {"node_fns": (STAGED, STAGED)}
        after, metrics = STEPS[name](before, 0.25, priors, gates=edges, **more)
        return jax.tree.map(jnp.subtract, before.params, after.params), metrics

    neither, plain = gradient_and_metrics(0.0, None, None)
    prior, distance = gradient_and_metrics(0.0, PRIORS[0], None)
    attention, losses = gradient_and_metrics(50.0, None, None)
    both, metrics = gradient_and_metrics(50.0, PRIORS[0], None)
    expected = jax.tree.map(lambda a, p, n: a + p - n, attention, prior, neither)
    chex.assert_trees_all_close(both, expected, rtol=1e-4, atol=1e-5)
    close(both[1], attention[1])
    for other in (neither, prior, attention):
        with pytest.raises(AssertionError):
            chex.assert_trees_all_close(both[0], other[0], atol=1e-2)
    close(metrics, losses | {"prior_distance": distance["prior_distance"]})
    assert (np.asarray(losses["loss"]) > np.asarray(plain["loss"]) + 0.1).all()


def test_without_priors_the_program_is_the_same() -> None:
    def program(*given: Any) -> str:
        def step(state: GraphState, *priors: Any) -> Any:
            options: dict[str, Any] = {"priors": priors[0]} if priors else {}
            options |= {"node_fns": NODE_FNS, "optimizer": SGD}
            return ktg.train_step(state, IMAGES, LABELS, GRAPH.gate_codes, 0.5, **options)

        return str(jax.make_jaxpr(step)(started(), *given))

    assert program() == program(None) == program((None, None, None)) != program(PRIORS)


def test_a_weight_of_zero_is_as_good_as_no_prior() -> None:
    idle = (NodePrior(random_prior(), weight=0.0), None, None)
    (plain, _), (state, _) = (by_node(started(), 0.25, p) for p in (None, idle))
    close(state, plain)


def test_weights_and_priors_are_data() -> None:
    """Another prior or weight needs no other program, another quantile does."""
    traces = []

    @jax.jit
    def add(prior: NodePrior, params: Any) -> Any:
        traces.append(prior.quantile)
        return prior.add_to(params, params, 0.5)

    params = variables_of(0)[0]
    add(NodePrior(random_prior(), 1.0), params)
    add(NodePrior(random_prior(1), 2.0), params)
    assert traces == [0.7]
    add(NodePrior(random_prior(), 1.0, 0.9), params)
    assert traces == [0.7, 0.9]


@pytest.mark.slow
def test_nodes_of_a_model_share_one_executable_with_a_prior() -> None:
    optimizer = optax.sgd(0.5)
    plain: Any = programs.backward_and_update(optimizer)
    with_prior: Any = programs.backward_with_prior(optimizer)
    batch = {DEVICES[0]: IMAGES}, LABELS
    options: dict[str, Any] = {"optimizer": optimizer, "placement": (DEVICES[0],) * 3}

    def run(*priors: NodePrior | None) -> tuple[int, int]:
        state = place(started(optimizer), options["placement"])
        per_node_step(
            state, *batch, GRAPH.gate_codes, 0.5, node_fns=NODE_FNS, priors=priors, **options
        )
        return plain._cache_size(), with_prior._cache_size()

    start = run(None, None, None)
    assert start[1] == 0
    for priors in (
        (PRIORS[0], None, None),
        (NodePrior(random_prior(4), 2.0, 0.5), None, PRIORS[0]),
    ):
        assert run(*priors) == (start[0], 1)


# --- over devices, in loops


DATA = Arrays(
    RNG.integers(0, 256, (32, 8, 8, 1), np.uint8), np.asarray(np.arange(32) % 5, np.int32)
)


def engines(optimizer: optax.GradientTransformation) -> list[Engine]:
    task = Task(NODE_FNS, optimizer, Batches(32, 8), (8, 8, 1), total_steps=8)
    return [
        FusedEngine(task, Parallel("jit", DEVICES[:2])),
        PerNodeEngine(task, started(optimizer), DEVICES[:2]),
    ]


@pytest.mark.slow
def test_engines_train_with_priors_and_record_their_distance() -> None:
    optimizer, key = ktg.sgd(0.1), jax.random.key(1)
    ends, records = [], []
    for engine in engines(optimizer):
        step = engine.make_step(engine.load(DATA), GRAPH.edge_arrays, key, PRIORS)
        epochs = train_epochs(
            engine.place(started(optimizer)), step, "abc", epochs=2, steps_per_epoch=4, batch_size=8
        )
        for record, state in epochs:
            records.append(record)
            end = jax.device_get(state)
        ends.append(end)
    chex.assert_trees_all_close(*ends, rtol=1e-3, atol=1e-4)
    for record, other in zip(records[:2], records[2:], strict=True):
        ours, theirs, third = (node.get("prior_distance") for node in record["nodes"])
        assert theirs is third is None
        assert len(ours) == 2
        np.testing.assert_allclose(ours, other["nodes"][0]["prior_distance"], rtol=1e-3)


@pytest.mark.slow
def test_several_updates_in_one_call_are_the_same() -> None:
    def train(steps_per_call: int) -> Any:
        task = Task((STAGED,), SGD, Batches(32, 8), (8, 8, 1), total_steps=4)
        step = fused_step(task, Parallel("jit", DEVICES[:1]), steps_per_call)
        state, gates, history = part_of(started(), slice(0, 1)), jnp.zeros((1, 1), jnp.int32), []
        for _ in range(4 // steps_per_call):
            state, metrics = step(state, DATA, gates, jax.random.key(0), PRIORS[:1])
            history.append(np.reshape(metrics["prior_distance"], (-1, 1, 2)))
        return jax.device_get(state), np.concatenate(history)

    chex.assert_trees_all_close(train(1), train(2), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_under_pmap_a_prior_acts_as_on_one_device() -> None:
    ends = []
    for devices in (DEVICES[:1], DEVICES[:2]):
        parallel = Parallel("pmap", devices)
        # Batch statistics are each device's own here: no edges, only the prior is compared.
        task = Task(NODE_FNS[1:], SGD, Batches(32, 8), (8, 8, 1), total_steps=4)
        step = fused_step(task, parallel)
        gates = jnp.full((2, 2), ktg.GATES.index("cutoff"), jnp.int32)
        inputs = parallel.replicate((DATA, gates, jax.random.key(0), (None, PRIORS[0])))
        state = parallel.replicate(part_of(started(), slice(1, 3)))
        state, metrics = step(state, *inputs)
        ends.append(jax.device_get((state.params, metrics["prior_distance"][1])))
    close(*ends)
    with pytest.raises(AssertionError):
        close(ends[0][0], started().params[1:])


# --- from files, by the graph


def graph_with(prior: Any, **options: Any) -> Graph:
    node = ktg.Node("staged", "a", prior=str(prior), **options)
    return Graph((node, *GRAPH.nodes[1:]), GRAPH.gates)


@pytest.fixture
def folder(tmp_path: Any) -> Any:
    options: dict[str, Any] = {"student": "staged", "num_classes": 5, "image_shape": (8, 8, 1)}
    save_prior(tmp_path / "prior.safetensors", random_prior(), **options)
    wider = Prior((random_prior().kernels[0], jnp.ones((1, 1, 4, 7))), PATHS)
    save_prior(tmp_path / "wider.safetensors", wider, **options)
    deeper = Prior(random_prior().kernels, (PATHS[0], "stage2_block9.conv2.kernel"))
    save_prior(tmp_path / "deeper.safetensors", deeper, **options)
    return tmp_path


def test_a_node_starts_from_its_prior_unless_it_is_assigned(folder: Any) -> None:
    prior = random_prior()
    state, priors = ktg.with_priors(started(), graph_with(folder, prior_weight=0.5))
    assert priors == (NodePrior(priors[0].prior, 0.5, 0.7, "linear"), None, None)  # type: ignore[union-attr]
    chex.assert_trees_all_equal(priors[0].prior, prior)
    np.testing.assert_allclose(prior_distance(state.params[0], prior), [0, 0], atol=1e-6)
    before = started()
    of_priors = {path: jnp.zeros(()) for path in PATHS}
    chex.assert_trees_all_equal(
        replaced(state.params[0], of_priors), replaced(before.params[0], of_priors)
    )
    chex.assert_trees_all_equal(state.params[1:], before.params[1:])

    same, none = ktg.with_priors(started(), graph_with(folder, prior_matching="none"))
    chex.assert_trees_all_equal(same, before)
    chex.assert_trees_all_equal(none[0].prior, prior)  # type: ignore[union-attr]

    same, assigned = ktg.with_priors(started(), graph_with(folder, prior_matching="assignment"))
    chex.assert_trees_all_equal(same, before)
    best = assigned[0].prior  # type: ignore[union-attr]
    for theirs, given in zip(best.kernels, prior.kernels, strict=True):
        np.testing.assert_array_equal(np.sort(theirs, axis=-1), np.sort(given, axis=-1))
    assert prior_loss(before.params[0], best) < prior_loss(before.params[0], prior)
    ours, theirs = (
        normalised(k).reshape(-1, 6) for k in (by_path(before.params[0])[PATHS[1]], best.kernels[1])
    )
    assert jnp.trace(ours.T @ theirs) >= jnp.trace(ours.T @ theirs[:, ::-1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.safetensors", "a whole .safetensors file, or a folder with prior.safetensors"),
        (
            "wider.safetensors",
            r"a prior fitted for this student, where it has shape (1, 1, 4, 6); "
            r"found prior stage2_conv.kernel (1, 1, 4, 7)",
        ),
        (
            "deeper.safetensors",
            "a prior fitted for this student (no such parameter); "
            "found prior 'stage2_block9.conv2.kernel'",
        ),
    ],
)
@pytest.mark.parametrize("matching", ktg.priors.MATCHINGS)
def test_a_prior_that_does_not_fit_is_refused_by_node(
    folder: Any, name: str, message: str, matching: str
) -> None:
    with pytest.raises(InputError) as error:
        ktg.with_priors(started(), graph_with(folder / name, prior_matching=matching))
    start = f"nodes[0].prior: got '{folder / name}'; allowed: {message}"
    assert str(error.value).startswith(start)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_step_refuses_priors_that_cannot_be(name: str) -> None:
    with pytest.raises(InputError, match=r"^priors: got 1; allowed: 3 entries, one a node"):
        STEPS[name](started(), 0.5, PRIORS[:1])
    frozen = started(frozen=[0])
    with pytest.raises(InputError, match=r"^priors\[0\]: got 'NodePrior'; allowed: None: the node"):
        STEPS[name](frozen, 0.5, PRIORS)
    for change, message in (
        ({"quantile": 1.5}, r"^quantile: got 1.5"),
        ({"schedule": "never"}, r"^schedule: got 'never'; allowed: linear, constant"),
        ({"prior": Prior((jnp.ones((1, 1, 4, 6)),), ("stage3.kernel",))}, "'stage3.kernel'"),
    ):
        bad = PRIORS[0].replace(**change)  # type: ignore[attr-defined]
        with pytest.raises(InputError, match=message):
            STEPS[name](started(), 0.5, (bad, None, None))
