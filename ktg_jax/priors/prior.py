"""A prior: kernels that a student's convolutions are to resemble, and how much they do.

That priors are kernels of single convolutions, compared filter by filter and free of scale, is our
reading of KR's "distribution of the parameters"; see `ktg_jax.priors`.
"""

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ktg_jax.checks import check_share
from ktg_jax.errors import InputError
from ktg_jax.io.trees import by_path, is_float
from ktg_jax.models.network import PyTree
from ktg_jax.priors.recoding import (
    dead_zone_loss,
    l1_recoding,
    recoding_threshold,
)
from ktg_jax.priors.stages import KernelShapes

NORMALISATIONS = ("unit", "standard")


@flax.struct.dataclass
class Prior:
    """What is known of a student's parameters before it is trained. A pytree.

    Attributes:
        kernels: float32 `[h, w, in, out]`, of one or more convolutions; filter i is `[..., i]`.
            A filter of zeros says nothing of its counterpart.
        paths: the student's parameter that each kernel speaks of, such as
            `stage1_block1.conv2.kernel`. Static.
        start: all that a student is to start from, its parameters and its model state, each by
            path; None: it has its kernels alone.

    >>> prior = Prior((jnp.ones((3, 3, 1, 2)),), ("stage1_conv.kernel",))
    >>> prior.shapes
    {'stage1_conv.kernel': (3, 3, 1, 2)}
    """

    kernels: tuple[jax.Array, ...]
    paths: tuple[str, ...] = flax.struct.field(pytree_node=False)
    start: tuple[Mapping[str, ArrayLike], Mapping[str, ArrayLike]] | None = None

    @property
    def shapes(self) -> KernelShapes:
        """The kernels' shapes by path, as `stage_kernels` gives a student's."""
        return dict(zip(self.paths, (tuple(kernel.shape) for kernel in self.kernels), strict=True))


def whole_prior(params: PyTree, model_state: PyTree) -> Prior:
    """A prior of all that a fitted student is: its convolutions' kernels, and what it starts from.

    Args:
        params: the student's.
        model_state: the student's. Random streams are left out: they are each run's own.

    Raises:
        InputError: no convolutions.

    >>> params = {"stem": {"kernel": jnp.ones((1, 1, 1, 2))}, "head": {"bias": jnp.zeros(2)}}
    >>> prior = whole_prior(params, {"mean": jnp.zeros(2)})
    >>> prior.paths, [sorted(part) for part in prior.start]
    (('stem.kernel',), [['head.bias', 'stem.kernel'], ['mean']])
    """
    leaves, state = (
        {path: np.asarray(leaf) for path, leaf in by_path(tree).items() if is_float(leaf)}
        for tree in (params, model_state)
    )
    kernels = {path: leaf for path, leaf in leaves.items() if leaf.ndim == 4}
    if not kernels:
        raise InputError("params", sorted(leaves)[:3], "those of a network with convolutions")
    arrays = tuple(map(jnp.asarray, kernels.values()))
    return Prior(arrays, tuple(kernels), start=(leaves, state))


def check_prior(params: PyTree, prior: Prior) -> None:
    """Raises InputError unless the prior speaks of these parameters; names the first that differs.

    Args:
        params: the student's; arrays, traced or not, or their shapes.
        prior: kernels for some of them.
    """
    leaves = by_path(params)
    for path, shape in prior.shapes.items():
        if path not in leaves:
            raise InputError("prior", path, "a prior fitted for this student (no such parameter)")
        expected = tuple(leaves[path].shape)
        if expected != shape:
            allowed = f"a prior fitted for this student, where it has shape {expected}"
            raise InputError(f"prior {path}", shape, allowed)


def normalised(kernel: ArrayLike, normalise: str = "unit") -> jax.Array:
    """Divides each filter by its size, so that only its direction is left.

    Args:
        kernel: float `[..., out]`.
        normalise: "unit": each filter has L2 norm 1; "standard": its mean is 0, too (z-scores,
            divided by the root of their number).

    Returns:
        float32, in the shape of the kernel. A filter with a norm below 1e-6 becomes zeros, with
        no gradient: it has no direction.

    Raises:
        InputError: another normalisation.

    >>> normalised(jnp.array([[3.0, 0.0], [4.0, 0.0]])).round(3).tolist()
    [[0.6000000238418579, 0.0], [0.800000011920929, 0.0]]
    """
    if normalise not in NORMALISATIONS:
        raise InputError("normalise", normalise, ", ".join(NORMALISATIONS))
    kernel = jnp.asarray(kernel, jnp.float32)
    axes = tuple(range(kernel.ndim - 1))
    if normalise == "standard":
        kernel -= jnp.mean(kernel, axes, keepdims=True)
    square = jnp.sum(jnp.square(kernel), axes, keepdims=True)
    is_nothing = square <= 1e-12  # false for NaN, which is to be seen
    return jnp.where(is_nothing, 0.0, kernel * jax.lax.rsqrt(jnp.where(is_nothing, 1.0, square)))


