"""Knowledge aggregation: a frozen teacher's stages, fitted into kernels of the student's shape.

From the abstract of KR: parameters are aggregated "into more abstract level", which alleviates
"residual accumulation in the deeper layers". From the patent: a trained network gets a downscaling
layer whose filters have the number and shape of the student's. Ours: one such layer a stage, the
1x1 reduction before it, normalisation and ReLU around it, and how it is fitted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from ktg_jax.checks import is_whole
from ktg_jax.errors import InputError, RunError
from ktg_jax.losses import cross_entropy, is_correct
from ktg_jax.models.network import NodeFns, PyTree
from ktg_jax.models.pixels import to_float
from ktg_jax.priors.fitting import check_classes, checked_data
from ktg_jax.priors.prior import Prior
from ktg_jax.priors.readers import Aggregator, Readers
from ktg_jax.priors.stages import KernelShapes, stage_outputs
from ktg_jax.training.batches import Batches, take_batch
from ktg_jax.training.updates import init_opt_state, node_update

Metrics: TypeAlias = dict[str, jax.Array]
Variables: TypeAlias = tuple[PyTree, PyTree]
Data: TypeAlias = tuple[jax.Array, jax.Array]

ADAM = optax.adam(3e-3)
"""The optimiser of a fit, unless another is given: at a learning rate of 0.003."""


@dataclass(frozen=True)
class Fit:
    """How a teacher's stages are fitted: keyword arguments of `fit_readers`.

    Attributes:
        steps: updates.
        batch_size: images a step.
        optimizer: an optax transformation; None: Adam at a learning rate of 0.003.
        stride: the stride of the downscaling convolutions.
        max_offset: random crops, as in `plan_batch`.
        flip: random mirroring, as in `plan_batch`.

    Raises:
        InputError: steps or a stride that are no whole numbers above 0.
    """

    steps: int = 1000
    batch_size: int = 128
    optimizer: optax.GradientTransformation | None = None
    stride: int = 1
    max_offset: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        for field in ("steps", "stride"):
            if not is_whole(getattr(self, field), 1):
                raise InputError(field, getattr(self, field), "a whole number above 0")


def aggregate_prior(
    teacher: NodeFns,
    params: PyTree,
    model_state: PyTree,
    student_kernels: KernelShapes,
    images: ArrayLike,
    labels: ArrayLike,
    **options: Any,
) -> Prior:
    """Fits a prior for a student from a teacher's stages; the teacher stays as it is.

    Each stage's `Aggregator` learns to classify from the teacher's stage output alone; the kernel
    of its downscaling convolution is the prior of that stage.

    Args:
        teacher: as for `fit_readers`, like all other arguments.
        params: the teacher's parameters.
        model_state: the teacher's model state.
        student_kernels: from `stage_kernels(student's params)`, one for each stage of the teacher.
        images: uint8 `[n, H, W, C]`, training images.
        labels: int `[n]`, as the teacher numbers classes.
        **options: those of `fit_readers`: `rng`, and the fields of `Fit`.

    Returns:
        The prior; its `accuracy` is that of each stage's head on all `images`, as they are.

    Raises:
        InputError: as `fit_readers`.
        RunError: the fit diverged: a kernel is not finite.

    >>> import ktg_jax as ktg
    >>> from ktg_jax.priors import stage_kernels
    >>> teacher, student = (ktg.build_model("cnn", num_classes=2) for _ in range(2))
    >>> images = np.arange(8 * 64, dtype=np.uint8).reshape(8, 8, 8, 1)
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> kernels = stage_kernels(student.init(keys[0], to_float(images))[0])
    >>> prior = aggregate_prior(teacher, *teacher.init(keys[1], to_float(images)), kernels,
    ...                         images, np.arange(8) % 2, rng=keys[2], steps=1, batch_size=4)
    >>> prior.paths[0], prior.kernels[0].shape, prior.accuracy.shape
    ('stage1_conv.kernel', (3, 3, 1, 16), (3,))
    """
    readers = fit_readers(teacher, params, model_state, student_kernels, images, labels, **options)
    return readers.prior(tuple(student_kernels))


def fit_readers(
    teacher: NodeFns,
    params: PyTree,
    model_state: PyTree,
    student_kernels: KernelShapes,
    images: ArrayLike,
    labels: ArrayLike,
    *,
    rng: jax.Array,
    on_step: Callable[[int, Metrics], None] | None = None,
    **options: Any,
) -> Readers:
    """Fits what reads a teacher's stages, an `Aggregator` each; the teacher stays as it is.

    Each learns to classify from the teacher's stage output alone. Stages share nothing but the
    teacher's forward pass, so one compiled step fits them all. What a short fit does not reach
    keeps its random start: weight decay in the optimiser, or more steps, leave less of that.

    Args:
        teacher: a network with `NodeFns.stages`; runs with its stored statistics.
        params: the teacher's parameters.
        model_state: the teacher's model state.
        student_kernels: from `stage_kernels(student's params)`, one for each stage of the teacher.
        images: uint8 `[n, H, W, C]`, training images.
        labels: int `[n]`, as the teacher numbers classes.
        rng: a random key, for initial weights and the order of the data.
        on_step: called with the number of updates made and their `loss` and `accuracy`, float32
            `[G]` on the device: the mean over the batch, by stage.
        **options: the fields of `Fit`.

    Returns:
        The readers; their `accuracy` is that of each one's head on all `images`, as they are.

    Raises:
        InputError: a teacher that has other than one stage for each of the student's kernels, or
            none that it names; labels that are no classes of it; a batch larger than the data; a
            bad option.
        RunError: the fit diverged: a kernel is not finite.
    """
    how = Fit(**options)
    variables, optimizer = (params, model_state), how.optimizer or ADAM
    num_classes, output_shapes = _checked(teacher, variables, student_kernels, images, labels, how)
    kernels = student_kernels.values()
    readers = tuple(Aggregator(shape, num_classes, how.stride) for shape in kernels)
    init_rng, data_rng = jax.random.split(rng)
    state = _init_state(readers, output_shapes, optimizer, init_rng)
    data = jnp.asarray(images), jnp.asarray(labels, jnp.int32)
    batches = Batches(len(data[1]), how.batch_size, how.max_offset, how.flip)
    models: dict[str, Any] = {"teacher": teacher, "readers": readers, "batches": batches}
    for count in range(how.steps):
        state, metrics = _step(state, variables, data, data_rng, count, optimizer, **models)
        if on_step is not None:
            on_step(count + 1, metrics)
    for stage, of_stage in enumerate(state.params, start=1):
        if not np.isfinite(of_stage["downscaling"]["kernel"]).all():
            raise RunError(f"step {how.steps}, prior of stage {stage}: kernel not finite")
    starts = range(0, len(data[1]), how.batch_size)
    right = np.sum([_correct(state, variables, data, start, **models) for start in starts], axis=0)
    accuracy = jnp.asarray(right / len(data[1]), jnp.float32)
    fitted = zip(state.params, state.statistics, strict=True)
    return Readers(readers, tuple({"params": p, **stored} for p, stored in fitted), accuracy)


@flax.struct.dataclass
class FitState:
    """All stages' aggregators while they are fitted: a tuple entry for each, and one optimiser."""

    params: tuple[PyTree, ...]
    statistics: tuple[PyTree, ...]
    opt_state: optax.OptState


