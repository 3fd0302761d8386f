"""The sparse recoding penalty: closed forms, and where its forms agree."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ktg_jax as ktg
from ktg_jax.errors import InputError
from ktg_jax.priors import (
    dead_zone_loss,
    l1_recoding,
    recoding_threshold,
    soft_threshold,
)

RNG = np.random.default_rng(0)
TREE = {
    "kernel": jnp.asarray(RNG.standard_normal((3, 3, 4, 5)), jnp.float32),
    "bias": jnp.asarray(100 * RNG.standard_normal(20), jnp.float32),
}


def recoded(tree: Any, quantile: Any) -> Any:
    penalty = ktg.sparse_recoding(quantile)
    return jax.jit(penalty.update)(tree, penalty.init(tree))[0]


def test_soft_thresholding_by_hand() -> None:
    # Magnitudes 1 2 3 4 5; the quantile 0.4 cuts off two of them, at tau = 2.
    gradient = jnp.array([-5.0, 1.0, 3.0, -2.0, 4.0])
    assert recoded(gradient, 0.4).tolist() == [-3.0, 0.0, 1.0, 0.0, 2.0]


def test_quantile_0_is_the_identity() -> None:
    for leaf, kept in zip(jax.tree.leaves(TREE), jax.tree.leaves(recoded(TREE, 0)), strict=True):
        np.testing.assert_array_equal(kept, leaf)
        assert recoding_threshold(leaf, 0.0) == 0


def test_quantile_1_gives_zeros() -> None:
    for kept in jax.tree.leaves(recoded(TREE, 1.0)):
        np.testing.assert_array_equal(kept, np.zeros(kept.shape))


@pytest.mark.parametrize("quantile", [0.05, 0.1, 0.29, 0.5, 0.7, 0.9, 0.95])
def test_a_share_of_the_entries_is_kept_with_signs_and_order(quantile: float) -> None:
    for leaf, kept in zip(
        jax.tree.leaves(TREE), jax.tree.leaves(recoded(TREE, quantile)), strict=True
    ):
        before, after = np.ravel(leaf), np.ravel(kept)
        survives = after != 0
        assert survives.sum() == leaf.size - round(quantile * leaf.size)
        np.testing.assert_array_equal(np.sign(after[survives]), np.sign(before[survives]))
        assert np.abs(before[survives]).min() > np.abs(before[~survives]).max()
        np.testing.assert_array_equal(
            np.argsort(np.abs(after[survives])), np.argsort(np.abs(before[survives]))
        )
        tau = np.abs(before[~survives]).max()
        np.testing.assert_allclose(np.abs(after[survives]), np.abs(before[survives]) - tau)


def test_leaves_have_thresholds_of_their_own() -> None:
    scaled = {"kernel": TREE["kernel"], "bias": 1000 * TREE["bias"]}
    np.testing.assert_array_equal(
        recoded(scaled, 0.5)["kernel"], recoded({"kernel": TREE["kernel"]}, 0.5)["kernel"]
    )


def test_entries_that_tie_with_the_threshold_go_together() -> None:
    assert recoded(jnp.array([2.0, -2.0, 2.0, 3.0]), 0.25).tolist() == [0.0, 0.0, 0.0, 1.0]
    assert recoded(jnp.full(7, -3.0), 0.5).tolist() == [0.0] * 7


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (2, 2)])
def test_zeros_stay_zeros_in_any_shape(shape: tuple[int, ...], quantile: float) -> None:
    kept = recoded({"leaf": jnp.zeros(shape)}, quantile)["leaf"]
    assert kept.shape == shape
    np.testing.assert_array_equal(kept, np.zeros(shape))


def test_a_scalar_is_kept_whole_or_not_at_all() -> None:
    kept = [float(recoded(jnp.array(-3.0), q)) for q in (0.0, 0.3, 0.7, 1.0)]
    assert kept == [-3.0, -3.0, 0.0, 0.0]


def test_masked_leaves_structure_and_dtypes_stay() -> None:
    tree = {"a": jnp.array([1.0, -4.0], jnp.bfloat16), "none": None, "masked": optax.MaskedNode()}
    kept = recoded(tree, 0.5)
    chex.assert_trees_all_equal_structs(kept, tree)
    assert kept["a"].dtype == jnp.bfloat16
    assert kept["a"].tolist() == [0.0, -3.0]


def test_it_composes_with_other_transformations() -> None:
    chain = optax.chain(ktg.sparse_recoding(0.5), optax.sgd(2.0))
    weight = jnp.array([1.0, 1.0])
    updates, _ = chain.update(jnp.array([1.0, -3.0]), chain.init(weight), weight)
    assert updates.tolist() == [0.0, 4.0]


def test_what_is_not_finite_does_not_become_finite() -> None:
    assert np.isnan(recoded(jnp.array([jnp.nan, 1.0, 2.0, 3.0]), 0.5)[0])
    assert recoded(jnp.array([jnp.inf, 1.0, 2.0, 3.0]), 0.5)[0] == jnp.inf


@pytest.mark.parametrize(
    "quantile", [-0.1, 1.0001, float("nan"), float("inf"), "0.5", None, True, [0.5]]
)
def test_a_quantile_outside_0_to_1_is_refused(quantile: Any) -> None:
    with pytest.raises(InputError, match=r"^quantile: got .*; allowed: a number from 0 to 1$"):
        ktg.sparse_recoding(quantile)


def test_numpys_numbers_are_quantiles() -> None:
    assert recoded(jnp.array([1.0, 3.0]), np.float32(0.5)).tolist() == [0.0, 2.0]


# --- the loss form


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9, 1.0])
def test_the_dead_zone_losss_gradient_is_the_soft_thresholded_residual(quantile: float) -> None:
    residual = TREE["kernel"]

    def loss(r: jax.Array) -> jax.Array:
        return jnp.sum(dead_zone_loss(r, recoding_threshold(r, quantile)))

    def quadratic(r: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum(jnp.square(r))

    expected = recoded(jax.grad(quadratic)(residual), quantile)
    np.testing.assert_allclose(jax.grad(loss)(residual), expected, rtol=1e-6, atol=1e-7)


def test_the_forms_differ_by_the_derivative_of_what_the_residual_is_made_of() -> None:
    # r = (w1, 3 w2) at w = (2, 1): residuals (2, 3), gradient of the quadratic (2, 9).
    scale, weight = jnp.array([1.0, 3.0]), jnp.array([2.0, 1.0])

    def loss(w: jax.Array) -> jax.Array:
        return jnp.sum(dead_zone_loss(w * scale, recoding_threshold(w * scale, 0.5)))

    assert jax.grad(loss)(weight).tolist() == [0.0, 3.0]  # (3 - 2) x 3
    assert recoded(jnp.array([2.0, 9.0]), 0.5).tolist() == [0.0, 7.0]


def test_the_dead_zone_is_flat_and_the_loss_is_finite_everywhere() -> None:
    residual = jnp.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    assert dead_zone_loss(residual, 1.0).tolist() == [0.0] * 5
    assert jax.grad(lambda r: jnp.sum(dead_zone_loss(r, 1.0)))(residual).tolist() == [0.0] * 5
    assert dead_zone_loss(jnp.array([3.0, -4.0]), 1.0).tolist() == [2.0, 4.5]


# --- the L1 alternative


def test_recoding_coefficients_minimise_the_l1_objective() -> None:
    kernel, prior = RNG.standard_normal((2, 3, 3, 2, 6)).astype(np.float32)
    alpha = np.asarray(l1_recoding(kernel, prior, 1.5))
    assert 0 < (alpha == 0).sum() < 6

    def objective(a: np.ndarray) -> np.ndarray:
        squares = np.sum(np.square(kernel - a * prior), axis=(0, 1, 2))
        return 0.5 * squares + 1.5 * np.abs(a)

    best = objective(alpha)
    for shift in (-0.5, -0.01, 0.01, 0.5):
        assert (objective(alpha + shift) >= best - 1e-5).all()


def test_more_proximal_steps_do_not_move_the_coefficients() -> None:
    kernel, prior = (jnp.asarray(a, jnp.float32) for a in RNG.standard_normal((2, 9, 4)))
    square = jnp.sum(jnp.square(prior), 0)
    alpha = l1_recoding(kernel, prior, 0.3)
    for _ in range(3):
        gradient = jnp.sum((alpha * prior - kernel) * prior, 0)
        alpha = soft_threshold(alpha - gradient / square, 0.3 / square)
    np.testing.assert_allclose(alpha, l1_recoding(kernel, prior, 0.3), atol=1e-5)


def test_without_a_penalty_a_multiple_is_found_and_zero_filters_have_none() -> None:
    prior = jnp.asarray(RNG.standard_normal((9, 3)), jnp.float32).at[:, 1].set(0.0)
    alpha = l1_recoding(prior * jnp.array([2.0, 5.0, -0.5]), prior, 0.0)
    np.testing.assert_allclose(alpha, [2.0, 0.0, -0.5], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_threshold_is_the_entry_that_sorting_finds(dtype: str) -> None:
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal((3, 3, 7, 5)),
        np.round(rng.standard_normal(50)),  # with ties, and zeros of both signs
        np.array([0.0, -0.0, 1e-40, -1e-38, 65000.0, np.inf, -np.inf]),
        np.array([np.nan, 2.0, -1.0]),
        np.zeros(4),
    ]
    threshold = jax.jit(recoding_threshold, static_argnums=1)
    for given in arrays:
        array = jnp.asarray(given, dtype)
        ordered = jnp.sort(jnp.abs(array), axis=None)
        for k in range(1, array.size + 1, max(array.size // 9, 1)):
            found = threshold(array, k / array.size)
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(float(found), float(ordered[k - 1]))
