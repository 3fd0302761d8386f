"""What is asked of a teacher, a student, and the fit of a prior between them."""

from dataclasses import dataclass
from typing import Annotated

from ktg_jax.checks import check_not_negative, check_positive

from ..runs.options import MOST_RATE, at_least


@dataclass(frozen=True)
class TeacherOptions:
    """A teacher."""

    teacher: Annotated[str | None, "DIR"] = None
    """Folder of the teacher's run: its target, or DIR:node. Without it --teacher-model is trained
    first, alone, on the same data and in the same way, and kept in the cache for other runs."""
    teacher_model: str = "resnet14"
    """Model of the teacher, where --teacher is not given."""
    imports: Annotated[tuple[str, ...], "MODULE"] = ()
    """Python modules to import first, such as those that call ktg_jax.register_model."""


@dataclass(frozen=True)
class StudentOptions:
    """Its student."""

    student: Annotated[str, "MODEL"] = "resnet8"
    """Model of the student."""
    student_layers: Annotated[tuple[str, ...], "KERNEL"] = ()
    """The student's kernels that the prior speaks of, one for each stage of the teacher, such as
    stage1_block1.conv2.kernel; else the last of each of the student's stages, or with
    --aggregation layers all."""


@dataclass(frozen=True)
class FitOptions:
    """How a prior is fitted."""

    fit_steps: int = 1000
    """Updates, with --aggregation fit."""
    fit_learning_rate: float = 0.01
    """Learning rate of the fit's optimiser, AdamW; down to 0 along a cosine."""
    fit_weight_decay: float = 1.0
    """Decoupled weight decay of that optimiser. Of the random start it leaves the share
    exp(-decay x rate x steps / 2), by default less than a hundredth; without it nearly all."""


def check_fit(options: FitOptions) -> None:
    """Raises InputError for the first value that is out of range."""
    at_least(options, 1, "fit_steps")
    check_positive("fit_learning_rate", options.fit_learning_rate)
    check_not_negative("fit_weight_decay", options.fit_weight_decay)
    at_least(options, 0, "fit_learning_rate", "fit_weight_decay", most=MOST_RATE)
