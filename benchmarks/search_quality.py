"""The best graph found against the compute spent, for several methods and several seeds.

The methods are those of `experiments.search`: its worker runs every trial, in this process. As an
equivalent graph trained with the same seed gets the same accuracies, all searches share one
trainer, which trains each graph once and as far as any of them asks for it; what a search spends
is counted as if it had trained alone.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

import ktg_jax as ktg
from benchmarks.ledger import LedgerTrainer, scratch_search, spend
from benchmarks.task import Figures
from experiments.report.measures import ComputePoint, compute_curve
from experiments.runs.assemble import load
from experiments.search.config import Pruner, SearchConfig
from experiments.search.records import TrialRecord
from experiments.search.trial import Trainer
from ktg_jax.draw import style
from ktg_jax.io.files import atomic_path
from ktg_jax.mpl import Figure

METHODS: dict[str, tuple[Literal["random", "tpe"], Pruner]] = {
    "random + asha": ("random", "asha"),
    "random + patient": ("random", "patient"),
    "tpe + asha": ("tpe", "asha"),
}
"""Sampler and pruner."""

_PAPERS: dict[str, Any] = {"draw": "uniform", "trial_seeds": 1, "race": 0}
"""How all these methods draw, without a race."""

_COLOURS = ("#0072B2", "#E69F00", "#009E73")  # of Okabe and Ito, as the gates'
_TRIALS_AT_ONCE = 10


class SharedTrainer(LedgerTrainer):
    """A trainer for many searches, which never trains equivalent graphs twice.

    All are trained with one seed, whatever seed is asked for: that of a search is then its
    sampler's alone. A search pays for all epochs that it asks for, and for the pre-training of each
    model that its frozen nodes need, once.
    """

    def __init__(self, config: SearchConfig) -> None:
        super().__init__(config, load(config, with_test=False))
        self._seed = config.seed
        self._paid: set[str] = set()

    def pretrain(self, space: ktg.SearchSpace) -> None:
        """Trains the space's networks alone, so that no graph's own cost has that in it."""
        for model in space.candidates:
            next(Trainer.epochs(self, ktg.graphs.distillation(space.target, model), self._seed))

    def begin_search(self) -> None:
        """From now on it works for another search, which has paid for nothing yet."""
        self._paid.clear()

    def epochs(self, graph: ktg.Graph, seed: int) -> Iterator[tuple[int, float]]:
        """As of `Trainer`, the seed apart."""
        graph = graph.canonical()
        needed = {graph.nodes[i].model for i in graph.frozen}
        alone = float(len(needed - self._paid) * self._all_epochs)
        self._paid |= needed
        self.node_epochs = alone
        for epoch, value in super().epochs(graph, self._seed):
            self.node_epochs += alone
            yield epoch, value


def search_until(config: SearchConfig, budget: float, trainer: SharedTrainer) -> list[TrialRecord]:
    """As `spend` of `benchmarks.ledger`, in a study of its own."""
    trainer.begin_search()
    with scratch_search(config, trainer) as search:
        return spend(config, budget, search, _TRIALS_AT_ONCE)


def quality(
    config: SearchConfig,
    seeds: Sequence[int],
    budgets: Sequence[float],
    begin: Callable[[str], None] = lambda what: None,
) -> tuple[dict[str, list[list[ComputePoint]]], Figures]:
    """Searches with every method and every seed.

    Args:
        config: the configuration of the searches; sampler, pruner and the sampler's seed are set
            here.
        seeds: the seeds of the samplers; each method has one search for each.
        budgets: node-epochs; all searches go on to the largest.
        begin: called with a few words as each search begins.

    Returns:
        By method the curve of each seed's search, and the figures: `methods` (each with `method`,
        `trials`, `pruned` and `duplicates` up to the largest budget, means over seeds, and
        `budgets`: `node_epochs`, the `accuracies` of the best graph by seed, `mean`, `std`), and
        of all searches together the `graphs` and the `node_epochs` that were really trained.
    """
    trainer = SharedTrainer(config)
    trainer.pretrain(config.space())
    curves: dict[str, list[list[ComputePoint]]] = {method: [] for method in METHODS}
    for seed in seeds:
        for method, (sampler, pruner) in METHODS.items():
            begin(f"{method}, seed {seed}")
            mine = dataclasses.replace(
                config, sampler=sampler, pruner=pruner, seed=seed, baselines=False, **_PAPERS
            )
            trials = search_until(mine, max(budgets), trainer)
            curves[method].append(compute_curve(trials))
    figures = {
        "seeds": list(seeds),
        "epochs": config.epochs,
        "nodes": config.nodes,
        "methods": [_entry(method, curves[method], budgets) for method in METHODS],
        "trained_graphs": trainer.graphs,
        "trained_node_epochs": trainer.trained,
    }
    return curves, figures


def best_at(curve: Sequence[ComputePoint], budget: float) -> float | None:
    """The best value among trials that ended within the budget; None: none was complete."""
    return next((p.best for p in reversed(curve) if p.node_epochs <= budget), None)


def draw_quality(curves: Mapping[str, Sequence[Sequence[ComputePoint]]], path: Path) -> None:
    """Draws each method's mean over its searches, and one standard deviation around it.

    Args:
        curves: by method, of each search.
        path: file to write, `.svg` or `.png`.
    """
    end = min(curve[-1].node_epochs for some in curves.values() for curve in some)
    with style():
        figure = Figure(figsize=(6, 3.4), layout="constrained")
        ax = figure.add_subplot()
        for (method, some), colour in zip(curves.items(), _COLOURS, strict=True):
            budgets = np.unique([point.node_epochs for curve in some for point in curve])
            best = {at: [best_at(curve, at) for curve in some] for at in budgets[budgets <= end]}
            known = {at: values for at, values in best.items() if None not in values}
            values = 100 * np.array(list(known.values()), float).reshape(-1, len(some))
            mean, std = values.mean(axis=1), values.std(axis=1, ddof=min(1, len(some) - 1))
            ax.step(list(known), mean, where="post", color=colour, linewidth=1.6, label=method)
            band = ax.fill_between(list(known), mean - std, mean + std, step="post")
            band.set(color=colour, linewidth=0, alpha=0.15)
        ax.set(xlabel="node-epochs spent", ylabel="best validation accuracy (%)")
        figure.legend(loc="outside upper center", ncols=len(curves))
        kind = path.suffix[1:].lower()
        with atomic_path(path) as temporary:
            undated = {"Date": None} if kind == "svg" else None
            figure.savefig(temporary, format=kind, metadata=undated)


def _entry(
    method: str, curves: Sequence[Sequence[ComputePoint]], budgets: Sequence[float]
) -> Figures:
    within = [[p.trial for p in curve if p.node_epochs <= max(budgets)] for curve in curves]
    return {
        "method": method,
        "trials": statistics.mean(len(trials) for trials in within),
        "pruned": statistics.mean(sum(t.state == "pruned" for t in some) for some in within),
        "duplicates": statistics.mean(
            sum(t.duplicate_of is not None for t in some) for some in within
        ),
        "budgets": [_at_budget(curves, budget) for budget in budgets],
    }


def _at_budget(curves: Sequence[Sequence[ComputePoint]], budget: float) -> Figures:
    best = [best_at(curve, budget) for curve in curves]
    known = [value for value in best if value is not None]
    is_known = len(known) == len(best)
    return {
        "node_epochs": budget,
        "accuracies": best,
        "mean": statistics.mean(known) if is_known else None,
        "std": statistics.stdev(known) if is_known and len(known) > 1 else None,
    }
