"""What `experiments.represent` is asked to do: the command line's fields, and their checks."""

import dataclasses
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Any, Literal

import tyro

import ktg_jax as ktg
import ktg_jax.models
from experiments.config import TrainConfig
from experiments.options import Training, check_training, digest, training_fields
from experiments.representing.folder import PRIOR
from experiments.representing.options import (
    FitOptions,
    StudentOptions,
    TeacherOptions,
    check_fit,
)
from ktg_jax.errors import InputError

STUDENT = "student"
"""The student's name in its graph: with the seed it determines the initial weights."""


@dataclass(frozen=True)
class _PriorOptions:
    prior: str | None = None
    """Take this prior and fit none: a file, or the folder that it is in (WORKDIR/prior of another
    run). No teacher is needed then."""
    aggregation: Literal["fit", "svd", "cluster", "layers"] = "fit"
    """fit: a downscaling layer for each stage of the teacher, fitted on the training images; svd,
    cluster: the teacher's own kernels, stage by stage, reduced by truncated SVD or by clustering;
    layers: no aggregation, one of the teacher's layers for each of the student's, by SVD."""
    prior_weight: float = 1.0
    """Of the prior's loss beside the cross-entropy; 0: the prior only says how the student begins,
    with --prior-matching initialise."""
    prior_quantile: float = 0.7
    """Share of the prior's gradient, the smallest entries, that is cut off; 0 to 1."""
    prior_schedule: Literal["linear", "constant"] = "linear"
    """linear: the weight falls to 0 over the training; constant: it stays."""
    prior_matching: Literal["initialise", "assignment", "none"] = "initialise"
    """initialise: the student starts from the prior; assignment: the prior's filters are assigned
    to those that the student starts from; none: filter i speaks of filter i."""


@dataclass(frozen=True)
class RepresentConfig(  # the last's fields come first
    Training, FitOptions, _PriorOptions, StudentOptions, TeacherOptions
):
    """Train a student with prior knowledge from a teacher's parameters (Knowledge Representing).

    The teacher's stages are aggregated into a prior, kernels of the student's shape; the student is
    then trained with it as by experiments.train, whose files the workdir has, next to prior/.
    Running the same command again goes on where it stopped.
    """

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
        """Of the run; absolute, for a graph names its prior by its path."""
        return Path(self.workdir or _default_workdir(self)).absolute()

    @property
    def prior_path(self) -> Path:
        """Where the student's prior is, or will be."""
        return Path(self.prior).absolute() if self.prior else self.folder / PRIOR

    def graph(self) -> ktg.Graph:
        """The student alone, with its prior.

        Raises:
            InputError: an option of the prior is out of range.
        """
        options = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name.startswith("prior_")
        }
        try:
            node = ktg.Node(self.student, STUDENT, prior=str(self.prior_path), **options)
            return ktg.graphs.independent([node])
        except InputError as error:
            field = error.field.removeprefix("nodes[0].")
            raise InputError(field, error.value, error.allowed) from None

    def training(self, **changes: Any) -> TrainConfig:
        """The training of the student, or, with changes, of another network in the same way."""
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
    ktg.models.check_model(config.student)
    config.graph()
    check_fit(config)
    default = RepresentConfig()
    if config.prior is not None:
        _check_left_out(config, default, "a prior", "teacher", "teacher_model", "student_layers")
    if config.teacher is not None:
        _check_left_out(config, default, "a teacher", "teacher_model")
    elif config.prior is None:
        ktg.models.check_model(config.teacher_model)


def _check_left_out(
    config: RepresentConfig, default: RepresentConfig, given: str, *fields: str
) -> None:
    for field in fields:
        if getattr(config, field) != getattr(default, field):
            raise InputError(field, getattr(config, field), f"nothing, for {given} is given")


def _default_workdir(config: RepresentConfig) -> Path:
    """A folder's name from the options that determine the run."""
    fields = dataclasses.asdict(config)
    for field in ("workdir", "resume", "tensorboard", "data_dir", "compile_cache"):
        del fields[field]
    data = config.data.partition(":")[0]
    return Path("runs") / f"represent-{data}-{config.student}-{digest(fields)}"


def parse(arguments: list[str] | None = None) -> RepresentConfig:
    """The configuration of a command line (default: this process's)."""
    return tyro.cli(
        RepresentConfig,
        prog="python -m experiments.represent",
        description=f"{cleandoc(RepresentConfig.__doc__ or '')}\n\n{EXAMPLES}",
        args=arguments,
    )


EXAMPLES = """Examples:
  python -m experiments.represent
  python -m experiments.represent --teacher runs/teacher --student resnet8 --data cifar10
      --epochs 60 --workdir runs/student
  python -m experiments.represent --teacher runs/dml:resnet32-1 --aggregation svd --data cifar100
      --prior-quantile 0.9 --prior-schedule constant
  python -m experiments.represent --prior runs/student/prior --prior-weight 0 --data cifar10"""
