"""Contenders with several seeds each: their accuracies compared, paired by seed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

import ktg_jax as ktg
from ktg_jax.errors import InputError

from .runs.shapes import Record

_SAME = 1e-6  # one image in a million; accuracies closer than this differ by rounding


@dataclass(frozen=True)
class Contender:
    """A graph that is trained from scratch with several seeds.

    Attributes:
        name: unique, and fit for a folder.
        kind: what it is: `found` by a search, the `arm` of a study, or a baseline.
        graph: what is trained; its frozen nodes have weights.
        trial: number of the trial that found it; None: a baseline.
        val_accuracy: the target's in that trial; None: a baseline.
        baselines: names of the contenders that it is compared with; none for a baseline.
        stands_for: the baseline that a found graph is equivalent to; None: to none.
    """

    name: str
    kind: str
    graph: ktg.Graph
    trial: int | None = None
    val_accuracy: float | None = None
    baselines: tuple[str, ...] = ()
    stands_for: str | None = None


def compare(
    contenders: Sequence[Contender],
    accuracies: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
) -> Record:
    """The content of `results.json`: accuracies, and found graphs against their baselines.

    Args:
        contenders: whose baselines are among them.
        accuracies: the target's accuracy on the test images, 0 to 1, by contender's name; one for
            each seed, in the order of `seeds`.
        seeds: with which each contender was trained.

    Returns:
        `entries` has mean and standard deviation (of a sample; None with one seed) of each
        contender. `comparisons` has the mean `difference` of a found graph and a baseline, paired
        by seed, its 95 % confidence interval from `low` to `high`, the `p` of a two-sided paired
        t-test, and `p_holm`, corrected for all tests that were made, `num_tests`. With one seed,
        or where the difference is the same with all seeds, its spread is not known: these are
        None, and no test was made.

    Raises:
        InputError: no or equal seeds, a contender or an accuracy missing or unknown, or one
            outside of 0 to 1.
    """
    _check_seeds(seeds)
    by_name = _checked_names(contenders, accuracies)
    values = {name: _checked_values(name, accuracies[name], seeds) for name in by_name}
    comparisons = []
    for contender in contenders:
        for name in contender.baselines:
            baseline = by_name[name]
            comparisons.append(
                {
                    "entry": contender.name,
                    "baseline": name,
                    "baseline_kind": baseline.stands_for or baseline.kind,
                    **_paired(values[contender.name], values[name]),
                }
            )
    tested = [comparison for comparison in comparisons if comparison["p"] is not None]
    corrected = holm([comparison["p"] for comparison in tested])
    for comparison, p in zip(tested, corrected, strict=True):
        comparison["p_holm"] = p
    return {
        "seeds": list(seeds),
        "entries": [_entry(contender, values[contender.name]) for contender in contenders],
        "num_comparisons": len(comparisons),
        "num_tests": len(tested),
        "comparisons": comparisons,
    }


def holm(p: Sequence[float]) -> list[float]:
    """Corrects the p-values of several tests by Holm's method, in the order they are given.

    The chance that any true hypothesis is refused is then at most the level, however the tests
    depend on each other. The k-th smallest of m is multiplied by m - k + 1; none is made smaller
    than one before it, or larger than 1.

    >>> holm([0.5, 0.125, 0.25])
    [0.5, 0.375, 0.5]
    """
    corrected = [0.0] * len(p)
    largest = 0.0
    for place, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - place) * p[i]))
        corrected[i] = largest
    return corrected


def _check_seeds(seeds: Sequence[int]) -> None:
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError("seeds", list(seeds), "at least one seed, each once")


def _checked_names(
    contenders: Sequence[Contender], accuracies: Mapping[str, Sequence[float]]
) -> dict[str, Contender]:
    """The contenders by name."""
    by_name = {contender.name: contender for contender in contenders}
    names = ", ".join(by_name)
    if len(by_name) < len(contenders):
        raise InputError("contenders", [c.name for c in contenders], "each name once")
    for contender in contenders:
        for name in contender.baselines:
            if name not in by_name:
                allowed = f"{name}, which {contender.name} is compared with, among them"
                raise InputError("contenders", list(by_name), allowed)
    for name in by_name:
        if name not in accuracies:
            raise InputError("accuracies", f"no {name}", f"those of each contender: {names}")
    for name in accuracies:
        if name not in by_name:
            raise InputError("accuracies", name, f"those of each contender: {names}")
    return by_name


def _checked_values(name: str, values: Sequence[float], seeds: Sequence[int]) -> np.ndarray:
    """A contender's accuracies: float64 `[seeds]`."""
    if len(values) != len(seeds):
        allowed = f"{len(seeds)} accuracies, one for each seed"
        raise InputError(f"accuracies[{name}]", list(values), allowed)
    for value in values:
        if not 0 <= value <= 1:
            raise InputError(f"accuracies[{name}]", list(values), "numbers from 0 to 1")
    return np.array(values, np.float64)


def _entry(contender: Contender, values: np.ndarray) -> Record:
    return {
        "name": contender.name,
        "kind": contender.kind,
        "stands_for": contender.stands_for,
        "trial": contender.trial,
        "graph": json.loads(contender.graph.to_json()),
        "val_accuracy": contender.val_accuracy,
        "accuracies": values.tolist(),
        "mean": float(values.mean()),
        "std": float(values.std(ddof=1)) if len(values) > 1 else None,
    }


def _paired(values: np.ndarray, baseline: np.ndarray) -> Record:
    differences = values - baseline
    low = high = p = None
    if len(differences) > 1 and np.ptp(differences) >= _SAME:
        test = stats.ttest_rel(values, baseline)
        low, high = map(float, test.confidence_interval(0.95))
        p = float(test.pvalue)
    mean = float(differences.mean())
    return {"difference": mean, "low": low, "high": high, "p": p, "p_holm": None}
