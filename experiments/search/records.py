"""What is known of a search and of its trials, as plain values that no database is needed for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import ktg_jax as ktg

from .race import Race, key_of

STATES = ("complete", "pruned", "failed", "running")


@dataclass(frozen=True)
class TrialRecord:
    """A trial of the search.

    Attributes:
        number: the number of the trial in its study, from 0.
        state: one of `STATES`; failed trials include those whose worker died: see
            `is_interrupted`.
        graph: as drawn, all N nodes of the space, without weights; None where the trial ended
            before it was drawn.
        value: the target's validation accuracy after the last epoch; only of a complete trial.
        curve: the target's validation accuracy by epoch, from 1; of a pruned trial up to where it
            was pruned.
        duplicate_of: number of the equivalent trial whose values it has; None: it was trained.
        equivalent_to: number of the first equivalent trial, where it was trained nevertheless, with
            another seed.
        baseline: the name of the designed graph that it was enqueued as.
        seed: of its initial weights; None: that of the search, in one from before there were more.
        race: the round of a race that it is a training of, from 1; None: of none.
        reason: why its training failed.
        node_epochs: compute spent on it: nodes trained times epochs, a frozen node's epoch being
            a third, and pre-training included.
        recorded_epochs: epochs of frozen networks that were recorded for it.
        read_epochs: epochs of frozen networks that it read in place of forward passes.
        seconds: that it took.
        programs_compiled: programs that XLA compiled for it.
        programs_loaded: programs that came from the compilation cache instead.
    """

    number: int
    state: str
    graph: ktg.Graph | None = None
    value: float | None = None
    curve: Mapping[int, float] = field(default_factory=dict)
    duplicate_of: int | None = None
    equivalent_to: int | None = None
    baseline: str | None = None
    seed: int | None = None
    race: int | None = None
    reason: str | None = None
    node_epochs: float = 0.0
    recorded_epochs: int = 0
    read_epochs: int = 0
    seconds: float = 0.0
    programs_compiled: int = 0
    programs_loaded: int = 0

    @property
    def equivalent(self) -> int | None:
        """Number of an earlier trial whose graph is equivalent; None: it is the first such."""
        return self.equivalent_to if self.duplicate_of is None else self.duplicate_of

    @property
    def is_trained(self) -> bool:
        """Whether it was trained to its end, and has not its values from an equivalent one."""
        return self.value is not None and self.graph is not None and self.duplicate_of is None

    @property
    def is_interrupted(self) -> bool:
        """Whether it was stopped from outside: no trial of those asked for, it is run again."""
        return self.state == "failed" and self.reason is None


@dataclass(frozen=True)
class StudyRecord:
    """A search.

    Attributes:
        path: its folder.
        name: the name of the study.
        config: what determines the search, as JSON: the space under `space`, and the training.
        command: the command line that ran it last, for a shell.
        space: that was searched.
        trials: in the order of their numbers.
        results: content of `results.json`, the fair ending; None: not there yet.
        tested: for the trials whose graph was trained again in the fair ending: the accuracy of
            each node on the test images, by its name, mean over the seeds.
        data_dir: where its data was.
        race: its newest race, as it stands; None: there was none.
    """

    path: Path
    name: str
    config: Mapping[str, Any]
    command: str
    space: ktg.SearchSpace
    trials: Sequence[TrialRecord]
    results: Mapping[str, Any] | None = None
    tested: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    data_dir: str | None = None
    race: Race | None = None

    def best(self, count: int) -> list["Standing"]:
        """The first of `standings`."""
        return standings(self.trials, self.race)[:count]


@dataclass(frozen=True)
class Standing:
    """How good a graph is found to be.

    Attributes:
        trial: the first complete trial of it, or of a graph equivalent to it.
        value: the target's validation accuracy, mean over its seeds: those of the race's last round
            that it took part in, or else all that it was trained with.
        seeds: how many.
    """

    trial: TrialRecord
    value: float
    seeds: int

    @property
    def graph(self) -> ktg.Graph:
        """Its graph, as drawn."""
        assert self.trial.graph is not None  # for it is complete
        return self.trial.graph


def standings(trials: Sequence[TrialRecord], race: Race | None = None) -> list[Standing]:
    """The graphs of complete trials, best first, equivalent ones once.

    Those of the race come first, in its order: one score of many picks luck.
    """
    of_graph: dict[str, list[TrialRecord]] = {}
    for trial in trials:
        if trial.is_trained and trial.graph is not None:
            of_graph.setdefault(key_of(trial.graph), []).append(trial)
    found = {key: _standing(some) for key, some in of_graph.items()}
    ordered = sorted(found, key=lambda key: (-found[key].value, found[key].trial.number))
    if race is not None:
        raced = []
        for i, value, seeds in race.ranking:
            key = key_of(race.entrants[i].graph)
            if key in found:  # else all its trainings failed
                found[key] = Standing(found[key].trial, value, seeds)
                raced.append(key)
        ordered = raced + [key for key in ordered if key not in raced]
    return [found[key] for key in ordered]


def _standing(trials: Sequence[TrialRecord]) -> Standing:
    values = [trial.value for trial in trials if trial.value is not None]
    return Standing(trials[0], float(np.mean(values)), len(values))


def values_of(trials: Sequence[TrialRecord]) -> dict[str, dict[int, float]]:
    """The accuracy of each graph with each seed, as `race` takes it; of what failed it is 0."""
    values: dict[str, dict[int, float]] = {}
    for trial in trials:
        if trial.graph is None or trial.seed is None or trial.duplicate_of is not None:
            continue
        has_failed = trial.state == "failed" and not trial.is_interrupted
        if trial.value is not None or has_failed:
            values.setdefault(key_of(trial.graph), {})[trial.seed] = trial.value or 0.0
    return values
