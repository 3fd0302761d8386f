"""A search from its options to its results: checked, begun or resumed, run, and ended fairly."""

import shutil
import sys
import time

from rich.console import Console

import ktg_jax as ktg
from experiments.assemble import data_facts, load
from experiments.options import import_modules
from experiments.searching.config import (
    SearchConfig,
    check,
    default_name,
    default_workdir,
    resolved,
)
from experiments.searching.database import explained_outage, without_password
from experiments.searching.display import SearchDisplay, count
from experiments.searching.folder import SearchFolder, load_search
from experiments.searching.pictures import Pictures
from experiments.searching.records import TrialRecord
from experiments.searching.storage import Turn, open_storage
from experiments.searching.study import (
    State,
    Trials,
    begin_study,
    is_counted,
    records,
    run_again,
)
from experiments.searching.team import Team, orders_for
from ktg_jax.data.pipeline import steps_per_epoch
from ktg_jax.errors import InputError
from ktg_jax.search.engine import optuna

_POLL_SECONDS = 1.0
_LEAST_FREE_BYTES = 100 * 2**20


def search(config: SearchConfig, console: Console) -> None:
    """Searches, or goes on searching, and ends fairly.

    Raises:
        InputError: bad input, found before anything is computed or written.
        RunError: the search cannot go on.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    import_modules(config.imports)
    space = check(config)
    with console.status("Preparing convolutions"):
        ktg.cpu_convolution()
    fields = resolved(config, space)
    name = config.study or default_name(config, fields)
    folder = SearchFolder(config.workdir or default_workdir(default_name(config, fields)))
    folder.check(fields)
    dataset = load(config, with_test=False)
    steps_per_epoch(len(dataset.train), config.batch_size)
    facts = data_facts(dataset)
    del facts["test"]  # which was not looked at
    setting = fields | {"data_facts": facts}

    storage = None if config.storage is None else without_password(config.storage)
    _check_space_left(folder)
    words = [word.replace(str(config.storage), str(storage)) for word in sys.argv[1:]]
    folder.begin_search(setting, name, storage, config.data_dir, words)
    with folder.locked():
        url = config.storage or folder.own_storage
        storage_of_study = open_storage(url, config.heartbeat)
        with Turn(url, name), explained_outage(url):
            study = begin_study(storage_of_study, name, config, space, setting)
            _run_again(study, folder.owner)
        console.print(
            f"Searching in {folder.path}: {space.size()} graphs of {space.num_nodes} nodes, "
            f"{config.trials} trials of {config.epochs} epochs, {config.workers} workers on "
            f"{len(dataset.train)} training and {len(dataset.val or ())} validation images "
            f"({dataset.name}).",
            highlight=False,
            soft_wrap=True,
        )
        _run(config, console, folder, study, url)
        if config.retrain_top:
            from experiments.searching.ending import finish  # SciPy's tests take long to import

            finish(load_search(folder.path, url), folder, config, console)
        console.print(
            f"python -m experiments.report {folder.path} makes the report.",
            highlight=False,
            soft_wrap=True,
        )


def _run(
    config: SearchConfig,
    console: Console,
    folder: SearchFolder,
    study: optuna.Study,
    url: str,
) -> None:
    """Runs trials until there are as many as asked for, or time is up."""
    watched = _Watched(study, url)
    trials, known = watched.read()
    display = SearchDisplay(config.trials, config.epochs, console)
    display.update(known)
    pictures = Pictures(study, folder.artifacts, folder.owner)
    if sum(map(is_counted, trials)) < config.trials:
        deadline = None if config.timeout is None else time.time() + config.timeout
        orders = orders_for(
            config,
            folder.owner,
            storage=url,
            study=study.study_name,
            artifacts=str(folder.artifacts.absolute()),
            deadline=deadline,
        )

        def on_death(worker: str) -> None:
            with Turn(url, study.study_name):
                _run_again(study, worker)

        try:
            with display, Team(orders, folder.logs, on_death) as team:
                while team.is_at_work():
                    trials, known = watched.read()
                    display.update(known)
                    pictures.draw_one(trials)
                    time.sleep(_POLL_SECONDS)
                display.update(watched.read()[1])
        finally:
            # Anew: an interrupt may have left the study's session in the midst of a commit.
            storage = open_storage(url, config.heartbeat)
            left = optuna.load_study(study_name=study.study_name, storage=storage)
            with Turn(url, study.study_name):
                _run_again(left, folder.owner)
    trials, known = watched.read()
    pictures.draw_all(trials)
    counts = count(known)
    counts.pop("running")
    numbers = ", ".join(f"{number} {state}" for state, number in counts.items())
    console.print(f"Trials: {numbers}.", highlight=False)


class _Watched:
    """The trials of a study as they stand; what is known of one that has ended is read once."""

    def __init__(self, study: optuna.Study, url: str) -> None:
        self._study, self._url = study, url
        self._ended: dict[int, TrialRecord] = {}

    def read(self) -> tuple[Trials, list[TrialRecord]]:
        """All trials, and what is known of those that do not wait.

        Raises:
            InputError: the database cannot be read.
        """
        with explained_outage(self._url):
            trials = self._study.get_trials(deepcopy=False)
        new = records([trial for trial in trials if trial.number not in self._ended])
        known = self._ended | {record.number: record for record in new}
        self._ended = {t.number: known[t.number] for t in trials if t.state.is_finished()}
        return trials, [known[number] for number in sorted(known)]


def _run_again(study: optuna.Study, gone: str) -> None:
    """Enqueues the trials anew of a worker, or of all workers of a folder, which are gone.

    To be called in the study's turn.
    """
    for trial in study.get_trials(deepcopy=False, states=(State.RUNNING,)):
        worker = trial.user_attrs.get("worker", "")
        if worker == gone or worker.startswith(f"{gone}/"):
            run_again(study, trial)


def _check_space_left(folder: SearchFolder) -> None:
    above = next(path for path in (folder.path, *folder.path.parents) if path.exists())
    free = shutil.disk_usage(above).free
    if free < _LEAST_FREE_BYTES:
        allowed = f"a disk with {_LEAST_FREE_BYTES >> 20} MiB free ({free >> 20} MiB are)"
        raise InputError("workdir", str(folder.path), allowed)
