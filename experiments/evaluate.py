"""Evaluates a run's nodes and their ensemble, and exports one node alone.

`python -m experiments.evaluate --help`
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

import ktg_jax as ktg
from ktg_jax.errors import InputError, RunError
from ktg_jax.io.trees import unflatten
from ktg_jax.models.network import NodeFns
from ktg_jax.models.streams import without_stream
from ktg_jax.models.weights import save_node
from ktg_jax.training.batches import Arrays
from ktg_jax.training.checkpoint import best_checkpoint, checkpoint_epochs, read_nodes
from ktg_jax.training.engines import choose_engine, make_per_node_evaluator
from ktg_jax.training.evaluation import Means, evaluation_batch_size, make_evaluator
from ktg_jax.training.state import GraphState

from .runs import cli
from .runs.assemble import load
from .runs.command_line import Command, parse
from .runs.console import Table, make_console
from .runs.facts import data_facts, without_test
from .runs.identity import data_kind, is_own
from .runs.options import Training, import_modules
from .runs.process import check_platform, prepare
from .runs.results import best_epoch
from .runs.texts import per_cent
from .runs.workdir import Workdir

GROUPS = {"evaluation": "split", "export": "export", "speed": "compile_cache"}

EXAMPLES = r"""Examples:
  python -m experiments.evaluate runs/dml
  python -m experiments.evaluate runs/dml --split val --checkpoint best
  python -m experiments.evaluate runs/dml --export student.safetensors \
      --node resnet32-0"""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate every node of a run and their ensemble (summed logits)."""

    command: ClassVar = Command("experiments.evaluate", GROUPS, EXAMPLES)

    workdir: Annotated[str, tyro.conf.Positional, "WORKDIR"]
    """Folder of a run, as train makes it."""
    split: Literal["test", "val", "train"] = "test"
    """Images to evaluate on."""
    checkpoint: Literal["last", "best"] = "last"
    """The checkpoint of the last epoch, or of the target's best on validation."""
    data: str | None = None
    """npz:FILE or folder:DIR: where data of your own is now (default: where it was in training)."""
    data_dir: str | None = None
    """Where the data is, else where it was in training; of data of your own, the folder that it is
    in now."""
    export: Annotated[str | None, "FILE"] = None
    """Write one node alone to this .safetensors file, too."""
    node: Annotated[str | None, "NAME"] = None
    """The node to export; else the target."""
    compile_cache: bool = True
    """Keep compiled programs in the user's cache folder for the next start."""


def main() -> None:
    """Evaluates what the command line describes."""
    config = parse(EvaluateConfig)
    prepare(config.compile_cache)
    evaluate(config, make_console())


def evaluate(config: EvaluateConfig, console: Console) -> None:
    """Evaluates, and exports where that is asked for.

    Raises:
        InputError: no run there, no such node or split, a file that cannot be written.
        RunError: no checkpoint that can be read.
    """
    workdir = Workdir(config.workdir)
    if not workdir.exists:
        raise InputError("workdir", config.workdir, "the folder of a run")
    if config.node is not None and config.export is None:
        raise InputError("node", config.node, "only together with --export")
    graph, run = workdir.graph, workdir.config
    import_modules(tuple(run["imports"]))
    check_platform()
    facts = run["data_facts"]
    dtype = jnp.bfloat16 if run["mixed_precision"] else jnp.float32
    node_fns = [ktg.build_model(n.model, facts["classes"], dtype=dtype) for n in graph.nodes]
    epoch, state = _restore(workdir, graph, node_fns, config.checkpoint, facts["image_shape"])
    if config.export is not None:
        _export(config.export, config.node, graph, state, facts, epoch)
        cli.say(console, f"Wrote {config.export}. It takes uint8 images divided by 255.")

    data = _data_now(config, workdir)
    wanted = Training(
        data=data,
        data_dir=config.data_dir or workdir.data_dir,
        train_limit=run["train_limit"],
        val_fraction=run["val_fraction"],
        image_size=run["image_size"],
        split_seed=run["split_seed"],
    )
    dataset = load(wanted, with_test=config.split == "test")
    _check_data(data, facts, data_facts(dataset), config.split)
    if config.export is not None:  # anew: the names of the classes are with the data
        _export(config.export, config.node, graph, state, facts, epoch, dataset.class_names)
    split = {"train": dataset.train, "val": dataset.val, "test": dataset.test}[config.split]
    if split is None:
        raise InputError("split", config.split, f"a split that the data of {config.workdir} has")
    arrays = Arrays(jnp.asarray(split.images), jnp.asarray(split.labels))
    means = _evaluate(node_fns, state, arrays, dataset.image_shape)

    cli.say(console, f"{config.workdir}, epoch {epoch}, {len(split)} {config.split} images:")
    table = Table("node", "model", "loss", "accuracy", box=None)
    for i, node in enumerate(graph.nodes):
        table.add_row(node.name, node.model, *_cells(means["loss"][i], means["accuracy"][i]))
    table.add_row("ensemble", "", *_cells(means["ensemble_loss"], means["ensemble_accuracy"]))
    console.print(table)


