"""What of Knowledge Representing does what: `python -m experiments.ablation --help`.

Named arms, each with several seeds, paired by seed: a student alone, started from the prior, with
the prior's loss and its sparse recoding, with distillation, attention transfer and mutual learning,
and combined.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from rich.console import Console

import ktg_jax as ktg
from ktg_jax.data.dataset import Dataset
from ktg_jax.errors import InputError
from ktg_jax.io.files import write_text
from ktg_jax.priors import KernelShapes

from ..represent.aggregation import make_prior, prior_fields
from ..represent.folder import PriorFolder
from ..represent.teacher import (
    Teacher,
    check_stages,
    check_teacher_run,
    facts_for_name,
    load_teacher,
    student_kernels,
    trained_teacher,
)
from ..runs import cli
from ..runs.assemble import check_steps, load
from ..runs.command_line import parse
from ..runs.console import busy, make_console
from ..runs.facts import data_facts
from ..runs.networks import check_models
from ..runs.options import import_modules
from ..runs.pictures import drawn
from ..runs.process import check_platform, prepare
from ..runs.progress import Countdown
from ..runs.workdir import Workdir
from ..train import train
from .arms import Arm, Setting, chosen
from .config import AblationConfig, check, default_workdir, resolved
from .folder import AblationFolder
from .study import Record, results_of
from .tables import markdown, table


def main() -> None:
    """Runs what the command line describes."""
    config = parse(AblationConfig)
    prepare(config.compile_cache)
    ablate(config, make_console())


def ablate(config: AblationConfig, console: Console) -> None:
    """Runs the arms that are not run yet, and compares them all.

    Raises:
        InputError: bad input; nearly all of it is found before anything is computed.
        RunError: a fit or a training cannot go on.
    """
    import_modules(config.imports)
    check_platform()
    check(config)
    arms = chosen(config.arms)
    if config.teacher is not None:
        first = config.represent(config.students[0], config.seed, "fit")
        check_teacher_run(config.teacher, first)
    dataset = None
    if config.workdir is None:
        config, dataset = _with_workdir(config)
    fields = resolved(config)
    for student in config.students:
        AblationFolder(config.folder_of(student)).check(fields)
    dataset = dataset or load(config)
    check_steps(config, dataset)
    models = {f"students[{i}]": student for i, student in enumerate(config.students)}
    if config.teacher is None:
        models["teacher_model"] = config.teacher_model
    check_models(config.training(config.seed), models, dataset)
    if dataset.test is None:
        raise InputError("data", config.data, "data with test images")
    with busy(console, "Preparing convolutions"):
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
            whose = fields | {"student": study.student} | facts
            locks.enter_context(study.folder.begun(whose, config.data_dir))
        progress = _Progress(studies, arms, console)
        for done, seed in enumerate(config.all_seeds, start=1):
            for study in studies:
                for arm in arms:
                    progress.run(study, arm, seed)
                results = study.sum_up(arms, config.all_seeds[:done])
                if done == config.seeds:
                    cli.say(console, f"{study.student}:")
                    console.print(table(results))
    cli.say(console, f"Results, tables and curves are in {config.folder}.")


def _with_workdir(config: AblationConfig) -> tuple[AblationConfig, Dataset | None]:
    """The configuration with a default folder, and the data where that was needed for its name."""
    facts, dataset = facts_for_name(config, config.teacher)
    return replace(config, workdir=str(default_workdir(config, facts))), dataset


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


class _Progress:
    """Says which run is made, how many there are, and how long they take."""

    def __init__(self, studies: Sequence["Study"], arms: Sequence[Arm], console: Console) -> None:
        self._console = console
        seeds = studies[0].config.all_seeds
        runs = [study.is_done(arm, seed) for study in studies for arm in arms for seed in seeds]
        self._total, self._done = len(runs), sum(runs)
        self._countdown = Countdown(self._total, self._done)

    def run(self, study: "Study", arm: Arm, seed: int) -> None:
        """Trains an arm with a seed, unless that is done."""
        if study.is_done(arm, seed):
            return
        left = self._countdown.left(self._done)
        self._done += 1
        at = f"run {self._done} of {self._total}, {left}"
        cli.say(self._console, f"{study.student}, {arm.name}, seed {seed}: {arm.about}; {at}")
        study.run(arm, seed)


@dataclass(frozen=True)
class Study:
    """All arms of one student.

    Attributes:
        config: the configuration of the ablation.
        student: its model.
        teacher: the teacher of the priors and of the arms that hear it.
        kernels: the kernels of the student, by aggregation.
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
        """The folder of the priors and runs."""
        return AblationFolder(self.config.folder_of(self.student))

    def is_done(self, arm: Arm, seed: int) -> bool:
        """Whether an arm was trained with a seed."""
        return self.folder.run(arm.name, seed).result is not None

    def run(self, arm: Arm, seed: int) -> None:
        """Trains an arm with a seed, and makes its priors before."""
        run = self.folder.run(arm.name, seed)
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
        folder = self.folder
        runs: dict[str, list[Workdir]] = {
            arm.name: [folder.run(arm.name, seed) for seed in seeds] for arm in arms
        }
        results = results_of(arms, runs, seeds)
        write_text(folder.path / "results.md", markdown(results))
        folder.write("results.json", results)
        paths = [folder.path / "curves.svg", folder.path / "curves.png"]

        def draw() -> None:
            from .pictures import draw_arms  # matplotlib takes a second

            draw_arms(results, paths)

        drawn(self.console, paths[0], draw)
        return results
