"""Networks trained alone, once for each setting, to be the frozen nodes of many graphs.

A frozen node whose weights are `pretrained` is trained first, alone, on the same data and in the
same way as the graph that it is for. The run is kept in the user's cache, under a name made of
everything that it depends on.
"""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ktg_jax as ktg
from ktg_jax.data.dataset import Dataset
from ktg_jax.inputs import input_text
from ktg_jax.io.files import cache_folder
from ktg_jax.training.hosts import by_first, is_first

from .config import TrainConfig, resolved
from .facts import data_facts
from .graphs import PRETRAINED, build_graph, with_sources
from .identity import identity
from .locks import turn
from .options import hash_of
from .places import place_of
from .workdir import Workdir

Train = Callable[[TrainConfig, Dataset], Any]


def locate_pretrained(
    graph: ktg.Graph, config: TrainConfig, dataset: Dataset, train: Train
) -> ktg.Graph:
    """The graph with the folders of runs in place of `pretrained`; trains those that are missing.

    Args:
        graph: the graph of the run.
        config: the configuration of the run, which says how its networks are trained.
        dataset: the dataset of the run; its test images are not used.
        train: trains a configuration on a data set.

    Raises:
        RunError: the training fails.
    """
    wanted = dict.fromkeys(
        (node.model, node.input) for node in graph.nodes if node.weights == PRETRAINED
    )
    found = {
        (model, given): trained_alone(model, config, dataset, train, given)
        for model, given in wanted
    }
    return with_sources(
        graph,
        lambda _, node: (
            str(found[node.model, node.input]) if node.weights == PRETRAINED else node.weights
        ),
    )


def trained_alone(
    model: str, config: TrainConfig, dataset: Dataset, train: Train, given: Any = None
) -> Path:
    """The folder of the run of one network; makes the run if it is not there.

    Args:
        model: the network.
        config: says how it is trained.
        dataset: to train on; its test images are not used.
        train: trains a configuration on a data set.
        given: how the network wants its images, as a node says it.

    Raises:
        RunError: the training fails.
    """
    alone = dataclasses.replace(
        config,
        graph="independent",
        models=(model,),
        weights=(),
        inputs=() if given is None else (input_text(given),),
        temperature=None,
        data_seed=None,
        prune=False,
        resume=True,
        tensorboard=False,
    )
    dataset = dataclasses.replace(dataset, test=None)
    facts = data_facts(dataset)
    fields = resolved(alone, build_graph(alone))
    known = fields | {"data_facts": facts}
    formerly = fields | {"data_facts": {field: facts[field] for field in _FORMER_FACTS}}
    keys = [hash_of(k, 16) for k in (identity(known) | {"data_facts": facts}, formerly)]
    path = place_of(cache_folder() / PRETRAINED, model, known, keys)

    def is_missing() -> bool:
        return Workdir(path).result is None

    if by_first(is_missing):
        with turn(path.with_name(f"{path.name}.lock")) if is_first() else nullcontext():
            if by_first(is_missing):  # or who had the turn before made it
                train(dataclasses.replace(alone, workdir=str(path)), dataset)
    return path


_FORMER_FACTS = ("classes", "image_shape", "train", "val", "test", "train_crc32")
"""What the name was made of when there were no other checksums."""
