"""Checksums of all that a run rests on: its data, and the files that its graph names.

Of streamed images the files' names and sizes count, not what they hold.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import ktg_jax as ktg
from ktg_jax.data.dataset import Dataset, Split
from ktg_jax.data.streamed import StreamedImages
from ktg_jax.errors import part_of
from ktg_jax.inputs import OF_DATA
from ktg_jax.models.input import statistics
from ktg_jax.priors import about_prior
from ktg_jax.recording import Recording
from ktg_jax.training.warm_start import INPUT_FACTS, weights_checksum

from .graphs import PRETRAINED


def data_facts(dataset: Dataset) -> dict[str, Any]:
    """What must be the same when a run is resumed on data that may have changed meanwhile.

    Of splits that are not there, or were not read, there is no checksum.
    """
    splits = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    names = json.dumps(dataset.class_names)
    return {
        "classes": dataset.num_classes,
        "image_shape": list(dataset.image_shape),
        **{name: len(split) if split else 0 for name, split in splits.items()},
        "class_names_crc32": zlib.crc32(names.encode()),
        **{f"{name}_crc32": _checksum(split) for name, split in splits.items() if split},
    }


def without_test(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of data, but for what is known of its test images."""
    return {field: value for field, value in facts.items() if field not in ("test", "test_crc32")}


def _checksum(split: Split) -> int:
    labels = zlib.crc32(np.ascontiguousarray(split.labels).data)
    if isinstance(split.images, StreamedImages):
        return zlib.crc32(split.images.checksum.to_bytes(4), labels)
    return zlib.crc32(np.ascontiguousarray(split.images).data, labels)


def facts_of(graph: ktg.Graph, dataset: Dataset) -> dict[str, Any]:
    """All that a run rests on: `data_facts`, `graph_facts`, and inputs that are the data's own."""
    facts = {"data_facts": data_facts(dataset), **graph_facts(graph)}
    named = [str(node.name) for node in graph.nodes if node.input == OF_DATA]
    if named:
        facts[INPUT_FACTS] = dict.fromkeys(named, statistics(dataset.train.images).to_json())
    return facts


def graph_facts(graph: ktg.Graph) -> dict[str, Any]:
    """Checksums of weights, priors and recordings, which must be the same, too.

    Networks that are trained alone first are told by the run itself, and have none.

    Raises:
        InputError: a file or a folder that cannot be read.
    """
    checksums: dict[str, dict[str, Any]] = {}
    index = {str(node.name): i for i, node in enumerate(graph.nodes)}
    for name, field, path in graph_files(graph):
        with part_of(f"nodes[{index[name]}].{field}"):
            checksums.setdefault(f"{field}_facts", {})[name] = _CHECKSUMS[field](path)
    return checksums


def graph_files(graph: ktg.Graph) -> list[tuple[str, str, str]]:
    """The files that nodes are made from: the node's name, its field, and the path."""
    return [
        (str(node.name), field, path)
        for node in graph.nodes
        for field in _CHECKSUMS
        if (path := getattr(node, field)) not in (None, PRETRAINED)
    ]


_CHECKSUMS: dict[str, Callable[[str], Any]] = {
    "weights": weights_checksum,
    "prior": lambda path: about_prior(path)["checksum"],
    "outputs": lambda path: Recording(path).checksum,
}
"""How a checksum is made of each field of a node that is a path."""
