"""The native operations as JAX functions: plain calls, without gradients of their own.

Images are float32 `[B, H, W, C]`, kernels float32 `[h, w, in, out]`. The same inputs give the same
bits on every run with as many `parts`. Under a device mesh the batch axis is split over the devices
and sums over the batch are put together.
"""

import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from ktg_jax.cpu.build import load

LANES = 16
"""Channels of `moments` and the normalisation must be multiples of this."""

_MAX_PARTS = 8
_TARGETS = (
    "KtgConvolution",
    "KtgConvolutionInputGradient",
    "KtgConvolutionWeightGradient",
    "KtgMoments",
    "KtgNormalize",
    "KtgNormalizeGradientSums",
    "KtgNormalizeInputGradient",
)

Combine = Callable[[tuple[jax.Array, ...], Any], tuple[jax.Array, ...]]


@functools.cache
def register() -> None:
    """Loads the library and makes its operations known to JAX.

    Raises:
        BuildError: it cannot be built or loaded.
    """
    library = load()
    for target in _TARGETS:
        handler = jax.ffi.pycapsule(getattr(library, target))
        jax.ffi.register_ffi_target(target, handler, platform="cpu")


def parts() -> int:
    """Into how many parts an operation is split: the cores that each of the CPU devices has."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    return min(max(cores // jax.local_device_count("cpu"), 1), _MAX_PARTS)


def convolution(images: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """A convolution with the same stride and padding along both axes.

    Args:
        images: float32 `[B, H, W, in]`.
        kernel: float32 `[h, w, in, out]`.
        stride: the step of the kernel, in pixels.
        padding: zeros on each side, in pixels.

    Returns:
        float32 `[B, H', W', out]`, with H' = (H + 2 padding - h) // stride + 1, and W' likewise.
    """
    size = [
        (extent + 2 * padding - side) // stride + 1
        for extent, side in zip(images.shape[1:3], kernel.shape[:2], strict=True)
    ]
    shape = (images.shape[0], *size, kernel.shape[3])
    return _convolve("KtgConvolution", shape, (images, kernel), "br", "b", stride, padding)


def convolution_input_gradient(
    gradient: jax.Array, kernel: jax.Array, shape: Sequence[int], stride: int, padding: int
) -> jax.Array:
    """The gradient of a convolution with respect to its images.

    Args:
        gradient: float32 `[B, H', W', out]`, with respect to its result.
        kernel: float32 `[h, w, in, out]`.
        shape: `(B, H, W, in)`, of the images.
        stride: as of the convolution.
        padding: as of the convolution.

    Returns:
        float32 `[B, H, W, in]`.
    """
    operands = (gradient, kernel)
    return _convolve("KtgConvolutionInputGradient", shape, operands, "br", "b", stride, padding)


def convolution_weight_gradient(
    images: jax.Array, gradient: jax.Array, shape: Sequence[int], stride: int, padding: int
) -> jax.Array:
    """The gradient of a convolution with respect to its kernel, a sum over the batch.

    Args:
        images: float32 `[B, H, W, in]`.
        gradient: float32 `[B, H', W', out]`, with respect to its result.
        shape: `(h, w, in, out)`, of the kernel.
        stride: as of the convolution.
        padding: as of the convolution.

    Returns:
        float32 `[h, w, in, out]`.
    """
    operands = (images, gradient)
    return _convolve("KtgConvolutionWeightGradient", shape, operands, "bb", "s", stride, padding)


def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance over all axes but the last.

    Args:
        x: float32 `[B, H, W, C]`, C a multiple of `LANES`.

    Returns:
        Two float32 `[C]`.
    """
    channels = x.shape[-1:]
    mean, variance = _call("KtgMoments", [channels] * 2, (x,), "b", "ss", combine=combine_moments)
    return mean, variance


def normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array, shortcut: jax.Array | None
) -> jax.Array:
    """`relu(x * scale + bias + shortcut)`.

    Args:
        x: float32 `[B, H, W, C]`, C a multiple of `LANES`.
        scale: float32 `[C]`.
        bias: float32 `[C]`.
        shortcut: float32 `[B, H, W, C]`; None: nothing is added.

    Returns:
        float32 `[B, H, W, C]`.
    """
    operands = (x, scale, bias) if shortcut is None else (x, scale, bias, shortcut)
    return _call("KtgNormalize", [x.shape], operands, "brrb"[: len(operands)], "b")[0]


