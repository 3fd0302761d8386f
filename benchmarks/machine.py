"""The machine that a measurement was made on."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
_LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "torch")


def machine() -> dict[str, Any]:
    """What it is, what runs on it, and how busy it is.

    Returns:
        `cpu` (the model's name), `cores` (that this process may use), `flags` (of the vector
        instructions), `memory_gb`, `load` (averages over 1, 5 and 15 minutes), `platform`, and
        `versions`; a library that is not installed has None.
    """
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    flags = _cpu("flags").split()
    return {
        "cpu": _cpu("model name") or platform.processor(),
        "cores": cores(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "memory_gb": round(pages / 2**30, 1),
        "load": [round(load, 2) for load in os.getloadavg()],
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | {x: _version(x) for x in _LIBRARIES},
    }


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _cpu(field: str) -> str:
    """A field of the first processor; empty where there is none."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.is_file() else ():
        key, _, value = line.partition(":")
        if key.strip() == field:
            return value.strip()
    return ""


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
