"""Safetensors files: tensors and text, so that reading one executes nothing."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ktg_jax.errors import InputError
from ktg_jax.files import atomic_path
from ktg_jax.trees import FlatTree


def write_tensors(
    path: str | os.PathLike[str], field: str, tensors: FlatTree, texts: Mapping[str, str]
) -> None:
    """Writes a file, whole or not at all.

    Raises:
        InputError: it cannot be written; of this field.
    """
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=dict(texts))
    except (OSError, SafetensorError) as error:
        raise InputError(field, str(path), f"a file that can be written ({error})") from None


def read_tensors(
    path: str | os.PathLike[str], field: str, in_folder: str | None = None
) -> tuple[FlatTree, dict[str, str]]:
    """Reads a file.

    Args:
        path: of the file, or of a folder that it is in.
        field: that an error is of.
        in_folder: its name there; None: folders are refused.

    Raises:
        InputError: it cannot be read.
    """
    file_path = Path(path) / in_folder if in_folder and Path(path).is_dir() else Path(path)
    try:
        with safe_open(file_path, framework="numpy") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        or_folder = f", or a folder with {in_folder}" if in_folder else ""
        allowed = f"a whole .safetensors file{or_folder} ({error})"
        raise InputError(field, str(path), allowed) from None
