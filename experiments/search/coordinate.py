"""A search from its options to its results: checked, begun or resumed, run, and ended fairly."""

import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console

import ktg_jax as ktg
from ktg_jax.data.dataset import Dataset
from ktg_jax.data.sources import has_test_images
from ktg_jax.errors import InputError

from ..runs import cli, signals
from ..runs.assemble import check_steps, load
from ..runs.command_line import as_called
from ..runs.console import busy
from ..runs.facts import data_facts, without_test
from ..runs.identity import is_own
from ..runs.networks import check_models, check_networks
from ..runs.options import import_modules
from ..runs.process import check_platform
from .baselines import check_baselines
from .config import (
    SearchConfig,
    check,
    default_name,
    default_workdir,
    resolved,
)
from .database import (
    absolute,
    explained_outage,
    sqlite_file,
    without_password,
)
from .display import SearchDisplay, count, told
from .extra import optuna
from .folder import SearchFolder, load_search
from .graph_files import GraphFiles
from .pictures import Pictures
from .race import Race
from .records import TrialRecord
from .storage import Storage, Turn, open_storage
from .study import (
    Trials,
    begin_study,
    check_study,
    is_counted,
    note_death,
    race_of,
    records,
    run_all_again,
)
from .teachers import check_teachers, with_teachers
from .team import Team, orders_for

_POLL_SECONDS = 1.0
_LEAST_FREE_BYTES = 100 * 2**20
_DATABASE = ("study.db", "study.db.lock")
"""What a storage adds to the folder of a search."""


def search(config: SearchConfig, console: Console) -> None:
    """Searches, or goes on searching, and ends fairly.

    Raises:
        InputError: bad input, found before anything is computed or written.
        RunError: the search cannot go on.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    import_modules(config.imports)
    check_platform()
    config, said = with_teachers(config)
    space = check(config)
    check_baselines(config, space)
    for line in said:
        cli.say(console, line)
    with busy(console, "Preparing convolutions"):
        ktg.cpu_convolution()
    fields = resolved(config, space)
    dataset: Dataset | None = None
    facts: dict[str, Any] = {}
    if config.workdir is None and (is_own(config.data) or config.teachers):
        dataset, facts = _loaded(config)  # for the folder's name
        fields |= facts
    folder = SearchFolder(config.workdir or default_workdir(config, fields))
    folder.check(fields)
    if dataset is None:
        dataset, facts = _loaded(config)
    setting = fields | facts
    name = config.study or folder.study or default_name(config, setting)

    url = folder.own_storage if config.storage is None else absolute(config.storage)
    kept = None if config.storage is None else without_password(url)
    _check_space_left(folder)
    opened = None if folder.exists else _opened(url, name, setting, config)
    words = [word.replace(str(config.storage), str(kept)) for word in sys.argv[1:]]
    with (
        folder.begun_search(setting, name, kept, config.data_dir, words) as added,
        explained_outage(url),
    ):
        with _nothing_left(folder.path, added):
            storage = opened or open_storage(url)
            with Turn(url, name):
                study = begin_study(storage, name, config, space, setting)
                run_all_again(study, folder.owner)
        cli.say(
            console,
            f"Searching in {folder.path}: {_many(space.size())} graphs of {space.num_nodes} nodes, "
            f"{config.trials} trials of {config.epochs} epochs, {config.workers} workers on "
            f"{len(dataset.train)} training and {len(dataset.val or ())} validation images "
            f"({dataset.name}).",
        )
        _run(config, console, folder, study, storage, url)
        if config.retrain_top:
            from .ending import finish  # SciPy's tests take long to import

            finish(load_search(folder.path, url), folder, config, console)
        folder.drop_recordings()
        cli.say(
            console,
            as_called(f"python -m experiments.report {quote(str(folder.path))} makes the report."),
        )


def _loaded(config: SearchConfig) -> tuple[Dataset, dict[str, Any]]:
    """The data, without its test images, found fit for the trials and the fair ending.

    With it the checksums of all that the search rests on.
    """
    dataset = load(config, with_test=False)
    check_steps(config, dataset)
    if config.retrain_epochs is not None:
        check_steps(config, dataset, "retrain_epochs")
    candidates = config.space().candidates
    models = {f"candidates[{i}]": model for i, model in enumerate(candidates)}
    check_models(config.training(), {"target": config.target, **models}, dataset)
    _check_losses(config, dataset)
    if config.retrain_top and not has_test_images(config.data, config.data_dir):
        allowed = "0, for the data has no test images"
        raise InputError("retrain_top", config.retrain_top, allowed)
    training, retrained = config.training(), config.retrain_top > 0
    facts = check_teachers(training, config.space(), dataset, retrained)
    return dataset, facts | {"data_facts": without_test(data_facts(dataset))}


def _check_losses(config: SearchConfig, dataset: Dataset) -> None:
    """Raises InputError where the stages of two models do not fit one of the losses."""
    space = config.space()
    models = list(dict.fromkeys((space.target, *space.candidates)))
    for i, loss in enumerate(space.losses):
        mutual = ktg.graphs.mutual(models)
        edges = [
            [gate if s == t else ktg.Edge(gate, loss) for s, gate in enumerate(row)]
            for t, row in enumerate(mutual.gates)
        ]
        try:
            check_networks(config.training(), ktg.Graph(models, edges), dataset)
        except InputError as error:
            allowed = f"a loss that fits all models ({error})"
            raise InputError(f"losses[{i}]", config.losses[i], allowed) from None


def _opened(
    url: str, name: str, setting: Mapping[str, Any], config: SearchConfig
) -> Storage | None:
    """The storage that was given, if it is there already, found fit for this search.

    To be called before the folder is written, which would tie the search to this storage.

    Raises:
        InputError: it cannot be used, or the study in it is of another search.
    """
    file = sqlite_file(url)
    if config.storage is None or (file is not None and not file.is_file()):
        return None
    storage = open_storage(url)
    with explained_outage(url):
        check_study(storage, name, setting)
    return storage


def _many(number: int) -> str:
    """A number in digits, or where these are no help its magnitude.

    >>> _many(2322432), _many(4**100)
    ('2322432', 'about 10^60')
    """
    if number < 10**40:
        return str(number)
    return f"about 10^{round((number.bit_length() - 1) * math.log10(2))}"


def _names(folder: Path) -> set[str] | None:
    """What is in a folder; None: it is not there."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else None


