"""Data sets that tensorflow-datasets has prepared as array_record files. Needs no TensorFlow."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ktg_jax.data.cache import OnProgress, cached_split, in_chunks
from ktg_jax.data.dataset import Dataset, Split
from ktg_jax.errors import InputError


def load_tfds(
    name: str,
    data_dir: str | os.PathLike[str] | None,
    *,
    with_test: bool,
    cache_dir: str | os.PathLike[str] | None,
    on_progress: OnProgress | None = None,
) -> Dataset:
    """Reads the splits `train` and `test` of a tensorflow-datasets classification data set.

    Args:
        name: such as `cifar10`.
        data_dir: folder that holds `<name>/<version>`; None: the one of tensorflow-datasets,
            `~/tensorflow_datasets` unless `TFDS_DATA_DIR` says otherwise.
        with_test: whether to read `test`.
        cache_dir: see `cache_folder`.
        on_progress: see `OnProgress`.

    Raises:
        InputError: the data is not there in array_record format, or its files are damaged.
    """
    builder = open_builder(name, data_dir)

    def read(split: str) -> Split:
        return cached_split(
            f"{name}-{builder.version}-{split}",
            [Path(file) for file in builder.info.splits[split].filepaths],
            lambda: decode_examples(builder, split, on_progress=on_progress),
            cache_dir,
        )

    class_names = tuple(builder.info.features["label"].names)
    return Dataset(
        name=name,
        class_names=class_names,
        train=read("train"),
        val=None,
        test=read("test") if with_test else None,
        flip=True,
    )


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
    try:
        source = builder.as_data_source(split)
        wanted = range(len(source)) if indices is None else list(indices)
        images = np.empty((len(wanted), *builder.info.features["image"].shape), np.uint8)
        labels = np.empty(len(wanted), np.int32)

        def decode(chunk: range) -> None:
            examples = source.__getitems__([wanted[i] for i in chunk])
            for i, example in zip(chunk, examples, strict=True):
                images[i], labels[i] = example["image"], example["label"]

        in_chunks(decode, len(wanted), f"{builder.name} {split}", on_progress)
    except ImportError:
        raise
    except Exception as error:  # array_record, protobuf and PIL each have their own types
        files = ", ".join(str(file) for file in builder.info.splits[split].filepaths)
        raise InputError("data_dir", files, "complete, undamaged array_record files") from error
    return Split(images, labels)


def prepare_command(name: str, folder: str | None) -> str:
    """What to type to download and prepare a data set into `folder`.

    Not `tfds build`: that command also needs apache-beam, which nothing else here does.
    """
    where = "" if folder is None else f", data_dir={folder!r}"
    builder = f"tfds.builder('{name}'{where}, file_format='array_record')"
    code = f"import tensorflow_datasets as tfds; {builder}.download_and_prepare()"
    code = re.sub(r'([\\"$`])', r"\\\1", code)  # as a shell reads it between double quotes
    return f'pip install "ktg_jax[prepare]", then python -c "{code}"'
