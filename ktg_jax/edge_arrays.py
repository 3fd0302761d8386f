"""The edges of a graph as arrays: all that `edge_losses` and a compiled step know of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ktg_jax.connectors import Connector
from ktg_jax.errors import InputError
from ktg_jax.gates import gate_functions, gate_names
from ktg_jax.named_losses import named_loss

PAPER_LOSSES = ("cross_entropy", "kl")
"""What the paper's label and transfer edges carry."""


class Delayed(NamedTuple):
    """A stale sender: a node, and how many updates ago it said what is heard. Static, hashable.

    Attributes:
        sender: index of the node.
        delay: at least 1.
        changes: whether the node is another one by then.
    """

    sender: int
    delay: int
    changes: bool = True


@flax.struct.dataclass
class EdgeArrays:
    """All edges of a graph as arrays: what a compiled step takes as data. A pytree.

    N counts the nodes and, after them, the stale senders: as columns those are nodes of their own,
    and their rows are cut.

    Attributes:
        gates: int `[N, N]`, codes of `ktg_jax.gate_names`, or float `[N, N, 4]`, coefficients;
            row = receiver, column = sender, diagonal = label edge.
        weights: float `[L, N, N]`, of each loss on each edge.
        temperatures: float `[N, N]`, T > 0 of each edge.
        losses: L names of registered losses. Static: one program serves all graphs over the same
            models and losses.
        functions: names of the gates that are functions, and may occur. Static, too.
        connectors: those of the edges, static likewise; their parameters are the receivers'.
        delayed: the stale senders, static likewise.

    >>> EdgeArrays(jnp.zeros((1, 1), int), jnp.ones((2, 1, 1)), jnp.ones((1, 1))).needs_stages
    False
    """

    gates: Any
    weights: Any
    temperatures: Any
    losses: tuple[str, ...] = flax.struct.field(pytree_node=False, default=PAPER_LOSSES)
    functions: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    connectors: tuple[Connector, ...] = flax.struct.field(pytree_node=False, default=())
    delayed: tuple[Delayed, ...] = flax.struct.field(pytree_node=False, default=())

    @property
    def needs_stages(self) -> bool:
        """Whether the nodes' stage outputs are needed, not only their logits."""
        return any(named_loss(name).needs_stages for name in self.losses)


def edge_arrays(
    gates: ArrayLike | EdgeArrays,
    temperature: ArrayLike = 1.0,
    losses: Sequence[str] = PAPER_LOSSES,
    weights: ArrayLike | None = None,
) -> EdgeArrays:
    """The edges as arrays; those that are so already, as they are.

    Args:
        gates: codes `[N, N]`, coefficients `[N, N, 4]`, or an `EdgeArrays`.
        temperature: scalar, or float `[N, N]`.
        losses: L names of registered losses.
        weights: float `[L, N, N]`, or None: 1 each.

    Raises:
        InputError: weights of another shape, or an unknown loss.

    >>> edge_arrays(jnp.zeros((2, 2), int)).weights.shape
    (2, 2, 2)
    """
    if isinstance(gates, EdgeArrays):
        return gates
    n = jnp.shape(gates)[0]
    shape = (len(losses), n, n)
    for name in losses:
        named_loss(name)
    if weights is None:
        weights = np.ones(shape, np.float32)
    elif jnp.shape(weights) != shape:
        raise InputError("weights", jnp.shape(weights), f"{shape}: [losses, receiver, sender]")
    temperatures: Any
    if isinstance(temperature, jax.Array):  # traced, say; else nothing is computed here
        temperatures = jnp.broadcast_to(temperature.astype(jnp.float32), (n, n))
    else:
        temperatures = np.broadcast_to(np.asarray(temperature, np.float32), (n, n))
    return EdgeArrays(gates, weights, temperatures, tuple(losses), functions_among(gates))


def functions_among(gates: ArrayLike) -> tuple[str, ...]:
    """The registered gates that are functions and occur among these; all, where that is not known.

    Args:
        gates: codes `[N, N]`, also traced, or coefficients, which are no functions.
    """
    names = tuple(gate_functions())
    if jnp.ndim(gates) != 2 or isinstance(gates, jax.core.Tracer):
        return names if jnp.ndim(gates) == 2 else ()
    return tuple(name for name in names if gate_names().index(name) in np.asarray(gates))
