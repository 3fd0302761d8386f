"""Evaluates a run's nodes and their ensemble, or the network of a file, and exports one network.

`python -m experiments.evaluate --help`
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

import ktg_jax as ktg
from ktg_jax.data.dataset import Dataset
from ktg_jax.errors import InputError
from ktg_jax.inputs import Input
from ktg_jax.models import check_model
from ktg_jax.models.foreign import save_state_dict
from ktg_jax.models.network import NodeFns
from ktg_jax.models.pickles import refuse_pickle
from ktg_jax.models.weights import save_node
from ktg_jax.training.batches import Arrays
from ktg_jax.training.engines import choose_engine
from ktg_jax.training.evaluation import Means, evaluation_batch_size, make_evaluator
from ktg_jax.training.per_node_evaluation import make_per_node_evaluator
from ktg_jax.training.state import GraphState

from .runs import cli
from .runs.assemble import load
from .runs.command_line import Command, parse
from .runs.console import Table, make_console
from .runs.facts import data_facts, without_test
from .runs.identity import data_kind, is_own
from .runs.options import (
    MOST_IMAGE_SIZE,
    StreamOptions,
    Training,
    at_least,
    import_modules,
)
from .runs.process import check_platform, prepare
from .runs.texts import per_cent
from .runs.trained import Trained, trained_file, trained_run
from .runs.workdir import Workdir

GROUPS = {"evaluation": "split", "file": "model", "export": "export", "speed": "compile_cache"}

EXAMPLES = r"""Examples:
  python -m experiments.evaluate runs/dml
  python -m experiments.evaluate runs/dml --split val --checkpoint best
  python -m experiments.evaluate runs/dml --export student.safetensors \
      --node resnet32-0
  python -m experiments.evaluate student.safetensors --data cifar10
  python -m experiments.evaluate resnet56.safetensors --model resnet56 \
      --input imagenet --data cifar10"""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate every node of a run and their ensemble (summed logits), or the network of a file."""

    command: ClassVar = Command("experiments.evaluate", GROUPS, EXAMPLES)

    workdir: Annotated[str, tyro.conf.Positional, "RUN|FILE"]
    """Folder of a run, as train makes it; or a .safetensors file: one that --export wrote, or a
    state dict of PyTorch."""
    split: Literal["test", "val", "train"] = "test"
    """Images to evaluate on."""
    checkpoint: Literal["last", "best"] = "last"
    """The checkpoint of the last epoch, or of the target's best on validation."""
    data: str | None = None
    """npz:FILE or folder:DIR: where data of your own is now (default: where it was in training). Of
    a file any data, as train takes it."""
    data_dir: str | None = None
    """Where the data is, else where it was in training; of data of your own, the folder that it is
    in now."""

    model: str | None = None
    """Of a state dict, the name of its model, such as resnet56."""
    input: str | None = None
    """Of a state dict, how its network wants its images: imagenet, cifar10, cifar100, half (-1 to
    1), or an object as JSON with mean, std and size; else from 0 to 1."""
    image_size: int | None = None
    """Of a file, resize images to so many pixels a side on load; else they stay as they are."""
    imports: Annotated[tuple[str, ...], "MODULE"] = ()
    """Of a file, Python modules to import first, such as those that call
    ktg_jax.register_model."""

    export: Annotated[str | None, "FILE"] = None
    """Write one network alone to this .safetensors file, too."""
    node: Annotated[str | None, "NAME"] = None
    """The node to export; else the target."""
    layout: Literal["own", "pytorch", "akamaster", "repdistiller", "ktg", "wrn"] = "own"
    """own: as ktg.load_node reads it; others: a state dict for PyTorch, its keys as one knows them
    (pytorch: layer1.0.conv1 and fc, channels in our order)."""

    compile_cache: bool = True
    """Keep compiled programs in the user's cache folder for the next start."""


_OF_FILES = ("model", "input", "image_size", "imports")


def main() -> None:
    """Evaluates what the command line describes."""
    config = parse(EvaluateConfig)
    prepare(config.compile_cache)
    evaluate(config, make_console())


