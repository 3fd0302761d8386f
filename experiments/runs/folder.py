"""A folder that says what it holds, so that nothing is mixed up or worked on twice at once."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import ktg_jax as ktg
from ktg_jax.errors import InputError
from ktg_jax.io.files import write_text

from .identity import differences, is_own
from .locks import lock_if_possible
from .shapes import Record, Shape, misfit

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_LOCK = ".lock"


class FolderBusyError(InputError):
    """Another process works in the folder."""


class Folder:
    """A folder whose `config.json` says what determines its contents.

    Who works in it locks it first, then looks whose it is, then begins or goes on (`begun`). Who
    only reads takes no lock and writes nothing.

    Args:
        path: the path of the folder; need not exist.
    """

    holds: ClassVar[str]
    """What is in it, for messages: `a run`."""

    shapes: ClassVar[Mapping[str, Shape]] = {"config.json": {"config": {}}}
    """What each JSON file must have."""

    traces: ClassVar[tuple[str, ...]] = ()
    """Files and folders that belong to what `config.json` says, and to nothing else."""

    mended: ClassVar[tuple[str, ...]] = ()
    """Files that the same command writes again where they are damaged."""

    way_out: ClassVar[str] = "another --workdir begins anew"
    """What to do about other damage."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # Absolute, for it may be renamed from within.
        self.path = Path(os.path.expanduser(path)).absolute()
        _check_text(self.path)

    @property
    def exists(self) -> bool:
        """Whether something lives here."""
        return os.path.lexists(self.path / "config.json")

    @property
    def is_used(self) -> bool:
        """Whether something lives here, or what is left of it."""
        return self.exists or bool(self._traces())

    @property
    def config(self) -> Record:
        """What determines the contents, as it was given."""
        return self.read("config.json")["config"]

    @property
    def data_dir(self) -> str | None:
        """Where the data was last, if that was said."""
        known = self.read("config.json")
        given = known.get("data_dir")
        return None if given is None else _found(given, known)

    @property
    def data(self) -> str:
        """The data; of a user's own, with the path where it was last."""
        known = self.read("config.json")
        data = known["config"].get("training", known["config"])["data"]
        kind, _, path = data.partition(":")
        return f"{kind}:{_found(path, known)}" if is_own(data) else data

    def check(self, config: Mapping[str, Any]) -> None:
        """Checks that the folder holds nothing else than this.

        Args:
            config: what determines the contents; only these fields are compared.

        Raises:
            InputError: names the fields that differ; or `config.json` is damaged, or gone.
        """
        if not self.exists:
            self._check_traces()
            return
        differing = differences(self.config, config)
        if differing:
            allowed = f"a folder without another run (differing: {differing})"
            raise InputError("workdir", str(self.path), allowed)

    @contextmanager
    def begun(
        self,
        config: Mapping[str, Any],
        data_dir: str | None = None,
        files: Mapping[str, Record] | None = None,
    ) -> Iterator[None]:
        """Keeps the folder, and begins in it or goes on with what was begun: `kept` and `begin`."""
        with self.kept():
            self.begin(config, data_dir, files)
            yield

    def begin(
        self,
        config: Mapping[str, Any],
        data_dir: str | None = None,
        files: Mapping[str, Record] | None = None,
    ) -> None:
        """Says in the folder, which is kept, what it holds, or checks that it holds this.

        Of a folder that holds it, the places are noted where everything is now, checksums that it
        did not have yet, and files that are damaged or gone.

        Args:
            config: what determines the contents.
            data_dir: where its data is, which does not determine it.
            files: contents of other JSON files, by name.

        Raises:
            InputError: as `check`, or the folder cannot be written.
        """
        self.check(config)
        known = self.read("config.json") if self.exists else {"versions": _versions()}
        places = {"data_dir": data_dir, "cwd": os.getcwd()}
        content = {"config": _merged(known.get("config", {}), config), **places}
        contents = {**(files or {}), "config.json": {**known, **content}}
        added = [name for name in contents if not os.path.lexists(self.path / name)]
        try:
            for name, beside in contents.items():
                if self._content(name) != beside:
                    self.write(name, beside)
        except OSError as error:
            for name in added if "config.json" in added else ():
                (self.path / name).unlink(missing_ok=True)
            raise self._unwritable(error) from None

    def set_aside(self) -> Path | None:
        """Renames the folder, if anything lives there; returns its new name.

        Of a link to a folder, that folder is renamed: the link stays, for the one that follows.

        Raises:
            InputError: another process works there, or it cannot be renamed.
        """
        if not self.is_used:
            return None
        real = self._real
        names = (real.with_name(f"{real.name}.old{i}") for i in range(1, 10_000))
        aside = next(name for name in names if not os.path.lexists(name))
        with self.locked():
            try:
                real.rename(aside)
            except OSError as error:
                allowed = f"a folder that can be renamed ({error})"
                raise InputError("workdir", str(self.path), allowed) from None
        return aside

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Makes the folder, unless it is there, and locks it.

        Where the block fails before anything begins here, what was made for it is taken away.

        Raises:
            InputError: another process works there, or it cannot be made.
        """
        is_new, lock = self._make(), self.path / _LOCK
        had_lock = lock.exists()
        with self.locked():
            try:
                yield
            except BaseException:
                if not (self.exists or had_lock):
                    with suppress(OSError):  # the first reason counts
                        lock.unlink()
                        if is_new:
                            self._real.rmdir()
                raise

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from working in the folder; ends with the process, however."""
        path = self.path / _LOCK
        try:
            file = path.open("w")
        except OSError as error:
            raise self._unwritable(error) from None
        with file:
            # Another process may have set the folder aside since the file was opened.
            if not lock_if_possible(file, wait=False) or not _is_at(path, file.fileno()):
                allowed = "a folder in which no other process trains"
                raise FolderBusyError("workdir", str(self.path), allowed)
            yield

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file into the folder."""
        write_text(self.path / name, json.dumps(content, indent=1) + "\n")

    def read(self, name: str) -> Record:
        """Reads one of the JSON files.

        Raises:
            InputError: it is not there, damaged, or something else; names the way out.
        """
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            allowed = f"a folder with a whole {name} ({error}); {self._way_out(name)}"
            raise InputError("workdir", str(self.path), allowed) from None
        missing = misfit(content, self.shapes[name])
        if missing is not None:
            lacks = f"{name} has no {missing!r}" if missing else f"{name} is something else"
            allowed = f"the folder of {self.holds} ({lacks}); {self._way_out(name)}"
            raise InputError("workdir", str(self.path), allowed)
        return content

    def _way_out(self, name: str) -> str:
        again = "the command that made it writes it again"
        return again if name in self.mended else self.way_out

    def whole(self, name: str) -> Record | None:
        """The content of one of the JSON files; None: it is not there, or damaged."""
        try:
            return self.read(name)
        except InputError:
            return None

    def is_damaged(self, name: str) -> bool:
        """Whether one of the JSON files is there, but cannot be read."""
        return os.path.lexists(self.path / name) and self.whole(name) is None

    @property
    def _real(self) -> Path:
        """The folder itself, where its path is a link, also one that leads nowhere yet."""
        return Path(os.path.realpath(self.path))

    def _make(self) -> bool:
        """Whether the folder was not there and is made."""
        try:
            self._real.mkdir(parents=True)
        except FileExistsError as error:
            if not self.path.is_dir():
                raise self._unwritable(error) from None
            return False
        except OSError as error:
            raise self._unwritable(error) from None
        return True

    def _content(self, name: str) -> Any:
        """What is in a JSON file; None: nothing that can be read."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None

    def _traces(self) -> list[str]:
        """What is here that belongs to a `config.json`, and is not empty."""
        found = [name for name in self.traces if os.path.exists(self.path / name)]
        return [name for name in found if _is_filled(self.path / name)]

    def _check_traces(self) -> None:
        if traces := self._traces():
            allowed = f"a folder with the config.json that {', '.join(traces)} belongs to"
            raise InputError("workdir", str(self.path), f"{allowed}; {self.way_out}")

    def _unwritable(self, error: OSError) -> InputError:
        allowed = f"a folder that can be written ({error})"
        return InputError("workdir", str(self.path), allowed)


def _merged(known: Mapping[str, Any], config: Mapping[str, Any]) -> Record:
    """The configuration as it is now, with checksums of what it did not look at this time."""
    merged = {**known, **config}
    for field, value in config.items():
        if field.endswith("_facts") and field in known:
            merged[field] = {**known[field], **value}
    return merged


def _found(path: str, known: Mapping[str, Any]) -> str:
    """A path that was given in another folder: from there if it is there, else from here."""
    there = os.path.join(known.get("cwd") or "", os.path.expanduser(path))
    return there if os.path.exists(there) else path


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one of this path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _is_filled(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.stat().st_size > 0


def _versions() -> dict[str, str]:
    own = {"python": sys.version.split()[0], "ktg_jax": ktg.__version__}
    return own | {library: metadata.version(library) for library in _LIBRARIES}


def _check_text(path: Path) -> None:
    """Raises InputError for a path that is no text: checkpoints and databases cannot be there."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        allowed = "a path in UTF-8; where Python takes it for ASCII, PYTHONUTF8=1 helps"
        raise InputError("workdir", str(path), allowed) from None
