"""Where data comes from: `load_dataset` and the sources that need no module of their own."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile

from ktg_jax.data.cache import cached_split
from ktg_jax.data.dataset import Dataset, Split, describe, hold_out, limit_split
from ktg_jax.data.folders import load_image_folder, load_tiny_imagenet
from ktg_jax.data.images import resize_images
from ktg_jax.data.tfds import load_tfds
from ktg_jax.errors import InputError

SOURCES = ("digits", "cifar10", "cifar100", "tiny_imagenet", "npz:FILE", "folder:DIR")
MIN_IMAGE_SIZE = 4
_MAX_CLASSES = 2**16
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
) -> Dataset:
    """Loads a data set into memory.

    In this order: read, limit the training images, hold out the validation images from those,
    resize. Both choices are stratified by class.

    Args:
        data: one of
            `digits`: scikit-learn's 1,797 handwritten digits, 8 x 8 x 1, 80/20 train/test;
            `cifar10`, `cifar100`: array_record files of tensorflow-datasets;
            `tiny_imagenet`: the original folder layout (the official val images are the test
            split, as the labels of the official test images were never published);
            `npz:FILE`: arrays `images` and `labels`, see `load_npz`;
            `folder:DIR`: `DIR/<split>/<class>/*.png|jpg|jpeg`, see `load_image_folder`.
        data_dir: where CIFAR and Tiny-ImageNet are; the others do not use it. None: for CIFAR,
            the folder of tensorflow-datasets.
        train_limit: number of training images to keep, before any are held out; None: all.
        val_fraction: part of the training images to hold out as validation split, in [0, 1).
        image_size: height and width to resize to, in pixels; None: as they are.
        split_seed: fixes which images are kept and held out, independently of any other seed.
        with_test: False: the test images are not even opened, and `test` is None.
        cache_dir: folder for decoded CIFAR and Tiny-ImageNet images; None: the environment's
            `KTG_CACHE_DIR`, else the user's cache folder.

    Raises:
        InputError: names the option or the part of the data that is wrong.
    """
    if image_size is not None and image_size < MIN_IMAGE_SIZE:
        raise InputError("image_size", image_size, f"{MIN_IMAGE_SIZE} or more")
    if not 0 <= val_fraction < 1:
        raise InputError("val_fraction", val_fraction, "0 or more, below 1")
    dataset = _read(data, data_dir, image_size, with_test, cache_dir)
    train, val = dataset.train, dataset.val
    if train_limit is not None:
        train = limit_split(train, train_limit, split_seed)
    if val is None:
        train, val = hold_out(train, val_fraction, split_seed)
    elif val_fraction != 0:
        raise InputError("val_fraction", val_fraction, "0: the data has its own folder val")
    dataset = replace(dataset, train=train, val=val)
    return dataset if image_size is None else _resized(dataset, image_size)


def has_test_images(data: str) -> bool:
    """Whether there are test images in data that can be loaded; none of them is opened.

    Args:
        data: as of `load_dataset`. Only a file or a folder of one's own may be without.

    Raises:
        InputError: the file is not there or damaged.

    >>> has_test_images("digits")
    True
    """
    kind, _, path = data.partition(":")
    if kind == "npz":
        with _opened_npz(Path(path).expanduser()) as arrays:
            return "test_images" in arrays.files
    return kind != "folder" or (Path(path).expanduser() / "test").is_dir()


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


def load_npz(file: str | os.PathLike[str], *, with_test: bool = True) -> Dataset:
    """Reads a file that `numpy.savez` wrote.

    Its arrays: `images` uint8 `[n, h, w, c]`, `labels` integers `[n]`; optionally `test_images`
    and `test_labels`, and `class_names`, strings `[classes]` (None: `"0"`, `"1"`, ... up to the
    largest label).

    Args:
        file: path of the file.
        with_test: whether to read `test_images`.

    Raises:
        InputError: the file is not there or damaged, or an array is missing or malformed.
    """
    arrays = _npz_arrays(Path(file).expanduser(), with_test)
    labels = {
        key: _npz_labels(f"npz {key}", arrays[key])
        for key in ("labels", "test_labels")
        if key in arrays
    }
    train = _npz_split("", arrays["images"], labels["labels"])
    test = None
    if "test_images" in arrays:
        test = _npz_split("test_", arrays["test_images"], labels["test_labels"])
    num_classes = 1 + max(int(array.max(initial=0)) for array in labels.values())
    class_names = arrays.get("class_names", np.arange(num_classes).astype(str))
    if class_names.ndim != 1 or class_names.dtype.kind != "U" or len(class_names) < num_classes:
        allowed = f"strings [{num_classes} or more], one per class"
        raise InputError("npz class_names", describe(class_names), allowed)
    return Dataset(f"npz:{file}", tuple(class_names.tolist()), train, None, test, flip=True)


def _read(
    data: str,
    data_dir: str | os.PathLike[str] | None,
    image_size: int | None,
    with_test: bool,
    cache_dir: str | os.PathLike[str] | None,
) -> Dataset:
    kind, _, path = data.partition(":")
    if data == "digits":
        return load_digits(with_test=with_test, cache_dir=cache_dir)
    if data in ("cifar10", "cifar100"):
        return load_tfds(data, data_dir, with_test=with_test, cache_dir=cache_dir)
    if data == "tiny_imagenet":
        return load_tiny_imagenet(data_dir, with_test=with_test, cache_dir=cache_dir)
    if kind == "npz" and path:
        return load_npz(path, with_test=with_test)
    if kind == "folder" and path:
        folder = Path(path).expanduser()
        return load_image_folder(folder, image_size=image_size, with_test=with_test)
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


def _npz_arrays(path: Path, with_test: bool) -> dict[str, np.ndarray]:
    with _opened_npz(path) as arrays:
        keys = _npz_keys(set(arrays.files), with_test)
        return {key: arrays[key] for key in keys}


@contextmanager
def _opened_npz(path: Path) -> Iterator[NpzFile]:
    """The file, none of whose arrays is read yet; what is wrong with it is an InputError."""
    if not path.is_file():
        raise InputError("data", f"npz:{path}", "a file that exists")
    try:
        # opened here, as numpy.load leaves a damaged file open
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            yield arrays
    except InputError:
        raise
    except Exception as error:  # damage shows itself in many types
        allowed = "a complete, undamaged file of numpy.savez, without object arrays"
        raise InputError("data", f"npz:{path}", allowed) from error


def _npz_keys(found: set[str], with_test: bool) -> set[str]:
    """The arrays to read; test labels in any case, as they have a say in the number of classes."""
    if missing := {"images", "labels"} - found:
        raise InputError("npz arrays", sorted(found), f"also {', '.join(sorted(missing))}")
    if len({"test_images", "test_labels"} & found) == 1:
        raise InputError("npz arrays", sorted(found), "both test_images and test_labels, or none")
    wanted = {"images", "labels", "test_labels", "class_names"}
    if with_test:
        wanted.add("test_images")
    return wanted & found


def _npz_labels(field: str, labels: np.ndarray) -> np.ndarray:
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InputError(field, describe(labels), "integers [n]")
    wrong = (labels < 0) | (labels >= _MAX_CLASSES)
    if wrong.any():
        raise InputError(field, int(labels[wrong][0]), f"0 to {_MAX_CLASSES - 1}")
    return labels.astype(np.int32)


def _npz_split(prefix: str, images: np.ndarray, labels: np.ndarray) -> Split:
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        allowed = "uint8[n, h, w, c], none of them 0"
        raise InputError(f"npz {prefix}images", describe(images), allowed)
    if len(labels) != len(images):
        raise InputError(f"npz {prefix}labels", len(labels), f"{len(images)}, one per image")
    return Split(images, labels)
