"""What of Knowledge Representing does what: `python -m experiments.ablation --help`.

Named arms, each with several seeds, paired by seed: a student alone, started from the prior, with
the prior's loss and its sparse recoding, with distillation, attention transfer and mutual learning,
and combined.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from rich.console import Console

import ktg_jax as ktg
from experiments import cli
from experiments.ablating.arms import Arm, Setting, chosen
from experiments.ablating.config import AblationConfig, check, parse, resolved
from experiments.ablating.folder import AblationFolder
from experiments.ablating.study import Record, results_of
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
    if config.teacher is not None:
        first = config.represent(config.students[0], config.seed, "fit")
        check_teacher_run(config.teacher, first)
    fields = resolved(config)
    for student in config.students:
        AblationFolder(config.folder_of(student)).check(fields)
    dataset = load(config)
    steps_per_epoch(len(dataset.train), config.batch_size)
    if dataset.test is None:
        raise InputError("data", config.data, "data with test images")
    with console.status("Preparing convolutions"):
        ktg.cpu_convolution()
    kernels = _kernels(config, arms, dataset)
    teacher = _teacher(config, kernels, dataset, console)
    facts = {"data_facts": data_facts(dataset), "teacher": teacher.checksum}
    studies = [
        Study(config, student, teacher, kernels[student], dataset, console)
        for student in config.students
    ]
    with ExitStack() as locks:
        for study in studies:
            study.folder.begin(fields | {"student": study.student} | facts, config.data_dir)
            locks.enter_context(study.folder.locked())
        for done, seed in enumerate(config.all_seeds, start=1):
            for study in studies:
                for arm in arms:
                    study.run(arm, seed)
                results = study.sum_up(arms, config.all_seeds[:done])
                if done == config.seeds:
                    cli.say(console, f"{study.student}:")
                    console.print(table(results))
    cli.say(console, f"Results, tables and curves are in {config.folder}.")


def _kernels(
    config: AblationConfig, arms: Sequence[Arm], dataset: Dataset
) -> dict[str, dict[str, KernelShapes]]:
    """For each student, and each aggregation that an arm asks for, the kernels it speaks of."""
    used = dict.fromkeys(["fit", *(how for arm in arms for how in arm.aggregations)])
    return {
        student: {
            how: student_kernels(config.represent(student, config.seed, how), dataset)
            for how in used
        }
        for student in config.students
    }


def _teacher(
    config: AblationConfig,
    kernels: Mapping[str, Mapping[str, KernelShapes]],
    dataset: Dataset,
    console: Console,
) -> Teacher:
    """The teacher that is given, or one that is trained alone first; it fits every student."""
    first, *_ = config.students
    if config.teacher is None:
        how = config.represent(first, config.seed, "fit")
        teacher = trained_teacher(how, kernels[first]["fit"], dataset, console)
    else:
        teacher = load_teacher(config.teacher, kernels[first]["fit"], dataset, "fit")
    for student, of_student in kernels.items():
        for aggregation, of_prior in of_student.items():
            how = config.represent(student, config.seed, aggregation)
            check_stages(teacher.model, of_prior, dataset, how.aggregation)
    return teacher


@dataclass(frozen=True)
class Study:
    """All arms of one student.

    Attributes:
        config: of the ablation.
        student: its model.
        teacher: of the priors and of the arms that hear it.
        kernels: of the student, by aggregation.
        dataset: for all trainings.
        console: where to say what is done.
    """

    config: AblationConfig
    student: str
    teacher: Teacher
    kernels: Mapping[str, KernelShapes]
    dataset: Dataset
    console: Console

    @property
    def folder(self) -> AblationFolder:
        """Of the priors and runs."""
        return AblationFolder(self.config.folder_of(self.student))

    def run(self, arm: Arm, seed: int) -> None:
        """Trains an arm with a seed, unless that is done, and makes its priors before."""
        run = self.folder.run(arm.name, seed)
        if run.result is not None:
            return
        cli.say(self.console, f"{self.student}, {arm.name}, seed {seed}: {arm.about}.")
        for aggregation in arm.aggregations:
            how = self.config.represent(self.student, seed, aggregation)
            kernels = self.kernels[aggregation]
            fields = prior_fields(how, self.teacher, kernels, self.dataset)
            prior = PriorFolder(how.prior_path)
            make_prior(prior, fields, how, self.teacher, kernels, self.dataset, self.console)
        graph = self.folder.graph_file(arm.name, seed)
        graph.parent.mkdir(parents=True, exist_ok=True)
        arm.graph(self._setting(seed)).save(graph)
        training = self.config.training(seed, graph=str(graph), workdir=str(run.path))
        train(training, self.console, self.dataset)

    def _setting(self, seed: int) -> Setting:
        config = self.config
        return Setting(
            self.student,
            self.teacher.source,
            self.teacher.model,
            config.prior_weight,
            config.prior_schedule,
            config.temperature,
            config.attention_weight,
            config.feature_weight,
            lambda aggregation: str(config.represent(self.student, seed, aggregation).prior_path),
        )

    def sum_up(self, arms: Sequence[Arm], seeds: Sequence[int]) -> Record:
        """Writes, and returns, what is known after these seeds."""
        from experiments.ablating.pictures import draw_arms  # matplotlib takes a second

        folder = self.folder
        runs: dict[str, list[Workdir]] = {
            arm.name: [folder.run(arm.name, seed) for seed in seeds] for arm in arms
        }
        results = results_of(arms, runs, seeds, self.config.reach)
        write_text(folder.path / "results.md", markdown(results))
        draw_arms(results, [folder.path / "curves.svg", folder.path / "curves.png"])
        folder.write("results.json", results)
        return results


if __name__ == "__main__":
    cli.run(main, "interrupted; the same command goes on where it stopped")
