"""What of Knowledge Representing does what: `python -m experiments.ablation --help`.

Named arms, each with several seeds, paired by seed: the student alone, started from the prior, with
the prior's loss and its sparse recoding, with distillation and mutual learning, and combined.
"""

from collections.abc import Sequence

from rich.console import Console

import ktg_jax as ktg
from experiments import cli
from experiments.ablating.arms import Arm, Setting, chosen
from experiments.ablating.config import AblationConfig, check, parse, resolved
from experiments.ablating.folder import AblationFolder
from experiments.ablating.study import results_of
from experiments.ablating.tables import markdown, table
from experiments.assemble import data_facts, load
from experiments.options import import_modules
from experiments.process import prepare
from experiments.representing.aggregation import make_prior, prior_fields
from experiments.representing.folder import PriorFolder
from experiments.representing.teacher import (
    Teacher,
    check_stages,
    check_teacher_run,
    load_teacher,
    student_kernels,
    trained_teacher,
)
from experiments.train import train
from experiments.workdir import Workdir
from ktg_jax.data.dataset import Dataset
from ktg_jax.data.pipeline import steps_per_epoch
from ktg_jax.errors import InputError
from ktg_jax.files import write_text
from ktg_jax.representing import KernelShapes


def main() -> None:
    """Runs what the command line describes."""
    config = parse()
    prepare(config.compile_cache)
    ablate(config, Console())


def ablate(config: AblationConfig, console: Console) -> None:
    """Runs the arms that are not run yet, and compares them all.

    Raises:
        InputError: bad input; nearly all of it is found before anything is computed.
        RunError: a fit or a training cannot go on.
    """
    import_modules(config.imports)
    check(config)
    arms = chosen(config.arms)
    first = config.represent(config.seed, "fit")
    if config.teacher is not None:
        check_teacher_run(config.teacher, first)
    folder, fields = AblationFolder(config.folder), resolved(config)
    folder.check(fields)
    dataset = load(config)
    steps_per_epoch(len(dataset.train), config.batch_size)
    if dataset.test is None:
        raise InputError("data", config.data, "data with test images")
    with console.status("Preparing convolutions"):
        ktg.cpu_convolution()
    kernels = student_kernels(first, dataset)
    if config.teacher is None:
        teacher = trained_teacher(first, kernels, dataset, console)
    else:
        teacher = load_teacher(config.teacher, kernels, dataset, "fit")
    for aggregation in {how for arm in arms for how in arm.aggregations}:
        check_stages(teacher.model, kernels, dataset, aggregation)
    facts = {"data_facts": data_facts(dataset), "teacher": teacher.checksum}
    folder.begin(fields | facts, config.data_dir)
    with folder.locked():
        for done, seed in enumerate(config.all_seeds, start=1):
            for arm in arms:
                _run(arm, seed, config, folder, teacher, kernels, dataset, console)
            _sum_up(arms, config.all_seeds[:done], config, folder, console)
    cli.say(console, f"Results, tables and curves are in {folder.path}.")


def _run(
    arm: Arm,
    seed: int,
    config: AblationConfig,
    folder: AblationFolder,
    teacher: Teacher,
    kernels: KernelShapes,
    dataset: Dataset,
    console: Console,
) -> None:
    """Trains an arm with a seed, unless that is done, and makes its priors before."""
    run = folder.run(arm.name, seed)
    if run.result is not None:
        return
    cli.say(console, f"{arm.name}, seed {seed}: {arm.about}.")
    for aggregation in arm.aggregations:
        how = config.represent(seed, aggregation)
        prior = PriorFolder(how.prior_path)
        fields = prior_fields(how, teacher, kernels, dataset)
        make_prior(prior, fields, how, teacher, kernels, dataset, console)
    setting = Setting(
        config.student,
        teacher.source,
        teacher.model,
        config.prior_weight,
        config.prior_schedule,
        config.temperature,
        lambda aggregation: str(config.represent(seed, aggregation).prior_path),
    )
    graph = folder.graph_file(arm.name, seed)
    graph.parent.mkdir(parents=True, exist_ok=True)
    arm.graph(setting).save(graph)
    train(config.training(seed, graph=str(graph), workdir=str(run.path)), console, dataset)


def _sum_up(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    config: AblationConfig,
    folder: AblationFolder,
    console: Console,
) -> None:
    """Writes what is known after these seeds."""
    from experiments.ablating.pictures import draw_arms  # matplotlib takes a second

    runs: dict[str, list[Workdir]] = {
        arm.name: [folder.run(arm.name, seed) for seed in seeds] for arm in arms
    }
    results = results_of(arms, runs, seeds, config.reach)
    write_text(folder.path / "results.md", markdown(results))
    draw_arms(results, [folder.path / "curves.svg", folder.path / "curves.png"])
    folder.write("results.json", results)
    if len(seeds) == config.seeds:
        console.print(table(results))


if __name__ == "__main__":
    cli.run(main, "interrupted; the same command goes on where it stopped")
