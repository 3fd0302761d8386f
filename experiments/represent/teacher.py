"""The teacher of a prior: read from its run or file, or trained first; and how it sees images."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import ktg_jax as ktg
from ktg_jax.data.dataset import Dataset
from ktg_jax.errors import InputError
from ktg_jax.inputs import Input, checked_input, parsed_input, resolved_input
from ktg_jax.io.trees import digest, unflatten
from ktg_jax.models.foreign import is_foreign
from ktg_jax.models.input import check_channels, with_input
from ktg_jax.models.network import NodeFns
from ktg_jax.models.recognise import model_of_state_dict
from ktg_jax.models.streams import without_stream
from ktg_jax.models.weights import NodeWeights
from ktg_jax.priors import about_prior
from ktg_jax.priors.channels import Variables
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
from .options import TEACHER_MODEL, TeacherOptions


@dataclass(frozen=True)
class Teacher:
    """A trained network.

    Attributes:
        source: the folder of its run, one node of it, or its file.
        model: its name.
        checksum: the checksum of its weights.
        fns: its functions, of images in 0..1.
        variables: its parameters and its model state.
        input: how it wants its images; the student sees them in the same way.
        saw_others: whether it was trained on other images than the student will be; None: not
            known.
    """

    source: str
    model: str
    checksum: int
    fns: NodeFns
    variables: Variables
    input: Input
    saw_others: bool | None


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


def check_teacher(config: TeacherOptions, data: str) -> None:
    """Checks, before any data is loaded, that the teacher that is given exists and is of this data.

    Imports the modules of a teacher's run, which may register its models.

    Raises:
        InputError: no such run, node or file, or one of other data.
    """
    source = str(config.teacher)
    if _is_file(source):
        _weights(config)
        return
    for field in ("teacher_model", "teacher_input"):
        if getattr(config, field) is not None:
            raise InputError(
                field, getattr(config, field), "nothing, for the teacher's run says it"
            )
    workdir, name = _split(source)
    if not workdir.exists:
        raise InputError("teacher", source, "the folder of a run, DIR:node, or a .safetensors file")
    import_modules(tuple(workdir.config["imports"]))
    names = [str(node.name) for node in workdir.graph.nodes]
    if name is not None and name not in names:
        raise InputError("teacher", source, f"one of the run's nodes: {', '.join(names)}")
    was = workdir.config["data"]
    if data_kind(was) != data_kind(data):
        allowed = f"a run on the student's data (data: {data}, not {was})"
        raise InputError("teacher", source, allowed)


def student_input(config: RepresentConfig) -> Input | None:
    """How the student sees its images: as its teacher, or that of its prior, did; None: in 0..1.

    Raises:
        InputError: a teacher or a prior that cannot be read.
    """
    if config.prior is not None:
        given = json.loads(about_prior(config.prior).get("input", "null"))
        wanted = None if given is None else checked_input("input", given)
        return None if wanted is None else resolved_input(wanted)
    if config.teacher is None:
        return None
    wanted = _input(config, _weights(config))
    return None if wanted == Input() else wanted


def load_teacher(config: TeacherOptions, dataset: Dataset) -> Teacher:
    """Reads the teacher that is given.

    Raises:
        InputError: a run on other data, weights that cannot be read, or that do not fit the data.
    """
    source = str(config.teacher)
    weights, saw_others = _weights(config, dataset.image_shape), None
    if not _is_file(source):
        saw_others = _check_facts(source, dataset)
    wanted = _input(config, weights)
    check_channels("teacher_input", wanted, dataset.image_shape[-1])
    fns = network(weights.model, wanted, dataset)
    params, model_state = _shapes(fns, dataset)
    where = f"teacher's weights of {source}"
    variables = (
        unflatten(params, weights.params, where),
        unflatten(without_stream(model_state), without_stream(weights.model_state), where),
    )
    checksum = digest(weights.params | weights.model_state)
    return Teacher(source, weights.model, checksum, fns, variables, wanted, saw_others)


def say_what_it_saw(teacher: Teacher, console: Console) -> None:
    """Says where a teacher that is given saw other images than the student will, or is not done."""
    if not _is_file(teacher.source) and _split(teacher.source)[0].result is None:
        cli.say(
            console,
            "The teacher's training is not finished: it is taken as after its last epoch so far.",
        )
    if teacher.saw_others:
        cli.say(
            console,
            "The teacher was trained on other images of this data than the student will be: the "
            "student's validation images may be among them.",
        )


def trained_teacher(config: RepresentConfig, dataset: Dataset, console: Console) -> Teacher:
    """The teacher that is trained alone first, unless the cache has it.

    Raises:
        RunError: its training fails.
    """
    model = config.teacher_model or TEACHER_MODEL

    def train_first(alone: TrainConfig, dataset: Dataset) -> None:
        cli.say(console, f"The teacher, {model}, is trained first.")
        train(alone, console, dataset)

    folder = trained_alone(model, config.training(), dataset, train_first)
    return load_teacher(TeacherOptions(teacher=str(folder)), dataset)


def network(model: str, wanted: Input | None, dataset: Dataset) -> NodeFns:
    """The functions of a network that sees its images as is wanted."""
    fns = ktg.build_model(model, dataset.num_classes)
    return fns if wanted in (None, Input()) else with_input(fns, wanted)


def _is_file(source: str) -> bool:
    return os.path.isfile(os.path.expanduser(source))


def _weights(config: TeacherOptions, image_shape: Any = (32, 32, 3)) -> NodeWeights:
    """The weights of the teacher that is given; errors are of the option `teacher`."""
    source = os.path.expanduser(str(config.teacher))
    model = config.teacher_model
    try:
        if model is None and os.path.isfile(source) and is_foreign(source):
            model = model_of_state_dict(source)
        weights = load_weights(str(config.teacher), model, image_shape)
    except InputError as error:
        raise InputError("teacher", config.teacher, error.allowed) from None
    if model not in (None, weights.model):
        raise InputError("teacher_model", model, f"{weights.model}, which the file is of")
    return weights


def _input(config: TeacherOptions, weights: NodeWeights) -> Input:
    """How the teacher wants its images."""
    given = config.teacher_input
    if given in (None, "none"):
        return weights.input or Input()
    wanted = resolved_input(parsed_input("teacher_input", str(given)))
    if weights.input not in (None, wanted):
        allowed = f"nothing: the file says it ({weights.input.to_json()})"
        raise InputError("teacher_input", given, allowed)
    return wanted


def _check_facts(source: str, dataset: Dataset) -> bool:
    """Whether a run's training images are others; raises InputError for a run on other data."""
    was, now = _split(source)[0].config["data_facts"], data_facts(dataset)
    for field in ("classes", "image_shape", "class_names_crc32"):
        if was.get(field, now[field]) != now[field]:
            allowed = f"a run on the student's data ({field}: {now[field]}, not {was[field]})"
            raise InputError("teacher", source, allowed)
    return was.get("train_crc32") != now["train_crc32"]


def _split(source: str) -> tuple[Workdir, str | None]:
    """The folder of a run and the name of a node; None: its target."""
    if Path(os.path.expanduser(source)).is_dir():
        return Workdir(source), None
    folder, _, name = source.rpartition(":")
    return (Workdir(folder), name) if folder else (Workdir(source), None)


def _shapes(fns: NodeFns, dataset: Dataset) -> tuple[Any, Any]:
    """The shapes of a network's parameters and of its model state."""
    return jax.eval_shape(fns.init, jax.random.key(0), jnp.zeros((1, *dataset.image_shape)))
