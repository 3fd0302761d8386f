"""Data sets as tensorflow-datasets prepares them, made up; no TensorFlow is needed."""

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Examples = Iterable[tuple[bytes, int]]
"""Encoded images and their labels."""


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """An image `[H, W]` or `[H, W, 3]` as a file holds it.

    >>> encoded(np.zeros((2, 2), np.uint8))[1:4]
    b'PNG'
    """
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_data_set(
    data_dir: Path,
    name: str,
    splits: Mapping[str, Examples],
    classes: int,
    shape: tuple[int | None, int | None, int],
    version: str = "1.0.0",
) -> None:
    """Writes array_record files, and what tensorflow-datasets says of them beside them.

    Args:
        data_dir: folder of data sets.
        name: of this one.
        splits: what each holds, one after another.
        classes: how many there are.
        shape: height, width and channels of all images; None: they differ.
        version: of the data set.
    """
    folder = data_dir / name / version
    folder.mkdir(parents=True)
    lengths = {}
    for split, examples in splits.items():
        path = folder / f"{name}-{split}.array_record-00000-of-00001"
        lengths[split] = _write_records(path, examples)
    info = {
        "name": name,
        "version": version,
        "fileFormat": "array_record",
        "splits": [
            {
                "name": split,
                "numBytes": "1",
                "shardLengths": [str(length)],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
            for split, length in lengths.items()
        ],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(_features(classes, shape)))
    (folder / "label.labels.txt").write_text("\n".join(f"class {i}" for i in range(classes)))


def _write_records(path: Path, examples: Examples) -> int:
    """Writes serialised `tf.train.Example`s; how many there are."""
    from array_record.python.array_record_module import (  # type: ignore[import-untyped]
        ArrayRecordWriter,
    )
    from tensorflow_datasets.proto import tf_example_pb2

    writer, count = ArrayRecordWriter(str(path), "group_size:1"), 0
    for image, label in examples:
        example = tf_example_pb2.Example()
        features = example.features.feature
        features["image"].bytes_list.value.append(image)
        features["label"].int64_list.value.append(label)
        features["id"].bytes_list.value.append(f"{count:05d}".encode())
        writer.write(example.SerializeToString())
        count += 1
    writer.close()
    return count


def _features(classes: int, shape: tuple[int | None, int | None, int]) -> dict[str, Any]:
    def of(kind: str, **more: Any) -> dict[str, Any]:
        return {"pythonClassName": f"tensorflow_datasets.core.features.{kind}", **more}

    sides = ["-1" if side is None else str(side) for side in shape]
    image = {"shape": {"dimensions": sides}, "dtype": "uint8", "encodingFormat": "png"}
    return of(
        "features_dict.FeaturesDict",
        featuresDict={
            "features": {
                "id": of("text_feature.Text", text={}),
                "image": of("image_feature.Image", image=image),
                "label": of(
                    "class_label_feature.ClassLabel", classLabel={"numClasses": str(classes)}
                ),
            }
        },
    )
