"""What came of the arms' runs: numbers for `results.json`, from the files that the runs wrote."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ktg_jax.errors import RunError
from ktg_jax.priors import about_prior, load_prior

from ..comparison import Contender, compare
from ..runs.shapes import Record
from ..runs.workdir import Workdir
from .arms import Arm

Runs = Mapping[str, Sequence[Workdir]]
"""The runs of each arm by its name, one a seed."""


REACH = tuple(percent / 100 for percent in range(10, 100, 5))
"""Validation accuracies of which is told in which epoch they are reached."""


def results_of(
    arms: Sequence[Arm],
    runs: Runs,
    seeds: Sequence[int],
    rates: Mapping[str, float],
    by_rate: Mapping[str, Mapping[float, float | None]],
) -> Record:
    """The content of `results.json`.

    Args:
        arms: that were run.
        runs: finished, of each arm.
        seeds: the seeds of the runs, in their order.
        rates: the learning rate of each arm's runs.
        by_rate: the mean validation accuracy of each arm with each rate, None where a run diverged;
            empty where there is one.

    Returns:
        As `comparison.compare` returns it, the accuracies being those on the test images after the
        last epoch; each entry with `about`, `epochs`, `learning_rate`, `val_accuracy_by_rate`,
        `epochs_to` (by accuracy in `REACH`: with each seed the
        first epoch in which the validation accuracy is no less, None if there is none),
        `val_accuracy_by_epoch` (mean over seeds; None without validation images), `prior_kernels`
        (the parameters that the prior speaks of; None without one), `prior_distance_by_epoch` (mean
        over seeds, a number for each of these), and of the fit, by stage, mean over seeds and None
        without one, `fit_left` and `fit_errors`: what it left, and what the whole student gets
        wrong after it.

    `diverged` is empty: it is for arms that are left out, with the seeds that they diverged with.

    Raises:
        RunError: a run without a result on test images.
    """
    names = [arm.name for arm in arms]
    contenders = [
        Contender(
            arm.name,
            "arm",
            runs[arm.name][0].graph,
            baselines=tuple(name for name in arm.controls if name in names),
        )
        for arm in arms
    ]
    accuracies = {name: [final_accuracy(run) for run in runs[name]] for name in names}
    results = compare(contenders, accuracies, seeds) | {"diverged": {}}
    for arm, entry in zip(arms, results["entries"], strict=True):
        targets = [[line["nodes"][0] for line in run.records()] for run in runs[arm.name]]
        curves = [[node["val_accuracy"] for node in nodes] for nodes in targets]
        entry["about"] = arm.about
        entry["epochs"], entry["learning_rate"] = len(curves[0]), rates[arm.name]
        entry["val_accuracy_by_rate"] = {
            f"{rate:g}": accuracy for rate, accuracy in by_rate.get(arm.name, {}).items()
        }
        entry["epochs_to"] = {
            str(share): [first_epoch(curve, share) for curve in curves] for share in REACH
        }
        entry["val_accuracy_by_epoch"] = _mean(curves)
        prior = prior_of(runs[arm.name][0])
        entry["prior_kernels"] = None if prior is None else list(load_prior(prior).paths)
        distances = [[node.get("prior_distance") for node in nodes] for nodes in targets]
        entry["prior_distance_by_epoch"] = _mean(distances)
        for field, text in (("fit_left", "stages"), ("fit_errors", "whole")):
            entry[field] = _mean_of_fits(runs[arm.name], text)
    return results


def prior_of(run: Workdir) -> Path | None:
    """The target's prior: where its graph says, or where it is in a study that was moved since."""
    prior = run.graph.nodes[0].prior
    if prior is None or Path(prior).exists():
        return None if prior is None else Path(prior)
    study = run.path.parents[3]  # of arms/<arm>/rate-<rate>/seed-<seed>
    return study.joinpath(*Path(prior).parts[-3:])  # priors/<aggregation>-<seed>/prior


def _mean_of_fits(runs: Sequence[Workdir], text: str) -> list[float] | None:
    """The mean of the numbers that the priors' files have; None: they have none."""
    priors = [prior_of(run) for run in runs]
    said = [json.loads(about_prior(p).get(text, "[]")) for p in priors if p is not None]
    return np.mean(said, axis=0).tolist() if said and said[0] else None


def mean_validation(runs: Sequence[Workdir]) -> float:
    """The target's mean accuracy on the validation images after the last epoch.

    Raises:
        RunError: a run is not finished.
    """
    results = [run.result for run in runs]
    if None in results:
        raise RunError(f"{runs[results.index(None)].path}: a run of the ablation is not finished")
    return float(np.mean([result["target"]["val_accuracy"] for result in results if result]))


def final_accuracy(run: Workdir) -> float:
    """The target's, after the last epoch.

    Raises:
        RunError: the run is not finished, or the data has no test images.
    """
    result = run.result
    if result is None or result["target"]["test_accuracy"] is None:
        raise RunError(f"{run.path}: a run of the ablation has no result on the test images")
    return result["target"]["test_accuracy"]


def first_epoch(accuracies: Sequence[float | None], share: float) -> int | None:
    """The first epoch, from 1, with at least that accuracy; None: none has.

    >>> first_epoch([0.1, 0.5, 0.4], 0.4), first_epoch([0.1], 0.4), first_epoch([None], 0.4)
    (2, None, None)
    """
    for epoch, accuracy in enumerate(accuracies, start=1):
        if accuracy is not None and accuracy >= share:
            return epoch
    return None


def _mean(values: list[list[Any]]) -> list[Any] | None:
    """The mean over the first axis, the runs; None where there are no numbers."""
    if values[0][0] is None:
        return None
    return np.mean(np.array(values, np.float64), axis=0).tolist()
