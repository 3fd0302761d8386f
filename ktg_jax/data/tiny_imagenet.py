"""Tiny-ImageNet, in the folder layout in which it is distributed."""

import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from ktg_jax.data.cache import OnProgress
from ktg_jax.data.dataset import Dataset, Split, cached_split
from ktg_jax.data.folders import Files, images_in, read_files, stream_files
from ktg_jax.data.form import ImageForm
from ktg_jax.data.listing import find_images, named
from ktg_jax.data.streamed import Streaming
from ktg_jax.errors import InputError

_logger = logging.getLogger(__name__)

_FORM = ImageForm(height=64, width=64, greyscale=False)
_LARGEST_INDEX = 64 * 2**20


def load_tiny_imagenet(
    data_dir: str | os.PathLike[str] | None,
    *,
    with_test: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
    image_size: int | None = None,
    stream: Streaming | None = None,
) -> Dataset:
    """Reads Tiny-ImageNet in the folder layout in which it is distributed.

    The official `val` images are the *test* split here: the labels of the official `test` images
    were never published. Greyscale images become RGB. Decoded images are cached.

    Args:
        data_dir: the folder `tiny-imagenet-200`, or the one that holds it.
        with_test: whether to read the official `val`.
        cache_dir: see `cache_folder`.
        on_progress: see `OnProgress`.
        image_size: of streamed images, the height and width to resize to; None: as they are.
        stream: how images are streamed; None: they are all read.

    Raises:
        InputError: a file of the layout is not there or cannot be decoded, an annotation names an
            unknown class, or a class is listed twice.
    """
    root = _root(data_dir)
    class_ids = _lines(root / "wnids.txt")
    label_of = {class_id: label for label, class_id in enumerate(class_ids)}
    if len(label_of) < len(class_ids):
        twice = next(name for name in class_ids if class_ids.count(name) > 1)
        raise InputError("data_dir", f"{root / 'wnids.txt'}: {twice} twice", "each class once")
    names = dict(line.split("\t", 1) for line in _lines(root / "words.txt") if "\t" in line)

    size = image_size or _FORM.height

    def read(split: str, files: Files, *index: Path) -> Split:
        if stream is not None:
            resize = image_size is not None
            form = ImageForm(size, size, greyscale=False, resize=resize, centre=stream.centre)
            return stream_files(root, files, form, stream)
        return cached_split(
            f"tiny_imagenet-upright-{split}",
            [*index, *(path for path, _ in files)],  # the labels come from the index files
            lambda: read_files(files, _FORM, f"tiny_imagenet {split}", on_progress),
            cache_dir,
        )

    train_files = [
        (path, label)
        for class_id, label in label_of.items()
        for path in images_in(root / "train" / class_id / "images", "data_dir")
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


def _root(data_dir: str | os.PathLike[str] | None) -> Path:
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


def _annotated_files(annotations: Path, label_of: Mapping[str, int]) -> Files:
    folder = annotations.parent / "images"
    files = []
    for line in _lines(annotations):
        name, class_id = (*line.split("\t"), "")[:2]
        if class_id not in label_of or Path(name).name != name:
            raise InputError("data_dir", f"{annotations}: {line}", "a file name, tab, known class")
        files.append((folder / name, label_of[class_id]))
    if folder.is_dir():
        annotated = {path for path, _ in files}
        found = find_images(folder, "data_dir").images
        if unused := [path for path in found if path not in annotated]:
            _logger.warning("%s does not speak of %s", annotations, named(unused, folder))
    return files


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty, as Windows writes it, too; at least one."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_INDEX:
            allowed = f"a text file of at most {_LARGEST_INDEX >> 20} MiB"
            raise InputError("data_dir", str(path), allowed)
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("data_dir", str(path), "a readable text file, in UTF-8") from error
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError("data_dir", str(path), "a text file that is not empty")
    return lines
