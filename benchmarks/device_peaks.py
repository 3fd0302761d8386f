"""What a device can do at most, and how busy a program keeps it."""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.agreement import precision_of

_REPEATS = 10
_NAMED = 12


def peaks(device: jax.Device) -> dict[str, float]:
    """The best of matrix products and of copies through memory.

    Returns:
        FLOP/s of a square product of random numbers by precision, `float32`, `tf32` (where the
        device is no CPU) and `bfloat16`; and `memory`, bytes per second, read and written.
    """
    on_cpu = device.platform == "cpu"
    size, numbers = (1024, 2**24) if on_cpu else (8192, 2**28)
    found = {}
    with jax.default_device(device):
        for name in ("float32", "bfloat16") if on_cpu else ("float32", "tf32", "bfloat16"):
            dtype = jnp.bfloat16 if name == "bfloat16" else jnp.float32
            a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
            with precision_of("float32" if name == "float32" else "default"):
                multiply = jax.jit(jnp.matmul).lower(a, b).compile()
            found[name] = 2 * size**3 / _best_seconds(multiply, a, b)
        numbers_ = jax.random.normal(jax.random.key(0), (numbers,))
        copy = jax.jit(lambda x: -x).lower(numbers_).compile()
        found["memory"] = 2 * numbers_.nbytes / _best_seconds(copy, numbers_)
    return found


def _best_seconds(function: Callable[..., jax.Array], *inputs: jax.Array) -> float:
    """The least of some runs, several calls each: a call's own start is not to count."""
    times = []
    for _ in range(3):
        jax.block_until_ready(function(*inputs))
        begin = time.perf_counter()
        for _ in range(_REPEATS):
            result = function(*inputs)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - begin) / _REPEATS)
    return min(times)


class Occupation(NamedTuple):
    """How busy a device was.

    Attributes:
        busy: the share of the time, from the first operation to the last, in which one ran.
        operations: how many ran.
        longest: names of those that took longest together, each with its share of all operations.
    """

    busy: float
    operations: int
    longest: dict[str, float]


def occupation(run: Callable[[], Any]) -> Occupation | None:
    """Records what the first GPU does while a function runs, which waits for its results.

    Returns:
        None where the profiler shows no device, as on CPUs.
    """
    if not hasattr(jax.profiler, "ProfileData"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        events = [
            (event.start_ns, event.start_ns + event.duration_ns, event.name)
            for path in Path(folder).rglob("*.xplane.pb")
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes
            if plane.name.startswith("/device:GPU:0")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    return _occupation(events) if events else None


def _occupation(events: Sequence[tuple[float, float, str]]) -> Occupation:
    """Of the times at which operations began and ended, and their names.

    >>> _occupation([(0, 2, "a"), (1, 3, "b"), (5, 10, "a")])
    Occupation(busy=0.8, operations=3, longest={'a': 0.778, 'b': 0.222})
    """
    begin = end = min(start for start, _, _ in events)
    busy = 0.0
    of_name: dict[str, float] = defaultdict(float)
    for start, stop, name in sorted(events):
        busy += max(stop - max(start, end), 0.0)
        end = max(end, stop)
        of_name[name] += stop - start
    total, most = sum(of_name.values()), sorted(of_name, key=lambda name: -of_name[name])[:_NAMED]
    longest = {name: round(of_name[name] / total, 3) for name in most}
    return Occupation(busy / (end - begin), len(events), longest)
