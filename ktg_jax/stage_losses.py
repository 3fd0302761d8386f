"""Losses on what the stages of networks put out: where a node looks, and what it sees there.

Attention transfer (Zagoruyko & Komodakis, ICLR 2017) compares where two networks look, of whatever
width; feature transfer what they see, of one shape. Both are posterior knowledge, as logits are:
a transfer edge may carry them beside or in place of the divergence (`ktg_jax.Edge`).
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ktg_jax.errors import InputError

Stages: TypeAlias = Sequence[ArrayLike]
"""The output of each stage of a network, float `[B, h, w, C]`."""

Views: TypeAlias = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
Compared: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


def attention_transfer_loss(student_stages: Stages, teacher_stages: Stages) -> jax.Array:
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
    return jnp.mean(attention_losses(student_stages, _detached(teacher_stages)))


def feature_transfer_loss(student_stages: Stages, teacher_stages: Stages) -> jax.Array:
    """What the student sees at each position, as against what the teacher sees there.

    The squared distance of stage outputs, each sample's divided by its L2 norm: mean over samples,
    summed over stages. Hints (FitNets, Romero et al., 2015) without their scale. The shapes must
    agree, by a connector of the edge or by a teacher that projects its stages, if need be.

    Args:
        student_stages: a float `[B, h, w, C]` for each stage.
        teacher_stages: as many, of the same shapes. Receive no gradient.

    Returns:
        float32 scalar `[]`, at most 4 a stage.

    Raises:
        InputError: other than one teacher stage of the same shape for each student stage.

    >>> here, there = jnp.array([[[[1.0, 0.0]]]]), jnp.array([[[[0.0, 2.0]]]])
    >>> float(feature_transfer_loss([here], [there])), float(feature_transfer_loss([here], [here]))
    (2.0, 0.0)
    """
    return jnp.mean(feature_losses(student_stages, _detached(teacher_stages)))


def attention_losses(receiver: Stages, sender: Stages) -> jax.Array:
    """Sum over stages of the mean squared difference of attention maps, float32 `[B]`."""
    return _compared(receiver, sender, _attention_maps, _mean_difference)


def attention_products(receiver: Stages, sender: Stages) -> jax.Array:
    """Sum over stages of the inner product of attention maps, float32 `[B]`.

    Minimised it makes nodes look elsewhere (Okamoto et al., 2021: Att-, on the last stage).

    >>> left, right = jnp.array([[[[1.0], [0.0]]]]), jnp.array([[[[0.0], [2.0]]]])
    >>> attention_products([left], [right]).tolist(), attention_products([left], [left]).tolist()
    ([0.0], [1.0])
    """
    return _compared(receiver, sender, _attention_maps, _product)


def _attention_maps(ours: jax.Array, theirs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where two networks look, `[B, h, w]` each, of the smaller one's size."""
    chex.assert_equal_shape_prefix([ours, theirs], 1)
    energies = [jnp.mean(jnp.square(output), axis=-1) for output in (ours, theirs)]
    height, width = (min(energy.shape[axis] for energy in energies) for axis in (1, 2))
    first, second = (_averaged(energy, height, width) for energy in energies)
    return first, second


def _mean_difference(ours: jax.Array, theirs: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(ours - theirs), axis=1)


def _total_difference(ours: jax.Array, theirs: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(ours - theirs), axis=1)


def _product(ours: jax.Array, theirs: jax.Array) -> jax.Array:
    return jnp.sum(ours * theirs, axis=1)


def feature_losses(receiver: Stages, sender: Stages) -> jax.Array:
    """Sum over stages of the squared distance of normalised outputs, float32 `[B]`."""

    def outputs(ours: jax.Array, theirs: jax.Array) -> tuple[jax.Array, jax.Array]:
        if ours.shape != theirs.shape:
            allowed = f"{ours.shape}, as the receiver's, or an edge with a connector such as conv"
            raise InputError("a sender's stage output", theirs.shape, allowed)
        return ours, theirs

    return _compared(receiver, sender, outputs, _total_difference)


def _compared(
    receiver: Stages,
    sender: Stages,
    views: Views,
    compare: Compared,
) -> jax.Array:
    """Normalised views of each stage, compared, summed over stages, `[B]`."""
    if len(receiver) != len(sender):
        allowed = f"{len(receiver)}, as many as the student has"
        raise InputError("teacher_stages", len(sender), allowed)
    losses = []
    for ours, theirs in zip(receiver, sender, strict=True):
        for output in (ours, theirs):
            if np.ndim(output) != 4:
                raise InputError("a stage's output", np.shape(output), "[B, h, w, C]")
        ours, theirs = views(jnp.asarray(ours, jnp.float32), jnp.asarray(theirs, jnp.float32))
        losses.append(compare(_normalised(ours), _normalised(theirs)))
    if not losses:
        raise InputError("teacher_stages", 0, "at least one stage")
    return jnp.sum(jnp.stack(losses), axis=0)


def _normalised(array: jax.Array) -> jax.Array:
    """Flattens each sample and divides it by its L2 norm: `[B, ...]` to `[B, n]`.

    One with a norm below 1e-12 becomes zeros, with no gradient: it has no direction. One with a
    norm that is not finite, or beyond float32's square root, becomes NaN.
    """
    flat = array.reshape(len(array), -1)
    square = jnp.sum(jnp.square(flat), axis=1, keepdims=True)
    is_nothing = square <= 1e-24  # false for NaN, which is to be seen
    norm_square = jnp.where(is_nothing, 1.0, jnp.where(square == jnp.inf, jnp.nan, square))
    return jnp.where(is_nothing, 0.0, flat * jax.lax.rsqrt(norm_square))


def _detached(stages: Stages) -> list[jax.Array]:
    return [jax.lax.stop_gradient(jnp.asarray(output)) for output in stages]


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
