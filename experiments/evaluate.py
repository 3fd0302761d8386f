"""Evaluates a run's nodes and their ensemble, and exports one node alone.

`python -m experiments.evaluate --help`
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import ktg_jax as ktg
from experiments import cli
from experiments.assemble import data_facts
from experiments.options import import_modules
from experiments.process import prepare
from experiments.results import best_epoch
from experiments.workdir import Workdir
from ktg_jax.checkpoint import checkpoint_epochs, read_nodes
from ktg_jax.data.sources import load_dataset
from ktg_jax.engines import choose_engine, make_per_node_evaluator
from ktg_jax.errors import InputError
from ktg_jax.loop import Arrays, Means, evaluation_batch_size, make_evaluator
from ktg_jax.nodes import NodeFns
from ktg_jax.state import GraphState
from ktg_jax.trees import unflatten
from ktg_jax.weights import save_node

EXAMPLES = """Examples:
  python -m experiments.evaluate runs/dml
  python -m experiments.evaluate runs/dml --split val --checkpoint best
  python -m experiments.evaluate runs/dml --export student.safetensors --node resnet32-0"""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate every node of a run and their ensemble (summed logits)."""

    workdir: Annotated[str, tyro.conf.Positional]
    """Folder of a run of experiments.train."""
    split: Literal["test", "val", "train"] = "test"
    """Images to evaluate on."""
    checkpoint: Literal["last", "best"] = "last"
    """Of the last epoch, or of the target's best on validation."""
    data_dir: str | None = None
    """Where the data is (default: where it was in training)."""
    export: str | None = None
    """Write one node alone to this .safetensors file, too."""
    node: str | None = None
    """The node to export (default: the target)."""
    compile_cache: bool = True
    """Keep compiled programs in the user's cache folder for the next start."""


def main() -> None:
    """Evaluates what the command line describes."""
    description = f"{cleandoc(EvaluateConfig.__doc__ or '')}\n\n{EXAMPLES}"
    config = tyro.cli(
        EvaluateConfig, prog="python -m experiments.evaluate", description=description
    )
    prepare(config.compile_cache)
    evaluate(config, Console())


def evaluate(config: EvaluateConfig, console: Console) -> None:
    """Evaluates, and exports where that is asked for.

    Raises:
        InputError: no run there, no such node or split, a file that cannot be written.
        RunError: no checkpoint that can be read.
    """
    workdir = Workdir(config.workdir)
    if not workdir.exists:
        raise InputError("workdir", config.workdir, "a folder of experiments.train")
    if config.node is not None and config.export is None:
        raise InputError("node", config.node, "only together with --export")
    graph, run = workdir.graph, workdir.config
    import_modules(tuple(run["imports"]))
    facts = run["data_facts"]
    dtype = jnp.bfloat16 if run["mixed_precision"] else jnp.float32
    node_fns = [ktg.build_model(n.model, facts["classes"], dtype=dtype) for n in graph.nodes]
    epoch, state = _restore(workdir, graph, node_fns, config.checkpoint, facts["image_shape"])
    if config.export is not None:
        _export(config.export, config.node, graph, state, facts, epoch)
        console.print(f"Wrote {config.export}.", highlight=False, soft_wrap=True)

    dataset = load_dataset(
        run["data"],
        config.data_dir or workdir.data_dir,
        train_limit=run["train_limit"],
        val_fraction=run["val_fraction"],
        image_size=run["image_size"],
        split_seed=run["split_seed"],
        with_test=config.split == "test",
    )
    _check_data(run["data"], facts, data_facts(dataset), config.split)
    split = {"train": dataset.train, "val": dataset.val, "test": dataset.test}[config.split]
    if split is None:
        raise InputError("split", config.split, f"a split that the data of {config.workdir} has")
    arrays = Arrays(jnp.asarray(split.images), jnp.asarray(split.labels))
    means = _evaluate(node_fns, state, arrays, dataset.image_shape)

    console.print(
        f"{config.workdir}, epoch {epoch}, {len(split)} {config.split} images:",
        highlight=False,
        soft_wrap=True,
    )
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
        wanted = best_epoch(workdir.records(up_to_epoch=newest))
        if wanted is None:
            raise InputError("checkpoint", "best", "last: the run had no validation images")
    epoch, nodes = read_nodes(workdir.checkpoints, wanted)
    params, model_state = [], []
    images = jnp.zeros((1, *image_shape))
    for node, fns in zip(graph.nodes, node_fns, strict=True):
        template = jax.eval_shape(fns.init, jax.random.key(0), images)
        stored = nodes[str(node.name)]
        params.append(unflatten(template[0], stored["params"], f"checkpoint of {node.name}"))
        model_state.append(
            unflatten(template[1], stored["model_state"] or {}, f"checkpoint of {node.name}")
        )
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


def _check_data(data: str, was: dict[str, Any], now: dict[str, Any], split: str) -> None:
    """Refuses data that is not what the run was trained on; test images count if they are read."""
    for key in now:
        if was[key] == now[key] or (key == "test" and split != "test"):
            continue
        allowed = f"what the run was trained on ({key}: {was[key]}, now {now[key]})"
        raise InputError("data", data, allowed)


def _export(
    path: str,
    name: str | None,
    graph: ktg.Graph,
    state: GraphState,
    facts: dict[str, Any],
    epoch: int,
) -> None:
    names = [str(node.name) for node in graph.nodes]
    if name is not None and name not in names:
        raise InputError("node", name, ", ".join(names))
    index = 0 if name is None else names.index(name)
    if not Path(path).absolute().parent.is_dir():
        raise InputError("export", path, "a file in a folder that exists")
    save_node(
        path,
        state.params[index],
        state.model_state[index],
        model=graph.nodes[index].model,
        num_classes=facts["classes"],
        image_shape=tuple(facts["image_shape"]),
        about={"node": names[index], "epoch": json.dumps(epoch)},
    )


def _cells(loss: np.ndarray, accuracy: np.ndarray) -> tuple[str, str]:
    return f"{float(loss):.4f}", f"{100 * float(accuracy):.2f} %"


if __name__ == "__main__":
    cli.run(main)
