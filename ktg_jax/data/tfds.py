"""Data sets that tensorflow-datasets has prepared as array_record files. Needs no TensorFlow."""

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ktg_jax.data.cache import OnProgress, cached, in_chunks
from ktg_jax.data.dataset import Dataset, Split, cached_split
from ktg_jax.data.form import ImageForm
from ktg_jax.data.splits import by_split
from ktg_jax.data.streamed import ImageRecords, Streaming, all_of, undamaged
from ktg_jax.errors import InputError

_logger = logging.getLogger(__name__)


def load_tfds(
    name: str,
    data_dir: str | os.PathLike[str] | None,
    *,
    with_test: bool,
    cache_dir: str | os.PathLike[str] | None,
    on_progress: OnProgress | None = None,
    image_size: int | None = None,
    stream: Streaming | None = None,
) -> Dataset:
    """Reads a tensorflow-datasets classification data set: `train` and, if there, `val` and `test`.

    Args:
        name: such as `cifar10`, or `imagenette/320px-v2`.
        data_dir: folder that holds `<name>/<version>`; None: the one of tensorflow-datasets,
            `~/tensorflow_datasets` unless `TFDS_DATA_DIR` says otherwise.
        with_test: whether to read `test`.
        cache_dir: see `cache_folder`.
        on_progress: see `OnProgress`.
        image_size: of streamed images, the height and width to resize to; None: as they are.
        stream: how images are streamed; None: they are all read, and must be of one size.

    Raises:
        InputError: the data is not there in array_record format, its files are damaged, or it has
            no images with labels.
    """
    builder = open_builder(name, data_dir)
    form = _form(name, builder.info.features, image_size, stream)
    key = f"{name.replace('/', '-')}-{builder.version}"

    def read(split: str) -> Split:
        files = _files(builder, split)
        if stream is None:
            return cached_split(
                f"{key}-{split}",
                files,
                lambda: decode_examples(builder, split, on_progress=on_progress),
                cache_dir,
            )
        labels = cached(
            f"{key}-{split}-labels",
            files,
            lambda: {"labels": _decode_labels(builder, split, on_progress)},
            lambda arrays: np.asarray(arrays["labels"], np.int32),
            cache_dir,
        )
        source = ImageRecords(_encoded(builder, split), tuple(files))
        return Split(all_of(source, form, stream.workers), labels)

    places = by_split(builder.info.splits, "data")
    splits = {split: read(named) for split, named in places.items() if with_test or split != "test"}
    for split in ("val", "test"):
        if split in splits and (splits[split].labels < 0).all():
            _logger.warning("%s: the labels of %s were not published: left out", name, split)
            del splits[split]
    if "train" not in splits:
        raise InputError("data", name, "a data set with a split train")
    return Dataset(
        name=name,
        class_names=tuple(builder.info.features["label"].names),
        train=splits["train"],
        val=splits.get("val"),
        test=splits.get("test"),
        flip=True,
        own_val="val" in splits,
    )


def splits_of_tfds(name: str, data_dir: str | os.PathLike[str] | None) -> set[str]:
    """Which of `train`, `val` and `test` a data set has; no record is read.

    Raises:
        InputError: it is not there.
    """
    return set(by_split(open_builder(name, data_dir).info.splits, "data"))


def open_builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    """The `tfds.core.DatasetBuilder` of a prepared data set; no record is read yet.

    Raises:
        InputError: it is not there in array_record format; says how to prepare it.
    """
    import tensorflow_datasets as tfds  # takes seconds: only where needed

    folder = str(Path(data_dir).expanduser()) if data_dir else None
    wanted = name
    try:
        builder = tfds.builder(name, data_dir=folder)
        wanted = f"{name}/{builder.version}"
        folder = str(Path(builder.data_path).parent.parent)
        builder.as_data_source("train")
    except ImportError:
        raise
    except Exception as error:  # many types, for what is missing, damaged or in another format
        raise InputError(
            "data_dir",
            folder,
            f"a folder that holds {wanted} in array_record format; "
            f"to prepare it: {prepare_command(name, folder)}",
        ) from error
    return builder


