"""From a teacher to a prior in its folder: chosen, or fitted with progress, and gone on with."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

import ktg_jax as ktg
from ktg_jax.data.dataset import Dataset
from ktg_jax.errors import InputError
from ktg_jax.inputs import Input
from ktg_jax.models.network import NodeFns
from ktg_jax.models.pixels import to_float
from ktg_jax.priors import about_prior, stage_convolutions
from ktg_jax.priors.channels import Variables, evenly
from ktg_jax.priors.fitting import CHECKED_EVERY, FitPlan, FitState, Fitted, Metrics
from ktg_jax.priors.pair import Pair, stage_residuals
from ktg_jax.training.state import node_rng

from ..runs import cli
from ..runs.console import is_watched, text_column
from ..runs.facts import data_facts, without_test
from ..runs.identity import data_kind
from ..runs.options import training_fields
from ..runs.progress import Countdown
from .config import STUDENT, RepresentConfig
from .folder import PriorFolder
from .options import TEACHER_MODEL, FitOptions
from .teacher import Teacher, network

_SHOWN_EVERY = 20  # steps; reading a number waits for the device
_LINES = 10  # of a fit that nobody watches
_JUDGED, _AT_ONCE = 500, 100  # images

PRIOR_OPTIONS = ("student", "data", "aggregation")
"""Options that determine any prior."""

_OF_ANY = ("classes", "image_shape", "class_names_crc32")
"""Facts of the data that a prior is for, if it is made without images."""

_OF_FIT = ("batch_size", "seed", "augment", "mirror")

SELECT = "select"


def prior_fields(config: RepresentConfig, teacher: Teacher, dataset: Dataset) -> dict[str, Any]:
    """What determines the prior, as JSON: two that agree in it are the same prior."""
    fields: dict[str, Any] = {field: getattr(config, field) for field in PRIOR_OPTIONS}
    fields["teacher"] = {"model": teacher.model, "checksum": teacher.checksum}
    if teacher.input != Input():
        fields["teacher"]["input"] = teacher.input.to_json()
    facts = without_test(data_facts(dataset))
    facts.pop("val_crc32", None)
    if config.aggregation == SELECT:  # of which the images are no part
        facts = {field: facts[field] for field in _OF_ANY}
    else:
        training = training_fields(config)
        fields |= {field: training[field] for field in _OF_FIT}
        for field in dataclasses.fields(FitOptions):
            fields[field.name] = getattr(config, field.name)
    return fields | {"data_facts": facts}


def steps_of(prior: str) -> int:
    """How many updates a prior was fitted with; a file that does not say it, with none."""
    return int(about_prior(prior).get("fit_steps", "0"))


def check_pair(config: RepresentConfig, teacher: Teacher, dataset: Dataset) -> None:
    """Raises InputError unless the student can have such a prior from the teacher."""
    _check_match(config, teacher.model, teacher.fns, teacher.input, dataset)


def check_models_match(config: RepresentConfig, dataset: Dataset) -> None:
    """The same for a teacher that is not trained yet."""
    model = config.teacher_model or TEACHER_MODEL
    _check_match(config, model, network(model, None, dataset), None, dataset)


def _check_match(
    config: RepresentConfig, model: str, teacher: NodeFns, wanted: Input | None, dataset: Dataset
) -> None:
    fns, images = network(config.student, wanted, dataset), jnp.zeros((1, *dataset.image_shape))
    theirs, own = (jax.eval_shape(f.init, jax.random.key(0), images) for f in (teacher, fns))
    pair = Pair.of(teacher, theirs, fns, own, dataset.image_shape)
    stage_convolutions(own[0], fns.stage_paths)
    if config.aggregation == SELECT and pair.channels is None:
        allowed = f"a student of the family of {model}, no wider or deeper"
        others = "another is fitted by regression or recast"
        raise InputError("student", config.student, f"{allowed}; {others}")


def make_prior(
    folder: PriorFolder,
    fields: Mapping[str, Any],
    config: RepresentConfig,
    teacher: Teacher,
    dataset: Dataset,
    console: Console,
) -> None:
    """Makes the prior in its folder, unless it is there; goes on with an interrupted fit.

    Args:
        folder: the folder of the prior.
        fields: as `prior_fields` returns them.
        config: how it is made.
        teacher: from whose parameters.
        dataset: that it is fitted on.
        console: where to say what is done.

    Raises:
        InputError: the folder holds another prior, or student and teacher do not match.
        RunError: the fit diverged.
    """
    folder.check(fields)
    if folder.is_finished:
        return
    with folder.begun(fields, config.data_dir):
        student = network(config.student, teacher.input, dataset)
        variables, metrics = _aggregated(folder, config, teacher, student, dataset, console)
        steps = 0 if config.aggregation == SELECT else config.fit_steps
        ktg.save_prior(
            folder.file,
            ktg.whole_prior(*variables),
            student=config.student,
            num_classes=dataset.num_classes,
            image_shape=dataset.image_shape,
            about={
                "data": config.data,
                "aggregation": config.aggregation,
                "teacher": teacher.source,
                "teacher_model": teacher.model,
                "input": json.dumps(None if teacher.input == Input() else teacher.input.to_json()),
                "fit_steps": str(steps),
                "stages": json.dumps([float(left) for left in metrics.get("stages", ())]),
                "whole": json.dumps(_errors(teacher, student, variables, dataset)),
            },
        )
        folder.forget_fit()


def _errors(
    teacher: Teacher, student: NodeFns, variables: Variables, dataset: Dataset
) -> list[float]:
    """What the whole student gets wrong of each stage, on some training images."""
    pair = Pair.of(teacher.fns, teacher.variables, student, variables, dataset.image_shape)
    images = dataset.train.images
    chosen = evenly(len(images), min(_JUDGED, len(images)))  # of all classes, where they are sorted
    given = pair, teacher.fns, teacher.variables, student, variables
    found = [
        stage_residuals(*given, to_float(images[batch]))
        for batch in np.array_split(chosen, -(-len(chosen) // _AT_ONCE))
    ]
    errors = [error for error in found if error is not None]
    return [float(error) for error in np.mean(errors, axis=0)] if errors else []


def check_given_prior(config: RepresentConfig, dataset: Dataset) -> None:
    """Checks that a prior of another run is for this student and data.

    Raises:
        InputError: a file that holds no prior, or one for another student or other data.
    """
    about = about_prior(str(config.prior))
    wanted = {
        "student": config.student,
        "num_classes": json.dumps(dataset.num_classes),
        "image_shape": json.dumps(list(dataset.image_shape)),
        "data": data_kind(config.data),
    }
    about["data"] = data_kind(about.get("data", config.data))
    for field, value in wanted.items():
        if about.get(field, value) != value:
            allowed = f"a prior fitted for this student ({field}: {about[field]}, now {value})"
            raise InputError("prior", config.prior, allowed)


def _aggregated(
    folder: PriorFolder,
    config: RepresentConfig,
    teacher: Teacher,
    student: NodeFns,
    dataset: Dataset,
    console: Console,
) -> tuple[Variables, dict[str, Any]]:
    """What the student is to start from, and what is told of the last steps of its fit."""
    images = jnp.zeros((1, *dataset.image_shape))
    init_key, _ = jax.random.split(jax.random.key(config.seed))  # as `assemble` does
    own = student.init(node_rng(init_key, STUDENT), images)
    if config.aggregation == SELECT:
        pair = Pair.of(teacher.fns, teacher.variables, student, own, dataset.image_shape)
        return pair.start(teacher.variables, own), {}
    rng = jax.random.key(config.seed)
    plan: dict[str, Any] = {
        "steps": config.fit_steps,
        "batch_size": config.batch_size,
        "learning_rate": config.fit_learning_rate,
        "max_offset": min(dataset.image_shape[:2]) // 8 if config.augment else 0,
        "flip": config.augment and config.mirror and dataset.flip,
    }
    fit: Any = ktg.recast_stages
    if config.aggregation == "regression":
        fit = functools.partial(ktg.regress_stages, inputs=config.fit_inputs)
    state = folder.fit()
    first_step = 0 if state is None else int(state["step"])
    counted = itertools.count(first_step + 1)
    train = dataset.train
    with _Shown(config, first_step, console) as shown:

        def on_step(state: FitState, metrics: Metrics) -> None:
            step = next(counted)
            # Not of the last steps, whose means are told: who goes on makes all of them.
            if step % CHECKED_EVERY == 0 and step <= config.fit_steps - config.fit_steps // 10:
                folder.keep_fit(state)
            shown.step(step, metrics)

        fitted: Fitted = fit(
            teacher.fns,
            teacher.variables,
            student,
            own,
            train.images,
            train.labels,
            rng=rng,
            select=config.fit_start == "selected",
            state=state,
            on_step=on_step,
            **plan,
        )
    variables: Variables = fitted[:2]
    if config.fit_statistics == "own":
        rng, how = jax.random.fold_in(rng, 2), FitPlan(**plan)
        variables = ktg.with_own_statistics(student, variables, train.images, how, rng=rng)
    return variables, fitted.metrics


class _Shown:
    """The progress of a fit: a bar where somebody watches, else some lines."""

    def __init__(self, config: RepresentConfig, first_step: int, console: Console) -> None:
        self._steps, self._console = config.fit_steps, console
        self._what = "left of the stages" if config.aggregation == "regression" else "cross-entropy"
        self._first, self._watched = first_step, is_watched(console)
        self._countdown = Countdown(self._steps, done=first_step)
        self._progress = Progress(
            text_column("fitting the prior: {task.fields[numbers]}"),
            BarColumn(),
            MofNCompleteColumn(),
            text_column("steps, left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not self._watched,
        )
        self._bar = self._progress.add_task(
            "", total=self._steps, completed=first_step, numbers="compiling"
        )
        if first_step:
            cli.say(console, f"Going on with the fit after step {first_step} of {self._steps}.")

    def __enter__(self) -> "_Shown":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def step(self, step: int, metrics: Metrics) -> None:
        """Shows a step, now and then."""
        if step == self._first + 1:  # which compiled, unlike those that are left
            self._countdown = Countdown(self._steps, done=step)
        if step % (_SHOWN_EVERY if self._watched else max(self._steps // _LINES, 1)):
            return
        stages = " ".join(f"{value:.2f}" for value in metrics["stages"].tolist())
        numbers = f"{self._what} {stages}"
        self._progress.update(self._bar, completed=step, numbers=numbers)
        if not self._watched:
            left = self._countdown.left(step)
            at = f"fitting the prior: step {step}/{self._steps}"
            cli.say(self._console, f"{at}, {numbers}; {left}")
