"""A prior as a distribution over filters, in whatever order: no filter is matched to another.

The abstract speaks of "the distribution of the parameters". Elsewhere our reading compares filter
with filter; this alternative compares what all filters of a kernel are together, by the sliced
Wasserstein distance (Rabin et al., 2011).
"""

import jax
import jax.numpy as jnp

from ktg_jax.io.trees import by_path
from ktg_jax.models.network import PyTree
from ktg_jax.priors.prior import Prior, check_prior, normalised

_DIRECTIONS = 64


def distribution_distance(
    params: PyTree, prior: Prior, *, normalise: str = "unit", directions: int = _DIRECTIONS
) -> jax.Array:
    """How far the filters of each kernel are from the prior's, taken as two sets of points.

    Each filter is `normalised`, a point of d = h w in dimensions. Along random directions, the same
    for kernels of one shape, the points of both are sorted and the i-th compared with the i-th:
    d times the mean square, over directions and filters. With the filters in the right order that
    is never more than `prior_distance`, but for the choice of directions.

    Args:
        params: the student's parameters.
        prior: receives no gradient.
        normalise: as for `normalised`.
        directions: how many.

    Returns:
        float32 `[G]`, 0 where the filters are the prior's in any order.

    Raises:
        InputError: a prior of another student, or another normalisation.

    >>> params = {"stage1_conv": {"kernel": jnp.array([[[[2.0, -2.0]]]])}}
    >>> prior = Prior((jnp.array([[[[-1.0, 1.0]]]]),), ("stage1_conv.kernel",))
    >>> distribution_distance(params, prior).tolist()
    [0.0]
    """
    check_prior(params, prior)
    leaves, distances = by_path(params), []
    for path, kernel in zip(prior.paths, prior.kernels, strict=True):
        ours = normalised(leaves[path], normalise).reshape(-1, kernel.shape[-1])
        theirs = jax.lax.stop_gradient(normalised(kernel, normalise)).reshape(ours.shape)
        lines = jax.random.normal(jax.random.key(0), (directions, len(ours)))
        lines /= jnp.linalg.norm(lines, axis=1, keepdims=True)
        apart = jnp.sort(lines @ ours, axis=1) - jnp.sort(lines @ theirs, axis=1)
        distances.append(len(ours) * jnp.mean(jnp.square(apart)))
    return jnp.array(distances)
