"""Batches of images that stay in their files, read ahead by Grain: in threads, or by workers.

The position in the data is the number of the update, as it is of images in memory: a training goes
on with the very images that it would have seen, from whatever update on. Each process of several
reads the rows of a batch that its own devices compute.
"""

import functools
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ktg_jax.data.streamed import StreamedImages
from ktg_jax.data.views import shifted
from ktg_jax.errors import InputError
from ktg_jax.training.batches import Batches, BatchPlan, Views
from ktg_jax.training.readers import Batch, Readers

_THREADS = 4
_IMPLEMENTATION = "threefry2x32"

_WORTH_WORKERS = 4
"""Batches of an evaluation, for each process that reads them."""


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """Reads batches of a training, by the number of the update. Can be pickled.

    Attributes:
        images: the training images.
        batches: how batches are made.
        key: the data of the key that they are drawn by, of threefry2x32.
        rows: int `[b]`, the rows of each batch to read.
    """

    images: StreamedImages
    batches: Batches
    key: np.ndarray
    rows: np.ndarray

    def __call__(self, number: int) -> Batch:
        """Of an update's batch the images, and with mixing the partners: uint8 `[b, H, W, C]`."""
        with _on_cpu():
            plan = jax.device_get(_compiled_plan(self.batches)(self.key, np.int32(number)))
        made = {"images": self._views(plan, self.rows)}
        if plan.mix is not None:
            made["partners"] = self._next(made["images"], plan)
        return made

    def _views(self, plan: BatchPlan, rows: np.ndarray) -> np.ndarray:
        mine = jax.tree.map(lambda each: each[rows], plan._replace(mix=None))
        views = self.images.read(mine.image_index, mine.part)
        for i, (down, right) in enumerate(mine.offset.tolist()):
            if down or right or mine.flip[i]:
                views[i] = shifted(views[i], down, right, bool(mine.flip[i]))
        return views

    def _next(self, views: np.ndarray, plan: BatchPlan) -> np.ndarray:
        """What each image is mixed with, the next one of the batch; most are read already."""
        wanted = (self.rows + 1) % self.batches.batch_size
        where = {row: i for i, row in enumerate(self.rows.tolist())}
        missing = np.array([row for row in wanted.tolist() if row not in where], int)
        others = self._views(plan, missing)
        where |= {row: len(views) + i for i, row in enumerate(missing.tolist())}
        known = np.concatenate([views, others])
        return known[[where[row] for row in wanted.tolist()]]


@dataclass(frozen=True, eq=False)
class EvaluationBatch:
    """Reads batches of an evaluation by their number; the last is filled up. Can be pickled.

    Attributes:
        images: to evaluate on.
        size: of each batch.
        rows: int `[b]`, the rows of each batch to read.
    """

    images: StreamedImages
    size: int
    rows: np.ndarray

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __call__(self, number: int) -> Batch:
        """The images of a batch: uint8 `[b, H, W, C]`."""
        indices = number * self.size + self.rows
        made = np.zeros((len(indices), *self.images.shape[1:]), np.uint8)
        is_there = indices < len(self.images)
        made[is_there] = self.images.read(indices[is_there])
        return {"images": made}


class Stream:
    """Batches one after another, read ahead.

    Args:
        read: reads a batch by its number; can be pickled where there are workers.
        end: the number before which batches are read ahead; later ones when they are asked for.
        workers: processes that read; 0: threads of this one.

    Attributes:
        waited: seconds spent in waiting for batches.
    """

    def __init__(self, read: Callable[[int], Batch], end: int, workers: int = 0) -> None:
        self.waited = 0.0
        self._read, self._end, self._workers = read, end, workers
        self._readers: Readers | None = None
        self._batches: Any = None
        self._at = -1

    def batch(self, number: int) -> Batch:
        """A batch by its number, which is most often that after the last.

        Raises:
            InputError: an image that cannot be read.
            RunError: a worker that has ended.
        """
        if number >= self._end:
            return self._read(number)
        if self._batches is None or number != self._at:
            self.close()
            self._batches, self._at = self._from(number), number
            _open.add(self)
        start = time.perf_counter()
        try:
            batch: Batch = next(self._batches)
        except BaseException:
            self.close()
            raise
        self.waited += time.perf_counter() - start
        self._at += 1
        return batch

    def close(self) -> None:
        """Ends what reads ahead; the next batch starts it again."""
        if self._readers is not None:
            self._readers.close()
        if self._batches is not None:
            self._batches.close()
        self._readers = self._batches = None
        _open.discard(self)

    def _from(self, first: int) -> Any:
        """The batches from a number on."""
        import grain  # type: ignore[import-untyped]  # takes a second: only where needed

        if self._workers:
            self._readers = Readers(self._read, self._workers)
        threads = self._workers or _THREADS
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        numbers = grain.MapDataset.range(first, self._end)
        return iter(numbers.map(self._readers or self._read).to_iter_dataset(reading))


