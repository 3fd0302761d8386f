"""What `experiments.represent` is asked to do: the command line's fields, and their checks."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import ktg_jax as ktg
import ktg_jax.models
from ktg_jax.checks import check_positive
from ktg_jax.errors import InputError
from ktg_jax.inputs import Input

from ..runs.command_line import Command
from ..runs.config import TrainConfig, resolved
from ..runs.identity import data_kind, identity
from ..runs.options import (
    DATA_AND_TRAINING,
    MOST_RATE,
    Training,
    at_least,
    check_training,
    hash_of,
    training_fields,
    without_unused,
)
from ..runs.places import place_of
from .folder import PRIOR
from .options import (
    TEACHER_MODEL,
    FitOptions,
    StudentOptions,
    TeacherOptions,
    check_fit,
)

STUDENT = "student"
"""The student's name in its graph: with the seed it determines the initial weights."""


@dataclass(frozen=True)
class _PriorOptions:
    prior: Annotated[str | None, "DIR|FILE"] = None
    """Take this prior and fit none: a file, or the folder that it is in (WORKDIR/prior of another
    run). No teacher is needed then. Without it one is made."""
    aggregation: Literal["regression", "recast", "select"] = "regression"
    """regression: each of the student's stages, fed with what the teacher passes on, learns to put
    out what the teacher's stage does; recast: the rest of the teacher goes on from each of the
    student's stages; select: a part of the teacher, its channels and blocks chosen evenly, and
    nothing fitted (a student of the teacher's family)."""
    prior_weight: float = 1.0
    """Weight of the prior's loss beside the cross-entropy; 0: the prior only says how the student
    begins, with --prior-matching initialise."""
    prior_quantile: float = 0.7
    """Share of the prior's gradient, the smallest entries, that is cut off; 0 to 1."""
    prior_schedule: Literal["linear", "constant"] = "linear"
    """linear: the weight falls to 0 over the training; constant: it stays."""
    prior_matching: Literal["initialise", "kernels", "assignment", "none"] = "initialise"
    """initialise: the student starts from the prior; kernels: from its kernels alone, in random
    surroundings; assignment: the prior's filters are assigned to those that the student starts
    from; none: filter i speaks of filter i."""
    prior_kind: Literal["filters", "distribution", "l1", "task"] = "filters"
    """What the prior's loss compares: filters one by one; all filters of a kernel as a
    distribution; l1: filters as sparse recodings of the prior's, --prior-quantile being the penalty
    on coefficients; task: nothing, but the smallest entries of the student's own gradient are cut
    off, fading as the weight does."""
    student_learning_rate: float = 0.02
    """Peak learning rate of the student, which starts from what the teacher knows; those that start
    from nothing, a teacher that is trained first and the student alone, have --learning-rate."""
    alone: bool = True
    """Train the same student alone beside it, for as many steps, the fit's included."""


GROUPS = {
    "teacher": "teacher",
    "student": "student",
    "prior": "prior",
    "fit": "fit_steps",
    **DATA_AND_TRAINING,
    "speed": "compile_cache",
    "folder": "workdir",
}

EXAMPLES = r"""Examples:
  python -m experiments.represent
  python -m experiments.represent --teacher runs/teacher --student resnet8 \
      --data cifar10 --epochs 60 --workdir runs/student
  python -m experiments.represent --teacher resnet56.pytorch.safetensors \
      --teacher-input imagenet --student resnet20 --data cifar10
  python -m experiments.represent --teacher runs/dml:resnet32-1 \
      --aggregation select --data cifar100 --prior-quantile 0.9
  python -m experiments.represent --prior runs/student/prior --prior-weight 0 \
      --data cifar10"""


