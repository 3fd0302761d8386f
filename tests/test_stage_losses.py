"""Losses on stage outputs: maps, gradients, gates, and edges that carry them in a step."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from carried import Weights, carrying, stage_edge_losses
from random_variables import random_variables
from tiny_models import Staged, Tiny

import ktg_jax as ktg
from ktg_jax import GraphState, NodeFns, Parallel
from ktg_jax.edge_arrays import EdgeArrays
from ktg_jax.errors import InputError
from ktg_jax.outputs import Outputs
from ktg_jax.training.batches import Arrays, Batches
from ktg_jax.training.fused_engine import fused_step
from ktg_jax.training.task import Task

RNG = np.random.default_rng(0)
LOSSES = [ktg.attention_transfer_loss, ktg.feature_transfer_loss]

Loss = Callable[..., jax.Array]


def gradients_of(loss: Loss, student: jax.Array, teacher: jax.Array) -> Any:
    """The loss of a single stage, and its gradients with respect to both."""
    value = jax.value_and_grad(lambda s, t: loss([s], [t]), argnums=(0, 1))
    return jax.jit(value)(student, teacher)


def outputs(*shapes: tuple[int, ...]) -> list[jax.Array]:
    return [jnp.asarray(RNG.standard_normal(shape), jnp.float32) for shape in shapes]


# --- attention transfer


def test_attention_transfer_by_hand() -> None:
    # Squared means over two channels: student (8, 6), teacher (3, 4); over norms 10 and 5.
    student = jnp.array([[[[4.0, 0.0], [0.0, 12.0**0.5]]]])
    teacher = jnp.array([[[[6.0**0.5, 0.0], [2.0, 2.0]]]])
    loss = ktg.attention_transfer_loss([student], [teacher])
    np.testing.assert_allclose(loss, (0.2**2 + 0.2**2) / 2, rtol=1e-5)
    twice = ktg.attention_transfer_loss([student, student], [teacher, teacher])
    np.testing.assert_allclose(twice, 2 * loss, rtol=1e-6)


def test_samples_are_normalised_apart() -> None:
    (student, teacher) = outputs((3, 4, 4, 5), (3, 4, 4, 2))
    scale = jnp.array([1.0, 10.0, 100.0])[:, None, None, None]
    loss = ktg.attention_transfer_loss([student], [teacher])
    np.testing.assert_allclose(
        ktg.attention_transfer_loss([scale * student], [teacher]), loss, rtol=1e-5
    )
    apart = [
        ktg.attention_transfer_loss([student[i : i + 1]], [teacher[i : i + 1]]) for i in range(3)
    ]
    np.testing.assert_allclose(loss, np.mean(apart), rtol=1e-5)


def test_the_larger_map_is_averaged_to_the_smaller() -> None:
    (small,) = outputs((2, 2, 3, 4))
    large = jnp.repeat(jnp.repeat(small, 2, axis=1), 3, axis=2)
    for student, teacher in ((small, large), (large, small)):
        loss = ktg.attention_transfer_loss([student], [teacher])
        np.testing.assert_allclose(loss, 0, atol=1e-12)


def test_cells_that_do_not_divide_overlap() -> None:
    # 3 columns to 2: cells (0, 1) and (1, 2). Energies 1 3 5 become 2 4; against 2 4.
    student = jnp.sqrt(jnp.array([1.0, 3.0, 5.0])).reshape(1, 1, 3, 1)
    teacher = jnp.sqrt(jnp.array([2.0, 4.0])).reshape(1, 1, 2, 1)
    np.testing.assert_allclose(ktg.attention_transfer_loss([student], [teacher]), 0, atol=1e-12)


def test_only_the_student_learns_and_it_comes_nearer() -> None:
    student, teacher = outputs((4, 6, 6, 3), (4, 3, 3, 8))
    value = jax.jit(lambda s, t: ktg.attention_transfer_loss([s], [t]))
    ours, theirs = jax.grad(value, argnums=(0, 1))(student, teacher)
    np.testing.assert_array_equal(theirs, np.zeros(teacher.shape))
    assert np.abs(ours).max() > 0
    assert value(student - 1.0 * ours, teacher) < value(student, teacher)
    numeric = (value(student + 1e-2 * ours, teacher) - value(student - 1e-2 * ours, teacher)) / 2e-2
    np.testing.assert_allclose(numeric, jnp.sum(jnp.square(ours)), rtol=0.05)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (ktg.attention_transfer_loss, 1 / 16),  # each map has norm 1
        (ktg.feature_transfer_loss, 1),
    ],
)
def test_a_dead_output_has_finite_loss_and_no_gradient(loss: Loss, expected: float) -> None:
    zeros, (teacher,) = jnp.zeros((2, 4, 4, 3)), outputs((2, 4, 4, 3))
    value, (gradient, _) = gradients_of(loss, zeros, teacher)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_array_equal(gradient, zeros)


# --- feature transfer


def test_feature_transfer_by_hand() -> None:
    # Normalised, (0.6, 0.8) against (1, 0): 2 - 2 * 0.6; then (0, 1) against (0, -1): 4.
    student = jnp.array([[[[3.0, 4.0]]], [[[0.0, 2.0]]]])
    teacher = jnp.array([[[[7.0, 0.0]]], [[[0.0, -5.0]]]])
    loss = ktg.feature_transfer_loss([student], [teacher])
    np.testing.assert_allclose(loss, (0.8 + 4) / 2, rtol=1e-6)
    twice = ktg.feature_transfer_loss([student, teacher], [teacher, student])
    np.testing.assert_allclose(twice, 2 * loss, rtol=1e-6)


def test_features_are_compared_where_they_are() -> None:
    # The same vector at another position is as far away as any.
    student = jnp.array([[[[1.0, 2.0], [0.0, 0.0]]]])
    loss = ktg.feature_transfer_loss([student], [student[:, :, ::-1]])
    np.testing.assert_allclose(loss, 2.0, rtol=1e-6)


def test_the_students_gradient_of_feature_transfer_by_hand() -> None:
    student, teacher = outputs(*[(2, 2, 3, 4)] * 2)
    _, (ours, theirs) = gradients_of(ktg.feature_transfer_loss, student, teacher)
    np.testing.assert_array_equal(theirs, np.zeros(teacher.shape))
    for i in range(2):
        s, t = (np.asarray(output[i], np.float64) for output in (student, teacher))
        size = np.linalg.norm(s)
        s, t = s / size, t / np.linalg.norm(t)
        np.testing.assert_allclose(ours[i], -(t - (s * t).sum() * s) / size, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 4, 4, 5), (2, 4, 2, 3), (2, 2, 4, 3), (1, 4, 4, 3)], ids=str)
def test_features_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as error:
        ktg.feature_transfer_loss(outputs((2, 4, 4, 3)), outputs(shape))
    message = f"a sender's stage output: got {shape}; allowed: (2, 4, 4, 3), as the receiver's"
    assert str(error.value).startswith(message)


# --- both


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_compared_in_single(loss: Loss) -> None:
    student, teacher = (output.astype(jnp.bfloat16) for output in outputs(*[(2, 4, 4, 3)] * 2))
    value, (gradient, _) = gradients_of(loss, student, teacher)
    assert (value.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    exact, _ = gradients_of(loss, student.astype(jnp.float32), teacher.astype(jnp.float32))
    np.testing.assert_allclose(value, exact, rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_who_agrees_with_the_teacher_has_nothing_to_learn(loss: Loss) -> None:
    (output,) = outputs((2, 4, 4, 3))
    value, (gradient, _) = gradients_of(loss, output, 2 * output)
    np.testing.assert_allclose(value, 0, atol=1e-12)
    np.testing.assert_allclose(gradient, np.zeros(output.shape), atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_numbers_of_stages_that_differ_are_refused(loss: Loss) -> None:
    (output,) = outputs((1, 2, 2, 1))
    with pytest.raises(InputError, match=r"^teacher_stages: got 1; allowed: 2, as many as"):
        loss([output, output], [output])


def test_batches_that_differ_are_an_error() -> None:
    with pytest.raises(AssertionError):
        ktg.attention_transfer_loss(outputs((2, 2, 2, 1)), outputs((3, 2, 2, 1)))


# --- gated edges

# Two nodes, two samples, one stage of two pixels. Energies: (1, 0) twice; (0, 1) and (3, 4).
STAGES = [
    [jnp.array([[1.0, 0.0], [1.0, 0.0]]).reshape(2, 1, 2, 1)],
    [jnp.sqrt(jnp.array([[0.0, 1.0], [3.0, 4.0]])).reshape(2, 1, 2, 1)],
]
# Per sample: ((1 - 0)^2 + (0 - 1)^2) / 2 and ((1 - 0.6)^2 + (0 - 0.8)^2) / 2; distances of
# (1, 0) from (0, 1) and from (3^0.5, 2) / 7^0.5.
ATTENTION, FEATURES = np.array([1.0, 0.4]), np.array([2.0, 2 - 2 * (3 / 7) ** 0.5])
# Node 0 is right on sample 0, node 1 on sample 1.
LOGITS = [jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[0.0, 1.0], [1.0, 0.0]])]
LABELS = jnp.zeros(2, jnp.int32)
BY_HAND = [
    ({"attention": 1.0}, ATTENTION),
    ({"features": 1.0}, FEATURES),
    ({"attention": 2.0, "features": 3.0}, 2 * ATTENTION + 3 * FEATURES),
]


def every(gate: str, num_nodes: int = 2) -> jax.Array:
    """The same gate on all edges."""
    return jnp.full((num_nodes, num_nodes), ktg.GATES.index(gate))


def gates_of(*rows: str) -> jax.Array:
    """Gates by their initials, but r is `correct`."""
    return jnp.array([["tclrn".index(gate) for gate in row] for row in rows])


@pytest.mark.parametrize(("edge_weights", "losses"), BY_HAND)
@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_edge_losses_are_as_worked_out_by_hand(
    edge_weights: Weights, losses: np.ndarray, progress: float
) -> None:
    expected = {
        "through": [losses.mean(), losses.mean()],
        "cutoff": [0, 0],
        "linear": [progress * losses.mean(), progress * losses.mean()],
        # Divided by the batch's 2 samples, not by the 1 that the sender has right.
        "correct": [losses[1] / 2, losses[0] / 2],
        "negative_linear": [(1 - progress) * losses.mean(), (1 - progress) * losses.mean()],
    }
    for gate, (of_0, of_1) in expected.items():
        edges = carrying(every(gate), edge_weights)
        found = stage_edge_losses(STAGES, LOGITS, LABELS, progress, edges)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, [[0, of_0], [of_1, 0]], rtol=1e-5, err_msg=gate)


def test_each_edge_has_its_own_gate() -> None:
    edges = carrying(gates_of("cr", "nc"), {"attention": 1.0})
    found = stage_edge_losses(STAGES, LOGITS, LABELS, 0.75, edges)
    np.testing.assert_allclose(found, [[0, 0.4 / 2], [0.25 * 0.7, 0]], rtol=1e-5)


@jax.jit
def heard(ours: jax.Array, theirs: jax.Array, edges: EdgeArrays) -> Any:
    """What node 0 hears from `theirs` and from node 1, and its gradient."""

    def row(ours: jax.Array) -> jax.Array:
        stages, logits = [[ours], [theirs], STAGES[1]], [LOGITS[0], theirs[:, 0, :, 0], LOGITS[1]]
        return jnp.sum(stage_edge_losses(stages, logits, LABELS, 0.5, edges)[0])

    return jax.value_and_grad(row)(ours)


@pytest.mark.parametrize("broken", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("edge_weights", [weights for weights, _ in BY_HAND])
def test_a_cut_edge_is_exactly_nothing_whatever_its_sender_is(
    edge_weights: Weights, broken: float
) -> None:
    ours, nothing = STAGES[0][0], jnp.full_like(STAGES[1][0], broken)
    loss, gradient = heard(ours, nothing, carrying(every("cutoff", 3), edge_weights))
    assert loss == 0
    np.testing.assert_array_equal(gradient, np.zeros(ours.shape))
    # What else the node hears is as if its sender were any other.
    edges = carrying(gates_of("tct", "ttt", "ttt"), edge_weights)
    found = heard(ours, nothing, edges)
    chex.assert_trees_all_equal(found, heard(ours, 3 + ours, edges))
    assert found[0] > 0.5
    assert np.isnan(heard(ours, nothing, carrying(every("through", 3), edge_weights))[0])


SHAPES = [(8, 8, 3), (4, 4, 5)], [(4, 4, 2), (4, 4, 2)], [(8, 8, 6), (2, 2, 1)]
"""Two stages of three nodes: other widths, other sizes."""


def maps_by_hand(output: jax.Array, size: int) -> jax.Array:
    """Attention maps `[B, size * size]`; sizes divide."""
    batch, cell = len(output), output.shape[1] // size
    energy = (output**2).sum(axis=3).reshape(batch, size, cell, size, cell).sum(axis=(2, 4))
    flat = energy.reshape(batch, -1)
    return flat / jnp.sqrt((flat**2).sum(axis=1))[:, None]


def attention_by_hand(ours: Sequence[jax.Array], theirs: Sequence[jax.Array]) -> Any:
    """Attention transfer as its paper has it, written anew: per sample, `[B]`."""
    total: Any = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        size = min(mine.shape[1], other.shape[1])
        difference = maps_by_hand(mine, size) - maps_by_hand(other, size)
        total += (difference**2).sum(axis=1) / size**2
    return total


ROWS = "tlr", "ntl", "rct"
RIGHT = np.array([[1, 0, 1], [0, 1, 1], [0, 1, 0]])  # [node, sample]


@pytest.fixture(scope="module")
def on_three_nodes() -> tuple[Any, Any]:
    """Stages, and each receiver's gradient with respect to all nodes' stages and logits."""
    stages = [outputs(*((3, *shape) for shape in shapes)) for shapes in SHAPES]
    labels, edges = jnp.arange(3), carrying(gates_of(*ROWS), {"attention": 10.0})
    logits = [jax.nn.one_hot(labels + 1 - right, 4) for right in RIGHT]

    def losses(stages: Any, logits: Any) -> jax.Array:
        return stage_edge_losses(stages, logits, labels, 0.25, edges).sum(axis=1)

    return stages, jax.jit(jax.jacrev(losses, (0, 1)))(stages, logits)


def test_nobodys_logits_and_no_senders_stages_have_a_gradient(on_three_nodes: Any) -> None:
    _, (of_stages, of_logits) = on_three_nodes
    chex.assert_trees_all_equal(of_logits, jax.tree.map(jnp.zeros_like, of_logits))
    for sender in range(3):
        for receiver in {0, 1, 2} - {sender}:
            for gradient in of_stages[sender]:
                np.testing.assert_array_equal(gradient[receiver], 0)


@pytest.mark.parametrize("receiver", [0, 1, 2])
def test_a_receivers_gradient_is_that_of_its_own_loss(on_three_nodes: Any, receiver: int) -> None:
    stages, (gradients, _) = on_three_nodes

    def own_loss(ours: Any) -> Any:
        losses: Any = 0.0
        for sender, gate in enumerate(ROWS[receiver]):
            weight = {
                "t": 1.0,
                "c": 0.0,
                "l": 0.25,
                "n": 0.75,
                "r": RIGHT[sender].astype(np.float32),
            }[gate]
            if sender != receiver:
                losses += weight * attention_by_hand(ours, stages[sender])
        return 10 * jnp.mean(losses)

    expected = jax.jit(jax.grad(own_loss))(stages[receiver])
    found = [gradient[receiver] for gradient in gradients[receiver]]
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)
    assert min(np.abs(gradient).max() for gradient in found) > 1e-3


# --- of a whole graph, on logits and stages

WEIGHTS = {"cross_entropy": 1.0, "kl": 0.5, "attention": 40.0}
GRADIENTS = jax.jit(ktg.graph_gradients)


def logits_of(num_nodes: int) -> list[jax.Array]:
    return outputs(*[(6, 5)] * num_nodes)


LABELS_OF_6 = jnp.arange(6) % 5


@jax.jit
def on_logits(logits: Any, gates: jax.Array, weight: Any) -> Any:
    """Edge losses with those off the diagonal times a weight, and their sum's gradient."""

    def weighted(logits: Any) -> Any:
        losses = ktg.edge_losses(logits, LABELS_OF_6, gates, 0.25, 2.0)
        labels = jnp.diag(jnp.diag(losses))
        losses = labels + weight * (losses - labels)
        return losses.sum(), losses

    return jax.grad(weighted, has_aux=True)(logits)


