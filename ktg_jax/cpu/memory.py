"""Memory that a process keeps between steps."""

import ctypes
import sys

# Of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory for the next step instead of returning it to the system.

    XLA allocates a step's activations anew in every step; with glibc's defaults each page of them
    is mapped, zeroed and unmapped every time, which can take a quarter of a training step. Call it
    before JAX's first computation: threads that already allocate keep their ways. The process's
    memory stays at its peak.

    Returns:
        Whether the C library has taken the setting (only glibc, on Linux, has it).
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # One arena: those of single threads cannot grow beyond 64 MiB, and map larger blocks.
    settings = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 * 2**20}
    taken = [mallopt(name, value) == 1 for name, value in settings.items()]
    return all(taken)