def decode_examples(
    builder: Any,
    split: str,
    indices: Iterable[int] | None = None,
    on_progress: OnProgress | None = None,
) -> Split:
    """Decodes images and labels of a split.

    Args:
        builder: from `open_builder`.
        split: name of the split.
        indices: the indices of the examples, in the order of the files; None: all.
        on_progress: see `OnProgress`.

    Raises:
        InputError: a file is damaged or incomplete.
    """
    with undamaged(_files(builder, split)):
        source = builder.as_data_source(split)
        wanted = range(len(source)) if indices is None else list(indices)
        images = np.empty((len(wanted), *builder.info.features["image"].shape), np.uint8)
        labels = np.empty(len(wanted), np.int32)

        def decode(chunk: range) -> None:
            examples = source.__getitems__([wanted[i] for i in chunk])
            for i, example in zip(chunk, examples, strict=True):
                images[i], labels[i] = example["image"], example["label"]

        in_chunks(decode, len(wanted), f"{builder.name} {split}", on_progress)
    return Split(images, labels)


def _decode_labels(builder: Any, split: str, on_progress: OnProgress | None) -> np.ndarray:
    """The labels of all examples of a split, of which the images stay encoded."""
    with undamaged(_files(builder, split)):
        source = _encoded(builder, split)
        labels = np.empty(len(source), np.int32)

        def decode(chunk: range) -> None:
            labels[chunk.start : chunk.stop] = [e["label"] for e in source.__getitems__([*chunk])]

        in_chunks(decode, len(labels), f"labels of {builder.name} {split}", on_progress)
    return labels


def _encoded(builder: Any, split: str) -> Any:
    """The data source of a split, its images as they are in the files."""
    import tensorflow_datasets as tfds

    return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})


def _files(builder: Any, split: str) -> list[Path]:
    return [Path(file) for file in builder.info.splits[split].filepaths]


def _form(name: str, features: Any, image_size: int | None, stream: Streaming | None) -> ImageForm:
    """The form of the images.

    Raises:
        InputError: there are no images with labels, or they differ in size.
    """
    import tensorflow_datasets as tfds

    image, label = (dict(features or {}).get(each) for each in ("image", "label"))
    is_labelled = isinstance(label, tfds.features.ClassLabel)
    if not (is_labelled and isinstance(image, tfds.features.Image)):
        raise InputError("data", name, "a data set of images and their labels")
    height, width, channels = image.shape
    if np.dtype(image.np_dtype) != np.uint8 or channels not in (1, 3):
        found = f"{name}: {np.dtype(image.np_dtype)}, {channels} channels"
        raise InputError("data", found, "images of 8 bits, grey or RGB")
    if stream is not None and image_size is not None:
        return ImageForm(image_size, image_size, channels == 1, resize=True, centre=stream.centre)
    if None not in (height, width):
        return ImageForm(height, width, channels == 1, centre=stream is not None and stream.centre)
    if stream is None:
        raise InputError("stream", False, f"true: the images of {name} differ in size")
    raise InputError("image_size", None, f"pixels: the images of {name} differ in size")


def prepare_command(name: str, folder: str | None) -> str:
    """What to type to download and prepare a data set into `folder`.

    Not `tfds build`: that command also needs apache-beam, which nothing else here does.
    """
    where = "" if folder is None else f", data_dir={folder!r}"
    builder = f"tfds.builder('{name}'{where}, file_format='array_record')"
    code = f"import tensorflow_datasets as tfds; {builder}.download_and_prepare()"
    code = re.sub(r'([\\"$`])', r"\\\1", code)  # as a shell reads it between double quotes
    return f'pip install "ktg_jax[prepare]", then python -c "{code}"'
