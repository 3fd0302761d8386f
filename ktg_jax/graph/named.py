"""Named methods as graphs (KTG, section 3.3): hand-designed knowledge transfer, for comparison."""

from collections.abc import Callable, Sequence

from ktg_jax.errors import InputError
from ktg_jax.graph.graph import Graph
from ktg_jax.graph.node import Node
from ktg_jax.graph.node_checks import check_number_of_nodes

Model = Node | str
GateOf = Callable[[int, int], bool]


def independent(models: Sequence[Model]) -> Graph:
    """Every node learns from the label alone.

    Args:
        models: N nodes, or names of models, the target first; at most 100.

    Returns:
        A graph whose gates `[N, N]` are through on the diagonal and cutoff elsewhere.

    Raises:
        InputError: no nodes, too many, or what is neither a node nor a model's name.

    >>> independent(["resnet32", "resnet32"]).gates
    (('through', 'cutoff'), ('cutoff', 'through'))
    """
    return _graph(models, lambda receiver, sender: receiver == sender)


def mutual(models: Sequence[Model], temperature: float = 1.0) -> Graph:
    """Deep mutual learning (DML): every gate is through.

    Args:
        models: N nodes, or names of models, the target first; at most 100.
        temperature: T > 0 of the transfer edges.

    Returns:
        A graph whose gates `[N, N]` are all through.

    Raises:
        InputError: as `independent`, or a temperature that no graph may have.

    >>> mutual(["resnet32", "resnet32"]).gates
    (('through', 'through'), ('through', 'through'))
    """
    return _graph(models, lambda receiver, sender: True, temperature)


def distillation(
    student: Model, teachers: Model | Sequence[Model], temperature: float = 1.0
) -> Graph:
    """Knowledge distillation: frozen teachers, a through edge from each, and the label edge.

    Training it needs the teachers' weights (`Node.weights`).

    Args:
        student: the target.
        teachers: N - 1 nodes, or names of models, at least one; or one alone.
        temperature: T > 0 of the transfer edges.

    Returns:
        A graph whose gates `[N, N]` are through in the student's row and cutoff in the others.

    Raises:
        InputError: no teachers, and as `mutual`.

    >>> distillation("resnet8", "resnet32").gates
    (('through', 'through'), ('cutoff', 'cutoff'))
    """
    listed = [teachers] if isinstance(teachers, Node | str) else list(teachers)
    if not listed:
        raise InputError("teachers", listed, "at least one node")
    return _graph([student, *listed], lambda receiver, sender: receiver == 0, temperature)


def chain(models: Sequence[Model], temperature: float = 1.0) -> Graph:
    """Teacher assistants: each node learns from the label and from the next node.

    Args:
        models: N nodes, or names of models, the target first; at most 100.
        temperature: T > 0 of the transfer edges.

    Returns:
        A graph whose gates `[N, N]` are through on the diagonal and right of it, else cutoff.

    Raises:
        InputError: as `mutual`.

    >>> chain(["resnet8", "resnet20", "resnet32"]).gates[1]
    ('cutoff', 'through', 'through')
    """
    return _graph(models, lambda receiver, sender: sender in (receiver, receiver + 1), temperature)


def _graph(models: Sequence[Model], is_through: GateOf, temperature: float = 1.0) -> Graph:
    if isinstance(models, Node | str):
        raise InputError("models", models, "a sequence of nodes or model names")
    n = len(models)
    check_number_of_nodes(n)
    gates = [["through" if is_through(t, s) else "cutoff" for s in range(n)] for t in range(n)]
    nodes = tuple(Node(model) if isinstance(model, str) else model for model in models)
    return Graph(nodes, tuple(tuple(row) for row in gates), temperature)