def normalize_gradient_sums(
    dy: jax.Array, y: jax.Array, x: jax.Array, mean: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sums over the batch of g and of g * (x - mean); g is the gradient before the relu.

    Args:
        dy: float32 `[B, H, W, C]`, the gradient with respect to `normalize`'s result.
        y: float32 `[B, H, W, C]`, that result.
        x: float32 `[B, H, W, C]`, what was normalised.
        mean: float32 `[C]`.

    Returns:
        Two float32 `[C]`.
    """
    shapes = [x.shape[-1:]] * 2
    total, product = _call("KtgNormalizeGradientSums", shapes, (dy, y, x, mean), "bbbr", "ss")
    return total, product


def normalize_input_gradient(
    dy: jax.Array,
    y: jax.Array,
    x: jax.Array,
    scale: jax.Array,
    slope: jax.Array,
    bias: jax.Array,
    with_shortcut: bool,
) -> tuple[jax.Array, ...]:
    """`g * scale + x * slope + bias`, and g itself if asked for.

    Args:
        dy: float32 `[B, H, W, C]`, as for `normalize_gradient_sums`.
        y: float32 `[B, H, W, C]`, likewise.
        x: float32 `[B, H, W, C]`, likewise.
        scale: float32 `[C]`.
        slope: float32 `[C]`.
        bias: float32 `[C]`.
        with_shortcut: whether g is returned, too: the gradient of what was added.

    Returns:
        One or two float32 `[B, H, W, C]`.
    """
    shapes = [x.shape] * (1 + with_shortcut)
    operands = (dy, y, x, scale, slope, bias)
    return _call("KtgNormalizeInputGradient", shapes, operands, "bbbrrr", "b" * len(shapes))


def combine_moments(
    of_shares: tuple[jax.Array, ...], axis_name: Any
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of a batch that is spread evenly over a mapped axis, from its shares'.

    Args:
        of_shares: mean and biased variance of this device's share, float32 `[C]` each.
        axis_name: the mapped axis.

    Returns:
        Those of the whole batch, two float32 `[C]`.
    """
    share_mean, share_variance = of_shares
    mean = jax.lax.pmean(share_mean, axis_name)
    between = jax.lax.pmean(jnp.square(share_mean - mean), axis_name)
    return mean, jax.lax.pmean(share_variance, axis_name) + between


def _convolve(
    target: str,
    shape: Sequence[int],
    operands: tuple[jax.Array, ...],
    operand_kinds: str,
    result_kind: str,
    stride: int,
    padding: int,
) -> jax.Array:
    attributes = {"stride": stride, "padding": padding}
    (made,) = _call(target, [shape], operands, operand_kinds, result_kind, attributes=attributes)
    return made


def _sum(of_shares: tuple[jax.Array, ...], axis_name: Any) -> tuple[jax.Array, ...]:
    return tuple(jax.lax.psum(x, axis_name) for x in of_shares)


def _call(
    target: str,
    shapes: Sequence[Sequence[int]],
    operands: tuple[jax.Array, ...],
    operand_kinds: str,
    result_kinds: str,
    *,
    combine: Combine = _sum,
    attributes: Mapping[str, int] = MappingProxyType({}),
) -> tuple[jax.Array, ...]:
    """Calls an operation.

    Args:
        target: its name.
        shapes: the shapes of its results.
        operands: its inputs.
        operand_kinds: one letter each: b, with a batch axis in front, or r, the same everywhere.
        result_kinds: one letter each: b, or s, a sum (or mean) over the batch.
        combine: puts sums of shares of the batch together, over a mapped axis.
        attributes: its integer attributes, beside the number of parts.

    Raises:
        AssertionError: an input of another type than float32.
    """
    chex.assert_type(operands, jnp.float32)
    register()
    numbers = {name: np.int64(value) for name, value in {**attributes, "parts": parts()}.items()}

    def call(*operands: jax.Array) -> tuple[jax.Array, ...]:
        batch = operands[0].shape[0]  # of this device's share
        results = [
            jax.ShapeDtypeStruct((batch, *shape[1:]) if kind == "b" else tuple(shape), jnp.float32)
            for shape, kind in zip(shapes, result_kinds, strict=True)
        ]
        made = jax.ffi.ffi_call(target, results, vmap_method="sequential")(*operands, **numbers)
        return tuple(made)

    if jax.local_device_count("cpu") == 1:
        return call(*operands)
    return _partitioned(call, operand_kinds, result_kinds, combine)(*operands)


def _partitioned(
    call: Callable[..., tuple[jax.Array, ...]],
    operand_kinds: str,
    result_kinds: str,
    combine: Combine,
) -> Callable[..., tuple[jax.Array, ...]]:
    """The call, split over a mesh along the batch axis: to the compiler it is opaque."""
    split = custom_partitioning(lambda *operands: call(*operands))

    def partition(mesh: Any, operands: Any, results: Any) -> Any:
        spec = operands[0].sharding.spec
        axis = spec[0] if spec else None

        def sharding(kind: str, shape: Any) -> NamedSharding:
            dims = (axis if kind == "b" else None, *[None] * (len(shape.shape) - 1))
            return NamedSharding(mesh, PartitionSpec(*dims))

        def lower(*operands: jax.Array) -> tuple[jax.Array, ...]:
            made = call(*operands)
            return combine(made, axis) if axis is not None and "s" in result_kinds else made

        to = tuple(map(sharding, result_kinds, results))
        return mesh, lower, to, tuple(map(sharding, operand_kinds, operands))

    def rule(mesh: Any, operands: Any, results: Any) -> str:
        del mesh
        names = (f"f{i}" for i in itertools.count())

        def factors(kind: str, rank: int) -> str:
            return " ".join(
                ["b" if kind == "b" else next(names), *itertools.islice(names, rank - 1)]
            )

        def side(kinds: str, arrays: Any) -> str:
            return ", ".join(factors(k, a.rank) for k, a in zip(kinds, arrays, strict=True))

        return f"{side(operand_kinds, operands)} -> {side(result_kinds, results)}"

    split.def_partition(partition=partition, sharding_rule=rule)

    @custom_vmap
    def mapped(*operands: jax.Array) -> tuple[jax.Array, ...]:
        return split(*operands)

    @mapped.def_vmap
    def one_by_one(size: int, batched: Sequence[bool], *operands: jax.Array) -> Any:
        del size
        given = dict(enumerate(operands))
        along = {i: given.pop(i) for i, yes in enumerate(batched) if yes}
        made = jax.lax.map(lambda one: mapped(*dict(sorted((given | one).items())).values()), along)
        return made, (True,) * len(result_kinds)

    return mapped
