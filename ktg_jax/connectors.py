"""Connectors: what an edge puts behind its receiver where its two ends do not fit.

A connector maps what the receiver puts out to what the sender's has: channels of stages (the hints
of FitNets, Romero et al., 2015), or classes of logits. It is trained by the losses of its edge
alone. Its parameters are among the receiver's, beside those of the network, and are updated, saved
and resumed with them; the network itself knows nothing of them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ktg_jax.errors import InputError, did_you_mean
from ktg_jax.outputs import Outputs

CONNECTORS: Mapping[str, tuple[str, int]] = {
    "conv": ("stages", 1),
    "conv_conv": ("stages", 2),
    "linear": ("logits", 1),
    "linear_linear": ("logits", 2),
}
"""What each is put behind, and of how many layers it is; between two layers is a ReLU."""

KEY = "~connectors"
"""Where they are among the params of a node; no attribute of a module can have this name."""


class Connector(NamedTuple):
    """The connector of an edge. Static, and hashable.

    Attributes:
        receiver: index of the node that it is behind.
        sender: index of the node that it leads to.
        name: the key of its parameters among the receiver's: the sender's name.
        kinds: names of `CONNECTORS`.
    """

    receiver: int
    sender: int
    name: str
    kinds: tuple[str, ...]


def connector_kinds(field: str, given: Any) -> tuple[str, ...]:
    """The kinds in the text that says a connector, those of stages first.

    Raises:
        InputError: an unknown kind, or two that are put behind the same.

    >>> connector_kinds("connector", "linear + conv")
    ('conv', 'linear')
    """
    kinds = [kind.strip() for kind in given.split("+")] if isinstance(given, str) else [given]
    for kind in kinds:
        if not isinstance(kind, str) or kind not in CONNECTORS:
            known = f"{', '.join(CONNECTORS)}, or two of them as conv+linear"
            raise InputError(field, given, known + did_you_mean(kind, CONNECTORS))
    if len({CONNECTORS[kind][0] for kind in kinds}) < len(kinds):
        raise InputError(field, given, "one connector of stages and one of logits at most")
    return tuple(sorted(kinds, key=list(CONNECTORS).index))


def init_connector(
    kinds: tuple[str, ...], rng: jax.Array, receiver: Outputs, sender: Outputs
) -> dict[str, Any]:
    """The initial parameters of a connector: kernels by LeCun's rule, biases 0.

    Args:
        kinds: as `connector_kinds` returns them.
        rng: a random key.
        receiver: what the receiver puts out, of which only the shapes matter.
        sender: what the sender puts out, likewise; a stage for each of the receiver's.

    Returns:
        `{"stage1": {"layer1": {"kernel": [C, D], "bias": [D]}}, ..., "logits": ...}`, float32.

    Raises:
        InputError: stages that are missing, or of which there are not as many.

    >>> ends = Outputs(jnp.zeros((4, 10))), Outputs(jnp.zeros((4, 100)))
    >>> connector = init_connector(("linear",), jax.random.key(0), *ends)
    >>> connector["logits"]["layer1"]["kernel"].shape
    (10, 100)
    """
    params: dict[str, Any] = {}
    for kind in kinds:
        where, layers = CONNECTORS[kind]
        for part, (ours, theirs) in _parts(where, receiver, sender).items():
            width, widths = ours.shape[-1], {}
            for layer in range(1, layers + 1):
                key = jax.random.fold_in(rng, len(params) * 2 + layer)
                kernel = jax.nn.initializers.lecun_normal()(key, (width, theirs.shape[-1]))
                widths[f"layer{layer}"] = {"kernel": kernel, "bias": jnp.zeros(theirs.shape[-1])}
                width = theirs.shape[-1]
            params[part] = widths
    return params


def connected(params: Mapping[str, Any], receiver: Outputs, sender: Outputs) -> Outputs:
    """What the receiver puts out, as it is behind a connector.

    Args:
        params: as `init_connector` returns them.
        receiver: stages float `[B, h, w, C]`, or none, logits float `[..., C]`.
        sender: to whose height and width stages are resized, too.

    Returns:
        The receiver's outputs, those that the connector is behind float32 and of the sender's
        shapes; the others as they are.

    >>> layer = {"kernel": jnp.array([[1.0, -1.0]]), "bias": jnp.array([0.0, 2.0])}
    >>> ends = Outputs(jnp.array([[3.0]])), Outputs(jnp.zeros((1, 2)))
    >>> connected({"logits": {"layer1": layer}}, *ends).logits.tolist()
    [[3.0, -1.0]]
    """
    logits = receiver.logits
    if "logits" in params:
        logits = _through(params["logits"], logits)
    if "stage1" not in params or not receiver.stages:
        return receiver._replace(logits=logits)
    stages = [
        _through(params[part], _resized(ours, theirs.shape[1:-1]))
        for part, (ours, theirs) in _parts("stages", receiver, sender).items()
    ]
    return receiver._replace(logits=logits, stages=tuple(stages))


def with_connectors(params: Any, connectors: Mapping[str, Any]) -> Any:
    """The params of a node: those of its network, and its connectors by their names.

    Raises:
        InputError: the params of the network are no mapping.
    """
    if not isinstance(params, Mapping):
        raise InputError("connector", type(params).__name__, "a network whose params are a dict")
    return {**params, KEY: dict(connectors)}


def without_connectors(params: Any) -> tuple[Any, dict[str, Any]]:
    """The params of the network, and the connectors: the two parts of a node's params.

    >>> without_connectors({"kernel": 1, "~connectors": {"teacher": {}}})
    ({'kernel': 1}, {'teacher': {}})
    """
    if not isinstance(params, Mapping) or KEY not in params:
        return params, {}
    return {name: value for name, value in params.items() if name != KEY}, params[KEY]


def network_arrays(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Of a node's arrays by their paths, those of its network."""
    return {path: array for path, array in flat.items() if not path.startswith(f"{KEY}.")}


def _parts(where: str, receiver: Outputs, sender: Outputs) -> dict[str, tuple[Any, Any]]:
    """The outputs of both ends, by the name of what leads from one to the other."""
    if where == "logits":
        return {"logits": (receiver.logits, sender.logits)}
    ours, theirs = receiver.stages, sender.stages
    if not ours or len(ours) != len(theirs):
        allowed = f"{len(ours)}, one for each stage of the receiver" if ours else "some of both"
        raise InputError("stages", len(theirs), allowed)
    return {f"stage{g}": ends for g, ends in enumerate(zip(ours, theirs, strict=True), 1)}


def _resized(stage: jax.Array, size: tuple[int, ...]) -> jax.Array:
    if stage.shape[1:-1] == size:
        return stage
    return jax.image.resize(stage, (stage.shape[0], *size, stage.shape[-1]), "linear")


def _through(layers: Mapping[str, Any], values: jax.Array) -> jax.Array:
    values = values.astype(jnp.float32)
    for i, name in enumerate(sorted(layers)):
        values = jax.nn.relu(values) if i else values
        values = values @ layers[name]["kernel"] + layers[name]["bias"]
    return values
