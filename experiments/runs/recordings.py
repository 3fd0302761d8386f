"""The batches of a training, and the recordings that its graph names, checked against them."""

from typing import Any

import ktg_jax as ktg
from ktg_jax.data.dataset import Dataset
from ktg_jax.errors import InputError, part_of
from ktg_jax.inputs import Input
from ktg_jax.io.trees import digest, flatten
from ktg_jax.recording import Recording
from ktg_jax.training.batches import Batches, steps_per_epoch
from ktg_jax.training.host_batches import BatchStream
from ktg_jax.training.record import Network

from .config import TrainConfig
from .options import Training


def batches_of(training: Training, dataset: Dataset) -> Batches:
    """How batches are made from the training images.

    Raises:
        InputError: a batch larger than the data.
    """
    steps_per_epoch(len(dataset.train), training.batch_size)
    parts = training.augment and dataset.is_streamed and dataset.train.images.form.centre
    return Batches(
        num_images=len(dataset.train),
        batch_size=training.batch_size,
        max_offset=min(dataset.image_shape[:2]) // 8 if training.augment and not parts else 0,
        flip=training.augment and training.mirror and dataset.flip,
        mixup=training.mixup,
        cutmix=training.cutmix,
        parts=parts,
    )


def seed_of_data(config: TrainConfig) -> int:
    """The seed of data order and augmentation."""
    return config.seed if config.data_seed is None else config.data_seed


def source_of(model: str, network: Network, wanted: Input) -> dict[str, Any]:
    """What a recording is of: the network, by its model, its weights and how it sees images."""
    weights = digest(flatten([network.params, network.model_state]))
    source = {"model": model, "weights_crc32": weights}
    return source | ({} if wanted == Input() else {"input": wanted.to_json()})


def recordings_of(config: TrainConfig, graph: ktg.Graph, dataset: Dataset) -> dict[int, Recording]:
    """The recordings of the graph's recorded nodes, by the nodes' indices.

    Raises:
        InputError: one that cannot be read, or is of other batches; says what differs.
    """
    paths = {i: n.outputs for i, n in enumerate(graph.nodes) if n.outputs is not None}
    if not paths:
        return {}
    batches = batches_of(config, dataset)
    stream = BatchStream(dataset.train.images, dataset.train.labels, batches, seed_of_data(config))
    steps = config.epochs * steps_per_epoch(batches.num_images, batches.batch_size)
    recordings = {}
    for i, path in paths.items():
        with part_of(f"nodes[{i}].outputs"):
            recordings[i] = Recording(path)
            recordings[i].check(stream.facts, classes=dataset.num_classes, steps=steps)
        if recordings[i].is_static and (batches.mixup or batches.cutmix):
            allowed = "a recording by step: one by image has seen no mixed images"
            raise InputError(f"nodes[{i}].outputs", path, allowed)
    return recordings