_open: weakref.WeakSet[Stream] = weakref.WeakSet()


def close_streams() -> None:
    """Ends all that reads ahead in this process, and the processes that it began."""
    for stream in list(_open):
        stream.close()


def seconds_waited() -> float:
    """The time that was spent in waiting for batches of the streams that are open now."""
    return sum(stream.waited for stream in _open)


@functools.lru_cache(maxsize=8)
def _compiled_plan(batches: Batches) -> Callable[..., BatchPlan]:
    def plan(data: jax.Array, number: jax.Array) -> BatchPlan:
        return batches.plan(jax.random.wrap_key_data(data, impl=_IMPLEMENTATION), number)

    return jax.jit(plan)


def _on_cpu() -> Any:
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX was told of no CPU
        return nullcontext()


class TrainingFeed:
    """Gives each call of a step the images of its batches.

    Args:
        images: the training images.
        batches: how batches are made.
        key: what they are drawn by.
        end: the number of updates of the training.
        rows: int `[b]`, which rows of a batch this process reads; None: all.
        delays: how many updates ahead images are wanted, too, as for stale senders.

    Attributes:
        stream: that they come from.

    Raises:
        InputError: a key whose random numbers depend on the device.
    """

    def __init__(
        self,
        images: StreamedImages,
        batches: Batches,
        key: jax.Array,
        end: int,
        rows: np.ndarray | None = None,
        delays: Iterable[int] = (),
    ) -> None:
        implementation = str(jax.random.key_impl(key))
        if implementation != _IMPLEMENTATION:
            allowed = f"{_IMPLEMENTATION} with streams: the same numbers on all devices"
            raise InputError("jax_default_prng_impl", implementation, allowed)
        self._delays = (0, *sorted(delays))
        rows = np.arange(batches.batch_size) if rows is None else rows
        read = TrainingBatch(images, batches, np.asarray(jax.random.key_data(key)), rows)
        self.stream = Stream(read, end + max(self._delays), images.workers)
        self._ahead: deque[Batch] = deque()
        self._first = 0

    def views(self, number: int, count: int = 1) -> dict[int, Views]:
        """The images of the updates from a number on, and of those ahead, by how many.

        Returns:
            uint8 `[b, H, W, C]`; of several updates `[b, count, H, W, C]`.
        """
        if not self._first <= number <= self._first + len(self._ahead):
            self._ahead.clear()
            self._first = number
        while self._first < number:
            self._ahead.popleft()
            self._first += 1
        while len(self._ahead) < count + max(self._delays):
            self._ahead.append(self.stream.batch(self._first + len(self._ahead)))
        return {delay: self._stacked(delay, count) for delay in self._delays}

    def _stacked(self, start: int, count: int) -> Views:
        batches = [self._ahead[start + i] for i in range(count)]
        if count == 1:
            return Views(**batches[0])
        return Views(**{k: np.stack([b[k] for b in batches], axis=1) for k in batches[0]})


class EvaluationFeed:
    """Gives an evaluation its batches, again and again.

    Args:
        images: to evaluate on.
        size: of each batch.
        rows: int `[b]`, which rows of a batch this process reads; None: all.
    """

    def __init__(self, images: StreamedImages, size: int, rows: np.ndarray | None = None) -> None:
        rows = np.arange(size) if rows is None else rows
        read = EvaluationBatch(images, size, rows)
        # Processes take seconds to begin.
        workers = images.workers if len(read) >= _WORTH_WORKERS * images.workers else 0
        self._stream = Stream(read, len(read), workers)
        self._number = len(read)

    def __iter__(self) -> Iterator[Views]:
        """The images of each batch: uint8 `[b, H, W, C]`."""
        try:
            for number in range(self._number):
                yield Views(**self._stream.batch(number))
        finally:
            self._stream.close()
