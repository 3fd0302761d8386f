"""Several processes that train together, each with devices of its own (`jax.distributed`).

All run the same program, in step. What only one of them is to do, such as writing files, the first
does; what comes of it the others are told.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ktg_jax.errors import InputError, RunError, shown
from ktg_jax.io.trees import flatten, unflatten


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_seconds: int = 300,
    silence_seconds: int = 30,
) -> None:
    """Joins this process to the others, before JAX computes anything.

    Args:
        coordinator: `HOST:PORT` where process 0 listens; None: what the launcher's environment says
            (Slurm, Open MPI, Kubernetes, a TPU pod).
        num_processes: of all; None likewise.
        process_id: 0 to num_processes - 1; None likewise.
        start_seconds: for how long the others are waited for.
        silence_seconds: after so long without a sign of life a process is given up, and all end.

    Raises:
        InputError: a value that cannot be, or the others cannot be reached.
    """
    _check(coordinator, num_processes, process_id)
    # It would take SIGTERM away from the program, which asks the others by itself.
    jax.config.update("jax_enable_preemption_service", False)
    how: dict[str, Any] = {} if coordinator is None else {"cluster_detection_method": "deactivate"}
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=start_seconds,
            heartbeat_timeout_seconds=silence_seconds,
            **how,
        )
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if coordinator is None:
            allowed = f"a launcher that says who takes part, or a coordinator ({reason})"
            raise InputError("distributed", True, allowed) from None
        allowed = f"the address of process 0, which all processes reach ({reason})"
        raise InputError("coordinator", coordinator, allowed) from None


def _check(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    if coordinator is None:
        for field, value in (("num_processes", num_processes), ("process_id", process_id)):
            if value is not None:
                raise InputError(field, value, "given together with coordinator")
        return
    _, colon, port = coordinator.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError("coordinator", coordinator, "HOST:PORT, the port from 1 to 65,535")
    if num_processes is None or num_processes < 1:
        raise InputError("num_processes", num_processes, "at least 1, together with coordinator")
    if process_id is None or not 0 <= process_id < num_processes:
        allowed = f"0 to {num_processes - 1}, another one for each process"
        raise InputError("process_id", process_id, allowed)


def is_first() -> bool:
    """Whether this process is the one that writes and speaks, as a single one always is.

    >>> is_first()
    True
    """
    return jax.process_index() == 0


def by_first(make: Callable[[], Any]) -> Any:
    """What the first process makes: JSON. The others wait for it, and raise what it raises.

    Raises:
        InputError: the first process raised it; `RunError` likewise.

    >>> by_first(lambda: [1, 2])
    [1, 2]
    """
    if jax.process_count() == 1:
        return make()
    failed: InputError | RunError | None = None
    told: dict[str, Any] = {}
    if is_first():
        try:
            told = {"made": make()}
        except (InputError, RunError) as error:
            failed = error
            told = {"error": [str(error), isinstance(error, InputError)]}
            if isinstance(error, InputError):
                told["fields"] = [error.field, shown(error.value), error.allowed]
    told = json.loads(_text_of_first(json.dumps(told)))
    if failed is not None:
        raise failed
    if "error" in told:
        text, is_input = told["error"]
        if not is_input:
            raise RunError(text)
        field, value, allowed = told["fields"]
        raise InputError(field, _Shown(value), allowed)
    return told["made"]


class _Shown:
    """A value of another process, of which the text is known."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def shared(tree: Any) -> Any:
    """The first process's values in a tree of arrays of the same structure in all of them.

    >>> shared({"a": np.ones(2)})["a"].tolist()
    [1.0, 1.0]
    """
    if jax.process_count() == 1:
        return tree
    flat = multihost_utils.broadcast_one_to_all(flatten(tree))
    return unflatten(tree, {path: np.asarray(value) for path, value in flat.items()}, "state")


def of_process(tree: Any, process: int, shapes: Any) -> Any:
    """A process's values in a tree of arrays, on the host of every process.

    Args:
        tree: its arrays; in other processes anything.
        process: whose.
        shapes: the tree's structure, shapes and dtypes.

    >>> of_process({"a": np.ones(2)}, 0, {"a": jax.ShapeDtypeStruct((2,), np.float32)})["a"].shape
    (2,)
    """
    is_mine = process == jax.process_index()
    flat = flatten(tree) if is_mine else flatten(_zeros(shapes))
    if jax.process_count() > 1:
        flat = multihost_utils.broadcast_one_to_all(flat, is_source=is_mine)
    return unflatten(shapes, {path: np.asarray(value) for path, value in flat.items()}, "state")


def _zeros(shapes: Any) -> Any:
    def zeros(leaf: Any) -> Any:
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return np.zeros(leaf.shape, leaf.dtype)
        return jnp.broadcast_to(jax.random.key(0), leaf.shape)

    return jax.tree.map(zeros, shapes)


def any_of(flag: bool) -> bool:
    """Whether it is true in any process; all have to ask.

    >>> any_of(False)
    False
    """
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def _text_of_first(text: str) -> str:
    """The first process's text."""
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    given = data if is_first() else np.zeros(size, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(given), np.uint8)).decode()
