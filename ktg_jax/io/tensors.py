"""Safetensors files: tensors and text, so that reading one executes nothing."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ktg_jax.errors import InputError
from ktg_jax.io.files import atomic_path
from ktg_jax.io.trees import FlatTree


def write_tensors(
    path: str | os.PathLike[str], field: str, tensors: FlatTree, texts: Mapping[str, str]
) -> None:
    """Writes a file, whole or not at all.

    Raises:
        InputError: it cannot be written; of this field.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

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
        path: the path of the file, or of a folder that it is in; `~` is the home folder.
        field: that an error is of.
        in_folder: its name there; None: folders are refused.

    Raises:
        InputError: it cannot be read.
    """
    with _opened(path, field, in_folder) as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


def read_texts(path: str | os.PathLike[str], field: str) -> dict[str, str]:
    """The texts of a file alone, however large its tensors are; errors as of `read_tensors`."""
    with _opened(path, field, None) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path: str | os.PathLike[str], field: str, in_folder: str | None) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    file_path = Path(os.path.expanduser(path))
    if in_folder and file_path.is_dir():
        file_path /= in_folder
    try:
        if file_path.exists() and not file_path.is_file():
            raise OSError("not a regular file")
        with safe_open(file_path, framework="numpy") as file:
            yield file
    except (OSError, SafetensorError) as error:
        or_folder = f", or a folder with {in_folder}" if in_folder else ""
        allowed = f"a whole .safetensors file{or_folder} ({error})"
        raise InputError(field, str(path), allowed) from None


@contextmanager
def texts_of(field: str, path: str | os.PathLike[str], writer: str) -> Iterator[None]:
    """Within it, texts of a file that cannot be understood are an InputError of this field.

    Args:
        field: that an error is of.
        path: the path of the file.
        writer: the function whose files are understood.
    """
    try:
        yield
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        allowed = f"a file that {writer} wrote ({type(error).__name__} in its texts)"
        raise InputError(field, str(path), allowed) from None
