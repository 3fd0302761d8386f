"""Whether a network can be trained on a data set: traced, before anything is computed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp

from ktg_jax.errors import InputError, in_a_line
from ktg_jax.io.trees import by_path
from ktg_jax.models.network import NodeFns, PyTree
from ktg_jax.models.returned import Shown, arrays, check_logits, check_pair, check_same_form


def check_network(
    fns: NodeFns,
    model: str,
    *,
    num_classes: int,
    image_shape: Sequence[int],
    batch_size: int,
    evaluation_size: int | None = None,
    axis: tuple[str, int] | None = None,
    field: str = "model",
) -> None:
    """Raises InputError unless a network can be trained and evaluated on such images.

    Its initialisation, a training pass and an evaluation pass are traced; nothing is computed.

    Args:
        fns: the network's functions.
        model: its name.
        num_classes: the logits that it is to have.
        image_shape: `(H, W, C)`.
        batch_size: images of a training pass on one device.
        evaluation_size: images of an evaluation pass; None: as many.
        axis: under `jax.pmap` the mapped axis and the number of its devices.
        field: what the error calls the network.

    >>> import ktg_jax as ktg
    >>> fns = ktg.from_linen(ktg.models.CNN(num_classes=7))
    >>> check_network(fns, "mine", num_classes=10, image_shape=(8, 8, 1), batch_size=4)
    Traceback (most recent call last):
    ktg_jax.errors.InputError: model: got 'mine'; allowed: a network that can be trained on images \
[4, 8, 8, 1] (logits: got float32[4, 7]; allowed: float[4, 10], one a class)
    """

    def images(number: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((number, *image_shape), jnp.float32)

    with _problems(field, model, "initialised", images(1)):
        rng = jax.eval_shape(lambda: jax.random.key(0))
        variables = jax.eval_shape(partial(_initialise, fns), rng, images(1))
    with _problems(field, model, "trained", images(batch_size)):
        training = partial(_pass, fns, True, num_classes)
        devices = None if axis is None else [axis]
        jax.make_jaxpr(training, axis_env=devices)(*variables, images(batch_size))
    number = evaluation_size or batch_size
    with _problems(field, model, "evaluated", images(number)):
        jax.eval_shape(partial(_pass, fns, False, num_classes), *variables, images(number))


def _initialise(fns: NodeFns, rng: jax.Array, images: jax.Array) -> tuple[PyTree, PyTree]:
    params, model_state = arrays(fns.init(rng, images))
    for path, leaf in by_path(params).items():
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise InputError(f"params {path}", Shown(leaf), "floats, for they are trained")
    return params, model_state


def _pass(
    fns: NodeFns,
    train: bool,
    num_classes: int,
    params: PyTree,
    model_state: PyTree,
    images: jax.Array,
) -> None:
    made = fns.apply(params, model_state, images, train)
    check_pair(made, "apply", "logits and the model state")
    check_logits(made[0], len(images), num_classes)
    if train:
        check_same_form(model_state, made[1])


@contextmanager
def _problems(field: str, model: str, done: str, images: jax.ShapeDtypeStruct) -> Iterator[None]:
    """What goes wrong within it, whatever it is, is the network's."""
    try:
        yield
    except Exception as error:
        allowed = f"a network that can be {done} on images {list(images.shape)}"
        raise InputError(field, model, f"{allowed} ({in_a_line(error)})") from error