def evaluate(config: EvaluateConfig, console: Console) -> None:
    """Evaluates, and exports where that is asked for.

    Raises:
        InputError: no run or file there, no such node or split, a network that is not of this data,
            a file that cannot be written.
        RunError: no checkpoint that can be read.
    """
    for field in ("node", "layout"):
        value = getattr(config, field)
        if value not in (None, "own") and config.export is None:
            raise InputError(field, value, "only together with --export")
    workdir = Workdir(config.workdir)
    if workdir.exists:
        trained, dataset = _of_run(config, workdir, console)
    elif os.path.isfile(os.path.expanduser(config.workdir)):
        trained, dataset = _of_file(config)
        if said := trained.said(config.workdir):
            cli.say(console, said)
    else:
        allowed = "the folder of a run, or a .safetensors file"
        raise InputError("workdir", config.workdir, allowed)
    if config.export is not None:
        _export(config, trained, dataset.num_classes, dataset.image_shape, dataset.class_names)
        if not workdir.exists:
            _say_exported(config.export, console)
    split = {"train": dataset.train, "val": dataset.val, "test": dataset.test}[config.split]
    if split is None:
        raise InputError("split", config.split, f"a split that the data of {config.workdir} has")
    images = split.images if dataset.is_streamed else jnp.asarray(split.images)
    arrays = Arrays(images, jnp.asarray(split.labels))
    means = _evaluate(trained.node_fns, trained.state, arrays, dataset.image_shape)

    epoch = "" if trained.epoch is None else f", epoch {trained.epoch}"
    cli.say(console, f"{config.workdir}{epoch}, {len(split)} {config.split} images:")
    table = Table("node", "model", "loss", "accuracy", box=None)
    for i, (name, model) in enumerate(zip(trained.names, trained.models, strict=True)):
        table.add_row(name, model, *_cells(means["loss"][i], means["accuracy"][i]))
    if workdir.exists:
        table.add_row("ensemble", "", *_cells(means["ensemble_loss"], means["ensemble_accuracy"]))
    console.print(table)


def _of_run(config: EvaluateConfig, workdir: Workdir, console: Console) -> tuple[Trained, Dataset]:
    """The networks of a run and its data; the data is not needed to export."""
    for field in _OF_FILES:
        if getattr(config, field):
            allowed = "nothing: a run knows it; it is for files"
            raise InputError(field, getattr(config, field), allowed)
    run = workdir.config
    import_modules(tuple(run["imports"]))
    check_platform()
    trained, facts = trained_run(workdir, config.checkpoint), run["data_facts"]
    if config.export is not None:
        _export(config, trained, facts["classes"], tuple(facts["image_shape"]))
        _say_exported(config.export, console)
    data = _data_now(config, workdir)
    wanted = Training(
        data=data,
        data_dir=config.data_dir or workdir.data_dir,
        train_limit=run["train_limit"],
        val_fraction=run["val_fraction"],
        image_size=run["image_size"],
        split_seed=run["split_seed"],
    )
    streaming = StreamOptions(run.get("stream", False), run.get("crop", "shift"))
    dataset = load(wanted, with_test=config.split == "test", streaming=streaming)
    _check_data(data, facts, data_facts(dataset), config.split)
    return trained, dataset


def _of_file(config: EvaluateConfig) -> tuple[Trained, Dataset]:
    """The network of a file, and the data that is given; nothing of it is held out."""
    refuse_pickle(config.workdir)
    at_least(config, 1, "image_size", most=MOST_IMAGE_SIZE)
    if config.checkpoint != "last":
        raise InputError("checkpoint", config.checkpoint, "last: a file has one")
    if config.data is None:
        raise InputError("data", None, "the data to evaluate on, such as cifar10: a file has none")
    import_modules(config.imports)
    check_platform()
    if config.model is not None:
        check_model(config.model)
    wanted = Training(
        data=config.data,
        data_dir=config.data_dir,
        val_fraction=0.0,
        image_size=config.image_size,
    )
    dataset = load(wanted, with_test=config.split == "test")
    sizes: dict[str, Any] = {
        "num_classes": dataset.num_classes,
        "image_shape": dataset.image_shape,
    }
    return trained_file(config.workdir, config.model, config.input, **sizes), dataset


def _say_exported(path: str, console: Console) -> None:
    cli.say(console, f"Wrote {path}. It takes uint8 images divided by 255.")


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
    return make_evaluator(node_fns, parallel, size)(state, data.spread_over(parallel))


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
    config: EvaluateConfig,
    trained: Trained,
    num_classes: int,
    image_shape: tuple[int, int, int],
    class_names: Sequence[str] = (),
) -> None:
    """Writes one network; anew, where the names of its classes are known."""
    path = str(config.export)
    index = trained.index(config.node)
    if not Path(path).absolute().parent.is_dir():
        raise InputError("export", path, "a file in a folder that exists")
    about = {"node": trained.names[index]}
    if trained.epoch is not None:
        about["epoch"] = json.dumps(trained.epoch)
    if class_names:
        about["class_names"] = json.dumps(class_names)
    wanted, model = trained.inputs[index], trained.models[index]
    network = trained.state.params[index], trained.state.model_state[index]
    if config.layout != "own":
        about |= {"num_classes": str(num_classes), "image_shape": json.dumps(image_shape)}
        about["input"] = json.dumps({"divisor": 255, **wanted.to_json()})
        save_state_dict(path, *network, model, config.layout, about=about)
        return
    save_node(
        path,
        *network,
        model=model,
        num_classes=num_classes,
        image_shape=image_shape,
        input=None if wanted == Input() else wanted,
        about=about,
    )


def _cells(loss: np.ndarray, accuracy: np.ndarray) -> tuple[str, str]:
    return f"{float(loss):.4f}", per_cent(float(accuracy), " %")


if __name__ == "__main__":
    cli.run(main)
