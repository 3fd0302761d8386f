"""What a training run is asked to do: the command line's fields, and their checks."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import ktg_jax as ktg
import ktg_jax.models
from ktg_jax.errors import InputError

from .command_line import Command
from .identity import data_kind, identity, without_facts
from .options import (
    DATA_AND_TRAINING,
    MOST_SEED,
    StreamOptions,
    Training,
    at_least,
    check_streaming,
    check_training,
    hash_of,
    without_unused,
)
from .places import place_of

MOST_CPU_DEVICES = 1024


@dataclass(frozen=True)
class _GraphOptions:
    graph: Annotated[str, "FILE|NAME"] = "mutual"
    """A JSON file, or a preset: mutual (every gate through), independent (labels only),
    distillation (the first model is the student, the others its frozen teachers), chain (each
    model learns from the next); or what the command search found: the folder of a search for its
    best graph, DIR:TRIAL for another."""
    models: Annotated[tuple[str, ...], "MODEL"] = ()
    """Models of a preset's nodes, target first: resnet8 ... resnet110, wrn28_2, cnn, ... (else cnn
    cnn cnn), or one a node in place of a JSON file's."""
    weights: Annotated[tuple[str, ...], "DIR|FILE"] = ()
    """Initial weights, one a model of a preset (else none), or one a node in place of a JSON
    file's: a run's folder, DIR:node, a .safetensors file, pretrained (trained alone first, on the
    same data, and kept for other runs), or none."""
    inputs: Annotated[tuple[str, ...], "INPUT"] = ()
    """How networks want their images, one a model of a preset (else none), or one a node in place
    of a JSON file's: imagenet, cifar10, cifar100, half (-1 to 1), data (the statistics of the
    training images), an object as JSON with mean, std and size, or none (0 to 1)."""
    temperature: float | None = None
    """Temperature T of the transfer edges of a preset (else 1), or in place of a JSON file's."""
    label_smoothing: float = 0.0
    """The share of each label that goes to all classes alike, in the cross-entropy of label edges;
    0: none."""
    prune: bool = False
    """Leave out nodes that cannot influence the target."""
    imports: Annotated[tuple[str, ...], "MODULE"] = ()
    """Python modules to import first, such as those that call ktg_jax.register_model."""


GROUPS = {
    "graph": "graph",
    **DATA_AND_TRAINING,
    "stream": "stream",
    "speed": "parallel",
    "hosts": "coordinator",
    "folder": "workdir",
}

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
      --weights none pretrained none --epochs 200"""


@dataclass(frozen=True)
class _DataSeed:
    data_seed: int | None = None
    """Seed of data order and augmentation alone, by which a recording is told; else --seed."""


@dataclass(frozen=True)
class TrainConfig(StreamOptions, _DataSeed, Training, _GraphOptions):  # the last's come first
    """Train a knowledge transfer graph: several networks together, each learning from the others.

    The target is node 0. Running the same command again resumes an interrupted run.
    """

    command: ClassVar = Command("experiments.train", GROUPS, EXAMPLES)

    parallel: Literal["jit", "shard_map", "pmap"] = "jit"
    """How a batch is split over devices: by the compiler (jit), or each device runs the step on its
    share (shard_map, pmap)."""
    placement: Literal["auto", "data", "nodes", "nodes+data"] = "auto"
    """data: the batch is split over all devices; nodes: each node is on one device, by its cost,
    and only outputs travel; nodes+data: on a group of devices, over which its batch is split; auto:
    nodes with the engine per_node, data with the others. The same training to rounding."""
    batch_stats: Literal["global", "device"] = "global"
    """Statistics of normalisation over the whole batch, or of each device's share (with shard_map
    or pmap)."""
    accumulate: int = 1
    """Compute each batch in so many equal parts, one after another, for an update by all of them:
    less memory; normalisation sees a part."""
    remat: bool = False
    """Compute what blocks of networks hold once more in the backward pass: less memory, more
    time."""

    engine: Literal["auto", "fused", "batched", "per_node"] = "auto"
    """fused: one compiled step for the whole graph; batched: the same, its learning nodes of one
    model in one pass; per_node: one executable a model, put together node by node; auto: per_node
    on CPUs, fused on accelerators. The same updates to rounding."""
    steps_per_call: int = 1
    """Updates in one call of the fused or batched step: several save time on a GPU or TPU."""
    cpu_devices: int | None = None
    """Divide the CPU into so many devices, over which per_node spreads the nodes; else one."""
    compile_cache: bool = True
    """Keep compiled programs in the user's cache folder for the next start."""

    coordinator: Annotated[str | None, "HOST:PORT"] = None
    """Train together with other processes, each with devices of its own: the address of process 0.
    Every process is given the same command but for its --process-id."""
    num_processes: int | None = None
    """How many processes there are, with --coordinator."""
    process_id: int | None = None
    """Which one this is, from 0, with --coordinator. The first writes and speaks."""
    distributed: bool = False
    """The same, as the launcher's environment says it: Slurm, Open MPI, Kubernetes, a TPU pod."""

    workdir: str | None = None
    """Folder of the run; else runs/DATA-GRAPH-HASH, the same for the same options."""
    resume: bool = True
    """Go on from the folder's last checkpoint. --no-resume: start over; the former run is kept
    beside it under another name."""
    tensorboard: bool = False
    """Write TensorBoard files too (extra: tensorboard)."""


_USUAL = {
    "data_seed": None,
    "accumulate": 1,
    "batch_stats": "global",
    "stream": False,
    "crop": "shift",
}
"""Of later fields the values that are no part of what determines a run."""


def check(config: TrainConfig) -> None:
    """Raises InputError for the first value that is out of range, before anything is loaded."""
    check_training(config)
    check_streaming(config)
    at_least(config, 0, "data_seed", most=MOST_SEED)
    if not 0 <= config.label_smoothing < 1:
        raise InputError("label_smoothing", config.label_smoothing, "at least 0 and below 1")
    at_least(config, 1, "steps_per_call", "accumulate")
    at_least(config, 1, "cpu_devices", most=MOST_CPU_DEVICES)


def resolved(config: TrainConfig, graph: ktg.Graph) -> dict[str, Any]:
    """What determines the run's results, as JSON: two runs that agree in it are the same run."""
    fields = without_unused(dataclasses.asdict(config))
    in_graph = ("models", "weights", "inputs", "temperature", "label_smoothing", "prune")
    # These change nothing, or the rounding of sums alone.
    how = ("engine", "placement", "remat", "steps_per_call", "cpu_devices", "compile_cache")
    hosts = ("coordinator", "num_processes", "process_id", "distributed", "stream_workers")
    for field in ("workdir", "resume", "tensorboard", "data_dir", *how, *hosts, *in_graph):
        del fields[field]
    for field, usual in _USUAL.items():
        if fields[field] == usual:
            del fields[field]
    fields["graph"] = json.loads(graph.to_json())
    return json.loads(json.dumps(fields))


def default_workdir(config: TrainConfig, fields: Mapping[str, Any]) -> Path:
    """A folder's name from what determines the run: checksums in the place of paths.

    Args:
        config: the configuration of the run.
        fields: `resolved`, with the checksums of all that has a path.
    """
    name = Path(config.graph).stem.replace(":", "-")
    keys = (hash_of(identity(fields)), hash_of(without_facts(fields)))
    return place_of("runs", f"{data_kind(config.data)}-{name}", fields, keys)
