"""The papers' optimiser and its learning-rate schedules, as plain optax."""

from collections.abc import Sequence

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


def sgd(
    learning_rate: optax.ScalarOrSchedule = 0.1, weight_decay: float = 5e-4, momentum: float = 0.9
) -> optax.GradientTransformation:
    """The papers' SGD: Nesterov momentum and coupled weight decay on all parameters.

    Coupled: the decay is added to the gradient before the momentum, as PyTorch's SGD does.

    >>> import jax.numpy as jnp
    >>> optimizer, weight = sgd(learning_rate=1.0, weight_decay=0.5), jnp.array(1.0)
    >>> update, _ = optimizer.update(jnp.array(0.0), optimizer.init(weight), weight)
    >>> round(float(update), 3)  # -(1 + 0.9) times the decay
    -0.95
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum=momentum, nesterov=True),
    )


def step_schedule(
    learning_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
    milestones: Sequence[float] = (0.3, 0.6, 0.9),
) -> optax.Schedule:
    """Times 0.1 at each milestone, a share of the training.

    The default is the papers' epochs 60, 120 and 180 of 200.

    >>> schedule = step_schedule(0.1, 200)
    >>> [round(float(schedule(k)), 6) for k in (0, 59, 60, 199)]
    [0.1, 0.1, 0.01, 0.0001]
    """
    boundaries: dict[int, float] = {}
    for share in milestones:  # in a short training several may fall on one step
        step = max(round(share * total_steps), 1)
        boundaries[step] = 0.1 * boundaries.get(step, 1.0)
    return _warmed_up(
        optax.piecewise_constant_schedule(learning_rate, boundaries), learning_rate, warmup_steps
    )


def cosine_schedule(
    learning_rate: float, total_steps: int, warmup_steps: int = 0
) -> optax.Schedule:
    """Half a cosine from `learning_rate` to 0 over the training.

    >>> [round(float(cosine_schedule(0.1, 100)(k)), 3) for k in (0, 50, 100)]
    [0.1, 0.05, 0.0]
    """
    return _warmed_up(
        optax.cosine_decay_schedule(learning_rate, total_steps), learning_rate, warmup_steps
    )


def _warmed_up(schedule: optax.Schedule, learning_rate: float, warmup_steps: int) -> optax.Schedule:
    """The schedule, but with the first steps rising linearly to the learning rate."""
    if warmup_steps == 0:
        return _of_floats(schedule)
    ramp = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, warmup_steps - 1)

    def warmed_up(count: ArrayLike) -> ArrayLike:
        return optax.join_schedules([ramp, lambda k: schedule(k + warmup_steps)], [warmup_steps])(
            count
        )

    return _of_floats(warmed_up)


def _of_floats(schedule: optax.Schedule) -> optax.Schedule:
    """The schedule of a float count: optax's mix integers and floats, which JAX can be told to bar.

    A float32 counts exactly to 16 million.
    """

    def of_float(count: ArrayLike) -> ArrayLike:
        return schedule(count if isinstance(count, int) else jnp.asarray(count, jnp.float32))

    return of_float
