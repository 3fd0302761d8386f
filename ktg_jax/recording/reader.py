"""Reads a recording: its rows as logits, a few files at a time in memory."""

import functools
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ktg_jax.errors import InputError
from ktg_jax.recording.code import decoded
from ktg_jax.recording.header import HEADER, IMAGES, differing, read_header, shard_path
from ktg_jax.recording.shards import checked_shard

_OF_IMAGES = ("images", "image_shape", "train_crc32")
"""What a static recording depends on."""


class Recording:
    """A recording that is complete.

    Args:
        folder: where it is.

    Attributes:
        header: what is recorded.

    Raises:
        InputError: no recording there, or one that is not complete.

    >>> import tempfile
    >>> from ktg_jax.recording import Header, RecordingWriter
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with RecordingWriter(folder, Header("images", {}, rows=2, classes=2)) as writer:
    ...         writer.add([[0.5, 1.0], [2.0, -1.0]])
    ...     recording = Recording(folder)
    ...     recording.is_static, recording.rows(0, 2).tolist()
    (True, [[0.5, 1.0], [2.0, -1.0]])
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(os.path.expanduser(folder))
        self.header, checksums = read_header(self._folder, "outputs")
        missing = [
            path.name
            for shard in range(self.header.shards)
            if not (path := shard_path(self._folder, shard)).is_file()
        ]
        if checksums is None or missing:
            reason = f"{missing[0]} is missing" if missing else "it was never ended"
            allowed = f"a complete recording ({reason}; the command that made it goes on)"
            raise InputError("outputs", str(self._folder), allowed)
        self._checksums = checksums
        # Two, for a call of the step may need the end of one file and the beginning of another.
        self._shard = functools.lru_cache(maxsize=2)(self._read)

    @property
    def is_static(self) -> bool:
        """Whether it has one output for each image, whatever the augmentation."""
        return self.header.kind == IMAGES

    @property
    def checksum(self) -> int:
        """The checksum of all that it says and has."""
        return zlib.crc32((self._folder / HEADER).read_bytes())

    def check(self, of: Mapping[str, Any], *, classes: int, steps: int) -> None:
        """Checks that it is of the batches of a training.

        Args:
            of: what `BatchStream.facts` says of the training.
            classes: the number of classes.
            steps: the updates of the training.

        Raises:
            InputError: names what differs, or that it is too short.
        """
        if self.is_static:
            of = {key: of[key] for key in _OF_IMAGES}
        found = {"classes": self.header.classes, **self.header.of}
        differences = differing(found, {"classes": classes, **of})
        if not differences and not self.is_static and self.header.rows < steps:
            differences = f"steps: {self.header.rows}, now {steps}"
        if differences:
            allowed = f"a recording for this training (differing: {differences})"
            raise InputError("outputs", str(self._folder), allowed)

    def rows(self, first: int, count: int) -> np.ndarray:
        """So many rows: float32 `[count, B, C]` of batches, `[count, C]` of images.

        Raises:
            InputError: a damaged file, or rows that are not there.
        """
        if not 0 <= first < first + count <= self.header.rows:
            allowed = f"rows 0 to {self.header.rows - 1}"
            raise InputError("rows", (first, first + count - 1), allowed)
        per_shard = self.header.rows_per_shard
        parts = []
        while count:
            shard, start = divmod(first, per_shard)
            parts.append(self._shard(shard)[start : start + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def _read(self, shard: int) -> np.ndarray:
        checksum = self._checksums[shard]
        return decoded(self.header, checked_shard(self._folder, self.header, shard, checksum))
