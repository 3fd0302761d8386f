"""TensorBoard files of a run (extra: tensorboard)."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ktg_jax.errors import InputError


def require_tensorboard() -> None:
    """Raises InputError where tensorboardX is not installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        allowed = 'False, or the extra: pip install "ktg_jax[tensorboard]"'
        raise InputError("tensorboard", True, allowed)


def open_writer(folder: Path, first_epoch: int) -> Callable[[dict[str, Any]], None]:
    """Returns a function that writes an epoch's record, replacing those from `first_epoch` on."""
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=first_epoch)

    def write(record: dict[str, Any]) -> None:
        for node in record["nodes"]:
            for key, value in node.items():
                if isinstance(value, float):
                    writer.add_scalar(f"{key}/{node['name']}", value, record["epoch"])
        writer.flush()

    return write
