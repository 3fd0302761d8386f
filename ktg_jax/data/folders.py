"""Data sets that are folders of image files."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ktg_jax.data.cache import cached_split
from ktg_jax.data.dataset import Dataset, Split
from ktg_jax.data.images import ImageForm, form_of, read_images
from ktg_jax.errors import InputError

_SUFFIXES = (".png", ".jpg", ".jpeg")
_TINY_IMAGENET = ImageForm(height=64, width=64, greyscale=False)


def load_image_folder(
    folder: Path, *, image_size: int | None = None, with_test: bool = True
) -> Dataset:
    """Reads `folder/<split>/<class>/*.png`, `*.jpg` or `*.jpeg` (upper or lower case).

    The splits are `train` and, where they are there, `val` and `test`. The classes are the sorted
    folder names of `train`. The files of `train` also decide, for every split, the image size
    (unless `image_size` gives it) and whether images are greyscale (all of train are) or RGB.

    Args:
        folder: as above.
        image_size: resize to a square of this size, in pixels; None: all have the same size.
        with_test: whether to read `test`.

    Raises:
        InputError: no `train`, a class folder without images, a class that train does not have,
            images of differing sizes, or a file that cannot be decoded.
    """
    class_names = _class_folders(folder / "train")
    train_files = _class_files(folder / "train", class_names)
    form = form_of([path for path, _ in train_files], image_size)

    def read(split: str) -> Split | None:
        if not (folder / split).is_dir():
            return None
        return _read_files(_class_files(folder / split, class_names), form, f"decoding {split}")

    return Dataset(
        name=f"folder:{folder}",
        class_names=class_names,
        train=_read_files(train_files, form, "decoding train"),
        val=read("val"),
        test=read("test") if with_test else None,
        flip=True,
    )


def load_tiny_imagenet(
    data_dir: str | os.PathLike[str] | None,
    *,
    with_test: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Reads Tiny-ImageNet in the folder layout in which it is distributed.

    The official `val` images are the *test* split here: the labels of the official `test` images
    were never published. Greyscale images become RGB. Decoded images are cached.

    Args:
        data_dir: the folder `tiny-imagenet-200`, or the one that holds it.
        with_test: whether to read the official `val`.
        cache_dir: see `cache_folder`.

    Raises:
        InputError: a file of the layout is not there or cannot be decoded, or an annotation names
            an unknown class.
    """
    root = _tiny_imagenet_root(data_dir)
    class_ids = _lines(root / "wnids.txt")
    label_of = {class_id: label for label, class_id in enumerate(class_ids)}
    names = dict(line.split("\t", 1) for line in _lines(root / "words.txt") if "\t" in line)

    def read(split: str, files: Sequence[tuple[Path, int]], *index: Path) -> Split:
        return cached_split(
            f"tiny_imagenet-{split}",
            [*index, *(path for path, _ in files)],  # the labels come from the index files
            lambda: _read_files(files, _TINY_IMAGENET, f"decoding tiny_imagenet {split}"),
            cache_dir,
        )

    train_files = [
        (path, label)
        for class_id, label in label_of.items()
        for path in _image_files(root / "train" / class_id / "images", "data_dir")
    ]
    train = read("train", train_files, root / "wnids.txt")
    test = None
    if with_test:
        annotations = root / "val" / "val_annotations.txt"
        test_files = _annotated_files(annotations, label_of)
        test = read("val", test_files, root / "wnids.txt", annotations)
    return Dataset(
        name="tiny_imagenet",
        class_names=tuple(names.get(i, i).split(",")[0].strip() for i in class_ids),
        train=train,
        val=None,
        test=test,
        flip=True,
    )


def _read_files(files: Sequence[tuple[Path, int]], form: ImageForm, description: str) -> Split:
    images = read_images([path for path, _ in files], form, description)
    return Split(images, np.array([label for _, label in files], np.int32))


def _class_folders(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise InputError("data", str(folder), "a folder with one folder of images per class")
    names = (path.name for path in folder.iterdir() if path.is_dir())
    found = tuple(sorted(name for name in names if not name.startswith(".")))
    if not found:
        raise InputError("data", str(folder), "a folder with one folder of images per class")
    return found


def _class_files(folder: Path, class_names: Sequence[str]) -> list[tuple[Path, int]]:
    label_of = {name: label for label, name in enumerate(class_names)}
    files = []
    for name in _class_folders(folder):
        if name not in label_of:
            raise InputError("data", str(folder / name), "only classes that train has")
        files += [(path, label_of[name]) for path in _image_files(folder / name, "data")]
    return files


def _image_files(folder: Path, field: str) -> list[Path]:
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [path for path in paths if path.suffix.lower() in _SUFFIXES]
    visible = sorted(path for path in found if not path.name.startswith("."))
    if not visible:
        raise InputError(field, str(folder), "a folder with at least one PNG or JPEG file")
    return visible


def _tiny_imagenet_root(data_dir: str | os.PathLike[str] | None) -> Path:
    if data_dir is not None:
        folder = Path(data_dir).expanduser()
        for root in (folder, folder / "tiny-imagenet-200"):
            if (root / "wnids.txt").is_file():
                return root
    raise InputError(
        "data_dir",
        None if data_dir is None else str(data_dir),
        "the unpacked folder tiny-imagenet-200 (with wnids.txt), or the one that holds it",
    )


def _annotated_files(annotations: Path, label_of: dict[str, int]) -> list[tuple[Path, int]]:
    files = []
    for line in _lines(annotations):
        name, class_id = (*line.split("\t"), "")[:2]
        if class_id not in label_of:
            raise InputError("data_dir", f"{annotations}: {line}", "a file name, tab, known class")
        files.append((annotations.parent / "images" / name, label_of[class_id]))
    return files


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty; at least one."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("data_dir", str(path), "a readable text file") from error
    if not lines:
        raise InputError("data_dir", str(path), "a text file that is not empty")
    return lines
