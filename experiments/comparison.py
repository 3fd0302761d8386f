"""The fair ending of a search: which graphs are trained again, and what their tests can tell."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

import ktg_jax as ktg
from ktg_jax.errors import InputError

from .runs.config import with_pretrained
from .runs.console import Table
from .search.records import TrialRecord

Record = dict[str, Any]

_SAME = 1e-6  # one image in a million; accuracies closer than this differ by rounding


@dataclass(frozen=True)
class Contender:
    """A graph that is trained again from scratch, with several seeds.

    Attributes:
        name: unique, and fit for a folder.
        kind: `found`, or the baseline it is: `independent`, `mutual` or `distillation`.
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


def compare(
    contenders: Sequence[Contender],
    accuracies: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
) -> Record:
    """The content of `results.json`: accuracies, and found graphs against their baselines.

    Args:
        contenders: as `contenders` returns them.
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


def markdown(results: Record) -> str:
    """The results as two tables of GitHub's Markdown, and what their test can tell."""
    seeds = [f"seed {seed}" for seed in results["seeds"]]
    rows = [
        [
            entry_label(entry),
            _per_cent(entry["val_accuracy"]),
            _mean(entry),
            *map(_per_cent, entry["accuracies"]),
        ]
        for entry in results["entries"]
    ]
    parts = [
        "Accuracy of the target on the test images (validation: in the search), in per cent.",
        _table(["graph", "validation", "test", *seeds], rows),
    ]
    if results["comparisons"]:
        parts += [
            "Differences of test accuracy, paired by seed, in percentage points.",
            _table(
                ["graph", "baseline", "difference", "95 % interval", "p", "p (Holm)"],
                [_comparison_row(results, comparison) for comparison in results["comparisons"]],
            ),
            _caveat(results),
        ]
    return "\n\n".join(parts) + "\n"


def entry_label(entry: Mapping[str, Any]) -> str:
    """The name of an entry of `results.json`, and the baseline that a found graph is."""
    return entry["name"] + (f" (is {entry['stands_for']})" if entry["stands_for"] else "")


def table(results: Record) -> Table:
    """The results for a terminal: p-values are those corrected by Holm's method."""
    caption = "in per cent; differences in points, paired by seed; p after Holm"
    shown = Table(box=None, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    shown.add_column("graph", overflow="fold")
    for title in ("val.", "test", "- mutual", "p", "- indep.", "p", "- distil.", "p"):
        shown.add_column(title, justify="right", no_wrap=True)
    found = {(c["entry"], c["baseline_kind"]): c for c in results["comparisons"]}
    for entry in results["entries"]:
        cells = [entry_label(entry), _per_cent(entry["val_accuracy"]), _mean(entry)]
        for kind in ("mutual", "independent", "distillation"):
            comparison = found.get((entry["name"], kind), {})
            cells += [_points(comparison.get("difference")), _p_value(comparison.get("p_holm"))]
        shown.add_row(*cells)
    return shown


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


def _caveat(results: Record) -> str:
    """What the test can tell with so many seeds."""
    n = len(results["seeds"])
    if n < 2:
        return (
            "With one seed nothing is tested: each difference may be the chance of its initial "
            "weights and order of images."
        )
    # The mean difference, in their standard deviations, at which p is 0.05.
    least = stats.t.ppf(0.975, n - 1) / n**0.5
    return (
        f"{results['num_tests']} two-sided t-tests, each on {n} paired seeds; none where the "
        "difference is the same with every seed; p (Holm) is corrected for their number, the "
        "intervals are not. At the level of 5 % such a test cannot tell from chance a mean "
        f"difference of less than {least:.1f} times the differences' standard deviation: with so "
        "few seeds a large p is no sign that two graphs are equally good."
    )


def _comparison_row(results: Record, comparison: Record) -> list[str]:
    labels = {entry["name"]: entry_label(entry) for entry in results["entries"]}
    low, high = comparison["low"], comparison["high"]
    return [
        labels[comparison["entry"]],
        labels[comparison["baseline"]],
        _points(comparison["difference"]),
        "-" if low is None else f"{_points(low)} to {_points(high)}",
        _p_value(comparison["p"]),
        _p_value(comparison["p_holm"]),
    ]


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; numbers are aligned to the right."""
    rule = ["---" if title in ("graph", "baseline") else "---:" for title in titles]
    return "\n".join(f"| {' | '.join(row)} |" for row in [titles, rule, *rows])


def _mean(entry: Record) -> str:
    spread = "" if entry["std"] is None else f" ± {_per_cent(entry['std'])}"
    return _per_cent(entry["mean"]) + spread


def _per_cent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def _points(difference: float | None) -> str:
    return "-" if difference is None else f"{100 * difference:+.2f}"


def _p_value(p: float | None) -> str:
    if p is None:
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
