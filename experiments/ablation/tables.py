"""The results of the ablation for people: Markdown for a file, a table for a terminal."""

from collections.abc import Sequence

import numpy as np

from ..runs.console import Table
from ..runs.shapes import Record
from ..runs.texts import interval, markdown_table, mean_and_std, p_value, per_cent, points


def markdown(results: Record) -> str:
    """The results as tables of GitHub's Markdown."""
    seeds = ", ".join(map(str, results["seeds"]))
    parts = [
        f"Accuracy of the student on the test images after the last epoch, in per cent; seeds "
        f"{seeds}.",
        _table(*_accuracies(results)),
    ]
    if results["comparisons"]:
        parts += [
            "Differences, paired by seed, in percentage points; p of two-sided paired t-tests, "
            f"corrected for all {results['num_tests']} by Holm's method.",
            _table(*_differences(results)),
        ]
    parts += [
        "Mean epoch in which a validation accuracy is first reached (in brackets: with how many "
        "seeds it is, where not with all).",
        _table(*_epochs(results)),
    ]
    if any(entry["val_accuracy_by_rate"] for entry in results["entries"]):
        parts += [
            "Mean accuracy on the validation images by learning rate, in per cent, of the seeds "
            "that the rates were compared with.",
            _table(*_rates(results)),
        ]
    if any(entry["fit_left"] or entry["fit_errors"] for entry in results["entries"]):
        parts += [
            "Fits, by stage: what they left (of regressions shares of the variance, of `recast` "
            "cross-entropies), and what the whole student gets wrong before it is trained, in "
            "shares of the variance.",
            _table(*_fits(results)),
        ]
    if any(entry["prior_distance_by_epoch"] for entry in results["entries"]):
        parts += [
            "Distance from the prior, mean over seeds and kernels.",
            _table(*_distances(results)),
        ]
    if results["diverged"]:
        arms = (
            f"`{name}` (seeds {', '.join(map(str, seeds))})"
            for name, seeds in results["diverged"].items()
        )
        parts.append(
            f"Arms that diverged with their best rate and are left out: {', '.join(arms)}."
        )
    return "\n\n".join(parts) + "\n"


def table(results: Record) -> Table:
    """The accuracies, and the differences from the first arm that each is compared with."""
    shown = Table("arm", "", box=None)
    for title in ("test", "difference", "from", "p (Holm)"):
        shown.add_column(title, justify="right", no_wrap=True)
    first: dict[str, Record] = {}
    for comparison in results["comparisons"]:
        first.setdefault(comparison["entry"], comparison)
    for entry in results["entries"]:
        cells = ["-", "-", "-"]
        if entry["name"] in first:
            found = first[entry["name"]]
            cells = [points(found["difference"]), found["baseline"], p_value(found["p_holm"])]
        shown.add_row(entry["name"], entry["about"], mean_and_std(entry), *cells)
    return shown


Titles = Sequence[str]
Rows = list[list[str]]


def _accuracies(results: Record) -> tuple[Titles, Rows]:
    seeds = [f"seed {seed}" for seed in results["seeds"]]
    titles = ["arm", "what", "epochs", "rate", "mean", *seeds]
    return titles, [
        [
            entry["name"],
            entry["about"],
            str(entry["epochs"]),
            f"{entry['learning_rate']:g}",
            mean_and_std(entry),
            *map(per_cent, entry["accuracies"]),
        ]
        for entry in results["entries"]
    ]


def _differences(results: Record) -> tuple[Titles, Rows]:
    rows = []
    for found in results["comparisons"]:
        p_values = [p_value(found[key]) for key in ("p", "p_holm")]
        difference = points(found["difference"])
        between = interval(found["low"], found["high"])
        rows.append([found["entry"], found["baseline"], difference, between, *p_values])
    return ["arm", "control", "difference", "95 % interval", "p", "p (Holm)"], rows


def _epochs(results: Record) -> tuple[Titles, Rows]:
    shares = [share for share in results["entries"][0]["epochs_to"] if _tells(results, share)]
    rows = [
        [entry["name"], *(_mean_epoch(entry["epochs_to"][share]) for share in shares)]
        for entry in results["entries"]
    ]
    return ["arm", *(f"{100 * float(share):g} %" for share in shares)], rows


def _rates(results: Record) -> tuple[Titles, Rows]:
    rates = list(results["entries"][0]["val_accuracy_by_rate"])
    rows = [
        [entry["name"], *(per_cent(entry["val_accuracy_by_rate"][rate]) for rate in rates)]
        for entry in results["entries"]
    ]
    return ["arm", *rates], rows


def _fits(results: Record) -> tuple[Titles, Rows]:
    rows = [
        [entry["name"], *(_numbers(entry[field]) for field in ("fit_left", "fit_errors"))]
        for entry in results["entries"]
        if entry["fit_left"] or entry["fit_errors"]
    ]
    return ["arm", "left by the fit", "of the whole"], rows


def _numbers(values: Sequence[float] | None) -> str:
    return "-" if values is None else ", ".join(f"{value:.3f}" for value in values)


def _tells(results: Record, share: str) -> bool:
    """Whether some run reaches the accuracy, and not every run does so in its first epoch."""
    epochs = [epoch for entry in results["entries"] for epoch in entry["epochs_to"][share]]
    return set(epochs) not in ({None}, {1})


def _distances(results: Record) -> tuple[Titles, Rows]:
    rows = []
    for entry in results["entries"]:
        by_epoch = entry["prior_distance_by_epoch"]
        if by_epoch:
            moments = (by_epoch[i] for i in (0, len(by_epoch) // 2, -1))
            rows.append([entry["name"], *(f"{np.mean(distances):.3f}" for distances in moments)])
    return ["arm", "first epoch", "half-way", "last epoch"], rows


def _table(titles: Titles, rows: Rows) -> str:
    return markdown_table(titles, rows, words=("arm", "what", "control"))


def _mean_epoch(epochs: Sequence[int | None]) -> str:
    reached = [epoch for epoch in epochs if epoch is not None]
    if not reached:
        return "-"
    share = "" if len(reached) == len(epochs) else f" ({len(reached)})"
    return f"{np.mean(reached):.1f}{share}"
