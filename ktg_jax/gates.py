"""Gates: how much of each edge's loss reaches its receiver (KTG, section 3.2).

A gate turns the per-sample losses of an edge into a weight for each sample. With the training
progress p, and r = 1 where the *sender* classifies the sample correctly, else 0, a gate is four
numbers, and the weight is a + b p + (c + d p) r:

================  ==============  ===========================================================
gate              (a, b, c, d)    remark
================  ==============  ===========================================================
through           (1, 0, 0, 0)
cutoff            (0, 0, 0, 0)    no gradient: the same as no edge
linear            (0, 1, 0, 0)    p = k / k_end, the iteration k counted from 1
correct           (0, 0, 1, 0)
negative_linear   (1, -1, 0, 0)   our reading of the fifth gate of the paper's 2025 successor
================  ==============  ===========================================================

Gates are arrays, not Python values: one compiled program serves every gate matrix. The numbers are
differentiable, so a graph can be learned, and every graph of named gates is a point among them.
"""

import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ktg_jax.errors import InputError

GATES: tuple[str, ...] = ("through", "cutoff", "linear", "correct", "negative_linear")
"""The names of the papers' gates; the position of a name is the gate's integer code."""

CUTOFF: int = GATES.index("cutoff")

Coefficients: TypeAlias = tuple[float, float, float, float]
GateFunction: TypeAlias = Callable[..., jax.Array]

_COEFFICIENTS: dict[str, Coefficients] = {
    "through": (1.0, 0.0, 0.0, 0.0),
    "cutoff": (0.0, 0.0, 0.0, 0.0),
    "linear": (0.0, 1.0, 0.0, 0.0),
    "correct": (0.0, 0.0, 1.0, 0.0),
    "negative_linear": (1.0, -1.0, 0.0, 0.0),
}
_registered: dict[str, Coefficients | GateFunction] = {name: _COEFFICIENTS[name] for name in GATES}


