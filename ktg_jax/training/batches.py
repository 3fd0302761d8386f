"""From uint8 images on the device to training batches, inside the compiled step.

All randomness comes from `(key, step)`: the position in the data is just the step number, and it
depends neither on the number of nodes nor on the number of devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from ktg_jax.data.streamed import StreamedImages
from ktg_jax.data.views import ATTEMPTS
from ktg_jax.errors import InputError
from ktg_jax.mixed import Mixed
from ktg_jax.models.pixels import to_float
from ktg_jax.training.mixing import Mix, blended, mixed_labels, plan_mix
from ktg_jax.training.parallel import Parallel

FindRows: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""Finds rows of an array by their positions."""


class Arrays(NamedTuple):
    """Images uint8 `[n, H, W, C]` and labels int32 `[n]`; or images that stay in their files."""

    images: Any
    labels: Any

    def spread_over(self, parallel: Parallel) -> "Arrays":
        """The labels on every device, and of the images a part on each, where it has parts."""
        labels = parallel.replicate(jnp.asarray(self.labels))
        images = self.images if self.is_streamed else parallel.spread(self.images)
        return Arrays(images, labels)

    @property
    def is_streamed(self) -> bool:
        """Whether the images stay in their files."""
        return isinstance(self.images, StreamedImages)

    @property
    def on_device(self) -> "Arrays":
        """What a compiled program is given: of streamed images the labels alone."""
        return self._replace(images=None) if self.is_streamed else self


class Views(NamedTuple):
    """The images of one batch, already as each is augmented by itself, in place of all images.

    Attributes:
        images: uint8 `[B, H, W, C]`.
        partners: likewise, what each is mixed with; None: nothing.
    """

    images: Any
    partners: Any = None


class BatchPlan(NamedTuple):
    """Which images a batch holds and how each is augmented; every array has a leading axis B.

    Attributes:
        image_index: int32 `[B]`, positions in the data set.
        offset: int32 `[B, 2]`, the crop's shift down and to the right, in pixels.
        flip: bool `[B]`, whether the image is mirrored left to right.
        mix: what each image is mixed with; None: nothing.
        part: float32 `[B, attempts, 4]` in [0, 1), which choose a random part of each image as
            `ktg_jax.data.views.random_part` does; None: images are taken whole.
    """

    image_index: jax.Array
    offset: jax.Array
    flip: jax.Array
    mix: Mix | None = None
    part: jax.Array | None = None


class Batches(NamedTuple):
    """How batches are made from the training images.

    Attributes:
        num_images: size of the data.
        batch_size: the batch size of all devices together.
        max_offset: as in `plan_batch`.
        flip: as in `plan_batch`.
        mixup: as in `plan_batch`.
        cutmix: as in `plan_batch`.
        parts: as in `plan_batch`.

    >>> plan = Batches(num_images=10, batch_size=4, flip=True).plan(jax.random.key(0), 0)
    >>> plan.image_index.shape, plan.offset.tolist() == [[0, 0]] * 4
    ((4,), True)
    """

    num_images: int
    batch_size: int
    max_offset: int = 0
    flip: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0
    parts: bool = False

    def plan(self, key: jax.Array, step: jax.Array | int) -> BatchPlan:
        """The batch of a step: see `plan_batch`."""
        return plan_batch(key, step, **self._asdict())


