"""Weights for tests."""

from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from ktg_jax.models.network import NodeFns, PyTree


def random_variables(fns: NodeFns, images: ArrayLike, seed: int) -> tuple[PyTree, PyTree]:
    """Params and batch statistics of a network, none of them 0 or 1: also scales and variances.

    Says more than a network's own initialisation, and needs no compilation.
    """
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.standard_normal(leaf.shape)
        kind = path[-1].key
        if kind == "kernel":
            values *= np.sqrt(2 / np.prod(leaf.shape[:-1]))
        elif kind in ("scale", "var"):
            values = np.exp(0.3 * values)
        else:
            values *= 0.1
        return values.astype(np.float32)

    shapes = jax.eval_shape(fns.init, jax.random.key(0), images)
    params, model_state = jax.tree_util.tree_map_with_path(draw, shapes)
    return params, model_state
