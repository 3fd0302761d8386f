"""Finding the image files of a folder: all of them, and what looks like one but is not read."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ktg_jax.data.pictures import image_suffixes
from ktg_jax.errors import InputError

_PICTURES = (
    *(".ai", ".arw", ".avif", ".cr2", ".cr3", ".dcm", ".dng", ".emf", ".eps", ".exr", ".hdr"),
    *(".heic", ".heif", ".jxl", ".nef", ".orf", ".raf", ".raw", ".rw2", ".svg", ".svgz", ".wmf"),
)
_BEGINNINGS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")
_BRANDS = (b"WEBP", b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis")  # from byte 8 on


@dataclass
class Found:
    """What a folder holds.

    Attributes:
        images: files whose suffix says that they are images, sorted.
        others: pictures in a format that is not read, or without a suffix that says what they are.
    """

    images: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)


def find_images(folder: Path, option: str) -> Found:
    """Looks through a folder and those within it; what is hidden is left out.

    Args:
        folder: that exists. Links are followed.
        option: that named the folder, for the errors.

    Raises:
        InputError: a link leads to a folder that was seen already, or to one around this one; a
            folder is named as an image; or one cannot be read.
    """
    found, suffixes = Found(), image_suffixes()
    seen = {_identity(around, option): around for around in folder.resolve().parents}
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        known = seen.setdefault(_identity(here, option), here)
        if known is not here:
            allowed = "folders without links to one that is around or read already"
            raise InputError(option, f"{here}, a link to {known}", allowed)
        for entry in _entries(here, option):
            path, suffix = Path(entry.path), Path(entry.name).suffix.lower()
            if _holds(entry.is_dir):
                if suffix in suffixes:
                    raise InputError(option, str(path), "an image file, not a folder of its name")
                waiting.append(path)
            elif suffix in suffixes:
                found.images.append(path)
            elif suffix in _PICTURES or (_holds(entry.is_file) and _is_picture(path)):
                found.others.append(path)
    return Found(sorted(found.images), sorted(found.others))


def loose_images(folder: Path, option: str) -> list[Path]:
    """The image files in a folder itself, sorted; hidden ones left out."""
    suffixes = image_suffixes()
    paths = [Path(e.path) for e in _entries(folder, option) if not _holds(e.is_dir)]
    return sorted(path for path in paths if path.suffix.lower() in suffixes)


def subfolders(folder: Path, option: str) -> list[Path]:
    """The folders in a folder, sorted; hidden ones left out."""
    entries = _entries(folder, option)
    return sorted(Path(entry.path) for entry in entries if _holds(entry.is_dir))


def count_images(folder: Path) -> int:
    """How many image files there are in a folder and in those within it; no link is followed."""
    suffixes = image_suffixes()
    names = (name for _, _, files in os.walk(folder) for name in files)
    return sum(Path(n).suffix.lower() in suffixes and not n.startswith(".") for n in names)


def named(paths: list[Path], folder: Path) -> str:
    """How many files, and which: the first three by name.

    >>> named([Path("a/b/1.png"), Path("a/c/2.png")], Path("a"))
    '2 files, b/1.png, c/2.png'
    """
    some = [str(path.relative_to(folder)) for path in paths[:3]]
    more = ["..."] if len(paths) > 3 else []
    return f"{len(paths)} file{'s' * (len(paths) > 1)}, {', '.join(some + more)}"


def _entries(folder: Path, option: str) -> Iterator["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(option, str(folder), f"a folder that can be read ({error})") from error


def _holds(is_of_kind: Callable[[], bool]) -> bool:
    """Whether an entry, or what it links to, is of a kind; a link to nothing is of none."""
    try:
        return is_of_kind()
    except OSError:
        return False


def _identity(folder: Path, option: str) -> tuple[int, int]:
    try:
        status = folder.stat()
    except OSError as error:
        raise InputError(option, str(folder), f"a folder that can be read ({error})") from error
    return status.st_dev, status.st_ino


def _is_picture(path: Path) -> bool:
    """Whether a file begins as pictures do."""
    try:
        with path.open("rb") as file:
            beginning = file.read(12)
    except OSError:
        return False
    return beginning.startswith(_BEGINNINGS) or beginning[8:12] in _BRANDS
