"""How a student is fitted to its teacher before it is trained: a few hundred steps of Adam."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from ktg_jax.checks import is_whole
from ktg_jax.errors import DivergedError, InputError
from ktg_jax.io.trees import FlatTree, is_float, unflatten
from ktg_jax.models.network import NodeFns, PyTree
from ktg_jax.priors.channels import Variables
from ktg_jax.training.batches import Batches, steps_per_epoch, take_batch

Metrics: TypeAlias = dict[str, jax.Array]
Data: TypeAlias = tuple[jax.Array, jax.Array]

STATISTICS_BATCHES = 100
"""Batches that normalisation takes its statistics from anew."""

CHECKED_EVERY = 50
"""Updates after which it is looked whether a fit has diverged."""

_LITTLE = 1e-3
_SAME = 1e-4


@dataclass(frozen=True)
class FitPlan:
    """How a fit is made.

    Attributes:
        steps: updates.
        batch_size: images a step.
        learning_rate: Adam's at the beginning; it falls to 0 along a cosine.
        max_offset: random crops, as in `plan_batch`.
        flip: random mirroring, as in `plan_batch`.

    Raises:
        InputError: steps that are no whole number above 0, or a rate that is not above 0.
    """

    steps: int = 500
    batch_size: int = 64
    learning_rate: float = 3e-3
    max_offset: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if not is_whole(self.steps, 1):
            raise InputError("steps", self.steps, "a whole number above 0")
        if not 0 < self.learning_rate < float("inf"):
            raise InputError("learning_rate", self.learning_rate, "a finite number above 0")

    def batches(self, num_images: int) -> Batches:
        """How batches are made of so many images."""
        return Batches(num_images, self.batch_size, self.max_offset, self.flip)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The same for equal steps and rates, so that what is compiled serves again."""
        return _adam(self.learning_rate, self.steps)


@lru_cache(maxsize=32)
def _adam(learning_rate: float, steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(learning_rate, steps))


@flax.struct.dataclass
class FitState:
    """Where a fit stands. A pytree.

    Attributes:
        step: int scalar, the updates made.
        params: the student's.
        model_state: the student's.
        projections: what is fitted beside it, and left behind.
        opt_state: of Adam, over params and projections.
    """

    step: jax.Array
    params: PyTree
    model_state: PyTree
    projections: PyTree
    opt_state: optax.OptState


def checked_data(images: ArrayLike, labels: ArrayLike, batch_size: int, max_offset: int) -> Data:
    """Training images and labels on the device, if a fit can have batches of them.

    Args:
        images: uint8 `[n, H, W, C]`.
        labels: int `[n]`.
        batch_size: images a step.
        max_offset: of random crops.

    Returns:
        The images, and the labels as int32.

    Raises:
        InputError: another shape or dtype, a batch larger than the data, or crops as large as the
            images.
    """
    shape, labels = np.shape(images), np.asarray(labels)
    if len(shape) != 4 or jnp.result_type(images) != jnp.uint8:
        raise InputError("images", shape, "uint8 [n, H, W, C]")
    if labels.shape != shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise InputError("labels", labels.shape, f"int [{shape[0]}], one an image")
    steps_per_epoch(len(labels), batch_size)
    if not 0 <= max_offset < min(shape[1:3]):
        raise InputError("max_offset", max_offset, f"0 to {min(shape[1:3]) - 1}")
    return jnp.asarray(images), jnp.asarray(labels, jnp.int32)


def check_classes(labels: ArrayLike, num_classes: int) -> None:
    """Raises InputError for labels, int `[n]`, that are no classes of the teacher."""
    least, most = int(np.min(labels)), int(np.max(labels))
    if least < 0 or most >= num_classes:
        allowed = f"the teacher's classes, 0 to {num_classes - 1}"
        raise InputError("labels", f"{least} to {most}", allowed)


class Fitted(NamedTuple):
    """A fitted student.

    Attributes:
        params: its parameters.
        model_state: its model state.
        metrics: means over the last steps, a tenth of all (of a fit that went on, over those of
            them that it made): `stages`, float `[G]`; `accuracy`, float `[]`, of the student's own
            classifier in the fit.
    """

    params: PyTree
    model_state: PyTree
    metrics: dict[str, np.ndarray]


class Objective(Protocol):
    """What a fit minimises: hashable, for it is a part of what is compiled."""

    def __call__(
        self,
        learned: tuple[PyTree, PyTree],
        model_state: PyTree,
        known: PyTree,
        images: jax.Array,
        labels: jax.Array,
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """The loss of a batch, and the student's new model state and what is told of the step.

        Args:
            learned: the student's parameters, and what is fitted beside them.
            model_state: the student's.
            known: arrays that stay: the teacher's.
            images: float `[B, H, W, C]`.
            labels: int `[B]`.
        """
        ...


OnStep: TypeAlias = Callable[[FitState, Metrics], None]


def fit(
    objective: Objective,
    start: Variables,
    projections: PyTree,
    known: PyTree,
    data: Data,
    plan: FitPlan,
    *,
    rng: jax.Array,
    state: FitState | FlatTree | None = None,
    on_step: OnStep | None = None,
) -> Fitted:
    """Minimises an objective over batches of the data.

    Args:
        objective: static.
        start: the student's parameters and model state.
        projections: what is fitted beside it.
        known: see `Objective`.
        data: images uint8 `[n, H, W, C]`, and labels int32 `[n]`.
        plan: how.
        rng: a random key, for the order of the data.
        state: where a former fit of the same start stood, or its arrays by path, as `flatten`
            makes them; None: there was none.
        on_step: called after each update with the state and the metrics, on the device; every 50th
            state is known to be finite.

    Raises:
        InputError: arrays by path that are not those of such a fit.
        DivergedError: the fit diverged.
    """
    static: dict[str, Any] = {"objective": objective, "optimizer": plan.optimizer}
    static["batches"] = plan.batches(len(data[1]))
    now, last = _gone_on(_begun(start, projections, plan), state), []
    for count in range(int(now.step), plan.steps):
        now, metrics = _step(now, known, data, rng, **static)
        if (count + 1) % CHECKED_EVERY == 0 or count + 1 == plan.steps:
            _check_finite(now)
        if on_step is not None:
            on_step(now, metrics)
        if count >= plan.steps - max(plan.steps // 10, 1):
            last.append(metrics)
    means = jax.tree.map(lambda *each: np.mean(np.stack(each), axis=0), *last) if last else {}
    return Fitted(now.params, now.model_state, means)


def _check_finite(state: FitState) -> None:
    """Raises DivergedError where a fit has diverged."""
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)):
        raise DivergedError(
            f"step {int(state.step)} of the fit: a parameter of the student is not finite; a lower "
            "learning rate of the fit may help"
        )


