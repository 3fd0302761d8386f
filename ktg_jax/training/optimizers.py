"""The papers' optimiser, another, what they can be told, and schedules: all plain optax."""

import fnmatch
from collections.abc import Sequence

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from ktg_jax.connectors import KEY
from ktg_jax.errors import InputError
from ktg_jax.io.trees import by_path, replaced
from ktg_jax.models.network import PyTree


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


def adamw(
    learning_rate: optax.ScalarOrSchedule = 1e-3, weight_decay: float = 0.05
) -> optax.GradientTransformation:
    """AdamW, with decoupled weight decay on all parameters, as vision transformers are trained.

    >>> import jax.numpy as jnp
    >>> optimizer, weight = adamw(learning_rate=0.1, weight_decay=0.5), jnp.array(1.0)
    >>> update, _ = optimizer.update(jnp.array(3.0), optimizer.init(weight), weight)
    >>> round(float(update), 3)  # -0.1 times 1 and the decay
    -0.15
    """
    return optax.adamw(learning_rate, weight_decay=weight_decay)


def clipped(
    optimizer: optax.GradientTransformation, most: float
) -> optax.GradientTransformationExtraArgs:
    """The optimiser, of gradients whose norm, of all together, is at most so much.

    >>> import jax.numpy as jnp
    >>> optimizer = clipped(optax.sgd(1.0), most=1.0)
    >>> updates, _ = optimizer.update([jnp.array(3.0), jnp.array(4.0)], optimizer.init([0.0, 0.0]))
    >>> [round(float(update), 3) for update in updates]
    [-0.6, -0.8]
    """
    return optax.chain(optax.clip_by_global_norm(most), optimizer)


def trainable(
    optimizer: optax.GradientTransformation, patterns: Sequence[str]
) -> optax.GradientTransformationExtraArgs:
    """The optimiser, of some parameters alone; the others stay as they are.

    Args:
        optimizer: sees the parameters that match, and no others.
        patterns: of paths as `stage3_block1.conv1.kernel`; `*` stands for anything, `?` for one
            character, `[ab]` for one of these. A path that matches one of them counts; those of
            connectors do, too.

    Raises:
        InputError: (its `init`) a pattern that no path matches.

    >>> import jax.numpy as jnp
    >>> optimizer = trainable(optax.sgd(1.0), ["head.*"])
    >>> params = {"head": {"bias": jnp.array(1.0)}, "stem": {"bias": jnp.array(1.0)}}
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> float(updates["head"]["bias"]), float(updates["stem"]["bias"])
    (-1.0, 0.0)
    """

    def labels(params: PyTree) -> PyTree:
        paths = by_path(params)
        for pattern in patterns:
            if not fnmatch.filter(paths, pattern):
                some = ", ".join([*paths][:3])
                raise InputError("trainable", pattern, f"a pattern of a path, such as {some}, ...")
        always = f"{KEY}.*"
        learn = {path for each in (*patterns, always) for path in fnmatch.filter(paths, each)}
        return replaced(params, {path: path in learn for path in paths})

    return optax.partition({True: optimizer, False: optax.set_to_zero()}, labels)


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
