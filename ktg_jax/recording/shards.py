"""The files of a recording: whether one is whole, and what is in it."""

import zlib
from pathlib import Path

import numpy as np

from ktg_jax.errors import InputError
from ktg_jax.io.tensors import read_tensors
from ktg_jax.recording.code import Tensors, encoded
from ktg_jax.recording.header import Header, shard_path


def check_shard(folder: Path, header: Header, shard: int) -> Tensors:
    """The tensors of a file.

    Raises:
        InputError: it is missing, damaged, or has other rows than it should.
    """
    path = shard_path(folder, shard)
    tensors, _ = read_tensors(path, "outputs")
    expected = encoded(header, np.zeros((1, *header.row_shape, header.classes), np.float32))
    rows = len(header.rows_of(shard))
    for name, like in expected.items():
        array = tensors.get(name)
        if array is None or array.dtype != like.dtype or array.shape != (rows, *like.shape[1:]):
            found = None if array is None else f"{array.dtype}{list(array.shape)}"
            allowed = f"a whole recording ({path.name}: {name} {found})"
            raise InputError("outputs", str(folder), allowed)
    return tensors


def checked_shard(folder: Path, header: Header, shard: int, checksum: int) -> Tensors:
    """The tensors of a file whose checksum is known; raises InputError where it differs."""
    tensors = check_shard(folder, header, shard)
    if zlib.crc32(shard_path(folder, shard).read_bytes()) != checksum:
        path = shard_path(folder, shard)
        allowed = f"a whole recording ({path.name} is damaged: its checksum differs)"
        raise InputError("outputs", str(folder), allowed)
    return tensors
