"""What nodes may be in a graph, by what they hear: checked where a graph is made."""

from collections.abc import Sequence

from ktg_jax.errors import InputError
from ktg_jax.graph.edge import Edge
from ktg_jax.graph.node import ENSEMBLE, LEARNING, RECORDED, Node
from ktg_jax.named_losses import named_loss

EdgeMatrix = Sequence[Sequence[Edge]]


def check_roles(nodes: Sequence[Node], edges: EdgeMatrix, frozen: Sequence[int]) -> None:
    """Checks what each node is against what it hears, and what others hear of it.

    Args:
        nodes: checked nodes.
        edges: N x N, [receiver][sender].
        frozen: indices of the nodes that never learn.

    Raises:
        InputError: a target that hears nothing and is no ensemble, a frozen node with a prior or
            with options of learning, a node of other classes that is
            the target or hears the label, a recorded node that hears something, stages that are
            asked of a node without, or an ensemble that is heard late.
    """
    if nodes[0].kind != ENSEMBLE and not any(edge.carries for edge in edges[0]):
        gates = [edge.gate for edge in edges[0]]
        allowed = "at least one gate of the target (row 0) that is not cutoff"
        raise InputError("gates[0]", gates, allowed)
    for i, node in enumerate(nodes):
        if i in frozen and node.prior is not None:
            allowed = "no prior: all gates of the node are cutoff, it never learns"
            raise InputError(f"nodes[{i}].prior", node.prior, allowed)
        for field in LEARNING:
            if i in frozen and getattr(node, field) is not None:
                allowed = "null: all gates of the node are cutoff, it never learns"
                raise InputError(f"nodes[{i}].{field}", getattr(node, field), allowed)
        if node.classes is not None:
            _check_classes(i, node, edges)
        if i not in frozen and node.kind == RECORDED:
            allowed = "cutoff alone: the node is recorded, it never learns"
            raise InputError(f"gates[{i}]", [edge.gate for edge in edges[i]], allowed)
        if node.kind in (RECORDED, ENSEMBLE):
            _check_no_stages(i, node, edges)
        if node.kind == ENSEMBLE:
            _check_no_delay(i, node, edges)


def _check_no_delay(sender: int, node: Node, edges: EdgeMatrix) -> None:
    """Raises InputError where an edge hears an ensemble late."""
    for t, row in enumerate(edges):
        if row[sender].delay:
            allowed = f"0: node {node.name} is an ensemble; its members may be heard late"
            raise InputError(f"gates[{t}][{sender}].delay", row[sender].delay, allowed)


def _check_classes(i: int, node: Node, edges: EdgeMatrix) -> None:
    """Raises InputError where a node of other classes is the target, or hears the label."""
    if i == 0:
        raise InputError("nodes[0].classes", node.classes, "null: the target has the data's")
    if edges[i][i].carries:
        allowed = f"cutoff: node {node.name} has other classes than the data (classes)"
        raise InputError(f"gates[{i}][{i}]", edges[i][i].gate, allowed)


def _check_no_stages(sender: int, node: Node, edges: EdgeMatrix) -> None:
    """Raises InputError where an edge compares stages of a node that has none."""
    for t, row in enumerate(edges):
        for loss in row[sender].losses if t != sender and row[sender].carries else ():
            if named_loss(loss).needs_stages:
                what = "recorded" if node.kind == RECORDED else "an ensemble"
                allowed = f"losses on logits: node {node.name} is {what}, without stages"
                raise InputError(f"gates[{t}][{sender}].loss", loss, allowed)