@contextmanager
def _nothing_left(folder: Path, added: Sequence[str]) -> Iterator[None]:
    """Takes away what was added to the folder, which is kept, where the search cannot be begun.

    Else the folder would refuse the command that was put right.
    """
    before = set(os.listdir(folder))
    try:
        yield
    except BaseException:
        with suppress(OSError):  # the first reason counts
            for name in (*added, *(set(_DATABASE) - before)):
                (folder / name).unlink(missing_ok=True)
        raise


def _run(
    config: SearchConfig,
    console: Console,
    folder: SearchFolder,
    study: optuna.Study,
    storage: Storage,
    url: str,
) -> None:
    """Runs trials until there are as many as asked for, or time is up."""
    watched = _Watched(study)
    trials, known, race = watched.read()
    display = SearchDisplay(config.trials, config.epochs, console)
    display.update(known)
    graphs = GraphFiles(folder.path)
    graphs.write(known, race)
    pictures = Pictures(storage, folder.artifacts, folder.owner, console)
    if sum(map(is_counted, trials)) < config.trials:
        deadline = None if config.timeout is None else time.time() + config.timeout
        orders = orders_for(
            config,
            folder.owner,
            storage=url,
            study=study.study_name,
            artifacts=str(folder.artifacts.absolute()),
            recordings=str(folder.recordings.absolute()),
            deadline=deadline,
        )

        def on_death(worker: str, signal: int) -> int:
            with Turn(url, study.study_name):
                return note_death(study, storage, worker, signal)

        try:
            with display, Team(orders, folder.logs, on_death) as team:
                while True:
                    # An interrupt in the midst of reading would leave SQLite's file locked for as
                    # long as the interrupt is handled, which writes to it.
                    with signals.held():
                        at_work = team.is_at_work()
                        trials, known, race = watched.read()
                        display.update(known, race)
                        graphs.write(known, race)
                        pictures.draw_one(trials)
                    if not at_work:
                        break
                    time.sleep(_POLL_SECONDS)
        except BaseException:
            # Where this fails, too, the first reason counts: the next command does it again.
            with suppress(InputError), explained_outage(url), Turn(url, study.study_name):
                run_all_again(study, folder.owner)
            raise
    trials, known, race = watched.read()
    graphs.write(known, race)
    pictures.draw_all(trials)
    counts = count(known)
    counts.pop("running")
    numbers = ", ".join(f"{number} {state}" for state, number in counts.items())
    cli.say(console, f"Trials: {numbers}.")
    if race is not None and race.ranking:
        cli.say(console, told(race))


class _Watched:
    """The trials of a study as they stand; what is known of one that has ended is read once."""

    def __init__(self, study: optuna.Study) -> None:
        self._study = study
        self._ended: dict[int, TrialRecord] = {}

    def read(self) -> tuple[Trials, list[TrialRecord], Race | None]:
        """All trials, what is known of those that do not wait, and how the race stands."""
        trials = self._study.get_trials(deepcopy=False)
        new = records([trial for trial in trials if trial.number not in self._ended])
        known = self._ended | {record.number: record for record in new}
        self._ended = {t.number: known[t.number] for t in trials if t.state.is_finished()}
        listed = [known[number] for number in sorted(known)]
        return trials, listed, race_of(self._study, listed)


def _check_space_left(folder: SearchFolder) -> None:
    above = next(path for path in (folder.path, *folder.path.parents) if path.exists())
    free = shutil.disk_usage(above).free
    if free < _LEAST_FREE_BYTES:
        allowed = f"a disk with {_LEAST_FREE_BYTES >> 20} MiB free ({free >> 20} MiB are)"
        raise InputError("workdir", str(folder.path), allowed)
