"""What fits into the memory of the machine, told before it is taken."""

import math
import os
from pathlib import Path

import numpy as np

from ktg_jax.errors import InputError

_CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def empty(field: str, value: object, shape: tuple[int, ...]) -> np.ndarray:
    """An uninitialised uint8 array; one that does not fit in memory is an InputError of `field`."""
    size = math.prod(shape)
    check_fits(field, value, size)
    try:
        return np.empty(shape, np.uint8)
    except MemoryError as error:  # where the process has a limit of its own
        raise InputError(field, value, f"what fits in memory ({in_words(size)})") from error


def check_fits(field: str, value: object, size: int) -> None:
    """Raises InputError where so many bytes are more than the machine's memory.

    Args:
        field: that asks for them.
        value: the field's value.
        size: in bytes.
    """
    memory = machine_memory()
    if memory is not None and size > memory:
        allowed = f"what fits in memory ({in_words(size)} are needed of {in_words(memory)})"
        raise InputError(field, value, allowed)


def machine_memory() -> int | None:
    """Bytes of the machine's memory, or of its container's where that has less; None: unknown."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on every system
        return None
    for path in _CONTAINER_LIMITS:
        try:
            memory = min(memory, int(path.read_text()))
        except (OSError, ValueError):  # not in a container, or "max"
            continue
    return memory


def in_words(size: int) -> str:
    """A number of bytes, for messages.

    >>> in_words(5 * 2**20), in_words(3 * 2**30)
    ('5.0 MiB', '3.0 GiB')
    """
    mebibytes = size / 2**20
    return f"{mebibytes:.1f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.1f} GiB"
