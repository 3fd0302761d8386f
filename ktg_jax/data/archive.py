"""Arrays of npz files, whose sizes are known before any of them is unpacked."""

import io
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.lib.npyio import NpzFile

from ktg_jax.data.memory import check_fits, in_words
from ktg_jax.errors import InputError

_MOST_INFLATED = 100  # no file of images is compressed as well
_SMALL = 2**30  # bytes, up to which that does no harm
_LONGEST_HEADER = 2**16


@contextmanager
def opened_npz(path: Path) -> Iterator[NpzFile]:
    """The file, none of whose arrays is read yet; what is wrong with it is an InputError."""
    if not path.is_file():
        raise InputError("data", f"npz:{path}", "a file that exists")
    try:
        # opened here, as numpy.load leaves a damaged file open
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            yield arrays
    except InputError:
        raise
    except MemoryError as error:
        raise InputError("data", f"npz:{path}", "what fits in memory") from error
    except Exception as error:  # damage shows itself in many types
        allowed = "a complete, undamaged file of numpy.savez, without object arrays"
        raise InputError("data", f"npz:{path}", allowed) from error


def read_arrays(arrays: NpzFile, names: Iterable[str], path: Path) -> dict[str, np.ndarray]:
    """Reads arrays that fit in memory.

    Args:
        arrays: the arrays of the file.
        names: the names of the arrays to read.
        path: the path of the file, for the error.

    Raises:
        InputError: together they are larger than the machine's memory, or larger than 1 GiB and
            than a hundred times what they take in the file.
        ValueError: an array is damaged.
    """
    names = list(names)
    sizes = [_sizes(arrays, name) for name in names]
    unpacked = sum(size for size, _ in sizes)
    packed = min(sum(size for _, size in sizes), path.stat().st_size)
    check_fits("data", f"npz:{path}", unpacked)
    if unpacked > max(_SMALL, _MOST_INFLATED * packed):
        found = f"npz:{path}: {in_words(unpacked)} in {in_words(packed)}"
        raise InputError("data", found, f"at most {_MOST_INFLATED} times the compressed size")
    return {name: arrays[name] for name in names}


def _sizes(arrays: NpzFile, name: str) -> tuple[int, int]:
    """Bytes of an array, as its header says, and of its part of the file."""
    archive = arrays.zip
    assert archive is not None  # it is not closed yet
    member = archive.getinfo(name if name in archive.namelist() else f"{name}.npy")
    with archive.open(member) as file:
        beginning = io.BytesIO(file.read(_LONGEST_HEADER))
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    shape, _, dtype = read[npy.read_magic(beginning)](beginning)
    size = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or min(shape, default=0) < 0 or size > member.file_size:
        raise ValueError(f"{name}: {dtype} {shape} in {member.file_size} bytes")
    return size, member.compress_size
