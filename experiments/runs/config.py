"""What a training run is asked to do: the command line's fields, and their checks."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import ktg_jax as ktg
import ktg_jax.models
from ktg_jax.errors import InputError

from ..search.folder import found_graph, is_search, split_source
from .command_line import Command
from .folder import place_of
from .identity import data_kind, identity, without_facts
from .options import DATA_AND_TRAINING, Training, at_least, check_training, digest

PRESETS = ("mutual", "independent", "distillation", "chain")
DEFAULT_MODELS = ("cnn", "cnn", "cnn")
MOST_CPU_DEVICES = 1024
PRETRAINED = "pretrained"
"""As a node's weights: those of the same network, trained alone first."""


@dataclass(frozen=True)
class _GraphOptions:
    graph: Annotated[str, "FILE|NAME"] = "mutual"
    """A JSON file, or a preset: mutual (every gate through), independent (labels only),
    distillation (the first model is the student, the others its frozen teachers), chain (each
    model learns from the next); or what the command search found: the folder of a search for its
    best graph, DIR:TRIAL for another."""
    models: Annotated[tuple[str, ...], "MODEL"] = ()
    """Models of a preset's nodes, target first: resnet8 ... resnet110, wrn28_2, cnn, ...
    Without them: cnn cnn cnn."""
    weights: Annotated[tuple[str, ...], "DIR|FILE"] = ()
    """Initial weights of a preset's nodes, one a model: a run's folder, DIR:node, a .safetensors
    file, pretrained (trained alone first, on the same data, and kept for other runs), or none.
    Without them: none."""
    temperature: float | None = None
    """Temperature T of the transfer edges of a preset (else 1), or in place of a JSON file's."""
    prune: bool = False
    """Leave out nodes that cannot influence the target."""
    imports: Annotated[tuple[str, ...], "MODULE"] = ()
    """Python modules to import first, such as those that call ktg_jax.register_model."""


GROUPS = {"graph": "graph", **DATA_AND_TRAINING, "speed": "parallel", "folder": "workdir"}

EXAMPLES = r"""Examples:
  python -m experiments.train
  python -m experiments.train --graph independent --models resnet20 \
      --data cifar10 --workdir runs/teacher
  python -m experiments.train --graph mutual \
      --models resnet32 resnet32 wrn28_2 --data cifar100 --epochs 200 \
      --val-fraction 0 --workdir runs/dml
  python -m experiments.train --graph distillation --models resnet8 resnet20 \
      --weights none runs/teacher --temperature 4 --data cifar10
  python -m experiments.train --graph my_graph.json --data npz:images.npz
  python -m experiments.train --graph runs/search-cifar100:12 --data cifar10 \
      --epochs 200"""


@dataclass(frozen=True)
class TrainConfig(Training, _GraphOptions):  # the fields of the last come first
    """Train a knowledge transfer graph: several networks together, each learning from the others.

    The target is node 0. Running the same command again resumes an interrupted run.
    """

    command: ClassVar = Command("experiments.train", GROUPS, EXAMPLES)

    parallel: Literal["jit", "pmap"] = "jit"
    """How all local devices are used: jit over a mesh, or pmap."""

    engine: Literal["auto", "fused", "per_node"] = "auto"
    """fused: one compiled step for the whole graph; per_node: one executable a model, put together
    node by node; auto: per_node on CPUs, fused on accelerators. The same updates to rounding."""
    steps_per_call: int = 1
    """Updates in one call of the fused step: several save time on a GPU or TPU."""
    cpu_devices: int | None = None
    """Divide the CPU into so many devices, over which per_node spreads the nodes; else one."""
    compile_cache: bool = True
    """Keep compiled programs in the user's cache folder for the next start."""

    workdir: str | None = None
    """Folder of the run; else runs/DATA-GRAPH-HASH, the same for the same options."""
    resume: bool = True
    """Go on from the folder's last checkpoint. --no-resume: start over; the former run is kept
    beside it under another name."""
    tensorboard: bool = False
    """Write TensorBoard files too (extra: tensorboard)."""


