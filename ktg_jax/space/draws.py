"""Drawing a graph's choices: uniformly, by roles first, or by changing another graph a little."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ktg_jax.errors import InputError
from ktg_jax.space.parts import Parts, gate_name, hears, kind_name

Parameters = dict[str, Any]

DRAWS = ("roles", "uniform")
"""Ways to draw a graph."""

ABSENT, LEARNING, FROZEN = "absent", "learning", "frozen"
"""What a node beside the target may be: heard by nobody, taught, or only heard."""


def drawn(space: Parts, rng: np.random.Generator, how: str) -> Parameters:
    """The choices of a graph, drawn in one of `DRAWS`.

    Raises:
        InputError: another way to draw.
    """
    if how not in DRAWS:
        raise InputError("draw", how, ", ".join(DRAWS))
    return by_roles(space, rng) if how == "roles" else uniform(space, rng)


def uniform(space: Parts, rng: np.random.Generator) -> Parameters:
    """Each choice uniformly, until the target hears somebody; a teacher hears nobody."""
    return repaired(space, independent(space.choices(), rng), {}, rng)


def independent(choices: Mapping[str, tuple[Any, ...]], rng: np.random.Generator) -> Parameters:
    """Makes each choice uniformly and independently."""
    return {name: allowed[rng.integers(len(allowed))] for name, allowed in choices.items()}


def repaired(
    space: Parts, parameters: Parameters, given: Mapping[str, Any], rng: np.random.Generator
) -> Parameters:
    """The parameters and the given ones, made valid as far as nothing is given.

    Gates of teachers are closed. Rows are independent, so drawing the target's free gates anew
    until it hears somebody leaves every valid graph as likely as it was.
    """
    made = parameters | {name: given[name] for name in parameters if name in given}
    nodes = range(space.num_nodes)
    for i in nodes[1:]:
        if space.is_teacher(made[kind_name(i)]):
            made |= {name: "cutoff" for s in nodes if (name := gate_name(i, s)) not in given}
    row = (gate_name(0, s) for s in nodes)
    free = dict.fromkeys((name for name in row if name not in given), space.gates)
    while free and not hears(made, 0, space.num_nodes):
        made |= independent(free, rng)
    return made


def by_roles(space: Parts, rng: np.random.Generator) -> Parameters:
    """First each node's role, uniformly; then what it is; then the gates between those there.

    Every node that is not absent is heard on a way to the target. Choices that make no difference
    are the first of those allowed, so that graphs that agree in the others are the same.
    """
    roles = {i: _drawn_role(space, rng) for i in range(1, space.num_nodes)}
    made = {name: allowed[0] for name, allowed in space.choices().items()}
    for i, (_, kind) in roles.items():
        made[kind_name(i)] = kind
    return _with_gates(space, made, {i: role for i, (role, _) in roles.items()}, rng)


def mutated(space: Parts, parameters: Parameters, rng: np.random.Generator) -> Parameters:
    """A graph that differs a little: by a gate, by what a node is, or by another choice.

    Args:
        space: of graphs.
        parameters: of a valid graph of the space.
        rng: a NumPy generator, which is advanced.

    Returns:
        The parameters of a valid graph, perhaps of an equivalent one.
    """
    changes: list[Callable[..., Parameters | None]] = [_with_another_gate]
    if space.num_nodes > 1:
        changes.append(_with_another_node)
    if _shared_choices(space):
        changes.append(_with_another_choice)
    while True:
        change = changes[rng.integers(len(changes))]
        made = change(space, dict(parameters), rng)
        if made is not None:
            return made


def roles_of(space: Parts, parameters: Mapping[str, Any]) -> dict[int, str]:
    """What each node beside the target is.

    >>> from ktg_jax.space.space import SearchSpace
    >>> space = SearchSpace(3, "cnn", ("cnn",))
    >>> given = {"gate.0.0": "through", "gate.0.1": "linear"}
    >>> gates = {name: "cutoff" for name in space.choices() if "gate" in name} | given
    >>> roles_of(space, gates)
    {1: 'frozen', 2: 'absent'}
    """
    nodes = range(space.num_nodes)
    needed = _needed(parameters, space.num_nodes)
    return {
        i: ABSENT if i not in needed else LEARNING if hears(parameters, i, len(nodes)) else FROZEN
        for i in nodes[1:]
    }


def _drawn_role(space: Parts, rng: np.random.Generator) -> tuple[str, str]:
    """A role, and what the node of that role is."""
    kinds: dict[str, tuple[str, ...]] = {LEARNING: space.candidates}
    if "cutoff" in space.gates:
        kinds |= {ABSENT: space.kinds[:1], FROZEN: space.kinds}
    possible = sorted(role for role, some in kinds.items() if some)
    role = possible[rng.integers(len(possible))]
    return role, kinds[role][rng.integers(len(kinds[role]))]


def _with_gates(
    space: Parts, made: Parameters, roles: Mapping[int, str], rng: np.random.Generator
) -> Parameters:
    """Draws all that is chosen for the nodes of these roles, until each has its role."""
    nodes = [0, *(i for i, role in roles.items() if role != ABSENT)]
    choices = space.choices()
    closed = {name: "cutoff" for name in choices if name.startswith("gate.")}
    learning = [t for t in nodes if t == 0 or roles[t] == LEARNING]
    free = [f"{t}.{s}" for t in learning for s in nodes]
    names = [name for name in choices if name.partition(".")[2] in free]
    if len(nodes) > 1:
        names.append("temperature")
    while True:
        made |= closed if "cutoff" in space.gates else {}
        made |= independent({name: choices[name] for name in names}, rng)
        if roles_of(space, made) == dict(roles) and hears(made, 0, space.num_nodes):
            return _settled(space, made)


def _settled(space: Parts, made: Parameters) -> Parameters:
    """The same graph, but for choices that make no difference: these are the first allowed.

    Gates to and from nodes that the target does not need are closed where gates can be.
    """
    choices = space.choices()
    needed = _needed(made, space.num_nodes)
    for name, allowed in choices.items():
        what, _, edge = name.partition(".")
        ends = [int(end) for end in edge.split(".")] if edge.replace(".", "").isdigit() else []
        if not ends:
            continue
        is_gate = what == "gate"
        if not needed.issuperset(ends):
            made[name] = "cutoff" if is_gate and "cutoff" in allowed else made[name]
        if not is_gate and made[gate_name(*ends)] == "cutoff":
            made[name] = allowed[0]
    for i in range(1, space.num_nodes):
        if i not in needed:
            made[kind_name(i)] = space.kinds[0]
    if len(needed) == 1:
        made["temperature"] = choices["temperature"][0]
    return made


def _with_another_gate(
    space: Parts, made: Parameters, rng: np.random.Generator
) -> Parameters | None:
    roles = roles_of(space, made)
    present = [0, *(i for i, role in roles.items() if role != ABSENT)]
    learning = [i for i in present if i == 0 or roles[i] == LEARNING]
    receiver, sender = rng.choice(learning), rng.choice(present)
    made[gate_name(receiver, sender)] = space.gates[rng.integers(len(space.gates))]
    return _settled(space, made) if hears(made, 0, space.num_nodes) else None


def _with_another_node(
    space: Parts, made: Parameters, rng: np.random.Generator
) -> Parameters | None:
    """Another kind in the same place, or another role and gates for all that the node hears."""
    roles = roles_of(space, made)
    node = int(rng.integers(1, space.num_nodes))
    role, kind = _drawn_role(space, rng)
    made[kind_name(node)] = kind
    if role != roles[node]:
        return _with_gates(space, made, roles | {node: role}, rng)
    return _settled(space, made)


def _with_another_choice(space: Parts, made: Parameters, rng: np.random.Generator) -> Parameters:
    shared = _shared_choices(space)
    name = list(shared)[rng.integers(len(shared))]
    made[name] = shared[name][rng.integers(len(shared[name]))]
    return _settled(space, made)


def _shared_choices(space: Parts) -> dict[str, tuple[Any, ...]]:
    """What is chosen beside kinds and gates."""
    return {
        name: allowed
        for name, allowed in space.choices().items()
        if len(allowed) > 1 and not name.startswith(("gate.", "node"))
    }


def _needed(parameters: Mapping[str, Any], num_nodes: int) -> set[int]:
    """The nodes from which open gates lead to the target, and the target."""
    needed, to_visit = set(), {0}
    while to_visit:
        receiver = to_visit.pop()
        needed.add(receiver)
        heard = (s for s in range(num_nodes) if parameters[gate_name(receiver, s)] != "cutoff")
        to_visit |= set(heard) - needed
    return needed
