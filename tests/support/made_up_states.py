"""Training states of two nodes that nobody trained, one for each epoch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ktg_jax import GraphState

NAMES = ("student", "teacher.1")
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def state_of(epoch: int) -> GraphState:
    """A state unlike that of any other epoch; its second node is frozen."""
    rng = np.random.default_rng(epoch)

    def random_params() -> dict[str, Any]:
        kernel = rng.standard_normal((40, 3)).astype(np.float32)
        return {"dense": {"kernel": jnp.asarray(kernel), "bias": jnp.full(3, epoch)}}

    params = random_params(), random_params()
    model_state: tuple[Any, Any] = (
        {"batch_stats": {"mean": jnp.asarray(rng.random(3, np.float32))}},
        {},
    )
    opt_state = jax.tree.map(lambda x: x + epoch, OPTIMIZER.init(params[0])), None
    return GraphState(params, model_state, opt_state, jnp.asarray(10 * epoch, jnp.int32))


TEMPLATE = state_of(0)
