"""What a network puts out for the batches of a training, step by step or image by image."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ktg_jax.cpu.convolution import cpu_convolution
from ktg_jax.models.network import NodeFns, PyTree
from ktg_jax.recording import Header, Recording, RecordingWriter
from ktg_jax.training.batches import Arrays, Batches, BatchPlan, data_key, take_batch
from ktg_jax.training.evaluation import evaluation_batch, evaluation_batch_size
from ktg_jax.training.forward import node_forward
from ktg_jax.training.host_batches import BatchStream


class Network(NamedTuple):
    """A network that does not learn any more.

    Attributes:
        fns: its functions.
        params: its parameters.
        model_state: its model state.
    """

    fns: NodeFns
    params: PyTree
    model_state: PyTree


def record_batches(
    network: Network, stream: BatchStream, steps: Iterable[int]
) -> Iterator[np.ndarray]:
    """The network's logits for the augmented batches of some steps, float32 `[B, C]` each.

    They are those of a frozen node in these steps.
    """
    data = Arrays(jnp.asarray(stream.images), jnp.asarray(stream.labels))
    key = data_key(stream.data_seed)
    forward = _of_step(network.fns, stream.batches, cpu_convolution().name)
    pending: Any = None
    for step in steps:  # a step ahead, so that the device does not wait
        made = forward(network.params, network.model_state, data, key, np.int32(step))
        if pending is not None:
            yield np.asarray(pending, np.float32)
        pending = made
    if pending is not None:
        yield np.asarray(pending, np.float32)


def record_images(
    network: Network, stream: BatchStream, crops: int = 1, first: int = 0
) -> Iterator[np.ndarray]:
    """The network's logits for the training images in their order, float32 `[m, C]` at a time.

    Args:
        network: the network.
        stream: whose images, and where there are several crops whose augmentation and seed.
        crops: 1: of the images as they are; more: the mean over so many augmented views of each.
        first: the image to begin with.
    """
    data = Arrays(jnp.asarray(stream.images), jnp.asarray(stream.labels))
    size = evaluation_batch_size(stream.images.shape[1:], jax.default_backend())
    key = data_key(stream.data_seed)
    forward = _of_images(network.fns, stream.batches, size, crops, cpu_convolution().name)
    for start in range(first, len(stream.images), size):
        logits = forward(network.params, network.model_state, data, key, start)
        yield np.asarray(logits, np.float32)[: len(stream.images) - start]


def record_host(
    outputs: Callable[[np.ndarray], ArrayLike],
    stream: BatchStream,
    folder: str | os.PathLike[str],
    *,
    steps: int,
    classes: int,
    dtype: str = "float16",
    top: int | None = None,
    source: Mapping[str, Any] | None = None,
) -> Recording:
    """Records what any function on the host puts out for the batches of a training.

    Interrupted, the same call goes on after the last whole file; complete, it does nothing.

    Args:
        outputs: a function of images float32 `[B, H, W, C]` in 0..1 that returns logits `[B, C]`;
            it must give the same for the same images.
        stream: the batches.
        folder: of the recording.
        steps: so many batches from the first on.
        classes: the number of logits.
        dtype: as of `Header`.
        top: as of `Header`.
        source: what the outputs are of, for people; two calls with another source are different.

    Returns:
        The recording.

    Raises:
        InputError: a folder that holds something else, or logits that cannot be recorded.
        RunError: they cannot be written.

    >>> import tempfile
    >>> images, labels = np.zeros((8, 8, 8, 1), np.uint8), np.zeros(8, np.int32)
    >>> stream = BatchStream(images, labels, Batches(8, batch_size=4), data_seed=0)
    >>> def outputs(images):
    ...     return np.zeros((len(images), 10))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     record_host(outputs, stream, folder, steps=3, classes=10).rows(0, 3).shape
    (3, 4, 10)
    """
    header = Header("batches", stream.facts, steps, classes, dtype, top, dict(source or {}))
    writer = RecordingWriter(folder, header)
    if not writer.is_complete:
        with writer:
            for images, _ in stream.host(writer.rows, steps):
                writer.add(outputs(images))
    return Recording(folder)


@functools.lru_cache(maxsize=16)
def _of_step(fns: NodeFns, batches: Batches, convolution: str) -> Any:
    del convolution  # what is traced with one is not used with another

    def logits(
        params: PyTree, model_state: PyTree, data: Arrays, key: jax.Array, step: jax.Array
    ) -> jax.Array:
        images, _ = take_batch(*data, batches.plan(key, step))
        made: Any = node_forward(params, model_state, images, fns=fns, frozen=True)[0]
        return made

    return jax.jit(logits)


@functools.lru_cache(maxsize=16)
def _of_images(fns: NodeFns, batches: Batches, size: int, crops: int, convolution: str) -> Any:
    del convolution  # as above

    def logits(
        params: PyTree, model_state: PyTree, data: Arrays, key: jax.Array, start: int
    ) -> jax.Array:
        def forward(images: jax.Array) -> jax.Array:
            made: Any = node_forward(params, model_state, images, fns=fns, frozen=True)[0]
            return jnp.asarray(made, jnp.float32)

        position = start + jnp.arange(size)
        if crops == 1:
            return forward(evaluation_batch(data, position)[0])
        index = jnp.minimum(position, batches.num_images - 1)
        total = jnp.zeros(())
        for crop in range(crops):
            of_all = batches._replace(batch_size=batches.num_images, mixup=0.0, cutmix=0.0)
            plan = of_all.plan(jax.random.fold_in(key, crop), 0)
            view = BatchPlan(index, plan.offset[index], plan.flip[index])
            total = total + forward(take_batch(*data, view)[0])
        return total / crops

    return jax.jit(logits)
