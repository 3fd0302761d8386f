"""Who takes part in the fair ending of a search: the graphs that it found, and their baselines."""

from collections.abc import Sequence

import ktg_jax as ktg
from ktg_jax.errors import InputError

from ..comparison import Contender
from ..runs.graphs import with_pretrained
from .baselines import CONTROL, DESIGNED, DISTILLATION, INDEPENDENT, MUTUAL, kind_of_baseline
from .records import Standing


def contenders(
    best: Sequence[Standing], gates: Sequence[str] = (), designed: Sequence[Standing] = ()
) -> list[Contender]:
    """The found graphs, then the baselines that each is compared with.

    Found graphs are pruned to the nodes that can influence the target. A found graph's baselines
    are the target alone, and the mutual learning and the distillation of *its own nodes*, by the
    names (and with them the initial weights) and at the temperature of the found graph, so that
    only gates differ. Its own nodes are those left after pruning, or all as drawn if only the
    target is left; a space of one node has only the independent baseline. Teachers that were given
    do not learn: where no other node is left, mutual learning is that of the search. Further ones
    are the target alone with a `linear` label edge, a control (that gate is partly a schedule of
    the rate of learning), and the best of the designed graphs that the search has tried.

    Equivalent graphs are trained once. A baseline of several found graphs is named after the best
    of them. One that a found graph is equivalent to is left out: the found graph `stands_for` it,
    also in the comparisons of the others, and is not compared with itself.

    Args:
        best: of one study, best first, none equivalent to another.
        gates: of its space; with `linear` among them there is the control.
        designed: its designed graphs, best first.

    Raises:
        InputError: no graphs, equivalent graphs, or different targets.
    """
    _check(best)
    found = [_trainable(standing.graph) for standing in best]
    numbers = [standing.trial.number for standing in best]
    names = {g.canonical(): f"found-{n}" for g, n in zip(found, numbers, strict=True)}
    if len(names) < len(found):
        raise InputError("best", numbers, "trials of graphs not equivalent")
    further: dict[str, ktg.Graph] = {}
    if "linear" in gates:
        further[CONTROL] = ktg.Graph((best[0].graph.nodes[0],), (("linear",),))
    if designed:
        further[DESIGNED] = _trainable(designed[0].graph)
    mutual = [_trainable(s.graph) for s in designed if _kind(s) == MUTUAL][:1]
    listed, added = [], []
    for standing, graph in zip(best, found, strict=True):
        own, roles = f"found-{standing.trial.number}", {}
        of_own = _baselines(standing.graph)
        if MUTUAL not in of_own and mutual:
            of_own[MUTUAL] = mutual[0]
        for kind, baseline in (of_own | further).items():
            key = baseline.canonical()
            if key not in names:
                is_shared = kind in (INDEPENDENT, CONTROL, DESIGNED)
                names[key] = kind if is_shared else f"{kind}-{standing.trial.number}"
                added.append(Contender(names[key], kind, baseline))
            roles[kind] = names[key]
        against = tuple(dict.fromkeys(name for name in roles.values() if name != own))
        itself = next((kind for kind, name in roles.items() if name == own), None)
        trial = standing.trial.number, standing.value
        listed.append(Contender(own, "found", graph, *trial, against, itself))
    return listed + added


def _kind(standing: Standing) -> str:
    return kind_of_baseline(standing.trial.baseline or "")


def _trainable(graph: ktg.Graph) -> ktg.Graph:
    return with_pretrained(graph.pruned())


def _check(best: Sequence[Standing]) -> None:
    """Raises InputError for no graphs, or several targets."""
    if not best:
        raise InputError("best", [], "at least one trial")
    targets = [standing.graph.nodes[0] for standing in best]
    if len(set(targets)) > 1:
        names = [target.name for target in targets]
        raise InputError("best", names, "graphs of one and the same target")


def _baselines(drawn: ktg.Graph) -> dict[str, ktg.Graph]:
    """The baselines of a found graph's own nodes, by kind."""
    pruned = drawn.pruned()
    target, *others = pruned.nodes if len(pruned.nodes) > 1 else drawn.nodes
    baselines = {INDEPENDENT: ktg.graphs.independent([target])}
    if others:
        temperature = drawn.temperature
        learning = [node for node in others if not (node.weights or node.outputs)]
        if learning:
            baselines[MUTUAL] = ktg.graphs.mutual([target, *learning], temperature)
        distillation = ktg.graphs.distillation(target, others, temperature)
        baselines[DISTILLATION] = with_pretrained(distillation)
    return baselines
