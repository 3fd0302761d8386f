"""The networks of a graph, built for the data and the devices, and found fit for them."""

import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import ktg_jax as ktg
from ktg_jax.connectors import without_connectors
from ktg_jax.data.dataset import Dataset
from ktg_jax.errors import InputError, part_of
from ktg_jax.inputs import OF_DATA, Input, checked_input, resolved_input
from ktg_jax.io.trees import unflatten
from ktg_jax.models import check_network
from ktg_jax.models.input import check_channels, statistics, with_input
from ktg_jax.models.network import NO_NETWORK
from ktg_jax.models.returned import errors_of
from ktg_jax.models.streams import without_stream
from ktg_jax.models.weights import NodeWeights
from ktg_jax.training.evaluation import evaluation_batch_size
from ktg_jax.training.optimizers import trainable
from ktg_jax.training.warm_start import check_input, load_weights

from .config import TrainConfig
from .graphs import PRETRAINED
from .recordings import recordings_of


def parallel_of(config: TrainConfig, devices: Sequence[jax.Device] | None) -> ktg.Parallel:
    """How the devices (default: all of this process's) are used."""
    return ktg.Parallel(config.parallel, devices or jax.devices(), config.batch_stats)


def node_functions(
    config: TrainConfig, graph: ktg.Graph, dataset: Dataset, parallel: ktg.Parallel
) -> list[ktg.NodeFns]:
    """Each node's functions.

    Raises:
        InputError: a model that cannot be made, or not in bfloat16.
    """
    node_fns: list[ktg.NodeFns] = []
    for i, node in enumerate(graph.nodes):
        if node.kind != "network":  # that of an average is filled in below
            node_fns.append(NO_NETWORK)
            continue
        with part_of(f"nodes[{i}].model"):
            wanted = node_input(i, node, dataset)
            classes = classes_of(node, dataset)
            node_fns.append(_build(config, node.model, classes, parallel, wanted))
    for average in graph.derived.averages:
        node_fns[average.node] = node_fns[average.source]
    return node_fns


def classes_of(node: ktg.Node, dataset: Dataset) -> int:
    """The classes of a node's logits."""
    return dataset.num_classes if node.classes is None else node.classes


def node_input(index: int, node: ktg.Node, dataset: Dataset) -> Input | None:
    """How a node wants its images, in numbers; None: as they are.

    Raises:
        InputError: it is of images with other channels.
    """
    if node.input is None:
        return None
    field = f"nodes[{index}].input"
    given = checked_input(field, node.input)
    wanted = resolved_input(given, statistics(dataset.train.images) if given == OF_DATA else None)
    check_channels(field, wanted, dataset.image_shape[-1])
    return wanted


def node_weights(index: int, node: ktg.Node, dataset: Dataset) -> NodeWeights:
    """The weights that a node names.

    Raises:
        InputError: they cannot be read, or are of a network that wants its images otherwise.
    """
    wanted = node_input(index, node, dataset) or Input()
    height, width, channels = dataset.image_shape
    shape = (wanted.size or height, wanted.size or width, channels)
    with part_of(f"nodes[{index}].weights"):
        weights = load_weights(str(node.weights), node.model, shape)
    check_input(index, weights, wanted)
    return weights


def check_weights(config: TrainConfig, graph: ktg.Graph, dataset: Dataset) -> None:
    """Raises InputError unless the weights that nodes name are those of their models; reads them.

    Networks that are trained alone first are not there yet.
    """
    node_fns = node_functions(config, graph, dataset, parallel_of(config, None))
    images = jnp.zeros((1, *dataset.image_shape))
    for i, (node, fns) in enumerate(zip(graph.nodes, node_fns, strict=True)):
        if node.weights in (None, "", PRETRAINED):
            continue
        weights = node_weights(i, node, dataset)
        params, model_state = jax.eval_shape(fns.init, jax.random.key(0), images)
        where = f"nodes[{i}].weights of {weights.source} (a {weights.model})"
        unflatten(params, weights.params, where)
        unflatten(without_stream(model_state), weights.model_state, where)


