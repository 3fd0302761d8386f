"""Mixing the images of a batch: mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019).

Each image is mixed with the next one of its batch, all of a batch in the same way. The functions
that look at pixels serve both numpy and JAX (`xp`): a host makes the batches that a device does.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ktg_jax.mixed import Mixed


class Mix(NamedTuple):
    """What each image of a batch is mixed with; every array has a leading axis B.

    Attributes:
        image_index: int32 `[B]`, the partner's position in the data set.
        offset: int32 `[B, 2]`, the shift of the partner's crop.
        flip: bool `[B]`, whether the partner is mirrored.
        weight: float32 `[B]`, of the image itself where both are laid over each other; 1: the
            partner is not seen there.
        side: float32 `[B]`, the side of the box cut out for the partner, as a share of the
            image's; 0: none is.
        centre: float32 `[B, 2]`, in [0, 1), of that box, which ends at the image's borders.
    """

    image_index: Any
    offset: Any
    flip: Any
    weight: Any
    side: Any
    centre: Any


def plan_mix(
    key: jax.Array, views: tuple[jax.Array, jax.Array, jax.Array], mixup: float, cutmix: float
) -> Mix:
    """Plans how a batch is mixed.

    The share of an image is drawn from Beta(alpha, alpha), once a batch. Where both kinds are
    asked for, each batch is mixed in one of them, with equal chances.

    Args:
        key: a random key.
        views: position, shift and mirroring of each image of the batch.
        mixup: the alpha of mixup; 0: none.
        cutmix: the alpha of CutMix; 0: none.
    """
    kind_key, share_key, box_key, centre_key = jax.random.split(key, 4)
    size = len(views[0])
    chance = jnp.float32(1.0 if not mixup else 0.5 if cutmix else 0.0)
    is_cut = jax.random.bernoulli(kind_key, chance)
    share = _beta(share_key, mixup)
    side = jnp.sqrt(1 - _beta(box_key, cutmix))
    centre = jax.random.uniform(centre_key, (2,), jnp.float32)
    image_index, offset, flip = (jnp.roll(each, -1, axis=0) for each in views)
    return Mix(
        image_index,
        offset,
        flip,
        weight=jnp.full(size, jnp.where(is_cut, jnp.float32(1), share)),
        side=jnp.full(size, jnp.where(is_cut, side, jnp.float32(0))),
        centre=jnp.broadcast_to(centre, (size, 2)),
    )


def _beta(key: jax.Array, alpha: float) -> jax.Array:
    alpha = alpha or 1.0  # drawn, but of no use
    return jax.random.beta(key, jnp.float32(alpha), jnp.float32(alpha), dtype=jnp.float32)


def blended(images: Any, partners: Any, mix: Mix, xp: Any = jnp) -> Any:
    """The mixed images.

    Args:
        images: float32 `[B, H, W, C]`.
        partners: likewise.
        mix: how they are mixed.
        xp: `jax.numpy` or `numpy`.
    """
    (rows, columns), weight = _box(mix, images.shape[1:3], xp), mix.weight[:, None, None, None]
    inside = rows[:, :, None, None] & columns[:, None, :, None]
    return xp.where(inside, partners, weight * images + (1 - weight) * partners)


def own_share(mix: Mix, size: tuple[int, int], xp: Any = jnp) -> Any:
    """The share of each label that is the image's own: float32 `[B]`, for images of `(H, W)`."""
    rows, columns = _box(mix, size, xp)
    area = xp.sum(rows, axis=1) * xp.sum(columns, axis=1) / xp.float32(size[0] * size[1])
    return xp.asarray(mix.weight * (1 - area), xp.float32)


def mixed_labels(
    labels: Any, image_index: Any, mix: Mix, size: tuple[int, int], xp: Any = jnp
) -> tuple[Any, Mixed]:
    """The labels of mixed images: of each the one that has more of it, and what is mixed in.

    Args:
        labels: int `[n]`, of the data.
        image_index: int32 `[B]`.
        mix: how they are mixed.
        size: `(H, W)`.
        xp: `jax.numpy` or `numpy`.
    """
    own, other, share = labels[image_index], labels[mix.image_index], own_share(mix, size, xp)
    is_own = share >= 0.5
    less = xp.where(is_own, other, own)
    return xp.where(is_own, own, other), Mixed(less, xp.maximum(share, 1 - share))


def _box(mix: Mix, size: tuple[int, int], xp: Any) -> list[Any]:
    """Which rows and which columns are the partner's alone: bool `[B, H]` and `[B, W]`."""
    found = []
    for axis, length in enumerate(size):
        cut = xp.floor(mix.side * xp.float32(length)).astype(xp.int32)
        centre = xp.floor(mix.centre[:, axis] * xp.float32(length)).astype(xp.int32)
        position = xp.arange(length, dtype=xp.int32)[None]
        low, high = centre - cut // 2, centre + cut // 2
        found.append((position >= low[:, None]) & (position < high[:, None]))
    return found
