"""Writes a recording, row by row; interrupted, it goes on after the last whole file."""

import os
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ktg_jax.errors import InputError, RunError
from ktg_jax.io.files import write_text
from ktg_jax.io.tensors import write_tensors
from ktg_jax.recording.code import Tensors, encoded
from ktg_jax.recording.header import (
    BATCHES,
    HEADER,
    Header,
    differing,
    header_text,
    read_header,
    shard_path,
)
from ktg_jax.recording.shards import check_shard


class RecordingWriter:
    """Writes a recording into a folder.

    As a context manager it ends the recording where nothing went wrong within.

    Args:
        folder: made if it is not there. Where the same recording was begun in it, it goes on.
        header: what is recorded.

    Attributes:
        rows: how many rows are written; those of whole files, when it begins.

    Raises:
        InputError: the folder holds something else, or cannot be written to.

    >>> import tempfile
    >>> from ktg_jax.recording import Recording
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     header = Header("images", {"images": 2}, rows=2, classes=3)
    ...     with RecordingWriter(folder, header) as writer:
    ...         writer.add([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    ...     Recording(folder).rows(1, 1).tolist()
    [[4.0, 5.0, 6.0]]
    """

    def __init__(self, folder: str | os.PathLike[str], header: Header) -> None:
        self._folder, self._header = Path(os.path.expanduser(folder)), header
        self._pending: list[Tensors] = []
        self._ended = False
        if (self._folder / HEADER).exists():
            self._go_on()
        else:
            self._begin()

    def _begin(self) -> None:
        if self._folder.exists() and (not self._folder.is_dir() or any(self._folder.iterdir())):
            raise InputError("out", str(self._folder), "a new folder, or an empty one")
        self.rows = 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_text(self._folder / HEADER, header_text(self._header, None))
        except OSError as error:
            raise InputError("out", str(self._folder), f"a folder to write to ({error})") from None

    def _go_on(self) -> None:
        found, checksums = read_header(self._folder, "out")
        differences = differing(found.to_json(), self._header.to_json())
        if differences:
            allowed = f"a folder without another recording (differing: {differences})"
            raise InputError("out", str(self._folder), allowed)
        self._ended = checksums is not None
        whole = self._whole_shards()
        self.rows = min(whole * self._header.rows_per_shard, self._header.rows)

    def _whole_shards(self) -> int:
        for shard in range(self._header.shards):
            try:
                check_shard(self._folder, self._header, shard)
            except InputError:
                self._ended = False
                return shard
        return self._header.shards

    @property
    def is_complete(self) -> bool:
        """Whether the recording is there already, whole: nothing is left to add."""
        return self._ended

    def add(self, logits: ArrayLike) -> None:
        """Adds rows.

        Args:
            logits: of batches the next one's, float `[B, C]`; of images some more, float `[m, C]`.

        Raises:
            InputError: another shape, more rows than there are to be, or numbers that cannot be
                stored.
            RunError: they cannot be written.
        """
        array = np.asarray(logits, np.float32)
        rows = array[None] if self._header.kind == BATCHES else array
        shape = (*self._header.row_shape, self._header.classes)
        if rows.shape[1:] != shape or self.rows + len(rows) > self._header.rows:
            left = self._header.rows - self.rows
            raise InputError("logits", array.shape, f"rows of shape {shape}, {left} more")
        per_shard = self._header.rows_per_shard
        while len(rows):
            room = per_shard - self.rows % per_shard
            now, rows = rows[:room], rows[room:]
            self._pending.append(encoded(self._header, now))
            self.rows += len(now)
            if self.rows % per_shard == 0 or self.rows == self._header.rows:
                self._write()

    def _write(self) -> None:
        parts, self._pending = self._pending, []
        tensors = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        path = shard_path(self._folder, (self.rows - 1) // self._header.rows_per_shard)
        try:
            write_tensors(path, "out", tensors, {})
        except InputError as error:
            whole = path.stem
            raise RunError(
                f"{whole} of the recording cannot be written ({error.allowed}); the same command "
                "goes on after the last whole file"
            ) from None

    def close(self) -> None:
        """Ends the recording.

        Raises:
            RunError: rows are missing.
        """
        if self.rows != self._header.rows:
            raise RunError(f"{self._folder} has {self.rows} of {self._header.rows} rows")
        checksums = [
            zlib.crc32(shard_path(self._folder, shard).read_bytes())
            for shard in range(self._header.shards)
        ]
        write_text(self._folder / HEADER, header_text(self._header, checksums))
        self._ended = True

    def __enter__(self) -> "RecordingWriter":
        """The writer, closed at the end of the block."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Ends the recording; what ended the block early leaves it to be gone on with."""
        if kind is None and not self._ended:
            self.close()
