"""Trains a student with a prior from a teacher's parameters: `python -m experiments.represent`.

Without arguments: a small teacher, its prior, a student that starts from it and the same student
alone, on scikit-learn's digits. `--help` lists all options.
"""

import dataclasses
import math

from rich.console import Console

import ktg_jax as ktg
from ktg_jax.data.dataset import Dataset
from ktg_jax.priors import about_prior

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
from .account import account_of, beside_alone, draw_beside_alone, trained_kernels
from .aggregation import (
    PRIOR_OPTIONS,
    SELECT,
    check_given_prior,
    check_models_match,
    check_pair,
    make_prior,
    prior_fields,
    steps_of,
)
from .config import RepresentConfig, check, default_workdir
from .folder import StudentFolder
from .options import TEACHER_MODEL
from .teacher import (
    Teacher,
    check_teacher,
    facts_for_name,
    load_teacher,
    say_what_it_saw,
    student_input,
    trained_teacher,
)


def main() -> None:
    """Does what the command line describes."""
    config = parse(RepresentConfig)
    prepare(config.compile_cache)
    represent(config, make_console())


def represent(config: RepresentConfig, console: Console) -> None:
    """Makes the prior, trains the student with it and alone, or goes on with any of that.

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
        check_teacher(config, config.data)
    dataset = None
    if config.workdir is None:
        config, dataset = _with_workdir(config)
    seen = student_input(config)
    folder, graph = StudentFolder(config.folder), config.graph(seen)
    training = config.training(
        graph=str(folder.path / "graph.json"), learning_rate=config.student_learning_rate
    )
    if config.resume:
        folder.check(resolved(training, graph))
    if config.resume and config.prior is None:  # as far as it is known before there is a teacher
        folder.prior.check({field: getattr(config, field) for field in PRIOR_OPTIONS})
    dataset = dataset or load(config)
    check_steps(config, dataset)
    models = {"student": config.student}
    if config.teacher is None and config.prior is None:
        models["teacher_model"] = config.teacher_model or TEACHER_MODEL
    check_models(config.training(), models, dataset)
    with busy(console, "Preparing convolutions"):
        ktg.cpu_convolution()
    if config.prior is not None:
        check_given_prior(config, dataset)
        teacher = None
    else:
        teacher = _teacher(config, dataset, console)
    if not config.resume and (aside := folder.set_aside()):
        cli.say(console, f"The former run is kept in {aside}.")

    if teacher is not None:
        _make_prior(config, folder, teacher, dataset, console)
    account = account_of(config, dataset, teacher)
    drawn(console, folder.pictures, lambda: account.draw(folder.pictures))
    folder.note_graph(graph)
    train(training, console, dataset)
    console.print(account.table(folder))
    kernels_after = trained_kernels(folder, account.prior)
    if drawn(console, folder.pictures, lambda: account.draw(folder.pictures, kernels_after)):
        cli.say(console, f"Pictures of the stages are in {folder.pictures}.")
    if config.alone:
        _train_alone(config, folder, config.alone_graph(seen), dataset, console)


def _with_workdir(config: RepresentConfig) -> tuple[RepresentConfig, Dataset | None]:
    """The configuration with a default folder, and the data where that was needed for its name."""
    facts, dataset = facts_for_name(config, config.teacher)
    if config.prior is not None:
        facts["prior"] = about_prior(config.prior)["checksum"]
    return dataclasses.replace(config, workdir=str(default_workdir(config, facts))), dataset


def _teacher(config: RepresentConfig, dataset: Dataset, console: Console) -> Teacher:
    """The teacher that is given, or one that is trained alone first; it matches the student."""
    if config.teacher is None:
        check_models_match(config, dataset)
        return trained_teacher(config, dataset, console)
    teacher = load_teacher(config, dataset)
    check_pair(config, teacher, dataset)
    say_what_it_saw(teacher, console)
    return teacher


def _make_prior(
    config: RepresentConfig,
    folder: StudentFolder,
    teacher: Teacher,
    dataset: Dataset,
    console: Console,
) -> None:
    """Makes the prior, unless it is there."""
    fields = prior_fields(config, teacher, dataset)
    folder.prior.check(fields)
    if not folder.prior.is_finished:
        is_fitted = config.aggregation != SELECT
        how = f"fitted in {config.fit_steps} steps" if is_fitted else "a part of it"
        text = f"A prior for {config.student} from {teacher.source} ({teacher.model})"
        cli.say(console, f"{text}, {how} ({config.aggregation}).")
    make_prior(folder.prior, fields, config, teacher, dataset, console)


def _train_alone(
    config: RepresentConfig,
    folder: StudentFolder,
    graph: ktg.Graph,
    dataset: Dataset,
    console: Console,
) -> None:
    """Trains the student alone for as many steps as the fit and the training with the prior."""
    fit_steps = steps_of(str(config.prior_path))
    per_epoch = len(dataset.train.labels) // config.batch_size
    epochs = config.epochs + math.ceil(fit_steps / per_epoch)
    alone = folder.alone
    if alone.result is None:
        why = f" (the fit's {fit_steps} steps are as many as {epochs - config.epochs})"
        text = f"The student alone, for {epochs} epochs{why if fit_steps else ''}."
        cli.say(console, text)
    name = f"{alone.path.name}.json"
    folder.note_graph(graph, name)
    paths = {"graph": str(folder.path / name), "workdir": str(alone.path)}
    training = config.training(epochs=epochs, **paths)
    train(training, console, dataset)
    folder.note_alone(fit_steps)
    console.print(beside_alone(folder))
    picture = folder.path / "beside-alone.png"
    drawn(console, picture, lambda: draw_beside_alone(picture, folder, fit_steps))