def prior_distance(
    params: PyTree, prior: Prior, *, normalise: str = "unit", dead_zone: float = 0.0
) -> jax.Array:
    """How far each of its kernels is from the prior: (1 / out) sum_i ||z(w_i) - z(a_i)||^2.

    Filters are compared index by index, in the student's order and the prior's; `match_prior`
    makes the orders agree. z is `normalised`.

    Args:
        params: the student's parameters.
        prior: receives no gradient.
        normalise: as for `normalised`.
        dead_zone: a quantile in [0, 1]: the loss form of the sparse recoding penalty. Residuals
            count only as far as their magnitude exceeds this quantile of all in the kernel,
            max(|r| - tau, 0)^2 in place of r^2; 0: all.

    Returns:
        float32 `[G]`: 0 where every filter has the prior's direction, 4 where every one has the
        opposite. A prior filter of zeros adds 1, with no gradient.

    Raises:
        InputError: a prior of another student, or a bad option.

    >>> params = {"stage1_conv": {"kernel": jnp.ones((1, 1, 1, 2))}}
    >>> prior = Prior((jnp.array([[[[2.0, -2.0]]]]),), ("stage1_conv.kernel",))
    >>> prior_distance(params, prior).tolist()
    [2.0]
    """
    check_share("dead_zone", dead_zone)
    check_prior(params, prior)
    leaves, distances = by_path(params), []
    for path, kernel in zip(prior.paths, prior.kernels, strict=True):
        target = jax.lax.stop_gradient(normalised(kernel, normalise))
        residual = normalised(leaves[path], normalise) - target
        losses = 2 * dead_zone_loss(residual, recoding_threshold(residual, dead_zone))
        distances.append(jnp.sum(losses) / kernel.shape[-1])
    return jnp.array(distances)


def prior_loss(
    params: PyTree, prior: Prior, *, normalise: str = "unit", dead_zone: float = 0.0
) -> jax.Array:
    """The prior's loss: the mean over stages of `prior_distance`; arguments as there.

    Returns:
        float32 scalar `[]`, in [0, 4]. Only kernels that the prior speaks of receive a gradient.

    >>> params = {"stage1_conv": {"kernel": jnp.full((3, 3, 1, 2), 0.5)}}
    >>> prior = Prior((jnp.ones((3, 3, 1, 2)),), ("stage1_conv.kernel",))
    >>> float(prior_loss(params, prior))
    0.0
    """
    return jnp.mean(prior_distance(params, prior, normalise=normalise, dead_zone=dead_zone))


def recoding_loss(
    params: PyTree, prior: Prior, penalty: float, *, normalise: str = "unit"
) -> jax.Array:
    """The L1 alternative: filters are recoded as alpha_i a_i, alpha sparse, and drawn to that.

    (1 / out) sum_i of ||z(w_i) - alpha_i z(a_i)||^2 + 2 penalty |alpha_i|, mean over stages, with
    alpha the minimiser (`l1_recoding`), which needs no gradient of its own. A filter whose cosine
    with its counterpart is within +-penalty has alpha 0 and is left alone.

    Args:
        params: the student's parameters.
        prior: receives no gradient.
        penalty: finite, not negative; from 1 on no filter is drawn anywhere.
        normalise: as for `normalised`.

    Returns:
        float32 scalar `[]`, in [0, 1].

    Raises:
        InputError: a prior of another student, or a bad option.

    >>> params = {"stage1_conv": {"kernel": jnp.ones((1, 1, 1, 2))}}
    >>> prior = Prior((jnp.ones((1, 1, 1, 2)),), ("stage1_conv.kernel",))
    >>> [float(recoding_loss(params, prior, penalty)) for penalty in (0.0, 0.5, 1.0)]
    [0.0, 0.75, 1.0]
    """
    if isinstance(penalty, bool) or not 0 <= penalty < float("inf"):  # an array may say it, too
        raise InputError("penalty", penalty, "a finite number of at least 0")
    check_prior(params, prior)
    leaves, losses = by_path(params), []
    for path, kernel in zip(prior.paths, prior.kernels, strict=True):
        ours = normalised(leaves[path], normalise)
        theirs = jax.lax.stop_gradient(normalised(kernel, normalise))
        alpha = jax.lax.stop_gradient(l1_recoding(ours, theirs, penalty))
        squares = jnp.sum(jnp.square(ours - jnp.expand_dims(alpha, range(ours.ndim - 1)) * theirs))
        losses.append((squares + 2 * penalty * jnp.sum(jnp.abs(alpha))) / kernel.shape[-1])
    return jnp.mean(jnp.array(losses))
