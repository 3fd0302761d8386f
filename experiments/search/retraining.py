"""The runs of the fair ending, as a worker makes them."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from ..runs.assemble import load
from ..runs.config import TrainConfig
from ..runs.console import make_console
from ..runs.folder import FolderBusyError
from ..runs.options import with_tuples
from ..train import train

_POLL_SECONDS = 0.3


def retrain(runs: Sequence[dict[str, Any]], device: jax.Device) -> None:
    """Makes the runs that nobody else makes, one after the other: what a worker is told to do.

    Args:
        runs: fields of `TrainConfig`.
        device: to train on.

    Raises:
        RunError: a training fails.
    """
    configs = [TrainConfig(**with_tuples(fields)) for fields in runs]
    dataset = load(configs[0])
    while left := [config for config in configs if not is_done(config)]:
        for config in left:
            try:
                train(config, make_console(), dataset, [device])
            except FolderBusyError:
                time.sleep(_POLL_SECONDS)  # another worker makes it, or did until it was killed


def is_done(run: TrainConfig) -> bool:
    """Whether the run has been made."""
    return (Path(str(run.workdir)) / "result.json").is_file()