def register_gate(name: str, gate: GateFunction | Sequence[float]) -> None:
    """Makes a gate available by name, to graphs, to files and to the experiments.

    Args:
        name: letters, digits and `_`; not one of `GATES`. One that was registered before is
            replaced.
        gate: the four numbers (a, b, c, d), or a function `gate(progress, receiver_right,
            sender_right, receiver, sender)` that returns a weight for each sample, float of the
            batch's shape: progress is a scalar in [0, 1], `receiver_right` and `sender_right` are
            bool of the batch's shape (on a label edge the sender is always right), `receiver` and
            `sender` the detached `Outputs` of the two nodes. No gradient reaches it.

    Raises:
        InputError: a malformed or a built-in name, or neither a function nor four finite numbers.

    >>> register_gate("linear", (0, 1, 0, 0))
    Traceback (most recent call last):
    ktg_jax.errors.InputError: name: got 'linear'; allowed: a name that no built-in gate has

    Such as `register_gate("half", (0.5, 0, 0, 0))`, or, for samples that the receiver gets wrong::

        def wrong(progress, receiver_right, sender_right, receiver, sender):
            return ~receiver_right

        register_gate("wrong", wrong)
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise InputError("name", name, "letters, digits and '_'")
    if name in GATES:
        raise InputError("name", name, "a name that no built-in gate has")
    if not callable(gate):
        allowed = "a function of five arguments, or four finite numbers"
        try:
            gate = tuple(float(number) for number in gate)
        except (TypeError, ValueError):
            raise InputError("gate", gate, allowed) from None
        if len(gate) != 4 or not np.isfinite(gate).all():
            raise InputError("gate", gate, allowed)
    _registered[name] = gate


def gate_names() -> tuple[str, ...]:
    """The names of all gates; the position of a name is the gate's integer code.

    >>> gate_names()[:5] == GATES
    True
    """
    return tuple(_registered)


def named_coefficients(name: str) -> Coefficients:
    """The four numbers of a gate that is no function.

    >>> named_coefficients("negative_linear")
    (1.0, -1.0, 0.0, 0.0)
    """
    gate = _registered[name]
    assert not callable(gate)
    return gate


def gate_functions() -> dict[str, GateFunction]:
    """The registered gates that are functions, by name."""
    return {name: gate for name, gate in _registered.items() if callable(gate)}


def gate_coefficients(codes: ArrayLike) -> jax.Array:
    """The four numbers (a, b, c, d) of each gate.

    Args:
        codes: int `[...]`, positions in `gate_names()`; usually `Graph.gate_codes`, `[N, N]`.

    Returns:
        float32 `[..., 4]`. An integer that is no gate's code, or that of a gate which is a function
        and no four numbers, gives NaN.

    >>> gate_coefficients(jnp.array([2, 4])).tolist()
    [[0.0, 1.0, 0.0, 0.0], [1.0, -1.0, 0.0, 0.0]]
    """
    codes = jnp.asarray(codes)
    chex.assert_type(codes, int)
    known = {code: gate for code, gate in enumerate(_registered.values()) if not callable(gate)}
    table = np.array([known.get(code, (0.0,) * 4) for code in range(len(_registered))], np.float32)
    is_known = jnp.isin(codes, jnp.array(list(known), codes.dtype))
    coefficients = jnp.asarray(table)[jnp.where(is_known, codes, 0)]
    # NaN is made only where a code is unknown: where NaN is looked for, it must not be found.
    return jnp.where(is_known[..., None], coefficients, jnp.nan)


def is_cut(gates: ArrayLike) -> jax.Array:
    """Which edges are cut: bool `[N, N]`, from codes or from coefficients (all four 0).

    >>> is_cut(jnp.array([[0, 1]])).tolist()
    [[False, True]]
    """
    gates = jnp.asarray(gates)
    return gates == CUTOFF if gates.ndim == 2 else jnp.all(gates == 0, axis=-1)


def gate_weights(gates: ArrayLike, progress: ArrayLike, sender_correct: ArrayLike) -> jax.Array:
    """Weighs each edge and sample by the edge's gate.

    Args:
        gates: int `[N, N]`, codes of `gate_names`, or float `[N, N, 4]`, coefficients; row =
            receiver, column = sender, diagonal = label edge. May be traced.
        progress: scalar in [0, 1], training progress k / k_end with the iteration k from 1.
        sender_correct: bool `[N, B]`, whether node s classifies sample b correctly; or bool
            `[N, N, B]`, the same for each edge. On the diagonal the sender is the label, which
            is always right, so there `correct` equals `through` whatever is given.

    Returns:
        float32 `[N, N, B]`. An integer that is no gate's code gives NaN, never a silent weight; so
        does that of a gate which is a function: `edge_losses` knows those, too.

    >>> gate_weights(jnp.array([[0]]), 0.5, jnp.array([[True, False]])).tolist()
    [[[1.0, 1.0]]]
    """
    coefficients = as_coefficients(gates)
    chex.assert_rank(sender_correct, {2, 3})
    right = jnp.asarray(sender_correct, bool)
    if right.ndim == 2:
        right = right[None]
    label_edge = jnp.eye(coefficients.shape[0], dtype=bool)[:, :, None]
    right = (right | label_edge).astype(jnp.float32)
    progress = jnp.asarray(progress, jnp.float32)
    a, b, c, d = (coefficients[:, :, i, None] for i in range(4))
    return a + b * progress + (c + d * progress) * right


def as_coefficients(gates: ArrayLike) -> jax.Array:
    """Gates as float32 `[N, N, 4]`, from codes, int `[N, N]`, or from coefficients."""
    gates = jnp.asarray(gates)
    chex.assert_rank(gates, {2, 3})
    if gates.ndim == 2:
        return gate_coefficients(gates)
    chex.assert_type(gates, float)
    chex.assert_axis_dimension(gates, 2, 4)
    return gates.astype(jnp.float32)
