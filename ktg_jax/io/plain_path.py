"""Folders by a plain path, for libraries to which some characters of a path mean something else."""

import os
import re
import shutil
import tempfile
import weakref
from pathlib import Path

from ktg_jax.errors import InputError

_PLAIN = re.compile(r"[\w/ .,=+@%-]*")


class PlainFolder:
    """A folder by a path that has letters, digits and few other characters.

    Orbax takes `[` for a pattern, a backslash for a separator and `gs:` for a protocol; what it
    writes below such a path is lost. It is then given a link to the folder, which lives in the
    folder for temporary files as long as this object.

    Args:
        folder: absolute.

    Raises:
        InputError: there is no folder for temporary files whose own path is plain.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._home: Path | None = None
        if not is_plain(folder):
            self._home = Path(tempfile.mkdtemp(prefix="ktg-", dir=_plain_home()))
            weakref.finalize(self, shutil.rmtree, self._home, ignore_errors=True)

    @property
    def path(self) -> Path:
        """The plain path; a link that was cleared away meanwhile is made anew."""
        if self._home is None:
            return self._folder
        link = self._home / "folder"
        if not link.is_symlink():
            self._home.mkdir(exist_ok=True)
            link.symlink_to(self._folder)
        return link

    def told(self, text: str) -> str:
        """A message about the plain path, with the folder's own path in it."""
        return text.replace(str(self.path), str(self._folder))


def is_plain(path: str | os.PathLike[str]) -> bool:
    """Whether a path means the same to everyone.

    >>> is_plain("runs/dml 2"), is_plain("runs/lr[0.1]")
    (True, False)
    """
    return _PLAIN.fullmatch(os.fspath(path)) is not None


def _plain_home() -> str:
    homes = (tempfile.gettempdir(), "/tmp", "/var/tmp")
    for home in homes:
        if is_plain(home) and os.path.isdir(home):
            return home
    raise InputError("TMPDIR", homes[0], "a folder whose path has no special characters")
