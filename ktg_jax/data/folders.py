"""Data sets that are folders of image files, one folder a class."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ktg_jax.data.cache import OnProgress
from ktg_jax.data.dataset import Dataset, Split
from ktg_jax.data.form import ImageForm
from ktg_jax.data.images import form_of, read_images
from ktg_jax.data.listing import count_images, find_images, loose_images, named, subfolders
from ktg_jax.data.splits import by_split
from ktg_jax.data.streamed import Streaming, all_of, image_files
from ktg_jax.errors import InputError

_logger = logging.getLogger(__name__)

_LOOKED_AT = 500  # images, to tell the form of all

_LAYOUT = "a folder with one folder of images per class"

Files = Sequence[tuple[Path, int]]
"""Image files and their labels."""


def load_image_folder(
    folder: Path,
    *,
    image_size: int | None = None,
    with_test: bool = True,
    on_progress: OnProgress | None = None,
    stream: Streaming | None = None,
) -> Dataset:
    """Reads `folder/<split>/<class>/*.png`, and whatever else PIL reads, by its suffix.

    The splits are `train` and, where they are there, `val` and `test`, or other names of these such
    as `validation`. The classes are the sorted folder names of `train`; folders within them belong
    to their class. The files of `train` also decide, for every split, the image size (unless
    `image_size` gives it) and whether images are greyscale (all of train are) or RGB. Images in
    other folders are not read, which is said in a warning; hidden files and folders are left out.

    Args:
        folder: as above.
        image_size: resize to a square of this size, in pixels; None: all have the same size.
        with_test: whether to read `test`.
        on_progress: see `OnProgress`.
        stream: how images are streamed: of the files of `train` some hundred then decide, evenly
            taken from all, and one that is otherwise is an error when it is read. None: all are
            read.

    Raises:
        InputError: no `train`, a class folder without images, a class that train does not have,
            images of differing sizes, a file that cannot be decoded, two folders of one split,
            pictures in a split that are not read, or classes one folder too deep.
    """
    places = _split_folders(folder)
    if "train" not in places:
        raise InputError("data", str(folder / "train"), _LAYOUT)
    _tell_of_unused(folder, places)
    class_names = _class_names(places["train"])
    files = {
        split: _class_files(place, class_names)
        for split, place in places.items()
        if with_test or split != "test"
    }
    _check_depth(files["train"], places["train"])
    if stream is not None:
        splits = _streamed(folder, files, image_size, stream)
    else:
        form = form_of([path for path, _ in files["train"]], image_size)
        splits = {split: read_files(files[split], form, split, on_progress) for split in files}
    return Dataset(
        name=f"folder:{folder}",
        class_names=class_names,
        train=splits["train"],
        val=splits.get("val"),
        test=splits.get("test"),
        flip=True,
        own_val="val" in splits,
    )


def splits_of_folder(folder: Path) -> set[str]:
    """Which of `train`, `val` and `test` the folder has; none of its images is opened.

    Raises:
        InputError: two folders of one split.
    """
    return set(_split_folders(folder))


def read_files(
    files: Files, form: ImageForm, what: str, on_progress: OnProgress | None = None
) -> Split:
    """Decodes image files: see `read_images`."""
    images = read_images([path for path, _ in files], form, what, on_progress)
    return Split(images, np.array([label for _, label in files], np.int32))


def stream_files(folder: Path, files: Files, form: ImageForm, stream: Streaming) -> Split:
    """Image files of a folder, none of which is read."""
    source = image_files(folder, [path for path, _ in files])
    labels = np.array([label for _, label in files], np.int32)
    return Split(all_of(source, form, stream.workers), labels)


def _streamed(
    folder: Path, files: Mapping[str, Files], image_size: int | None, stream: Streaming
) -> dict[str, Split]:
    """The splits of a folder, in the form that some of the training images have."""
    paths = [path for path, _ in files["train"]]
    looked_at = np.linspace(0, len(paths) - 1, min(_LOOKED_AT, len(paths))).astype(int)
    form = form_of([paths[i] for i in looked_at], image_size)
    form = replace(form, centre=stream.centre)
    return {split: stream_files(folder, files[split], form, stream) for split in files}


def images_in(folder: Path, option: str) -> list[Path]:
    """The image files of one class, sorted: all that are in the folder, at least one.

    Args:
        folder: that need not be there.
        option: that named it, for the errors.

    Raises:
        InputError: there are none, or pictures that are not read.
    """
    images, others = _images_of(folder, option)
    _refuse(others, folder, option)
    return images


def _split_folders(folder: Path) -> dict[str, Path]:
    """The folders of the splits; none where there is no folder."""
    names = [path.name for path in subfolders(folder, "data")] if folder.is_dir() else []
    return {split: folder / name for split, name in by_split(names, "data").items()}


def _class_names(folder: Path) -> tuple[str, ...]:
    found = tuple(path.name for path in subfolders(folder, "data"))
    if not found:
        raise InputError("data", str(folder), _LAYOUT)
    return found


def _class_files(folder: Path, class_names: Sequence[str]) -> Files:
    """All image files of a split."""
    label_of = {name: label for label, name in enumerate(class_names)}
    files, others = [], []
    for name in _class_names(folder):
        if name not in label_of:
            raise InputError("data", str(folder / name), "only classes that train has")
        images, unread = _images_of(folder / name, "data")
        files += [(path, label_of[name]) for path in images]
        others += unread
    _refuse(others, folder, "data")
    if loose := loose_images(folder, "data"):
        found = f"{folder}: {named(loose, folder)}"
        raise InputError("data", found, "images in a folder of their class")
    return files


def _images_of(folder: Path, option: str) -> tuple[list[Path], list[Path]]:
    found = find_images(folder, option) if folder.is_dir() else None
    if found is None or not (found.images or found.others):
        raise InputError(option, str(folder), "a folder with at least one image file")
    return found.images, found.others


def _check_depth(files: Files, folder: Path) -> None:
    """Raises InputError where the only class of a split seems to hold the classes."""
    places = {path.relative_to(folder).parts[:-1] for path, _ in files}
    within = sorted({place[1] for place in places if len(place) > 1})
    classes = {place[0] for place in places}
    if len(classes) == 1 and len(within) > 1 and all(len(place) > 1 for place in places):
        found = f"{folder}: one class, {min(classes)}, with the folders {', '.join(within[:5])}"
        raise InputError("data", found, "the folders of the classes in that of the split")


def _refuse(others: list[Path], folder: Path, option: str) -> None:
    if others:
        allowed = "pictures that can be read, with a suffix such as .png or .jpg; or none"
        raise InputError(option, f"{folder}: {named(others, folder)}", allowed)


def _tell_of_unused(folder: Path, places: Mapping[str, Path]) -> None:
    """Warns of images that are in no folder of a split."""
    unused = {path.name: 1 for path in loose_images(folder, "data")}
    for path in subfolders(folder, "data"):
        if path not in places.values():
            unused[f"{path.name}/"] = count_images(path)
    names = [name for name, count in unused.items() if count]
    if names:
        _logger.warning(
            "folder:%s: %d images are not used: in %s; only train, val and test are",
            folder,
            sum(unused.values()),
            ", ".join(names[:5]) + (", ..." if len(names) > 5 else ""),
        )
