"""What the ablation is asked to do: the command line's fields, and their checks."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import ktg_jax as ktg
from ktg_jax.checks import check_positive
from ktg_jax.data.sources import has_val_images
from ktg_jax.errors import InputError, part_of
from ktg_jax.graph.node_checks import checked_number, checked_temperature
from ktg_jax.models import check_model

from ..represent import config as representing
from ..represent.config import RepresentConfig
from ..represent.options import FitOptions, TeacherOptions
from ..runs.command_line import Command
from ..runs.config import TrainConfig
from ..runs.graphs import build_graph
from ..runs.identity import data_kind, identity
from ..runs.options import (
    DATA_AND_TRAINING,
    MOST_RATE,
    MOST_SEEDS,
    Training,
    at_least,
    check_seeds,
    hash_of,
    training_fields,
    without_unused,
)
from ..runs.places import place_of
from .arms import ARMS, STUDENT, Arm, chosen, put_into

_RANDOM, _CHAINED = {"fit_start": "random"}, {"fit_inputs": "own"}
VARIANTS: dict[str, dict[str, Any]] = {
    "chained": {"aggregation": "regression", **_CHAINED},
    "random": {"aggregation": "regression", **_RANDOM},
    "chained-random": {"aggregation": "regression", **_CHAINED, **_RANDOM},
    "fit-statistics": {"aggregation": "regression", "fit_statistics": "fit"},
}
"""What an arm calls an aggregation, where it is one with options of its own."""


@dataclass(frozen=True)
class _StudyOptions:
    students: Annotated[tuple[str, ...], "MODEL"] = ("resnet8",)
    """Models of the students; each goes through all arms."""
    arms: Annotated[tuple[str, ...], "ARM"] = ()
    """Arms to run; else all of them."""
    seeds: int = 5
    """With how many seeds, --seed and those after it; arms are paired by seed, and each seed has
    priors of its own."""
    learning_rates: Annotated[tuple[float, ...], "X"] = (0.02, 0.05, 0.1)
    """Peak learning rates of the students, of which each arm has its own best, by the mean
    accuracy on the validation images after the last epoch. The teacher has --learning-rate."""
    rate_seeds: int = 2
    """With how many of the seeds the rates are compared; with the others the best is used."""
    graph: Annotated[str | None, "FILE|DIR"] = None
    """A graph, as of a search, for the arms `graph` and `graph+prior`: its target is the student,
    its frozen networks are the teacher."""
    temperature: float = 4.0
    """Temperature of the distillation."""
    prior_weight: float = 1.0
    """Weight of the priors' losses."""
    prior_schedule: Literal["linear", "constant"] = "linear"
    """linear: their weights fall to 0 over the training; constant: they stay. The arm `schedule`
    has the other one."""
    attention_weight: float = 1000.0
    """Weight of attention transfer."""
    hint_weight: float = 1.0
    """Weight of the hints, the mean square error of a stage."""


GROUPS = {
    "teacher": "teacher",
    "study": "students",
    "fit": "fit_steps",
    **DATA_AND_TRAINING,
    "speed": "compile_cache",
    "folder": "workdir",
}

_ARMS = "\n".join(f"  {arm.name}: {arm.about}" for arm in ARMS.values())

EXAMPLES = rf"""Arms:
{_ARMS}

Examples:
  python -m experiments.ablation --arms plain plain-long regression prior \
      --seeds 3 --learning-rates 0.02 0.1
  python -m experiments.ablation --data cifar10 --train-limit 5000 \
      --val-fraction 0.2 --image-size 16 --teacher-model resnet20 \
      --students resnet8 resnet8_8 --epochs 20"""


