"""From a teacher to a prior in its folder: fitted with a progress bar, or reduced from kernels."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

import ktg_jax as ktg
from ktg_jax.data.dataset import Dataset
from ktg_jax.errors import InputError
from ktg_jax.priors import (
    READERS_FILE,
    KernelShapes,
    Readers,
    about_prior,
    cluster_prior,
    fit_readers,
    layer_prior,
    save_readers,
    svd_prior,
)
from ktg_jax.priors.aggregate import Metrics

from ..runs import cli
from ..runs.console import is_watched, text_column
from ..runs.facts import data_facts, without_test
from ..runs.identity import data_kind
from ..runs.options import training_fields
from ..runs.progress import Countdown
from .config import RepresentConfig
from .folder import PriorFolder
from .options import FitOptions
from .teacher import Teacher

_SHOWN_EVERY = 20  # steps; reading a number waits for the device
_LINES = 10  # of a fit that nobody watches

PRIOR_OPTIONS = ("student", "data", "aggregation")
"""Options that determine any prior."""

_OF_ANY = ("classes", "image_shape", "class_names_crc32")
"""Facts of the data that a prior is for, if it is made without images."""

_OF_FIT = ("batch_size", "seed", "augment", "mirror")


def prior_fields(
    config: RepresentConfig, teacher: Teacher, kernels: KernelShapes, dataset: Dataset
) -> dict[str, Any]:
    """What determines the prior, as JSON: two that agree in it are the same prior."""
    fields: dict[str, Any] = {field: getattr(config, field) for field in PRIOR_OPTIONS}
    fields["kernels"] = {path: list(shape) for path, shape in kernels.items()}
    fields["teacher"] = {"model": teacher.model, "checksum": teacher.checksum}
    if config.aggregation == "cluster":
        fields["seed"] = config.seed
    facts = without_test(data_facts(dataset))
    facts.pop("val_crc32", None)
    if config.aggregation == "fit":
        training = training_fields(config)
        fields |= {field: training[field] for field in _OF_FIT}
        for field in dataclasses.fields(FitOptions):
            fields[field.name] = getattr(config, field.name)
    else:  # of which the images are no part
        facts = {field: facts[field] for field in _OF_ANY}
    return fields | {"data_facts": facts}


def make_prior(
    folder: PriorFolder,
    fields: Mapping[str, Any],
    config: RepresentConfig,
    teacher: Teacher,
    kernels: KernelShapes,
    dataset: Dataset,
    console: Console,
) -> None:
    """Makes the prior in its folder, unless it is there; an interrupted fit begins anew.

    Args:
        folder: the folder of the prior.
        fields: as `prior_fields` returns them.
        config: how it is made.
        teacher: from whose parameters.
        kernels: the kernels of the student.
        dataset: that it is fitted on.
        console: where to say what is done.

    Raises:
        InputError: the folder holds another prior, or kernels do not fit the teacher's.
        RunError: the fit diverged.
    """
    folder.check(fields)
    if folder.is_finished:
        return
    with folder.begun(fields, config.data_dir):
        if config.aggregation == "fit":
            readers = _fitted(config, teacher, kernels, dataset, console)
            save_readers(folder.path / READERS_FILE, readers)
            prior = readers.prior(tuple(kernels))
        elif config.aggregation == "svd":
            prior = svd_prior(teacher.params, kernels)
        elif config.aggregation == "layers":
            prior = layer_prior(teacher.params, kernels)
        else:
            prior = cluster_prior(teacher.params, kernels, config.seed)
        ktg.save_prior(
            folder.file,
            prior,
            student=config.student,
            num_classes=dataset.num_classes,
            image_shape=dataset.image_shape,
            about={
                "data": config.data,
                "aggregation": config.aggregation,
                "teacher": teacher.source,
                "teacher_model": teacher.model,
            },
        )


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


def _fitted(
    config: RepresentConfig,
    teacher: Teacher,
    kernels: KernelShapes,
    dataset: Dataset,
    console: Console,
) -> Readers:
    train, steps = dataset.train, config.fit_steps
    watched, countdown = is_watched(console), Countdown(steps)
    rate = optax.cosine_decay_schedule(config.fit_learning_rate, config.fit_steps)
    progress = Progress(
        text_column("fitting the prior: {task.fields[accuracies]}"),
        BarColumn(),
        MofNCompleteColumn(),
        text_column("steps, left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not watched,
    )
    bar = progress.add_task("", total=config.fit_steps, accuracies="compiling")

    def show(step: int, metrics: Metrics) -> None:
        nonlocal countdown
        if step == 1:  # which compiled, unlike those that are left
            countdown = Countdown(steps, done=1)
        if step % (_SHOWN_EVERY if watched else max(steps // _LINES, 1)):
            return
        numbers = " ".join(f"{100 * a:.0f}" for a in metrics["accuracy"].tolist())
        accuracies = f"heads {numbers} %"
        progress.update(bar, completed=step, accuracies=accuracies)
        if not watched:
            left = countdown.left(step)
            cli.say(console, f"fitting the prior: step {step}/{steps}, {accuracies}; {left}")

    with progress:
        return fit_readers(
            teacher.fns,
            teacher.params,
            teacher.model_state,
            kernels,
            train.images,
            train.labels,
            rng=jax.random.key(config.seed),
            steps=config.fit_steps,
            batch_size=config.batch_size,
            optimizer=optax.adamw(rate, weight_decay=config.fit_weight_decay),
            max_offset=min(dataset.image_shape[:2]) // 8 if config.augment else 0,
            flip=config.augment and config.mirror and dataset.flip,
            on_step=show,
        )
