"""Networks that were trained in PyTorch: their state dicts read, and ours written for it."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ktg_jax.connectors import without_connectors
from ktg_jax.errors import InputError
from ktg_jax.io.tensors import read_tensors, read_texts, write_tensors
from ktg_jax.io.trees import FlatTree, by_path, digest, flatten, some, unflatten
from ktg_jax.models.foreign_checks import check_arrays, check_keys
from ktg_jax.models.layouts import LAYOUTS, Layout, renumbered, without_prefix
from ktg_jax.models.network import PyTree
from ktg_jax.models.pickles import refuse_pickle
from ktg_jax.models.registry import build_model, check_model
from ktg_jax.models.streams import without_stream

AUTO = "auto"
_STATISTICS = "batch_stats."


def load_state_dict(
    path: str | os.PathLike[str],
    model: str,
    layout: str = AUTO,
    *,
    names: Mapping[str, str] | None = None,
    num_classes: int | None = None,
    image_shape: Sequence[int] = (32, 32, 3),
) -> tuple[PyTree, PyTree]:
    """Reads a network of ours from a state dict of PyTorch.

    Convolutions and dense layers are turned to our order of axes; where the network's shortcuts
    put new channels on both sides of the old ones its channels are renumbered, which is exact.

    Args:
        path: a `.safetensors` file of a state dict; keys may have a wrapper's prefix (`module.`).
        model: the name of our network.
        layout: how its parts are named, one of `LAYOUTS`; auto: as the keys show. Which one it was
            is told to the logger `ktg_jax.models.foreign`, and by `state_dict_layout`.
        names: in place of a layout, our path for each of the keys: `{"fc.weight":
            "classifier.kernel"}`, of statistics `{"bn1.running_mean": "stem_norm.mean"}`.
        num_classes: the number of logits; None: as the classifier's shape says.
        image_shape: `(H, W, C)`; the number of channels is taken from the file where it is said.

    Returns:
        `params` and `model_state`, float32, as `build_model(model, num_classes).apply` takes them.

    Raises:
        InputError: no safetensors file, such as a pickle (with the lines that convert it), an
            unknown model or layout, tensors that are left over or missing, or of another shape:
            the first ten are named; names beside a layout; numbers that are not finite floats,
            or variances below 0.

    >>> import tempfile
    >>> fns = build_model("resnet8", num_classes=10)
    >>> network = fns.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_state_dict(f"{folder}/node.safetensors", *network, "resnet8", "akamaster")
    ...     params, model_state = load_state_dict(f"{folder}/node.safetensors", "resnet8")
    >>> params["classifier"]["kernel"].shape
    (64, 10)
    """
    if names is not None and layout != AUTO:
        raise InputError("names", dict(names), f"None beside the layout {layout}")
    tensors, texts = _state_dict(path)
    check_model(model)
    known = _sizes(tensors, names)
    classes = known.get("classes") if num_classes is None else num_classes
    if classes is None:
        allowed = f"the number of logits: no classifier in {path} says it"
        raise InputError("num_classes", None, allowed)
    shape = (*image_shape[:2], known.get("channels", image_shape[2]))
    template = _template(model, classes, shape)
    paths = _flat(*template)
    if names is None:
        taken = _layout_of(path, layout, tensors, paths, model, texts)
        logging.getLogger(__name__).info("%s is a %s in the layout %s", path, model, taken.name)
        keys = {p: taken.key(p) for p in paths}
    else:
        taken, keys = None, _by_names(names, tensors, paths, path)
    check_keys(path, model, tensors, keys)
    arrays = {p: _turned(tensors[str(key)]) for p, key in keys.items()}
    check_arrays(path, model, arrays, paths, keys)
    if taken is not None and taken.pads_both_sides:
        arrays = renumbered(arrays, inverse=False)
    return _unflattened(arrays, template, str(path))


def save_state_dict(
    path: str | os.PathLike[str],
    params: PyTree,
    model_state: PyTree,
    model: str,
    layout: str = "pytorch",
    *,
    about: Mapping[str, str] | None = None,
) -> None:
    """Writes a network of ours as a state dict of PyTorch, which `load_state_dict` reads again.

    Args:
        path: ends in `.safetensors`.
        params: the network's params; a node's connectors are left out.
        model_state: its model state.
        model: its name.
        layout: how its parts are to be named, one of `LAYOUTS`.
        about: further texts to keep in the file.

    Raises:
        InputError: another suffix, an unknown layout, one that has no name for a part of the
            network, parameters of another model, or a file that cannot be written.

    >>> import tempfile
    >>> from safetensors.numpy import load_file
    >>> fns = build_model("resnet8", num_classes=10)
    >>> network = fns.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_state_dict(f"{folder}/node.safetensors", *network, "resnet8")
    ...     load_file(f"{folder}/node.safetensors")["layer2.0.conv1.weight"].shape
    (32, 16, 3, 3)
    """
    if Path(path).suffix != ".safetensors":
        raise InputError("export", str(path), "a file name that ends in .safetensors")
    taken = _known(layout)
    network, _ = without_connectors(params)
    arrays = _flat(flatten(network), flatten(without_stream(model_state)))
    _check_parts(model, arrays)
    missing = [p for p in arrays if taken.key(p) is None]
    if missing:
        raise InputError("layout", layout, f"one that names every part of a {model} ({missing[0]})")
    if taken.pads_both_sides:
        arrays = renumbered(arrays, inverse=True)
    tensors = {
        str(taken.key(p)): np.ascontiguousarray(_turned_back(np.asarray(array)))
        for p, array in arrays.items()
    }
    texts = {"format": "pt", "layout": layout, "model_name": model, **(about or {})}
    write_tensors(path, "export", tensors, texts)


def state_dict_layout(path: str | os.PathLike[str], model: str) -> str:
    """The name of the layout that `load_state_dict` recognises in a file.

    Raises:
        InputError: as `load_state_dict`.

    >>> import tempfile
    >>> fns = build_model("resnet8", num_classes=10)
    >>> network = fns.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_state_dict(f"{folder}/node.safetensors", *network, "resnet8", "ktg")
    ...     state_dict_layout(f"{folder}/node.safetensors", "resnet8")
    'ktg'
    """
    tensors, texts = _state_dict(path)
    check_model(model)
    known = _sizes(tensors, None)
    paths = _flat(*_template(model, known.get("classes", 1), (32, 32, known.get("channels", 3))))
    return _layout_of(path, AUTO, tensors, paths, model, texts).name


def is_foreign(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one of tensors that `save_node` did not write.

    Raises:
        InputError: a pickle, or a file that cannot be read.
    """
    refuse_pickle(path)
    return "model" not in read_texts(path, "weights")