@dataclass(frozen=True)
class AblationConfig(Training, FitOptions, _StudyOptions, TeacherOptions):  # the last's come first
    """Find out what of Knowledge Representing does what: the same student, trained in many ways.

    Each arm is trained with each seed as by the command train, in a folder of its own. Running the
    same command again goes on where it stopped; with more --arms or --seeds it goes on, too.
    """

    command: ClassVar = Command("experiments.ablation", GROUPS, EXAMPLES)

    compile_cache: bool = True
    """Keep compiled programs in the user's cache folder for the next start."""
    workdir: str | None = None
    """Folder of the study; else runs/ablation-DATA-HASH, the same for the same options."""

    @property
    def folder(self) -> Path:
        """The study's folder; absolute, for graphs name their priors by path."""
        return Path(os.path.expanduser(self.workdir or ".")).absolute()

    def folder_of(self, student: str) -> Path:
        """The folder of the runs of one student."""
        return self.folder / student

    @property
    def all_seeds(self) -> list[int]:
        """The seeds."""
        return [self.seed + i for i in range(self.seeds)]

    @property
    def all_rate_seeds(self) -> list[int]:
        """The seeds that learning rates are compared with: with one rate, none has to be."""
        return self.all_seeds[: self.rate_seeds if len(self.learning_rates) > 1 else 0]

    def represent(self, student: str, seed: int, aggregation: str) -> RepresentConfig:
        """How a prior is made; an arm may have a variant of an aggregation."""
        shared = {
            field.name: getattr(self, field.name)
            for options in (Training, FitOptions, TeacherOptions)
            for field in dataclasses.fields(options)
        }
        return RepresentConfig(
            **shared
            | {
                "student": student,
                "seed": seed,
                "aggregation": aggregation,
                **VARIANTS.get(aggregation, {}),
                "prior_weight": self.prior_weight,
                "prior_schedule": self.prior_schedule,
                "compile_cache": self.compile_cache,
                "workdir": str(self.folder_of(student) / "priors" / f"{aggregation}-{seed}"),
            }
        )

    def training(self, seed: int, **changes: Any) -> TrainConfig:
        """How an arm is trained."""
        own = {"imports": self.imports, "compile_cache": self.compile_cache, "seed": seed}
        return TrainConfig(**training_fields(self) | own | changes)

    def epochs_of(self, arm: Arm, num_images: int) -> int:
        """For how many epochs of so many images an arm is trained."""
        per_epoch = num_images // self.batch_size
        return self.epochs + (math.ceil(self.fit_steps / per_epoch) if arm.is_long else 0)


def check(config: AblationConfig) -> None:
    """Raises InputError for the first value that is out of range, before anything is loaded."""
    at_least(config, 1, "seeds", most=MOST_SEEDS)
    check_seeds(config.seed, config.seeds)
    chosen(config.arms, config.graph is not None)
    _check_rates(config)
    if config.graph is not None:
        graph = build_graph(TrainConfig(graph=config.graph))
        with part_of("graph"):
            teacher = ktg.Node("resnet8", "teacher", weights="any")
            put_into(graph, ktg.Node("resnet8", STUDENT), teacher)
    if not config.students or len(set(config.students)) < len(config.students):
        raise InputError("students", list(config.students), "different models, at least one")
    for i, student in enumerate(config.students):
        check_model(student, f"students[{i}]")
        representing.check(config.represent(student, config.seed, "regression"))
    checked_temperature("temperature", config.temperature)
    for field in ("attention_weight", "hint_weight"):
        check_positive(field, getattr(config, field))
        checked_number(field, getattr(config, field))


def _check_rates(config: AblationConfig) -> None:
    rates = config.learning_rates
    if not rates or len({f"{rate:g}" for rate in rates}) < len(rates):
        allowed = "rates that differ in their first six digits, at least one"
        raise InputError("learning_rates", list(rates), allowed)
    for i, rate in enumerate(rates):
        check_positive(f"learning_rates[{i}]", rate)
        if rate > MOST_RATE:
            raise InputError(f"learning_rates[{i}]", rate, f"at most {MOST_RATE:g}")
    at_least(config, 1, "rate_seeds", most=MOST_SEEDS)
    if (
        len(rates) > 1
        and not config.val_fraction
        and not has_val_images(config.data, config.data_dir)
    ):
        allowed = "above 0: learning rates are compared on validation images"
        raise InputError("val_fraction", config.val_fraction, allowed)


def resolved(config: AblationConfig) -> dict[str, Any]:
    """What determines the runs, as JSON; students, arms and seeds may become more."""
    fields = without_unused(dataclasses.asdict(config))
    more = ("students", "arms", "seeds")
    for field in ("workdir", "data_dir", "compile_cache", "teacher", *more):
        del fields[field]
    if config.graph is None:
        del fields["graph"]
    else:
        fields["graph"] = json.loads(build_graph(TrainConfig(graph=config.graph)).to_json())
    return json.loads(json.dumps(fields))


def default_workdir(config: AblationConfig, facts: Mapping[str, Any]) -> Path:
    """A folder's name from the same and the teacher: checksums in the place of paths.

    Args:
        config: without a workdir.
        facts: `data_facts` of a user's own data, and the checksum of the `teacher` that is given.
    """
    fields = resolved(config)
    data = {field: value for field, value in facts.items() if field == "data_facts"}
    teacher = {"teacher": facts.get("teacher")}
    keys = (
        hash_of(identity(fields | data) | teacher),
        hash_of(fields | {"teacher": config.teacher}),
    )
    name = f"ablation-{data_kind(config.data)}"
    return place_of("runs", name, fields | data, keys, inner=config.students[0])
