"""Optuna pruners: which trials are stopped early (extra: search).

Trials report the objective after each epoch, counted from 1. Their resource is the epoch.
"""

from typing import Any

from ktg_jax.checks import is_number, is_whole
from ktg_jax.errors import InputError

from .extra import optuna

PRUNERS: tuple[str, ...] = ("asha", "patient", "hyperband", "none")
"""The names that `make_pruner` knows."""

_REDUCTION = 2
"""One in so many of the trials that reach a rung goes on (the papers' reduction factor)."""


def make_pruner(
    name: str, epochs: int, min_epochs: int = 1, patience: float = 0.5
) -> optuna.pruners.BasePruner:
    """A pruner by name. None of them prunes a trial that has reached its last epoch.

    Args:
        name: `asha`: asynchronous successive halving with the papers' parameters, rungs at epochs
            1, 2, 4, ...; `patient`: the same from a later first rung, for gates that act late
            (linear) and are cut too early otherwise; `hyperband`: several successive halvings that
            differ in their first rung; `none`.
        epochs: the epochs of a whole trial.
        min_epochs: no trial is pruned before this epoch; it is the first rung of `asha`.
        patience: share of the training, 0 to 1, after which the first rung of `patient` comes, at
            epoch `max(min_epochs, round(patience * epochs))`.

    Raises:
        InputError: no such pruner, or a number out of its range.

    >>> isinstance(make_pruner("asha", epochs=200), optuna.pruners.SuccessiveHalvingPruner)
    True
    """
    if name not in PRUNERS:
        raise InputError("pruner", name, ", ".join(PRUNERS))
    _check_epochs("epochs", epochs, None)
    _check_epochs("min_epochs", min_epochs, epochs)
    if not is_number(patience) or not 0 <= patience <= 1:
        raise InputError("patience", patience, "a share of the epochs, 0 to 1")
    if name == "asha":
        return _Halving(epochs, min_epochs)
    if name == "patient":
        return _Halving(epochs, max(min_epochs, round(patience * epochs)))
    if name == "hyperband":
        return _Hyperband(epochs, min_epochs)
    return optuna.pruners.NopPruner()


# A rung may fall on the last epoch. To prune a trial there would save nothing, and lose its value.


class _Halving(optuna.pruners.SuccessiveHalvingPruner):
    def __init__(self, epochs: int, first_rung: int) -> None:
        super().__init__(
            min_resource=first_rung, reduction_factor=_REDUCTION, min_early_stopping_rate=0
        )
        self._epochs = epochs

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return not _is_finished(trial, self._epochs) and super().prune(study, trial)


class _Hyperband(optuna.pruners.HyperbandPruner):
    def __init__(self, epochs: int, first_rung: int) -> None:
        super().__init__(min_resource=first_rung, max_resource=epochs, reduction_factor=_REDUCTION)
        self._epochs = epochs

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return not _is_finished(trial, self._epochs) and super().prune(study, trial)


def _is_finished(trial: optuna.trial.FrozenTrial, epochs: int) -> bool:
    return trial.last_step is not None and trial.last_step >= epochs


def _check_epochs(field: str, value: Any, most: int | None) -> None:
    allowed = "an integer, 1 or above" if most is None else f"an integer, 1 to {most} (all epochs)"
    if not is_whole(value, 1) or (most is not None and value > most):
        raise InputError(field, value, allowed)
