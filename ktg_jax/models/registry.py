"""Models by name: the built-in ones, families of them, and those that a user registers."""

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ktg_jax.errors import InputError, in_a_line
from ktg_jax.models.cnn import CNN
from ktg_jax.models.linen_node import from_linen
from ktg_jax.models.mobile import MobileNetV2, ShuffleNetV2
from ktg_jax.models.modes import Mode
from ktg_jax.models.network import NodeFns, checked_stages
from ktg_jax.models.nnx_node import in_dtype
from ktg_jax.models.projected_resnet import IMAGENET, imagenet_resnet, small_resnet
from ktg_jax.models.resnet import ResNet
from ktg_jax.models.vgg import BLOCKS, VGG
from ktg_jax.models.vit import ViT
from ktg_jax.models.wide_resnet import WideResNet

ModelFactory = Callable[[int], nn.Module | NodeFns]

_RESNETS = ("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
_PROJECTED = ("resnet8x4", "resnet32x4", *IMAGENET)
_OTHERS: dict[str, ModelFactory] = {
    "mobilenet_v2": MobileNetV2,
    "shufflenet_v2": ShuffleNetV2,
    "vit_tiny": ViT,
    **{name: functools.partial(VGG, blocks) for name, blocks in BLOCKS.items()},
}
_WIDE_RESNETS = ("wrn10_2", "wrn16_2", "wrn28_2", "wrn28_10")
_NUMBER = r"([1-9][0-9]{0,5})"
_MOST_LAYERS = 1202  # of the deepest in the paper on ResNets
_MOST_CHANNELS = 1024
_MOST_PARAMETERS = 1e9
FAMILIES = (
    "resnet<6n+2>, resnet<6n+2>_<channels>, resnet<6n+2>x<factor>, wrn<6n+4>_<width> (up to 1,202 "
    "layers, 1,024 channels in the first stage and about a billion parameters)"
)
MOST_CLASSES = 1_000_000


@dataclasses.dataclass(frozen=True)
class _Registered:
    """What was registered."""

    factory: ModelFactory
    mode: Mode | None
    stages: tuple[str, ...] | None

    def __call__(self, num_classes: int) -> nn.Module | NodeFns:
        return self.factory(num_classes)


_registered: dict[str, _Registered] = {}


def register_model(
    name: str,
    factory: ModelFactory,
    mode: Mode | None = None,
    stages: Sequence[str] | None = None,
) -> None:
    """Makes a model available by name, to graphs, to files and to the experiments.

    Args:
        name: letters, digits, `_`, `.` and `-`; not a built-in model's. One that was registered
            before is replaced.
        factory: `factory(num_classes)` returns a flax.linen module or a `NodeFns`. A linen module
            with a field `dtype`, and what `from_nnx` makes, can be trained in mixed precision; a
            linen module with a field `axis_name` normalises its batches over all devices under
            `jax.pmap`.
        mode: how a linen module is told whether it trains, as for `from_linen`.
        stages: paths of a linen module's stages, as for `from_linen`.

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
    hashable = factory if isinstance(factory, Hashable) else functools.partial(factory)
    _registered[name] = _Registered(hashable, mode, checked_stages(stages))


def model_names() -> tuple[str, ...]:
    """The names that are known; those of `FAMILIES` exist in general.

    >>> {"cnn", "resnet8", "wrn28_10"} <= set(model_names())
    True
    """
    return ("cnn", *_RESNETS, *_PROJECTED, *_WIDE_RESNETS, *_OTHERS, *_registered)


def check_model(name: str, field: str = "model") -> None:
    """Raises InputError, of this field, unless a model of that name can be built."""
    if not isinstance(name, str):
        raise InputError(field, name, "a model's name")
    if _factory(name) is None:
        known = f"{', '.join(model_names())}, or {FAMILIES}"
        raise InputError(field, name, known)


def build_model(
    name: str, num_classes: int, *, dtype: Any = jnp.float32, axis_name: str | None = None
) -> NodeFns:
    """The node functions of a model.

    Args:
        name: a registered name, `resnet<6n+2>`, the same with `_<channels of the first stage>` in
            place of 16, `resnet<6n+2>x<factor>` with projections as shortcuts, or
            `wrn<6n+4>_<width>`; of at most 1,202 layers, 1,024 channels in the first stage, and
            about a billion parameters. `resnet18`, `resnet34` and `resnet50` are ImageNet's, for
            small images; `resnet50_16` is that of 6n+2 layers.
        num_classes: number of logits, 1 to 1,000,000.
        dtype: the dtype of the computation (`jnp.bfloat16`: mixed precision); parameters stay
            float32.
        axis_name: the mapped axis over which batches are spread under `jax.pmap`, else None.

    Raises:
        InputError: no such model, one that cannot be made or cannot compute in another dtype, or a
            number of classes that is out of range.

    >>> import jax
    >>> fns = build_model("resnet8", num_classes=10)
    >>> logits, _ = fns.apply(*fns.init(jax.random.key(0), images := jnp.zeros((2, 32, 32, 3))),
    ...                       images, False)
    >>> logits.shape
    (2, 10)
    """
    check_model(name)
    if not isinstance(num_classes, int | np.integer) or not 1 <= num_classes <= MOST_CLASSES:
        raise InputError("num_classes", num_classes, f"an integer from 1 to {MOST_CLASSES:,}")
    # The same functions for the same model: what is compiled for one node serves the others.
    return _build(name, _registered.get(name), num_classes, jnp.dtype(dtype), axis_name)


@functools.lru_cache(maxsize=256)
def _build(
    name: str,
    registered: _Registered | None,
    num_classes: int,
    dtype: jnp.dtype,
    axis_name: str | None,
) -> NodeFns:
    factory = registered or _built_in(name)
    assert factory is not None  # or check_model would have raised
    # The built-in ones draw no random numbers: no need to find out.
    how: dict[str, Any] = {"rngs": ()}
    if registered is not None:
        how = {"mode": registered.mode, "stages": registered.stages}
    try:
        module = factory(num_classes)
        if isinstance(module, nn.Module):
            fields = {field.name for field in dataclasses.fields(module)}
            wanted: dict[str, Any] = {"axis_name": axis_name, "dtype": dtype}
            module = module.clone(**{k: v for k, v in wanted.items() if k in fields})
            if "dtype" in fields or dtype == jnp.float32:
                return from_linen(module, axis_name=axis_name, **how)
    except Exception as error:
        allowed = f"one that can be made for {num_classes} classes ({in_a_line(error)})"
        raise InputError("model", name, allowed) from error
    if not isinstance(module, nn.Module | NodeFns):
        kind = f"a class, {module.__name__}" if isinstance(module, type) else type(module).__name__
        allowed = "one whose factory returns a flax.linen module, or NodeFns (from_nnx makes them)"
        raise InputError("model", name, f"{allowed}; it returns {kind}")
    for option in ("mode", "stages"):
        if isinstance(module, NodeFns) and how.get(option) is not None:
            allowed = f"a linen module where {option}= is said; else ktg.from_linen takes it"
            raise InputError("model", name, allowed)
    if isinstance(module, NodeFns):
        fns = module if dtype == jnp.float32 else in_dtype(module, dtype)
        if fns is not None:
            return fns
    allowed = f"for {dtype}, a linen module with a field dtype, or what ktg.from_nnx makes"
    raise InputError("model", name, allowed)


def _factory(name: str) -> ModelFactory | None:
    return _registered.get(name) or _built_in(name)


def _built_in(name: str) -> ModelFactory | None:
    if name == "cnn":
        return CNN
    if name in _OTHERS:
        return _OTHERS[name]
    if name in IMAGENET:
        return functools.partial(imagenet_resnet, name)
    if match := re.fullmatch(f"resnet{_NUMBER}x{_NUMBER}", name):
        depth, factor = int(match[1]), int(match[2])
        if depth >= 8 and depth % 6 == 2 and _is_feasible(depth, 16 * factor):
            return functools.partial(small_resnet, depth, factor)
    if match := re.fullmatch(f"resnet{_NUMBER}(?:_{_NUMBER})?", name):
        depth, channels = int(match[1]), int(match[2] or 16)
        if depth >= 8 and depth % 6 == 2 and _is_feasible(depth, channels):
            return lambda num_classes: ResNet(depth, num_classes, channels)
    if match := re.fullmatch(f"wrn{_NUMBER}_{_NUMBER}", name):
        depth, width = int(match[1]), int(match[2])
        if depth >= 10 and depth % 6 == 4 and _is_feasible(depth, 16 * width):
            return lambda num_classes: WideResNet(depth, width, num_classes)
    return None


def _is_feasible(depth: int, channels: int) -> bool:
    """Whether a network of so many layers and channels in its first stage can be built at all.

    A third of its convolutions has these channels, a third twice and a third four times as many.
    """
    parameters = depth / 3 * 9 * channels**2 * (1 + 4 + 16)
    return depth <= _MOST_LAYERS and channels <= _MOST_CHANNELS and parameters <= _MOST_PARAMETERS
