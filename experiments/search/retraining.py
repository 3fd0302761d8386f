"""The runs of the fair ending, as a worker makes them."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

import ktg_jax as ktg

from ..runs.assemble import load
from ..runs.config import TrainConfig
from ..runs.console import make_console
from ..runs.folder import FolderBusyError
from ..runs.frozen import FrozenRecordings, recordable
from ..runs.graphs import build_graph
from ..runs.options import with_tuples
from ..runs.recordings import seed_of_data
from ..train import train

_POLL_SECONDS = 0.3


def retrain(runs: Sequence[dict[str, Any]], device: jax.Device, recordings: Path) -> None:
    """Makes the runs that nobody else makes, one after the other: what a worker is told to do.

    Args:
        runs: fields of `TrainConfig`.
        device: to train on.
        recordings: folder for what frozen networks put out that several of the runs hear.

    Raises:
        RunError: a training fails.
    """
    configs = [TrainConfig(**with_tuples(fields)) for fields in runs]
    dataset = load(configs[0])
    heard = Counter(key for config in configs for key in _heard(config))
    while left := [config for config in configs if not is_done(config)]:
        for config in left:
            frozen = FrozenRecordings(
                recordings, partial(_is_heard_again, heard, seed_of_data(config))
            )
            try:
                train(config, make_console(), dataset, [device], frozen)
            except FolderBusyError:
                time.sleep(_POLL_SECONDS)  # another worker makes it, or did until it was killed


def _heard(config: TrainConfig) -> set[tuple[int, str]]:
    """The frozen networks of a run, each with the seed of its batches."""
    graph = build_graph(config)
    return {(seed_of_data(config), _kind(graph.nodes[i])) for i in recordable(graph)}


def _is_heard_again(heard: Mapping[tuple[int, str], int], seed: int, node: ktg.Node) -> bool:
    """Whether several runs of this seed hear the network."""
    return heard[seed, _kind(node)] > 1


def _kind(node: ktg.Node) -> str:
    """What makes two frozen nodes the same network, beside their weights."""
    return repr((node.model, node.input))


def is_done(run: TrainConfig) -> bool:
    """Whether the run has been made."""
    return (Path(str(run.workdir)) / "result.json").is_file()
