"""TensorBoard files of a run (extra: tensorboard)."""

import importlib.util
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ktg_jax.errors import InputError

Record = dict[str, Any]


def require_tensorboard() -> None:
    """Raises InputError where tensorboardX is not installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        allowed = 'False, or the extra: pip install "ktg_jax[tensorboard]"'
        raise InputError("tensorboard", True, allowed)


@contextmanager
def event_writer(
    folder: Path, records: Sequence[Record], wanted: bool
) -> Iterator[Callable[[Record], None]]:
    """Gives a function that writes an epoch's record; does nothing unless `wanted`.

    The files are made anew from the records so far: what a killed run had not yet written to them
    is not lost.
    """
    if not wanted:
        yield lambda record: None
        return
    from tensorboardX import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    writer = SummaryWriter(str(folder))

    def write(record: Record) -> None:
        for node in record["nodes"]:
            for key, value in node.items():
                if isinstance(value, float):
                    writer.add_scalar(f"{key}/{node['name']}", value, record["epoch"])
        writer.flush()

    try:
        for record in records:
            write(record)
        yield write
    finally:
        writer.close()
