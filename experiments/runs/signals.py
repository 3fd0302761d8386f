"""Signals that end a command: Ctrl-C, SIGTERM and SIGHUP.

It imports nothing that takes time: `experiments` calls it before a command's own imports. A signal
that is ignored when the command starts, as under nohup, stays ignored.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_Handler = Callable[[int, FrameType | None], Any] | int

_is_own = False
"""Whether the process is a command's and nobody else's."""

_SHOW_CURSOR = b"\x1b[?25h"  # which a display may have hidden
_AGAIN_SECONDS = 0.05
_ONE_WISH_SECONDS = 0.25
"""Signals within so short a time are one: a terminal that is closed may well send two."""

_holds = 0
_waiting: signal.Signals | None = None
"""The one that came within `held`, and is to be raised at its end."""


class Stopped(KeyboardInterrupt):
    """A signal asked the command to end; it unwinds as Ctrl-C does, whatever the signal."""


def exit_code(number: int) -> int:
    """What a shell calls the end by a signal: 130 for Ctrl-C.

    >>> [exit_code(number) for number in ENDING]
    [130, 143, 129]
    """
    return 128 + number


def told(number: int, text: str = "interrupted") -> str:
    """The line about a command that a signal ended.

    >>> told(signal.SIGINT, "interrupted; that is all"), told(signal.SIGTERM)
    ('interrupted; that is all', 'interrupted by SIGTERM')
    """
    if number == signal.SIGINT:
        return text
    return text.replace("interrupted", f"interrupted by {signal.Signals(number).name}", 1)


def begin_process() -> None:
    """Says that this process is a command's own, which begins with its imports.

    From now on the signals end it with one line: nothing of it is worth keeping yet.
    """
    global _is_own
    _is_own = True
    _handle(_end_now)


def end_process(code: int) -> NoReturn:
    """Ends the process, whatever its threads are in the midst of.

    Where Python takes itself apart under XLA's threads they can crash it. A process that is not
    the command's own is left by SystemExit, as ever.
    """
    if not _is_own:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _end_now(number: int, frame: FrameType | None = None) -> None:
    with suppress(OSError):
        if os.isatty(1):
            os.write(1, _SHOW_CURSOR)
        os.write(2, f"{told(number)}\n".encode())
    os._exit(exit_code(number))


def leave_to_system() -> None:
    """From now on they kill the process, as those of other programs."""
    _handle(signal.SIG_DFL)


class StoppedElsewhere(Stopped):
    """Another process of the same training was asked to end."""


def is_waiting() -> bool:
    """Whether a signal waits for the end of `held`."""
    return _waiting is not None


@contextmanager
def held() -> Iterator[None]:
    """Within it a signal waits for its end, and only then raises `Stopped`; a second one does not.

    For what leaves locks behind where it is left half-way, as reading a database does.
    """
    global _holds, _waiting
    _holds += 1
    try:
        yield
    finally:
        _holds -= 1
        if not _holds and _waiting is not None:
            number, _waiting = _waiting, None
            raise Stopped(number.name)


class Watch:
    """Within it, the first of these signals raises `Stopped`; a second one ends the process.

    Attributes:
        number: the number of the signal that came; None: none did.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._at = 0.0

    def __enter__(self) -> "Watch":
        """Begins to watch."""
        self._report = sys.unraisablehook
        sys.unraisablehook = self._on_dropped
        self._before = _handle(self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        """What was set before is set again."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._report

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        global _waiting
        now = time.monotonic()
        if self.number is None:
            self.number, self._at = number, now
            if not _holds:
                raise Stopped(signal.Signals(number).name)
            _waiting = signal.Signals(number)
        if now - self._at > _ONE_WISH_SECONDS:
            _end_now(number)

    def _on_dropped(self, dropped: "sys.UnraisableHookArgs") -> None:
        """Sends the signal anew that came in code that nothing can be raised from.

        JAX's callback of the garbage collector is such code: Python drops the interrupt there, and
        the command would go on. It is sent a little later, for raised in here it would be dropped
        as well.
        """
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            self._report(dropped)
            return
        number, self.number = self.number or signal.SIGINT, None
        main = threading.main_thread().ident
        again = threading.Timer(_AGAIN_SECONDS, signal.pthread_kill, (main, number))
        again.daemon = True
        again.start()


def _handle(handler: _Handler) -> dict[signal.Signals, _Handler]:
    """Sets a handler where the signal is not ignored; returns those of before."""
    if threading.current_thread() is not threading.main_thread():
        return {}  # Python sets handlers nowhere else
    changed: dict[signal.Signals, _Handler] = {}
    for number in ENDING:
        before = signal.getsignal(number)
        if before is not None and before != signal.SIG_IGN:
            signal.signal(number, handler)
            changed[number] = before
    return changed
