"""Pytrees as flat dicts of host arrays, for files: `{"stage1_block1.conv1.kernel": array, ...}`."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ktg_jax.errors import InputError

FlatTree = dict[str, np.ndarray]

_MOST_NAMED = 10


def flatten(tree: Any) -> FlatTree:
    """Copies the arrays of a pytree to the host, by the path to each.

    The arrays are copies even where device and host share memory: the device's may be donated to
    the next step while these are still being written.
    """
    return {path: np.array(_plain(leaf), copy=True) for path, leaf in by_path(tree).items()}


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree as they are (also traced ones), by the path to each.

    >>> by_path({"stem_conv": {"kernel": 1}})
    {'stem_conv.kernel': 1}
    """
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def replaced(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """The pytree with the leaves at these paths exchanged.

    >>> replaced({"a": {"b": 1, "c": 2}}, {"a.b": 3})
    {'a': {'b': 3, 'c': 2}}
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(_name(path), leaf), tree)


def unflatten(template: Any, flat: Mapping[str, np.ndarray], field: str) -> Any:
    """The pytree of the template's structure with the arrays of `flat`.

    Args:
        template: a pytree of arrays or of `jax.ShapeDtypeStruct`.
        flat: as `flatten` returns it.
        field: what the error calls `flat`.

    Raises:
        InputError: paths that only one of them has, or other shapes; names up to ten.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(template)
    expected = {_name(path): leaf for path, leaf in paths}
    missing = [name for name in expected if name not in flat]
    others = [name for name in flat if name not in expected]
    if missing:
        left = f" (left over: {some(others, _MOST_NAMED // 2)})" if others else ""
        most = _MOST_NAMED // 2 if others else _MOST_NAMED
        allowed = f"the model's own parameters, all of them{left}"
        raise InputError(field, f"no {some(missing, most)}", allowed)
    if others:
        raise InputError(field, some(others), "the model's own parameters, no others")
    shapes = {name: _plain_shape(leaf) for name, leaf in expected.items()}
    wrong = [name for name in expected if tuple(np.shape(flat[name])) != shapes[name]]
    if wrong:
        first, *more = wrong
        too = f"; others that differ: {some(more, _MOST_NAMED - 1)}" if more else ""
        raise InputError(f"{field} {first}", np.shape(flat[first]), f"shape {shapes[first]}{too}")
    return jax.tree.unflatten(treedef, [_like(leaf, flat[name]) for name, leaf in expected.items()])


def is_float(leaf: Any) -> bool:
    """Whether a leaf, traced or a shape, is of floats: no counter, and no random key."""
    return bool(jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating))


def some(names: Sequence[str], most: int = _MOST_NAMED, separator: str = ", ") -> str:
    """The first of some names, and how many more there are.

    >>> some(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def digest(flat: Mapping[str, np.ndarray]) -> int:
    """A checksum (CRC-32) of names and bytes: tells a damaged file from a whole one."""
    checksum = 0
    for name in sorted(flat):
        array = np.ascontiguousarray(flat[name])
        checksum = zlib.crc32(array.tobytes(), zlib.crc32(name.encode(), checksum))
    return checksum


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> Any:
    """Random keys as the integers that they are made of; other arrays as they are."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _plain_shape(leaf: Any) -> tuple[int, ...]:
    return tuple(jax.eval_shape(_plain, leaf).shape)


def _like(leaf: Any, array: np.ndarray) -> jax.Array:
    if _is_key(leaf):
        data = jax.numpy.asarray(array, np.uint32)
        return jax.random.wrap_key_data(
            data, impl=jax.random.key_impl(jax.numpy.empty((), leaf.dtype))
        )
    return jax.numpy.asarray(array, leaf.dtype)
