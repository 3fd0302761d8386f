"""The graphs that people design by hand, which are the first trials of a search."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import ktg_jax as ktg
from ktg_jax.errors import InputError
from ktg_jax.space.parts import gate_name, kind_name

from .config import SearchConfig

INDEPENDENT, CONTROL, MUTUAL, DISTILLATION = "independent", "control", "mutual", "distillation"
"""The target alone; alone with a `linear` label edge, which is a schedule of the rate of learning
and no knowledge; all nodes learning from each other; frozen teachers."""

DESIGNED = "designed"
"""The best of all these in a search."""

_MANY = 2000
"""So many designed graphs are listed whatever the trials."""

_DRAWS = 200
"""Graphs that are drawn to find one that nobody designed."""

_LABELS = {"through": "", "linear": ", label linear", "cutoff": ", label cut"}
"""Gates of a student's label edge, and how they are told."""


def baselines(space: ktg.SearchSpace) -> dict[str, dict[str, Any]]:
    """The parameters of the designed graphs by name, as far as their gates are the space's.

    Distillation is from each multiset of up to N - 1 teachers, given ones or candidates trained
    alone, at each temperature, with the label through, linear and cut. Edges carry the first of the
    space's losses, at the first weight. Graphs that are equivalent are there once.

    >>> list(baselines(ktg.SearchSpace(2, "cnn", ("cnn",))))
    ['independent', 'control', 'mutual', 'distillation cnn', 'distillation cnn, label linear', \
'distillation cnn, label cut']
    """
    found: dict[ktg.Graph, tuple[str, dict[str, Any]]] = {}
    for name, parameters in _designed(space):
        found.setdefault(space.graph(parameters).canonical(), (name, parameters))
    return dict(found.values())


def check_baselines(config: SearchConfig, space: ktg.SearchSpace) -> None:
    """Raises InputError for fewer trials than baselines, or a space that has no other graphs."""
    if not config.baselines:
        return
    if config.trials < (most := _most(space)) > _MANY:
        allowed = f"as many as there are designed graphs (up to {most:,}), or --no-baselines"
        raise InputError("trials", config.trials, allowed)
    designed = baselines(space)
    if config.trials < len(designed):
        allowed = f"at least {len(designed)}, the designed graphs, or --no-baselines"
        raise InputError("trials", config.trials, allowed)
    known = {space.graph(parameters).canonical() for parameters in designed.values()}
    rng = np.random.default_rng(config.seed)
    drawn = (space.sample(rng, config.draw).canonical() for _ in range(_DRAWS))
    if all(graph in known for graph in drawn):
        allowed = f"a space with other graphs than the {len(designed)} designed ones"
        raise InputError("gates", list(config.gates), f"{allowed}, or --no-baselines")


def _most(space: ktg.SearchSpace) -> int:
    """How many distillations there are at most; in large spaces there are too many to list."""
    kinds = len(space.kinds)
    temperatures = max(len(space.edge_temperatures), len(space.temperatures))
    sets = sum(math.comb(n + kinds - 1, n) for n in range(1, space.num_nodes))
    return sets * temperatures * len(_LABELS)


def kind_of_baseline(name: str) -> str:
    """What a baseline is, without what it is of.

    >>> kind_of_baseline("distillation cnn+resnet8, label linear")
    'distillation'
    """
    return name.partition(" ")[0]


def _designed(space: ktg.SearchSpace) -> Iterator[tuple[str, dict[str, Any]]]:
    can_cut = "cutoff" in space.gates
    if can_cut or space.num_nodes == 1:
        for name, gate in ((INDEPENDENT, "through"), (CONTROL, "linear")):
            if gate in space.gates:
                yield name, _graph(space, [], gate, {})
    if "through" not in space.gates:
        return
    num_others = space.num_nodes - 1
    if num_others and space.candidates:
        others = list(itertools.islice(itertools.cycle(space.candidates), num_others))
        for told, at in _temperatures(space):
            yield MUTUAL + told, _graph(space, others, "through", at, learning=True)
    if not can_cut:
        return
    for number in range(1, num_others + 1):
        for teachers in itertools.combinations_with_replacement(space.kinds, number):
            for told, at in _temperatures(space):
                for gate, told_label in _LABELS.items():
                    if gate in space.gates:
                        name = f"{DISTILLATION} {'+'.join(teachers)}{told}{told_label}"
                        yield name, _graph(space, teachers, gate, at)


def _temperatures(space: ktg.SearchSpace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each temperature in words and as choices; the only one goes without saying."""
    names = [name for name in space.choices() if name.startswith("temperature.")]
    per_edge = bool(names)
    listed = space.edge_temperatures if per_edge else space.temperatures
    for temperature in listed:
        told = f", T {temperature:g}" if len(listed) > 1 else ""
        yield told, dict.fromkeys(names if per_edge else ["temperature"], temperature)


def _graph(
    space: ktg.SearchSpace,
    others: Sequence[str],
    label: str,
    more: dict[str, Any],
    *,
    learning: bool = False,
) -> dict[str, Any]:
    """Others that the target hears, and that all hear each other or nobody; the rest is absent."""
    made = {name: allowed[0] for name, allowed in space.choices().items()}
    nodes = range(space.num_nodes)
    if "cutoff" in space.gates:
        made |= {gate_name(t, s): "cutoff" for t in nodes for s in nodes}
    present = range(len(others) + 1)
    made |= {kind_name(i): kind for i, kind in enumerate(others, 1)}
    for t in present if learning else (0,):
        made |= {gate_name(t, s): "through" for s in present}
    made[gate_name(0, 0)] = label
    return made | more
