"""Images that stay in their files, and are read and decoded one at a time. Host only, no JAX."""

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ktg_jax.data.form import ImageForm
from ktg_jax.data.views import random_part, resized
from ktg_jax.errors import InputError

STREAMS = ("cifar10", "cifar100", "tiny_imagenet", "tfds:NAME", "folder:DIR")
"""Data that can be streamed."""


@dataclass(frozen=True)
class Streaming:
    """How images are streamed.

    Attributes:
        centre: evaluation sees the middle of an image, in its own proportions; else all of it.
        workers: processes that read and decode; 0: threads of this one.
    """

    centre: bool = False
    workers: int = 0


class ImageSource(Protocol):
    """Encoded images by their positions; can be pickled, for other processes to read from."""

    def __len__(self) -> int:
        """How many there are."""

    def encoded(self, positions: Sequence[int]) -> Sequence[tuple[Path | bytes, str]]:
        """Each image as a file, or as what a file holds; and what it is called in errors."""

    @property
    def checksum(self) -> int:
        """Of the names and sizes of all files."""


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files of a folder.

    Attributes:
        folder: that all are in.
        names: their paths in it, bytes `[n]`: an array takes a fraction of what paths do.
        checksum: see `ImageSource`.
    """

    folder: Path
    names: np.ndarray
    checksum: int

    def __len__(self) -> int:
        return len(self.names)

    def encoded(self, positions: Sequence[int]) -> Sequence[tuple[Path | bytes, str]]:
        """See `ImageSource`."""
        paths = [self.folder / os.fsdecode(bytes(self.names[i])) for i in positions]
        return [(path, str(path)) for path in paths]


def image_files(folder: Path, paths: Sequence[Path]) -> ImageFiles:
    """The source of some files of a folder.

    Raises:
        InputError: one that is not there.
    """
    names = [os.fsencode(path.relative_to(folder)) for path in paths]
    checksum = 0
    for path, name in zip(paths, names, strict=True):
        try:
            size = path.stat().st_size
        except OSError as error:
            raise InputError("data", str(path), "a file that can be read") from error
        checksum = zlib.crc32(b"%s\0%d\n" % (name, size), checksum)
    return ImageFiles(folder.absolute(), np.array(names, np.bytes_), checksum)


@dataclass(frozen=True, eq=False)
class ImageRecords:
    """The images of array_record files that tensorflow-datasets has prepared.

    Attributes:
        records: a `tfds` data source that leaves images encoded.
        files: that they are in.
    """

    records: Any
    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.records)

    def encoded(self, positions: Sequence[int]) -> Sequence[tuple[Path | bytes, str]]:
        """See `ImageSource`.

        Raises:
            InputError: damaged files.
        """
        with undamaged(self.files):
            found = self.records.__getitems__([int(i) for i in positions])
        folder = self.files[0].parent
        both = zip(positions, found, strict=True)
        return [(example["image"], f"image {i} of {folder}") for i, example in both]

    @property
    def checksum(self) -> int:
        """See `ImageSource`."""
        named = [f"{file.name}\0{file.stat().st_size}\n" for file in self.files]
        return zlib.crc32("".join(named).encode())


@contextmanager
def undamaged(files: Sequence[Path]) -> Iterator[None]:
    """What goes wrong in reading array_record files is an InputError that names them."""
    try:
        yield
    except (ImportError, InputError):
        raise
    except Exception as error:  # array_record, protobuf and PIL each have their own types
        found = ", ".join(map(str, files))
        raise InputError("data_dir", found, "complete, undamaged array_record files") from error


@dataclass(frozen=True, eq=False)
class StreamedImages:
    """Images in place of an array uint8 `[n, h, w, c]`, of which none is in memory.

    Attributes:
        source: where they are read from.
        form: what they are brought to.
        positions: int `[n]`, their positions in the source.
        workers: processes that read batches of them; 0: threads of this one.
    """

    source: ImageSource
    form: ImageForm
    positions: np.ndarray
    workers: int = 0

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`[n, h, w, c]`."""
        return len(self.positions), *self.form.shape

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, indices: np.ndarray) -> "StreamedImages":
        """Those at `indices`, integers `[m]`; none of them is read."""
        return replace(self, positions=self.positions[indices])

    @property
    def checksum(self) -> int:
        """Of the names and sizes of files, and of which images of them these are."""
        return zlib.crc32(self.positions.astype(np.int64).tobytes(), self.source.checksum)

    def read(self, indices: np.ndarray, parts: np.ndarray | None = None) -> np.ndarray:
        """Some of the images.

        Args:
            indices: int `[m]`, each 0 to n - 1.
            parts: float `[m, attempts, 4]`, which choose a part of each image as `random_part`
                does; None: they are as evaluation sees them.

        Returns:
            uint8 `[m, h, w, c]`.

        Raises:
            InputError: names the image that cannot be decoded, or has another size.
        """
        from ktg_jax.data.images import in_form  # which takes PIL
        from ktg_jax.data.pictures import decoded, is_greyscale, opened

        made = np.empty((len(indices), *self.form.shape), np.uint8)
        files = self.source.encoded(self.positions[indices])
        for i, (file, name) in enumerate(files):
            with opened(file, name) as image:
                if self.form.greyscale and not is_greyscale(image):
                    raise InputError("data", name, "a grey image, as all that were looked at first")
                picture = decoded(image, self.form.greyscale, name)
                if parts is None:
                    made[i] = in_form(picture, self.form, name)
                else:
                    box = random_part(*picture.size, parts[i])
                    made[i] = resized(picture, self.form.height, self.form.width, box)
        return made


def all_of(source: ImageSource, form: ImageForm, workers: int = 0) -> StreamedImages:
    """All images of a source."""
    return StreamedImages(source, form, np.arange(len(source)), workers)
