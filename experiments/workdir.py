"""The folder of a run: what is in it, whose it is, and how it is resumed."""

import fcntl
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import ktg_jax as ktg
from ktg_jax.errors import InputError, RunError
from ktg_jax.files import write_text
from ktg_jax.weights import CHECKPOINTS

Record = dict[str, Any]
_KEY_OF = {"config.json": "config", "result.json": "target"}  # tells our files from others'
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Workdir:
    """A run's folder.

    `config.json` and `graph.json` say what the run is; `metrics.jsonl` has a line an epoch;
    `checkpoints/` has the state; `result.json` is there when, and only when, the run is finished.

    Args:
        path: of the folder; need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()  # for it may be renamed from within
        self.checkpoints = self.path / CHECKPOINTS

    @property
    def exists(self) -> bool:
        """Whether a run lives here."""
        return (self.path / "config.json").is_file()

    @property
    def config(self) -> Record:
        """What determines the run, as it was given."""
        return self._read("config.json")["config"]

    @property
    def data_dir(self) -> str | None:
        """Where the run's data was."""
        return self._read("config.json").get("data_dir")

    @property
    def result(self) -> Record | None:
        """The finished run's result; None: not finished."""
        return self._read("result.json") if (self.path / "result.json").is_file() else None

    @property
    def graph(self) -> ktg.Graph:
        """The run's graph."""
        return ktg.Graph.load(self.path / "graph.json")

    def check(self, config: Mapping[str, Any]) -> None:
        """Checks that the folder holds no other run than this one.

        Args:
            config: what determines the run; of a run that is here only these fields are compared.

        Raises:
            InputError: names the fields that differ.
        """
        if not self.exists:
            return
        found = {key: value for key, value in self.config.items() if key in config}
        differing = "; ".join(
            f"{key}: {old!r}, now {new!r}" for key, old, new in _differences(found, config)
        )
        if differing:
            allowed = f"a folder without another run (differing: {differing})"
            raise InputError("workdir", str(self.path), allowed)

    def begin(
        self, config: Mapping[str, Any], graph: ktg.Graph, data_dir: str | None = None
    ) -> None:
        """Makes the folder and says in it what the run is, or checks that it is the run there.

        Args:
            config: what determines the run.
            graph: of the run.
            data_dir: where its data is, which does not determine it.

        Raises:
            InputError: as `check`, or the folder cannot be made.
        """
        self.check(config)
        if self.exists:
            return
        content = {"config": dict(config), "data_dir": data_dir, "versions": _versions()}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            graph.save(self.path / "graph.json")
            self.write("config.json", content)
        except OSError as error:
            allowed = f"a folder that can be written ({error})"
            raise InputError("workdir", str(self.path), allowed) from None

    def set_aside(self) -> Path | None:
        """Renames the run in the folder, if there is one; returns its new name.

        Raises:
            InputError: another process trains there.
        """
        if not self.exists:
            return None
        names = (self.path.with_name(f"{self.path.name}.old{i}") for i in range(1, 10_000))
        aside = next(name for name in names if not name.exists())
        with self.locked():
            self.path.rename(aside)
        return aside

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from training in the folder; ends with the process, however."""
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(
                    "workdir", str(self.path), "a folder in which no other process trains"
                ) from None
            yield

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

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file into the folder."""
        write_text(self.path / name, json.dumps(content, indent=1) + "\n")

    def _read(self, name: str) -> Record:
        try:
            content = json.loads((self.path / name).read_text())
        except (OSError, ValueError) as error:
            raise InputError("workdir", str(self.path), f"readable {name} ({error})") from None
        key = _KEY_OF[name]
        if not isinstance(content, dict) or key not in content:
            allowed = f"a folder of experiments.train ({name} has no {key!r})"
            raise InputError("workdir", str(self.path), allowed)
        return content


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def _versions() -> dict[str, str]:
    own = {"python": sys.version.split()[0], "ktg_jax": ktg.__version__}
    return own | {library: metadata.version(library) for library in _LIBRARIES}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The fields in which two configurations differ, those of the graph one by one."""
    found = []
    for key in (*old, *(key for key in new if key not in old)):
        if old.get(key) == new.get(key):
            continue
        if isinstance(old.get(key), Mapping) and isinstance(new.get(key), Mapping):
            inner = _differences(old[key], new[key])
            found += [(f"{key}.{field}", was, now) for field, was, now in inner]
        else:
            found.append((key, old.get(key), new.get(key)))
    return found
