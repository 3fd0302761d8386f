"""Batch normalisation with relu: native, in plain JAX, and in float64."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from native import require_onednn

from ktg_jax import Parallel
from ktg_jax.cpu import operations
from ktg_jax.cpu.convolution import formulation
from ktg_jax.cpu.normalization import batch_norm_relu, normalize_relu

EPSILON = 1e-5

Arrays = tuple[np.ndarray, ...]
Compute = Callable[..., tuple[jax.Array, ...]]


@pytest.fixture
def native() -> Iterator[None]:
    """Native operations are used."""
    require_onednn()
    with formulation("onednn"):
        yield


def inputs(*shape: int, mean: float = 0.0) -> Arrays:
    """x, scale, bias, the gradient of the result, and a shortcut."""
    rng = np.random.default_rng(0)
    x = mean + rng.standard_normal(shape)
    scale, bias = 1 + 0.3 * rng.standard_normal((2, shape[-1]))
    gradient, shortcut = rng.standard_normal((2, *shape))
    arrays = (x, scale, bias, gradient, shortcut)
    return tuple(array.astype(np.float32) for array in arrays)


def computation(axis_name: str | None = None, shift: Any = None) -> Compute:
    """A new function: result, mean, variance, and the gradients to all that is given."""

    def compute(x: Any, scale: Any, bias: Any, gradient: Any, *shortcut: Any) -> Any:
        def normalized(*given: jax.Array) -> Any:
            return batch_norm_relu(*given, shift=shift, epsilon=EPSILON, axis_name=axis_name)

        y, pullback, moments = jax.vjp(normalized, x, scale, bias, *shortcut, has_aux=True)
        return y, *moments, *pullback(gradient)

    return compute


def reference(x: Any, scale: Any, bias: Any, gradient: Any, *shortcut: Any) -> Arrays:
    """The same in float64, step by step."""
    x, scale, bias, gradient = (a.astype(np.float64) for a in (x, scale, bias, gradient))
    axes = tuple(range(x.ndim - 1))
    mean, variance = x.mean(axes), x.var(axes)
    deviation = np.sqrt(variance + EPSILON)
    normal = (x - mean) / deviation
    y = normal * scale + bias + sum(shortcut)
    before = np.where(y > 0, gradient, 0)
    to_normal = before * scale
    through_moments = to_normal.mean(axes) + normal * (to_normal * normal).mean(axes)
    to_x = (to_normal - through_moments) / deviation
    to_shortcut = [before] if shortcut else []
    to_scale, to_bias = (before * normal).sum(axes), before.sum(axes)
    return np.maximum(y, 0), mean, variance, to_x, to_scale, to_bias, *to_shortcut


def assert_close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    """Each array's largest difference is that small beside its largest value."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error <= tolerance, f"array {i} is off by {error}"


# Several chunks of rows and a smaller one; fewer rows than a chunk; several vectors of channels.
SHAPES = [(9, 8, 8, 16), (4, 3, 3, 64), (5, 1, 1, 32), (3, 6, 6, 160), (8, 16)]


@pytest.mark.slow
@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_native_plain_and_float64_agree(
    shape: tuple[int, ...], with_shortcut: bool, native: None
) -> None:
    given = inputs(*shape)[: 5 if with_shortcut else 4]
    ours = jax.jit(computation())(*given)
    with formulation("xla"):
        plain = jax.jit(computation())(*given)
    expected = reference(*given)
    assert len(expected) == (7 if with_shortcut else 6)
    assert_close(ours, plain)
    assert_close(ours, expected)
    assert_close(plain, expected)


@pytest.mark.parametrize("name", ["onednn", "xla"])
def test_a_small_batch_by_hand(name: str) -> None:
    if name == "onednn":
        require_onednn()
    # Each channel has the values 1, 3, 5, 7: mean 4, variance 5.
    x = jnp.repeat(jnp.array([[1.0], [3.0], [5.0], [7.0]]), 16, axis=1)
    shortcut = jnp.repeat(jnp.array([[0.0], [2.0], [-2.0], [1.0]]), 16, axis=1)
    with formulation(name):
        scale, bias = jnp.full(16, np.sqrt(5.0)), jnp.full(16, 0.5)
        y, (mean, variance) = batch_norm_relu(x, scale, bias, shortcut, epsilon=0)
    # Normalised and scaled -3, -1, 1, 3; with bias and shortcut -2.5, 1.5, -0.5, 4.5.
    np.testing.assert_allclose(y, np.array([[0, 1.5, 0, 4.5]]).T * np.ones(16), atol=1e-6)
    np.testing.assert_allclose(mean, [4.0] * 16)
    np.testing.assert_allclose(variance, [5.0] * 16)


def of_large_mean() -> Arrays:
    """Values around 1000; behind a large bias, so that rounding switches no relu."""
    x, scale, bias, gradient, _ = inputs(8, 16, 16, 16, mean=1000.0)
    return x, scale, bias + 10, gradient


def test_a_large_mean_costs_no_precision(native: None) -> None:
    given = of_large_mean()
    expected = reference(*given)
    ours = jax.jit(computation())(*given)
    assert_close(ours, expected, 2e-4)
    np.testing.assert_allclose(ours[2], expected[2], rtol=1e-5)  # the variance, near 1


