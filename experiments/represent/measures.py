"""What a prior is like, beside a teacher's kernels and a student's: plain numbers."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ktg_jax.priors import Prior, prior_distance, recoding_threshold, soft_threshold

QUANTILES = tuple(i / 20 for i in range(21))
"""At which a picture shows what the sparse recoding penalty keeps."""


def singular_values(kernel: ArrayLike) -> np.ndarray:
    """The singular values of a kernel's filters, as shares of the largest.

    Args:
        kernel: float `[h, w, in, out]`, taken as a matrix with a row for each filter.

    Returns:
        float64 `[min(h w in, out)]`, descending from 1; zeros for a kernel of zeros.

    >>> singular_values(np.diag([4.0, 1.0, 2.0])[None, None]).round(3).tolist()
    [1.0, 0.5, 0.25]
    """
    filters = np.asarray(kernel, np.float64).reshape(-1, np.shape(kernel)[-1])
    values = np.linalg.svd(filters, compute_uv=False)
    return values / values[0] if values[0] > 0 else values


def prior_gradients(kernels: Sequence[ArrayLike], prior: Prior) -> list[np.ndarray]:
    """The gradient of each stage's distance from the prior, before the penalty.

    Args:
        kernels: the student's, float `[h, w, in, out]`, one for each of the prior's.
        prior: matched to the student.

    Returns:
        float32 `[h, w, in, out]` each.
    """
    student = {path: jnp.asarray(k) for path, k in zip(prior.paths, kernels, strict=True)}
    gradients = jax.grad(lambda ks: jnp.sum(prior_distance(ks, prior)))(student)
    return [np.asarray(gradients[path]) for path in prior.paths]


def share_kept(gradient: ArrayLike, quantile: float) -> float | None:
    """How much of a gradient the sparse recoding penalty keeps: a share of its squared norm.

    Args:
        gradient: float `[...]`.
        quantile: the quantile of the penalty, in [0, 1].

    Returns:
        In [0, 1]; None for a gradient of zeros, of which nothing can be kept.

    >>> share_kept([3.0, 4.0], 0.5)
    0.04
    """
    gradient = np.asarray(gradient, np.float64)
    whole = float(np.sum(gradient**2))
    if whole < 1e-20:  # filters that are equal, but for rounding
        return None
    kept = soft_threshold(gradient, recoding_threshold(gradient, quantile))
    return round(float(jnp.sum(jnp.square(kept))) / whole, 6)
