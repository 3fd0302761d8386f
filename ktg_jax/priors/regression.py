"""Knowledge aggregation as regression: each of the student's stages learns what its teacher's does.

KR's abstract: parameters are aggregated "into more abstract level", which alleviates "residual
accumulation in the deeper layers"; the patent: of a trained network a group of layers is replaced
by one of the student's shape. Our reading: that group is a whole stage of the student, with its
normalisation. Fed with what the *teacher* passes on, each learns to put out what the teacher's
stage does, all at once and apart from each other, so no stage has to make up for those before it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ktg_jax.errors import InputError
from ktg_jax.io.trees import FlatTree
from ktg_jax.losses import cross_entropy, is_correct
from ktg_jax.models.network import NodeFns, PyTree
from ktg_jax.priors.channels import Variables, passed_on
from ktg_jax.priors.fitting import (
    FitPlan,
    FitState,
    Fitted,
    Metrics,
    OnStep,
    check_classes,
    checked_data,
    fit,
)
from ktg_jax.priors.pair import Pair, projected, projection, rectified_places

INPUTS = ("teacher", "own")


def regress_stages(
    teacher: NodeFns,
    teacher_variables: Variables,
    student: NodeFns,
    student_variables: Variables,
    images: ArrayLike,
    labels: ArrayLike,
    *,
    rng: jax.Array,
    inputs: str = "teacher",
    select: bool = True,
    state: FitState | FlatTree | None = None,
    on_step: OnStep | None = None,
    **options: Any,
) -> Fitted:
    """Fits each stage of a student to its teacher's, from a start that is a part of the teacher.

    With t_g what the teacher passes on at place g, in evaluation, and S_g the student's stage, as
    in training, it minimises sum_g mean |S_g(t_(g-1)) - t_g|^2 / mean variance of t_g, plus the
    cross-entropy of the student's classifier on t_G. Of t_g the student's channels are chosen
    (`select_channels`). Where the student is wider, or of another family, t_g is projected: a
    1x1 convolution, batch normalisation and, if the student's own outputs there have none below 0,
    a ReLU, which learn to be useful to the next stage and the classifier. Then the student's stem
    is fitted, too.

    Args:
        teacher: a network with `NodeFns.fed_stages`.
        teacher_variables: its parameters and model state, which stay as they are.
        student: likewise, of as many stages, with outputs of the same heights and widths.
        student_variables: initial ones.
        images: uint8 `[n, H, W, C]`, training images.
        labels: int `[n]`, as the teacher numbers classes.
        rng: a random key, for the order of the data and the projections.
        inputs: "teacher": each stage is fed with the teacher's; "own": with the student's own
            former stage, so that the stages are fitted as one chain.
        select: whether a student of the teacher's family starts as a part of it (`select_start`);
            else as it is.
        state: where a former fit stood, which this one goes on with; also by path, as `flatten`
            makes it for a file.
        on_step: called after each update with the state and its metrics, on the device.
        **options: the fields of `FitPlan`.

    Returns:
        The student; `metrics["stages"]` is each stage's share of variance that is left, float
        `[G]`. Statistics of normalisation are those of the fit: see `with_own_statistics`.

    Raises:
        InputError: networks whose stages or classes do not match, a bad option, images or labels
            that are not as above, or a batch larger than the data.
        DivergedError: the fit diverged.

    >>> import ktg_jax as ktg
    >>> fns, labels = ktg.build_model("cnn", num_classes=2), jnp.arange(8) % 2
    >>> images = jnp.arange(8 * 64).astype(jnp.uint8).reshape(8, 8, 8, 1)
    >>> theirs, own = (fns.init(jax.random.key(i), jnp.zeros((1, 8, 8, 1))) for i in (0, 1))
    >>> fitted = regress_stages(fns, theirs, fns, own, images, labels, rng=jax.random.key(2),
    ...                         steps=2, batch_size=4)
    >>> fitted.metrics["stages"].shape
    (3,)
    """
    if inputs not in INPUTS:
        raise InputError("inputs", inputs, ", ".join(INPUTS))
    plan = FitPlan(**options)
    data = checked_data(images, labels, plan.batch_size, plan.max_offset)
    networks = teacher, teacher_variables, student, student_variables
    pair = Pair.of(*networks, data[0].shape[1:])
    check_classes(data[1], pair.num_classes)
    start = pair.start(teacher_variables, student_variables) if select else student_variables
    is_stem_fitted = pair.channels is None or not select
    objective = _Regression(
        teacher,
        student,
        is_known=tuple(map(pair.is_shared, range(len(pair.teacher)))),
        is_chained=inputs == "own",
        is_stem_fitted=is_stem_fitted and pair.is_shared(0),
        is_rectified=rectified_places(student, student_variables, data[0][: plan.batch_size]),
    )
    projections = _projections(pair, jax.random.fold_in(rng, 1))
    known = teacher_variables, pair.channels
    given = objective, start, projections, known, data, plan
    return fit(*given, rng=rng, state=state, on_step=on_step)


def _projections(pair: Pair, rng: jax.Array) -> dict[int, Any]:
    """Those of the places at which channels are not chosen."""
    if pair.channels is not None:
        return {}
    return {
        g: projection(jax.random.fold_in(rng, g), pair.teacher[g][2], pair.student[g][2])
        for g in range(len(pair.teacher))
        if pair.is_shared(g)
    }


@dataclass(frozen=True)
class _Regression:
    """What `regress_stages` minimises."""

    teacher: NodeFns
    student: NodeFns
    is_known: tuple[bool, ...]
    is_chained: bool
    is_stem_fitted: bool
    is_rectified: tuple[bool, ...]

    def __call__(
        self,
        learned: tuple[PyTree, PyTree],
        model_state: PyTree,
        known: PyTree,
        images: jax.Array,
        labels: jax.Array,
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        (params, projections), (teacher_variables, channels) = learned, known
        theirs, _ = passed_on(self.teacher, teacher_variables, images)
        targets: list[jax.Array | None] = [
            self._target(g, place, channels, projections) for g, place in enumerate(theirs.stages)
        ]
        ends = (0, len(targets) - 1)
        fed = [t if not self.is_chained or g in ends else None for g, t in enumerate(targets)]
        own, model_state = passed_on(self.student, (params, model_state), images, fed, True)
        pairs = list(zip(own.stages, targets, strict=True))
        left = [_residual(made, target) for made, target in pairs[1:]]
        loss = jnp.mean(cross_entropy(own.logits, labels)) + sum(left)
        if self.is_stem_fitted:
            loss += _residual(*pairs[0])
        accuracy = jnp.mean(is_correct(own.logits, labels), dtype=jnp.float32)
        return loss, (model_state, {"stages": jnp.stack(left), "accuracy": accuracy})

    def _target(
        self, place: int, theirs: jax.Array, channels: Any, projections: Any
    ) -> jax.Array | None:
        """What the student is to pass on at a place; None: what it does."""
        if not self.is_known[place]:
            return None
        if channels is not None:
            return theirs[..., channels[place]]
        return projected(projections[place], theirs, self.is_rectified[place])


def _residual(made: jax.Array, target: jax.Array | None) -> jax.Array:
    """What is left of the target's variance: the target learns nothing from it."""
    assert target is not None
    target = jax.lax.stop_gradient(target)
    return jnp.mean(jnp.square(made - target)) / jnp.mean(jnp.var(target, (0, 1, 2)))
