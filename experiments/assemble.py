"""From a configuration to everything that training needs, checked and on the devices."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

import ktg_jax as ktg
from experiments.config import TrainConfig
from ktg_jax.data.dataset import Dataset, Split
from ktg_jax.data.pipeline import steps_per_epoch
from ktg_jax.data.sources import load_dataset
from ktg_jax.loop import Arrays, Evaluator, Means, make_evaluator, make_train_step
from ktg_jax.state import GraphState
from ktg_jax.weights import load_weights, with_weights


@dataclass(frozen=True)
class Run:
    """Everything that training needs.

    Attributes:
        graph: of the networks.
        state: the initial state, pre-trained weights included.
        step: the compiled step; consumes the state.
        evaluate: the compiled evaluation.
        parallel: devices and strategy.
        val: validation images, or None.
        test: test images, or None.
        epochs: passes over the training images.
        steps_per_epoch: updates a pass.
        batch_size: images an update.
        summary: what this is, in a line.
    """

    graph: ktg.Graph
    state: GraphState
    step: Callable[[GraphState], tuple[GraphState, dict[str, jax.Array]]]
    evaluate: Evaluator
    parallel: ktg.Parallel
    val: Arrays | None
    test: Arrays | None
    epochs: int
    steps_per_epoch: int
    batch_size: int
    summary: str

    @property
    def evaluate_val(self) -> Callable[[GraphState], Means] | None:
        """Evaluates a state on the validation images; None: there are none."""
        val = self.val
        return None if val is None else lambda state: self.evaluate(state, val)

    def evaluate_val_and_test(self, state: GraphState) -> tuple[Means | None, Means | None]:
        """The means over the validation and over the test images, where there are any."""
        val = None if self.val is None else self.evaluate(state, self.val)
        return val, None if self.test is None else self.evaluate(state, self.test)


def load(config: TrainConfig) -> Dataset:
    """Loads the data, split as the configuration says."""
    return load_dataset(
        config.data,
        config.data_dir,
        train_limit=config.train_limit,
        val_fraction=config.val_fraction,
        image_size=config.image_size,
        split_seed=config.split_seed,
    )


def data_facts(dataset: Dataset) -> dict[str, Any]:
    """What must be the same when a run is resumed on data that may have changed meanwhile."""
    train = dataset.train
    return {
        "classes": dataset.num_classes,
        "image_shape": list(dataset.image_shape),
        "train": len(train),
        "val": len(dataset.val) if dataset.val else 0,
        "test": len(dataset.test) if dataset.test else 0,
        "train_crc32": zlib.crc32(train.images.tobytes(), zlib.crc32(train.labels.tobytes())),
    }


def assemble(config: TrainConfig, graph: ktg.Graph, dataset: Dataset) -> Run:
    """Builds the run.

    Raises:
        InputError: weights that do not fit, a batch larger than the data, a model that cannot
            compute in bfloat16.
    """
    weights = {i: load_weights(node.weights) for i, node in enumerate(graph.nodes) if node.weights}
    parallel = ktg.Parallel(config.parallel)
    per_epoch = steps_per_epoch(len(dataset.train), config.batch_size)
    dtype = jnp.bfloat16 if config.mixed_precision else jnp.float32
    node_fns = [
        ktg.build_model(node.model, dataset.num_classes, dtype=dtype, axis_name=parallel.axis_name)
        for node in graph.nodes
    ]
    optimizer = _optimizer(config, per_epoch)
    step = make_train_step(
        node_fns,
        optimizer,
        parallel,
        num_images=len(dataset.train),
        batch_size=config.batch_size,
        total_steps=config.epochs * per_epoch,
        temperature=graph.temperature,
        max_offset=min(dataset.image_shape[:2]) // 8 if config.augment else 0,
        flip=config.augment and config.mirror and dataset.flip,
    )
    init_key, data_key = jax.random.split(jax.random.key(config.seed))
    sample = jnp.zeros((1, *dataset.image_shape))
    state = ktg.init_state(graph, node_fns, optimizer, init_key, sample)
    for i, node_weights in weights.items():
        state = with_weights(state, i, node_weights)

    def on_devices(split: Split | None) -> Arrays | None:
        if split is None:
            return None
        return parallel.replicate(Arrays(jnp.asarray(split.images), jnp.asarray(split.labels)))

    train_data = on_devices(dataset.train)
    gates, key = parallel.replicate((graph.gate_codes, data_key))
    return Run(
        graph=graph,
        state=parallel.replicate(state),
        step=lambda state: step(state, train_data, gates, key),
        evaluate=make_evaluator(node_fns, parallel),
        parallel=parallel,
        val=on_devices(dataset.val),
        test=on_devices(dataset.test),
        epochs=config.epochs,
        steps_per_epoch=per_epoch,
        batch_size=config.batch_size,
        summary=_summary(config, graph, dataset, parallel),
    )


def _optimizer(config: TrainConfig, per_epoch: int) -> optax.GradientTransformation:
    schedules = {"step": ktg.step_schedule, "cosine": ktg.cosine_schedule}
    schedule = schedules[config.schedule](
        config.learning_rate,
        total_steps=config.epochs * per_epoch,
        warmup_steps=config.warmup_epochs * per_epoch,
    )
    return ktg.sgd(schedule, config.weight_decay)


def _summary(
    config: TrainConfig, graph: ktg.Graph, dataset: Dataset, parallel: ktg.Parallel
) -> str:
    sizes = [f"{len(dataset.train)} training"]
    sizes += [f"{len(dataset.val)} validation"] if dataset.val else []
    sizes += [f"{len(dataset.test)} test"] if dataset.test else []
    edges = sum(
        gate != "cutoff"
        for t, row in enumerate(graph.gates)
        for s, gate in enumerate(row)
        if s != t
    )
    device = parallel.devices[0]
    return (
        f"{len(graph.nodes)} nodes ({', '.join(node.model for node in graph.nodes)}), "
        f"{edges} transfer edges; {dataset.name}: {', '.join(sizes)} images, "
        f"{dataset.num_classes} classes; {config.epochs} epochs on {len(parallel.devices)} x "
        f"{device.device_kind} ({config.parallel})"
    )
