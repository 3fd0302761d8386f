"""A folder that says what it holds, so that nothing is mixed up or worked on twice at once."""

import fcntl
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import ktg_jax as ktg
from ktg_jax.errors import InputError
from ktg_jax.files import write_text

Record = dict[str, Any]
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class FolderBusyError(InputError):
    """Another process works in the folder."""


class Folder:
    """A folder whose `config.json` says what determines its contents.

    Args:
        path: of the folder; need not exist.
    """

    command: ClassVar[str]
    """What makes such folders, for messages."""

    keys: ClassVar[Mapping[str, str]] = {"config.json": "config"}
    """A key of each JSON file, which tells ours from others'."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()  # for it may be renamed from within

    @property
    def exists(self) -> bool:
        """Whether something lives here."""
        return (self.path / "config.json").is_file()

    @property
    def config(self) -> Record:
        """What determines the contents, as it was given."""
        return self.read("config.json")["config"]

    @property
    def data_dir(self) -> str | None:
        """Where the data was."""
        return self.read("config.json").get("data_dir")

    def check(self, config: Mapping[str, Any]) -> None:
        """Checks that the folder holds nothing else than this.

        Args:
            config: what determines the contents; only these fields are compared.

        Raises:
            InputError: names the fields that differ.
        """
        if not self.exists:
            return
        differing = differences(self.config, config)
        if differing:
            allowed = f"a folder without another run (differing: {differing})"
            raise InputError("workdir", str(self.path), allowed)

    def begin(
        self,
        config: Mapping[str, Any],
        data_dir: str | None = None,
        files: Mapping[str, Record] | None = None,
    ) -> None:
        """Makes the folder and says in it what it holds, or checks that it holds this.

        Args:
            config: what determines the contents.
            data_dir: where its data is, which does not determine it.
            files: contents of other JSON files to begin with, by name.

        Raises:
            InputError: as `check`, or the folder cannot be made.
        """
        self.check(config)
        if self.exists:
            return
        content = {"config": dict(config), "data_dir": data_dir, "versions": _versions()}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name, beside in ({**(files or {}), "config.json": content}).items():
                self.write(name, beside)
        except OSError as error:
            allowed = f"a folder that can be written ({error})"
            raise InputError("workdir", str(self.path), allowed) from None

    def set_aside(self) -> Path | None:
        """Renames the folder, if anything lives there; returns its new name.

        Raises:
            InputError: another process works there.
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
        """Keeps other processes from working in the folder; ends with the process, however."""
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                allowed = "a folder in which no other process trains"
                raise FolderBusyError("workdir", str(self.path), allowed) from None
            yield

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file into the folder."""
        write_text(self.path / name, json.dumps(content, indent=1) + "\n")

    def read(self, name: str) -> Record:
        """Reads one of the JSON files.

        Raises:
            InputError: it is not there, damaged, or something else.
        """
        try:
            content = json.loads((self.path / name).read_text())
        except (OSError, ValueError) as error:
            raise InputError("workdir", str(self.path), f"readable {name} ({error})") from None
        key = self.keys[name]
        if not isinstance(content, dict) or key not in content:
            allowed = f"a folder of {self.command} ({name} has no {key!r})"
            raise InputError("workdir", str(self.path), allowed)
        return content


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The fields of `wanted` that `found` has otherwise, with both values; empty: none.

    >>> differences({"data": {"name": "a"}, "more": 1}, {"data": {"name": "b"}})
    "data.name: 'a', now 'b'"
    """
    found = {key: value for key, value in found.items() if key in wanted}
    return "; ".join(f"{key}: {old!r}, now {new!r}" for key, old, new in _differing(found, wanted))


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The fields in which two mappings differ, those of inner mappings one by one."""
    found = []
    for key in (*old, *(key for key in new if key not in old)):
        if old.get(key) == new.get(key):
            continue
        if isinstance(old.get(key), Mapping) and isinstance(new.get(key), Mapping):
            inner = _differing(old[key], new[key])
            found += [(f"{key}.{field}", was, now) for field, was, now in inner]
        else:
            found.append((key, old.get(key), new.get(key)))
    return found


def _versions() -> dict[str, str]:
    own = {"python": sys.version.split()[0], "ktg_jax": ktg.__version__}
    return own | {library: metadata.version(library) for library in _LIBRARIES}
