"""How a command ends: exit code 0, 2 for bad input, 1 for a failed run, one line, no traceback."""

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from ktg_jax.errors import InputError, RunError


def run(
    main: Callable[[], None],
    interrupted: str = "interrupted; the same command goes on from the last checkpoint",
) -> None:
    """Runs a command's main function and exits; `interrupted` is what it says after Ctrl-C.

    What the operating system refuses, as a full disk does, is a failed run.
    """
    # Orbax logs every file it writes, and the traceback of what it raises anyway.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        with _no_interrupt_lost():
            main()
    except InputError as error:
        _end(f"error: {error}", 2)
    except (RunError, OSError) as error:
        _end(f"failed: {error}", 1)
    except KeyboardInterrupt:
        _end(interrupted, 130)
    sys.exit(0)


_AGAIN_SECONDS = 0.05


@contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """Sends Ctrl-C anew where it came in code that nothing can be raised from.

    JAX's callback of the garbage collector is such code: Python drops the interrupt there, and the
    command would go on.
    """
    report = sys.unraisablehook

    def on_dropped(dropped: "sys.UnraisableHookArgs") -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            report(dropped)
            return
        # A little later, for raised in here it would be dropped as well.
        main = threading.main_thread().ident
        again = threading.Timer(_AGAIN_SECONDS, signal.pthread_kill, (main, signal.SIGINT))
        again.daemon = True
        again.start()

    sys.unraisablehook = on_dropped
    try:
        yield
    finally:
        sys.unraisablehook = report


def say(console: Console, text: str) -> None:
    """Prints a line as it is, however long."""
    console.print(text, highlight=False, soft_wrap=True)


def _end(message: str, code: int) -> None:
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)
