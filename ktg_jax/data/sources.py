"""Where data comes from: `load_dataset` and the sources that need no module of their own."""

import importlib.util
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ktg_jax.data.arrays import check_values
from ktg_jax.data.cache import OnProgress
from ktg_jax.data.dataset import Dataset, Split, cached_split, hold_out, limit_split
from ktg_jax.data.folders import load_image_folder, splits_of_folder
from ktg_jax.data.images import resize_images
from ktg_jax.data.npz import load_npz, splits_of_npz
from ktg_jax.data.streamed import STREAMS, Streaming
from ktg_jax.data.tfds import load_tfds, splits_of_tfds
from ktg_jax.data.tiny_imagenet import load_tiny_imagenet
from ktg_jax.errors import InputError

SOURCES = ("digits", "cifar10", "cifar100", "tiny_imagenet", "tfds:NAME", "npz:FILE", "folder:DIR")
MIN_IMAGE_SIZE = 4
_DIGITS_TEST_SEED = 0  # the test split is a part of the data set: no option may change it


def load_dataset(
    data: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    train_limit: int | None = None,
    val_fraction: float = 0.0,
    image_size: int | None = None,
    split_seed: int = 0,
    with_test: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
    stream: Streaming | None = None,
) -> Dataset:
    """Loads a data set into memory, or only says where each of its images is.

    In this order: read, limit the training images, hold out the validation images from those,
    resize. Both choices are stratified by class.

    Args:
        data: one of
            `digits`: scikit-learn's 1,797 handwritten digits, 8 x 8 x 1, 80/20 train/test;
            `cifar10`, `cifar100`: array_record files of tensorflow-datasets;
            `tiny_imagenet`: the original folder layout (the official val images are the test
            split, as the labels of the official test images were never published);
            `tfds:NAME`: another data set that tensorflow-datasets has prepared as array_record
            files, such as `tfds:imagenette/320px-v2`;
            `npz:FILE`: arrays `images` and `labels`, see `load_npz`;
            `folder:DIR`: image files as `DIR/<split>/<class>/*`, see `load_image_folder`.
        data_dir: where CIFAR, Tiny-ImageNet and what tensorflow-datasets has prepared are; the
            others do not use it. None: the folder of tensorflow-datasets.
        train_limit: number of training images to keep, before any are held out; None: all.
        val_fraction: part of the training images to hold out as validation split, in [0, 1); not
            used where the data has validation images of its own.
        image_size: height and width to resize to, in pixels; None: as they are.
        split_seed: fixes which images are kept and held out, independently of any other seed.
        with_test: False: the test images are not even opened, and `test` is None.
        cache_dir: folder for decoded CIFAR and Tiny-ImageNet images; None: the environment's
            `KTG_CACHE_DIR`, else the user's cache folder.
        on_progress: is called with what is decoded, how many of its images are, and how many there
            are; it can draw a progress bar.
        stream: images stay in their files (`StreamedImages`), to be read batch by batch, in this
            way; None: all are in memory. Only labels are read at once. Not of `digits` and `npz`.

    Raises:
        InputError: names the option or the part of the data that is wrong.
    """
    if image_size is not None and image_size < MIN_IMAGE_SIZE:
        raise InputError("image_size", image_size, f"{MIN_IMAGE_SIZE} or more")
    if stream is not None and stream.centre and image_size is None:
        raise InputError("image_size", None, "pixels, where parts of images are resized to it")
    if not 0 <= val_fraction < 1:
        raise InputError("val_fraction", val_fraction, "0 or more, below 1")
    how: dict[str, Any] = {"with_test": with_test, "cache_dir": cache_dir}
    dataset = _read(data, data_dir, image_size, on_progress, stream, how)
    for name in ("train", "val", "test"):
        if stream is None and (split := getattr(dataset, name)) is not None:
            check_values(split.images, f"{name} images")
    train, val = dataset.train, dataset.val
    if train_limit is not None:
        train = limit_split(train, train_limit, split_seed)
    if val is None:
        train, val = hold_out(train, val_fraction, split_seed)
    dataset = replace(dataset, train=train, val=val)
    return dataset if image_size is None or stream else _resized(dataset, image_size)


