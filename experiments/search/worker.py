"""A worker: a process that trains trial after trial, or the graphs of the fair ending.

It is started by `team.py`, is told on its standard input what to do, and ends
when that is closed: no worker outlives the command that it works for.
"""

import errno
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax

import ktg_jax as ktg
from ktg_jax.errors import InputError, RunError

from ..runs import cli, signals
from ..runs.assemble import load
from ..runs.options import import_modules
from ..runs.process import Programs, prepare, share_cores
from . import pictures, team
from .database import explained_outage
from .extra import optuna
from .plan import is_next, reserved
from .race import key_of
from .retraining import retrain
from .samplers import suggest_graph
from .storage import Turn, open_storage
from .study import (
    State,
    begin_trial,
    is_counted,
    is_failure,
    is_orphan,
    open_study,
    original_of,
    run_again,
    take_seed,
)
from .trial import Trainer

MOST_FAILURES = 5
"""In a row; then something else is wrong than a graph."""

_POLL_SECONDS = 0.5


class FailedTrialError(Exception):
    """The training of one graph failed; the search goes on."""


class _LeftTrial(BaseException):
    """Something else failed, not the trial: it is left as by a killed worker, and is run again.

    Optuna ends a trial with any `Exception`, and then its graph would be lost.
    """

    def __init__(self, reason: Exception) -> None:
        self.reason = reason


def main() -> None:
    """Does what it is told on standard input; a signal kills it, and its team replaces it."""
    signals.leave_to_system()
    orders = team.Orders.from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    config = orders.config
    share_cores(orders.index, config.workers)
    prepare(config.compile_cache)
    import_modules(config.imports)
    ktg.cpu_convolution()
    devices = jax.local_devices()
    device = devices[orders.index % len(devices)]
    if orders.retrain is not None:
        retrain(orders.retrain, device, Path(orders.recordings))
        return
    dataset = load(config, with_test=False)
    recordings = Path(orders.recordings) if orders.recordings else None
    trainer = Trainer(config.training(), dataset, device, recordings)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    with explained_outage(orders.storage):
        Worker(orders, trainer).search()


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


