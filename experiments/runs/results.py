"""From a finished training to its result: numbers for a file, and a table for people."""

import numpy as np

import ktg_jax as ktg

from .console import Table
from .shapes import Record
from .texts import per_cent

Means = dict[str, np.ndarray] | None
ValAndTest = tuple[Means, Means]
Best = tuple[int, Means, Means]


def best_epoch(records: list[Record]) -> int | None:
    """The first epoch of the target's highest validation accuracy; None without validation."""
    scores = [record["nodes"][0]["val_accuracy"] for record in records]
    if not scores or scores[0] is None:
        return None
    return 1 + int(np.argmax(scores))


def make_result(
    graph: ktg.Graph,
    records: list[Record],
    *,
    last: ValAndTest,
    best: Best | None,
) -> Record:
    """The content of `result.json`.

    Args:
        graph: the graph of the run.
        records: one an epoch.
        last: means over the validation and the test images, after the last epoch.
        best: the epoch in which the *target* did best on validation, and the same means then.

    Returns:
        For the target, each of the nodes and the ensemble (summed logits): accuracies and losses
        after the last epoch, and under `best` those of the best epoch.
    """
    nodes = []
    for i, node in enumerate(graph.nodes):
        entry: Record = {"name": node.name, "model": node.model, "frozen": i in graph.frozen}
        entry |= _numbers("", i, *last)
        if best is not None:
            entry["best"] = {"epoch": best[0], **_numbers("", i, *best[1:])}
        nodes.append(entry)
    ensemble = _numbers("ensemble_", None, *last)
    if best is not None:
        ensemble["best"] = {"epoch": best[0], **_numbers("ensemble_", None, *best[1:])}
    return {
        "target": nodes[0],
        "nodes": nodes,
        "ensemble": ensemble,
        "epochs": records[-1]["epoch"],
        "steps": records[-1]["step"],
        "seconds": round(sum(record["seconds"] for record in records), 3),
    }


def result_table(result: Record) -> Table:
    """The accuracies of a result as a table, the best epoch being the target's on validation."""
    table = Table("node", "model", "", box=None)
    for title in ("val.", "test", "best epoch", "test then"):
        table.add_column(title, justify="right", no_wrap=True)
    for i, node in enumerate(result["nodes"]):
        mark = "target" if i == 0 else "frozen" if node["frozen"] else ""
        table.add_row(node["name"], node["model"], mark, *_cells(node))
    if len(result["nodes"]) > 1:
        table.add_row("ensemble", "", "", *_cells(result["ensemble"]))
    return table


def _cells(entry: Record) -> list[str]:
    is_evaluated = entry["val_accuracy"] is not None or entry["test_accuracy"] is not None
    best = entry.get("best", {}) if is_evaluated else {}
    return [
        per_cent(entry["val_accuracy"], " %"),
        per_cent(entry["test_accuracy"], " %"),
        str(best.get("epoch", "-")),
        per_cent(best.get("test_accuracy"), " %"),
    ]


def _numbers(prefix: str, node: int | None, val: Means, test: Means) -> Record:
    def number(means: Means, key: str) -> float | None:
        if means is None or (node is not None and not means["accuracy"][node] >= 0):
            return None  # nor has a recorded node any
        value = means[prefix + key]
        return float(value if node is None else value[node])

    return {
        "val_accuracy": number(val, "accuracy"),
        "test_accuracy": number(test, "accuracy"),
        "val_loss": number(val, "loss"),
        "test_loss": number(test, "loss"),
    }
