"""Initial weights of a node: from a file, or from a run of its own."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from ktg_jax.connectors import with_connectors, without_connectors
from ktg_jax.errors import InputError, RunError, part_of
from ktg_jax.graph.graph import Graph
from ktg_jax.inputs import OF_DATA, Input, checked_input, resolved_input
from ktg_jax.io.trees import digest, flatten, unflatten
from ktg_jax.models.foreign import is_foreign, load_state_dict, state_dict_checksum
from ktg_jax.models.network import PyTree
from ktg_jax.models.streams import with_own_keys, without_stream
from ktg_jax.models.weights import NodeWeights, read_node
from ktg_jax.training.checkpoint_reading import read_nodes
from ktg_jax.training.state import GraphState

INPUT_FACTS = "input_facts"
"""The field of a run's configuration with the `Input` of each node that is given the data's."""

CHECKPOINTS = "checkpoints"
"""The folder of a run's checkpoints, within the run's folder."""

_WITH_GRAPH = ("graph.json", "config.json")
"""Files of a run's folder, either of which says what graph it is."""


def load_weights(
    source: str, model: str | None = None, image_shape: Sequence[int] = (32, 32, 3)
) -> NodeWeights:
    """Reads a node's weights.

    Args:
        source: a run's folder (its target), `DIR:name` (one node of it), or a file that
            `save_node` wrote, or of a state dict of PyTorch; `~` is the home folder. Of a run, the
            newest checkpoint that is whole is read.
        model: the name of the node's model, which a state dict does not say.
        image_shape: of the images that a state dict's network sees.

    Raises:
        InputError: no such run, node or file, or one that cannot be read.
    """
    path = os.path.expanduser(source)
    if (path.endswith(".safetensors") and not os.path.isdir(path)) or os.path.isfile(path):
        if is_foreign(path):
            return _foreign_weights(source, path, model, image_shape)
        weights, _ = read_node(path)
        return dataclasses.replace(weights, source=source)
    folder, _, name = (path, "", "") if os.path.isdir(path) else path.rpartition(":")
    if not folder or not any((Path(folder) / file).is_file() for file in _WITH_GRAPH):
        allowed = "a run's folder, DIR:name (one node of it), or a .safetensors file"
        raise InputError("weights", source, allowed)
    try:
        graph = read_graph(folder)
    except InputError as error:
        allowed = f"a run with a readable graph.json ({error.allowed})"
        raise InputError("weights", source, allowed) from None
    models = {str(node.name): graph.model_of(i) for i, node in enumerate(graph.nodes)}
    name = name or next(iter(models))
    if name not in models:
        raise InputError("weights", source, f"one of the run's nodes: {', '.join(models)}")
    try:
        _, nodes = read_nodes(Path(folder) / CHECKPOINTS)
    except RunError as error:
        raise InputError("weights", source, f"a run with a readable checkpoint ({error})") from None
    if name not in nodes:
        allowed = f"a run whose checkpoints have that node ({', '.join(nodes)})"
        raise InputError("weights", source, allowed)
    node = nodes[name]
    model_state = without_stream(node["model_state"] or {})
    wanted = run_inputs(folder, graph)[name]
    return NodeWeights(node["params"], model_state, models[name], source, wanted)


def _foreign_weights(
    source: str, path: str, model: str | None, image_shape: Sequence[int]
) -> NodeWeights:
    if model is None:
        raise InputError("model", None, f"the name of the model that {source} is of")
    params, model_state = load_state_dict(path, model, image_shape=image_shape)
    return NodeWeights(flatten(params), flatten(model_state), model, source)


def weights_checksum(source: str) -> int:
    """The checksum of weights; arguments and errors are those of `load_weights`."""
    path = os.path.expanduser(source)
    if os.path.isfile(path) and is_foreign(path):
        return state_dict_checksum(path)
    weights = load_weights(source)
    return digest(weights.params | weights.model_state)


def run_inputs(folder: str | os.PathLike[str], graph: Graph) -> dict[str, Input]:
    """How each node of a run wants its images; the statistics of its data are in its folder.

    Raises:
        InputError: they are not there, where a node is given the data's.
    """
    found: dict[str, Input] = {}
    sources = {each.node: each.source for each in graph.derived.averages}
    for i, named in enumerate(graph.nodes):
        node = graph.nodes[sources.get(i, i)]
        of_data = _statistics(folder, str(node.name)) if node.input == OF_DATA else None
        given = Input() if node.input is None else checked_input("input", node.input)
        with part_of(f"{folder}: node {node.name}"):
            found[str(named.name)] = resolved_input(given, of_data)
    return found


def _statistics(folder: str | os.PathLike[str], name: str) -> Input | None:
    """What the run's `config.json` says of its training images; None: it cannot be read."""
    try:
        text = (Path(folder) / "config.json").read_text(encoding="utf-8")
        found = checked_input("input", json.loads(text)["config"][INPUT_FACTS][name])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return None if isinstance(found, str) else found


def check_input(index: int, weights: NodeWeights, wanted: Input) -> None:
    """Raises InputError where a network was trained with images normalised in another way."""
    known = weights.input
    if known is not None and (known.mean, known.std) != (wanted.mean, wanted.std):
        given = json.dumps({"mean": list(known.mean), "std": list(known.std)})
        allowed = f"{given}, with which its weights were trained ({weights.source})"
        found = {"mean": list(wanted.mean), "std": list(wanted.std)}
        raise InputError(f"nodes[{index}].input", found, allowed)


def read_graph(folder: str | os.PathLike[str]) -> Graph:
    """The graph of a run: from its `graph.json`, or where that is damaged from its `config.json`.

    Raises:
        InputError: neither can be read.
    """
    try:
        return Graph.load(Path(folder) / "graph.json")
    except InputError as error:
        try:
            text = (Path(folder) / "config.json").read_text(encoding="utf-8")
            return Graph.from_json(json.loads(text)["config"]["graph"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise error from None


def with_weights(state: GraphState, index: int, weights: NodeWeights) -> GraphState:
    """The state with a node's params and model state replaced; random keys stay the node's own.

    Raises:
        InputError: the weights are of another architecture; names the first parameter that differs.
    """
    field = f"weights of node {index} ({weights.source}, a {weights.model})"

    own = state.model_state[index]
    network, connectors = without_connectors(state.params[index])
    params = unflatten(network, weights.params, field)
    params = with_connectors(params, connectors) if connectors else params
    model_state = unflatten(without_stream(own), weights.model_state, field)

    def replace(part: tuple[PyTree, ...], new: PyTree) -> tuple[PyTree, ...]:
        return (*part[:index], new, *part[index + 1 :])

    return dataclasses.replace(
        state,
        params=replace(state.params, params),
        model_state=replace(state.model_state, with_own_keys(model_state, own)),
    )
