"""The teachers of a space: nodes that are trained already, checked."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ktg_jax.choices import distinct
from ktg_jax.errors import InputError
from ktg_jax.graph.node import Node
from ktg_jax.graph.node_checks import checked_node, node_from_json

_ALLOWED_KINDS = ("network", "recorded")


def checked_teachers(
    teachers: Any, candidates: Sequence[str], gates: Sequence[str]
) -> tuple[Node, ...]:
    """The teachers as nodes, each of another network and by another name.

    Args:
        teachers: nodes, or what JSON has of them.
        candidates: the models that a node may be beside them.
        gates: of the space.

    Raises:
        InputError: names the first that is wrong.
    """
    listed = [
        teacher if isinstance(teacher, Node) else node_from_json(f"teachers[{i}]", teacher)
        for i, teacher in enumerate(distinct("teachers", teachers))
    ]
    if listed and "cutoff" not in gates:
        allowed = "cutoff among them: all gates of a teacher are"
        raise InputError("gates", list(gates), allowed)
    checked: list[Node] = []
    for i, teacher in enumerate(listed):
        where = f"teachers[{i}]"
        teacher = checked_node(where, teacher, i)
        if teacher.kind not in _ALLOWED_KINDS or not (teacher.weights or teacher.outputs):
            raise InputError(where, teacher.to_dict(), "a node with weights or outputs")
        names = [*candidates, *(str(other.name) for other in checked)]
        if teacher.name in names:
            allowed = f"a name other than {', '.join(names)}"
            raise InputError(f"{where}.name", teacher.name, allowed)
        for other in checked:
            if same_network(teacher, other):
                raise InputError(where, teacher.name, f"each network once: it is {other.name}")
        checked.append(teacher)
    return tuple(checked)


def same_network(node: Node, other: Node) -> bool:
    """Whether two nodes are the same but for their names.

    >>> same_network(Node("cnn", "a", weights="runs/a"), Node("cnn", "b", weights="runs/a"))
    True
    """
    return dataclasses.replace(node, name=None) == dataclasses.replace(other, name=None)
