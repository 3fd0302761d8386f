"""Which formulation of a convolution is used: decided here, by backend, shape and installation.

On GPUs and TPUs it is always `jax.lax.conv_general_dilated`. On CPUs, where that is several times
slower than it need be, it is one of

- `onednn`: native operations (`ktg_jax.cpu`), where oneDNN and a C++ compiler are found;
- `chunked`: `lax.conv` with a kernel gradient made of matrix products, in plain JAX;
- `xla`: `lax.conv` alone.

All have the same values and gradients to float32 rounding. The environment variable
`KTG_CPU_CONVOLUTION` chooses one; the default is the first that is possible.
"""

import functools
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp

from ktg_jax.cpu import chunked, operations
from ktg_jax.cpu.build import BuildError
from ktg_jax.errors import InputError

FORMULATIONS = ("onednn", "chunked", "xla")
_VARIABLE = "KTG_CPU_CONVOLUTION"
_override: ContextVar["CpuConvolution | None"] = ContextVar("formulation", default=None)


@dataclass(frozen=True)
class CpuConvolution:
    """A formulation and why it is used.

    Attributes:
        name: one of `FORMULATIONS`.
        reason: why, in a line.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def cpu_convolution() -> CpuConvolution:
    """The formulation of convolutions that is in use, and why.

    The first call may build the native operations, once for each user: some ten seconds.

    Raises:
        InputError: the environment asks for a formulation that does not exist, or for `onednn`
            where it cannot be had.

    >>> cpu_convolution().name in ("onednn", "chunked", "xla")
    True
    """
    return _override.get() or _choose(os.environ.get(_VARIABLE, ""), _only_cpu())


@contextmanager
def formulation(name: str) -> Iterator[None]:
    """What is traced inside uses that formulation.

    Raises:
        InputError: as `cpu_convolution`.
    """
    token = _override.set(_choose(name, _only_cpu()))
    try:
        yield
    finally:
        _override.reset(token)


def conv2d(images: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 0) -> jax.Array:
    """A convolution with the same stride and padding along both axes.

    Args:
        images: float `[B, H, W, in]`.
        kernel: float `[h, w, in, out]`.
        stride: at least 1.
        padding: zeros on all four sides, less than the kernel's size.

    Returns:
        float `[B, (H + 2 padding - h) // stride + 1, ..., out]`.

    >>> conv2d(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)), stride=2, padding=1).squeeze()
    Array([[4., 6.],
           [6., 9.]], dtype=float32)
    """
    is_float32 = images.dtype == jnp.float32 and kernel.dtype == jnp.float32
    name = cpu_convolution().name if is_float32 else "xla"
    if name == "xla":
        return _lax_conv(images, kernel, stride, padding)
    return _convolution(images, kernel, stride, padding, name)


def conv_general_dilated(
    images: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated` on NHWC and HWIO, by `conv2d` wherever that can do it.

    What flax layers take as their `conv_general_dilated`.
    """
    dilations = (options.get("lhs_dilation"), options.get("rhs_dilation"))
    plain = all(dilation in (None, (1, 1)) for dilation in dilations)
    grouped = options.get("feature_group_count", 1) != 1
    if images.ndim == 4 and plain and not grouped and not isinstance(padding, str):
        sides = {*itertools.chain(*padding)}
        even = len({*strides}) == len(sides) == 1
        if even and 0 <= min(sides) < min(kernel.shape[:2]):
            return conv2d(images, kernel, strides[0], padding[0][0])
    return jax.lax.conv_general_dilated(images, kernel, strides, padding, **options)


def uses_native_operations(*arrays: jax.Array) -> bool:
    """Whether native operations other than convolutions are in use, too, and fit the arrays."""
    if cpu_convolution().name != "onednn":
        return False
    return all(x.dtype == jnp.float32 and x.shape[-1] % operations.LANES == 0 for x in arrays)


@functools.cache
def _choose(wanted: str, only_cpu: bool) -> CpuConvolution:
    if wanted and wanted not in FORMULATIONS:
        raise InputError(_VARIABLE, wanted, ", ".join(FORMULATIONS))
    if not only_cpu:
        return CpuConvolution("xla", f"JAX computes on {jax.default_backend()}")
    if wanted in ("chunked", "xla"):
        return CpuConvolution(wanted, f"chosen by {_VARIABLE}")
    try:
        operations.register()
    except BuildError as error:
        if wanted:
            raise InputError(_VARIABLE, wanted, f"chunked or xla here: {error}") from None
        return CpuConvolution("chunked", str(error))
    return CpuConvolution("onednn", f"chosen by {_VARIABLE}" if wanted else "oneDNN was found")


def _only_cpu() -> bool:
    # Another backend could be given a computation explicitly.
    others = set(jax.extend.backend.backends()) - {"cpu", "interpreter"}
    return jax.default_backend() == "cpu" and not others


def _lax_conv(images: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    return jax.lax.conv_general_dilated(
        images,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolution(
    images: jax.Array, kernel: jax.Array, stride: int, padding: int, name: str
) -> jax.Array:
    if name == "chunked":
        return _lax_conv(images, kernel, stride, padding)
    return operations.convolution(images, kernel, stride, padding)


def _forward(
    images: jax.Array, kernel: jax.Array, stride: int, padding: int, name: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolution(images, kernel, stride, padding, name), (images, kernel)


def _backward(
    stride: int, padding: int, name: str, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    images, kernel = saved
    if name == "chunked":
        _, pullback = jax.vjp(lambda x: _lax_conv(x, kernel, stride, padding), images)
        (to_images,) = pullback(gradient)
        to_kernel = chunked.weight_gradient(images, gradient, kernel.shape, stride, padding)
        return to_images, to_kernel
    return (
        operations.convolution_input_gradient(gradient, kernel, images.shape, stride, padding),
        operations.convolution_weight_gradient(images, gradient, kernel.shape, stride, padding),
    )


_convolution.defvjp(_forward, _backward)
