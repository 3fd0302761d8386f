"""The graph that a run is asked for: a preset, a file, or what a search found."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ktg_jax as ktg
import ktg_jax.models
from ktg_jax.errors import InputError
from ktg_jax.inputs import OF_DATA, parsed_input

from .config import TrainConfig

PRESETS = ("mutual", "independent", "distillation", "chain")
DEFAULT_MODELS = ("cnn", "cnn", "cnn")
PRETRAINED = "pretrained"
"""As a node's weights: those of the same network, trained alone first."""

BEST_GRAPH, GRAPHS = "best.json", "graphs"
"""What a search leaves in its folder: its best graph, and the graph of trial N in `graphs/N.json`;
each pruned for its target, its frozen nodes pretrained."""


def build_graph(config: TrainConfig) -> ktg.Graph:
    """The graph that the options describe."""
    with as_given(config):
        graph = _whole_graph(config)
    return graph.pruned() if config.prune else graph


def _whole_graph(config: TrainConfig) -> ktg.Graph:
    """The same, with the nodes that `prune` leaves out."""
    if config.graph in PRESETS:
        graph = _preset(config.graph, _preset_nodes(config))
    else:
        graph = _with_given(_graph_of(config.graph), config)
    if config.temperature is not None:
        graph = dataclasses.replace(graph, temperature=config.temperature)
    if config.label_smoothing:
        graph = graph.smoothed(config.label_smoothing)
    for i, node in enumerate(graph.nodes):
        if node.kind != "network":
            continue
        if i in graph.frozen and not node.weights:
            raise InputError(
                f"nodes[{i}].weights", None, f"weights for node {node.name}: it is frozen"
            )
        ktg.models.check_model(node.model, f"nodes[{i}].model")
    if config.stream:
        _check_streamed(graph)
    return graph


def _check_streamed(graph: ktg.Graph) -> None:
    """Raises InputError for what would have to see all images first."""
    for i, node in enumerate(graph.nodes):
        if node.outputs is not None:
            raise InputError(f"nodes[{i}].outputs", node.outputs, "null with --stream")
        if node.input == OF_DATA:
            raise InputError(f"nodes[{i}].input", OF_DATA, "mean and std in numbers with --stream")


@contextmanager
def as_given(config: TrainConfig, pruned: bool = False) -> Iterator[None]:
    """Within it, an InputError about a node of the graph names what was given for the node.

    `nodes[1].model` is `models[1]` where that is an option.

    Args:
        config: that the graph was built of.
        pruned: whether the nodes that `prune` leaves out are not counted within.
    """
    try:
        yield
    except InputError as error:
        kept = _whole_graph(config).needed_nodes() if config.prune and pruned else None

        def given(found: re.Match[str]) -> str:
            number, field = found.groups()
            index = number if kept is None else str(kept[int(number)])
            option = next((name for name, of in _GIVEN.items() if of == field), "")
            if option and getattr(config, option):
                return f"{option}[{index}]"
            return found[0].replace(number, index)

        name = _OF_NODE.sub(given, error.field)
        raise InputError(name, error.value, error.allowed) from None


_GIVEN = {"models": "model", "weights": "weights", "inputs": "input"}
"""Options that have an entry for each node, and the field of a node that each is."""

_OF_NODE = re.compile(r"(?:nodes\[|weights of node )([0-9]+)(?:\]\.(model|weights|input))?")


def split_source(source: str) -> tuple[str, int | None]:
    """`DIR` or `DIR:TRIAL` in its parts; a folder that is there is itself, whatever its name.

    >>> split_source("runs/search:12"), split_source("runs/search")
    (('runs/search', 12), ('runs/search', None))
    """
    path, _, number = source.rpartition(":")
    is_one = path and number.isdecimal() and len(number) < 10 and not os.path.isdir(source)
    return (path, int(number)) if is_one else (source, None)