def state_dict_checksum(path: str | os.PathLike[str]) -> int:
    """The checksum of all tensors of a file; errors as of `is_foreign`."""
    refuse_pickle(path)
    return digest(read_tensors(path, "weights")[0])


def _state_dict(path: str | os.PathLike[str]) -> tuple[FlatTree, dict[str, str]]:
    """The tensors without a wrapper's prefix, and the file's texts."""
    refuse_pickle(path)
    given, texts = read_tensors(path, "weights")
    tensors = {
        key: given[whole]
        for key, whole in without_prefix(given).items()
        if key.rpartition(".")[2] != "num_batches_tracked"
    }
    for key, array in tensors.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise InputError("weights", str(path), f"floats alone ({key} is {array.dtype})")
        with np.errstate(over="ignore"):  # of float64, which is infinite then
            values = array.astype(np.float32)
        if not np.isfinite(values).all():
            raise InputError("weights", str(path), f"finite numbers alone ({key} has others)")
        if key.endswith("running_var") and values.min(initial=0) < 0:
            raise InputError("weights", str(path), f"variances of at least 0 ({key} has others)")
    return tensors, texts


def _sizes(tensors: FlatTree, names: Mapping[str, str] | None) -> dict[str, int]:
    """What the file says of the number of classes and of the images' channels."""
    found: dict[str, int] = {}
    wanted_sizes = (("classifier", 0, "classes", 2), ("stem_conv", 1, "channels", 4))
    for part, axis, size, rank in wanted_sizes:
        wanted = f"{part}.kernel"
        keys = [layout.key(wanted) for layout in LAYOUTS.values()]
        if names is not None:
            keys = [key for key, ours in names.items() if ours == wanted]
        for key in keys:
            if key in tensors and tensors[key].ndim == rank:
                found.setdefault(size, tensors[key].shape[axis])
    return found


def _template(model: str, classes: int, shape: Sequence[int]) -> tuple[PyTree, PyTree]:
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    init = build_model(model, classes).init
    params, model_state = jax.eval_shape(init, jax.random.key(0), images)
    return params, without_stream(model_state)


