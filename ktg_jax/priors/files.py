"""Priors in files: safetensors, tensors and text, so that reading one executes nothing."""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ktg_jax.errors import InputError
from ktg_jax.io.tensors import read_tensors, texts_of, write_tensors
from ktg_jax.io.trees import FlatTree, digest
from ktg_jax.priors.prior import Prior

PRIOR_FILE = "prior.safetensors"
"""The file's name, where a folder is given."""

_FORMAT, _FORMAT_WITH_START = "ktg_jax prior 1", "ktg_jax prior 2"
_PARAMS, _STATE = "params:", "model_state:"
"""What the names of tensors begin with that are of a start, and no kernels of the prior."""


def save_prior(
    path: str | os.PathLike[str],
    prior: Prior,
    *,
    student: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    about: Mapping[str, str] | None = None,
) -> None:
    """Writes a prior and what it was made for.

    Args:
        path: ends in `.safetensors`.
        prior: a prior of any student.
        student: its model's registered name, or what else it is called.
        num_classes: the number of classes of the data that the prior was fitted on.
        image_shape: (height, width, channels) of that data.
        about: further texts to keep in the file's metadata.

    Raises:
        InputError: another suffix, or a file that cannot be written.

    >>> import tempfile
    >>> prior = Prior((jnp.ones((3, 3, 1, 2)),), ("stage1_conv.kernel",))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_prior(f"{folder}/prior.safetensors", prior, student="cnn", num_classes=10,
    ...                image_shape=(8, 8, 1))
    ...     load_prior(folder).paths, about_prior(folder)["student"]
    (('stage1_conv.kernel',), 'cnn')
    """
    if Path(path).suffix != ".safetensors":
        raise InputError("prior", str(path), "a file name that ends in .safetensors")
    kernels = (np.array(kernel, np.float32) for kernel in prior.kernels)
    tensors = dict(zip(prior.paths, kernels, strict=True)) | _start_tensors(prior)
    texts = {
        **(about or {}),
        "student": student,
        "num_classes": json.dumps(num_classes),
        "image_shape": json.dumps(list(image_shape)),
        "format": _FORMAT if prior.start is None else _FORMAT_WITH_START,
        "paths": json.dumps(prior.paths),
    }
    texts["checksum"] = _checksum(tensors, texts)
    write_tensors(path, "prior", tensors, texts)


def load_prior(path: str | os.PathLike[str]) -> Prior:
    """Reads what `save_prior` wrote.

    Args:
        path: the file, or a folder with a `prior.safetensors`.

    Raises:
        InputError: a file that cannot be read, is damaged, or holds no prior.

    >>> import tempfile
    >>> prior = Prior((jnp.ones((3, 3, 1, 2)),), ("stage1_conv.kernel",))
    >>> about = {"student": "cnn", "num_classes": 10, "image_shape": (8, 8, 1)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_prior(f"{folder}/prior.safetensors", prior, **about)
    ...     load_prior(folder).shapes
    {'stage1_conv.kernel': (3, 3, 1, 2)}
    """
    tensors, texts = _read(path)
    with texts_of("prior", path, "save_prior"):
        paths = tuple(json.loads(texts["paths"]))
        return Prior(
            tuple(jnp.asarray(tensors[name]) for name in paths),
            paths,
            _start(tensors, paths) if texts["format"] == _FORMAT_WITH_START else None,
        )


def about_prior(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts of a prior's file: `student`, `num_classes`, `image_shape`, and those given to it.

    Also `checksum`, which tells one prior from another. Arguments and errors as for `load_prior`.
    """
    return _read(path)[1]


def _start_tensors(prior: Prior) -> FlatTree:
    """What a file has of a start beside the prior's kernels, which mostly are the start's, too."""
    if prior.start is None:
        return {}
    params, state = prior.start
    kernels = dict(zip(prior.paths, prior.kernels, strict=True))
    others = {
        path: leaf
        for path, leaf in params.items()
        if path not in kernels or not np.array_equal(kernels[path], leaf)
    }
    parts = {_PARAMS: others, _STATE: state}
    return {
        f"{kind}{p}": np.array(leaf) for kind, part in parts.items() for p, leaf in part.items()
    }


def _start(tensors: FlatTree, paths: Sequence[str]) -> tuple[FlatTree, FlatTree]:
    """The start of a prior of these kernels: parameters and model state, by path."""
    params = {path: tensors[path] for path in paths}
    params |= {n.removeprefix(_PARAMS): t for n, t in tensors.items() if n.startswith(_PARAMS)}
    return params, {n.removeprefix(_STATE): t for n, t in tensors.items() if n.startswith(_STATE)}


def _read(path: str | os.PathLike[str]) -> tuple[FlatTree, dict[str, str]]:
    tensors, texts = read_tensors(path, "prior", PRIOR_FILE)
    if texts.get("format") not in (_FORMAT, _FORMAT_WITH_START):
        raise InputError("prior", str(path), "a file that save_prior wrote")
    if texts.get("checksum") != _checksum(tensors, texts):
        raise InputError("prior", str(path), "an undamaged file (its checksum differs)")
    return tensors, texts


def _checksum(tensors: FlatTree, texts: Mapping[str, str]) -> str:
    return str(zlib.crc32(str(texts.get("paths")).encode(), digest(tensors)))
