"""Knowledge aggregation by use: the teacher itself judges what the student's stages pass on.

Ours, beside `regress_stages`. The student's first g stages, a projection to the teacher's channels,
and the *rest of the teacher* are to classify, for every g at once. Nothing is said of how a stage
does that, so there is no limit on widths or families.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

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


def recast_stages(
    teacher: NodeFns,
    teacher_variables: Variables,
    student: NodeFns,
    student_variables: Variables,
    images: ArrayLike,
    labels: ArrayLike,
    *,
    rng: jax.Array,
    select: bool = True,
    state: FitState | FlatTree | None = None,
    on_step: OnStep | None = None,
    **options: Any,
) -> Fitted:
    """Fits a student so that the rest of its teacher can go on from each of its stages.

    It minimises the cross-entropy of the teacher's logits, in evaluation, with its place g fed from
    the student's, summed over g from 1, plus that of the student's own. The student's output is
    projected to the teacher's channels (a 1x1 convolution, batch normalisation and, if the teacher
    passes none below 0 on there, a ReLU), but not where it starts as a part of the teacher with all
    its channels.

    Args:
        teacher: a network with `NodeFns.fed_stages`; all others as for `regress_stages`.
        teacher_variables: its parameters and model state, which stay as they are.
        student: of as many stages, with outputs of the same heights and widths.
        student_variables: initial ones.
        images: uint8 `[n, H, W, C]`, training images.
        labels: int `[n]`, as the teacher numbers classes.
        rng: a random key.
        select: whether a student of the teacher's family starts as a part of it.
        state: where a former fit stood, which this one goes on with; also by path, as `flatten`
            makes it for a file.
        on_step: called after each update with the state and its metrics, on the device.
        **options: the fields of `FitPlan`.

    Returns:
        The student; `metrics["stages"]` is the cross-entropy by way of each stage, float `[G]`.

    Raises:
        InputError: networks whose stages or classes do not match, a bad option, images or labels
            that are not as above, or a batch larger than the data.
        DivergedError: the fit diverged.

    >>> import ktg_jax as ktg
    >>> fns, labels = ktg.build_model("cnn", num_classes=2), jnp.arange(8) % 2
    >>> images = jnp.arange(8 * 64).astype(jnp.uint8).reshape(8, 8, 8, 1)
    >>> theirs, own = (fns.init(jax.random.key(i), jnp.zeros((1, 8, 8, 1))) for i in (0, 1))
    >>> fitted = recast_stages(fns, theirs, fns, own, images, labels, rng=jax.random.key(2),
    ...                        steps=2, batch_size=4)
    >>> fitted.metrics["stages"].shape
    (3,)
    """
    plan = FitPlan(**options)
    data = checked_data(images, labels, plan.batch_size, plan.max_offset)
    networks = teacher, teacher_variables, student, student_variables
    pair = Pair.of(*networks, data[0].shape[1:])
    check_classes(data[1], pair.num_classes)
    is_part = select and pair.channels is not None
    start = pair.start(teacher_variables, student_variables) if is_part else student_variables
    rng_of_projections = jax.random.fold_in(rng, 1)
    projections = {
        g: projection(jax.random.fold_in(rng_of_projections, g), own[2], theirs[2])
        for g, (theirs, own) in enumerate(zip(pair.teacher, pair.student, strict=True))
        if g and not (is_part and theirs == own)
    }
    rectified = rectified_places(teacher, teacher_variables, data[0][: plan.batch_size])
    objective = _Recast(teacher, student, rectified)
    given = objective, start, projections, teacher_variables, data, plan
    return fit(*given, rng=rng, state=state, on_step=on_step)


@dataclass(frozen=True)
class _Recast:
    """What `recast_stages` minimises."""

    teacher: NodeFns
    student: NodeFns
    is_rectified: tuple[bool, ...]

    def __call__(
        self,
        learned: tuple[PyTree, PyTree],
        model_state: PyTree,
        known: PyTree,
        images: jax.Array,
        labels: jax.Array,
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        (params, projections), places = learned, range(len(self.is_rectified))
        own, model_state = passed_on(self.student, (params, model_state), images, train=True)
        losses = []
        for g, made in enumerate(own.stages[1:], start=1):
            if g in projections:
                made = projected(projections[g], made, self.is_rectified[g])
            fed = [made if place == g else None for place in places]
            theirs, _ = passed_on(self.teacher, known, images, fed)
            losses.append(jnp.mean(cross_entropy(theirs.logits, labels)))
        loss = jnp.mean(cross_entropy(own.logits, labels)) + sum(losses)
        accuracy = jnp.mean(is_correct(own.logits, labels), dtype=jnp.float32)
        return loss, (model_state, {"stages": jnp.stack(losses), "accuracy": accuracy})
