"""What a training run is asked to do: the command line's fields, and their checks."""

import dataclasses
import hashlib
import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Any, Literal

import tyro

import ktg_jax as ktg
import ktg_jax.models
from ktg_jax.errors import InputError

PRESETS = ("mutual", "independent", "distillation", "chain")
DEFAULT_MODELS = ("cnn", "cnn", "cnn")


@dataclass(frozen=True)
class TrainConfig:
    """Train a knowledge transfer graph: several networks together, each learning from the others.

    The target is node 0. Running the same command again resumes an interrupted run.
    """

    graph: str = "mutual"
    """A JSON file, or a preset: mutual (every gate through), independent (labels only),
    distillation (the first model is the student, the others its frozen teachers), chain (each
    model learns from the next)."""
    models: tuple[str, ...] = ()
    """Models of a preset's nodes, target first: resnet8 ... resnet110, wrn28_2, cnn, ...
    Without them: cnn cnn cnn."""
    weights: tuple[str, ...] = ()
    """Initial weights of a preset's nodes, one a model: a run's folder, DIR:node, a .safetensors
    file, or none."""
    temperature: float | None = None
    """Temperature T of the transfer edges of a preset (else 1), or in place of a JSON file's."""
    prune: bool = False
    """Leave out nodes that cannot influence the target."""
    imports: tuple[str, ...] = ()
    """Python modules to import first, such as those that call ktg_jax.register_model."""

    data: str = "digits"
    """digits | cifar10 | cifar100 | tiny_imagenet | npz:FILE | folder:DIR."""
    data_dir: str | None = None
    """Where cifar10, cifar100 or tiny_imagenet are; else tensorflow-datasets' own folder."""
    train_limit: int | None = None
    """Use only so many training images (stratified), validation images included."""
    val_fraction: float = 0.1
    """Share of the training images held out for validation (stratified); 0: none."""
    split_seed: int = 0
    """Seed of the limit and of the validation split; independent of --seed."""
    image_size: int | None = None
    """Resize images to so many pixels a side on load."""

    epochs: int = 15
    """Passes over the training images."""
    batch_size: int = 64
    """Images a step, over all devices; a last partial batch is dropped."""
    learning_rate: float = 0.1
    """Peak learning rate of SGD with Nesterov momentum 0.9."""
    schedule: Literal["step", "cosine"] = "step"
    """step: times 0.1 after 30, 60 and 90 per cent of the training; cosine: down to 0."""
    weight_decay: float = 5e-4
    """Coupled weight decay, on all parameters."""
    warmup_epochs: int = 0
    """Epochs in which the learning rate rises linearly."""
    seed: int = 0
    """Seed of initial weights, data order and augmentation."""
    augment: bool = True
    """Random crops of the image padded by an eighth of its size, and random mirroring."""
    mirror: bool = True
    """Mirroring as part of --augment (never done with digits)."""
    mixed_precision: bool = False
    """Compute in bfloat16; parameters, statistics and losses stay float32."""
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
    _at_least(config, 1, "epochs", "batch_size", "steps_per_call")
    _at_least(config, 0, "warmup_epochs", "seed", "split_seed")
    for field in ("train_limit", "image_size", "cpu_devices"):
        if getattr(config, field) is not None:
            _at_least(config, 1, field)
    if not (math.isfinite(config.learning_rate) and config.learning_rate > 0):
        raise InputError("learning_rate", config.learning_rate, "a finite number above 0")
    if not (math.isfinite(config.weight_decay) and config.weight_decay >= 0):
        raise InputError("weight_decay", config.weight_decay, "a finite number of at least 0")
    if not 0 <= config.val_fraction < 1:
        raise InputError("val_fraction", config.val_fraction, "at least 0 and below 1")
    if config.warmup_epochs >= config.epochs and config.warmup_epochs > 0:
        raise InputError("warmup_epochs", config.warmup_epochs, f"below epochs ({config.epochs})")


def import_modules(names: tuple[str, ...]) -> None:
    """Imports the user's modules, which may register models."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError("imports", name, f"a module that can be imported ({error})") from None


def build_graph(config: TrainConfig) -> ktg.Graph:
    """The graph that the options describe."""
    if config.graph in PRESETS:
        graph = _preset(config.graph, _preset_nodes(config))
    elif Path(config.graph).is_file():
        for field in ("models", "weights"):
            if getattr(config, field):
                raise InputError(field, list(getattr(config, field)), "nothing beside a graph file")
        graph = ktg.Graph.load(config.graph)
    else:
        raise InputError("graph", config.graph, f"{', '.join(PRESETS)}, or a JSON file")
    if config.temperature is not None:
        graph = dataclasses.replace(graph, temperature=config.temperature)
    for i, node in enumerate(graph.nodes):
        if i in graph.frozen and node.weights is None:
            raise InputError(
                f"nodes[{i}].weights", None, f"weights for node {node.name}: it is frozen"
            )
        ktg.models.check_model(node.model)
    return graph.pruned() if config.prune else graph


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
    """A folder's name from what determines the run."""
    text = json.dumps(fields, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    data = config.data.partition(":")[0]
    return Path("runs") / f"{data}-{Path(config.graph).stem}-{digest}"


def parse(arguments: list[str] | None = None) -> TrainConfig:
    """The configuration of a command line (default: this process's)."""
    return tyro.cli(
        TrainConfig,
        prog="python -m experiments.train",
        description=f"{cleandoc(TrainConfig.__doc__ or '')}\n\n{EXAMPLES}",
        args=arguments,
    )


EXAMPLES = """Examples:
  python -m experiments.train
  python -m experiments.train --graph independent --models resnet20 --data cifar10
  python -m experiments.train --graph mutual --models resnet32 resnet32 wrn28_2 --data cifar100
      --epochs 200 --val-fraction 0 --workdir runs/dml
  python -m experiments.train --graph distillation --models resnet8 resnet20
      --weights none runs/teacher --temperature 4 --data cifar10
  python -m experiments.train --graph my_graph.json --data npz:images.npz"""


def _at_least(config: TrainConfig, minimum: int, *fields: str) -> None:
    for field in fields:
        if getattr(config, field) < minimum:
            raise InputError(field, getattr(config, field), f"at least {minimum}")


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
