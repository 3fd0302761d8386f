"""What is decoded once and kept on disk, and how far the decoding is."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ktg_jax.errors import InputError
from ktg_jax.io.files import atomic_path, cache_folder

_logger = logging.getLogger(__name__)
T = TypeVar("T")

_CHUNK = 250  # images between two reports of progress

OnProgress = Callable[[str, int, int], object]
"""Is told what is read, how many of its images are, and how many there are."""


def cached(
    key: str,
    files: Iterable[Path],
    make: Callable[[], Mapping[str, np.ndarray]],
    use: Callable[[Mapping[str, np.ndarray]], T],
    cache_dir: str | os.PathLike[str] | None = None,
) -> T:
    """Makes arrays of files once, and reads them from the cache from then on.

    The cache is one uncompressed npz file: its checksums tell a damaged one, which is made again.
    A folder that cannot be written costs the caching, not the data.

    Args:
        key: data set, version and split, as in `cifar10-3.0.2-train`.
        files: what they are made of; a change of path, size or modification time makes a new entry.
        make: makes the arrays, by their names.
        use: what is made of the arrays; what it raises of cached ones tells that they are damaged.
        cache_dir: see `cache_folder`.

    Raises:
        InputError: one of the files is not there, and whatever `make` and `use` raise.
    """
    path = cache_folder(cache_dir) / f"{key}-{_fingerprint(files)}.npz"
    try:
        # opened here, as numpy.load leaves a damaged file open
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return use(arrays)
    except FileNotFoundError:
        pass
    except Exception as error:  # damage shows itself in many types
        _logger.warning("%s cannot be used (%s): decoding again", path, error)
    made = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            np.savez(temporary, **dict[str, Any](made))
    except OSError as error:
        _logger.warning("%s cannot be written (%s): decoded anew every time", path, error)
    return use(made)


def in_chunks(
    work: Callable[[range], None], count: int, what: str, on_progress: OnProgress | None
) -> None:
    """Calls `work` with ranges that cover 0 to `count`, and tells `on_progress` of each."""
    for start in range(0, count, _CHUNK):
        end = min(start + _CHUNK, count)
        work(range(start, end))
        if on_progress is not None:
            on_progress(what, end, count)


def _fingerprint(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise InputError("data_dir", str(file), "a data set with this file") from error
        digest.update(f"{file.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
