"""Locks of files, by which processes take turns; they end with the process that has them."""

import errno
import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ktg_jax.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_logger = logging.getLogger(__name__)
_BUSY = (errno.EAGAIN, errno.EACCES)
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def check_platform() -> None:
    """Raises InputError where the operating system has no locks of files."""
    if fcntl is None:
        raise InputError("platform", sys.platform, "Linux or macOS; on Windows, within WSL")


def lock(file: IO[Any], wait: bool) -> bool:
    """Locks an open file until it is closed.

    Args:
        file: on which the lock is.
        wait: until no other process has it; otherwise it is tried once.

    Returns:
        False: another process has it.

    Raises:
        InputError: an operating system without such locks.
        OSError: a file system without them, and whatever else fails.
    """
    check_platform()
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if not wait and error.errno in _BUSY:
            return False
        raise
    return True


def lock_if_possible(file: IO[Any], wait: bool) -> bool:
    """As `lock`, but where the file system has no locks it goes on with a warning."""
    try:
        return lock(file, wait)
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        _warn(file.name, error.strerror)
        return True


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Within it no other process makes the same: waits for the lock of a file of this name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        lock_if_possible(file, wait=True)
        yield


@functools.cache
def _warn(name: str, reason: str) -> None:
    _logger.warning(
        "%s cannot be locked (%s): see to it that no other process works there", name, reason
    )
