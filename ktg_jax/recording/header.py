"""What a recording says of itself: what it is of, in which form, and how it is cut into shards."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ktg_jax.checks import is_whole
from ktg_jax.errors import InputError
from ktg_jax.io.json_input import decoded, read

HEADER = "recording.json"
_VERSION = 1
_SHARD_BYTES = 2**24
_BYTES = {"float16": 2, "float32": 4}
BATCHES, IMAGES = "batches", "images"


@dataclass(frozen=True)
class Header:
    """The header of a recording.

    Attributes:
        kind: `batches`: a row is a training step, and has the outputs for its augmented batch;
            `images`: a row is a training image, and has one output for it (a static recording).
        of: what the outputs are for, as `BatchStream.facts` says it.
        rows: how many rows there are.
        classes: the number of logits.
        dtype: `float16` or `float32`, in which the numbers are stored.
        top: store the logarithms of the so many largest probabilities, and of the sum of the rest;
            None: all logits.
        source: what the outputs are of, for people.

    Raises:
        InputError: names the first field that is out of range.

    >>> header = Header("batches", {"batch_size": 64}, rows=1000, classes=10)
    >>> header.row_shape, header.bytes
    ((64,), 1280000)
    """

    kind: Literal["batches", "images"]
    of: Mapping[str, Any]
    rows: int
    classes: int
    dtype: str = "float16"
    top: int | None = None
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in (BATCHES, IMAGES):
            raise InputError("kind", self.kind, f"{BATCHES}, {IMAGES}")
        for field in ("rows", "classes"):
            if not is_whole(getattr(self, field), 1):
                raise InputError(field, getattr(self, field), "a whole number of at least 1")
        if self.dtype not in _BYTES:
            raise InputError("dtype", self.dtype, ", ".join(_BYTES))
        if self.top is not None and not (is_whole(self.top, 1) and self.top < self.classes):
            allowed = f"1 to {self.classes - 1}: fewer than the {self.classes} classes"
            raise InputError("top", self.top, allowed)
        if self.kind == BATCHES and not is_whole(self.of.get("batch_size"), 1):
            raise InputError("batch_size", self.of.get("batch_size"), "at least 1")

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of a row, classes left out: `(B,)` of batches, `()` of images."""
        return (self.of["batch_size"],) if self.kind == BATCHES else ()

    @property
    def row_bytes(self) -> int:
        """How many bytes a row takes on disk."""
        samples = self.row_shape[0] if self.row_shape else 1
        number = _BYTES[self.dtype]
        if self.top is None:
            return samples * self.classes * number
        index = 2 if self.classes <= 2**16 else 4
        return samples * (self.top * (number + index) + number)

    @property
    def rows_per_shard(self) -> int:
        """How many rows a file has; the last one may have fewer."""
        return min(max(_SHARD_BYTES // self.row_bytes, 1), self.rows)

    @property
    def shards(self) -> int:
        """How many files there are."""
        return -(-self.rows // self.rows_per_shard)

    @property
    def bytes(self) -> int:
        """How many bytes all rows take on disk."""
        return self.rows * self.row_bytes

    def rows_of(self, shard: int) -> range:
        """The rows that are in a file."""
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.rows))

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        return {"version": _VERSION, **dataclasses.asdict(self)}


def shard_path(folder: Path, shard: int) -> Path:
    """The path of a file of outputs."""
    return folder / f"shard-{shard:05d}.safetensors"


def read_header(folder: Path, field: str) -> tuple[Header, list[int] | None]:
    """The header of a folder, and the checksums of its files; None: they are not all there yet.

    Raises:
        InputError: no recording there, or one that is damaged or of another version.
    """
    allowed = "the folder of a recording"
    if not (folder / HEADER).is_file():
        raise InputError(field, str(folder), f"{allowed} (no {HEADER} there)")
    fields = decoded(field, read(field, folder / HEADER))
    try:
        version, checksums = fields.pop("version"), fields.pop("crc32", None)
        if version != _VERSION:
            raise InputError(field, str(folder), f"{allowed} of version {_VERSION}, not {version}")
        header = Header(**fields)
        if checksums is not None and len(checksums) != header.shards:
            raise ValueError("a checksum for each file")
    except InputError as error:
        if error.field == field:
            raise
        raise InputError(field, str(folder), f"{allowed} ({HEADER} is damaged: {error})") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
        raise InputError(field, str(folder), f"{allowed} ({HEADER} is damaged: {found})") from None
    return header, checksums


def header_text(header: Header, checksums: list[int] | None) -> str:
    """What `read_header` reads."""
    ended = {} if checksums is None else {"crc32": checksums}
    return json.dumps(header.to_json() | ended, indent=1) + "\n"


def differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What is different in two descriptions, with both values; empty: nothing.

    >>> differing({"batch_size": 64}, {"batch_size": 32, "flip": True})
    'batch_size: 64, now 32; flip: None, now True'
    """
    keys = dict.fromkeys((*wanted, *found))
    return "; ".join(
        f"{key}: {found.get(key)}, now {wanted.get(key)}"
        for key in keys
        if found.get(key) != wanted.get(key)
    )
