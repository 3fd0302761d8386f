"""Trains a student with a prior from a teacher's parameters: `python -m experiments.represent`.

Without arguments: a small teacher, its prior and a student on scikit-learn's digits, in under two
minutes on two CPU cores. `--help` lists all options.
"""

from rich.console import Console

import ktg_jax as ktg
from experiments import cli
from experiments.assemble import load
from experiments.config import resolved
from experiments.options import import_modules
from experiments.process import prepare
from experiments.representing.account import account_of, trained_kernels
from experiments.representing.aggregation import (
    PRIOR_OPTIONS,
    check_given_prior,
    make_prior,
    prior_fields,
)
from experiments.representing.config import RepresentConfig, check, parse
from experiments.representing.folder import StudentFolder
from experiments.representing.teacher import (
    Teacher,
    check_teacher_run,
    load_teacher,
    student_kernels,
    trained_teacher,
)
from experiments.tensorboard import require_tensorboard
from experiments.train import train
from ktg_jax.data.dataset import Dataset
from ktg_jax.data.pipeline import steps_per_epoch
from ktg_jax.representing import KernelShapes


def main() -> None:
    """Does what the command line describes."""
    config = parse()
    prepare(config.compile_cache)
    represent(config, Console())


def represent(config: RepresentConfig, console: Console) -> None:
    """Makes the prior and trains the student with it, or goes on with either.

    Raises:
        InputError: bad input; nearly all of it is found before anything is computed.
        RunError: the fit or a training cannot go on.
    """
    import_modules(config.imports)
    check(config)
    if config.tensorboard:
        require_tensorboard()
    if config.teacher is not None:
        check_teacher_run(config.teacher, config)
    folder, graph = StudentFolder(config.folder), config.graph()
    training = config.training(graph=str(folder.path / "graph.json"))
    if config.resume and folder.has_run:
        folder.check(resolved(training, graph))
    if config.resume and config.prior is None:  # as far as it is known before there is a teacher
        folder.prior.check({field: getattr(config, field) for field in PRIOR_OPTIONS})
    dataset = load(config)
    steps_per_epoch(len(dataset.train), config.batch_size)
    with console.status("Preparing convolutions"):
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
    account.draw(folder.pictures)
    if not folder.has_run:
        graph.save(folder.path / "graph.json")
    train(training, console, dataset)
    account.draw(folder.pictures, trained_kernels(folder, account.prior))
    console.print(account.table(folder))
    cli.say(console, f"Pictures of the stages are in {folder.pictures}.")


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


if __name__ == "__main__":
    cli.run(main, "interrupted; the same command goes on where it stopped")
