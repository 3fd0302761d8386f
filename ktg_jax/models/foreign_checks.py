"""Whether the tensors of a state dict are the parts of a network, and what differs."""

import os
from collections.abc import Mapping
from typing import Any

from ktg_jax.errors import InputError
from ktg_jax.io.trees import FlatTree, some

_MOST_NAMED = 10


def check_keys(
    path: str | os.PathLike[str], model: str, tensors: FlatTree, keys: Mapping[str, str | None]
) -> None:
    """Raises InputError where something is missing or left over on either side."""
    missing = [f"{key or 'nothing'} for {ours}" for ours, key in keys.items() if key not in tensors]
    left = sorted(set(tensors) - set(keys.values()))
    if not missing and not left:
        return
    most = _MOST_NAMED // 2 if missing and left else _MOST_NAMED
    found = {"missing": missing, "left over": left}
    parts = [f"{what}: {some(items, most)}" for what, items in found.items() if items]
    hint = ""
    if any("downsample" in key or "shortcut" in key for key in left):
        hint = "; its shortcuts are projections, as in resnet<6n+2>x<factor>"
    raise InputError("weights", str(path), f"the parts of a {model} ({'; '.join(parts)}{hint})")


def check_arrays(
    path: str | os.PathLike[str],
    model: str,
    arrays: FlatTree,
    paths: Mapping[str, Any],
    keys: Mapping[str, str | None],
) -> None:
    """Raises InputError where arrays have other shapes than the network's."""
    wrong = [
        f"{keys[p]} gives {list(array.shape)}, not {list(paths[p].shape)}"
        for p, array in arrays.items()
        if array.shape != tuple(paths[p].shape)
    ]
    if wrong:
        allowed = f"the shapes of a {model} ({some(wrong, separator='; ')})"
        raise InputError("weights", str(path), allowed)
