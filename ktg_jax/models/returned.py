"""Whether a network's functions return what a graph can use; found as they are traced."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from ktg_jax.errors import InputError
from ktg_jax.io.trees import by_path

_MOST_CHARACTERS = 200


def arrays(made: Any) -> tuple[Any, Any]:
    """What a network's `init` returned, params and model state, numbers in it as arrays.

    Raises:
        InputError: it is no pair, or something in it is neither an array nor a number.
    """
    check_pair(made, "init", "params and the model state")
    params, model_state = jax.tree.map(_array, tuple(made))
    return params, model_state


def _array(leaf: Any) -> Any:
    if is_array(leaf):
        return leaf
    if not isinstance(leaf, bool | int | float | complex):
        raise InputError("what init returns", leaf, "arrays alone")
    return jnp.asarray(leaf, jnp.result_type(leaf))


def check_pair(made: Any, function: str, pair: str) -> None:
    """Raises InputError unless a network's function returned a pair.

    Args:
        made: what it returned.
        function: its name.
        pair: what the pair is of, in words.
    """
    if not isinstance(made, tuple | list) or len(made) != 2:
        raise InputError(f"what {function} returns", Shown(made), f"a pair of {pair}")


def check_logits(logits: Any, batch_size: int | None, num_classes: int | None = None) -> None:
    """Raises InputError unless logits are float `[B, classes]`.

    Without a number of classes any will do, and `[B, ..., classes]`, as tokens have them.

    >>> check_logits(jnp.zeros((4, 7)), batch_size=4, num_classes=10)
    Traceback (most recent call last):
    ktg_jax.errors.InputError: logits: got float32[4, 7]; allowed: float[4, 10], one a class
    """
    if is_array(logits) and jnp.issubdtype(logits.dtype, jnp.floating):
        is_batch = len(logits.shape) >= 2 and batch_size in (None, logits.shape[0])
        if (num_classes is None and is_batch) or logits.shape == (batch_size, num_classes):
            return
    allowed = f"float[{batch_size or 'batch'}, {num_classes or 'classes'}], one a class"
    raise InputError("logits", Shown(logits), allowed)


def check_for_labels(logits: Any, labels: Any) -> None:
    """Raises InputError unless there is a float for each class of each labelled sample.

    >>> check_for_labels(jnp.zeros((4, 8, 8, 10)), jnp.zeros(4, int))
    Traceback (most recent call last):
    ktg_jax.errors.InputError: logits: got float32[4, 8, 8, 10]; allowed: float[4, classes], one ...
    """
    shape = jnp.shape(labels)
    if logits.shape[:-1] != shape:
        allowed = f"float[{', '.join(map(str, (*shape, 'classes')))}], one a class"
        raise InputError("logits", Shown(logits), allowed)


def check_same_form(before: Any, after: Any) -> None:
    """Raises InputError unless a model state has the arrays that it had, in shape and dtype.

    >>> check_same_form({"count": jnp.zeros(())}, {"count": jnp.zeros(2)})
    Traceback (most recent call last):
    ktg_jax.errors.InputError: model state count: got float32[2]; allowed: float32[], as before ...
    """
    was, now = by_path(before), by_path(after)
    for path in {**was, **now}:
        forms = [Shown(tree.get(path)) for tree in (was, now)]
        if repr(forms[0]) != repr(forms[1]):
            allowed = f"{forms[0]}, as before the training pass"
            raise InputError(f"model state {path}", forms[1], allowed)


def is_array(leaf: Any) -> bool:
    """Whether it is an array, JAX's or numpy's, or stands for one in a trace."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


class Shown:
    """A value whose text has dtypes and shapes in place of arrays.

    >>> Shown({"logits": jnp.zeros((4, 10)), "others": ("none", None)})
    {'logits': float32[4, 10], 'others': ('none', None)}
    """

    def __init__(self, value: Any) -> None:
        self._value = value

    def __repr__(self) -> str:
        if is_array(self._value):
            return f"{self._value.dtype}{list(self._value.shape)}"
        text = repr(jax.tree.map(lambda leaf: Shown(leaf) if is_array(leaf) else leaf, self._value))
        return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."


@contextmanager
def errors_of(what: str) -> Iterator[None]:
    """Within it, an InputError says what it is about."""
    try:
        yield
    except InputError as error:
        allowed = f"{error.allowed} ({what})"
        raise InputError(error.field, error.value, allowed) from error.__cause__
