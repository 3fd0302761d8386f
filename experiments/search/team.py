"""The workers of one machine: started, watched, replaced where they are killed, and ended."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktg_jax.errors import RunError

from .config import SearchConfig, from_json, to_json

MOST_DEATHS = 5
"""Deaths of a worker and of those in its place while no trial ends: something kills them all."""


@dataclass(frozen=True)
class Orders:
    """What a worker is told to do.

    Attributes:
        config: the configuration of the search.
        index: the index of the worker among those of its machine.
        worker: its name, unlike that of any other on any machine.
        storage: URL, password included.
        study: name of the study.
        artifacts: folder for the pictures of graphs; empty: no pictures.
        recordings: folder for what frozen networks put out; empty: they run in every trial.
        deadline: seconds of `time.time` after which no trial begins.
        began: seconds of `time.time` when the command began, whichever worker this is.
        retrain: instead of trials, the runs to make, as fields of `TrainConfig`.
    """

    config: SearchConfig
    index: int
    worker: str = ""
    storage: str = ""
    study: str = ""
    artifacts: str = ""
    recordings: str = ""
    deadline: float | None = None
    began: float = field(default_factory=time.time)
    retrain: list[dict[str, Any]] | None = None

    def to_json(self) -> str:
        """A line of text."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.dumps(fields | {"config": to_json(self.config)})

    @classmethod
    def from_json(cls, text: str) -> "Orders":
        """The inverse of `to_json`."""
        fields = json.loads(text)
        return cls(**fields | {"config": from_json(fields["config"])})


class Team:
    """The workers of one machine, as a context: none outlives it.

    Args:
        orders: one a worker.
        logs: folder for what they say.
        on_death: called with the name of a worker that was killed, and the signal, before it is
            replaced; returns how many trials the worker has brought to an end.
    """

    def __init__(
        self,
        orders: Sequence[Orders],
        logs: Path,
        on_death: Callable[[str, int], int] = lambda worker, signal: 0,
    ) -> None:
        self._orders = orders
        self._logs = logs
        self._on_death = on_death
        self._processes: list[subprocess.Popen[str]] = []
        self._deaths = [0] * len(orders)  # since it ended a trial
        self._ended = [0] * len(orders)

    def __enter__(self) -> "Team":
        """Starts them."""
        self._logs.mkdir(parents=True, exist_ok=True)
        for orders in self._orders:
            self._processes.append(self._start(orders))
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends those that still work."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            if process.stdin is not None:
                process.stdin.close()

    def is_at_work(self) -> bool:
        """Whether any of them is not done; one that was killed is replaced.

        Raises:
            RunError: a worker says that it cannot go on, or is killed again and again.
        """
        at_work = False
        for i, orders in enumerate(self._orders):
            code = self._processes[i].poll()
            signal = None if code is None else _signal_of(code)
            if signal is not None:
                self._count_death(i, signal)
                self._processes[i] = self._start(orders)
            elif code:
                self._raise(orders, code)
            at_work |= self._processes[i].poll() is None
        return at_work

    def _count_death(self, i: int, signal: int) -> None:
        orders = self._orders[i]
        before, self._ended[i] = self._ended[i], self._on_death(orders.worker, signal)
        self._deaths[i] = 1 if self._ended[i] > before else self._deaths[i] + 1
        if self._deaths[i] >= MOST_DEATHS:
            raise RunError(
                f"worker {orders.index} was killed {MOST_DEATHS} times in a row "
                f"(signal {signal}); its log is {self._log(orders)}"
            )

    def _start(self, orders: Orders) -> subprocess.Popen[str]:
        with self._log(orders).open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.worker"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C is for the search, which ends its workers
            )
        assert process.stdin is not None
        try:
            process.stdin.write(orders.to_json() + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # killed already: found when it is watched
        return process

    def _log(self, orders: Orders) -> Path:
        return self._logs / f"worker-{orders.index}.log"

    def _raise(self, orders: Orders, code: int) -> None:
        lines = self._log(orders).read_text(errors="replace").splitlines()
        said = lines[-1] if lines else "nothing"
        for prefix in ("failed: ", "error: "):
            said = said.removeprefix(prefix)
        raise RunError(f"worker {orders.index}: {said} (its log is {self._log(orders)})")


def _signal_of(code: int) -> int | None:
    """The signal by which a process of this exit code ended; None: it ended by itself.

    >>> _signal_of(-9), _signal_of(143), _signal_of(2)
    (9, 15, None)
    """
    if code < 0:
        return -code
    return code - 128 if code > 128 else None  # it was still at its imports


def orders_for(config: SearchConfig, owner: str, **more: Any) -> list[Orders]:
    """The same orders for each of the search's workers."""
    return [
        Orders(config=config, index=i, worker=f"{owner}/{i}", **more) for i in range(config.workers)
    ]
