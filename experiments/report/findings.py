"""What a search found out beside its best graph: effects of gates, and the race, drawn and told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

import ktg_jax as ktg
from ktg_jax.draw import style
from ktg_jax.mpl import Figure

from ..search.effects import Effect, EffectsModel
from ..search.race import Race, key_of
from ..search.records import StudyRecord, values_of
from .figures import Picture, svg_of

_WIDTH = 9.0  # inches
_MOST_DRAWN = 28
_LEAST_TRIALS = 3
_GROUP_COLOURS = {"label": "#0072B2", "sender": "#D55E00", "partner": "#009E73"}  # Okabe and Ito
GROUPS = {
    "label": "the target's label edge, against through",
    "sender": "one more sender that the target hears",
    "partner": "what a learning partner hears",
}
"""The kinds of effects, in words."""


def effects_of(study: StudyRecord) -> list[Effect]:
    """The effects that the complete trials tell, by kind, then by size; empty: too few trials."""
    trials = [trial for trial in study.trials if trial.is_trained]
    if len({key_of(t.graph) for t in trials if t.graph is not None}) < _LEAST_TRIALS:
        return []
    model = EffectsModel(
        [t.graph for t in trials if t.graph is not None],
        [t.seed or 0 for t in trials],
        [t.value for t in trials if t.value is not None],
    )
    order = list(GROUPS)
    return sorted(model.effects(), key=lambda e: (order.index(e.group), -e.mean, e.name))


def effects_picture(effects: Sequence[Effect]) -> Picture | None:
    """Draws the largest effects, each with two standard deviations to both sides; None: no effects.

    The id of the dots of each kind is `effects-<kind>`.
    """
    shown = sorted(effects, key=lambda e: -abs(e.mean))[:_MOST_DRAWN]
    shown = [effect for effect in effects if effect in shown]
    if not shown:
        return None
    with style():
        figure = Figure(figsize=(_WIDTH, 0.9 + 0.24 * len(shown)), layout="constrained")
        ax = figure.add_subplot()
        ax.axvline(0, color="#6F7F95", linewidth=0.8)
        for group, colour in _GROUP_COLOURS.items():
            places = [i for i, effect in enumerate(shown) if effect.group == group]
            if not places:
                continue
            means = [100 * shown[i].mean for i in places]
            spread = [200 * shown[i].std for i in places]
            ax.errorbar(means, places, xerr=spread, fmt="none", ecolor=colour, elinewidth=1.2)
            ax.plot(means, places, "o", color=colour, label=GROUPS[group], gid=f"effects-{group}")
        ax.set_yticks(range(len(shown)), [effect.name for effect in shown])
        ax.set(ylim=(len(shown) - 0.4, -0.6), xlabel="change of the target's accuracy (points)")
        figure.legend(loc="outside lower center", ncols=1)
        return Picture(svg_of(figure))


@dataclass(frozen=True)
class Runner:
    """A graph of the race, for a table.

    Attributes:
        graph: pruned for its target.
        trial: the number of its first trial.
        by: why it took part.
        expected: the accuracy that the effects said.
        values: its accuracy by seed.
        means: after each round that it took part in.
        is_winner: whether it is ahead.
    """

    graph: ktg.Graph
    trial: int | None
    by: str
    expected: float | None
    values: Mapping[int, float]
    means: Sequence[float]
    is_winner: bool


def runners(study: StudyRecord) -> list[Runner]:
    """The graphs of the newest race, best first; empty: no round of one has ended."""
    race = study.race
    if race is None:
        return []
    values = values_of(study.trials)
    first = {key_of(t.graph): t.number for t in reversed(study.trials) if t.graph is not None}
    found = []
    for place, (i, *_) in enumerate(race.ranking):
        entrant = race.entrants[i]
        key = key_of(entrant.graph)
        found.append(
            Runner(
                entrant.graph.pruned(),
                first.get(key),
                entrant.by,
                entrant.expected,
                dict(sorted(values.get(key, {}).items())),
                [each.means[i] for each in race.rounds if i in each.means],
                place == 0,
            )
        )
    return found


def race_picture(race: Race | None) -> Picture | None:
    """Draws the mean accuracy of each graph after each round; None: no round has ended.

    The id of the line of entrant i is `race-<i>`.
    """
    if race is None or not race.rounds:
        return None
    with style():
        figure = Figure(figsize=(_WIDTH, 3.2), layout="constrained")
        ax = figure.add_subplot()
        winner = race.ranking[0][0]
        for i in range(len(race.entrants)):
            rounds = [each for each in race.rounds if i in each.means]
            seeds = [len(each.seeds) for each in rounds]
            means = [100 * each.means[i] for each in rounds]
            look = {"color": "#000000", "linewidth": 2.0} if i == winner else {"color": "#6F7F95"}
            label = "ahead" if i == winner else None
            ax.plot(seeds, means, "o-", **look, label=label, gid=f"race-{i}")
        ax.set_xticks(np.unique([len(each.seeds) for each in race.rounds]))
        ax.set(xlabel="seeds of each graph", ylabel="mean validation accuracy (%)")
        figure.legend(loc="outside right upper")
        return Picture(svg_of(figure))
