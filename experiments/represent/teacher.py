"""The teacher of a prior: read from its run, or trained first; and whether it fits the student."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import ktg_jax as ktg
from ktg_jax.data.dataset import Dataset
from ktg_jax.errors import InputError
from ktg_jax.inputs import Input
from ktg_jax.io.trees import digest, unflatten
from ktg_jax.models.input import with_input
from ktg_jax.models.network import NodeFns, PyTree, stage_number
from ktg_jax.models.streams import without_stream
from ktg_jax.priors import (
    KernelShapes,
    layer_kernels,
    stage_convolutions,
    stage_kernels,
    stage_outputs,
)
from ktg_jax.training.warm_start import load_weights, weights_checksum

from ..runs import cli
from ..runs.assemble import load
from ..runs.config import TrainConfig
from ..runs.facts import data_facts
from ..runs.identity import data_kind, is_own
from ..runs.options import Training, import_modules
from ..runs.pretrained import trained_alone
from ..runs.workdir import Workdir
from ..train import train
from .config import RepresentConfig


@dataclass(frozen=True)
class Teacher:
    """A trained network.

    Attributes:
        source: the folder of its run, or one node of it.
        model: its name.
        checksum: the checksum of its weights.
        fns: its functions.
        params: its parameters.
        model_state: its model state.
        saw_others: whether it was trained on other images than the student will be.
    """

    source: str
    model: str
    checksum: int
    fns: NodeFns
    params: PyTree
    model_state: PyTree
    saw_others: bool


def student_kernels(config: RepresentConfig, dataset: Dataset) -> KernelShapes:
    """The kernels of the student that the prior is to speak of.

    Raises:
        InputError: a student without stages, or one of its layers that does not exist.
    """
    params, _ = _shapes(ktg.build_model(config.student, dataset.num_classes), dataset)
    try:
        if config.aggregation == "layers" and not config.student_layers:
            return layer_kernels(params)
        return stage_kernels(params, config.student_layers or None)
    except InputError as error:
        if config.student_layers:
            raise InputError("student_layers", error.value, error.allowed) from None
        raise InputError("student", config.student, f"a model with {error.allowed}") from None


def facts_for_name(config: Training, teacher: str | None) -> tuple[dict[str, Any], Dataset | None]:
    """Checksums that the name of a default folder is made of, and the data if it was loaded.

    Args:
        config: whose data counts if it is the user's own, which is loaded then.
        teacher: the folder or file of the teacher that is given; None: none is.

    Returns:
        `data_facts` and `teacher`, as far as they count.

    Raises:
        InputError: data or weights that cannot be read.
    """
    facts: dict[str, Any] = {}
    dataset = load(config) if is_own(config.data) else None
    if dataset is not None:
        facts["data_facts"] = data_facts(dataset)
    if teacher is not None:
        facts["teacher"] = weights_checksum(teacher)
    return facts, dataset


def check_teacher_run(source: str, config: RepresentConfig) -> None:
    """Checks, before any data is loaded, that a teacher's run exists and is of this data.

    Imports the modules of that run, which may register its models.

    Raises:
        InputError: no such run or node, or a run on other data.
    """
    workdir, name = _split(source)
    if not workdir.exists:
        raise InputError("teacher", source, "the folder of a run, or DIR:node")
    import_modules(tuple(workdir.config["imports"]))
    names = [str(node.name) for node in workdir.graph.nodes]
    if name is not None and name not in names:
        raise InputError("teacher", source, f"one of the run's nodes: {', '.join(names)}")
    data = workdir.config["data"]
    if data_kind(data) != data_kind(config.data):
        allowed = f"a run on the student's data (data: {config.data}, not {data})"
        raise InputError("teacher", source, allowed)


def load_teacher(source: str, kernels: KernelShapes, dataset: Dataset, how: str) -> Teacher:
    """Reads a teacher of a run on this data and checks that its stages fit.

    Args:
        source: folder of the run, or `DIR:node`.
        kernels: the kernels of the student.
        dataset: that the prior is fitted on.
        how: the value of `--aggregation`.

    Raises:
        InputError: a run on other data, a checkpoint that cannot be read, or other stages.
    """
    workdir, _ = _split(source)
    was, now = workdir.config["data_facts"], data_facts(dataset)
    for field in ("classes", "image_shape", "class_names_crc32"):
        if was.get(field, now[field]) != now[field]:
            allowed = f"a run on the student's data ({field}: {now[field]}, not {was[field]})"
            raise InputError("teacher", source, allowed)
    try:
        weights = load_weights(source)
    except InputError as error:
        raise InputError("teacher", source, error.allowed) from None
    fns = ktg.build_model(weights.model, dataset.num_classes)
    if weights.input is not None and weights.input != Input():
        fns = with_input(fns, weights.input)
    check_stages(weights.model, kernels, dataset, how)
    params, model_state = _shapes(fns, dataset)
    return Teacher(
        source,
        weights.model,
        digest(weights.params | weights.model_state),
        fns,
        unflatten(params, weights.params, f"weights of {source}"),
        unflatten(without_stream(model_state), weights.model_state, f"weights of {source}"),
        was.get("train_crc32") != now["train_crc32"],
    )


def trained_teacher(
    config: RepresentConfig, kernels: KernelShapes, dataset: Dataset, console: Console
) -> Teacher:
    """The teacher that is trained alone first, unless the cache has it.

    Raises:
        InputError: its stages do not fit the student's kernels; found before it is trained.
        RunError: its training fails.
    """
    model = config.teacher_model
    check_stages(model, kernels, dataset, config.aggregation)

    def train_first(alone: TrainConfig, dataset: Dataset) -> None:
        cli.say(console, f"The teacher, {model}, is trained first.")
        train(alone, console, dataset)

    folder = trained_alone(model, config.training(), dataset, train_first)
    return load_teacher(str(folder), kernels, dataset, config.aggregation)


def check_stages(model: str, kernels: KernelShapes, dataset: Dataset, how: str) -> None:
    """Raises InputError unless a teacher's stages can be aggregated into these kernels.

    Args:
        model: the teacher's.
        kernels: the kernels of the student.
        dataset: that both are for.
        how: the value of `--aggregation`: `fit` needs the stages' outputs, others their
            convolutions, and `layers` has several kernels in a stage.
    """
    fns = ktg.build_model(model, dataset.num_classes)
    params, model_state = _shapes(fns, dataset)
    if how == "fit":
        images = jax.ShapeDtypeStruct((1, *dataset.image_shape), jnp.float32)
        _, outputs = jax.eval_shape(partial(stage_outputs, fns), params, model_state, images)
        number = len(outputs)
    else:
        number = len(stage_convolutions(params))
    wanted, as_many = len(kernels), "as many as kernels of the student"
    if how == "layers":
        wanted, as_many = num_stages(kernels), "as the student"
    if number != wanted:
        allowed = f"one with {wanted} stages, {as_many} ({number})"
        raise InputError("teacher's model", model, allowed)


def num_stages(paths: Iterable[str]) -> int:
    """The number of stages that kernels of these paths are in."""
    return len({stage_number(path.split(".")) for path in paths})


def _split(source: str) -> tuple[Workdir, str | None]:
    """The folder of a run and the name of a node; None: its target."""
    if Path(os.path.expanduser(source)).is_dir():
        return Workdir(source), None
    folder, _, name = source.rpartition(":")
    return (Workdir(folder), name) if folder else (Workdir(source), None)


def _shapes(fns: NodeFns, dataset: Dataset) -> tuple[Any, Any]:
    """The shapes of a network's parameters and of its model state."""
    return jax.eval_shape(fns.init, jax.random.key(0), jnp.zeros((1, *dataset.image_shape)))
