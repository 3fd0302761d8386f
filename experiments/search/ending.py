"""The fair ending: the best graphs and their baselines trained from scratch, and then tested.

All contenders are trained on all training images, those included that were held out for validation,
with the same seeds, and before that nobody reads the test images.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from ktg_jax.errors import InputError, RunError
from ktg_jax.io.files import write_text

from ..comparison import Contender, compare
from ..runs import cli
from ..runs.config import TrainConfig, resolved
from ..runs.console import is_watched, text_column
from ..runs.graphs import build_graph
from ..runs.progress import Countdown
from ..runs.workdir import Workdir
from .config import SearchConfig
from .contenders import contenders
from .folder import SearchFolder
from .records import StudyRecord
from .retraining import is_done
from .tables import markdown, tables
from .team import Team, orders_for

_POLL_SECONDS = 0.3


def finish(
    study: StudyRecord, folder: SearchFolder, config: SearchConfig, console: Console
) -> dict[str, Any] | None:
    """Trains the best graphs and their baselines, unless that was done, and compares them.

    Returns:
        The content of `results.json`; None: no trial was completed.

    Raises:
        RunError: a training fails.
    """
    best = study.best(config.retrain_top)
    if not best:
        cli.say(console, "No trial was completed: there is nothing to train again.")
        return None
    designed = [each for each in study.best(len(study.trials)) if each.trial.baseline is not None]
    listed = contenders(best, study.space.gates, designed)
    first = first_fresh_seed(study, config.seed)
    seeds = [first + i for i in range(config.retrain_seeds)]
    runs = {
        contender.name: [_run(contender, seed, first, folder, config) for seed in seeds]
        for contender in listed
    }
    _train_all([run for of_seeds in runs.values() for run in of_seeds], folder, config, console)
    accuracies = {name: [_accuracy(run) for run in of_seeds] for name, of_seeds in runs.items()}
    results = compare(listed, accuracies, seeds)
    for entry in results["entries"]:
        entry["runs"] = [Path(str(run.workdir)).name for run in runs[entry["name"]]]
    write_text(folder.path / "results.md", markdown(results))
    folder.write("results.json", results)
    for each in tables(results):
        console.print(each)
    return results


def first_fresh_seed(study: StudyRecord, first: int) -> int:
    """The first seed after those of the trials; `first` where these were all trained with that."""
    return max((t.seed + 1 for t in study.trials if t.seed is not None), default=first)


def _run(
    contender: Contender, seed: int, first: int, folder: SearchFolder, config: SearchConfig
) -> TrainConfig:
    """The training of a contender with one seed.

    It is in `seed-S` if it is as long as a trial, or was made there; else in `seed-S-epochs-E`.

    Raises:
        InputError: another run is there.
    """
    here = folder.retrained / contender.name
    here.mkdir(parents=True, exist_ok=True)
    graph = here / "graph.json"
    contender.graph.save(graph)
    epochs = config.retrain_epochs or config.epochs
    order = None if config.retrain_order == "each" else first
    changed = {"seed": seed, "data_seed": order, "epochs": epochs, "val_fraction": 0.0}
    run = config.training(graph=str(graph), **changed)
    fields = resolved(run, build_graph(run))
    workdir = Workdir(here / f"seed-{seed}")
    is_its_own = _holds(workdir, fields) if workdir.exists else epochs == config.epochs
    if not is_its_own:
        workdir = Workdir(here / f"seed-{seed}-epochs-{epochs}")
        workdir.check(fields)
    return dataclasses.replace(run, workdir=str(workdir.path))


def _holds(workdir: Workdir, fields: Mapping[str, Any]) -> bool:
    """Whether the run that is there is the one of these fields."""
    try:
        workdir.check(fields)
    except InputError:
        return False
    return True


def _train_all(
    runs: Sequence[TrainConfig], folder: SearchFolder, config: SearchConfig, console: Console
) -> None:
    done = sum(map(is_done, runs))
    if done == len(runs):
        return
    cli.say(
        console,
        f"Training the best graphs and their baselines again: {len(runs)} runs, "
        f"{config.retrain_seeds} seeds each.",
    )
    watched, countdown = is_watched(console), Countdown(len(runs), done)
    progress = Progress(
        text_column("training again"),
        BarColumn(),
        MofNCompleteColumn(),
        text_column("runs, left"),
        TimeRemainingColumn(),
        console=console,
        disable=not watched,
    )
    retrained = [dataclasses.asdict(run) for run in runs]
    recordings = str(folder.recordings.absolute())
    orders = orders_for(config, folder.owner, retrain=retrained, recordings=recordings)
    with progress, Team(orders, folder.logs) as team:
        bar = progress.add_task("", total=len(runs), completed=done)
        while team.is_at_work():
            before, done = done, sum(map(is_done, runs))
            progress.update(bar, completed=done)
            if done > before and not watched:
                left = countdown.left(done)
                cli.say(console, f"trained again: {done} of {len(runs)} runs, {left}")
            time.sleep(_POLL_SECONDS)


def _accuracy(run: TrainConfig) -> float:
    result = Workdir(str(run.workdir)).result
    if result is None or result["target"]["test_accuracy"] is None:
        raise RunError(f"{run.workdir}: a run of the fair ending has no result on the test images")
    return result["target"]["test_accuracy"]
