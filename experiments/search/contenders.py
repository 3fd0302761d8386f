"""Who takes part in the fair ending of a search: the graphs that it found, and their baselines."""

from collections.abc import Sequence

import ktg_jax as ktg
from ktg_jax.errors import InputError

from ..comparison import Contender
from ..runs.graphs import with_pretrained
from .records import TrialRecord


def contenders(best: Sequence[TrialRecord]) -> list[Contender]:
    """The found graphs, then the baselines that each is compared with.

    Found graphs are pruned to the nodes that can influence the target. A found graph's baselines
    are the target alone, and the mutual learning and the distillation of *its own nodes*, by the
    names (and with them the initial weights) and at the temperature of the found graph, so that
    only gates differ. Its own nodes are those left after pruning, or all as drawn if only the
    target is left; a space of one node has only the independent baseline.

    Equivalent graphs are trained once. A baseline of several found graphs is named after the best
    of them. One that a found graph is equivalent to is left out: the found graph `stands_for` it,
    also in the comparisons of the others, and is not compared with itself.

    Args:
        best: complete trials of one study, best first, none equivalent to another.

    Raises:
        InputError: no trials, one without a graph, equivalent graphs, or different targets.
    """
    drawn = _graphs(best)
    found = [with_pretrained(graph.pruned()) for graph in drawn]
    names = {g.canonical(): f"found-{t.number}" for t, g in zip(best, found, strict=True)}
    if len(names) < len(found):
        raise InputError("best", [t.number for t in best], "trials of graphs not equivalent")
    listed, added = [], []
    for trial, whole, graph in zip(best, drawn, found, strict=True):
        own, roles = f"found-{trial.number}", {}
        for kind, baseline in _baselines(whole).items():
            key = baseline.canonical()
            if key not in names:
                names[key] = kind if kind == "independent" else f"{kind}-{trial.number}"
                added.append(Contender(names[key], kind, baseline))
            roles[kind] = names[key]
        against = tuple(name for name in roles.values() if name != own)
        itself = next((kind for kind, name in roles.items() if name == own), None)
        listed.append(Contender(own, "found", graph, trial.number, trial.value, against, itself))
    return listed + added


def _graphs(best: Sequence[TrialRecord]) -> list[ktg.Graph]:
    """The trials' graphs, checked."""
    graphs = [trial.graph for trial in best if trial.graph is not None]
    if not graphs or len(graphs) < len(best):
        numbers = [trial.number for trial in best if trial.graph is None]
        raise InputError("best", numbers, "at least one trial, and each with its graph")
    targets = [graph.nodes[0] for graph in graphs]
    if len(set(targets)) > 1:
        names = [target.name for target in targets]
        raise InputError("best", names, "graphs of one and the same target")
    return graphs


def _baselines(drawn: ktg.Graph) -> dict[str, ktg.Graph]:
    """The baselines of a found graph, by kind."""
    pruned = drawn.pruned()
    target, *others = pruned.nodes if len(pruned.nodes) > 1 else drawn.nodes
    baselines = {"independent": ktg.graphs.independent([target])}
    if others:
        temperature = drawn.temperature
        baselines["mutual"] = ktg.graphs.mutual([target, *others], temperature)
        distillation = ktg.graphs.distillation(target, others, temperature)
        baselines["distillation"] = with_pretrained(distillation)
    return baselines