def data_key(seed: int) -> jax.Array:
    """The key that order and augmentation of the batches of a training are drawn by."""
    return jax.random.split(jax.random.key(seed))[1]


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Full batches in an epoch; the last partial one is dropped.

    Raises:
        InputError: a batch larger than the data.
    """
    if not 1 <= batch_size <= num_images:
        raise InputError("batch_size", batch_size, f"1 to the {num_images} training images")
    return num_images // batch_size


def plan_batch(
    key: jax.Array,
    step: jax.Array | int,
    *,
    num_images: int,
    batch_size: int,
    max_offset: int = 0,
    flip: bool = False,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    parts: bool = False,
) -> BatchPlan:
    """Plans the batch of a step: a new order every epoch, every image at most once in it.

    Args:
        key: the run's data key.
        step: int scalar, updates made so far.
        num_images: size of the data set.
        batch_size: B.
        max_offset: crops are shifted by up to so many pixels in each direction, fewer than the
            image has; 0: not cropped.
        flip: whether to mirror half of the images.
        mixup: alpha of mixup, by which images are laid over each other; 0: they are not.
        cutmix: alpha of CutMix, by which a box of each image is another's; 0: none is.
        parts: whether images are random parts of those in files.

    Raises:
        InputError: a batch larger than the data.
    """
    per_epoch = steps_per_epoch(num_images, batch_size)
    order_key, augment_key = jax.random.split(key)
    step = jnp.asarray(step)
    position = (step % per_epoch) * batch_size + jnp.arange(batch_size, dtype=step.dtype)
    index = shuffled(jax.random.fold_in(order_key, step // per_epoch), position, num_images)
    step_key = jax.random.fold_in(augment_key, step)
    offset_key, flip_key = jax.random.split(step_key)
    # With types of their own: the same random numbers where JAX's own integers and floats are wide.
    offset = jax.random.randint(offset_key, (batch_size, 2), -max_offset, max_offset + 1, jnp.int32)
    flips = jax.random.bernoulli(flip_key, jnp.float32(0.5), (batch_size,)) & flip
    views = index, offset, flips
    plan = BatchPlan(*views)
    if mixup or cutmix:
        mix = plan_mix(jax.random.fold_in(step_key, 2), views, mixup, cutmix)
        plan = plan._replace(mix=mix)
    if parts:
        shape = (batch_size, ATTEMPTS, 4)
        numbers = jax.random.uniform(jax.random.fold_in(step_key, 3), shape, jnp.float32)
        plan = plan._replace(part=numbers)
    return plan


def shuffled(key: jax.Array, position: jax.Array, size: int) -> jax.Array:
    """The entries at `position` of a pseudo-random permutation of 0 .. size-1.

    Costs O(positions), not O(size): sorting random numbers for 50,000 images in every step would
    take longer on a CPU than training a small network. A Feistel network permutes the numbers of
    just enough bits; what falls outside 0 .. size-1 is permuted on until it falls inside.

    Args:
        key: chooses the permutation.
        position: int `[...]`, in 0 .. size-1.
        size: at most 2^31.

    Returns:
        int32 `[...]`.
    """
    bits = max((size - 1).bit_length(), 2)
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    round_keys = jax.random.bits(key, (4, 2), jnp.uint32)

    def permute(x: jax.Array) -> jax.Array:
        high, low = x >> low_bits, x & low_mask
        for high_key, low_key in round_keys:
            high = high ^ (_mix(low ^ high_key) & high_mask)
            low = low ^ (_mix(high ^ low_key) & low_mask)
        return (high << low_bits) | low

    def walk_on(x: jax.Array) -> jax.Array:
        return jnp.where(x < size, x, permute(x))

    start = permute(jnp.asarray(position, jnp.uint32))
    inside = jax.lax.while_loop(lambda x: jnp.any(x >= size), walk_on, start)
    return inside.astype(jnp.int32)


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: every bit of a uint32 depends on every other."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def take_batch(
    images: jax.Array | Views, labels: jax.Array, plan: BatchPlan, rows: FindRows | None = None
) -> tuple[jax.Array, jax.Array]:
    """Takes a planned batch from the data and augments it.

    A shifted crop sees the image reflected at its borders, as in the papers: reflect padding and a
    random crop of the original size.

    Args:
        images: uint8 `[n, H, W, C]`, or those of the plan as a stream has read them.
        labels: int `[n]`.
        plan: from `plan_batch`, or a share of it.
        rows: finds images by their positions where they are spread over devices
            (`Parallel.rows`); None: they are all here.

    Raises:
        InputError: a plan of parts of images that are in memory.

    Returns:
        float32 `[B, H, W, C]` in [0, 1], and int `[B]`; of mixed images the label of what has more
        of each: `labels_of` has the other.
    """
    batch = _views(images, plan, rows)
    if plan.mix is not None:
        batch = blended(batch, _views(images, plan.mix, rows), plan.mix)
    return batch, labels_of(images, labels, plan)[0]


def labels_of(
    images: jax.Array | Views, labels: jax.Array, plan: BatchPlan
) -> tuple[jax.Array, Mixed | None]:
    """The labels of a planned batch, int `[B]`, and what is mixed into it; None: nothing is.

    The arguments are those of `take_batch`.
    """
    if plan.mix is None:
        return labels[plan.image_index], None
    height, width = (images.images if isinstance(images, Views) else images).shape[1:3]
    size = height, width
    return mixed_labels(labels, plan.image_index, plan.mix, size)


def _views(images: jax.Array | Views, plan: BatchPlan | Mix, find: FindRows | None) -> jax.Array:
    """Each image as it is augmented by itself, or what it is mixed with."""
    if isinstance(images, Views):
        return to_float(images.partners if isinstance(plan, Mix) else images.images)
    if isinstance(plan, BatchPlan) and plan.part is not None:
        raise InputError("parts", True, "False with images in memory, which are of one size")
    height, width = images.shape[1:3]
    index = plan.image_index
    if find is not None:
        images, index = find(images, index), jnp.arange(len(index))
    rows, columns = (jnp.arange(size, dtype=jnp.int32)[None] for size in (height, width))
    rows = _reflect(rows + plan.offset[:, :1], height)
    columns = jnp.where(plan.flip[:, None], columns[:, ::-1], columns)
    columns = _reflect(columns + plan.offset[:, 1:], width)
    batch = images[index[:, None, None], rows[:, :, None], columns[:, None, :]]
    return to_float(batch)


def _reflect(position: jax.Array, size: int) -> jax.Array:
    """Reflects positions in -size+1 .. 2 size-2 into 0 .. size-1, the border itself not doubled."""
    position = jnp.abs(position)
    return jnp.minimum(position, 2 * (size - 1) - position)
