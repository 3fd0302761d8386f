"""The batches of a training on the host, as plain numpy: for any framework to look at."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ktg_jax.data.views import reflected
from ktg_jax.models.pixels import DIVISOR
from ktg_jax.training.batches import Batches, BatchPlan, data_key
from ktg_jax.training.mixing import Mix, blended, mixed_labels


@dataclass(frozen=True, eq=False)
class BatchStream:
    """All augmented batches of a training, told by its images and by the seed of their order.

    Attributes:
        images: the training images, uint8 `[n, H, W, C]`.
        labels: int32 `[n]`.
        batches: how they are made.
        data_seed: that chooses order and augmentation.

    >>> images, labels = np.full((4, 8, 8, 1), 255, np.uint8), np.arange(4, dtype=np.int32)
    >>> stream = BatchStream(images, labels, Batches(4, batch_size=2, max_offset=1), data_seed=0)
    >>> [(float(x.max()), y.shape) for x, y in stream.host(0, 2)]
    [(1.0, (2,)), (1.0, (2,))]
    """

    images: np.ndarray
    labels: np.ndarray
    batches: Batches
    data_seed: int

    @property
    def facts(self) -> dict[str, Any]:
        """What two streams agree in exactly when their batches are the same."""
        labels = zlib.crc32(np.ascontiguousarray(self.labels).data)
        mixing = {kind: getattr(self.batches, kind) for kind in ("mixup", "cutmix")}
        return {
            "images": len(self.images),
            "image_shape": list(self.images.shape[1:]),
            "train_crc32": zlib.crc32(np.ascontiguousarray(self.images).data, labels),
            "batch_size": self.batches.batch_size,
            "max_offset": self.batches.max_offset,
            "flip": self.batches.flip,
            "data_seed": self.data_seed,
            **{kind: alpha for kind, alpha in mixing.items() if alpha},
        }

    def host(self, first: int, last: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The batches of the steps from the first on, without the last.

        Yields:
            Images float32 `[B, H, W, C]` in 0..1, and labels int32 `[B]`: what networks see in the
            training, to the rounding of a division by 255; of mixed images the label of what has
            more of each.
        """
        plan_of = jax.jit(self.batches.plan)
        key = data_key(self.data_seed)
        for step in range(first, last):
            plan = jax.device_get(plan_of(key, np.int32(step)))
            labels = self.labels[plan.image_index]
            if plan.mix is not None:
                size = self.images.shape[1:3]
                labels, _ = mixed_labels(self.labels, plan.image_index, plan.mix, size, np)
            yield host_batch(self.images, plan), labels


def host_batch(images: np.ndarray, plan: BatchPlan) -> np.ndarray:
    """The images of a plan as `take_batch` makes them, on the host: float32 `[B, H, W, C]`."""
    batch = _views(images, plan)
    if plan.mix is None:
        return batch
    mixed: np.ndarray = blended(batch, _views(images, plan.mix), plan.mix, np)
    return mixed


def _views(images: np.ndarray, plan: BatchPlan | Mix) -> np.ndarray:
    height, width = images.shape[1:3]
    rows, columns = np.arange(height)[None], np.arange(width)[None]
    rows = reflected(rows + plan.offset[:, :1], height)
    columns = np.where(np.asarray(plan.flip)[:, None], columns[:, ::-1], columns)
    columns = reflected(columns + plan.offset[:, 1:], width)
    batch = images[np.asarray(plan.image_index)[:, None, None], rows[:, :, None], columns[:, None]]
    return np.asarray(batch, np.float32) / np.float32(DIVISOR)
