"""Sums up what `learn.py` has written: `python docs/learned-graphs/summary.py FOLDER`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from learn import METHODS, theta_of
from scipy.stats import spearmanr

folder = Path(sys.argv[1])
curves = [json.loads((folder / f"ledger-{seed}.json").read_text()) for seed in range(2)]
rows = [tuple(key.split()) for key in curves[0]]
reached = np.array([[curve[" ".join(row)] for row in rows] for curve in curves])
final = reached[:, :, -1]


def rank(scores: Any, truth: Any) -> float:
    """Spearman's correlation of ranks."""
    return float(spearmanr(scores, truth).statistic)


def between(of: Callable[[int], Any]) -> float:
    """Of what one seed tells with what the other seed's trained graphs reach."""
    return float(np.mean([rank(of(0), final[1]), rank(of(1), final[0])]))


def spread(values: Any) -> str:
    """Mean and standard deviation in per cent."""
    return f"{100 * np.mean(values):.2f} ± {100 * np.std(values, ddof=1):.2f}"


best = np.argsort(-final.mean(0))
print(
    f"{len(rows)} graphs; one seed's ranks against the other's: {between(lambda s: final[s]):.2f}"
)
print("\n| label, teacher, peer | validation accuracy, % |\n|---|---|")
for i in [*best[:5], *best[-1:]]:
    print(f"| {', '.join(rows[i])} | {100 * final[:, i].mean():.2f} |")
print("\n| method | node-epochs | rank correlation | test accuracy of the graph, % |")
print("|---|---|---|---|")
for method in METHODS:
    found = [json.loads((folder / f"{method}-{seed}.json").read_text()) for seed in range(3)]
    if method.startswith("population"):
        epoch = int(method.rpartition("-")[2]) - 1
        ranks = [between(lambda s, epoch=epoch: reached[s, :, epoch])]
    else:
        gradients = [np.array(each["gradient"]) for each in found]
        ranks = [
            rank([-np.sum(gradient * theta_of(row)) for row in rows], final.mean(0))
            for gradient in gradients
        ]
    told = ", ".join(f"{value:.2f}" for value in ranks)
    spent = np.mean([each["node_epochs"] for each in found])
    tested = [np.mean(each["tested"]) for each in found]
    each = ", ".join(f"{100 * value:.2f}" for value in tested)
    print(f"| {method} | {spent:.0f} | {told} | {spread(tested)} ({each}) |")
