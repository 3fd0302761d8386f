"""The weights of one node alone: written for use elsewhere, read as another node's beginning."""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ktg_jax.checkpoint import read_nodes
from ktg_jax.errors import InputError, RunError
from ktg_jax.graph import Graph
from ktg_jax.json_input import decoded
from ktg_jax.models import build_model
from ktg_jax.models.registry import MOST_CLASSES
from ktg_jax.nodes import NodeFns, PyTree
from ktg_jax.pixels import DIVISOR, taking_pixels
from ktg_jax.state import GraphState
from ktg_jax.streams import with_new_stream, with_own_keys, without_stream
from ktg_jax.tensors import read_tensors, read_texts, write_tensors
from ktg_jax.trees import FlatTree, flatten, unflatten

CHECKPOINTS = "checkpoints"
"""The folder of a run's checkpoints, within the run's folder."""

_WITH_GRAPH = ("graph.json", "config.json")
"""Files of a run's folder, either of which says what graph it is."""


@dataclass(frozen=True)
class NodeWeights:
    """The weights of a node, as flat dicts of numpy arrays.

    Attributes:
        params: the parameters by path, such as `stem_conv.kernel`.
        model_state: the model state by path, such as `batch_stats.stem_norm.mean`; of random
            streams a linen module's is not part of it.
        model: the model's name.
        source: where they come from, for messages.
    """

    params: FlatTree
    model_state: FlatTree
    model: str
    source: str


def load_weights(source: str) -> NodeWeights:
    """Reads a node's weights.

    Args:
        source: a run's folder (its target), `DIR:name` (one node of it), or a file that
            `save_node` wrote; `~` is the home folder. Of a run, the newest checkpoint that is
            whole is read.

    Raises:
        InputError: no such run, node or file, or one that cannot be read.
    """
    path = os.path.expanduser(source)
    if path.endswith(".safetensors") and not os.path.isdir(path):
        weights, _ = _read_file(path)
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
    models = {str(node.name): node.model for node in graph.nodes}
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
    return NodeWeights(node["params"], model_state, models[name], source)


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
    params = unflatten(state.params[index], weights.params, field)
    model_state = unflatten(without_stream(own), weights.model_state, field)

    def replace(part: tuple[PyTree, ...], new: PyTree) -> tuple[PyTree, ...]:
        return (*part[:index], new, *part[index + 1 :])

    return dataclasses.replace(
        state,
        params=replace(state.params, params),
        model_state=replace(state.model_state, with_own_keys(model_state, own)),
    )


def save_node(
    path: str | os.PathLike[str],
    params: PyTree,
    model_state: PyTree,
    *,
    model: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    input_divisor: float = DIVISOR,
    about: Mapping[str, str] | None = None,
) -> None:
    """Writes one node as a safetensors file: tensors and text, reading it executes nothing.

    The tensors are named as in a flax variables dict with dots: `params.stem_conv.kernel`,
    `batch_stats.stem_norm.mean`. The texts say what the network is, and under `input` and
    `input_divisor` what images it takes. A linen module's random stream is left out.

    Args:
        path: ends in `.safetensors`.
        params: the node's params.
        model_state: the node's model state.
        model: the model's registered name.
        num_classes: number of logits.
        image_shape: (height, width, channels) it was trained on.
        input_divisor: of uint8 images before the network sees them; the experiments': 255.
        about: further texts to keep in the file.

    Raises:
        InputError: another suffix, or a file that cannot be written.

    >>> import tempfile
    >>> fns = build_model("cnn", num_classes=10)
    >>> params, model_state = fns.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = f"{folder}/node.safetensors"
    ...     save_node(file, params, model_state, model="cnn", num_classes=10,
    ...               image_shape=(8, 8, 1))
    ...     load_weights(file).model
    'cnn'
    """
    if Path(path).suffix != ".safetensors":
        raise InputError("export", str(path), "a file name that ends in .safetensors")
    tensors = {f"params.{name}": array for name, array in flatten(params).items()}
    tensors |= flatten(without_stream(model_state))
    texts = {
        "model": model,
        "num_classes": json.dumps(num_classes),
        "image_shape": json.dumps(list(image_shape)),
        "input": _input(image_shape, input_divisor),
        "input_divisor": json.dumps(input_divisor),
        **(about or {}),
    }
    write_tensors(path, "export", tensors, texts)


