"""The folder of a run: what is in it, whose it is, and how it is resumed."""

import json
import os
from typing import ClassVar

import ktg_jax as ktg
from ktg_jax.errors import RunError
from ktg_jax.io.files import naming, write_text
from ktg_jax.training.warm_start import CHECKPOINTS, read_graph

from .folder import Folder
from .shapes import MAYBE_NUMBER, NUMBER, Record, misfit

INTERRUPTED = "interrupted"
"""The folder of the state within an epoch, in which a run was asked to stop."""

_NUMBERS = {
    "val_accuracy": MAYBE_NUMBER,
    "test_accuracy": MAYBE_NUMBER,
    "val_loss": MAYBE_NUMBER,
    "test_loss": MAYBE_NUMBER,
}
_RECORD = {
    "epoch": int,
    "step": int,
    "seconds": NUMBER,
    "images_per_second": NUMBER,
    "nodes": [
        {
            "name": str,
            "train_loss": NUMBER,
            "train_accuracy": MAYBE_NUMBER,
            "val_loss": MAYBE_NUMBER,
            "val_accuracy": MAYBE_NUMBER,
            "edge_losses": [NUMBER],
        }
    ],
}
"""What a line of `metrics.jsonl` must have."""


class Workdir(Folder):
    """A run's folder.

    `config.json` and `graph.json` say what the run is; `metrics.jsonl` has a line an epoch;
    `checkpoints/` has the state, and `interrupted/` that within an epoch where it was stopped
    there; `result.json` is there when, and only when, the run is finished.

    Args:
        path: the path of the folder; need not exist.
    """

    holds = "a run"
    shapes: ClassVar = {
        "config.json": {
            "config": {
                "data": str,
                "train_limit": MAYBE_NUMBER,
                "val_fraction": NUMBER,
                "split_seed": int,
                "image_size": MAYBE_NUMBER,
                "mixed_precision": bool,
                "imports": [str],
                "graph": {"nodes": [{"name": str}], "gates": list},
                "data_facts": {"classes": int, "image_shape": [int]},
            }
        },
        "result.json": {
            "target": _NUMBERS,
            "nodes": [{"name": str, "model": str, "frozen": bool, **_NUMBERS}],
            "ensemble": _NUMBERS,
            "epochs": int,
            "seconds": NUMBER,
        },
    }
    traces = (CHECKPOINTS, INTERRUPTED, "metrics.jsonl", "result.json")
    mended = ("result.json", "graph.json")
    way_out = "train --no-resume starts over and keeps what is there beside it"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.checkpoints = self.path / CHECKPOINTS
        self.interrupted = self.path / INTERRUPTED

    @property
    def result(self) -> Record | None:
        """The finished run's result; None: not finished, or damaged, to be made again."""
        return self.whole("result.json")

    @property
    def graph(self) -> ktg.Graph:
        """The run's graph."""
        return read_graph(self.path)

    def records(self, up_to_epoch: int | None = None) -> list[Record]:
        """The lines of `metrics.jsonl`, in order, those of later epochs left out.

        Without a number of epochs, of a finished run those of its epochs, else all lines.

        Raises:
            RunError: the line of one of these epochs is missing or damaged; names the way out.
        """
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.is_file() else []
        if up_to_epoch is None:
            up_to_epoch = len(lines) if self.result is None else self.result["epochs"]
        records: list[Record] = []
        for epoch, line in enumerate(lines[:up_to_epoch], start=1):
            record = _record(line)
            if record is None:
                raise self._lacking(f"the line of epoch {epoch} is damaged")
            records.append(record)
        if [record["epoch"] for record in records] != list(range(1, up_to_epoch + 1)):
            raise self._lacking(f"lines of epochs 1 to {up_to_epoch} are not all there")
        return records

    def _lacking(self, what: str) -> RunError:
        return RunError(f"{self.path / 'metrics.jsonl'}: {what}; {self.way_out}")

    def keep_records(self, records: list[Record]) -> None:
        """Rewrites `metrics.jsonl` with these records alone."""
        write_text(self.path / "metrics.jsonl", "".join(_line(record) for record in records))

    def append_record(self, record: Record) -> None:
        """Appends a line to `metrics.jsonl`, on disk when this returns.

        To be called before the epoch's checkpoint is saved: a run that is resumed from the
        checkpoint then finds every line that it needs, and drops those it will write again.
        """
        path = self.path / "metrics.jsonl"
        with naming(path), path.open("a") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())


def _record(line: bytes) -> Record | None:
    """What a line says; None: it is damaged."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if misfit(record, _RECORD) is None else None


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"