def _flat(params: PyTree, model_state: PyTree) -> dict[str, Any]:
    """All arrays by one path each: `stem_norm.scale`, and of statistics `stem_norm.mean`."""
    state = {p.removeprefix(_STATISTICS): leaf for p, leaf in by_path(model_state).items()}
    return by_path(params) | state


def _unflattened(
    arrays: Mapping[str, np.ndarray], template: tuple[PyTree, PyTree], source: str
) -> tuple[PyTree, PyTree]:
    params, model_state = template
    field = f"weights of {source}"
    of_state = by_path(model_state)
    state = {p: arrays[p.removeprefix(_STATISTICS)] for p in of_state}
    return (
        unflatten(params, {p: arrays[p] for p in by_path(params)}, field),
        unflatten(model_state, state, field),
    )


def _known(layout: str) -> Layout:
    if layout not in LAYOUTS:
        raise InputError("layout", layout, ", ".join(LAYOUTS))
    return LAYOUTS[layout]


def _layout_of(
    path: str | os.PathLike[str],
    layout: str,
    tensors: FlatTree,
    paths: Mapping[str, Any],
    model: str,
    texts: Mapping[str, str],
) -> Layout:
    """The layout that is given, or the first whose keys are the file's, or the nearest one."""
    if layout != AUTO:
        return _known(layout)
    if texts.get("layout") in LAYOUTS:
        return LAYOUTS[texts["layout"]]

    keys = {each.name: {each.key(p) for p in paths} for each in LAYOUTS.values()}
    nearest = min(LAYOUTS.values(), key=lambda each: len(keys[each.name] ^ set(tensors)))
    if not keys[nearest.name] & set(tensors):
        known = "; ".join(f"{each.name}: {each.about}" for each in LAYOUTS.values())
        allowed = f"a {model} in one of the layouts {known}; or names= says our path of each key"
        raise InputError("weights", str(path), f"{allowed} (keys: {some(sorted(tensors))})")
    if nearest.name == "repdistiller" and not any(".shortcut." in p for p in paths):
        allowed = (
            "repdistiller (shortcuts pad new channels on both sides of the old) or pytorch (behind "
            f"them): the keys of {path} do not tell which"
        )
        raise InputError("layout", layout, allowed)
    return nearest


def _by_names(
    names: Mapping[str, str],
    tensors: FlatTree,
    paths: Mapping[str, Any],
    path: str | os.PathLike[str],
) -> dict[str, str | None]:
    """The key of each of our paths, by a user's names."""
    plain = without_prefix(names) if not set(names) <= set(tensors) else {key: key for key in names}
    keys: dict[str, str | None] = dict.fromkeys(paths)
    for key, whole in plain.items():
        ours = names[whole]
        if ours not in paths:
            raise InputError(f"names[{whole!r}]", ours, f"one of {some(list(paths))}")
        if keys[ours] is not None:
            raise InputError(f"names[{whole!r}]", ours, f"a path that {keys[ours]} does not have")
        if key not in tensors:
            raise InputError("names", whole, f"keys of {path}: {some(sorted(tensors))}")
        keys[ours] = key
    return keys


def _check_parts(model: str, arrays: Mapping[str, Any]) -> None:
    """Raises InputError where the arrays are not those of a model, by their paths."""
    sizes = {"classifier.kernel": 1, "stem_conv.kernel": 3}
    classes, channels = (np.shape(arrays[p])[-1] if p in arrays else n for p, n in sizes.items())
    if "stem_conv.kernel" in arrays:
        channels = np.shape(arrays["stem_conv.kernel"])[-2]
    expected = _flat(*_template(model, classes, (32, 32, channels)))
    for p in (*expected, *arrays):
        if p not in arrays or p not in expected:
            found = "missing" if p in expected else "left over"
            raise InputError("params", f"{p} {found}", f"the parts of a {model}")


def _turned(array: np.ndarray) -> np.ndarray:
    """PyTorch's order of axes as ours: OIHW to HWIO, [out, in] to [in, out]; float32."""
    array = array.astype(np.float32)
    return np.moveaxis(array, (0, 1), (-1, -2)) if array.ndim > 1 else array


def _turned_back(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, (-1, -2), (0, 1)) if array.ndim > 1 else array
