"""One network's file: its weights, written for use elsewhere and read again."""

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

from ktg_jax.checks import is_number, is_whole
from ktg_jax.connectors import without_connectors
from ktg_jax.errors import InputError
from ktg_jax.inputs import Input, checked_input, resolved_input
from ktg_jax.io.json_input import decoded
from ktg_jax.io.tensors import read_tensors, read_texts, texts_of, write_tensors
from ktg_jax.io.trees import FlatTree, flatten, unflatten
from ktg_jax.models import build_model
from ktg_jax.models.input import with_input
from ktg_jax.models.network import NodeFns, PyTree
from ktg_jax.models.pixels import DIVISOR, taking_pixels
from ktg_jax.models.registry import MOST_CLASSES
from ktg_jax.models.streams import with_new_stream, without_stream


@dataclass(frozen=True)
class NodeWeights:
    """The weights of a node, as flat dicts of numpy arrays.

    Attributes:
        params: the parameters by path, such as `stem_conv.kernel`.
        model_state: the model state by path, such as `batch_stats.stem_norm.mean`; of random
            streams a linen module's is not part of it.
        model: the model's name.
        source: where they come from, for messages.
        input: how the network wants its images; None: that is not known.
    """

    params: FlatTree
    model_state: FlatTree
    model: str
    source: str
    input: Input | None = None


def save_node(
    path: str | os.PathLike[str],
    params: PyTree,
    model_state: PyTree,
    *,
    model: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    input_divisor: float = DIVISOR,
    input: Input | None = None,
    about: Mapping[str, str] | None = None,
) -> None:
    """Writes one node as a safetensors file: tensors and text, reading it executes nothing.

    The tensors are named as in a flax variables dict with dots: `params.stem_conv.kernel`,
    `batch_stats.stem_norm.mean`. The texts say what the network is, and under `input`,
    `input_divisor` and `node_input` (mean, std and size, as JSON) what images it takes. A linen
    module's random stream is left out.

    Args:
        path: ends in `.safetensors`.
        params: the node's params.
        model_state: the node's model state.
        model: the model's registered name.
        num_classes: number of logits.
        image_shape: (height, width, channels) it was trained on.
        input_divisor: what uint8 images are divided by for the network; the experiments': 255.
        input: how the network wants its images then; None: as they are.
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
    ...     read_node(file)[0].model
    'cnn'
    """
    if Path(path).suffix != ".safetensors":
        raise InputError("export", str(path), "a file name that ends in .safetensors")
    network, _ = without_connectors(params)
    tensors = {f"params.{name}": array for name, array in flatten(network).items()}
    tensors |= flatten(without_stream(model_state))
    texts = {
        "model": model,
        "num_classes": json.dumps(num_classes),
        "image_shape": json.dumps(list(image_shape)),
        "input": _input(image_shape, input_divisor, input),
        "input_divisor": json.dumps(input_divisor),
        **({} if input is None else {"node_input": json.dumps(input.to_json())}),
        **(about or {}),
    }
    write_tensors(path, "export", tensors, texts)


def load_node(path: str | os.PathLike[str]) -> tuple[NodeFns, PyTree, PyTree]:
    """Reads what `save_node` wrote.

    Returns:
        The node's functions, params and model state: `apply(params, model_state, images, False)`.
        Unlike those of `build_model` these functions take uint8 images and divide them by 255 (or
        what else the file says) themselves; float images they take as they are, divided already.
        They normalise and resize them where the network wants it. A linen module that draws random
        numbers in training has a new stream.

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
    weights, about = read_node(path)
    try:
        fns = build_model(weights.model, about["num_classes"])
    except InputError as error:
        raise InputError(error.field, error.value, f"{error.allowed}; in {path}") from None
    if weights.input is not None:
        fns = with_input(fns, weights.input)
    images = jax.ShapeDtypeStruct((1, *about["image_shape"]), jnp.float32)
    field, rng = f"weights of {path}", jax.random.key(0)
    shapes, state_shapes = jax.eval_shape(fns.init, rng, images)
    params = unflatten(shapes, weights.params, field)
    model_state = unflatten(without_stream(state_shapes), weights.model_state, field)
    model_state = with_new_stream(model_state, state_shapes, rng)
    return taking_pixels(fns, about["input_divisor"]), params, model_state


def _input(image_shape: Sequence[int], divisor: float, wanted: Input | None) -> str:
    """What images a network takes, in words."""
    kind = {1: "grey, ", 3: "RGB, "}.get(image_shape[-1], "") if len(image_shape) == 3 else ""
    text = f"float32 [B, {', '.join(map(str, image_shape))}], {kind}uint8 divided by {divisor:g}"
    if wanted is None:
        return text
    size = "" if wanted.size is None else f", resized to {wanted.size} x {wanted.size}"
    return f"{text}{size}, minus {list(wanted.mean)}, divided by {list(wanted.std)}"


def read_node(path: str | os.PathLike[str]) -> tuple[NodeWeights, dict[str, Any]]:
    """The weights in a file of `save_node`, and what it says of them, by field.

    Raises:
        InputError: no such file, or one that is damaged.
    """
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
    wanted = Input()
    if "node_input" in texts:
        with texts_of("weights", path, "ktg.save_node"):
            given = checked_input("node_input", decoded("node_input", texts["node_input"]))
            wanted = resolved_input(given)
    tensors, _ = read_tensors(path, "weights")
    params = {k.removeprefix("params."): v for k, v in tensors.items() if _is_param(k)}
    model_state = {k: v for k, v in tensors.items() if not _is_param(k)}
    return NodeWeights(params, model_state, about["model"], str(path), wanted), about


def _is_param(name: str) -> bool:
    return name.startswith("params.")


def _is_count(value: Any, most: int) -> bool:
    return is_whole(value, 1) and value <= most


def _is_shape(value: Any) -> bool:
    sides = value if isinstance(value, list) and len(value) <= 4 else [0]
    return all(_is_count(side, 2**20) for side in sides) and math.prod(sides) < 2**31


def _is_divisor(value: Any) -> bool:
    return is_number(value) and 0 < value <= sys.float_info.max


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "model": lambda name: 0 < len(name) <= 255 and name.isprintable(),
    "num_classes": lambda number: _is_count(number, MOST_CLASSES),
    "image_shape": _is_shape,
    "input_divisor": _is_divisor,
}
"""The texts of a file that are read again, all but `model` as JSON, and what is right for each."""

_OF_OLDER_FILES = {"input_divisor": json.dumps(DIVISOR)}
"""What files that do not say it mean."""
