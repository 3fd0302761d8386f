"""Recordings of frozen networks, made once for all trainings that read them."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jax

import ktg_jax as ktg
from ktg_jax.data.dataset import Dataset
from ktg_jax.inputs import Input
from ktg_jax.named_losses import named_loss
from ktg_jax.recording import Header, Recording, RecordingWriter
from ktg_jax.training.host_batches import BatchStream
from ktg_jax.training.record import Network, record_batches
from ktg_jax.training.state import GraphState
from ktg_jax.training.task import Task

from .config import TrainConfig
from .locks import turn
from .networks import node_input
from .options import hash_of
from .recordings import seed_of_data, source_of

MOST_BYTES = 2**30
"""The largest recording that is made unasked."""

_SHARE_OF_DISK = 0.1
"""Of what is free, what a recording may take."""


class FrozenRecordings:
    """What frozen networks put out in trainings, recorded where it is first asked for.

    Several processes may use one folder at once: one records, the others wait for it.

    Args:
        folder: of all recordings; made where it is not there.
        worthwhile: which of a graph's frozen nodes are recorded; the others run live.

    Attributes:
        recorded: how many epochs of networks were recorded by the last `of`.
    """

    def __init__(
        self, folder: Path, worthwhile: Callable[[ktg.Node], bool] = lambda node: True
    ) -> None:
        self._folder, self._worthwhile = folder, worthwhile
        self.recorded = 0

    def of(
        self,
        config: TrainConfig,
        graph: ktg.Graph,
        task: Task,
        state: GraphState,
        dataset: Dataset,
        device: jax.Device,
    ) -> dict[int, Recording]:
        """The recordings of the graph's frozen networks, by the nodes' indices; made if need be.

        A network is left out that shows its stages, or whose recording would be larger than
        `MOST_BYTES` or cannot be written.
        """
        self.recorded = 0
        stream = BatchStream(
            dataset.train.images, dataset.train.labels, task.batches, seed_of_data(config)
        )
        found = {}
        for i in recordable(graph):
            if not self._worthwhile(graph.nodes[i]):
                continue
            network = Network(task.node_fns[i], state.params[i], state.model_state[i])
            wanted = node_input(i, graph.nodes[i], dataset) or Input()
            source = source_of(graph.model_of(i), network, wanted)
            source |= {"dtype": "bfloat16"} if config.mixed_precision else {}
            classes = dataset.num_classes
            header = Header("batches", stream.facts, task.total_steps, classes, source=source)
            with suppress(OSError, ktg.InputError, ktg.RunError), jax.default_device(device):
                recording = self._made(header, network, stream, config.epochs)
                if recording is not None:
                    found[i] = recording
        return found

    def _made(
        self, header: Header, network: Network, stream: BatchStream, epochs: int
    ) -> Recording | None:
        key = hash_of(header.to_json())
        path = self._folder / f"{header.source['model']}-{key}"
        self._folder.mkdir(parents=True, exist_ok=True)
        with turn(path.with_name(f"{path.name}.lock")):
            if header.bytes > MOST_BYTES or not self._has_room(header, path):
                return None
            writer = RecordingWriter(path, header)
            if not writer.is_complete:
                with writer:
                    for logits in record_batches(network, stream, range(writer.rows, header.rows)):
                        writer.add(logits)
                self.recorded += epochs
        return Recording(path)

    def _has_room(self, header: Header, path: Path) -> bool:
        free = shutil.disk_usage(self._folder).free
        return path.exists() or header.bytes <= _SHARE_OF_DISK * free


def recordable(graph: ktg.Graph) -> tuple[int, ...]:
    """Indices of the frozen networks of which others see nothing but logits."""
    return tuple(
        i
        for i in graph.frozen
        if graph.nodes[i].kind == "network" and graph.nodes[i].classes is None
        if not any(_sees_stages(row[i]) for t, row in enumerate(graph.edges) if t != i)
    )


def _sees_stages(edge: ktg.Edge) -> bool:
    return edge.carries and any(named_loss(name).needs_stages for name in edge.losses)
