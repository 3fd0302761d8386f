"""A race over seeds: the best graphs get further seeds, and the better half goes on each time.

One score picks noise: of many graphs, the one with the best score had luck. So a few are trained
with further seeds, the same for all, and the mean over all of them decides who goes on.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import ktg_jax as ktg

FIRST_SEEDS = 3
"""Seeds of each graph after the first round."""

MORE_SEEDS = 2
"""Seeds that each further round adds."""

Values = Mapping[str, Mapping[int, float]]
"""The target's validation accuracy by graph (as of `key_of`) and seed."""


@dataclass(frozen=True)
class Entrant:
    """A graph that takes part.

    Attributes:
        graph: as drawn, all nodes of the space.
        by: why: `model`, for the effects say that it is good, or `trials`, for its trials were.
        expected: the accuracy that the effects say.
    """

    graph: ktg.Graph
    by: str
    expected: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields for JSON."""
        return {"graph": self.graph.to_json(), "by": self.by, "expected": self.expected}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Entrant":
        """The inverse of `to_json`."""
        return cls(ktg.Graph.from_json(fields["graph"]), fields["by"], fields["expected"])


@dataclass(frozen=True)
class Round:
    """A round of a race that has come to its end.

    Attributes:
        seeds: with which each graph was trained by then.
        means: the mean accuracy over these by the number of each entrant that took part.
        kept: the numbers of those that went on, best first.
    """

    seeds: tuple[int, ...]
    means: Mapping[int, float]
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Race:
    """A race as it stands.

    Attributes:
        entrants: that began it.
        rounds: that have come to their ends.
        wanted: what the round under way still needs, in this order: the number of the entrant, and
            the seed.
    """

    entrants: tuple[Entrant, ...]
    rounds: tuple[Round, ...]
    wanted: tuple[tuple[int, int], ...]

    @property
    def ranking(self) -> list[tuple[int, float, int]]:
        """The entrants, best first; empty: no round has ended.

        Each with the mean of the last round that it took part in, and its seeds in that.
        """
        last = {
            i: (r, mean, len(each.seeds))
            for r, each in enumerate(self.rounds)
            for i, mean in each.means.items()
        }
        ordered = sorted(last, key=lambda i: (*last[i][:2], -i), reverse=True)
        return [(i, *last[i][1:]) for i in ordered]


def race(entrants: Sequence[Entrant], values: Values, first_seed: int, in_turn: int = 1) -> Race:
    """How a race stands.

    Each round has half as many graphs as the one before, until one is left. If trainings are left
    then, those of the last round go on, a seed at a time.

    Args:
        entrants: two or more.
        values: of all trainings so far.
        first_seed: the first of the seeds, which are the same for all.
        in_turn: seeds that the trials take turns in, which all have in the first round.
    """
    listed = tuple(entrants)
    keys = [key_of(entrant.graph) for entrant in listed]
    rounds: list[Round] = []
    for alive, seeds in _rounds(rounds, len(listed), first_seed, max(in_turn, FIRST_SEEDS)):
        wanted = [(i, s) for s in seeds for i in alive if s not in values.get(keys[i], {})]
        if wanted:
            return Race(listed, tuple(rounds), tuple(wanted))
        means = {i: float(np.mean([values[keys[i]][s] for s in seeds])) for i in alive}
        ordered = sorted(alive, key=lambda i: (-means[i], i))
        rounds.append(Round(seeds, means, tuple(ordered[: max(len(alive) // 2, 1)])))
    raise AssertionError("rounds never end")


def trainings(entrants: int, untrained: int, in_turn: int = 1) -> int:
    """The trainings of a race in which one is left in the end.

    Args:
        entrants: that have one training each.
        untrained: so many of them have none.
        in_turn: as of `race`.

    >>> trainings(6, 0)  # 6 graphs get 2 further seeds each, then 3
    18
    """
    total = entrants * (max(in_turn, FIRST_SEEDS) - 1) + untrained
    while (entrants := entrants // 2) > 1:
        total += MORE_SEEDS * entrants
    return total


@functools.lru_cache(maxsize=10_000)
def key_of(graph: ktg.Graph) -> str:
    """The same text for equivalent graphs."""
    return graph.canonical().to_json()


def _rounds(
    ended: Sequence[Round], number: int, first_seed: int, first: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Who takes part in each round, and the seeds that each has after it; the ended ones grow."""
    alive, total = tuple(range(number)), first
    while True:
        yield alive, tuple(first_seed + i for i in range(total))
        kept = ended[-1].kept
        if len(kept) > 1:
            alive, total = kept, total + MORE_SEEDS
        else:
            total += 1  # one is left: those of this round go on
