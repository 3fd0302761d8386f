"""The folder of a run: what is in it, whose it is, and how it is resumed."""

import json
import os
from typing import ClassVar

import ktg_jax as ktg
from experiments.folder import Folder, Record
from ktg_jax.errors import RunError
from ktg_jax.files import write_text
from ktg_jax.weights import CHECKPOINTS


class Workdir(Folder):
    """A run's folder.

    `config.json` and `graph.json` say what the run is; `metrics.jsonl` has a line an epoch;
    `checkpoints/` has the state; `result.json` is there when, and only when, the run is finished.

    Args:
        path: of the folder; need not exist.
    """

    command = "experiments.train"
    keys: ClassVar = {"config.json": "config", "result.json": "target"}

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.checkpoints = self.path / CHECKPOINTS

    @property
    def result(self) -> Record | None:
        """The finished run's result; None: not finished."""
        return self.read("result.json") if (self.path / "result.json").is_file() else None

    @property
    def graph(self) -> ktg.Graph:
        """The run's graph."""
        return ktg.Graph.load(self.path / "graph.json")

    def records(self, up_to_epoch: int | None = None) -> list[Record]:
        """The lines of `metrics.jsonl`, in order, those of later epochs left out.

        Raises:
            RunError: the line of one of these epochs is missing or damaged.
        """
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        if up_to_epoch is None:
            up_to_epoch = len(lines)
        records: list[Record] = []
        for epoch, line in enumerate(lines[:up_to_epoch], start=1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                raise RunError(f"{path}: the line of epoch {epoch} is damaged") from None
        if [record["epoch"] for record in records] != list(range(1, up_to_epoch + 1)):
            raise RunError(f"{path}: lines of epochs 1 to {up_to_epoch} are not all there")
        return records

    def keep_records(self, records: list[Record]) -> None:
        """Rewrites `metrics.jsonl` with these records alone."""
        write_text(self.path / "metrics.jsonl", "".join(_line(record) for record in records))

    def append_record(self, record: Record) -> None:
        """Appends a line to `metrics.jsonl`, on disk when this returns.

        To be called before the epoch's checkpoint is saved: a run that is resumed from the
        checkpoint then finds every line that it needs, and drops those it will write again.
        """
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"