def _init_state(
    readers: Sequence[Aggregator],
    output_shapes: Sequence[tuple[int, ...]],
    optimizer: optax.GradientTransformation,
    rng: jax.Array,
) -> FitState:
    params, statistics = [], []
    for stage, (reader, shape) in enumerate(zip(readers, output_shapes, strict=True)):
        output = jax.ShapeDtypeStruct(shape, jnp.float32)
        started = dict(reader.lazy_init(jax.random.fold_in(rng, stage), output, False))
        params.append(started.pop("params"))
        statistics.append(started)
    opt_state = init_opt_state(optimizer, tuple(params))
    return FitState(tuple(params), tuple(statistics), opt_state)


# Compiled once for the same teacher, student and optimiser, whatever the data and the random key.
@partial(jax.jit, static_argnames=("optimizer", "teacher", "readers", "batches"))
def _step(
    state: FitState,
    variables: Variables,
    data: Data,
    rng: jax.Array,
    count: jax.Array | int,
    optimizer: optax.GradientTransformation,
    *,
    teacher: NodeFns,
    readers: tuple[Aggregator, ...],
    batches: Batches,
) -> tuple[FitState, Metrics]:
    """One update of all aggregators from the teacher's stage outputs on a batch."""
    images, labels = take_batch(*data, batches.plan(rng, count))
    _, outputs = stage_outputs(teacher, *variables, images)

    def loss_of(params: tuple[PyTree, ...]) -> tuple[jax.Array, tuple]:
        logits, statistics = _read(readers, params, state.statistics, outputs, train=True)
        losses = jnp.mean(jax.vmap(cross_entropy, in_axes=(0, None))(logits, labels), axis=1)
        accuracy = jnp.mean(is_correct(logits, labels), axis=1, dtype=jnp.float32)
        return jnp.sum(losses), (statistics, {"loss": losses, "accuracy": accuracy})

    gradients, (statistics, metrics) = jax.grad(loss_of, has_aux=True)(state.params)
    value = jnp.sum(metrics["loss"])
    updated = state.params, state.opt_state, gradients
    params, opt_state = node_update(*updated, optimizer=optimizer, value=value)
    return FitState(params, statistics, opt_state), metrics


