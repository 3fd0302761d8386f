"""From a configuration to everything that training needs, checked and on the devices."""

import functools
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ktg_jax as ktg
from ktg_jax.data.dataset import Dataset, Split
from ktg_jax.data.sources import load_dataset
from ktg_jax.errors import InputError, part_of
from ktg_jax.io.trees import digest
from ktg_jax.priors import about_prior, readers_checksum
from ktg_jax.training.batches import steps_per_epoch
from ktg_jax.training.engines import Batches, Engine, choose_engine, fused_engine, per_node_engine
from ktg_jax.training.loop import Arrays, Means
from ktg_jax.training.state import GraphState
from ktg_jax.training.warm_start import load_weights, with_weights

from .config import TrainConfig
from .graphs import PRETRAINED
from .networks import check_networks, node_functions, parallel_of
from .options import MOST, Training
from .progress import decoding_shown


@dataclass(frozen=True)
class Run:
    """Everything that training needs.

    Attributes:
        graph: of the networks.
        node_fns: one a node.
        state: the initial state, pre-trained weights and priors included.
        engine: which trains and evaluates, on which devices.
        step: `step(state, count)`, compiled; consumes the state.
        val: validation images as the engine has them, or None.
        test: test images likewise, or None.
        epochs: passes over the training images.
        steps_per_epoch: updates a pass.
        batch_size: images an update.
        steps_per_call: updates a call of the step.
        summary: what this is, in a line.
    """

    graph: ktg.Graph
    node_fns: Sequence[ktg.NodeFns]
    state: GraphState
    engine: Engine
    step: Callable[[GraphState, int], tuple[GraphState, dict[str, jax.Array]]]
    val: Any
    test: Any
    epochs: int
    steps_per_epoch: int
    batch_size: int
    steps_per_call: int
    summary: str

    @property
    def evaluate_val(self) -> Callable[[GraphState], Means] | None:
        """Evaluates a state on the validation images; None: there are none."""
        val = self.val
        return None if val is None else lambda state: self.engine.evaluate(state, val)

    def evaluate_val_and_test(self, state: GraphState) -> tuple[Means | None, Means | None]:
        """The means over the validation and over the test images, where there are any."""
        evaluate = self.engine.evaluate
        val = None if self.val is None else evaluate(state, self.val)
        return val, None if self.test is None else evaluate(state, self.test)


def load(training: Training, with_test: bool = True) -> Dataset:
    """Loads the data, split as is said; without its test images they are not even opened."""
    with decoding_shown() as on_progress:
        return load_dataset(
            training.data,
            training.data_dir,
            train_limit=training.train_limit,
            val_fraction=training.val_fraction,
            image_size=training.image_size,
            split_seed=training.split_seed,
            with_test=with_test,
            on_progress=on_progress,
        )


def check_steps(training: Training, dataset: Dataset, field: str = "epochs") -> int:
    """The updates of an epoch.

    Raises:
        InputError: a batch larger than the data, or more updates in all epochs, of which this field
            has the number, than can be counted.
    """
    per_epoch = steps_per_epoch(len(dataset.train), training.batch_size)
    if getattr(training, field) * per_epoch > MOST:
        allowed = f"at most {MOST // per_epoch:,}, of {per_epoch:,} steps each"
        raise InputError(field, getattr(training, field), allowed)
    return per_epoch


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
    return zlib.crc32(np.ascontiguousarray(split.images).data, labels)


def facts_of(graph: ktg.Graph, dataset: Dataset) -> dict[str, Any]:
    """All checksums of what a run rests on: `data_facts` and `graph_facts`."""
    return {"data_facts": data_facts(dataset), **graph_facts(graph)}


def graph_facts(graph: ktg.Graph) -> dict[str, Any]:
    """Checksums of weights, priors and projections, which must be the same, too.

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


def weights_checksum(source: str) -> int:
    """Of a node's weights; arguments and errors as of `load_weights`."""
    weights = load_weights(source)
    return digest(weights.params | weights.model_state)


