"""Sequences of what graphs are chosen from, checked: each raises InputError for what is wrong."""

from collections.abc import Iterable, Mapping
from typing import Any

from ktg_jax.errors import InputError
from ktg_jax.gates import GATES
from ktg_jax.graph.edge import Edge, checked_edge
from ktg_jax.graph.node_checks import checked_number, checked_temperature


def distinct(field: str, values: Any) -> tuple[Any, ...]:
    """The values as a tuple, none of them twice."""
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise InputError(field, values, "a sequence")
    listed = tuple(values)
    for i, value in enumerate(listed):
        if value in listed[:i]:
            raise InputError(f"{field}[{i}]", value, "each value once")
    return listed


def checked_gates(gates: Any) -> tuple[str, ...]:
    """Names of gates, not all of them `cutoff`."""
    listed = distinct("gates", gates)
    for i, gate in enumerate(listed):
        if not isinstance(gate, str) or gate not in GATES:
            raise InputError(f"gates[{i}]", gate, ", ".join(GATES))
    if not set(listed) - {"cutoff"}:
        raise InputError("gates", list(listed), "at least one gate that is not cutoff")
    return listed


def checked_temperatures(field: str, temperatures: Any, least: int) -> tuple[float, ...]:
    """Temperatures that a graph may have, so many at least."""
    listed = distinct(field, temperatures)
    if len(listed) < least:
        raise InputError(field, [], "at least one finite number above 0")
    return tuple(checked_temperature(f"{field}[{i}]", t) for i, t in enumerate(listed))


def checked_weights(weights: Any) -> tuple[float, ...]:
    """Weights that an edge may have, at least one."""
    listed = distinct("weights", weights)
    if not listed:
        raise InputError("weights", [], "at least one number")
    return tuple(checked_number(f"weights[{i}]", weight) for i, weight in enumerate(listed))


def checked_losses(losses: Any) -> tuple[str | Mapping[str, float], ...]:
    """Losses that a transfer edge may carry, at least one."""
    listed = distinct("losses", losses)
    if not listed:
        raise InputError("losses", [], "at least one loss")
    written = (
        checked_edge(f"losses[{i}]", Edge(loss=loss), on_label=False).loss
        for i, loss in enumerate(listed)
    )
    return distinct("losses", written)
