"""What a report says of a search in numbers: trials, compute, and the gates of good graphs."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ktg_jax as ktg

from ..search.baselines import kind_of_baseline
from ..search.display import count
from ..search.records import Standing, StudyRecord, TrialRecord

EDGE_KINDS = (
    "label to target",
    "label to others",
    "others to target",
    "target to others",
    "among others",
)
"""Where an edge lies, seen from the target (node 0)."""

GateCounts = Mapping[str, Mapping[str, int]]
"""Number of edges by kind of edge, then by gate; without kinds that the graphs have not."""


@dataclass(frozen=True)
class Summary:
    """A search in numbers.

    Attributes:
        states: trials by state; every state is there. Interrupted ones are not among them.
        interrupted: attempts that were stopped from outside and are run again.
        duplicates: trials that have an earlier one's values and were not trained.
        repeated: trials whose graph is equivalent to an earlier one's, trained with another seed.
        best: the best graph, of the race where there was one.
        trained: trials that were trained, whole or in part.
        compiled: programs that XLA compiled.
        loaded: programs that came from the compilation cache.
        node_epochs: compute spent.
        recorded: epochs of frozen networks that were recorded.
        read: epochs of frozen networks that were read in place of forward passes.
        whole: node-epochs of training every graph of a complete or pruned trial whole, all its
            nodes for all epochs; failed trials are left out, though what they cost was spent.
        epochs: the epochs of a trial that is not pruned; None: not known yet.
        seconds: spent by all workers together.
    """

    states: Mapping[str, int]
    interrupted: int
    duplicates: int
    repeated: int
    best: Standing | None
    trained: int
    compiled: int
    loaded: int
    node_epochs: float
    recorded: int
    read: int
    whole: float
    epochs: int | None
    seconds: float

    @property
    def trials(self) -> int:
        """Trials of all states."""
        return sum(self.states.values())


def summarise(study: StudyRecord) -> Summary:
    """Counts trials, programs and compute."""
    trials, epochs = study.trials, epochs_of(study)
    counted = [trial for trial in trials if not trial.is_interrupted]
    states = count(trials)
    equivalent = states.pop("equivalent")
    duplicates = sum(trial.duplicate_of is not None for trial in counted)
    drawn = [t for t in trials if t.graph is not None and t.state in ("complete", "pruned")]
    return Summary(
        states=states,
        interrupted=len(trials) - len(counted),
        duplicates=duplicates,
        repeated=equivalent - duplicates,
        best=next(iter(study.best(1)), None),
        trained=sum(trial.duplicate_of is None and trial.node_epochs > 0 for trial in counted),
        compiled=sum(trial.programs_compiled for trial in trials),
        loaded=sum(trial.programs_loaded for trial in trials),
        node_epochs=sum(trial.node_epochs for trial in trials),
        recorded=sum(trial.recorded_epochs for trial in trials),
        read=sum(trial.read_epochs for trial in trials),
        whole=len(drawn) * study.space.num_nodes * (epochs or 0),
        epochs=epochs,
        seconds=sum(trial.seconds for trial in trials),
    )


def epochs_of(study: StudyRecord) -> int | None:
    """Epochs of a trial that is not pruned: as set, else of the longest curve."""
    training = study.config.get("training", {})
    if training.get("epochs"):
        return int(training["epochs"])
    return max((max(trial.curve) for trial in study.trials if trial.curve), default=None)


def best_tenth(study: StudyRecord) -> tuple[list[ktg.Graph], list[ktg.Graph]]:
    """The graphs of the best tenth of the drawn ones, and all drawn ones.

    Graphs count as they were drawn. Equivalent ones count once, also those that were trained
    twice; interrupted trials, which are run again, and what nobody drew, the baselines and the
    race, do not count. Only complete trials can be among the best, which are at least one if there
    is one.
    """
    drawn: dict[ktg.Graph, ktg.Graph] = {}
    for trial in study.trials:
        is_own = trial.duplicate_of is None and trial.baseline is None and trial.race is None
        if trial.graph is not None and is_own and not trial.is_interrupted:
            drawn.setdefault(trial.graph.canonical(), trial.graph)
    ranked = [best for best in study.best(len(study.trials)) if best.trial.baseline is None]
    best = [standing.graph for standing in ranked[: math.ceil(len(drawn) / 10)]]
    return best, list(drawn.values())


def best_baselines(trials: Sequence[TrialRecord]) -> dict[str, TrialRecord]:
    """Of each kind of designed graph the complete trial of the highest value, the first of several.

    Kinds are in the order of their first trials.
    """
    found: dict[str, TrialRecord] = {}
    for trial in trials:
        if trial.baseline is None or not trial.is_trained:
            continue
        kind = kind_of_baseline(trial.baseline)
        if kind not in found or (trial.value or 0.0) > (found[kind].value or 0.0):
            found[kind] = trial
    return found


def count_gates(graphs: Sequence[ktg.Graph]) -> GateCounts:
    """How often each gate occurs on each kind of edge."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in EDGE_KINDS}
    for graph in graphs:
        for receiver, row in enumerate(graph.gates):
            for sender, gate in enumerate(row):
                counts[_edge_kind(receiver, sender)][gate] += 1
    return {kind: dict(gates) for kind, gates in counts.items() if gates}


def _edge_kind(receiver: int, sender: int) -> str:
    if receiver == sender:
        return EDGE_KINDS[0] if receiver == 0 else EDGE_KINDS[1]
    if receiver == 0:
        return EDGE_KINDS[2]
    return EDGE_KINDS[3] if sender == 0 else EDGE_KINDS[4]


@dataclass(frozen=True)
class ComputePoint:
    """The search after one of its trials, in the order of their numbers.

    Attributes:
        trial: that was added.
        node_epochs: spent on all trials up to it, it included.
        best: highest value of these trials; None: none is complete.
    """

    trial: TrialRecord
    node_epochs: float
    best: float | None


def compute_curve(trials: Sequence[TrialRecord]) -> list[ComputePoint]:
    """The best value against the compute spent: a point a trial."""
    points: list[ComputePoint] = []
    spent, best = 0.0, None
    for trial in trials:
        spent += trial.node_epochs
        if trial.state == "complete" and trial.value is not None:
            best = trial.value if best is None else max(best, trial.value)
        points.append(ComputePoint(trial, spent, best))
    return points