def _begun(start: Variables, projections: PyTree, plan: FitPlan) -> FitState:
    """The state of a fit before its first step."""
    params, model_state = jax.tree.map(jnp.asarray, start)
    opt_state = plan.optimizer.init((params, projections))
    return FitState(jnp.zeros((), jnp.int32), params, model_state, projections, opt_state)


def _gone_on(start: FitState, state: FitState | FlatTree | None) -> FitState:
    """Where a fit goes on."""
    if state is None:
        return start
    return state if isinstance(state, FitState) else unflatten(start, state, "state")


# Compiled once for the same objective, whatever the data, the teacher's weights and the key.
@partial(jax.jit, static_argnames=("objective", "optimizer", "batches"))
def _step(
    state: FitState,
    known: PyTree,
    data: Data,
    rng: jax.Array,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    batches: Batches,
) -> tuple[FitState, Metrics]:
    images, labels = take_batch(*data, batches.plan(rng, state.step))
    learned = state.params, state.projections
    gradients, (model_state, metrics) = jax.grad(objective, has_aux=True)(
        learned, state.model_state, known, images, labels
    )
    updates, opt_state = optimizer.update(gradients, state.opt_state, learned)
    params, projections = optax.apply_updates(learned, updates)
    return FitState(state.step + 1, params, model_state, projections, opt_state), metrics


def with_own_statistics(
    student: NodeFns,
    variables: Variables,
    images: ArrayLike,
    plan: FitPlan,
    *,
    rng: jax.Array,
    number: int = STATISTICS_BATCHES,
) -> Variables:
    """The student with the statistics of what it sees itself, its parameters as they are.

    In a fit each stage is normalised on its teacher's outputs; as a whole the student passes on
    others. The student is run as in training, on so many batches. What running means have left of
    their former values, such as 37 % after 100 batches at a momentum of 0.99, is taken off.

    Args:
        student: the network.
        variables: its own.
        images: uint8 `[n, H, W, C]`.
        plan: how batches are made.
        rng: a random key, for the order of the data.
        number: of batches.

    >>> import ktg_jax as ktg
    >>> fns, images = ktg.build_model("cnn", num_classes=2), np.full((4, 8, 8, 1), 255, np.uint8)
    >>> variables = fns.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    >>> plan, rng = FitPlan(batch_size=4), jax.random.key(1)
    >>> _, state = with_own_statistics(fns, variables, images, plan, rng=rng, number=2)
    >>> bool((state["batch_stats"]["stage1_norm"]["mean"] != 0).all())
    True
    """
    params, start = variables
    images = jnp.asarray(images)
    data, batches = (images, jnp.zeros(len(images), jnp.int32)), plan.batches(len(images))

    def restated(model_state: PyTree, count: int) -> PyTree:
        return _restated(params, model_state, data, rng, count, student, batches)

    model_state = start
    for count in range(number):
        model_state = restated(model_state, count)
    shifted = jax.tree.map(lambda leaf: leaf + 1 if is_float(leaf) else leaf, start)
    moved = jax.tree.map(_share_left, start, restated(start, 0), restated(shifted, 0))
    return params, jax.tree.map(
        lambda before, after, left: _without(before, after, left**number),
        start,
        model_state,
        moved,
    )


def _share_left(start: jax.Array, updated: jax.Array, shifted: jax.Array) -> float:
    """What an update leaves of a running mean, seen by the update of a start that is 1 larger.

    0 for what is no running mean.
    """
    if not is_float(start):
        return 0.0
    left = np.asarray(shifted, np.float64) - np.asarray(updated, np.float64)
    share = float(left.mean()) if left.size else 0.0
    is_mean = 0 < share < 1 - _SAME and np.ptp(left) < _SAME
    return share if is_mean else 0.0


def _without(before: jax.Array, after: jax.Array, left: float) -> jax.Array:
    """A running mean without what is left of its former value, unless that is next to nothing."""
    return after if left < _LITTLE else (after - left * before) / (1 - left)


@partial(jax.jit, static_argnames=("student", "batches"))
def _restated(
    params: PyTree,
    model_state: PyTree,
    data: Data,
    rng: jax.Array,
    count: jax.Array | int,
    student: NodeFns,
    batches: Batches,
) -> PyTree:
    images, _ = take_batch(*data, batches.plan(rng, count))
    return student.apply(params, model_state, images, True)[1]
