"""Models by name: the built-in ones, families of them, and those that a user registers."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ktg_jax.errors import InputError
from ktg_jax.models.cnn import CNN
from ktg_jax.models.resnet import ResNet
from ktg_jax.models.wide_resnet import WideResNet
from ktg_jax.nodes import NodeFns, from_linen

ModelFactory = Callable[[int], nn.Module | NodeFns]

_RESNETS = ("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
_WIDE_RESNETS = ("wrn10_2", "wrn16_2", "wrn28_2", "wrn28_10")
FAMILIES = "resnet<6n+2>, resnet<6n+2>_<channels>, wrn<6n+4>_<width>"
_registered: dict[str, ModelFactory] = {}


def register_model(name: str, factory: ModelFactory) -> None:
    """Makes a model available by name, to graphs, to files and to the experiments.

    Args:
        name: letters, digits, `_`, `.` and `-`; not a built-in model's. One that was registered
            before is replaced.
        factory: `factory(num_classes)` returns a flax.linen module or a `NodeFns`. A linen module
            with a field `dtype` can be trained in mixed precision, and one with a field
            `axis_name` normalises its batches over all devices under `jax.pmap`.

    Raises:
        InputError: the name is malformed or a built-in model's, or the factory cannot be called.

    >>> register_model("linear", lambda num_classes: nn.Sequential(
    ...     [lambda images: images.reshape(len(images), -1), nn.Dense(num_classes)]))
    >>> "linear" in model_names()
    True
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise InputError("name", name, "letters, digits, '_', '.' and '-'")
    if not callable(factory) or isinstance(factory, nn.Module):
        raise InputError("factory", factory, "a function of the number of classes")
    if _built_in(name) is not None:
        raise InputError("name", name, "a name that no built-in model has")
    _registered[name] = factory


def model_names() -> tuple[str, ...]:
    """The names that are known; those of `FAMILIES` exist in general.

    >>> {"cnn", "resnet8", "wrn28_10"} <= set(model_names())
    True
    """
    return ("cnn", *_RESNETS, *_WIDE_RESNETS, *_registered)


def check_model(name: str) -> None:
    """Raises InputError unless a model of that name can be built."""
    if _factory(name) is None:
        known = f"{', '.join(model_names())}, or {FAMILIES}"
        raise InputError("model", name, known)


def build_model(
    name: str, num_classes: int, *, dtype: Any = jnp.float32, axis_name: str | None = None
) -> NodeFns:
    """The node functions of a model.

    Args:
        name: a registered name, `resnet<6n+2>`, the same with `_<channels of the first stage>` in
            place of 16, or `wrn<6n+4>_<width>`.
        num_classes: number of logits.
        dtype: of the computation (`jnp.bfloat16`: mixed precision); parameters stay float32.
        axis_name: the mapped axis over which batches are spread under `jax.pmap`, else None.

    Raises:
        InputError: no such model, or one that cannot compute in another dtype.

    >>> import jax
    >>> fns = build_model("resnet8", num_classes=10)
    >>> logits, _ = fns.apply(*fns.init(jax.random.key(0), images := jnp.zeros((2, 32, 32, 3))),
    ...                       images, False)
    >>> logits.shape
    (2, 10)
    """
    check_model(name)
    # The same functions for the same model: what is compiled for one node serves the others.
    return _build(name, _registered.get(name), num_classes, jnp.dtype(dtype), axis_name)


@functools.lru_cache(maxsize=256)
def _build(
    name: str,
    registered: ModelFactory | None,
    num_classes: int,
    dtype: jnp.dtype,
    axis_name: str | None,
) -> NodeFns:
    factory = registered or _built_in(name)
    assert factory is not None  # or check_model would have raised
    module = factory(num_classes)
    if isinstance(module, nn.Module):
        fields = {field.name for field in dataclasses.fields(module)}
        wanted: dict[str, Any] = {"axis_name": axis_name, "dtype": dtype}
        module = module.clone(**{k: v for k, v in wanted.items() if k in fields})
        if "dtype" in fields or dtype == jnp.float32:
            return from_linen(module)
    elif dtype == jnp.float32:
        return module
    raise InputError("model", name, f"for {dtype}, a linen module with a field dtype")


def _factory(name: str) -> ModelFactory | None:
    return _registered.get(name) or _built_in(name)


def _built_in(name: str) -> ModelFactory | None:
    if name == "cnn":
        return CNN
    if match := re.fullmatch(r"resnet([1-9]\d*)(?:_([1-9]\d*))?", name):
        depth, channels = int(match[1]), int(match[2] or 16)
        if depth >= 8 and depth % 6 == 2:
            return lambda num_classes: ResNet(depth, num_classes, channels)
    if match := re.fullmatch(r"wrn([1-9]\d*)_([1-9]\d*)", name):
        depth, width = int(match[1]), int(match[2])
        if depth >= 10 and depth % 6 == 4:
            return lambda num_classes: WideResNet(depth, width, num_classes)
    return None