_CHECKSUMS: dict[str, Callable[[str], Any]] = {
    "weights": weights_checksum,
    "prior": lambda path: about_prior(path)["checksum"],
    "projection": readers_checksum,
}
"""Of the fields of a node that are paths."""


def assemble(
    config: TrainConfig,
    graph: ktg.Graph,
    dataset: Dataset,
    devices: Sequence[jax.Device] | None = None,
) -> Run:
    """Builds the run, on these devices (default: all of this process's).

    Raises:
        InputError: weights or a prior that does not fit, a batch larger than the data, a network
            that does not fit the data or cannot compute in bfloat16.
    """
    check_networks(config, graph, dataset, devices)
    weights = {}
    for i, node in enumerate(graph.nodes):
        if node.weights:
            with part_of(f"nodes[{i}].weights"):
                weights[i] = load_weights(node.weights)
    parallel = parallel_of(config, devices)
    engine_name = choose_engine(config.engine, parallel, config.steps_per_call)
    per_epoch = check_steps(config, dataset)
    node_fns = node_functions(config, graph, dataset, parallel)
    total_steps = config.epochs * per_epoch
    optimizer = _optimizer(
        config.schedule,
        config.learning_rate,
        config.weight_decay,
        total_steps,
        config.warmup_epochs * per_epoch,
    )
    batches = Batches(
        num_images=len(dataset.train),
        batch_size=config.batch_size,
        max_offset=min(dataset.image_shape[:2]) // 8 if config.augment else 0,
        flip=config.augment and config.mirror and dataset.flip,
    )
    init_key, data_key = jax.random.split(jax.random.key(config.seed))
    sample = jnp.zeros((1, *dataset.image_shape))
    state = ktg.init_state(graph, node_fns, optimizer, init_key, sample)
    for i, node_weights in weights.items():
        state = with_weights(state, i, node_weights)
    state, priors = ktg.with_priors(state, graph)
    task: dict[str, Any] = {
        "image_shape": dataset.image_shape,
        "total_steps": total_steps,
    }
    if engine_name == "fused":
        engine = fused_engine(node_fns, optimizer, parallel, batches, **task)
    else:
        engine = per_node_engine(node_fns, optimizer, state, parallel.devices, batches, **task)

    def load(split: Split | None) -> Any:
        return None if split is None else engine.load(Arrays(split.images, split.labels))

    return Run(
        graph=graph,
        node_fns=node_fns,
        state=engine.place(state),
        engine=engine,
        step=engine.make_step(load(dataset.train), graph.edge_arrays, data_key, priors),
        val=load(dataset.val),
        test=load(dataset.test),
        epochs=config.epochs,
        steps_per_epoch=per_epoch,
        batch_size=config.batch_size,
        steps_per_call=config.steps_per_call,
        summary=_summary(config, graph, dataset, engine),
    )


@functools.cache
def _optimizer(
    schedule: str,
    learning_rate: float,
    weight_decay: float,
    total_steps: int,
    warmup_steps: int,
) -> optax.GradientTransformation:
    """The same optimiser for the same numbers: what is compiled with it can be used again."""
    schedules = {"step": ktg.step_schedule, "cosine": ktg.cosine_schedule}
    rate = schedules[schedule](learning_rate, total_steps=total_steps, warmup_steps=warmup_steps)
    return ktg.sgd(rate, weight_decay)


def _summary(config: TrainConfig, graph: ktg.Graph, dataset: Dataset, engine: Engine) -> str:
    sizes = [f"{len(dataset.train)} training"]
    own = " (of its own)" if dataset.own_val else ""
    sizes += [f"{len(dataset.val)} validation{own}"] if dataset.val else []
    sizes += [f"{len(dataset.test)} test"] if dataset.test else []
    edges = sum(
        gate != "cutoff"
        for t, row in enumerate(graph.gates)
        for s, gate in enumerate(row)
        if s != t
    )
    return (
        f"{len(graph.nodes)} nodes ({', '.join(node.model for node in graph.nodes)}), "
        f"{edges} transfer edges; {dataset.name}: {', '.join(sizes)} images, "
        f"{dataset.num_classes} classes; {config.epochs} epochs on {engine.summary}"
    )
