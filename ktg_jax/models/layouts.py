"""How other people's PyTorch networks name what ours have, and in which order of channels.

A layout gives, for one of our networks' parameters and statistics, the key in a state dict.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ktg_jax.models.network import stage_number

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_BLOCK = re.compile(r"stage(\d+)_block(\d+)\.(.+)")


@dataclass(frozen=True)
class Layout:
    """A way to name a network's parts.

    Attributes:
        name: its name.
        outer: our names of the parts outside blocks, and theirs.
        block: gives the name of a block from its stage (from 1) and its number in it (from 0).
        inner: our names of the parts of a block, and theirs.
        pads_both_sides: whether a shortcut without parameters puts the old channels in the middle
            of the new ones; ours has them first.
        about: what it is, in a few words.
    """

    name: str
    outer: dict[str, str]
    block: Callable[[int, int], str]
    inner: dict[str, str]
    pads_both_sides: bool = False
    about: str = ""

    def key(self, path: str) -> str | None:
        """The key of one of our arrays, `stage1_block1.conv1.kernel`; None: it has none here.

        >>> LAYOUTS["akamaster"].key("stage2_block1.norm1.mean")
        'layer2.0.bn1.running_mean'
        """
        part, _, leaf = path.rpartition(".")
        if match := _BLOCK.fullmatch(part):
            inner = self.inner.get(match[3])
            if inner is None:
                return None
            return f"{self.block(int(match[1]), int(match[2]) - 1)}.{inner}.{_LEAVES[leaf]}"
        outer = self.outer.get(part)
        return None if outer is None else f"{outer}.{_LEAVES[leaf]}"


def _layer(stage: int, block: int) -> str:
    return f"layer{stage}.{block}"


_BASIC = {f"conv{i}": f"conv{i}" for i in (1, 2, 3)} | {f"norm{i}": f"bn{i}" for i in (1, 2, 3)}
_STEM = {"stem_conv": "conv1", "stem_norm": "bn1"}
_PROJECTED = {"shortcut": "downsample.0", "shortcut_norm": "downsample.1"}
_KUANGLIU = {"shortcut": "shortcut.0", "shortcut_norm": "shortcut.1"}

_ALL = (
    Layout(
        "akamaster",
        _STEM | {"classifier": "linear"},
        _layer,
        _BASIC | _KUANGLIU,
        pads_both_sides=True,
        about="layer1.0.conv1 and linear, as in pytorch_resnet_cifar10 and pytorch-cifar",
    ),
    Layout(
        "repdistiller",
        _STEM | {"classifier": "fc"},
        _layer,
        _BASIC | _PROJECTED,
        pads_both_sides=True,
        about="layer1.0.conv1 and fc, as in torchvision, RepDistiller and pytorch-cifar-models",
    ),
    Layout(
        "ktg",
        {"stem_conv": "conv_1_3x3", "stem_norm": "bn_1", "classifier": "classifier"},
        lambda stage, block: f"stage_{stage}.{block}",
        {"conv1": "conv_a", "norm1": "bn_a", "conv2": "conv_b", "norm2": "bn_b"},
        about="stage_1.0.conv_a, as KTG's authors' ResNets",
    ),
    Layout(
        "wrn",
        {"stem_conv": "conv1", "final_norm": "bn1", "classifier": "fc"},
        lambda stage, block: f"block{stage}.layer.{block}",
        _BASIC | {"shortcut": "convShortcut"},
        about="block1.layer.0.conv1, as KTG's authors' and RepDistiller's wide ResNets",
    ),
    Layout(
        "pytorch",
        _STEM | {"final_norm": "bn1", "classifier": "fc"},
        _layer,
        _BASIC | _PROJECTED,
        about="layer1.0.conv1 and fc, channels as ours have them: what we write",
    ),
)
LAYOUTS = {layout.name: layout for layout in _ALL}
"""The layouts, in the order in which they are tried: what `pytorch` wrote says so itself."""

PREFIXES = ("module.", "model.", "_orig_mod.", "net.")
"""What wrappers put before every key."""


def without_prefix(keys: Iterable[str]) -> dict[str, str]:
    """The keys without what wrappers put before all of them, and as they are.

    >>> without_prefix(["module.conv1.weight", "module.fc.bias"])
    {'conv1.weight': 'module.conv1.weight', 'fc.bias': 'module.fc.bias'}
    """
    found = {key: key for key in keys}
    while found:
        shared = [p for p in PREFIXES if all(key.startswith(p) for key in found)]
        if not shared:
            break
        found = {key.removeprefix(shared[0]): whole for key, whole in found.items()}
    return found


def channel_orders(widths: tuple[int, ...]) -> list[np.ndarray]:
    """Where our channels of each stage are in a network whose shortcuts pad both sides.

    Args:
        widths: the channels of each stage, each twice as many as those before.

    >>> [order.tolist() for order in channel_orders((2, 4))]
    [[0, 1], [1, 2, 0, 3]]
    """
    orders = [np.arange(widths[0])]
    for before, width in itertools.pairwise(widths):
        first = (width - before) // 2
        padded = [*range(first), *range(first + before, width)]
        orders.append(np.concatenate([first + orders[-1], np.array(padded, int)]))
    return orders


def renumbered(arrays: Mapping[str, np.ndarray], inverse: bool) -> dict[str, np.ndarray]:
    """The same network with its channels in our order; inverse: from ours to theirs.

    Nothing is changed where shortcuts have parameters: then nothing is padded.
    """
    if any(".shortcut." in p for p in arrays):
        return dict(arrays)
    stages = sorted({number for p in arrays if (number := stage_number(p.split("."))) is not None})
    widths = tuple(len(arrays[f"stage{g}_block1.norm2.scale"]) for g in stages)
    orders = channel_orders(widths)
    if inverse:
        orders = [np.argsort(order) for order in orders]
    made = dict(arrays)
    for p, array in arrays.items():
        part, _, leaf = p.rpartition(".")
        block, _, inner = part.rpartition(".")
        stage = stage_number([block]) if block else None
        if part == "classifier" and leaf == "kernel":
            made[p] = array[orders[-1]]
        elif stage is not None and inner == "conv1":
            before = stage - 2 if block.endswith("_block1") and stage > 1 else stage - 1
            made[p] = array[:, :, orders[before]]
        elif stage is not None and inner in ("conv2", "norm2"):
            made[p] = array[..., orders[stage - 1]]
    return made
