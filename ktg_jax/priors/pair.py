"""A teacher and a student, place by place: what the one passes on, as the other would see it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ktg_jax.errors import InputError
from ktg_jax.models.network import NodeFns
from ktg_jax.models.pixels import to_float
from ktg_jax.priors.channels import (
    Channels,
    Variables,
    check_places,
    evenly,
    is_part_of,
    output_shapes,
    passed_on,
    select_channels,
    select_start,
)

Shape = tuple[int, ...]

_EPSILON = 1e-5


@dataclass(frozen=True)
class Pair:
    """A teacher and a student of as many stages.

    Attributes:
        teacher: (height, width, channels) at each place, of images of this size.
        student: likewise.
        image_shape: of the images.
        channels: which of the teacher's the student's stand for; None: the student is of another
            family, or wider, and what it sees of the teacher is projected.
        num_classes: of both.
        stage_paths: `NodeFns.stage_paths` of the student.
    """

    teacher: tuple[Shape, ...]
    student: tuple[Shape, ...]
    image_shape: Shape
    channels: Channels | None
    num_classes: int
    stage_paths: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls,
        teacher: NodeFns,
        teacher_variables: Variables,
        student: NodeFns,
        student_variables: Variables,
        image_shape: Sequence[int],
    ) -> "Pair":
        """The pair of two networks.

        Raises:
            InputError: they differ in their number of classes or stages, or in the height or width
                of what a stage puts out; or one of them cannot be fed, or passes on what is no
                image.
        """
        whole, made = (
            output_shapes(fns, variables, image_shape)
            for fns, variables in ((teacher, teacher_variables), (student, student_variables))
        )
        num_classes = whole.logits.shape[-1]
        if made.logits.shape[-1] != num_classes:
            allowed = f"the teacher's {num_classes} classes"
            raise InputError("student", f"{made.logits.shape[-1]} classes", allowed)
        theirs, own = (tuple(tuple(p.shape[1:]) for p in each.stages) for each in (whole, made))
        for who, shapes in (("teacher", theirs), ("student", own)):
            for g, shape in enumerate(shapes):
                if len(shape) != 3:
                    raise InputError(f"{who} stage {g}", shape, "(height, width, channels)")
        check_places(len(theirs), len(own))
        for g, (a, b) in enumerate(zip(theirs, own, strict=True)):
            if g and a[:2] != b[:2]:
                raise InputError(f"student stage {g}", b[:2], f"the teacher's size, {a[:2]}")
        variables = teacher_variables, student_variables
        is_narrower = all(b[2] <= a[2] for a, b in zip(theirs, own, strict=True))
        channels = None
        if is_narrower and is_part_of(*variables, student.stage_paths):
            channels = select_channels([a[2] for a in theirs], [b[2] for b in own])
        shape = tuple(image_shape)
        return cls(theirs, own, shape, channels, num_classes, student.stage_paths)

    def start(self, teacher_variables: Variables, student_variables: Variables) -> Variables:
        """What the student starts from: a part of the teacher where it can be one, else itself."""
        if self.channels is None:
            return student_variables
        widths = [shape[2] for shape in self.teacher]
        variables = teacher_variables, student_variables
        return select_start(*variables, self.channels, widths, self.stage_paths)

    def is_shared(self, place: int) -> bool:
        """Whether both pass something on here that the one can have from the other.

        Not where one of them passes the images to its first stage, or in other sizes.
        """
        a, b = self.teacher[place], self.student[place]
        return place > 0 or (self.image_shape not in (a, b) and a[:2] == b[:2])


def stage_residuals(
    pair: Pair,
    teacher: NodeFns,
    teacher_variables: Variables,
    student: NodeFns,
    student_variables: Variables,
    images: jax.Array,
) -> np.ndarray | None:
    """How much of what the teacher passes on a whole student gets wrong, stage by stage.

    Both are run in evaluation, the student on what it passes on itself.

    Args:
        pair: of the two.
        teacher: the network.
        teacher_variables: its own.
        student: the network.
        student_variables: its own.
        images: float `[B, H, W, C]`.

    Returns:
        The mean square error in shares of the variance of the teacher's chosen channels, float32
        `[G]`; None: the student's channels are not the teacher's.
    """
    if pair.channels is None:
        return None
    theirs, _ = passed_on(teacher, teacher_variables, images)
    own, _ = passed_on(student, student_variables, images)
    shares = []
    for made, place, chosen in zip(own.stages, theirs.stages, pair.channels, strict=True):
        target = place[..., chosen]
        shares.append(jnp.mean(jnp.square(made - target)) / jnp.mean(jnp.var(target, (0, 1, 2))))
    return np.asarray(jnp.stack(shares[1:]))


def projection(rng: jax.Array, channels: int, features: int) -> dict[str, jax.Array]:
    """What `projected` begins with: the first channels evenly chosen, or more of them mixed."""
    kernel: Any = jax.random.normal(rng, (channels, features)) / np.sqrt(channels)
    if features <= channels:
        kernel = np.eye(channels, dtype=np.float32)[:, evenly(channels, features)]
    scale, bias = jnp.ones(features), jnp.zeros(features)
    return {"kernel": jnp.asarray(kernel), "scale": scale, "bias": bias}


def projected(weights: dict[str, jax.Array], x: jax.Array, is_rectified: bool) -> jax.Array:
    """A 1x1 convolution, normalised over the batch, and a ReLU if it is to put out none below 0.

    Args:
        weights: kernel `[c, d]`, scale `[d]` and bias `[d]`.
        x: float `[B, h, w, c]`.
        is_rectified: whether.

    Returns:
        float `[B, h, w, d]`.

    >>> x = jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1)
    >>> weights = projection(jax.random.key(0), 1, 1)
    >>> projected(weights, x, True).ravel().round(2).tolist()
    [0.0, 1.0]
    """
    y = jnp.einsum("bhwc,cd->bhwd", x, weights["kernel"])
    mean, var = jnp.mean(y, (0, 1, 2)), jnp.var(y, (0, 1, 2))
    y = (y - mean) * (weights["scale"] * jax.lax.rsqrt(var + _EPSILON)) + weights["bias"]
    return jax.nn.relu(y) if is_rectified else y


def rectified_places(fns: NodeFns, variables: Variables, images: jax.Array) -> tuple[bool, ...]:
    """At which places a network passes nothing below 0 on: a bool for each.

    Args:
        fns: the network.
        variables: its own.
        images: uint8 `[B, H, W, C]` to see it by.
    """
    made, _ = passed_on(fns, variables, to_float(images))
    return tuple(bool(jnp.min(place) >= 0) for place in made.stages)
