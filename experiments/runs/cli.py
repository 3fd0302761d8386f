"""How a command ends: exit code 0, 2 for bad input, 1 for a failed run, one line, no traceback."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console

from ktg_jax.errors import InputError, RunError

from . import signals
from .console import Verbatim, print_anything
from .locks import check_platform

_OUTPUT_CLOSED = 141
"""The exit code of a command whose output nobody reads any more: that of SIGPIPE, as of others."""


def run(
    main: Callable[[], None],
    interrupted: str = "interrupted; the same command goes on from the last checkpoint",
) -> None:
    """Runs a command's main function and exits.

    What the operating system refuses, as a full disk does, is a failed run. Ctrl-C, SIGTERM and
    SIGHUP unwind it, so that what is pending is finished; a second one ends it at once.

    Args:
        main: the function.
        interrupted: what is said after Ctrl-C.
    """
    _let_orbax_warn()
    if not isinstance(sys.unraisablehook, _WithoutOrphans):  # for as long as the process lives
        sys.unraisablehook = _WithoutOrphans(sys.unraisablehook)
    print_anything()
    watch = signals.Watch()
    try:
        check_platform()
        with watch, _warnings_told():
            _written(main)
    except BaseException as error:
        if watch.number is not None:  # whatever the signal became on its way
            _say(signals.told(watch.number, interrupted))
            signals.end_process(signals.exit_code(watch.number))
        _end_with(error, interrupted)
    sys.exit(0)


def _let_orbax_warn() -> None:
    """Shows what Orbax warns of, but not every file it writes, nor what it raises anyway."""
    logger = logging.getLogger("absl")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_not_raised)


def _is_not_raised(record: logging.LogRecord) -> bool:
    is_slow_disk = str(record.msg).startswith("Waiting for previous save")
    return not is_slow_disk and (record.levelno < logging.ERROR or record.exc_info is None)


class _WithoutOrphans:
    """Says nothing of the writes that Orbax leaves behind a failed one, which is an error itself.

    Args:
        report: what says all else, as `sys.unraisablehook` does.
    """

    def __init__(self, report: Callable[["sys.UnraisableHookArgs"], object]) -> None:
        self._report = report

    def __call__(self, dropped: "sys.UnraisableHookArgs") -> None:
        is_orphan = dropped.exc_type is RuntimeError and dropped.object is None
        if not (is_orphan and str(dropped.exc_value) == "Event loop is closed"):
            self._report(dropped)


def _written(main: Callable[[], None]) -> None:
    """Calls it, and finds out whether somebody takes what it printed."""
    try:
        main()
    except SystemExit:  # after --help
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _end_with(error: BaseException, interrupted: str) -> None:
    """Ends as the error says; raises it where it is none of those that are expected."""
    match error:
        case InputError():
            _say(f"error: {error}")
            sys.exit(2)
        case BrokenPipeError():
            _drop_output()
            signals.end_process(_OUTPUT_CLOSED)
        case RunError() | OSError():
            _say(f"failed: {error}")
            signals.end_process(1)
        case signals.StoppedElsewhere():
            _say(interrupted.replace("interrupted", "interrupted by another process", 1))
            signals.end_process(signals.exit_code(signal.SIGTERM))
        case KeyboardInterrupt():  # raised by hand
            _say(interrupted)
            sys.exit(130)
    raise error


def _say(message: str) -> None:
    with suppress(OSError):  # a terminal that was closed
        print(" ".join(message.split()), file=sys.stderr)


def _drop_output() -> None:
    """Python writes what is left of the output when it ends, and would complain."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}"


@contextmanager
def _warnings_told() -> Iterator[None]:
    """Says each warning of the library in one line on stderr, as errors are."""
    logger, handler = logging.getLogger("ktg_jax"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine())
    logger.addHandler(handler)
    logger.propagate = False  # or other handlers would say it again
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(handler)


def say(console: Console, text: str) -> None:
    """Prints a line as it is, however long."""
    console.print(Verbatim(text), soft_wrap=True)
