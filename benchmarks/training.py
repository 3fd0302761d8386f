"""`experiments.train` on so many cores: `python -m benchmarks.training CORES until ARGUMENTS`.

With `until` = `first_step` it prints a line when the first step is done, and ends there; with
`end` it trains to the end.
"""

import os
import sys
from typing import Any
from unittest import mock

from benchmarks.task import limit_threads


def main() -> None:
    """Trains as the command line says."""
    threads, until, *arguments = sys.argv[1:]
    limit_threads(int(threads))
    sys.argv[1:] = arguments
    # Imported only now: XLA sizes its thread pool by the cores that the process may use.
    from experiments import train
    from experiments.runs import cli

    if until == "end":
        cli.run(train.main)
    with mock.patch.object(train.Display, "step", _end_at_first_step):
        cli.run(train.main)


def _end_at_first_step(display: Any, number: int, metrics: Any) -> None:
    """Ends the process; the metrics of a step are read when it is done."""
    del display, metrics
    print(f"step {number} is done", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