def has_test_images(data: str, data_dir: str | os.PathLike[str] | None = None) -> bool:
    """Whether there are test images in data that can be loaded; none of them is opened.

    Args:
        data: as of `load_dataset`.
        data_dir: likewise.

    Raises:
        InputError: the file is not there or damaged, or two of its splits are the same.

    >>> has_test_images("digits")
    True
    """
    own = _own_splits(data, data_dir)
    return own is None or "test" in own


def has_val_images(data: str, data_dir: str | os.PathLike[str] | None = None) -> bool:
    """Whether data has validation images of its own, which take the place of a share of train.

    Args:
        data: as of `load_dataset`.
        data_dir: likewise.

    Raises:
        InputError: as `has_test_images`.

    >>> has_val_images("digits")
    False
    """
    return "val" in (_own_splits(data, data_dir) or ())


def load_digits(
    *, with_test: bool = True, cache_dir: str | os.PathLike[str] | None = None
) -> Dataset:
    """scikit-learn's handwritten digits: values 0 to 16, here scaled to 0 to 255.

    A stratified fifth of them, always the same, is the test split.
    """
    package = importlib.util.find_spec("sklearn")
    assert package is not None  # a dependency
    assert package.origin is not None
    source = Path(package.origin)
    whole = cached_split("digits", [source], _decode_digits, cache_dir)
    train, test = hold_out(whole, 0.2, _DIGITS_TEST_SEED)
    return Dataset(
        name="digits",
        class_names=tuple(str(digit) for digit in range(10)),
        train=train,
        val=None,
        test=test if with_test else None,
        flip=False,
    )


def _decode_digits() -> Split:
    from sklearn.datasets import load_digits as sklearn_digits  # takes two seconds

    digits = sklearn_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
    return Split(images, digits.target.astype(np.int32))


def _own_splits(data: str, data_dir: str | os.PathLike[str] | None) -> set[str] | None:
    """The splits of data that may have any; None: train and test."""
    kind, _, path = data.partition(":")
    if kind == "tfds" and path:
        return splits_of_tfds(path, data_dir)
    if kind == "npz":
        return splits_of_npz(Path(path).expanduser())
    return splits_of_folder(Path(path).expanduser()) if kind == "folder" else None


def _read(
    data: str,
    data_dir: str | os.PathLike[str] | None,
    image_size: int | None,
    on_progress: OnProgress | None,
    stream: Streaming | None,
    how: dict[str, Any],
) -> Dataset:
    kind, _, path = data.partition(":")
    of_files: dict[str, Any] = {
        "on_progress": on_progress,
        "image_size": image_size,
        "stream": stream,
    }
    if stream is not None and (data == "digits" or kind == "npz"):
        raise InputError("stream", True, f"data that stays in files: {', '.join(STREAMS)}")
    if data == "digits":
        return load_digits(**how)
    if data in ("cifar10", "cifar100"):
        return load_tfds(data, data_dir, **of_files, **how)
    if kind == "tfds" and path:
        loaded = load_tfds(path, data_dir, **of_files, **how)
        return replace(loaded, name=data)
    if data == "tiny_imagenet":
        return load_tiny_imagenet(data_dir, **of_files, **how)
    if kind == "npz" and path:
        return load_npz(path, with_test=how["with_test"])
    if kind == "folder" and path:
        folder = Path(path).expanduser()
        return load_image_folder(folder, with_test=how["with_test"], **of_files)
    raise InputError("data", data, ", ".join(SOURCES))


def _resized(dataset: Dataset, image_size: int) -> Dataset:
    def resize(split: Split) -> Split:
        return Split(resize_images(split.images, image_size), split.labels)

    return replace(
        dataset,
        train=resize(dataset.train),
        val=None if dataset.val is None else resize(dataset.val),
        test=None if dataset.test is None else resize(dataset.test),
    )