class Worker:
    """Takes trials from the study, one after the other, until there are as many as asked for."""

    def __init__(self, orders: team.Orders, trainer: Trainer) -> None:
        config = orders.config
        url = orders.storage
        self._orders = orders
        self._config = config
        self._space = config.space()
        self._trainer = trainer
        self._programs = Programs()
        self._storage = open_storage(url)
        self._study = open_study(self._storage, orders.study, config, self._space)
        self._turn = Turn(url, orders.study)
        self._reserved = reserved(config, self._space)

    def search(self) -> None:
        """Runs trials.

        Raises:
            RunError: many trials in a row failed.
            OSError, InputError: a file or the database cannot be written.
        """
        while True:
            # From the decision to begin a trial until its graph is noted no other worker begins
            # one: so there are never too many, and no two equivalent ones are trained at once.
            with self._turn:
                trials = self._trials()
                counted = sum(map(is_counted, trials))
                running = sum(trial.state == State.RUNNING for trial in trials)
                if counted >= self._config.trials or self._is_late():
                    return
                is_wanted = counted + running < self._config.trials
                given = self._study, self._config, self._space, trials, self._reserved
                if is_wanted and is_next(*given):
                    self._run_trial()
                    continue
            time.sleep(_POLL_SECONDS)  # another worker may die, and its trial be left to this one

    def _run_trial(self) -> None:
        try:
            self._study.optimize(self._objective, n_trials=1, catch=(FailedTrialError,))
        except _LeftTrial as left:
            # A worker that was silent for long, as a machine asleep, is taken for dead: others have
            # given up its trial, and run it again.
            if not isinstance(left.reason, optuna.exceptions.UpdateFinishedTrialError):
                raise left.reason from left.reason.__cause__

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        """All trials, those of dead workers being enqueued again.

        Raises:
            RunError: many in a row failed.
        """
        self._storage.give_up_silent(self._study)
        trials = self._study.get_trials(deepcopy=False)
        orphans = [trial for trial in trials if is_orphan(trial)]
        for trial in orphans:
            run_again(self._study, trial)
        check_failures(trials, self._orders.began)
        return self._study.get_trials(deepcopy=False) if orphans else trials

    def _is_late(self) -> bool:
        return self._orders.deadline is not None and time.time() > self._orders.deadline

    def _objective(self, trial: optuna.Trial) -> float:
        try:
            return self._value(trial)
        except (FailedTrialError, optuna.TrialPruned):
            raise
        except Exception as error:
            raise _LeftTrial(error) from None

    def _value(self, trial: optuna.Trial) -> float:
        graph = suggest_graph(trial, self._space)
        begin_trial(trial, graph, self._orders.worker)
        seed = self._seed_of(trial)
        self._turn.release()
        started = time.monotonic()
        is_reused = self._config.duplicates == "reuse" and "race" not in trial.user_attrs
        if is_reused and (original := self._original(trial, graph)):
            return self._reuse(trial, original)
        if self._orders.artifacts:
            pictures.announce(trial, Path(self._orders.artifacts))
        before = self._programs.compiled, self._programs.loaded
        try:
            return self._train(trial, graph, seed)
        finally:
            trial.set_user_attr("node_epochs", round(self._trainer.node_epochs, 3))
            trial.set_user_attr("recorded_epochs", self._trainer.recorded_epochs)
            trial.set_user_attr("read_epochs", self._trainer.read_epochs)
            trial.set_user_attr("seconds", round(time.monotonic() - started, 3))
            trial.set_user_attr("programs_compiled", self._programs.compiled - before[0])
            trial.set_user_attr("programs_loaded", self._programs.loaded - before[1])

    def _seed_of(self, trial: optuna.Trial) -> int:
        """The seed of its initial weights: of a training of the race the given one."""
        first = self._config.seed
        if self._config.duplicates == "retrain" and "race" not in trial.user_attrs:
            return take_seed(self._study, trial, first)
        if trial.user_attrs.get("seed") is None:
            trial.set_user_attr("seed", first + trial.number % self._config.trial_seeds)
        return trial.user_attrs["seed"]

    def _train(self, trial: optuna.Trial, graph: ktg.Graph, seed: int) -> float:
        epochs = self._trainer.epochs(graph, seed)
        value = 0.0
        while True:
            with _failures(trial):
                made = next(epochs, None)
            if made is None:
                return value
            epoch, value = made
            trial.report(value, epoch)
            if "race" not in trial.user_attrs and trial.should_prune():
                raise optuna.TrialPruned

    def _original(self, trial: optuna.Trial, graph: ktg.Graph) -> optuna.trial.FrozenTrial | None:
        """The trial to take the values from, when it is finished; None: there is none."""
        key = key_of(graph)
        while True:
            with self._turn:  # the worker that is waited for may be dead
                trials = self._trials()
            original = original_of(trials, trial.number, key)
            if original is None or is_counted(original):
                return original
            time.sleep(_POLL_SECONDS)

    def _reuse(self, trial: optuna.Trial, original: optuna.trial.FrozenTrial) -> float:
        trial.set_user_attr("duplicate_of", original.number)
        for epoch, value in sorted(original.intermediate_values.items()):
            trial.report(value, epoch)
        if original.state == State.PRUNED:
            raise optuna.TrialPruned
        if original.state == State.FAIL:
            reason = original.user_attrs["reason"]
            trial.set_user_attr("reason", f"as trial {original.number}: {reason}")
            raise FailedTrialError
        assert original.value is not None
        return original.value


def check_failures(trials: Sequence[optuna.trial.FrozenTrial], since: float) -> None:
    """Raises RunError where the last trials that were trained since then have all failed.

    Args:
        trials: the trials of a study.
        since: seconds of `time.time`.
    """
    ended = {
        trial.datetime_complete: trial
        for trial in trials
        if is_counted(trial)
        and trial.datetime_complete is not None
        and trial.datetime_complete.timestamp() > since
        and trial.user_attrs.get("duplicate_of") is None
    }
    last = [ended[time] for time in sorted(ended)[-MOST_FAILURES:]]
    if len(last) == MOST_FAILURES and all(map(is_failure, last)):
        reason = last[-1].user_attrs["reason"]
        raise RunError(f"{MOST_FAILURES} trials in a row failed, the last one: {reason}")


@contextmanager
def _failures(trial: optuna.Trial) -> Iterator[None]:
    """What fails in the training of one graph is noted with its reason.

    That no file can be written is none of it: then nothing else can be, either.
    """
    try:
        yield
    except Exception as error:
        if _is_of_files(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if os.strerror(errno.ENOSPC) in reason:  # of a checkpoint, whose writer has another type
            raise RunError(reason) from error
        trial.set_user_attr("reason", reason)
        raise FailedTrialError(reason) from error


def _is_of_files(error: BaseException | None) -> bool:
    """Whether it is an OSError, or bad input that was found by one."""
    if isinstance(error, InputError):
        return _is_of_files(error.__cause__ or error.__context__)
    return isinstance(error, OSError)


if __name__ == "__main__":
    cli.run(main)
