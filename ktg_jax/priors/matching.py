"""Which of a prior's filters speaks of which of the student's: the order of filters is arbitrary.

That the student's convolution starts from the prior's kernel is our reading of the patent ("the
filter parameters of the downscaling layer are passed to the second network"); that it takes all of
a prior that is a whole student, of kernels alone only the filters' directions, and the assignment
as an alternative, are ours.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from ktg_jax.connectors import network_arrays
from ktg_jax.errors import InputError
from ktg_jax.graph.node import MATCHINGS
from ktg_jax.io.trees import by_path, is_float, replaced, unflatten
from ktg_jax.models.network import PyTree
from ktg_jax.priors.prior import Prior, check_prior, normalised

SIZES = ("own", "prior")


def match_prior(
    params: PyTree, prior: Prior, matching: str = "initialise", *, normalise: str = "unit"
) -> tuple[PyTree, Prior]:
    """Matches a prior's filters to a student's, once, before the student is trained.

    Args:
        params: the student's initial parameters.
        prior: fitted for this student.
        matching: "initialise" or "kernels": the student starts from the prior's filters, with the
            sizes of its own (`initialised`; all that a prior's `start` says is `started`'s);
            "assignment": the prior's filters are permuted, per stage, so that they are as near as
            can be to the student's initial ones; "none": filter i speaks of filter i.
        normalise: how filters are compared, as for `normalised`.

    Returns:
        The parameters and the prior; changed is the one or the other, or none.

    Raises:
        InputError: another matching, or a prior of another student.

    >>> params = {"stage1_conv": {"kernel": jnp.array([[[[1.0, -1.0]]]])}}
    >>> prior = Prior((jnp.array([[[[-2.0, 2.0]]]]),), ("stage1_conv.kernel",))
    >>> match_prior(params, prior, "assignment")[1].kernels[0].tolist()
    [[[[2.0, -2.0]]]]
    """
    if matching not in MATCHINGS:
        raise InputError("matching", matching, ", ".join(MATCHINGS))
    check_prior(params, prior)
    if matching in ("initialise", "kernels"):
        return initialised(params, prior), prior
    if matching == "assignment":
        return params, assigned(params, prior, normalise=normalise)
    return params, prior


def initialised(params: PyTree, prior: Prior, *, size: str = "own") -> PyTree:
    """The parameters with the prior's filters put in.

    A filter of which the prior says nothing (norm below 1e-6) stays as it is.

    Args:
        params: the student's initial parameters.
        prior: fitted for this student.
        size: "own": a filter takes the prior's direction and keeps its own L2 norm. A prior is
            free of scale, and where normalisation follows a convolution, the filter's size is but
            the inverse of its learning rate: half as large, it turns four times as fast. "prior":
            it takes the size that the fit has left, too.

    Raises:
        InputError: a prior of another student, or another size.

    >>> params = {"stage1_conv": {"kernel": jnp.array([[[[1.0, 1.0]]]])}}
    >>> prior = Prior((jnp.array([[[[-3.0, 0.0]]]]),), ("stage1_conv.kernel",))
    >>> initialised(params, prior)["stage1_conv"]["kernel"].tolist()
    [[[[-1.0, 1.0]]]]
    """
    if size not in SIZES:
        raise InputError("size", size, ", ".join(SIZES))
    check_prior(params, prior)
    leaves, kernels = by_path(params), {}
    for path, kernel in zip(prior.paths, prior.kernels, strict=True):
        own, direction = leaves[path], normalised(kernel)
        says_nothing = jnp.all(direction == 0, axis=(0, 1, 2), keepdims=True)
        if size == "own":
            squares = jnp.square(own.astype(jnp.float32))
            kernel = direction * jnp.sqrt(jnp.sum(squares, axis=(0, 1, 2), keepdims=True))
        kernels[path] = jnp.where(says_nothing, own, kernel.astype(own.dtype))
    return replaced(params, kernels)


def started(params: PyTree, model_state: PyTree, prior: Prior) -> tuple[PyTree, PyTree]:
    """The parameters and the model state that a prior has a student start from.

    Args:
        params: the student's initial ones.
        model_state: the student's; what holds no floats (random streams) stays as it is.
        prior: with a `start`; without one both stay as they are.

    Raises:
        InputError: a prior of another student.

    >>> from ktg_jax.priors import whole_prior
    >>> fitted, own = ({"stem": {"kernel": jnp.full((1, 1, 1, 2), x)}} for x in (1.0, 0.0))
    >>> found, _ = started(own, {}, whole_prior(fitted, {}))
    >>> found["stem"]["kernel"].ravel().tolist()
    [1.0, 1.0]
    """
    if prior.start is None:
        return params, model_state
    trees = []
    for own, given in zip((params, model_state), prior.start, strict=True):
        leaves = network_arrays(by_path(own))  # connectors are of its edges
        floats = {path: leaf for path, leaf in leaves.items() if is_float(leaf)}
        unflatten(floats, {p: np.asarray(leaf) for p, leaf in given.items()}, "prior")
        trees.append(replaced(own, {p: jnp.asarray(given[p], floats[p].dtype) for p in floats}))
    return trees[0], trees[1]


def assigned(params: PyTree, prior: Prior, *, normalise: str = "unit") -> Prior:
    """The prior with the filters of each stage permuted to the student's nearest.

    Of all permutations the one with the least sum of squared distances between normalised filters,
    that is, with the least `prior_distance` (an assignment problem). On the host: not under jit.

    Raises:
        InputError: a prior of another student.

    >>> params = {"stage1_conv": {"kernel": jnp.array([[[[1.0, -1.0]]]])}}
    >>> prior = Prior((jnp.array([[[[-2.0, 2.0]]]]),), ("stage1_conv.kernel",))
    >>> assigned(params, prior).kernels[0].tolist()
    [[[[2.0, -2.0]]]]
    """
    from scipy.optimize import linear_sum_assignment  # takes a moment: only where needed

    check_prior(params, prior)
    leaves, kernels = by_path(params), []
    for path, kernel in zip(prior.paths, prior.kernels, strict=True):
        ours, theirs = (
            np.asarray(normalised(filters, normalise), np.float64).reshape(-1, kernel.shape[-1])
            for filters in (leaves[path], kernel)
        )
        # ||w - a||^2 = ||w||^2 + ||a||^2 - 2 <w, a>: only the last depends on who meets whom.
        _, order = linear_sum_assignment(ours.T @ theirs, maximize=True)
        kernels.append(jnp.asarray(kernel)[..., order])
    return dataclasses.replace(prior, kernels=tuple(kernels))