@pytest.mark.parametrize("gate", ktg.GATES)
@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_the_weight_of_the_divergence_leaves_the_label_alone(gate: str, weight: float) -> None:
    logits, gates = logits_of(3), every(gate, 3)
    edges = carrying(gates, {"cross_entropy": 1.0, "kl": weight}, 2.0)
    found, metrics = GRADIENTS(logits, LABELS_OF_6, edges, 0.25)
    gradients, losses = on_logits(logits, gates, weight)
    np.testing.assert_allclose(metrics["edge_losses"], losses, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], losses.sum(axis=1), rtol=1e-5)
    chex.assert_trees_all_close(found, tuple(gradients), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_losses_on_logits_and_on_stages_add_up_and_each_has_its_own_gradient() -> None:
    logits, stages = logits_of(2), [outputs((6, 4, 4, 3), (6, 2, 2, 5)) for _ in range(2)]
    gates, on_stages_alone = gates_of("rl", "nt"), {"attention": 30.0, "features": 0.5}
    all_losses = {"cross_entropy": 1.0, "kl": 2.0} | on_stages_alone
    nodes = [Outputs(z, tuple(s)) for z, s in zip(logits, stages, strict=True)]
    found, metrics = GRADIENTS(nodes, LABELS_OF_6, carrying(gates, all_losses, 2.0), 0.25)

    def summed(stages: Any) -> Any:
        edges = carrying(gates, on_stages_alone)
        losses = stage_edge_losses(stages, logits, LABELS_OF_6, 0.25, edges)
        return losses.sum(), losses

    of_stages, on_stages = jax.jit(jax.grad(summed, has_aux=True))(stages)
    of_logits, losses = on_logits(logits, gates, 2.0)
    assert on_stages[0, 1] > 0.1
    np.testing.assert_allclose(metrics["edge_losses"], losses + on_stages, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (losses + on_stages).sum(axis=1), rtol=1e-5)
    expected = [Outputs(z, tuple(s)) for z, s in zip(of_logits, of_stages, strict=True)]
    chex.assert_trees_all_close(list(found), expected, rtol=1e-4, atol=1e-6)


def test_the_gradients_of_stages_are_in_their_own_dtype() -> None:
    stages = [outputs((6, 4, 4, 3), (6, 2, 2, 5)) for _ in range(2)]
    stages[1][0] = stages[1][0].astype(jnp.bfloat16)
    nodes = [Outputs(z, tuple(s)) for z, s in zip(logits_of(2), stages, strict=True)]
    edges = carrying(every("through"), WEIGHTS)
    found, _ = jax.eval_shape(ktg.graph_gradients, nodes, LABELS_OF_6, edges, 0.25)
    chex.assert_trees_all_equal_shapes_and_dtypes([list(s) for _, s in found], stages)


@pytest.mark.slow
def test_the_papers_weights_give_every_bit_of_the_papers_gradients() -> None:
    logits, gates = tuple(logits_of(3)), gates_of("trl", "ctn", "lcr")
    inputs = LABELS_OF_6, gates, 0.25, 2.0
    found, metrics = GRADIENTS(logits, *inputs)
    chex.assert_trees_all_equal(found, jax.jit(jax.grad(ktg.graph_loss))(logits, *inputs))
    losses = jax.jit(ktg.edge_losses)(logits, *inputs)
    np.testing.assert_array_equal(metrics["edge_losses"], losses)
    # Stages that nothing is said about have no gradient, and change nothing.
    stages = tuple(tuple(outputs((6, 2, 2, 3))) for _ in range(3))
    nodes = tuple(Outputs(z, s) for z, s in zip(logits, stages, strict=True))
    given, same = GRADIENTS(nodes, *inputs)
    nothing = jax.tree.map(jnp.zeros_like, stages)
    expected = tuple(Outputs(z, s) for z, s in zip(found, nothing, strict=True))
    chex.assert_trees_all_equal((given, same), (expected, metrics))


def test_stages_that_are_needed_must_be_given() -> None:
    edges = carrying(every("through"), {"features": 1.0})
    with pytest.raises(InputError, match=r"node 1 as seen by node 0: .*: got 0; allowed: at least"):
        ktg.graph_gradients(logits_of(2), LABELS_OF_6, edges, 0.5)


# --- in a step

IMAGES = jnp.asarray(RNG.random((4, 8, 8, 1), np.float32))
DIGITS = jnp.arange(4)
MODULES = Staged(5), Staged(5, (8, 12)), Staged(5)
NODE_FNS = tuple(ktg.from_linen(module) for module in MODULES)
SGD = optax.sgd(1.0)  # an update is the gradient itself, with the other sign


@functools.cache
def variables_of(i: int) -> tuple[Any, Any]:
    return jax.tree.map(jnp.asarray, random_variables(NODE_FNS[i], IMAGES, i))


def started(frozen: Sequence[int] = ()) -> GraphState:
    params, model_state = zip(*map(variables_of, range(3)), strict=True)
    opt_state = tuple(None if i in frozen else SGD.init(p) for i, p in enumerate(params))
    return GraphState(params, model_state, opt_state, jnp.zeros((), jnp.int32))


@jax.jit
def step(state: GraphState, gates: jax.Array) -> Any:
    edges = carrying(gates, WEIGHTS, 2.0)
    options: dict[str, Any] = {"node_fns": NODE_FNS, "optimizer": SGD}
    return ktg.train_step(state, IMAGES, DIGITS, edges, 0.25, **options)


def seen(i: int, params: Any, train: bool = True) -> tuple[jax.Array, list[jax.Array]]:
    """Logits and stage outputs of a node, by flax alone."""
    logits, captured = MODULES[i].apply(
        {"params": params, **variables_of(i)[1]},
        IMAGES,
        train,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=True,
    )
    calls: Any = captured["intermediates"]
    return logits, [calls[f"stage{g}_conv"]["__call__"][0] for g in (1, 2)]


@functools.partial(jax.jit, static_argnames=("i", "senders", "frozen"))
def own_gradient(params: Any, i: int, senders: tuple[int, ...], frozen: Sequence[int] = ()) -> Any:
    """The loss of a node that hears its label and, through open gates, these senders."""

    def loss_of(params: Any) -> Any:
        logits, stages = seen(i, params)
        loss = -jnp.mean(jax.nn.log_softmax(logits)[DIGITS, DIGITS])
        for s in senders:
            theirs, their_stages = seen(s, variables_of(s)[0], train=s not in frozen)
            p, log_q = jax.nn.softmax(theirs / 2), jax.nn.log_softmax(logits / 2)
            loss += 0.5 * 2**2 * jnp.mean((p * (jnp.log(p) - log_q)).sum(axis=1))
            loss += 40 * jnp.mean(attention_by_hand(stages, their_stages))
        return loss

    return jax.grad(loss_of)(params)


def updates(state: GraphState, before: GraphState) -> list[Any]:
    """What was subtracted from each node's parameters."""
    pairs = zip(before.params, state.params, strict=True)
    return [jax.tree.map(jnp.subtract, *pair) for pair in pairs]


@pytest.mark.slow
def test_a_nodes_update_is_the_gradient_of_its_own_loss() -> None:
    before = started()
    state, _ = step(before, gates_of("ttc", "ctt", "cct"))
    for i, (found, senders) in enumerate(
        zip(updates(state, before), ((1,), (2,), ()), strict=True)
    ):
        expected = own_gradient(before.params[i], i, senders)
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    # The edge matters: without it the gradient is another.
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(
            updates(state, before)[0], own_gradient(before.params[0], 0, ()), atol=1e-2
        )


def test_an_edge_changes_nothing_of_any_node_but_its_receiver() -> None:
    without, _ = step(started(), gates_of("tcc", "ctl", "cct"))
    edge, _ = step(started(), gates_of("ttc", "ctl", "cct"))
    chex.assert_trees_all_equal(edge.params[1:], without.params[1:])
    chex.assert_trees_all_equal(edge.model_state, without.model_state)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(edge.params[0], without.params[0], atol=1e-2)


@pytest.mark.slow
def test_a_frozen_teacher_keeps_every_bit_and_shows_its_stored_statistics() -> None:
    before = started(frozen=[1])
    state, metrics = step(before, gates_of("ttc", "ccc", "cct"))
    chex.assert_trees_all_equal(state.params[1], before.params[1])
    chex.assert_trees_all_equal(state.model_state[1], before.model_state[1])
    assert state.frozen == (1,)
    expected = own_gradient(before.params[0], 0, (1,), frozen=(1,))
    chex.assert_trees_all_close(updates(state, before)[0], expected, rtol=1e-4, atol=1e-5)
    assert metrics["loss"][1] == 0


def test_a_diverged_node_does_not_disturb_those_it_is_cut_off_from() -> None:
    before, gates = started(), gates_of("tcc", "tct", "ccc")
    nans = jax.tree.map(lambda leaf: leaf * jnp.nan, before.params[1])
    diverged = GraphState(
        (before.params[0], nans, before.params[2]),
        before.model_state,
        before.opt_state,
        before.step,
    )
    (expected, _), (state, metrics) = (step(s, gates) for s in (before, diverged))
    for i in (0, 2):
        chex.assert_trees_all_equal(state.params[i], expected.params[i])
    assert np.isfinite(metrics["loss"]).tolist() == [True, False, True]
    _, heard = step(diverged, gates_of("ttc", "tct", "ccc"))  # the test can fail
    assert np.isnan(heard["loss"][0])


def test_the_papers_losses_need_no_stages_and_leave_the_program_as_it_was() -> None:
    silent = [NodeFns(fns.init, fns.apply) for fns in NODE_FNS]

    def program(node_fns: Sequence[NodeFns], gates: Any) -> str:
        options: dict[str, Any] = {"node_fns": node_fns, "optimizer": SGD}

        def plain_step(state: GraphState, gates: Any) -> Any:
            return ktg.train_step(state, IMAGES, DIGITS, gates, 0.5, **options)

        return str(jax.make_jaxpr(plain_step)(started(), gates))

    gates = every("through", 3)
    assert program(NODE_FNS, gates) == program(silent, gates)
    assert program(NODE_FNS, carrying(gates, WEIGHTS)) != program(silent, gates)


ON_EDGES = {"kl": 0.5, "attention": 40.0}
TINY, CNN = ktg.from_linen(Tiny(5)), ktg.build_model("cnn", 5)


@pytest.mark.parametrize(
    ("other", "weights", "message"),
    [
        (TINY, ON_EDGES, "stages: got 'Tiny'; allowed: a module with submodules stage1_..., "),
        (NodeFns(TINY.init, TINY.apply), ON_EDGES, "stages: got None; allowed: a network that "),
        (CNN, ON_EDGES, "teacher_stages: got 3; allowed: 2, as many as "),
        (
            NODE_FNS[1],
            {"features": 1.0},
            "a sender's stage output: got (4, 4, 4, 8); allowed: (4, 4, 4, 4), as the receiver's",
        ),
    ],
    ids=["no named stages", "no stages", "other stages", "other shapes"],
)
def test_nodes_whose_stages_do_not_fit_are_refused(
    other: NodeFns, weights: Weights, message: str
) -> None:
    def train(key: jax.Array) -> Any:
        graph, node_fns = ktg.graphs.mutual(["a", "b"]), (NODE_FNS[0], other)
        state = ktg.init_state(graph, node_fns, SGD, key, IMAGES)
        options: dict[str, Any] = {"node_fns": node_fns, "optimizer": SGD}
        edges = graph.carrying(weights).edge_arrays
        return ktg.train_step(state, IMAGES, DIGITS, edges, 0.5, **options)

    with pytest.raises(InputError) as error:
        jax.eval_shape(train, jax.random.key(0))
    assert message in str(error.value)


# --- over devices, in loops

DATA = Arrays(RNG.integers(0, 256, (16, 4, 4, 3), np.uint8), np.arange(16, dtype=np.int32) % 5)


def plain(width: int) -> NodeFns:
    """One stage and no batch statistics: the same on any number of devices."""

    def stages(params: Any, state: Any, images: jax.Array, train: bool) -> Any:
        output = images @ params["stage1"]
        return (jax.nn.relu(output).mean((1, 2)) @ params["classifier"], (output,)), state

    def init(rng: jax.Array, images: jax.Array) -> Any:
        shapes = {"stage1": (images.shape[3], width), "classifier": (width, 5)}
        return {name: jax.random.normal(rng, shape) for name, shape in shapes.items()}, {}

    def apply(*given: Any) -> Any:
        (logits, _), state = stages(*given)
        return logits, state

    return NodeFns(init, apply, stages)


PLAIN = plain(4), plain(6)


@functools.cache
def trained(strategy: str, devices: int, calls: int, attention: float = 40.0) -> Any:
    """Parameters and the last edge losses after four steps in so many calls."""
    graph = ktg.graphs.mutual(["a", "b"]).carrying({"kl": 0.5, "attention": attention})
    parallel = Parallel(strategy, jax.local_devices()[:devices])
    task = Task(PLAIN, SGD, Batches(16, 8), (4, 4, 3), total_steps=4)
    compiled = fused_step(task, parallel, steps_per_call=4 // calls)
    state = ktg.init_state(graph, PLAIN, SGD, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    state = parallel.replicate(state)
    inputs = parallel.replicate((DATA, graph.edge_arrays, jax.random.key(1)))
    for _ in range(calls):
        state, metrics = compiled(state, *inputs)
    return jax.device_get((state.params, metrics["edge_losses"].reshape(-1, 2, 2)[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("how", [("jit", 2, 2), ("pmap", 2, 4)], ids=str)
def test_devices_and_calls_make_no_difference(how: tuple[str, int, int]) -> None:
    expected = trained("jit", 1, 4)
    chex.assert_trees_all_close(trained(*how), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(trained("jit", 1, 4, attention=0.0), expected, atol=1e-2)