def test_a_good_shift_makes_one_pass_exact() -> None:
    given = of_large_mean()
    expected = reference(*given)
    with formulation("xla"):
        ours = jax.jit(computation(shift=jnp.full(16, 1000.5)))(*given)
        unshifted = jax.jit(computation())(*given)
    assert_close(ours, expected, 2e-4)
    np.testing.assert_allclose(ours[2], expected[2], rtol=1e-5)
    # The test can fail: squares of 1000 have no digits left for a variance of 1.
    assert np.abs(unshifted[2] - expected[2]).max() > 1e-3


def test_the_shift_changes_nothing_else() -> None:
    given = inputs(4, 6, 6, 12)
    with formulation("xla"):
        shifted = jax.jit(computation(shift=jnp.linspace(-0.5, 0.5, 12)))(*given)
        assert_close(shifted, jax.jit(computation())(*given))


def test_moments_carry_no_gradient(native: None) -> None:
    x, scale, bias, *_ = map(jnp.asarray, inputs(4, 16))

    def of_moments(x: jax.Array) -> jax.Array:
        mean, variance = batch_norm_relu(x, scale, bias)[1]
        return jnp.sum(mean + variance)

    for name in ("onednn", "xla"):
        with formulation(name):
            np.testing.assert_array_equal(jax.grad(lambda x: of_moments(x))(x), np.zeros((4, 16)))


@pytest.mark.parametrize("channels", [1, 8, 12, 24, 16])
def test_channels_that_fill_no_vector_take_the_plain_way(
    channels: int, native: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    moments = operations.moments

    def counted(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        calls.append(x.shape)
        return moments(x)

    monkeypatch.setattr(operations, "moments", counted)
    given = inputs(4, 5, 5, channels)
    assert_close(jax.jit(computation())(*given), reference(*given))
    assert calls == ([(4, 5, 5, 16)] if channels == 16 else [])


def test_mixed_precision_takes_the_plain_way(native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(operations, "moments")
    x, scale, bias, _, shortcut = map(jnp.asarray, inputs(4, 5, 5, 16))
    low = x.astype(jnp.bfloat16), scale, bias, shortcut.astype(jnp.bfloat16)
    y, moments = batch_norm_relu(*low, dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    assert [m.dtype for m in moments] == [jnp.float32] * 2
    batch_norm_relu(x, scale, bias, shortcut.astype(jnp.bfloat16))


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_moments_and_gradients_do_not_depend_on_the_parts(
    parts: int, native: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(9, 8, 8, 16)
    expected = jax.jit(computation())(*given)
    monkeypatch.setattr(operations, "parts", lambda: parts)
    compute = jax.jit(computation())
    for _ in range(3):
        for a, b in zip(compute(*given), expected, strict=True):
            np.testing.assert_array_equal(a, b)


# --- over several devices


@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("name", ["onednn", "xla"])
def test_a_batch_spread_by_the_compiler_is_normalised_as_a_whole(
    name: str, with_shortcut: bool
) -> None:
    if name == "onednn":
        require_onednn()
    given = inputs(6, 5, 5, 16)[: 5 if with_shortcut else 4]
    parallel = Parallel("jit", jax.local_devices()[:2])
    split = NamedSharding(parallel.mesh, PartitionSpec("data"))
    x, scale, bias, *rest = given
    with formulation(name):
        found = jax.jit(computation())(
            jax.device_put(x, split),
            *parallel.replicate((scale, bias)),
            *(jax.device_put(array, split) for array in rest),
        )
    assert_close(found, reference(*given))
    assert found[0].sharding.shard_shape(x.shape)[0] == 3
    for i in (1, 2, 4, 5):
        first, second = found[i].addressable_shards
        np.testing.assert_array_equal(first.data, second.data)


@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("name", ["onednn", "xla"])
def test_a_batch_spread_by_pmap_is_normalised_as_a_whole(name: str, with_shortcut: bool) -> None:
    if name == "onednn":
        require_onednn()
    given = inputs(6, 5, 5, 16)[: 5 if with_shortcut else 4]
    x, scale, bias, *rest = given

    def halves(array: np.ndarray) -> np.ndarray:
        return array.reshape(2, 3, *array.shape[1:])

    with formulation(name):
        mapped = jax.pmap(
            computation(axis_name="data"),
            axis_name="data",
            in_axes=(0, None, None, *(0 for _ in rest)),
            devices=jax.local_devices()[:2],
        )
        found = mapped(halves(x), scale, bias, *map(halves, rest))
    y, mean, variance, to_x, to_scale, to_bias, *to_shortcut = map(np.asarray, found)
    for moment in (mean, variance):
        np.testing.assert_array_equal(moment[0], moment[1])
    whole = (
        *(y.reshape(x.shape), mean[0], variance[0], to_x.reshape(x.shape)),
        # Of each device's own loss: the caller adds them up.
        *(to_scale.sum(0), to_bias.sum(0)),
        *(gradient.reshape(x.shape) for gradient in to_shortcut),
    )
    assert_close(whole, reference(*given))


def test_given_moments_are_used_as_they_are() -> None:
    x, scale, bias, _, shortcut = inputs(4, 5, 5, 16)
    moments = jnp.linspace(-1, 1, 16), jnp.linspace(0.5, 2, 16)
    y = normalize_relu(
        jnp.asarray(x), jnp.asarray(scale), jnp.asarray(bias), moments, jnp.asarray(shortcut)
    )
    mean, variance = map(np.asarray, moments)
    expected = (x - mean) / np.sqrt(variance + 1e-5) * scale + bias + shortcut
    assert_close([y], [np.maximum(expected, 0)])
