"""Decoded splits kept on disk, and how far the decoding of one is."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from ktg_jax.data.dataset import Split
from ktg_jax.errors import InputError
from ktg_jax.io.files import atomic_path, cache_folder

_logger = logging.getLogger(__name__)
_CHUNK = 250  # images between two reports of progress

OnProgress = Callable[[str, int, int], object]
"""Is told what is read, how many of its images are, and how many there are."""


def cached_split(
    key: str,
    files: Iterable[Path],
    decode: Callable[[], Split],
    cache_dir: str | os.PathLike[str] | None = None,
) -> Split:
    """Decodes a split once and reads it from the cache from then on.

    The cache is one uncompressed npz file per split: its checksums tell a damaged file, which is
    decoded again. A folder that cannot be written costs the caching, not the data.

    Args:
        key: data set, version and split, as in `cifar10-3.0.2-train`.
        files: what is decoded; a change of path, size or modification time makes a new entry.
        decode: reads the split from those files.
        cache_dir: see `cache_folder`.

    Raises:
        InputError: one of the files is not there, and whatever `decode` raises.
    """
    path = cache_folder(cache_dir) / f"{key}-{_fingerprint(files)}.npz"
    cached = _read(path)
    if cached is not None:
        return cached
    split = decode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            np.savez(temporary, images=split.images, labels=split.labels)
    except OSError as error:
        _logger.warning("%s cannot be written (%s): decoded anew every time", path, error)
    return split


def in_chunks(
    work: Callable[[range], None], count: int, what: str, on_progress: OnProgress | None
) -> None:
    """Calls `work` with ranges that cover 0 to `count`, and tells `on_progress` of each."""
    for start in range(0, count, _CHUNK):
        end = min(start + _CHUNK, count)
        work(range(start, end))
        if on_progress is not None:
            on_progress(what, end, count)


def _read(path: Path) -> Split | None:
    try:
        # opened here, as numpy.load leaves a damaged file open
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return Split(arrays["images"], arrays["labels"])
    except FileNotFoundError:
        return None
    except Exception as error:  # damage shows itself in many types
        _logger.warning("%s cannot be used (%s): decoding again", path, error)
        return None


def _fingerprint(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise InputError("data_dir", str(file), "a data set with this file") from error
        digest.update(f"{file.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