def check(config: TrainConfig) -> None:
    """Raises InputError for the first value that is out of range, before anything is loaded."""
    check_training(config)
    at_least(config, 1, "steps_per_call")
    at_least(config, 1, "cpu_devices", most=MOST_CPU_DEVICES)


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
        graph = _graph_of(config.graph)
        for field in ("models", "weights"):
            if getattr(config, field):
                raise InputError(field, list(getattr(config, field)), "nothing beside a graph file")
    if config.temperature is not None:
        graph = dataclasses.replace(graph, temperature=config.temperature)
    for i, node in enumerate(graph.nodes):
        if i in graph.frozen and not node.weights:
            raise InputError(
                f"nodes[{i}].weights", None, f"weights for node {node.name}: it is frozen"
            )
        ktg.models.check_model(node.model, f"nodes[{i}].model")
    return graph


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
            option = {"model": "models", "weights": "weights"}.get(field, "")
            if option and config.graph in PRESETS and getattr(config, option):
                return f"{option}[{index}]"
            return found[0].replace(number, index)

        name = _OF_NODE.sub(given, error.field)
        raise InputError(name, error.value, error.allowed) from None


_OF_NODE = re.compile(r"(?:nodes\[|weights of node )([0-9]+)(?:\]\.(model|weights))?")


def resolved(config: TrainConfig, graph: ktg.Graph) -> dict[str, Any]:
    """What determines the run's results, as JSON: two runs that agree in it are the same run."""
    fields = dataclasses.asdict(config)
    in_graph = ("models", "weights", "temperature", "prune")
    # These change nothing, or the rounding of sums alone.
    how = ("engine", "steps_per_call", "cpu_devices", "compile_cache")
    for field in ("workdir", "resume", "tensorboard", "data_dir", *how, *in_graph):
        del fields[field]
    fields["graph"] = json.loads(graph.to_json())
    return json.loads(json.dumps(fields))


def default_workdir(config: TrainConfig, fields: Mapping[str, Any]) -> Path:
    """A folder's name from what determines the run: checksums in the place of paths.

    Args:
        config: of the run.
        fields: `resolved`, with the checksums of all that has a path.
    """
    name = Path(config.graph).stem.replace(":", "-")
    keys = (digest(identity(fields)), digest(without_facts(fields)))
    return place_of("runs", f"{data_kind(config.data)}-{name}", fields, keys)


def with_pretrained(graph: ktg.Graph) -> ktg.Graph:
    """The graph with `weights="pretrained"` at each frozen node that has none.

    >>> [node.weights for node in with_pretrained(ktg.graphs.distillation("cnn", "cnn")).nodes]
    [None, 'pretrained']
    """
    return with_weights(
        graph,
        lambda i, node: node.weights or (PRETRAINED if i in graph.frozen else None),
    )


def with_weights(graph: ktg.Graph, source: Callable[[int, ktg.Node], str | None]) -> ktg.Graph:
    """The graph with the weights that `source` gives for each node and its index."""
    nodes = [dataclasses.replace(n, weights=source(i, n)) for i, n in enumerate(graph.nodes)]
    return dataclasses.replace(graph, nodes=tuple(nodes))


def _graph_of(source: str) -> ktg.Graph:
    """The graph of a file, or of a search."""
    path = os.path.expanduser(source)
    if os.path.isfile(path):
        return ktg.Graph.load(path)
    if is_search(split_source(path)[0]):
        return with_pretrained(found_graph(path))
    allowed = f"{', '.join(PRESETS)}, a JSON file, or the folder of a search"
    raise InputError("graph", source, allowed)


def _preset_nodes(config: TrainConfig) -> list[ktg.Node]:
    models = config.models or DEFAULT_MODELS
    weights = config.weights or ("none",) * len(models)
    if len(weights) != len(models):
        raise InputError("weights", list(weights), f"{len(models)} entries, one a model, or none")
    return [
        ktg.Node(model, weights=None if source == "none" else source)
        for model, source in zip(models, weights, strict=True)
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
