"""A trial: one graph, trained as far as it is needed to know how good its target gets."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

import ktg_jax as ktg
from ktg_jax.data.dataset import Dataset
from ktg_jax.training.evaluation import evaluation_batch_size
from ktg_jax.training.loop import train_epochs
from ktg_jax.training.per_node_evaluation import make_per_node_evaluator
from ktg_jax.training.state import GraphState

from ..runs.assemble import Run, assemble
from ..runs.config import TrainConfig
from ..runs.console import make_console
from ..runs.frozen import FrozenRecordings
from ..runs.graphs import with_pretrained
from ..runs.networks import check_networks
from ..runs.pretrained import locate_pretrained
from ..train import train

FROZEN_COST = 1 / 3
"""The cost of a forward pass, against that of a whole step."""


class Trainer:
    """Trains graph after graph on data that is loaded once, with programs compiled once a model.

    Args:
        config: the configuration of the training; its graph does not count.
        dataset: with validation images.
        device: to train on.
        recordings: folder for what frozen networks put out, which is recorded once; None: they run
            in every training.

    Attributes:
        node_epochs: compute spent by the last `epochs`: nodes times epochs, a frozen node's a
            third, and nothing where it is read.
        recorded_epochs: epochs of frozen networks that were recorded for it.
        read_epochs: epochs of frozen networks that were read in place of forward passes.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        device: jax.Device,
        recordings: Path | None = None,
    ) -> None:
        self._config = config
        self._dataset = dataset
        self._device = device
        self._recordings = recordings
        self.node_epochs = 0.0
        self.recorded_epochs = self.read_epochs = 0

    def epochs(self, graph: ktg.Graph, seed: int) -> Iterator[tuple[int, float]]:
        """Trains the graph, as far as it matters for its target, as one asks for epochs.

        Frozen nodes are trained alone first, unless that was done before.

        Args:
            graph: its nodes that the target needs are trained.
            seed: the seed of the initial weights; the order of the images and their augmentation
                are by that of the configuration, whose frozen networks are the same in all.

        Yields:
            The epoch, from 1, and the target's validation accuracy after it.

        Raises:
            RunError: a loss or parameter that is not finite.
            InputError: the graph's models do not fit the data.
        """
        self.node_epochs = 0.0
        self.recorded_epochs = self.read_epochs = 0
        first = self._config  # whose networks that are trained alone, and whose data, serve all
        config = dataclasses.replace(first, seed=seed, data_seed=first.seed)
        graph = with_pretrained(graph.pruned())
        check_networks(config, graph, self._dataset, [self._device])
        located = locate_pretrained(graph, first, self._dataset, self._train_alone)
        frozen = None if self._recordings is None else FrozenRecordings(self._recordings)
        run = assemble(config, located, self._dataset, [self._device], frozen)
        self.recorded_epochs = 0 if frozen is None else frozen.recorded
        self.node_epochs += FROZEN_COST * self.recorded_epochs
        live = len(graph.frozen) - run.read
        cost = len(graph.nodes) - len(graph.frozen) + FROZEN_COST * live
        epochs = train_epochs(
            run.engine.place(run.state),
            run.step,
            [str(node.name) for node in graph.nodes],
            epochs=run.epochs,
            steps_per_epoch=run.steps_per_epoch,
            batch_size=run.batch_size,
        )
        evaluate = self._target_evaluator(run)
        for record, state in epochs:
            self.node_epochs += cost
            self.read_epochs += run.read
            yield record["epoch"], evaluate(state)

    def _train_alone(self, config: TrainConfig, dataset: Dataset) -> None:
        train(config, make_console(), dataset, [self._device])
        self.node_epochs += config.epochs

    def _target_evaluator(self, run: Run) -> Callable[[GraphState], float]:
        """Evaluates the target on the validation images; no other node is needed for that."""
        size = evaluation_batch_size(self._dataset.image_shape, self._device.platform)
        evaluate = make_per_node_evaluator(run.node_fns[:1], (self._device,), size)

        def of_target(state: GraphState) -> float:
            target = GraphState(
                state.params[:1], state.model_state[:1], state.opt_state[:1], state.step
            )
            return float(evaluate(target, run.val)["accuracy"][0])

        return of_target
