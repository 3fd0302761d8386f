"""Files that are either whole or not there, and where the cached ones are."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path beside `path` and renames it to `path` when the block succeeds.

    The temporary name keeps the suffix, by which many writers choose a format. When the block
    fails the temporary file is removed and what stood at `path` stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text through `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """`cache_dir`, else the environment's `KTG_CACHE_DIR`, else the user's cache folder."""
    chosen = cache_dir or os.environ.get("KTG_CACHE_DIR")
    return Path(chosen or platformdirs.user_cache_dir("ktg_jax")).expanduser()
