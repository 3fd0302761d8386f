"""What is known of a search and of its trials, as plain values that no database is needed for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ktg_jax as ktg

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
        baseline: `independent`, `mutual` or `distillation`, where it was enqueued as that.
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

    def best(self, count: int) -> list[TrialRecord]:
        """The complete trials of the highest values, equivalent graphs once, best first."""
        complete = [t for t in self.trials if t.state == "complete" and t.duplicate_of is None]
        best: dict[ktg.Graph, TrialRecord] = {}
        for trial in sorted(complete, key=lambda t: (-(t.value or 0.0), t.number)):
            assert trial.graph is not None
            best.setdefault(trial.graph.canonical(), trial)
        return list(best.values())[:count]
