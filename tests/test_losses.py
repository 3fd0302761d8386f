import itertools
from collections.abc import Callable, Sequence
from math import log
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ktg_jax as ktg

# Two nodes, two samples, two classes, written as probabilities (rows: samples).
P0 = np.array([[3 / 4, 1 / 4], [1 / 4, 3 / 4]])
P1 = np.array([[1 / 4, 3 / 4], [9 / 10, 1 / 10]])
LABELS = np.array([0, 0])
Z0, Z1 = np.log(P0).astype(np.float32), np.log(P1).astype(np.float32)
LOGITS = jnp.stack([Z0, Z1])

# Per-sample losses by hand. Node 0 is right on sample 0, node 1 on sample 1.
CE = np.array([[log(4 / 3), log(4)], [log(4), log(10 / 9)]])
KL_OF_0_FROM_1 = np.array([log(3) / 2, 0.9 * log(3.6) + 0.1 * log(0.4 / 3)])
KL_OF_1_FROM_0 = np.array([log(3) / 2, 0.25 * log(2.5 / 9) + 0.75 * log(7.5)])

EDGE_LOSSES = jax.jit(ktg.edge_losses)  # compiled once for several tests
GRADIENTS = jax.jit(jax.grad(ktg.graph_loss))


def codes(*rows: Sequence[str]) -> np.ndarray:
    return np.array([[ktg.GATES.index(gate) for gate in row] for row in rows], np.int32)


def all_through(num_nodes: int) -> np.ndarray:
    return np.zeros((num_nodes, num_nodes), np.int32)


def test_cross_entropy_is_as_worked_out_by_hand() -> None:
    for node in (0, 1):
        losses = ktg.cross_entropy(LOGITS[node], LABELS)
        chex.assert_type(losses, jnp.float32)
        np.testing.assert_allclose(losses, CE[node], rtol=1e-6)


def test_the_gradient_of_cross_entropy_is_probability_minus_label() -> None:
    gradient = jax.grad(lambda z: jnp.sum(ktg.cross_entropy(z, LABELS)))(Z0)
    np.testing.assert_allclose(gradient, P0 - [[1, 0], [1, 0]], atol=1e-6)


def test_kl_divergence_goes_from_sender_to_receiver() -> None:
    np.testing.assert_allclose(ktg.kl_divergence(Z0, Z1), KL_OF_0_FROM_1, rtol=1e-5)
    np.testing.assert_allclose(ktg.kl_divergence(Z1, Z0), KL_OF_1_FROM_0, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
def test_kl_divergence_softens_by_t_and_is_multiplied_by_t_squared(temperature: float) -> None:
    losses = ktg.kl_divergence(temperature * Z0, temperature * Z1, temperature)
    np.testing.assert_allclose(losses, temperature**2 * KL_OF_0_FROM_1, rtol=1e-5)


def test_the_receivers_gradient_is_t_times_the_difference_of_probabilities() -> None:
    def loss(receiver: jax.Array) -> jax.Array:
        return jnp.sum(ktg.kl_divergence(receiver, 2 * Z1, 2.0))

    np.testing.assert_allclose(jax.grad(loss)(2 * Z0), 2 * (P0 - P1), atol=1e-6)


def test_the_sender_has_a_gradient_only_when_it_is_not_stopped() -> None:
    def loss(sender: jax.Array, stop: bool) -> jax.Array:
        return jnp.sum(ktg.kl_divergence(Z0, sender, stop_sender_gradient=stop))

    np.testing.assert_array_equal(jax.grad(loss)(Z1, True), np.zeros((2, 2)))
    # d KL / d z_s = p_s (log(p_s / p_t) - KL)
    expected = P1 * (np.log(P1 / P0) - KL_OF_0_FROM_1[:, None])
    np.testing.assert_allclose(jax.grad(loss)(Z1, False), expected, atol=1e-6)


def test_the_receivers_gradient_does_not_depend_on_stopping_the_sender() -> None:
    def loss(receiver: jax.Array, stop: bool) -> jax.Array:
        return jnp.sum(ktg.kl_divergence(receiver, Z1, 2.0, stop_sender_gradient=stop))

    np.testing.assert_array_equal(jax.grad(loss)(Z0, True), jax.grad(loss)(Z0, False))


@pytest.mark.parametrize("edge_losses", [ktg.edge_losses, EDGE_LOSSES], ids=["eager", "jit"])
@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_edge_losses_are_as_worked_out_by_hand(
    edge_losses: Callable[..., jax.Array], progress: float
) -> None:
    def losses(*rows: Sequence[str]) -> np.ndarray:
        return np.asarray(edge_losses(LOGITS, LABELS, codes(*rows), progress))

    through = [
        [CE[0].mean(), KL_OF_0_FROM_1.mean()],
        [KL_OF_1_FROM_0.mean(), CE[1].mean()],
    ]
    # Divided by the batch's 2 samples, not by the 1 that the sender has right.
    correct = [[CE[0].mean(), KL_OF_0_FROM_1[1] / 2], [KL_OF_1_FROM_0[0] / 2, CE[1].mean()]]
    expected: dict[str, Any] = {
        "through": through,
        "cutoff": np.zeros((2, 2)),
        "linear": progress * np.array(through),
        "correct": correct,
        "negative_linear": (1 - progress) * np.array(through),
    }
    for gate, value in expected.items():
        result = losses([gate] * 2, [gate] * 2)
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, value, rtol=1e-5, atol=1e-7, err_msg=gate)


