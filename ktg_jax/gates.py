"""Gates: how much of each edge's loss reaches its receiver (KTG, section 3.2).

A gate turns the per-sample losses of an edge into a weight for each sample:

================  ======  ===========================================================
gate              weight  remark
================  ======  ===========================================================
through           1
cutoff            0       no gradient: the same as no edge
linear            p       p = training progress k / k_end, k counted from 1
correct           0 or 1  1 where the *sender* classifies the sample correctly
negative_linear   1 - p   our reading of the fifth gate of the paper's 2025 successor
================  ======  ===========================================================

Gates are integer arrays, not Python values: one compiled program serves every gate matrix.
"""

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

GATES: tuple[str, ...] = ("through", "cutoff", "linear", "correct", "negative_linear")
"""The gate names; the position of a name is the gate's integer code."""

CUTOFF: int = GATES.index("cutoff")


def gate_weights(gates: ArrayLike, progress: ArrayLike, sender_correct: ArrayLike) -> jax.Array:
    """Weighs each edge and sample by the edge's gate.

    Args:
        gates: int `[N, N]`, codes of `GATES`; row = receiver, column = sender, diagonal = label
            edge. May be traced.
        progress: scalar in [0, 1], training progress k / k_end with the iteration k from 1.
        sender_correct: bool `[N, B]`, whether node s classifies sample b correctly; or bool
            `[N, N, B]`, the same for each edge. On the diagonal the sender is the label, which
            is always right, so there `correct` equals `through` whatever is given.

    Returns:
        float32 `[N, N, B]`. An integer that is no gate's code gives NaN, never a silent weight.

    >>> gate_weights(jnp.array([[0]]), 0.5, jnp.array([[True, False]])).tolist()
    [[[1.0, 1.0]]]
    """
    gates = jnp.asarray(gates)
    chex.assert_rank(gates, 2)
    chex.assert_type(gates, int)
    chex.assert_rank(sender_correct, {2, 3})
    correct = jnp.asarray(sender_correct, bool)
    if correct.ndim == 2:
        correct = correct[None]
    label_edge = jnp.eye(gates.shape[0], dtype=bool)[:, :, None]
    correct = (correct | label_edge).astype(jnp.float32)
    progress = jnp.asarray(progress, jnp.float32)
    weight_of = {
        "through": jnp.ones_like(correct),
        "cutoff": jnp.zeros_like(correct),
        "linear": jnp.full_like(correct, progress),
        "correct": correct,
        "negative_linear": jnp.full_like(correct, 1.0 - progress),
    }
    is_gate = [jnp.asarray(gates == code)[:, :, None] for code in range(len(GATES))]
    weights = jnp.select(is_gate, [weight_of[name] for name in GATES])
    # As the default of `select` the NaN would be made where every gate is known, too, and
    # `jax_debug_nans` would stop there.
    is_known = ((gates >= 0) & (gates < len(GATES)))[:, :, None]
    return jnp.where(is_known, weights, jnp.nan)
