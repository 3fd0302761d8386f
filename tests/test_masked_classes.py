"""Logits of -inf, which exclude a class: what is finite is right, what is not is said."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ktg_jax as ktg
from ktg_jax.training.evaluation import eval_sums

INF = np.inf
A, B = [1, -INF, 2], [0.5, -INF, 0.1]
RECEIVER, SENDER = np.array([A, B], np.float32), np.array([B, A], np.float32)
# With e = exp(1) and f = exp(0.4) the rows of the receiver are (1, 0, e) / (1 + e) and
# (f, 0, 1) / (f + 1); those of the sender are the same, swapped.
PA = np.array([1, 0, np.e]) / (1 + np.e)
PB = np.array([np.exp(0.4), 0, 1]) / (1 + np.exp(0.4))
KL = [
    PB[0] * np.log(PB[0] / PA[0]) + PB[2] * np.log(PB[2] / PA[2]),  # 0.238409
    PA[0] * np.log(PA[0] / PB[0]) + PA[2] * np.log(PA[2] / PB[2]),  # 0.223236
]
MODES = pytest.mark.parametrize("how", [lambda f: f, jax.jit], ids=["eager", "jit"])


def total(receiver: Any, sender: Any, temperature: float = 1.0, stop: bool = True) -> jax.Array:
    losses = ktg.kl_divergence(receiver, sender, temperature, stop_sender_gradient=stop)
    return jnp.sum(losses)


def codes(*rows: str) -> np.ndarray:
    """Gates by their initials, but r is `correct`."""
    return np.array([["tclrn".index(gate) for gate in row] for row in rows], np.int32)


# --- divergence


@pytest.mark.slow
@MODES
def test_a_class_that_both_exclude_adds_nothing(how: Callable[..., Any]) -> None:
    losses = how(ktg.kl_divergence)(RECEIVER, SENDER)
    np.testing.assert_allclose(losses, KL, rtol=1e-5)
    np.testing.assert_allclose(losses, [0.238409, 0.223236], atol=1e-6)
    gradient = how(jax.grad(total))(RECEIVER, SENDER)
    np.testing.assert_allclose(gradient, [PA - PB, PB - PA], atol=1e-6)
    assert np.array_equal(gradient[:, 1], [0, 0])


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_temperature_softens_what_is_left(temperature: float) -> None:
    losses = ktg.kl_divergence(temperature * RECEIVER, temperature * SENDER, temperature)
    np.testing.assert_allclose(losses, temperature**2 * np.array(KL), rtol=1e-5)
    gradient = jax.grad(total)(temperature * RECEIVER, temperature * SENDER, temperature)
    np.testing.assert_allclose(gradient, temperature * np.array([PA - PB, PB - PA]), atol=1e-5)


def test_a_class_that_the_sender_alone_excludes_adds_nothing() -> None:
    receiver = np.zeros((1, 3), np.float32)
    loss, gradient = jax.value_and_grad(total)(receiver, SENDER[:1])
    assert loss == pytest.approx(np.log(3) + PB[0] * np.log(PB[0]) + PB[2] * np.log(PB[2]))
    np.testing.assert_allclose(gradient, [1 / 3 - PB], atol=1e-6)


def test_weight_on_a_class_that_the_receiver_excludes_is_infinitely_far() -> None:
    sender = np.zeros((2, 3), np.float32)
    assert ktg.kl_divergence(RECEIVER, sender).tolist() == [INF, INF]
    one_of_two = ktg.kl_divergence(RECEIVER, np.array([B, [0, 0, 0]], np.float32))
    np.testing.assert_allclose(one_of_two, [KL[0], INF], rtol=1e-5)
    # So little weight is none in float32.
    loss = ktg.kl_divergence(np.array([[0, -INF]], np.float32), np.array([[0, -1e9]], np.float32))
    assert loss.tolist() == [0]


def test_the_gradient_of_a_sender_that_is_not_stopped_is_finite_too() -> None:
    of_sender = jax.grad(total, argnums=1)
    for receiver in (RECEIVER, np.zeros((2, 3), np.float32)):
        gradient = of_sender(receiver, SENDER, 1.0, False)
        q = np.array([PB, PA])
        p = np.array([PA, PB]) if receiver is RECEIVER else np.full((2, 3), 1 / 3)
        # d KL / d z_s = p_s (log(p_s / p_t) - KL), which goes to 0 with p_s.
        ratio = np.log(np.where(q > 0, q, 1) / np.where(q > 0, p, 1))
        expected = q * (ratio - (q * ratio).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(gradient, expected, atol=1e-6)
    # An infinite loss has no gradient to the sender, and does not pretend to.
    assert not np.isfinite(of_sender(RECEIVER, np.zeros((2, 3), np.float32), 1.0, False)).any()


@pytest.mark.parametrize("row", [[np.nan, 0, 0], [INF, 0, 0], [-INF] * 3, [INF, -INF, 0]])
@pytest.mark.parametrize("side", ["receiver", "sender"])
def test_what_has_no_probabilities_is_nan_and_so_is_its_gradient(
    row: list[float], side: str
) -> None:
    broken, good = np.array([row, A], np.float32), np.array([[0, 1, 0], B], np.float32)
    pair = (broken, good) if side == "receiver" else (good, broken)
    losses = ktg.kl_divergence(*pair)
    gradient = jax.grad(total)(*pair)
    assert np.isnan(losses).tolist() == [True, False]
    assert np.isnan(gradient[0]).all()
    assert np.isfinite(gradient[1]).all()


def test_huge_logits_beside_excluded_classes_stay_finite() -> None:
    receiver = np.array([[1e30, -1e30, -INF]], np.float32)
    sender = np.array([[-1e30, 1e30, -INF]], np.float32)
    loss, gradient = jax.value_and_grad(total)(receiver, sender)
    np.testing.assert_allclose(loss, 2e30, rtol=1e-6)
    np.testing.assert_array_equal(gradient, [[1, -1, 0]])


# --- cross-entropy


@pytest.mark.slow
@MODES
def test_cross_entropy_is_that_of_the_classes_that_are_left(how: Callable[..., Any]) -> None:
    labels = np.array([2, 0])
    losses = how(ktg.cross_entropy)(RECEIVER, labels)
    np.testing.assert_allclose(losses, [-np.log(PA[2]), -np.log(PB[0])], rtol=1e-6)
    gradient = jax.grad(lambda z: jnp.sum(how(ktg.cross_entropy)(z, labels)))(RECEIVER)
    np.testing.assert_allclose(gradient, [PA - [0, 0, 1], PB - [1, 0, 0]], atol=1e-6)
    assert how(ktg.cross_entropy)(RECEIVER, np.array([1, 1])).tolist() == [INF, INF]
    assert np.isnan(how(ktg.cross_entropy)(np.full((1, 3), -INF, np.float32), np.array([1]))).all()


# --- graphs


def with_class(z: np.ndarray) -> np.ndarray:
    """The same networks with one class more, in the middle, that all of them exclude."""
    return np.insert(z, 2, -INF, axis=-1).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("gate", "tclrn")
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_graph_learns_as_if_the_class_were_not_there(gate: str, temperature: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 6, 4)).astype(np.float32)
    labels = rng.integers(4, size=6)
    moved = labels + (labels >= 2)  # past the new class
    evaluate = jax.jit(
        lambda z, labels: (
            ktg.edge_losses(z, labels, codes(*[gate * 3] * 3), 0.3, temperature),
            jax.grad(ktg.graph_loss)(z, labels, codes(*[gate * 3] * 3), 0.3, temperature),
        )
    )
    losses, gradient = evaluate(logits, labels)
    masked_losses, masked_gradient = evaluate(with_class(logits), moved)
    np.testing.assert_allclose(masked_losses, losses, rtol=1e-5, atol=1e-7)
    expected = np.insert(np.asarray(gradient), 2, 0, axis=-1)
    np.testing.assert_allclose(masked_gradient, expected, atol=1e-6)
    assert np.isfinite(masked_gradient).all()


def test_networks_behind_a_mask_of_their_own_get_finite_gradients() -> None:
    # The habit: logits pass through `where` before they meet.
    mask = np.array([True, False, True])
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((2, 4, 3)), jnp.float32)

    def loss_of(weights: jax.Array) -> jax.Array:
        logits = jnp.where(mask[None, None], weights, -jnp.inf)
        return ktg.graph_loss(logits, np.array([0, 2, 2, 0]), codes("tt", "rl"), 0.5, 2.0)

    gradient = jax.jit(jax.grad(loss_of))(weights)
    assert np.isfinite(gradient).all()
    assert np.array_equal(gradient[..., 1], np.zeros((2, 4)))
    assert np.abs(gradient[..., 0]).min() > 1e-3


WIDE = np.zeros((2, 3), np.float32)  # gives weight to what the receiver excludes


@pytest.mark.slow
@pytest.mark.parametrize(("gate", "progress"), [("c", 0.5), ("l", 0.0), ("n", 1.0)])
def test_a_gate_of_0_makes_nothing_of_an_infinite_loss(gate: str, progress: float) -> None:
    logits, labels, gates = np.stack([RECEIVER, WIDE]), np.array([2, 0]), codes("t" + gate, "ct")
    losses = ktg.edge_losses(logits, labels, gates, progress)
    assert losses[0].tolist() == [pytest.approx(-np.log(PA[2] * PB[0]) / 2), 0]
    gradient = jax.grad(ktg.graph_loss)(logits, labels, gates, progress)[0]
    np.testing.assert_allclose(gradient, [(PA - [0, 0, 1]) / 2, (PB - [1, 0, 0]) / 2], atol=1e-6)


def test_correct_makes_nothing_of_an_infinite_loss_where_the_sender_is_wrong() -> None:
    sender = np.array(
        [B, [1, 0, 0]], np.float32
    )  # on sample 1 weight on class 1, and class 0 ahead
    logits, gates = np.stack([RECEIVER, sender]), codes("cr", "ct")
    wrong, right = np.array([0, 2]), np.array([0, 0])
    losses = ktg.edge_losses(logits, wrong, gates, 0.5)
    np.testing.assert_allclose(losses[0], [0, KL[0] / 2], rtol=1e-5)
    gradient = jax.grad(ktg.graph_loss)(logits, wrong, gates, 0.5)[0]
    np.testing.assert_allclose(gradient, [(PA - PB) / 2, [0, 0, 0]], atol=1e-6)
    assert ktg.edge_losses(logits, right, gates, 0.5)[0, 1] == INF


@pytest.mark.slow
@pytest.mark.parametrize("row", ["tc", "lc", "rc"])
def test_a_cut_edge_from_a_network_with_other_classes_is_as_good_as_none(row: str) -> None:
    logits, labels = np.stack([RECEIVER, WIDE]), np.array([2, 0])
    alone = jax.grad(ktg.graph_loss)(logits[:1], labels, codes(row[0]), 0.5)
    both = jax.grad(ktg.graph_loss)(logits, labels, codes(row, "ct"), 0.5)
    np.testing.assert_array_equal(both[0], alone[0])


# --- evaluation


@pytest.mark.slow
def test_an_ensemble_excludes_what_one_of_it_excludes() -> None:
    logits = [RECEIVER, np.array([[0, 9, 1], [0, 9, 0]], np.float32)]
    sums = eval_sums([jnp.asarray(z) for z in logits], np.array([2, 0]))
    # The sums are (1, -inf, 3) and (0.5, -inf, 0.1): classes 2 and 0.
    assert sums["correct"].tolist() == [2, 0]
    assert sums["ensemble_correct"] == 2
    loss = np.log1p(np.exp(-2)) + np.log1p(np.exp(-0.4))
    assert sums["ensemble_loss"] == pytest.approx(loss, rel=1e-6)
    excluded = eval_sums([jnp.asarray(z) for z in logits], np.array([1, 0]))
    assert excluded["ensemble_loss"] == INF
    counted = eval_sums([jnp.asarray(z) for z in logits], np.array([1, 0]), np.array([False, True]))
    assert counted["ensemble_loss"] == pytest.approx(np.log1p(np.exp(-0.4)), rel=1e-6)


def test_the_divergence_never_makes_a_nan_that_it_does_not_return() -> None:
    with jax.debug_nans(True):
        for receiver, sender in itertools.product((RECEIVER, np.zeros_like(RECEIVER)), (SENDER,)):
            jax.grad(total)(receiver, sender)
            jax.grad(total, argnums=1)(receiver, sender, 1.0, False)
