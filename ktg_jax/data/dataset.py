"""Image-classification data on the host, and stratified subsets of it. No JAX."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ktg_jax.data.arrays import check_images, describe
from ktg_jax.data.cache import cached
from ktg_jax.data.streamed import StreamedImages
from ktg_jax.errors import InputError


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels.

    Attributes:
        images: uint8 `[n, h, w, c]`, values 0 to 255, n at least 1; or what stays in files.
        labels: int32 `[n]`, class indices.

    Raises:
        InputError: another dtype or rank, no images, channels first, or not one label per image.
    """

    images: Any
    labels: np.ndarray

    def __post_init__(self) -> None:
        if not isinstance(self.images, StreamedImages):
            check_images(self.images, "images")
        if self.labels.dtype != np.int32 or self.labels.shape != self.images.shape[:1]:
            raise InputError("labels", describe(self.labels), f"int32[{len(self.images)}]")

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: np.ndarray) -> "Split":
        """The images at `indices`, integers `[m]`, in that order; arrays are copied."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class Dataset:
    """The splits of a data set.

    Attributes:
        name: what it is called in reports.
        class_names: by class index.
        train: what the networks learn from.
        val: held out from training, to choose by; None: there is none.
        test: only for the final numbers; None: there is none, or it was not read.
        flip: whether an image mirrored left to right keeps its class.
        own_val: whether the data came with its validation images; else they are held out of train.

    Raises:
        InputError: a split with another image shape than train, or with a label that is no class.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    val: Split | None
    test: Split | None
    flip: bool
    own_val: bool = False

    def __post_init__(self) -> None:
        for name, split in (("train", self.train), ("val", self.val), ("test", self.test)):
            if split is None:
                continue
            shape = split.images.shape[1:]
            if shape != self.image_shape:
                raise InputError(f"{name} images", shape, f"the shape of train, {self.image_shape}")
            wrong = (split.labels < 0) | (split.labels >= self.num_classes)
            if wrong.any():
                label = int(split.labels[wrong][0])
                raise InputError(f"{name} labels", label, f"0 to {self.num_classes - 1}")

    @property
    def is_streamed(self) -> bool:
        """Whether the images stay in their files."""
        return isinstance(self.train.images, StreamedImages)

    @property
    def num_classes(self) -> int:
        """The number of classes, whether or not each of them occurs."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels


def cached_split(
    key: str,
    files: Iterable[Path],
    decode: Callable[[], Split],
    cache_dir: str | os.PathLike[str] | None = None,
) -> Split:
    """Decodes a split once and reads it from the cache from then on: see `cached`.

    Raises:
        InputError: one of the files is not there, and whatever `decode` raises.
    """
    return cached(
        key,
        files,
        lambda: vars(decode()),
        lambda arrays: Split(arrays["images"], arrays["labels"]),
        cache_dir,
    )


def limit_split(split: Split, limit: int, seed: int) -> Split:
    """A stratified subset of `limit` images, in their old order; all of them: `split` itself.

    Args:
        split: what to choose from.
        limit: number of images to keep.
        seed: fixes the choice.

    Raises:
        InputError: `train_limit`: there are fewer images, or the classes cannot be kept apart
            (see `hold_out`).
    """
    if not 1 <= limit <= len(split):
        raise InputError("train_limit", limit, f"1 to {len(split)}, the number of images")
    if limit == len(split):
        return split
    kept, _ = _stratified(split.labels, limit, seed, "train_limit", limit)
    return split.take(kept)


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split | None]:
    """Holds out a stratified fraction of a split, rounded to whole images.

    Args:
        split: what to divide.
        fraction: 0 or more, below 1; 0: nothing is held out.
        seed: fixes the choice.

    Returns:
        What remains and what was held out (None for fraction 0), both in their old order.

    Raises:
        InputError: `val_fraction`: a class with a single image, or a side with fewer images than
            there are classes.
    """
    if fraction == 0:
        return split, None
    count = round(fraction * len(split))
    held_out, kept = _stratified(split.labels, count, seed, "val_fraction", fraction)
    return split.take(kept), split.take(held_out)


def _stratified(
    labels: np.ndarray, count: int, seed: int, field: str, value: object
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of `count` images with the class proportions of all, and of the others.

    As scikit-learn's `train_test_split`, under its conditions; but the choice depends on numpy's
    stable random streams alone, and importing scikit-learn takes longer than most small jobs.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2:
        single = f"(class {classes[counts.argmin()]} has 1)"
        raise InputError(field, value, f"data with 2 or more images of every class {single}")
    most = len(labels) - len(classes)
    if not len(classes) <= count <= most:
        possible = f"{len(classes)} to {most} of the {len(labels)} images (here {count})"
        raise InputError(field, value, f"{possible}: {len(classes)} classes on both sides")
    rng = np.random.default_rng(seed)
    shares = counts * count / len(labels)
    of_class = np.floor(shares).astype(int)
    # What rounding down has left goes to the largest remainders, ties by lot.
    order = np.lexsort((rng.permutation(len(classes)), of_class - shares))
    of_class[order[: count - of_class.sum()]] += 1
    members = [rng.permutation(np.flatnonzero(labels == label)) for label in classes]
    chosen = np.concatenate([of[:n] for of, n in zip(members, of_class, strict=True)])
    return np.sort(chosen), np.setdiff1d(np.arange(len(labels)), chosen)
