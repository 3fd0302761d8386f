"""What is asked of a teacher, a student, and the fit of the one to the other."""

from dataclasses import dataclass
from typing import Annotated, Literal

from ktg_jax.checks import check_positive

from ..runs.options import MOST_RATE, at_least

TEACHER_MODEL = "resnet14"
"""The teacher that is trained where none is given, unless another one is named."""


@dataclass(frozen=True)
class TeacherOptions:
    """A teacher."""

    teacher: Annotated[str | None, "DIR|FILE"] = None
    """The teacher: the folder of its run (its target, or DIR:node), or a .safetensors file, ours or
    PyTorch's. Without it --teacher-model is trained first, alone, on the same data and in the same
    way, and kept in the cache for other runs."""
    teacher_model: Annotated[str | None, "MODEL"] = None
    """Model of the teacher that is trained first (else resnet14), or of a file that is not
    recognised."""
    teacher_input: Annotated[str | None, "INPUT"] = None
    """How the network of a file wants its images, where the file does not say it: imagenet,
    cifar10, ..., as --inputs of the command train. The student then sees them in the same way."""
    imports: Annotated[tuple[str, ...], "MODULE"] = ()
    """Python modules to import first, such as those that call ktg_jax.register_model."""


@dataclass(frozen=True)
class StudentOptions:
    """Its student."""

    student: Annotated[str, "MODEL"] = "resnet8"
    """Model of the student, with as many stages as the teacher."""


@dataclass(frozen=True)
class FitOptions:
    """How a student is fitted to its teacher."""

    fit_steps: int = 500
    """Updates, of --batch-size images each; none with --aggregation select."""
    fit_learning_rate: float = 0.003
    """Learning rate of the fit's optimiser, Adam; down to 0 along a cosine."""
    fit_inputs: Literal["teacher", "own"] = "teacher"
    """With --aggregation regression: what each stage is fed with, what the teacher passes on, or
    what the student's own former stage does, so that all are one chain."""
    fit_start: Literal["selected", "random"] = "selected"
    """What is fitted: a part of the teacher, where the student can be one, or a random student."""
    fit_statistics: Literal["own", "fit"] = "own"
    """The statistics of normalisation afterwards: of what the student passes on itself, computed
    anew, or as they were in the fit."""


def check_fit(options: FitOptions) -> None:
    """Raises InputError for the first value that is out of range."""
    at_least(options, 1, "fit_steps")
    check_positive("fit_learning_rate", options.fit_learning_rate)
    at_least(options, 0, "fit_learning_rate", most=MOST_RATE)
