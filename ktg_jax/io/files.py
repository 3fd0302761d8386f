"""Files that are either whole or not there, and where the cached ones are."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path beside `path` and renames it to `path` when the block succeeds.

    The temporary name keeps the suffix, by which many writers choose a format. When the block
    fails the temporary file is removed and what stood at `path` stays as it was. An error of the
    operating system names `path`.
    """
    path = Path(path)
    # The stem is cut so that the temporary name is allowed wherever the name itself is.
    stem = os.fsencode(path.stem)[:200].decode(errors="ignore")
    temporary = path.with_name(f".{stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        with naming(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """An error of the operating system names the file, as a full disk's does not by itself."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text through `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """`cache_dir`, else the environment's `KTG_CACHE_DIR`, else the user's cache folder."""
    import platformdirs

    chosen = cache_dir or os.environ.get("KTG_CACHE_DIR")
    return Path(chosen or platformdirs.user_cache_dir("ktg_jax")).expanduser()
