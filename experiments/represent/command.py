"""Trains a student with a prior from a teacher's parameters: `python -m experiments.represent`.

Without arguments: a small teacher, its prior and a student on scikit-learn's digits, in a minute
and a half of processor time. `--help` lists all options.
"""

import dataclasses

from rich.console import Console

import ktg_jax as ktg
from ktg_jax.data.dataset import Dataset
from ktg_jax.priors import KernelShapes, about_prior

from ..runs import cli
from ..runs.assemble import check_steps, load
from ..runs.command_line import parse
from ..runs.config import resolved
from ..runs.console import busy, make_console
from ..runs.networks import check_models
from ..runs.observers import require_tensorboard
from ..runs.options import import_modules
from ..runs.pictures import drawn
from ..runs.process import check_platform, prepare
from ..train import train
from .account import account_of, trained_kernels
from .aggregation import (
    PRIOR_OPTIONS,
    check_given_prior,
    make_prior,
    prior_fields,
)
from .config import RepresentConfig, check, default_workdir
from .folder import StudentFolder
from .teacher import (
    Teacher,
    check_teacher_run,
    facts_for_name,
    load_teacher,
    student_kernels,
    trained_teacher,
)


def main() -> None:
    """Does what the command line describes."""
    config = parse(RepresentConfig)
    prepare(config.compile_cache)
    represent(config, make_console())


def represent(config: RepresentConfig, console: Console) -> None:
    """Makes the prior and trains the student with it, or goes on with either.

    Raises:
        InputError: bad input; nearly all of it is found before anything is computed.
        RunError: the fit or a training cannot go on.
    """
    import_modules(config.imports)
    check_platform()
    check(config)
    if config.tensorboard:
        require_tensorboard()
    if config.teacher is not None:
        check_teacher_run(config.teacher, config)
    dataset = None
    if config.workdir is None:
        config, dataset = _with_workdir(config)
    folder, graph = StudentFolder(config.folder), config.graph()
    training = config.training(graph=str(folder.path / "graph.json"))
    if config.resume:
        folder.check(resolved(training, graph))
    if config.resume and config.prior is None:  # as far as it is known before there is a teacher
        folder.prior.check({field: getattr(config, field) for field in PRIOR_OPTIONS})
    dataset = dataset or load(config)
    check_steps(config, dataset)
    models = {"student": config.student}
    if config.teacher is None and config.prior is None:
        models["teacher_model"] = config.teacher_model
    check_models(config.training(), models, dataset)
    with busy(console, "Preparing convolutions"):
        ktg.cpu_convolution()
    if config.prior is not None:
        check_given_prior(config, dataset)
        teacher = None
    else:
        kernels = student_kernels(config, dataset)
        teacher = _teacher(config, kernels, dataset, console)
    if not config.resume and (aside := folder.set_aside()):
        cli.say(console, f"The former run is kept in {aside}.")

    if teacher is not None:
        _make_prior(config, folder, teacher, kernels, dataset, console)
    account = account_of(config, dataset, None if teacher is None else teacher.params)
    drawn(console, folder.pictures, lambda: account.draw(folder.pictures))
    folder.note_graph(graph)
    train(training, console, dataset)
    console.print(account.table(folder))
    kernels_after = trained_kernels(folder, account.prior)
    if drawn(console, folder.pictures, lambda: account.draw(folder.pictures, kernels_after)):
        cli.say(console, f"Pictures of the stages are in {folder.pictures}.")


def _with_workdir(config: RepresentConfig) -> tuple[RepresentConfig, Dataset | None]:
    """The configuration with a default folder, and the data where that was needed for its name."""
    facts, dataset = facts_for_name(config, config.teacher)
    if config.prior is not None:
        facts["prior"] = about_prior(config.prior)["checksum"]
    return dataclasses.replace(config, workdir=str(default_workdir(config, facts))), dataset


def _teacher(
    config: RepresentConfig, kernels: KernelShapes, dataset: Dataset, console: Console
) -> Teacher:
    """The teacher that is given, or one that is trained alone first."""
    if config.teacher is None:
        return trained_teacher(config, kernels, dataset, console)
    teacher = load_teacher(config.teacher, kernels, dataset, config.aggregation)
    if teacher.saw_others:
        cli.say(
            console,
            "The teacher was trained on other images of this data than the student will be: the "
            "student's validation images may be among them.",
        )
    return teacher


def _make_prior(
    config: RepresentConfig,
    folder: StudentFolder,
    teacher: Teacher,
    kernels: KernelShapes,
    dataset: Dataset,
    console: Console,
) -> None:
    """Makes the prior, unless it is there."""
    fields = prior_fields(config, teacher, kernels, dataset)
    folder.prior.check(fields)
    if not folder.prior.is_finished:
        is_fitted = config.aggregation == "fit"
        how = f"fitted in {config.fit_steps} steps" if is_fitted else f"by {config.aggregation}"
        text = f"A prior for {config.student} from {teacher.source} ({teacher.model})"
        cli.say(console, f"{text}, {how}.")
    make_prior(folder.prior, fields, config, teacher, kernels, dataset, console)