def check_networks(
    config: TrainConfig,
    graph: ktg.Graph,
    dataset: Dataset,
    devices: Sequence[jax.Device] | None = None,
) -> None:
    """Raises InputError unless the nodes can be trained on the data; computes nothing.

    A recording must be of the batches of the training.
    """
    recordings_of(config, graph, dataset)
    for i, node in enumerate(graph.nodes):
        if node.kind != "network":
            continue
        if node.classes is not None and node.weights == PRETRAINED:
            allowed = "null: a network that is trained alone first has the classes of the data"
            raise InputError(f"nodes[{i}].classes", node.classes, allowed)
        with errors_of(f"node {node.name}"):
            wanted = node_input(i, node, dataset)
            models = {f"nodes[{i}].model": node.model}
            check_models(config, models, dataset, devices, wanted, classes_of(node, dataset))
    is_plain = all(node.classes is None and node.trainable is None for node in graph.nodes)
    if is_plain and not graph.connectors and not graph.edge_arrays.needs_stages:
        return
    node_fns = node_functions(config, graph, dataset, parallel_of(config, devices))
    _check_trainable(graph, node_fns, dataset.image_shape)
    images = jnp.zeros((1, *dataset.image_shape))
    losses = functools.partial(_losses, graph, node_fns, dataset.num_classes)
    jax.eval_shape(losses, jax.random.key(0), images)


def _check_trainable(
    graph: ktg.Graph, node_fns: Sequence[ktg.NodeFns], image_shape: Sequence[int]
) -> None:
    """Raises InputError where a node's patterns of trainable parameters match none of them."""
    for i, (node, fns) in enumerate(zip(graph.nodes, node_fns, strict=True)):
        if node.trainable is not None:
            images = jnp.zeros((1, *image_shape))
            params, _ = jax.eval_shape(fns.init, jax.random.key(0), images)
            try:
                jax.eval_shape(trainable(ktg.sgd(), node.trainable).init, params)
            except InputError as error:
                field = f"nodes[{i}].{error.field}"
                raise InputError(field, error.value, error.allowed) from None


def check_models(
    config: TrainConfig,
    models: Mapping[str, str],
    dataset: Dataset,
    devices: Sequence[jax.Device] | None = None,
    wanted: Input | None = None,
    num_classes: int | None = None,
) -> None:
    """Raises InputError unless these models can be trained on the data; computes nothing.

    Args:
        config: the configuration of their training.
        models: their names, by what an error calls each.
        dataset: to train on.
        devices: to train on (default: all of this process's).
        wanted: how they want their images; None: as they are.
        num_classes: of their logits; None: the data's.
    """
    classes = num_classes or dataset.num_classes
    parallel = parallel_of(config, devices)
    mapped, number = parallel.axis_name, len(parallel.devices)
    for field, model in models.items():
        try:
            fns = _build(config, model, classes, parallel, wanted)
        except InputError as error:
            raise InputError(field, error.value, error.allowed) from error.__cause__
        is_hashable = all(isinstance(each, Hashable) for each in (fns.init, fns.apply, fns.stages))
        check = _check if is_hashable else _check.__wrapped__
        check(
            fns,
            model,
            num_classes=classes,
            image_shape=dataset.image_shape,
            batch_size=max(config.batch_size // (number if mapped else 1), 1),
            evaluation_size=evaluation_batch_size(
                dataset.image_shape, parallel.devices[0].platform
            ),
            axis=(mapped, number) if mapped else None,
            field=field,
        )


_check = functools.lru_cache(maxsize=256)(check_network)
"""Each network once, though it is in graph after graph."""


def _build(
    config: TrainConfig,
    model: str,
    num_classes: int,
    parallel: ktg.Parallel,
    wanted: Input | None,
) -> ktg.NodeFns:
    dtype = jnp.bfloat16 if config.mixed_precision else jnp.float32
    axis_name = parallel.statistics_axis
    fns = ktg.build_model(model, num_classes, dtype=dtype, axis_name=axis_name)
    return fns if wanted is None else with_input(fns, wanted)


def _losses(
    graph: ktg.Graph,
    node_fns: Sequence[ktg.NodeFns],
    num_classes: int,
    rng: jax.Array,
    images: jax.Array,
) -> Any:
    """What the edges make of what the nodes put out, stages included."""
    state = ktg.init_state(graph, node_fns, ktg.sgd(), rng, images)
    with_stages = graph.edge_arrays.needs_stages
    outputs: list[Any] = []
    for i, fns in enumerate(node_fns):
        if fns == NO_NETWORK:
            outputs.append(ktg.Outputs(jnp.zeros((len(images), num_classes))))
            continue
        node = state.params[i], state.model_state[i], images
        try:
            made, _ = ktg.node_forward(*node, fns=fns, frozen=True, with_stages=with_stages)
        except InputError as error:
            name = f"{error.field} of nodes[{i}]"
            raise InputError(name, error.value, error.allowed) from None
        outputs.append(made)
    labels = jnp.zeros(len(images), jnp.int32)
    connectors = [without_connectors(params)[1] for params in state.params]
    edges = graph.edge_arrays
    outputs += [outputs[each.sender] for each in edges.delayed]
    return ktg.graph_gradients(outputs, labels, edges, 1.0, connectors=connectors)
