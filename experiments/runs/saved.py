"""The states of a run that its folder keeps: after each epoch, and where it was interrupted.

Of several processes the first one reads and writes; what it reads the others are given.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from ktg_jax.errors import RunError
from ktg_jax.training import hosts
from ktg_jax.training.checkpoint import Checkpoints
from ktg_jax.training.checkpoint_reading import checkpoint_epochs
from ktg_jax.training.state import GraphState

from .shapes import Record
from .workdir import Workdir


class Found(NamedTuple):
    """Where a run goes on.

    Attributes:
        state: to go on from.
        records: of the epochs that led to it.
        so_far: of the epoch in which it stands, what `train_epochs` needs; None: it is at an end.
        messages: what was damaged.
    """

    state: GraphState
    records: list[Record]
    so_far: Record | None
    messages: Sequence[str]


@contextmanager
def saved_states(
    workdir: Workdir, names: Sequence[str], steps_per_epoch: int
) -> Iterator["SavedStates"]:
    """The states in a run's folder, for as long as the block lasts; all is written at its end.

    Args:
        workdir: which the run keeps.
        names: the nodes' names, in the state's order.
        steps_per_epoch: updates an epoch.
    """
    with ExitStack() as opened:
        checkpoints: list[Checkpoints] = []  # in the first process alone

        def open_them() -> None:
            checkpoints.append(opened.enter_context(Checkpoints(workdir.checkpoints)))

        hosts.by_first(open_them)
        yield SavedStates(workdir, names, steps_per_epoch, next(iter(checkpoints), None))


class SavedStates:
    """The states in a run's folder: see `saved_states`."""

    def __init__(
        self,
        workdir: Workdir,
        names: Sequence[str],
        steps_per_epoch: int,
        checkpoints: Checkpoints | None,
    ) -> None:
        self._workdir, self._names, self._steps = workdir, names, steps_per_epoch
        self._checkpoints = checkpoints

    def find(self, template: GraphState) -> Found:
        """The newest state that is whole; the template, where there is none.

        Raises:
            RunError: there are some, and all are damaged; or lines of `metrics.jsonl` are missing.
        """
        state, so_far = template, None

        def read() -> list[Any]:
            nonlocal state, so_far
            epoch, state, so_far, messages = self._newest(template)
            records = self._workdir.records(up_to_epoch=epoch)
            self._workdir.keep_records(records)
            return [records, so_far, messages]

        records, so_far, messages = hosts.by_first(read)
        return Found(hosts.shared(state), records, so_far, messages)

    def _newest(self, template: GraphState) -> tuple[int, GraphState, Record | None, list[str]]:
        assert self._checkpoints is not None
        last, messages = max(self._checkpoints.epochs, default=0), []
        for number in checkpoint_epochs(self._workdir.interrupted)[::-1]:
            if number <= last * self._steps:
                break
            try:
                with Checkpoints(self._workdir.interrupted) as kept:
                    state, so_far = kept.restore(template, self._names, number), kept.beside(number)
                if so_far is not None:
                    return number // self._steps, state, so_far, []
            except RunError as error:
                messages.append(f"{error}, of the interruption after update {number}")
        epoch, state, more = self._checkpoints.restore_latest(template, self._names)
        return epoch, state, None, messages + more

    def save(self, epoch: int, state: GraphState, score: float | None) -> None:
        """Saves the state after an epoch; see `Checkpoints.save`."""
        if self._checkpoints is None:
            return
        self._checkpoints.save(epoch, state, self._names, score)
        if self._workdir.interrupted.exists():
            self._checkpoints.wait()
            shutil.rmtree(self._workdir.interrupted, ignore_errors=True)

    def save_interrupted(self, state: GraphState, so_far: Record) -> None:
        """Saves a state within an epoch, and returns when it is on disk."""
        if self._checkpoints is not None:
            with Checkpoints(self._workdir.interrupted) as kept:
                kept.save(int(state.step), state, self._names, None, so_far)

    def wait(self) -> None:
        """Waits until all is written; see `Checkpoints.wait`."""
        if self._checkpoints is not None:
            self._checkpoints.wait()

    def restore(self, template: GraphState, epoch: int) -> GraphState:
        """The state after an epoch; see `Checkpoints.restore`."""
        state = template

        def read() -> None:
            nonlocal state
            assert self._checkpoints is not None
            state = self._checkpoints.restore(template, self._names, epoch)

        hosts.by_first(read)
        restored: GraphState = hosts.shared(state)
        return restored