def test_temperature_acts_on_transfer_edges_alone() -> None:
    losses = EDGE_LOSSES(LOGITS, LABELS, all_through(2), 1.0, 3.0)
    np.testing.assert_allclose(np.diag(losses), CE.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(losses[0, 1], ktg.kl_divergence(Z0, Z1, 3.0).mean(), rtol=1e-6)
    assert losses[0, 1] != pytest.approx(KL_OF_0_FROM_1.mean(), rel=1e-2)


def test_a_nodes_loss_is_its_row_and_the_graphs_loss_is_everything() -> None:
    gates = codes(["through", "correct"], ["linear", "negative_linear"])
    args = (LOGITS, LABELS, gates, 0.3, 2.0)
    edges = np.asarray(EDGE_LOSSES(*args))
    np.testing.assert_allclose(ktg.node_losses(*args), edges.sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(ktg.graph_loss(*args), edges.sum(), rtol=1e-6)


@pytest.mark.parametrize("num_nodes", range(1, 8))
def test_values_and_gradients_equal_the_authors(num_nodes: int) -> None:
    reference = pytest.importorskip("torch_reference")
    torch = reference.torch
    losses_of = jax.jit(ktg.node_losses)
    for seed, temperature in itertools.product(range(4), (1.0, 2.0, 4.0)):
        rng = np.random.default_rng([num_nodes, seed])
        logits = 2 * rng.standard_normal((num_nodes, 6, 4)).astype(np.float32)
        labels = rng.integers(4, size=6)
        gates = rng.integers(len(ktg.GATES), size=(num_nodes, num_nodes))
        progress = float(rng.uniform())

        theirs = [torch.tensor(z, requires_grad=True) for z in logits]
        losses = [
            reference.node_loss(
                theirs, torch.tensor(labels), t, [ktg.GATES[g] for g in row], progress, temperature
            )
            for t, row in enumerate(gates)
        ]
        torch.stack(losses).sum().backward()
        gradients = [np.zeros((6, 4)) if z.grad is None else z.grad.numpy() for z in theirs]

        args = (logits, labels, gates, progress, temperature)
        np.testing.assert_allclose(
            losses_of(*args), [loss.item() for loss in losses], rtol=1e-5, atol=1e-5
        )
        np.testing.assert_allclose(GRADIENTS(*args), gradients, rtol=1e-5, atol=1e-5)


def test_the_graphs_gradient_is_each_nodes_own() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 5, 4)).astype(np.float32)
    labels = rng.integers(4, size=5)
    gates = codes(
        ["through", "correct", "linear"],
        ["negative_linear", "cutoff", "through"],
        ["through", "through", "correct"],
    )
    args = (labels, gates, 0.4, 2.0)
    of_graph = GRADIENTS(logits, *args)
    jacobian = jax.jit(jax.jacrev(ktg.node_losses))(logits, *args)  # [loss of t, logits of s, B, C]
    for t, s in itertools.product(range(3), repeat=2):
        if t == s:
            assert np.abs(jacobian[t, s]).max() > 1e-3
            np.testing.assert_allclose(of_graph[t], jacobian[t, t], atol=1e-7)
        else:
            np.testing.assert_array_equal(jacobian[t, s], np.zeros((5, 4)))


HUGE = [
    [1e4, 0.0, 0.0],
    [-1e4, 0.0, 0.0],
    [1e4, -1e4, -1e4],
    [-1e4, 1e4, 1e4],
    [-1e4, -1e4, 1e4],
    [0.0, 0.0, 0.0],
]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_huge_logits_give_finite_values_and_gradients(temperature: float) -> None:
    pairs = np.array(list(itertools.product(HUGE, repeat=2)), np.float32)
    logits = jnp.asarray(pairs.transpose(1, 0, 2))  # every case as receiver and as sender
    labels = np.arange(len(pairs)) % 3
    evaluate = jax.jit(
        lambda gates: (
            EDGE_LOSSES(logits, labels, gates, 0.5, temperature),
            jax.grad(ktg.graph_loss)(logits, labels, gates, 0.5, temperature),
        )
    )
    for gate in ktg.GATES:
        chex.assert_tree_all_finite(evaluate(codes([gate] * 2, [gate] * 2)))

    def unstopped(receiver: jax.Array, sender: jax.Array) -> jax.Array:
        return jnp.sum(ktg.kl_divergence(receiver, sender, temperature, stop_sender_gradient=False))

    chex.assert_tree_all_finite(jax.grad(unstopped, argnums=(0, 1))(*logits))


