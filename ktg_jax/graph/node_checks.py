"""What is checked of a node's description where a graph is made."""

import dataclasses
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

from ktg_jax.checks import check_not_negative, check_positive, check_share, is_number, is_whole
from ktg_jax.errors import InputError, did_you_mean
from ktg_jax.graph.node import (
    AVERAGE,
    COMBINED,
    ENSEMBLE,
    LEARNING,
    MATCHINGS,
    OPTIMIZERS,
    PRIOR_DEFAULTS,
    PRIOR_KINDS,
    RECORDED,
    SCHEDULES,
    Node,
)
from ktg_jax.inputs import checked_input
from ktg_jax.io.json_input import check_fields

NO_PRIOR = "nothing: the node has no prior"

MOST_NODES = 100
"""The most nodes of a graph; the published ones have up to 7."""

MOST_WEIGHT = 1e30
"""The largest weight of a loss."""

TEMPERATURES = 1e-15, 1e15
"""The lowest and the highest."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

_LONGEST_NAME = 255


def checked_nodes(nodes: Iterable[Node | str]) -> tuple[Node, ...]:
    """Checks the nodes and names those that have no name.

    Raises:
        InputError: names the first node and field that is wrong.
    """
    if isinstance(nodes, str) or not isinstance(nodes, Iterable):
        raise InputError("nodes", nodes, "a sequence of nodes")
    if isinstance(nodes, Sized):
        check_number_of_nodes(len(nodes))
    nodes = list(itertools.islice(nodes, MOST_NODES + 1))
    check_number_of_nodes(len(nodes))
    named: dict[str, Node] = {}
    for i, given in enumerate(nodes):
        node = checked_node(f"nodes[{i}]", given, i)
        if node.name in named:
            raise InputError(f"nodes[{i}].name", node.name, "a name that no other node has")
        named[str(node.name)] = node
    return tuple(named.values())


def checked_node(where: str, given: Any, index: int) -> Node:
    """The node, checked by itself; one without a name is named by its model and the index."""
    node = _with_checked_prior(where, _checked_node(where, given))
    name = f"{node.model}-{index}" if node.name is None else node.name
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        allowed = f"letters, digits, '_', '.' and '-', at most {_LONGEST_NAME}"
        raise InputError(f"{where}.name", name, allowed)
    return dataclasses.replace(node, name=name)


def check_number_of_nodes(number: int) -> None:
    """Raises InputError unless a graph can have so many nodes."""
    if number < 1:
        raise InputError("nodes", [], "at least one node")
    if number > MOST_NODES:
        raise InputError("nodes", number, f"at most {MOST_NODES} nodes")


def _checked_node(where: str, given: Any) -> Node:
    node = Node(given) if isinstance(given, str) else given
    if not isinstance(node, Node):
        raise InputError(where, given, "a Node or a model's name")
    if node.kind != "network":
        return _CHECKS[node.kind](where, node)
    _check_defaults(where, node, ("of", "decay"), "nothing but of ensembles and averages")
    if not isinstance(node.model, str) or node.model in ("", RECORDED, ENSEMBLE, AVERAGE):
        raise InputError(f"{where}.model", node.model, "a model's name")
    for field in ("weights", "prior"):
        value = getattr(node, field)
        if field == "weights" and value == "":
            continue  # another way to write that there are none
        if value is not None and not _is_path(value):
            raise InputError(f"{where}.{field}", value, "a path, or null")
    node = _with_checked_learning(where, node)
    if node.classes is not None and not is_whole(node.classes, least=1):
        raise InputError(f"{where}.classes", node.classes, "a whole number of at least 1, or null")
    if node.input is None:
        return node
    return dataclasses.replace(node, input=checked_input(f"{where}.input", node.input))


def _with_checked_learning(where: str, node: Node) -> Node:
    if node.optimizer not in (None, *OPTIMIZERS):
        allowed = f"{', '.join(OPTIMIZERS)}, or null" + did_you_mean(node.optimizer, OPTIMIZERS)
        raise InputError(f"{where}.optimizer", node.optimizer, allowed)
    changed: dict[str, Any] = {}
    for field, check in (("learning_rate", check_positive), ("clip", check_positive)):
        if (value := getattr(node, field)) is not None:
            check(f"{where}.{field}", value)
            changed[field] = float(value)
    if node.weight_decay is not None:
        changed["weight_decay"] = checked_number(f"{where}.weight_decay", node.weight_decay)
    patterns = node.trainable
    if patterns is not None:
        is_list = isinstance(patterns, Sequence) and not isinstance(patterns, str)
        if not is_list or not patterns or not all(isinstance(p, str) and p for p in patterns):
            allowed = "patterns of parameters' paths, at least one, or null"
            raise InputError(f"{where}.trainable", patterns, allowed)
        changed["trainable"] = tuple(patterns)
    return dataclasses.replace(node, **changed)


def _checked_recorded(where: str, node: Node) -> Node:
    if not _is_path(node.outputs):
        raise InputError(f"{where}.outputs", node.outputs, "the folder of a recording, or null")
    _check_alone(where, node, "outputs", "outputs")
    return node


def _checked_ensemble(where: str, node: Node) -> Node:
    members = node.ensemble
    is_list = isinstance(members, Sequence) and not isinstance(members, str)
    if not is_list or not members or not all(isinstance(name, str) for name in members):
        raise InputError(f"{where}.ensemble", members, "names of other nodes, at least one")
    if len(set(members)) < len(members):
        raise InputError(f"{where}.ensemble", list(members), "each node once")
    if node.of not in COMBINED:
        raise InputError(f"{where}.of", node.of, ", ".join(COMBINED))
    _check_alone(where, node, "ensemble", "ensemble", "of")
    return dataclasses.replace(node, model=ENSEMBLE, ensemble=tuple(members))


def _checked_average(where: str, node: Node) -> Node:
    if not isinstance(node.average, str):
        raise InputError(f"{where}.average", node.average, "the name of a node that learns")
    if not is_number(node.decay) or not 0 <= node.decay < 1:
        raise InputError(f"{where}.decay", node.decay, "a number of at least 0, below 1")
    _check_alone(where, node, "average", "average", "decay")
    return dataclasses.replace(node, model=AVERAGE, decay=float(node.decay))


def _check_alone(where: str, node: Node, kind: str, *own: str) -> None:
    """Raises InputError where a node that is no network has other fields than its own."""
    others = (f.name for f in dataclasses.fields(Node) if f.name not in ("name", "model", *own))
    _check_defaults(where, node, tuple(others), f"nothing beside {kind}")
    if node.model not in (RECORDED, ENSEMBLE, AVERAGE):
        raise InputError(f"{where}.model", node.model, f"nothing beside {kind}")


def _check_defaults(where: str, node: Node, fields: Sequence[str], allowed: str) -> None:
    for field in fields:
        if getattr(node, field) != getattr(Node, field):
            raise InputError(f"{where}.{field}", getattr(node, field), allowed)


_CHECKS = {
    RECORDED: _checked_recorded,
    ENSEMBLE: _checked_ensemble,
    AVERAGE: _checked_average,
}


def _is_path(value: Any) -> bool:
    """Whether a file could have this name."""
    try:
        return isinstance(value, str) and 0 < len(os.fsencode(value)) <= 4096 and "\0" not in value
    except UnicodeEncodeError:
        return False


def _with_checked_prior(where: str, node: Node) -> Node:
    if node.prior is None:
        for field, default in PRIOR_DEFAULTS.items():
            if getattr(node, field) != default:
                raise InputError(f"{where}.{field}", getattr(node, field), NO_PRIOR)
        return node
    weight = checked_number(f"{where}.prior_weight", node.prior_weight)
    check_share(f"{where}.prior_quantile", node.prior_quantile)
    named = {"schedule": SCHEDULES, "matching": MATCHINGS, "kind": PRIOR_KINDS}
    for option, names in named.items():
        if (value := getattr(node, f"prior_{option}")) not in names:
            raise InputError(f"{where}.prior_{option}", value, ", ".join(names))
    quantile = float(node.prior_quantile)
    return dataclasses.replace(node, prior_weight=weight, prior_quantile=quantile)


def checked_number(field: str, value: Any) -> float:
    """A weight: a finite number, not negative, and not so large that float32 cannot hold losses.

    Raises:
        InputError: it is something else.
    """
    check_not_negative(field, value)
    if value > MOST_WEIGHT:
        raise InputError(field, value, f"at most {MOST_WEIGHT:g}: float32 must hold the loss")
    return float(value)


def checked_temperature(field: str, value: Any) -> float:
    """A temperature: a number above 0 whose square, and what it divides, float32 can hold.

    Raises:
        InputError: it is something else.
    """
    check_positive(field, value)
    low, high = TEMPERATURES
    if not low <= value <= high:
        allowed = f"{low:g} to {high:g}: float32 must hold its square"
        raise InputError(field, value, allowed)
    return float(value)


def node_from_json(where: str, fields: Any) -> Node:
    """A node from JSON; options of a prior are refused where there is none, defaults or not."""
    network = {"weights", "prior", "input", "classes", *LEARNING, *PRIOR_DEFAULTS}
    for kind, options in (("outputs", ()), ("ensemble", ("of",)), ("average", ("decay",))):
        if isinstance(fields, Mapping) and fields.get(kind) is not None:
            check_fields(where, fields, required={kind}, optional={"name", *options})
            return Node(**fields)
    special = {"outputs", "ensemble", "average"}
    check_fields(where, fields, required={"model"}, optional={"name", *special, *network})
    if fields.get("prior") is None:
        for field in PRIOR_DEFAULTS:
            if field in fields:
                raise InputError(f"{where}.{field}", fields[field], NO_PRIOR)
    return Node(**fields)