@partial(jax.jit, static_argnames=("teacher", "readers", "batches"))
def _correct(
    state: FitState,
    variables: Variables,
    data: Data,
    start: jax.Array | int,
    *,
    teacher: NodeFns,
    readers: tuple[Aggregator, ...],
    batches: Batches,
) -> jax.Array:
    """How many images of a batch each stage's head has right, int `[G]`."""
    position = start + jnp.arange(batches.batch_size)
    index = jnp.minimum(position, len(data[1]) - 1)  # the last batch is padded
    _, outputs = stage_outputs(teacher, *variables, to_float(data[0][index]))
    logits, _ = _read(readers, state.params, state.statistics, outputs, train=False)
    counts = position < len(data[1])
    return jnp.sum(is_correct(logits, data[1][index]) & counts[None], axis=1)


def _read(
    readers: Sequence[Aggregator],
    params: Sequence[PyTree],
    statistics: Sequence[PyTree],
    outputs: Sequence[jax.Array],
    *,
    train: bool,
) -> tuple[jax.Array, tuple[PyTree, ...]]:
    """Logits, float32 `[G, B, classes]`, and each stage's new statistics."""
    logits, updated = [], []
    for reader, weights, stored, output in zip(readers, params, statistics, outputs, strict=True):
        mutable = ["batch_stats"] if train else []
        z, new = reader.apply({"params": weights, **stored}, output, train, mutable=mutable)
        logits.append(z)
        updated.append(new)
    return jnp.stack(logits), tuple(updated)


def _checked(
    teacher: NodeFns,
    variables: Variables,
    student_kernels: KernelShapes,
    images: ArrayLike,
    labels: ArrayLike,
    how: Fit,
) -> tuple[int, list[tuple[int, ...]]]:
    """The number of classes and the shape of each stage's output, if the teacher fits the rest."""
    checked_data(images, labels, how.batch_size, how.max_offset)
    shape = np.shape(images)
    image = jax.ShapeDtypeStruct((1, *shape[1:]), jnp.float32)
    logits, outputs = jax.eval_shape(partial(stage_outputs, teacher), *variables, image)
    if len(outputs) != len(student_kernels):
        allowed = f"{len(outputs)}, as many as the teacher has stages"
        raise InputError("student_kernels", len(student_kernels), allowed)
    for path, kernel_shape in student_kernels.items():
        if len(kernel_shape) != 4 or min(kernel_shape) < 1:
            raise InputError(f"student_kernels {path}", kernel_shape, "(height, width, in, out)")
    num_classes = logits.shape[-1]
    check_classes(labels, num_classes)
    return num_classes, [output.shape for output in outputs]
