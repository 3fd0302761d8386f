"""What of Knowledge Representing does what: `python -m experiments.ablation --help`.

Named arms, each with several seeds, paired by seed, and each at its own best learning rate: a
student alone, started from the prior, with the prior's loss and its sparse recoding, with
distillation, hints, attention transfer and mutual learning, and combined; and the ways that need no
fit once more for as many steps longer.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

import ktg_jax as ktg
from ktg_jax.data.dataset import Dataset
from ktg_jax.errors import DivergedError, InputError, RunError
from ktg_jax.inputs import Input
from ktg_jax.io.files import write_text

from ..represent.aggregation import check_models_match, check_pair, make_prior, prior_fields
from ..represent.folder import PriorFolder
from ..represent.options import TEACHER_MODEL
from ..represent.teacher import (
    Teacher,
    check_teacher,
    facts_for_name,
    load_teacher,
    say_what_it_saw,
    trained_teacher,
)
from ..runs import cli
from ..runs.assemble import check_steps, load
from ..runs.command_line import parse
from ..runs.config import TrainConfig
from ..runs.console import busy, make_console
from ..runs.facts import data_facts
from ..runs.graphs import build_graph
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
from .study import Record, mean_validation, results_of
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
    arms = chosen(config.arms, config.graph is not None)
    if config.teacher is not None:
        check_teacher(config, config.data)
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
        models["teacher_model"] = config.teacher_model or TEACHER_MODEL
    check_models(config.training(config.seed), models, dataset)
    if dataset.test is None:
        raise InputError("data", config.data, "data with test images")
    with busy(console, "Preparing convolutions"):
        ktg.cpu_convolution()
    teacher = _teacher(config, arms, dataset, console)
    facts = {"data_facts": data_facts(dataset), "teacher": teacher.checksum}
    studies = [Study(config, student, teacher, dataset, console) for student in config.students]
    with ExitStack() as locks:
        for study in studies:
            whose = fields | {"student": study.student} | facts
            locks.enter_context(study.folder.begun(whose, config.data_dir))
        _run(config, studies, arms, console)
    cli.say(console, f"Results, tables and curves are in {config.folder}.")


def _run(
    config: AblationConfig, studies: Sequence["Study"], arms: Sequence[Arm], console: Console
) -> None:
    """Runs all arms seed by seed: first with all rates, then with the best of each arm."""
    progress = _Progress(config, studies, arms, console)
    for done, seed in enumerate(config.all_seeds, start=1):
        for study in studies:
            for arm in arms:
                for rate in study.rates(arm, seed):
                    progress.run(study, arm, rate, seed)
            if done < len(config.all_rate_seeds):
                continue
            results = study.sum_up(arms, config.all_seeds[:done])
            if done == config.seeds:
                cli.say(console, f"{study.student}:")
                console.print(table(results))


def _with_workdir(config: AblationConfig) -> tuple[AblationConfig, Dataset | None]:
    """The configuration with a default folder, and the data where that was needed for its name."""
    facts, dataset = facts_for_name(config, config.teacher)
    return replace(config, workdir=str(default_workdir(config, facts))), dataset


def _teacher(
    config: AblationConfig, arms: Sequence[Arm], dataset: Dataset, console: Console
) -> Teacher:
    """The teacher that is given, or one that is trained alone first; it fits every student."""
    used = dict.fromkeys(how for arm in arms for how in arm.aggregations)
    ways = [
        config.represent(student, config.seed, aggregation)
        for student in config.students
        for aggregation in used
    ]
    if config.teacher is None:
        for how in ways:
            check_models_match(how, dataset)
        first = config.represent(config.students[0], config.seed, "regression")
        return trained_teacher(first, dataset, console)
    teacher = load_teacher(config, dataset)
    for how in ways:
        check_pair(how, teacher, dataset)
    say_what_it_saw(teacher, console)
    return teacher


class _Progress:
    """Says which run is made, how many there are, and how long they take."""

    def __init__(
        self,
        config: AblationConfig,
        studies: Sequence["Study"],
        arms: Sequence[Arm],
        console: Console,
    ) -> None:
        self._console = console
        rates = len(config.learning_rates)
        with_all = len(config.all_rate_seeds)
        self._total = len(studies) * len(arms) * (with_all * rates + config.seeds - with_all)
        self._done = sum(
            study.is_done(arm, rate, seed)
            for study in studies
            for arm in arms
            for seed in config.all_seeds
            for rate in config.learning_rates
        )
        self._countdown = Countdown(self._total, self._done)

    def run(self, study: "Study", arm: Arm, rate: float, seed: int) -> None:
        """Trains an arm with a rate and a seed, unless that is done."""
        if study.is_done(arm, rate, seed):
            return
        left = self._countdown.left(self._done)
        self._done += 1
        at = f"run {self._done} of {self._total}, {left}"
        what = f"{study.student}, {arm.name}, rate {rate:g}, seed {seed}"
        cli.say(self._console, f"{what}: {arm.about}; {at}")
        study.run(arm, rate, seed)


@dataclass(frozen=True)
class Study:
    """All arms of one student.

    Attributes:
        config: the configuration of the ablation.
        student: its model.
        teacher: the teacher of the priors and of the arms that hear it.
        dataset: for all trainings.
        console: where to say what is done.
    """

    config: AblationConfig
    student: str
    teacher: Teacher
    dataset: Dataset
    console: Console

    @property
    def folder(self) -> AblationFolder:
        """The folder of the priors and runs."""
        return AblationFolder(self.config.folder_of(self.student))

    def is_done(self, arm: Arm, rate: float, seed: int) -> bool:
        """Whether an arm was trained with a rate and a seed, or diverged."""
        run = arm.name, rate, seed
        return self.folder.run(*run).result is not None or self.folder.diverged(*run).is_file()

    def rates(self, arm: Arm, seed: int) -> Sequence[float]:
        """The rates that an arm is trained with: all, or its best once that can be said."""
        known = self.config.learning_rates
        return known if seed in self.config.all_rate_seeds else (self.best_rate(arm),)

    def best_rate(self, arm: Arm) -> float:
        """The rate with the best mean validation accuracy; of equal ones the first."""
        rates = self.config.learning_rates
        if len(rates) == 1:
            return rates[0]
        found = {rate: share for rate, share in self.by_rate(arm).items() if share is not None}
        return max(rates, key=lambda rate: found.get(rate, -1.0))

    def by_rate(self, arm: Arm) -> dict[float, float | None]:
        """The mean validation accuracy of an arm with each rate; None: a run diverged."""
        seeds = self.config.all_rate_seeds
        return {
            rate: None
            if self.diverged(arm, rate, seeds)
            else mean_validation([self.folder.run(arm.name, rate, seed) for seed in seeds])
            for rate in self.config.learning_rates
        }

    def diverged(self, arm: Arm, rate: float, seeds: Sequence[int]) -> list[int]:
        """With which of the seeds an arm diverged at a rate."""
        return [seed for seed in seeds if self.folder.diverged(arm.name, rate, seed).is_file()]

    def run(self, arm: Arm, rate: float, seed: int) -> None:
        """Trains an arm with a rate and a seed, and makes its priors before.

        Where that diverges, it is noted and said, and the study goes on.
        """
        try:
            self._train(arm, rate, seed)
        except DivergedError as error:
            write_text(self.folder.diverged(arm.name, rate, seed), f"{error}\n")
            cli.say(self.console, f"It diverged: {error}")

    def _train(self, arm: Arm, rate: float, seed: int) -> None:
        run = self.folder.run(arm.name, rate, seed)
        for aggregation in arm.aggregations:
            how = self.config.represent(self.student, seed, aggregation)
            fields = prior_fields(how, self.teacher, self.dataset)
            prior = PriorFolder(how.prior_path)
            make_prior(prior, fields, how, self.teacher, self.dataset, self.console)
        graph = self.folder.graph_file(arm.name, rate, seed)
        graph.parent.mkdir(parents=True, exist_ok=True)
        arm.graph(self._setting(seed)).save(graph)
        changes: dict[str, Any] = {"graph": str(graph), "workdir": str(run.path)}
        changes["epochs"] = self.config.epochs_of(arm, len(self.dataset.train.labels))
        training = self.config.training(seed, learning_rate=rate, **changes)
        train(training, self.console, self.dataset)

    def _setting(self, seed: int) -> Setting:
        config, seen = self.config, self.teacher.input
        return Setting(
            self.student,
            self.teacher.source,
            self.teacher.model,
            None if seen == Input() else seen,
            config.prior_weight,
            config.prior_schedule,
            config.temperature,
            config.attention_weight,
            config.hint_weight,
            None if config.graph is None else build_graph(TrainConfig(graph=config.graph)),
            lambda aggregation: str(config.represent(self.student, seed, aggregation).prior_path),
        )

    def sum_up(self, arms: Sequence[Arm], seeds: Sequence[int]) -> Record:
        """Writes, and returns, what is known after these seeds.

        Raises:
            RunError: every arm diverged.
        """
        folder = self.folder
        rates = {arm.name: self.best_rate(arm) for arm in arms}
        diverged = {arm.name: self.diverged(arm, rates[arm.name], seeds) for arm in arms}
        arms = [arm for arm in arms if not diverged[arm.name]]
        if not arms:
            raise RunError(f"{folder.path}: every arm diverged; lower --learning-rates may help")
        runs: dict[str, list[Workdir]] = {
            arm.name: [folder.run(arm.name, rates[arm.name], seed) for seed in seeds]
            for arm in arms
        }
        compared = len(self.config.learning_rates) > 1
        by_rate = {arm.name: self.by_rate(arm) for arm in arms} if compared else {}
        results = results_of(arms, runs, seeds, rates, by_rate)
        results["diverged"] = {name: seeds for name, seeds in diverged.items() if seeds}
        write_text(folder.path / "results.md", markdown(results))
        folder.write("results.json", results)
        paths = [folder.path / "curves.svg", folder.path / "curves.png"]

        def draw() -> None:
            from .pictures import draw_arms  # matplotlib takes a second

            draw_arms(results, paths)

        drawn(self.console, paths[0], draw)
        return results