def test_one_hot_predictions_that_contradict_each_other_have_the_exact_loss() -> None:
    receiver, sender = jnp.array([[-1e4, 1e4]]), jnp.array([[1e4, -1e4]])
    loss, gradient = jax.value_and_grad(lambda z: ktg.kl_divergence(z, sender)[0])(receiver)
    assert loss == 2e4  # the authors' 1e-10 would stop it at 23
    np.testing.assert_array_equal(gradient, [[-1.0, 1.0]])


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_cut_edge_from_a_diverged_node_is_as_good_as_none(broken: float) -> None:
    value_and_gradient = jax.jit(
        lambda logits, gates: (
            ktg.node_losses(logits, LABELS, gates, 0.5, 2.0)[0],
            jax.grad(ktg.graph_loss)(logits, LABELS, gates, 0.5, 2.0)[0],
        )
    )
    diverged = np.stack([Z0, np.full_like(Z0, broken)])
    gates = codes(["through", "cutoff"], ["through", "through"])
    alone = value_and_gradient(Z0[None], codes(["through"]))
    chex.assert_tree_all_finite(alone)
    chex.assert_trees_all_equal(value_and_gradient(diverged, gates), alone)


def test_a_diverged_node_behind_a_cut_does_not_disturb_the_other_edges() -> None:
    gates = codes(["through", "correct", "cutoff"], ["cutoff"] * 3, ["cutoff"] * 3)
    gradients_of = jax.jit(lambda logits: jax.grad(ktg.graph_loss)(logits, LABELS, gates, 0.5)[0])
    expected = gradients_of(np.stack([Z0, Z1, Z1]))
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(gradients_of(np.stack([Z0, Z1, Z1 * np.nan])), expected)


def test_a_node_with_cut_gates_alone_has_no_loss_and_no_gradient() -> None:
    gates = codes(["through", "through"], ["cutoff", "cutoff"])
    assert ktg.node_losses(LOGITS, LABELS, gates, 0.5)[1] == 0
    gradient = GRADIENTS(LOGITS, LABELS, gates, 0.5)
    np.testing.assert_array_equal(gradient[1], np.zeros((2, 2)))
    assert np.abs(gradient[0]).max() > 0.1


def test_a_code_that_is_no_gate_makes_its_nodes_loss_nan() -> None:
    losses = ktg.node_losses(LOGITS, LABELS, np.array([[0, 7], [0, 0]]), 0.5)
    assert np.isnan(losses[0])
    assert np.isfinite(losses[1])


@pytest.mark.parametrize("make", [list, tuple, np.stack, jnp.stack])
def test_a_sequence_of_logits_is_as_good_as_a_stack(make: type) -> None:
    losses = EDGE_LOSSES(make([Z0, Z1]), LABELS, all_through(2), 1.0)
    np.testing.assert_array_equal(losses, EDGE_LOSSES(LOGITS, LABELS, all_through(2), 1.0))


def test_bfloat16_logits_are_accepted_and_losses_computed_in_float32() -> None:
    coarse = [jnp.asarray(z, jnp.bfloat16) for z in LOGITS]
    fine = [z.astype(jnp.float32) for z in coarse]
    args = (LABELS, all_through(2), 1.0, 2.0)
    losses = EDGE_LOSSES(coarse, *args)
    chex.assert_type(losses, jnp.float32)
    np.testing.assert_array_equal(losses, EDGE_LOSSES(fine, *args))
    gradients = GRADIENTS(coarse, *args)
    chex.assert_type(gradients, jnp.bfloat16)
    expected = GRADIENTS(fine, *args)
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x.astype(jnp.float32), gradients), expected, rtol=1e-2
    )


def test_nodes_of_different_dtypes_get_gradients_in_their_own() -> None:
    mixed = [jnp.asarray(Z0, jnp.bfloat16), jnp.asarray(Z1)]
    gradients = GRADIENTS(mixed, LABELS, all_through(2), 1.0)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize(
    ("logits", "labels", "gates"),
    [
        (LOGITS, LABELS, all_through(3)),
        (LOGITS[0], LABELS, all_through(2)),
        (LOGITS, LABELS[:, None], all_through(2)),
        (LOGITS, LABELS.astype(np.float32), all_through(2)),
    ],
    ids=["gates of three nodes", "logits of one node", "labels of rank 2", "float labels"],
)
def test_wrong_shapes_and_types_are_refused(
    logits: jax.Array, labels: np.ndarray, gates: np.ndarray
) -> None:
    with pytest.raises(AssertionError):
        EDGE_LOSSES(logits, labels, gates, 0.5)
