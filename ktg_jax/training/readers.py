"""Processes that read batches, one at a time each.

Grain's own processes are not used for this: one that is killed while it passes a batch on is waited
for without an end, and those that are busy are given 25 seconds each before they are ended. Here
each has a pipe of its own, which breaks when either end of it is gone.
"""

import multiprocessing
import queue
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import jax

from ktg_jax.errors import RunError, in_a_line

_PARTITIONABLE = "jax_threefry_partitionable"

Batch = dict[str, Any]
"""Arrays by name."""

_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
"""Those that a terminal, or a scheduler, sends to all processes of a command."""


class Readers:
    """Processes that read batches for the threads that ask.

    They end with this one, whatever ends it, and before that by `close` alone.

    Args:
        read: reads a batch by its number; can be pickled.
        number: of processes.
    """

    def __init__(self, read: Callable[[int], Batch], number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._processes, self._pipes = [], []
        # What decides the random numbers of a plan is to be the same there.
        settings = {_PARTITIONABLE: jax.config.values[_PARTITIONABLE]}
        with _signals_held_back():
            for _ in range(number):
                ours, theirs = context.Pipe()
                given = theirs, read, settings
                process = context.Process(target=_serve, args=given, daemon=True)
                process.start()
                theirs.close()  # or it would not break when the process ends
                self._processes.append(process)
                self._pipes.append(ours)
                self._idle.put(ours)

    def __call__(self, number: int) -> Batch:
        """A batch by its number, read by a process that has nothing else to do.

        Raises:
            RunError: the process has ended.
        """
        pipe = self._idle.get()
        try:
            pipe.send(number)
            answer = pipe.recv()
        except (EOFError, OSError):
            raise RunError("a process that reads images has ended") from None
        finally:
            self._idle.put(pipe)
        if isinstance(answer, Exception):
            raise answer
        batch: Batch = answer
        return batch

    def close(self) -> None:
        """Ends the processes, which hold nothing."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """A process that is started within it is given none of them before it asks for them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, read: Callable[[int], Batch], settings: dict[str, Any]) -> None:
    """Answers numbers with batches, on the CPU, until the other end of the pipe is gone."""
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    for name, value in {"jax_platforms": "cpu", **settings}.items():
        jax.config.update(name, value)
    with suppress(EOFError, OSError):
        while True:
            pipe.send(_answer(read, pipe.recv()))


def _answer(read: Callable[[int], Batch], number: int) -> Batch | Exception:
    try:
        return read(number)
    except (ValueError, MemoryError) as error:  # InputError among them
        return error
    except Exception as error:  # which may not be one that can be sent
        return RunError(in_a_line(error))