def _restore(
    workdir: Workdir,
    graph: ktg.Graph,
    node_fns: list[ktg.NodeFns],
    checkpoint: str,
    image_shape: list[int],
) -> tuple[int, GraphState]:
    """The nodes' weights, without optimisers, and the epoch that they are of."""
    wanted = None
    if checkpoint == "best":
        newest = max(checkpoint_epochs(workdir.checkpoints), default=0)
        try:
            wanted = best_epoch(workdir.records(up_to_epoch=newest))
        except RunError:  # metrics.jsonl is damaged
            wanted = best_checkpoint(workdir.checkpoints)
        if wanted is None:
            raise InputError("checkpoint", "best", "last: the run had no validation images")
    epoch, nodes = read_nodes(workdir.checkpoints, wanted)
    params, model_state = [], []
    images = jnp.zeros((1, *image_shape))
    for node, fns in zip(graph.nodes, node_fns, strict=True):
        template = jax.eval_shape(fns.init, jax.random.key(0), images)
        stored = nodes[str(node.name)]
        params.append(unflatten(template[0], stored["params"], f"checkpoint of {node.name}"))
        shapes, found = map(without_stream, (template[1], stored["model_state"] or {}))
        model_state.append(unflatten(shapes, found, f"checkpoint of {node.name}"))
    none = (None,) * len(node_fns)
    return epoch, GraphState(tuple(params), tuple(model_state), none, jnp.zeros((), jnp.int32))


def _evaluate(
    node_fns: Sequence[NodeFns], state: GraphState, data: Arrays, image_shape: Sequence[int]
) -> Means:
    """By the engine that training takes by default: low precision rounds as it did there."""
    parallel = ktg.Parallel()
    device = parallel.devices[0]
    size = evaluation_batch_size(image_shape, device.platform)
    if choose_engine("auto", parallel) == "per_node":
        placement = (device,) * len(node_fns)
        return make_per_node_evaluator(node_fns, placement, size)(state, {device: data})
    return make_evaluator(node_fns, parallel, size)(state, data)


def _data_now(config: EvaluateConfig, workdir: Workdir) -> str:
    """The run's data, a user's own by the path where it is now.

    Raises:
        InputError: `--data` is of another kind, or the data is not there any more.
    """
    data = workdir.data
    kind, _, path = data.partition(":")
    if config.data is not None and (data_kind(config.data) != kind or not is_own(data)):
        allowed = f"{kind}:PATH, for data of that kind" if is_own(data) else f"nothing but {data}"
        raise InputError("data", config.data, allowed)
    if not is_own(data):
        return data
    if config.data is not None:
        data = config.data
    elif config.data_dir is not None:
        there = os.path.join(config.data_dir, os.path.basename(path.rstrip("/")))
        data = f"{kind}:{there if os.path.exists(there) else config.data_dir}"
    elif not os.path.exists(os.path.expanduser(path)):
        allowed = f"data that is there; --data {kind}:PATH says where it is now"
        raise InputError("data", data, allowed)
    return data


def _check_data(data: str, was: dict[str, Any], now: dict[str, Any], split: str) -> None:
    """Refuses data that is not what the run rests on.

    Test images count if they are read. A run of former times does not have all checksums.
    """
    for key in now if split == "test" else without_test(now):
        if key in was and was[key] != now[key]:
            allowed = f"what the run was trained on ({key}: {was[key]}, now {now[key]})"
            raise InputError("data", data, allowed)


def _export(
    path: str,
    name: str | None,
    graph: ktg.Graph,
    state: GraphState,
    facts: dict[str, Any],
    epoch: int,
    class_names: tuple[str, ...] = (),
) -> None:
    names = [str(node.name) for node in graph.nodes]
    if name is not None and name not in names:
        raise InputError("node", name, ", ".join(names))
    index = 0 if name is None else names.index(name)
    if not Path(path).absolute().parent.is_dir():
        raise InputError("export", path, "a file in a folder that exists")
    classes = {"class_names": json.dumps(class_names)} if class_names else {}
    save_node(
        path,
        state.params[index],
        state.model_state[index],
        model=graph.nodes[index].model,
        num_classes=facts["classes"],
        image_shape=tuple(facts["image_shape"]),
        about={"node": names[index], "epoch": json.dumps(epoch)} | classes,
    )


def _cells(loss: np.ndarray, accuracy: np.ndarray) -> tuple[str, str]:
    return f"{float(loss):.4f}", per_cent(float(accuracy), " %")


if __name__ == "__main__":
    cli.run(main)
