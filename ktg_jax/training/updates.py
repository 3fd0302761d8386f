"""A node's update by its optimiser, an optax transformation."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from ktg_jax.errors import InputError
from ktg_jax.models.network import PyTree

Optimizers: TypeAlias = optax.GradientTransformation | Sequence[optax.GradientTransformation]
"""One optimiser for all nodes, or one a node."""


def optimizers_of(optimizer: Optimizers, number: int) -> tuple[optax.GradientTransformation, ...]:
    """The optimiser of each of so many nodes.

    Raises:
        InputError: there are others than one a node.

    >>> len(optimizers_of(optax.sgd(0.1), 3))
    3
    """
    if isinstance(optimizer, optax.GradientTransformation):
        return (optimizer,) * number
    if len(optimizer) != number:
        raise InputError("optimizer", len(optimizer), f"one, or {number}, one a node")
    return tuple(optimizer)


class NoOptState(NamedTuple):
    """The state of a learning node whose optimiser has None; a frozen node's is None itself."""


def init_opt_state(optimizer: optax.GradientTransformation, params: PyTree) -> optax.OptState:
    """The optimiser's initial state for these params; never None.

    >>> sign = optax.GradientTransformation(lambda _: None, lambda g, state, params: (g, state))
    >>> init_opt_state(sign, {})
    NoOptState()
    """
    return _never_none(optimizer.init(params))


def check_states(
    opt_states: Sequence[Any],
    params: Sequence[PyTree],
    optimizers: Sequence[optax.GradientTransformation],
) -> None:
    """Raises InputError where all nodes look frozen, but only as their optimiser's state is None.

    Args:
        opt_states: the optimiser states of the nodes; as `init_state` makes them, the target's is
            not None.
        params: the parameters of the nodes.
        optimizers: those of the nodes.
    """
    if any(each is not None for each in opt_states) or not params:
        return
    if jax.eval_shape(optimizers[0].init, params[0]) is None:
        allowed = "NoOptState() for a node that learns, as init_state has it; None freezes a node"
        raise InputError("opt_state", tuple(opt_states), allowed)


def node_update(
    params: PyTree,
    opt_state: optax.OptState,
    gradients: PyTree,
    *,
    optimizer: optax.GradientTransformation,
    value: ArrayLike | None = None,
) -> tuple[PyTree, optax.OptState]:
    """A node's update by its own optimiser; returns the new params and optimiser state.

    Args:
        params: the node's parameters.
        opt_state: from `init_state`, or `optimizer.init(params)`; it is never None that comes back.
        gradients: in the shape of the params.
        optimizer: an optax transformation.
        value: scalar, the node's own loss, for an optimiser that asks for `value`, as
            `optax.contrib.reduce_on_plateau` does; others do not see it.

    Raises:
        InputError: an optimiser that asks for more, as line searches do.

    >>> import jax.numpy as jnp
    >>> optimizer = optax.sgd(0.5)
    >>> params = jnp.array([1.0])
    >>> node_update(params, optimizer.init(params), jnp.array([1.0]), optimizer=optimizer)[0]
    Array([0.5], dtype=float32)
    """
    update = optax.with_extra_args_support(optimizer).update
    extra = {} if value is None else {"value": value}
    asked = None if isinstance(opt_state, NoOptState) else opt_state
    try:
        updates, opt_state = update(gradients, asked, params, **extra)
    except TypeError as error:
        if "required keyword-only argument" not in str(error):
            raise
        allowed = "one that asks for the node's own loss (value) at most"
        raise InputError("optimizer", str(error), allowed) from None
    return optax.apply_updates(params, updates), _never_none(opt_state)


def averaged(model_state: PyTree, axis_name: str) -> PyTree:
    """A model state whose floats, such as running statistics, are the mean over the devices.

    Args:
        model_state: of a node, on each device its own.
        axis_name: the mapped axis.
    """

    def mean(leaf: jax.Array) -> jax.Array:
        is_float = jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact)
        return jax.lax.pmean(leaf, axis_name) if is_float else leaf

    return jax.tree.map(mean, model_state)


def _never_none(opt_state: Any) -> optax.OptState:
    return NoOptState() if opt_state is None else opt_state
