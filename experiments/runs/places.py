"""Where the folder of something is that was asked for without saying where."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ktg_jax.errors import InputError

from .folder import Folder


def place_of(
    parent: str | os.PathLike[str],
    name: str,
    fields: Mapping[str, Any],
    keys: Sequence[str],
    inner: str = "",
) -> Path:
    """Where the folder of these contents is, or is to be: `NAME-KEY`.

    One that is there under another name, as that of a graph's file was another, is the same.

    Args:
        parent: folder in which it is.
        name: to begin with.
        fields: what determines the contents, with the checksums of all that has a path.
        keys: a hash of the contents; then those by which they were named in former times.
        inner: folder within it that says what it holds.
    """
    parent, wanted = Path(parent), Path(parent) / f"{name}-{keys[0]}"
    others = (path for key in keys for path in sorted(parent.glob(f"*-{key}")))
    return next((path for path in (wanted, *others) if _holds(path / inner, fields)), wanted)


def _holds(path: Path, fields: Mapping[str, Any]) -> bool:
    folder = Folder(path)
    try:
        folder.check(fields)
    except InputError:
        return False
    return folder.exists
