"""The results of the fair ending for people: Markdown for a file, a table for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

from ..runs.console import Table
from ..runs.shapes import Record
from ..runs.texts import interval, markdown_table, mean_and_std, p_value, per_cent, points


def markdown(results: Record) -> str:
    """The results as two tables of GitHub's Markdown, and what their test can tell."""
    seeds = [f"seed {seed}" for seed in results["seeds"]]
    rows = [
        [
            entry_label(entry),
            per_cent(entry["val_accuracy"]),
            mean_and_std(entry),
            *map(per_cent, entry["accuracies"]),
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


def tables(results: Record) -> list[Table]:
    """The results for a terminal: accuracies, then differences with p-values after Holm."""
    shown = Table(box=None, padding=(0, 1, 0, 0), caption="in per cent", caption_justify="left")
    shown.add_column("graph", overflow="fold")
    for title in ("validation", "test"):
        shown.add_column(title, justify="right", no_wrap=True)
    for entry in results["entries"]:
        shown.add_row(entry_label(entry), per_cent(entry["val_accuracy"]), mean_and_std(entry))
    if not results["comparisons"]:
        return [shown]
    caption = "differences in points, paired by seed, with 95 % intervals; p after Holm"
    compared = Table(box=None, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    for title in ("graph", "baseline"):
        compared.add_column(title, overflow="fold")
    for title in ("difference", "95 % interval", "p"):
        compared.add_column(title, justify="right", no_wrap=True)
    for comparison in results["comparisons"]:
        *cells, _, p = _comparison_row(results, comparison)
        compared.add_row(*cells, p)
    return [shown, compared]


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
    return [
        labels[comparison["entry"]],
        labels[comparison["baseline"]],
        points(comparison["difference"]),
        interval(comparison["low"], comparison["high"]),
        p_value(comparison["p"]),
        p_value(comparison["p_holm"]),
    ]


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table(titles, rows, words=("graph", "baseline"))
