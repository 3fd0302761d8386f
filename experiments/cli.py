"""How a command ends: exit code 0, 2 for bad input, 1 for a failed run, one line, no traceback."""

import logging
import sys
from collections.abc import Callable

from ktg_jax.errors import InputError, RunError


def run(
    main: Callable[[], None],
    interrupted: str = "interrupted; the same command goes on from the last checkpoint",
) -> None:
    """Runs a command's main function and exits; `interrupted` is what it says after Ctrl-C."""
    # Orbax logs every file it writes, and the traceback of what it raises anyway.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        main()
    except InputError as error:
        _end(f"error: {error}", 2)
    except RunError as error:
        _end(f"failed: {error}", 1)
    except KeyboardInterrupt:
        _end(interrupted, 130)
    sys.exit(0)


def _end(message: str, code: int) -> None:
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)
