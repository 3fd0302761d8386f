"""From a configuration to everything that training needs, checked and on the devices."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

import ktg_jax as ktg
from ktg_jax.data.dataset import Dataset
from ktg_jax.data.sources import load_dataset
from ktg_jax.errors import InputError
from ktg_jax.training import optimizers
from ktg_jax.training.batches import Arrays, data_key, steps_per_epoch
from ktg_jax.training.engines import choose_engine
from ktg_jax.training.evaluation import Means
from ktg_jax.training.fused_engine import FusedEngine
from ktg_jax.training.host_engine import HostNodesEngine
from ktg_jax.training.node_terms import Priors
from ktg_jax.training.per_node_engine import PerNodeEngine
from ktg_jax.training.state import GraphState, with_averages
from ktg_jax.training.task import Engine, Step, Task
from ktg_jax.training.warm_start import with_weights

from .config import TrainConfig
from .frozen import FrozenRecordings
from .networks import node_functions, node_weights, parallel_of
from .options import MOST, StreamOptions, Training
from .progress import decoding_shown
from .recordings import batches_of, recordings_of, seed_of_data


@dataclass(frozen=True)
class Run:
    """Everything that training needs.

    Attributes:
        graph: the graph of the networks.
        node_fns: one a node.
        state: the initial state on the host, pre-trained weights and priors included.
        engine: which trains and evaluates, on which devices.
        step: the step of the engine.
        val: validation images as the engine has them, or None.
        test: test images likewise, or None.
        epochs: passes over the training images.
        steps_per_epoch: updates a pass.
        batch_size: images an update.
        steps_per_call: updates a call of the step.
        summary: what this is, in a line.
        static: the names of nodes whose recording has one output an image.
        read: how many frozen networks are read from recordings in place of running.
    """

    graph: ktg.Graph
    node_fns: Sequence[ktg.NodeFns]
    state: GraphState
    engine: Engine
    step: Step
    val: Any
    test: Any
    epochs: int
    steps_per_epoch: int
    batch_size: int
    steps_per_call: int
    summary: str
    static: Sequence[str] = ()
    read: int = 0

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


def load(
    training: Training, with_test: bool = True, streaming: StreamOptions | None = None
) -> Dataset:
    """Loads the data, split as is said; without its test images they are not even opened.

    Args:
        training: whose data it is.
        with_test: whether to read the test images.
        streaming: whether and how images are streamed; None: they are not.
    """
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
            stream=None if streaming is None else streaming.streaming,
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


def assemble(
    config: TrainConfig,
    graph: ktg.Graph,
    dataset: Dataset,
    devices: Sequence[jax.Device] | None = None,
    frozen: FrozenRecordings | None = None,
) -> Run:
    """Builds the run, on these devices (default: all of this process's).

    Args:
        config: the configuration of the run, checked.
        graph: whose networks were found fit for the data, as by `check_networks`.
        dataset: to train on.
        devices: all of one kind.
        frozen: recordings that are read in place of frozen networks' forward passes; None: these
            run in every step.

    Raises:
        InputError: weights or a prior that does not fit, a batch larger than the data, or what the
            engine cannot do.
    """
    parallel = parallel_of(config, devices)
    task = _task(config, graph, node_functions(config, graph, dataset, parallel), dataset)
    init_key = jax.random.split(jax.random.key(config.seed))[0]
    state, priors = _initial_state(graph, task, init_key, dataset)
    engine = _engine(config, task, state, parallel)
    recordings = recordings_of(config, graph, dataset)
    given = config, graph, task, state, dataset, parallel.devices[0]
    read = {} if frozen is None else frozen.of(*given)
    train, val, test = (
        None if split is None else engine.load(Arrays(split.images, split.labels))
        for split in (dataset.train, dataset.val, dataset.test)
    )
    return Run(
        graph=graph,
        node_fns=task.node_fns,
        state=jax.device_get(state),
        engine=engine,
        step=engine.make_step(
            train,
            graph.edge_arrays,
            data_key(seed_of_data(config)),
            priors,
            recordings | read,
        ),
        val=val,
        test=test,
        epochs=config.epochs,
        steps_per_epoch=task.total_steps // config.epochs,
        batch_size=config.batch_size,
        steps_per_call=config.steps_per_call,
        summary=_summary(config, graph, dataset, engine),
        static=[str(graph.nodes[i].name) for i, each in recordings.items() if each.is_static],
        read=len(read),
    )


def _task(
    config: TrainConfig, graph: ktg.Graph, node_fns: Sequence[ktg.NodeFns], dataset: Dataset
) -> Task:
    """What is trained, and how it is augmented and updated."""
    per_epoch = check_steps(config, dataset)
    steps, warmup = config.epochs * per_epoch, config.warmup_epochs * per_epoch
    of_nodes = [
        _optimizer(
            node.optimizer or "sgd",
            config.schedule,
            config.learning_rate if node.learning_rate is None else node.learning_rate,
            config.weight_decay if node.weight_decay is None else node.weight_decay,
            steps,
            warmup,
            node.clip,
            node.trainable,
        )
        for node in graph.nodes
    ]
    batches = batches_of(config, dataset)
    shape, how = dataset.image_shape, (config.accumulate, config.remat)
    return Task(node_fns, of_nodes, batches, shape, steps, graph.derived, *how)


def _initial_state(
    graph: ktg.Graph, task: Task, key: jax.Array, dataset: Dataset
) -> tuple[GraphState, Priors | None]:
    """The state with the weights and priors that the graph names, and these priors."""
    sample = jnp.zeros((1, *task.image_shape))
    state = ktg.init_state(graph, task.node_fns, task.optimizer, key, sample)
    for i, node in enumerate(graph.nodes):
        if node.weights:
            state = with_weights(state, i, node_weights(i, node, dataset))
    state, priors = ktg.with_priors(state, graph)
    images = jax.ShapeDtypeStruct((task.batches.batch_size, *task.image_shape), jnp.float32)
    state = ktg.with_delays(state, graph.edge_arrays, task.node_fns, images)
    return with_averages(state, graph.derived), priors


def _engine(config: TrainConfig, task: Task, state: GraphState, parallel: ktg.Parallel) -> Engine:
    where = None if config.placement == "auto" else config.placement
    name = choose_engine(config.engine, parallel, config.steps_per_call, where)
    if name == "per_node" and parallel.spans_processes:
        return HostNodesEngine(task, state, parallel.devices, str(where))
    if name == "per_node":
        return PerNodeEngine(task, state, parallel.devices, where or "nodes")
    return FusedEngine(task, parallel, batched=name == "batched")


@functools.cache
def _optimizer(
    name: str,
    schedule: str,
    learning_rate: float,
    weight_decay: float,
    total_steps: int,
    warmup_steps: int,
    clip: float | None,
    trainable: tuple[str, ...] | None,
) -> optax.GradientTransformation:
    """The same optimiser for the same numbers: what is compiled with it can be used again."""
    schedules = {"step": ktg.step_schedule, "cosine": ktg.cosine_schedule}
    rate = schedules[schedule](learning_rate, total_steps=total_steps, warmup_steps=warmup_steps)
    optimizer = {"sgd": ktg.sgd, "adamw": optimizers.adamw}[name](rate, weight_decay)
    if clip is not None:
        optimizer = optimizers.clipped(optimizer, clip)
    return optimizer if trainable is None else optimizers.trainable(optimizer, trainable)


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
