"""The teachers of a search: from what is given on the command line to nodes of its space."""

import dataclasses
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import ktg_jax as ktg
from ktg_jax.data.dataset import Dataset
from ktg_jax.errors import InputError, part_of
from ktg_jax.graph.node_checks import node_from_json
from ktg_jax.inputs import Input, parsed_input
from ktg_jax.io.json_input import decoded
from ktg_jax.models.foreign import is_foreign
from ktg_jax.models.recognise import model_of_state_dict
from ktg_jax.recording.header import HEADER
from ktg_jax.training.warm_start import load_weights

from ..runs.config import TrainConfig
from ..runs.facts import facts_of, graph_facts
from ..runs.networks import check_networks, check_weights
from .config import SearchConfig

_NOT_OF_NAMES = re.compile(r"[^A-Za-z0-9_.-]+")


def with_teachers(config: SearchConfig) -> tuple[SearchConfig, list[str]]:
    """The configuration with each teacher as a node, and what is to be said of them.

    A network that is given twice is one teacher.

    Raises:
        InputError: a file that cannot be read, of no network, or of which the model is not known;
            or as many models or inputs as there are no teachers.
    """
    models = _one_each(config, "teacher_models")
    inputs = _one_each(config, "teacher_inputs")
    nodes: list[ktg.Node] = []
    said: list[str] = []
    known: dict[str, str] = {}
    for i, (text, model, wanted) in enumerate(zip(config.teachers, models, inputs, strict=True)):
        with part_of(f"teachers[{i}]"):
            node = _node(i, text, model, wanted)
            same = repr((_checksum(node), node.model, node.input))
        if same in known:
            said.append(f"Teacher {text} is the network of {known[same]}: they are one.")
            continue
        known[same] = text
        names = {*config.candidates, *(str(other.name) for other in nodes)}
        name = node.name or _name_of(str(node.weights or node.outputs))
        node = dataclasses.replace(node, name=_free(name, names))
        if model is None and not text.startswith("{") and node.weights is not None:
            said.append(f"Teacher {node.name} is a {node.model} ({text}).")
        nodes.append(node)
    listed = tuple(json.dumps(node.to_dict()) for node in nodes)
    return (
        dataclasses.replace(config, teachers=listed, teacher_models=(), teacher_inputs=()),
        said,
    )


def check_teachers(
    training: TrainConfig, space: ktg.SearchSpace, dataset: Dataset, retrained: bool
) -> dict[str, Any]:
    """The checksums of the teachers' files, once these are found fit for the data.

    Args:
        training: of the trials.
        space: of graphs.
        dataset: of the trials.
        retrained: whether graphs are trained again on other images, which no recording is of.

    Raises:
        InputError: one that does not fit; names it.
    """
    for i, teacher in enumerate(space.teachers):
        if teacher.outputs is not None and retrained and not dataset.own_val:
            allowed = "a network: the fair ending trains on other images than the trials, which a "
            allowed += "recording is not of (or --retrain-top 0)"
            raise InputError(f"teachers[{i}]", teacher.outputs, allowed)
        graph = ktg.graphs.distillation(space.target, teacher)
        try:
            check_networks(training, graph, dataset)
            check_weights(training, graph, dataset)
        except InputError as error:
            field = error.field.replace("nodes[1]", f"teachers[{i}]")
            raise InputError(field, error.value, error.allowed) from None
    if not space.teachers:
        return {}
    alone = ktg.Node(space.target, "target")
    n = len(space.teachers) + 1
    gates = [["through" if t == s == 0 else "cutoff" for s in range(n)] for t in range(n)]
    facts = facts_of(ktg.Graph((alone, *space.teachers), gates), dataset)
    del facts["data_facts"]
    return facts


def _one_each(config: SearchConfig, field: str) -> list[str | None]:
    """What is given for each teacher; None: nothing."""
    given, n = getattr(config, field), len(config.teachers)
    if n and len(given) == 1 and field == "teacher_inputs":
        given = given * n
    if len(given) not in (0, n):
        raise InputError(field, list(given), f"{n} entries, one a teacher, or none")
    return [None if text == "none" else text for text in given] or [None] * n


def _node(index: int, text: str, model: str | None, wanted: str | None) -> ktg.Node:
    """A teacher from its text; without a name where the text gives it none."""
    path = os.path.expanduser(text)
    is_recorded = os.path.isfile(os.path.join(path, HEADER))
    if is_recorded or text.lstrip().startswith("{"):
        if model is not None:
            raise InputError("model", model, f"none: {text} says it")
        return (
            ktg.Node(outputs=text) if is_recorded else node_from_json("node", decoded("node", text))
        )
    if os.path.isfile(path) and is_foreign(path):
        model = model or model_of_state_dict(path)
        node = ktg.Node(model, weights=text)
    else:
        weights = load_weights(text)
        if model not in (None, weights.model):
            raise InputError("model", model, f"{weights.model}, which it is of")
        node = ktg.Node(weights.model, weights=text)
        if weights.input not in (None, Input()):
            node = dataclasses.replace(node, input=weights.input)
    if wanted is None:
        return node
    return dataclasses.replace(node, input=parsed_input(f"teacher_inputs[{index}]", wanted))


def _name_of(text: str) -> str:
    """A name for what is at a path.

    >>> _name_of("runs/a:peer"), _name_of("teachers/resnet56.pytorch.safetensors")
    ('a-peer', 'resnet56')
    """
    name = Path(text).name.removesuffix(".safetensors").removesuffix(".pytorch")
    return _NOT_OF_NAMES.sub("-", name).strip("-_.") or "teacher"


def _free(name: str, taken: Collection[str]) -> str:
    """The name, or where it is taken that with something more."""
    more = (name, f"{name}-teacher", *(f"{name}-{n}" for n in range(2, len(taken) + 3)))
    return next(each for each in more if each not in taken)


def _checksum(node: ktg.Node) -> Any:
    """What tells a node's network from others."""
    gates = [["through", "cutoff"], ["cutoff", "cutoff"]]
    named = dataclasses.replace(node, name="teacher")
    return graph_facts(ktg.Graph((ktg.Node("target", "target"), named), gates))