@dataclass(frozen=True)
class RepresentConfig(  # the last's fields come first
    Training, FitOptions, _PriorOptions, StudentOptions, TeacherOptions
):
    """Train a student with prior knowledge from a teacher's parameters (Knowledge Representing).

    The teacher's stages are aggregated into a prior, a student of which each stage does what the
    teacher's does; the student starts from it and is trained as by the command train, whose files
    the workdir has, next to prior/ and alone/. Running the same command again goes on where it
    stopped.
    """

    command: ClassVar = Command("experiments.represent", GROUPS, EXAMPLES)

    compile_cache: bool = True
    """Keep compiled programs in the user's cache folder for the next start."""
    workdir: str | None = None
    """Folder of the run; else runs/represent-DATA-STUDENT-HASH, the same for the same options."""
    resume: bool = True
    """Go on with what the folder holds. --no-resume: start over, prior included; the former run is
    kept beside it under another name."""
    tensorboard: bool = False
    """Write TensorBoard files too (extra: tensorboard)."""

    @property
    def folder(self) -> Path:
        """The run's folder; absolute, for a graph names its prior by its path."""
        return Path(os.path.expanduser(self.workdir or ".")).absolute()

    @property
    def prior_path(self) -> Path:
        """Where the student's prior is, or will be."""
        given = os.path.expanduser(self.prior or "")
        return Path(given).absolute() if self.prior else self.folder / PRIOR

    def graph(self, seen: Input | None = None) -> ktg.Graph:
        """The student alone, with its prior.

        Args:
            seen: how it sees its images.

        Raises:
            InputError: an option of the prior is out of range.
        """
        options = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name.startswith("prior_")
        }
        try:
            prior = str(self.prior_path)
            node = ktg.Node(self.student, STUDENT, prior=prior, input=seen, **options)
            return ktg.graphs.independent([node])
        except InputError as error:
            field = error.field.removeprefix("nodes[0].")
            raise InputError(field, error.value, error.allowed) from None

    def alone_graph(self, seen: Input | None = None) -> ktg.Graph:
        """The same student without its prior, with the same initial weights."""
        return ktg.graphs.independent([ktg.Node(self.student, STUDENT, input=seen)])

    def training(self, **changes: Any) -> TrainConfig:
        """The training of a network that starts from nothing, or, with changes, of another one."""
        fields = training_fields(self) | {
            "imports": self.imports,
            "compile_cache": self.compile_cache,
            "tensorboard": self.tensorboard,
            "workdir": str(self.folder),
        }
        return TrainConfig(**fields | changes)


def check(config: RepresentConfig) -> None:
    """Raises InputError for the first value that is out of range, before anything is loaded."""
    check_training(config)
    ktg.models.check_model(config.student, "student")
    config.graph()
    check_fit(config)
    check_positive("student_learning_rate", config.student_learning_rate)
    at_least(config, 0, "student_learning_rate", most=MOST_RATE)
    if config.prior is not None:
        _check_left_out(config, "a prior", "teacher", "teacher_model", "teacher_input")
    elif config.teacher is None:
        _check_left_out(config, "a teacher that is trained first", "teacher_input")
        ktg.models.check_model(config.teacher_model or TEACHER_MODEL, "teacher_model")


def _check_left_out(config: RepresentConfig, given: str, *fields: str) -> None:
    for field in fields:
        if getattr(config, field) is not None:
            raise InputError(field, getattr(config, field), f"nothing, for {given}")


def default_workdir(config: RepresentConfig, facts: Mapping[str, Any]) -> Path:
    """A folder's name from the options that determine the run: checksums in the place of paths.

    Args:
        config: without a workdir.
        facts: `data_facts` of a user's own data, and checksums of the `teacher` and the `prior`
            that are given.
    """
    fields = without_unused(dataclasses.asdict(config))
    for field in ("workdir", "resume", "tensorboard", "data_dir", "compile_cache", "alone"):
        del fields[field]
    name = f"represent-{data_kind(config.data)}-{config.student}"
    keys = (hash_of(identity({**fields, **facts})), hash_of(fields))
    data = {field: value for field, value in facts.items() if field == "data_facts"}
    return place_of("runs", name, resolved(config.training(), config.graph()) | data, keys)