def _graph_of(source: str) -> ktg.Graph:
    """The graph of a file, or of a search's folder."""
    path = os.path.expanduser(source)
    if os.path.isfile(path):
        return ktg.Graph.load(path)
    folder, number = split_source(path)
    if not os.path.isdir(folder):
        allowed = f"{', '.join(PRESETS)}, a JSON file, or the folder of a search"
        raise InputError("graph", source, allowed)
    file = Path(folder, BEST_GRAPH) if number is None else Path(folder, GRAPHS, f"{number}.json")
    if not file.is_file():
        raise InputError("graph", source, _found_in(Path(folder), number))
    return ktg.Graph.load(file)


def _found_in(folder: Path, number: int | None) -> str:
    """What is allowed of a folder in which there is no such graph."""
    trials = [int(p.stem) for p in Path(folder, GRAPHS).glob("*.json") if p.stem.isdecimal()]
    if number is not None and trials:
        return f"a trial of {folder}: {min(trials)} to {max(trials)}"
    file = BEST_GRAPH if number is None else GRAPHS
    return f"the folder of a search with a complete trial (no {file} there)"


def _with_given(graph: ktg.Graph, config: TrainConfig) -> ktg.Graph:
    """A file's graph with the models, weights and inputs that are given in place of its own.

    Raises:
        InputError: not one a node, or one for a node that is no network.
    """
    nodes = list(graph.nodes)
    for option, field in _GIVEN.items():
        given = getattr(config, option)
        if len(given) not in (0, len(nodes)):
            names = ", ".join(str(node.name) for node in nodes)
            allowed = f"one a node of the graph ({names}), or none"
            raise InputError(option, list(given), allowed)
        for i, entry in enumerate(given):
            nodes[i] = _with_entry(nodes[i], field, entry, f"{option}[{i}]")
    return dataclasses.replace(graph, nodes=tuple(nodes))


def _with_entry(node: ktg.Node, field: str, entry: str, name: str) -> ktg.Node:
    """The node with what the option `name` gives as one of its fields."""
    if node.kind != "network":
        if entry != (kept := node.kind if field == "model" else "none"):
            raise InputError(name, entry, f"{kept}: node {node.name} is no network")
        return node
    value: Any = None if entry == "none" and field != "model" else entry
    if field == "input" and value is not None:
        value = parsed_input(name, value)
    return dataclasses.replace(node, **{field: value})


def with_pretrained(graph: ktg.Graph) -> ktg.Graph:
    """The graph with `weights="pretrained"` at each frozen network that has none.

    >>> [node.weights for node in with_pretrained(ktg.graphs.distillation("cnn", "cnn")).nodes]
    [None, 'pretrained']
    """
    return with_sources(
        graph,
        lambda i, node: (
            node.weights or (PRETRAINED if i in graph.frozen and node.kind == "network" else None)
        ),
    )


def with_sources(graph: ktg.Graph, source: Callable[[int, ktg.Node], str | None]) -> ktg.Graph:
    """The graph with the weights that `source` gives for each node and its index."""
    nodes = [dataclasses.replace(n, weights=source(i, n)) for i, n in enumerate(graph.nodes)]
    return dataclasses.replace(graph, nodes=tuple(nodes))


def _preset_nodes(config: TrainConfig) -> list[ktg.Node]:
    models = config.models or DEFAULT_MODELS
    for field in ("weights", "inputs"):
        given = getattr(config, field)
        if len(given) not in (0, len(models)):
            raise InputError(field, list(given), f"{len(models)} entries, one a model, or none")
    weights, inputs = (each or ("none",) * len(models) for each in (config.weights, config.inputs))
    return [
        ktg.Node(
            model,
            weights=None if source == "none" else source,
            input=None if wanted == "none" else parsed_input(f"inputs[{i}]", wanted),
        )
        for i, (model, source, wanted) in enumerate(zip(models, weights, inputs, strict=True))
    ]


def _preset(name: str, nodes: list[ktg.Node]) -> ktg.Graph:
    if name == "distillation":
        if len(nodes) < 2:
            raise InputError("models", [n.model for n in nodes], "a student and its teachers")
        return ktg.graphs.distillation(nodes[0], nodes[1:])
    make = {
        "mutual": ktg.graphs.mutual,
        "independent": ktg.graphs.independent,
        "chain": ktg.graphs.chain,
    }
    return make[name](nodes)
