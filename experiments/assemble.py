"""From a configuration to everything that training needs, checked and on the devices."""

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

import ktg_jax as ktg
from experiments.config import TrainConfig
from experiments.options import Training
from ktg_jax.data.dataset import Dataset, Split
from ktg_jax.data.pipeline import steps_per_epoch
from ktg_jax.data.sources import load_dataset
from ktg_jax.engines import Batches, Engine, choose_engine, fused_engine, per_node_engine
from ktg_jax.loop import Arrays, Means
from ktg_jax.representing import about_prior, load_readers, projected, readers_checksum
from ktg_jax.state import GraphState
from ktg_jax.step import split_outputs
from ktg_jax.weights import load_weights, with_weights


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
    return load_dataset(
        training.data,
        training.data_dir,
        train_limit=training.train_limit,
        val_fraction=training.val_fraction,
        image_size=training.image_size,
        split_seed=training.split_seed,
        with_test=with_test,
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


def prior_facts(graph: ktg.Graph) -> dict[str, Any]:
    """Checksums of priors and projections: they, too, must be the same when a run is resumed."""
    nodes = graph.nodes
    sums = {n.name: about_prior(n.prior)["checksum"] for n in nodes if n.prior is not None}
    seen = {n.name: readers_checksum(n.projection) for n in nodes if n.projection is not None}
    facts = {"prior_facts": sums, "projection_facts": seen}
    return {field: found for field, found in facts.items() if found}


def assemble(
    config: TrainConfig,
    graph: ktg.Graph,
    dataset: Dataset,
    devices: Sequence[jax.Device] | None = None,
) -> Run:
    """Builds the run, on these devices (default: all of this process's).

    Raises:
        InputError: weights or a prior that does not fit, a batch larger than the data, a model
            that cannot compute in bfloat16.
    """
    weights = {i: load_weights(node.weights) for i, node in enumerate(graph.nodes) if node.weights}
    parallel = ktg.Parallel(config.parallel, devices or jax.local_devices())
    engine_name = choose_engine(config.engine, parallel, config.steps_per_call)
    per_epoch = steps_per_epoch(len(dataset.train), config.batch_size)
    dtype = jnp.bfloat16 if config.mixed_precision else jnp.float32
    node_fns = [
        _as_seen(
            node,
            ktg.build_model(
                node.model, dataset.num_classes, dtype=dtype, axis_name=parallel.axis_name
            ),
        )
        for node in graph.nodes
    ]
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
    _check_outputs(graph, node_fns, state, sample)
    task: dict[str, Any] = {
        "image_shape": dataset.image_shape,
        "total_steps": total_steps,
        "temperature": graph.temperature,
        "edge_weights": graph.edge_weights,
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
        step=engine.make_step(load(dataset.train), graph.gate_codes, data_key, priors),
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


def _check_outputs(
    graph: ktg.Graph, node_fns: Sequence[ktg.NodeFns], state: GraphState, images: jax.Array
) -> None:
    """Raises InputError unless the nodes put out what their edges compare."""
    if not graph.edge_weights.needs_stages:
        return

    def losses(state: GraphState, images: jax.Array) -> Any:
        outputs: list[Any] = [
            ktg.node_forward(params, model_state, images, fns=fns, frozen=True, with_stages=True)[0]
            for fns, params, model_state in zip(
                node_fns, state.params, state.model_state, strict=True
            )
        ]
        logits, stages = split_outputs(outputs, graph.edge_weights)
        labels = jnp.zeros(len(images), jnp.int32)
        return ktg.graph_gradients(
            logits, labels, graph.gate_codes, 1.0, graph.temperature, stages, graph.edge_weights
        )

    jax.eval_shape(losses, state, images)


def _as_seen(node: ktg.Node, fns: ktg.NodeFns) -> ktg.NodeFns:
    """The node's functions, its stages as the others see them."""
    return fns if node.projection is None else projected(fns, load_readers(node.projection))


def _summary(config: TrainConfig, graph: ktg.Graph, dataset: Dataset, engine: Engine) -> str:
    sizes = [f"{len(dataset.train)} training"]
    sizes += [f"{len(dataset.val)} validation"] if dataset.val else []
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
