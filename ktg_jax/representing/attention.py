"""Attention transfer, a posterior partner of priors (Zagoruyko & Komodakis, ICLR 2017)."""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from ktg_jax.errors import InputError


def attention_transfer_loss(
    student_stages: Sequence[ArrayLike], teacher_stages: Sequence[ArrayLike]
) -> jax.Array:
    """Where the student looks, as against where the teacher looks; activation-based (section 3.1).

    A stage's attention map is the mean over channels of the squared output, flattened and divided
    by its L2 norm; the loss is the mean squared difference of the maps, over samples and
    positions, summed over stages. The authors weigh it by 1,000 (beta). Of maps whose sizes differ,
    the larger is averaged to the smaller's size.

    Args:
        student_stages: a float `[B, h, w, C]` for each stage.
        teacher_stages: as many; height, width and channels may be others. Receive no gradient.

    Returns:
        float32 scalar `[]`.

    Raises:
        InputError: other than one teacher stage for each student stage.

    >>> left, right = jnp.array([[[[1.0], [0.0]]]]), jnp.array([[[[0.0], [2.0]]]])
    >>> float(attention_transfer_loss([left], [right])), float(
    ...     attention_transfer_loss([left], [3 * left]))
    (1.0, 0.0)
    """
    if len(student_stages) != len(teacher_stages):
        allowed = f"{len(student_stages)}, as many as the student has"
        raise InputError("teacher_stages", len(teacher_stages), allowed)
    losses = []
    for student, teacher in zip(student_stages, teacher_stages, strict=True):
        chex.assert_rank([student, teacher], 4)
        chex.assert_equal_shape_prefix([student, teacher], 1)
        maps = [_energy(student), _energy(jax.lax.stop_gradient(teacher))]
        height, width = (min(energy.shape[axis] for energy in maps) for axis in (1, 2))
        ours, theirs = (_attention(_averaged(energy, height, width)) for energy in maps)
        losses.append(jnp.mean(jnp.square(ours - theirs)))
    return jnp.sum(jnp.array(losses))


def _energy(output: ArrayLike) -> jax.Array:
    return jnp.mean(jnp.square(jnp.asarray(output, jnp.float32)), axis=-1)


def _attention(energy: jax.Array) -> jax.Array:
    flat = energy.reshape(len(energy), -1)
    return flat / optax.safe_norm(flat, 1e-12, axis=1, keepdims=True)


def _averaged(energy: jax.Array, height: int, width: int) -> jax.Array:
    """Averages maps `[B, h, w]` over cells, to `[B, height, width]`."""
    rows, columns = _cells(energy.shape[1], height), _cells(energy.shape[2], width)
    return jnp.einsum("bhw,ih,jw->bij", energy, rows, columns)


def _cells(size: int, cells: int) -> np.ndarray:
    """`[cells, size]`: the share of each position in each cell; cells may overlap by a position."""
    position, cell = np.arange(size), np.arange(cells)[:, None]
    start, end = cell * size // cells, -(-(cell + 1) * size // cells)
    inside = (start <= position) & (position < end)
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)
