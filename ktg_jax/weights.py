"""The weights of one node alone: written for use elsewhere, read as another node's beginning."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from ktg_jax.checkpoint import read_nodes
from ktg_jax.errors import InputError, RunError
from ktg_jax.graph import Graph
from ktg_jax.models import build_model
from ktg_jax.nodes import NodeFns, PyTree
from ktg_jax.state import GraphState
from ktg_jax.tensors import read_tensors, write_tensors
from ktg_jax.trees import FlatTree, flatten, unflatten

CHECKPOINTS = "checkpoints"
"""The folder of a run's checkpoints, within the run's folder."""


@dataclass(frozen=True)
class NodeWeights:
    """The weights of a node, as flat dicts of numpy arrays.

    Attributes:
        params: the parameters by path, such as `stem_conv.kernel`.
        model_state: the model state by path, such as `batch_stats.stem_norm.mean`.
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
            `save_node` wrote. Of a run, the newest checkpoint that is whole is read.

    Raises:
        InputError: no such run, node or file, or one that cannot be read.
    """
    if source.endswith(".safetensors"):
        tensors, about = _read_tensors(source)
        params = {k.removeprefix("params."): v for k, v in tensors.items() if _is_param(k)}
        model_state = {k: v for k, v in tensors.items() if not _is_param(k)}
        return NodeWeights(params, model_state, about["model"], source)
    folder, _, name = (source, "", "") if Path(source).is_dir() else source.rpartition(":")
    if not (Path(folder) / "graph.json").is_file():
        allowed = "a run's folder, DIR:name (one node of it), or a .safetensors file"
        raise InputError("weights", source, allowed)
    graph = Graph.load(Path(folder) / "graph.json")
    models = {str(node.name): node.model for node in graph.nodes}
    name = name or next(iter(models))
    if name not in models:
        raise InputError("weights", source, f"one of the run's nodes: {', '.join(models)}")
    try:
        _, nodes = read_nodes(Path(folder) / CHECKPOINTS)
    except RunError as error:
        raise InputError("weights", source, f"a run with a readable checkpoint ({error})") from None
    node = nodes[name]
    return NodeWeights(node["params"], node["model_state"] or {}, models[name], source)


def with_weights(state: GraphState, index: int, weights: NodeWeights) -> GraphState:
    """The state with a node's params and model state replaced.

    Raises:
        InputError: the weights are of another architecture; names the first parameter that differs.
    """
    field = f"weights of node {index} ({weights.source}, a {weights.model})"

    def replace(part: tuple[PyTree, ...], flat: FlatTree) -> tuple[PyTree, ...]:
        return (*part[:index], unflatten(part[index], flat, field), *part[index + 1 :])

    return dataclasses.replace(
        state,
        params=replace(state.params, weights.params),
        model_state=replace(state.model_state, weights.model_state),
    )


def save_node(
    path: str | os.PathLike[str],
    params: PyTree,
    model_state: PyTree,
    *,
    model: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    about: Mapping[str, str] | None = None,
) -> None:
    """Writes one node as a safetensors file: tensors and text, reading it executes nothing.

    The tensors are named as in a flax variables dict with dots: `params.stem_conv.kernel`,
    `batch_stats.stem_norm.mean`.

    Args:
        path: ends in `.safetensors`.
        params: the node's params.
        model_state: the node's model state.
        model: the model's registered name.
        num_classes: number of logits.
        image_shape: (height, width, channels) it was trained on.
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
    tensors |= flatten(model_state)
    texts = {
        "model": model,
        "num_classes": json.dumps(num_classes),
        "image_shape": json.dumps(list(image_shape)),
        **(about or {}),
    }
    write_tensors(path, "export", tensors, texts)


def load_node(path: str | os.PathLike[str]) -> tuple[NodeFns, PyTree, PyTree]:
    """Reads what `save_node` wrote.

    Returns:
        The node's functions, params and model state: `apply(params, model_state, images, False)`.

    Raises:
        InputError: a file that cannot be read, or whose model is not registered here.

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
    weights = load_weights(str(path))
    _, about = _read_tensors(path)
    fns = build_model(weights.model, json.loads(about["num_classes"]))
    images = jnp.zeros((1, *json.loads(about["image_shape"])))
    params, model_state = jax.eval_shape(fns.init, jax.random.key(0), images)
    return (
        fns,
        unflatten(params, weights.params, f"weights of {path}"),
        unflatten(model_state, weights.model_state, f"weights of {path}"),
    )


def _is_param(name: str) -> bool:
    return name.startswith("params.")


def _read_tensors(path: str | os.PathLike[str]) -> tuple[FlatTree, dict[str, str]]:
    tensors, about = read_tensors(path, "weights")
    if not {"model", "num_classes", "image_shape"} <= about.keys():
        raise InputError("weights", str(path), "a file that ktg_jax exported")
    return tensors, about