def load_node(path: str | os.PathLike[str]) -> tuple[NodeFns, PyTree, PyTree]:
    """Reads what `save_node` wrote.

    Returns:
        The node's functions, params and model state: `apply(params, model_state, images, False)`.
        Unlike those of `build_model` these functions take uint8 images and divide them by 255 (or
        what else the file says) themselves; float images they take as they are, divided already. A
        linen module that draws random numbers in training has a new stream.

    Raises:
        InputError: a file that cannot be read, that is of another origin or damaged, or whose model
            is not registered here.

    >>> import tempfile
    >>> fns = build_model("cnn", num_classes=10)
    >>> made = fns.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = f"{folder}/node.safetensors"
    ...     save_node(file, *made, model="cnn", num_classes=10, image_shape=(8, 8, 1))
    ...     fns, params, model_state = load_node(file)
    >>> fns.apply(params, model_state, jnp.zeros((1, 8, 8, 1)), False)[0].shape
    (1, 10)
    """
    weights, about = _read_file(path)
    try:
        fns = build_model(weights.model, about["num_classes"])
    except InputError as error:
        raise InputError(error.field, error.value, f"{error.allowed}; in {path}") from None
    images = jax.ShapeDtypeStruct((1, *about["image_shape"]), jnp.float32)
    field, rng = f"weights of {path}", jax.random.key(0)
    shapes, state_shapes = jax.eval_shape(fns.init, rng, images)
    params = unflatten(shapes, weights.params, field)
    model_state = unflatten(without_stream(state_shapes), weights.model_state, field)
    model_state = with_new_stream(model_state, state_shapes, rng)
    return taking_pixels(fns, about["input_divisor"]), params, model_state


def _input(image_shape: Sequence[int], divisor: float) -> str:
    """What images a network takes, in words."""
    kind = {1: "grey, ", 3: "RGB, "}.get(image_shape[-1], "") if len(image_shape) == 3 else ""
    return f"float32 [B, {', '.join(map(str, image_shape))}], {kind}uint8 divided by {divisor:g}"


def _read_file(path: str | os.PathLike[str]) -> tuple[NodeWeights, dict[str, Any]]:
    """The weights in a file, and what it says of them, by field."""
    texts = read_texts(path, "weights")
    about = {}
    for field, is_right in _FIELDS.items():
        text = texts.get(field, _OF_OLDER_FILES.get(field, ""))
        try:
            about[field] = text if field == "model" else decoded(field, text)
        except InputError:
            about[field] = None
        if not is_right(about[field]):
            allowed = f"a whole file that ktg_jax exported ({field}: {text[:60]!r})"
            raise InputError("weights", str(path), allowed)
    tensors, _ = read_tensors(path, "weights")
    params = {k.removeprefix("params."): v for k, v in tensors.items() if _is_param(k)}
    model_state = {k: v for k, v in tensors.items() if not _is_param(k)}
    return NodeWeights(params, model_state, about["model"], str(path)), about


def _is_param(name: str) -> bool:
    return name.startswith("params.")


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _is_shape(value: Any) -> bool:
    sides = value if isinstance(value, list) and len(value) <= 4 else [0]
    return all(_is_count(side, 2**20) for side in sides) and math.prod(sides) < 2**31


def _is_divisor(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value <= sys.float_info.max


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "model": lambda name: 0 < len(name) <= 255 and name.isprintable(),
    "num_classes": lambda number: _is_count(number, MOST_CLASSES),
    "image_shape": _is_shape,
    "input_divisor": _is_divisor,
}
"""The texts of a file that are read again, all but `model` as JSON, and what is right for each."""

_OF_OLDER_FILES = {"input_divisor": json.dumps(DIVISOR)}
"""What files that do not say it mean."""
