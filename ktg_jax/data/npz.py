"""Data sets that are one file of `numpy.savez`."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ktg_jax.data.archive import opened_npz, read_arrays
from ktg_jax.data.arrays import channels_first, check_images, check_labels, describe
from ktg_jax.data.dataset import Dataset, Split
from ktg_jax.data.splits import by_split
from ktg_jax.errors import InputError

_logger = logging.getLogger(__name__)

_MAX_CLASSES = 2**16
_CONTENTS = ("images", "labels")
Names = dict[tuple[str, str], str]
"""Names of arrays, by split and content, as `("val", "images")` or `("", "class_names")`."""

_NAMES = "images=..., labels=..., val_images=..., val_labels=..., test_images=..., test_labels=..."


def load_npz(file: str | os.PathLike[str], *, with_test: bool = True) -> Dataset:
    """Reads a file that `numpy.savez` wrote.

    Its arrays: `images` uint8 `[n, h, w, c]`, `labels` integers `[n]`; optionally `val_images` and
    `val_labels`, `test_images` and `test_labels`, and `class_names`, strings `[classes]` (None:
    `"0"`, `"1"`, ... up to the largest label). `train_images`, `validation_labels` and the like
    mean the same. Other arrays are not read, which is said in a warning, as is what can hardly be
    meant: classes that do not occur, for example.

    Args:
        file: path of the file.
        with_test: whether to read `test_images`.

    Raises:
        InputError: the file is not there or damaged, its arrays do not fit in memory, or one of
            them is missing or malformed.
    """
    path = Path(file).expanduser()
    named, found = _read(path, with_test)
    labels = {
        split: _labels(found[name], name)
        for (split, content), name in named.items()
        if content == "labels"
    }
    splits = {
        split: _split(found[name], name, labels[split], named[split, "labels"])
        for (split, content), name in named.items()
        if content == "images" and name in found
    }
    return Dataset(
        name=f"npz:{file}",
        class_names=_class_names(found.get("class_names"), labels),
        train=splits["train"],
        val=splits.get("val"),
        test=splits.get("test"),
        flip=True,
        own_val="val" in splits,
    )


def splits_of_npz(path: Path) -> set[str]:
    """Which of `train`, `val` and `test` the file has; no array of it is read.

    Raises:
        InputError: the file is not there or damaged, or its arrays are not as `load_npz` says.
    """
    with opened_npz(path) as arrays:
        return {split for split, _ in _named(arrays.files) if split}


def _read(path: Path, with_test: bool) -> tuple[Names, Mapping[str, np.ndarray]]:
    """The arrays; test labels in any case, as they have a say in the number of classes."""
    with opened_npz(path) as arrays:
        named = _named(arrays.files)
        if unknown := sorted(set(arrays.files) - set(named.values())):
            _logger.warning("npz:%s: arrays that are not used: %s", path, ", ".join(unknown))
        wanted = [name for key, name in named.items() if with_test or key != ("test", "images")]
        return named, read_arrays(arrays, wanted, path)


def _named(found: Sequence[str]) -> Names:
    """The names of the arrays that are known."""
    named: Names = {("", "class_names"): "class_names"} if "class_names" in found else {}
    for content in _CONTENTS:
        ending = f"_{content}"
        of_splits = {name.removesuffix(ending): name for name in found if name.endswith(ending)}
        meant = by_split(of_splits, f"npz {content}")
        if content in found:
            if "train" in meant:
                allowed = "one of them: both mean the train split"
                raise InputError("npz arrays", [content, of_splits[meant["train"]]], allowed)
            named["train", content] = content
        named |= {(split, content): of_splits[name] for split, name in meant.items()}
    if missing := [content for content in _CONTENTS if ("train", content) not in named]:
        allowed = f"also {', '.join(missing)}, named as in np.savez(FILE, {_NAMES})"
        raise InputError("npz arrays", sorted(found), allowed)
    for split in ("val", "test"):
        if len({(split, content) for content in _CONTENTS} & named.keys()) == 1:
            allowed = f"both {split}_images and {split}_labels, or none"
            raise InputError("npz arrays", sorted(found), allowed)
    return named


def _labels(labels: np.ndarray, name: str) -> np.ndarray:
    check_labels(labels, f"npz {name}", name, _MAX_CLASSES)
    return labels.astype(np.int32)


def _split(images: np.ndarray, name: str, labels: np.ndarray, name_of_labels: str) -> Split:
    check_images(images, f"npz {name}", name)
    if len(labels) != len(images):
        allowed = f"{len(images)}, one per image"
        if len(labels) == images.shape[3]:
            allowed += f"; or is it {name}.transpose(3, 0, 1, 2)?"
        raise InputError(f"npz {name_of_labels}", len(labels), allowed)
    if channels_first(images.shape) is not None:
        _logger.warning(
            "npz %s: height %d, width %d, %d channels; if the channels come first: "
            "transpose(0, 2, 3, 1)",
            name,
            *images.shape[1:],
        )
    return Split(images, labels)


def _class_names(names: np.ndarray | None, labels: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """The names of the classes: those given, else the labels, if these leave none out."""
    occurring = np.unique(np.concatenate(list(labels.values()))) if labels else np.zeros(0, int)
    num_classes = 1 + int(occurring.max(initial=0))
    is_from_one = num_classes > 2 and occurring.tolist() == list(range(1, num_classes))
    if names is None:
        if is_from_one:
            allowed = "labels from 0: subtract 1, labels - 1; or class_names with one for class 0"
            raise InputError("npz labels", f"1 to {num_classes - 1}", allowed)
        _tell_of_gaps(labels["train"], num_classes)
        return tuple(str(label) for label in range(num_classes))
    if names.ndim != 1 or names.dtype.kind != "U" or len(names) < num_classes:
        allowed = f"strings [{num_classes} or more], one per class"
        if is_from_one:
            allowed += "; or labels from 0: subtract 1, labels - 1"
        raise InputError("npz class_names", describe(names), allowed)
    return tuple(names.tolist())


def _tell_of_gaps(train: np.ndarray, num_classes: int) -> None:
    """Warns of classes that nothing is known of but their number."""
    absent = np.setdiff1d(np.arange(num_classes), train)
    if not len(absent) or not len(train):
        return
    some = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
    _logger.warning(
        "npz labels: training images of %d of the %d classes 0 to %d alone, none of %s; if that "
        "is not meant: images of no class, whose label may be 255, are to be left out, and labels "
        "with gaps numbered anew by np.unique(labels, return_inverse=True)[1]",
        num_classes - len(absent),
        num_classes,
        num_classes - 1,
        some,
    )
