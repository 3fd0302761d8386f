"""How many graphs a space has."""

from ktg_jax.errors import InputError
from ktg_jax.space.parts import Parts


def valid(space: Parts, of_edge: int) -> int:
    """The number of valid graphs.

    Args:
        space: of graphs.
        of_edge: in how many ways a transfer edge may be, its gate apart.
    """
    nodes, num_gates = space.num_nodes, len(space.gates)
    target_row = (num_gates**nodes - ("cutoff" in space.gates)) * of_edge ** (nodes - 1)
    teachers = len(space.kinds) - len(space.candidates)
    row = (len(space.candidates) * num_gates**nodes + teachers) * of_edge ** (nodes - 1)
    return target_row * row ** (nodes - 1) * len(space.temperatures)


def classes(space: Parts) -> int:
    """The number of canonical graphs, counted by the number of nodes that they keep.

    Any graph of fewer nodes, all of them needed, is what is left of one of N nodes if edges can be
    cut; if not, all nodes are always needed. Numbering the nodes beside the target matters only for
    two of them: the graphs that a swap leaves alone are counted twice, and then all are halved
    (Burnside's lemma). Two frozen nodes of one model are one network, which the target hears
    through the sum of two gates; one sum is a gate itself.

    Raises:
        InputError: more than 3 nodes, or teachers.
    """
    if space.num_nodes > 3:
        raise InputError("num_nodes", space.num_nodes, "1 to 3, to count equivalent graphs")
    if teachers := [kind for kind in space.kinds if space.is_teacher(kind)]:
        raise InputError("teachers", teachers, "none, to count equivalent graphs")
    models, temperatures = len(space.candidates), len(space.temperatures)
    gates, cut = len(space.gates), int("cutoff" in space.gates)
    open_gates = gates - cut
    # On a label edge correct is through.
    labels = len({"through" if gate == "correct" else gate for gate in space.gates})
    one = labels - cut
    two = models * labels**2 * open_gates * gates
    # The target hears both others, or one of them, which hears the other.
    wirings = open_gates**2 * gates**4 + 2 * cut * open_gates**2 * gates**3
    numbered = models**2 * labels**3 * wirings
    unmoved_by_swap = models * labels**2 * open_gates * gates**2
    three = (numbered + unmoved_by_swap) // 2
    if cut and {"linear", "negative_linear", "through"} <= set(space.gates):
        three -= models * labels
    kept = [one, temperatures * two, temperatures * three][: space.num_nodes]
    return sum(kept) if cut else kept[-1]
