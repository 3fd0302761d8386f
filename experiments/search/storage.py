"""Where a study is stored: a SQLite file, or PostgreSQL for many machines; and whose turn it is.

The storage is Optuna's, with heartbeats: while a worker trains it says so every few seconds, and
the trial of one that fell silent is run again by whoever asks for a trial next.
"""

import hashlib
import math
import os
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ktg_jax.errors import InputError

from ..runs.locks import lock
from .database import (
    driver_options,
    explained,
    reading_url,
    sqlite_file,
    url_parts,
)
from .extra import optuna  # first: where it is missing, so is SQLAlchemy

# isort: split
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

GRACE = 3  # intervals without a heartbeat after which a worker counts as dead
HEARTBEAT = "KTG_HEARTBEAT"
_MOST_HEARTBEAT = 86_400

# Seconds after which the server gives up the lock of a machine that is gone: 30 + 3 * 10.
_SERVER_OPTIONS = (
    "SET tcp_keepalives_idle = 30",
    "SET tcp_keepalives_interval = 10",
    "SET tcp_keepalives_count = 3",
)


class Storage(optuna.storages.RDBStorage):
    """Optuna's storage, in which no trial of a dead worker is forgotten and outages are outlived.

    Made by `open_storage`, one for each study that is used. Its connections are closed when it is
    not used any more.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._seen: set[int] = set()  # numbers of running trials
        try:
            super().__init__(*args, **options)
        finally:
            if hasattr(self, "engine"):
                weakref.finalize(self, self.engine.dispose)

    def record_heartbeat(self, trial_id: int) -> None:
        """Says that the trial is alive; a heartbeat that cannot be written is left out.

        An error here would only end the thread that Optuna runs for it, and with it all further
        heartbeats. What the trial itself has to write fails loudly.
        """
        try:
            super().record_heartbeat(trial_id)
        except (optuna.exceptions.StorageInternalError, SQLAlchemyError):
            self.remove_session()

    def give_up_silent(self, study: optuna.Study) -> None:
        """Gives up the running trials of a study whose workers fell silent, and enqueues them anew.

        Optuna never gives up a trial whose worker died before its first heartbeat. So each running
        trial is given one when this storage first sees it: if it is alive its own follow, and if
        not it is silent in time.
        """
        running = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
        for trial in running:
            if trial.number not in self._seen:
                self._seen.add(trial.number)
                self.record_heartbeat(self.trial_id(study, trial))
        with _experimental():
            optuna.storages.fail_stale_trials(study)

    def trial_id(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> int:
        """What the methods of a storage call the trial of a study."""
        study_id = self.get_study_id_from_name(study.study_name)
        return self.get_trial_id_from_study_id_trial_number(study_id, trial.number)


@contextmanager
def _experimental() -> Iterator[None]:
    """Within it, Optuna does not say that its heartbeats are experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def heartbeat_seconds() -> float:
    """Seconds between two heartbeats of a running trial: 20, unless `KTG_HEARTBEAT` is set.

    Raises:
        InputError: it is set to anything but a number of seconds.
    """
    text = os.environ.get(HEARTBEAT, "20")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= _MOST_HEARTBEAT:
        allowed = f"a number of seconds above 0, at most {_MOST_HEARTBEAT:,}"
        raise InputError(HEARTBEAT, text, allowed)
    return seconds


def open_storage(url: str) -> Storage:
    """Opens a storage of studies, and makes its tables where there are none.

    Any number of processes may open the same one at once. To be called outside of `Turn`. A trial
    without a heartbeat for `GRACE` times `heartbeat_seconds`, rounded up to whole ones, has failed,
    and is enqueued again with the same parameters, however often that happens.

    Args:
        url: `sqlite:///FILE`, or `postgresql+psycopg://USER[:PASSWORD]@HOST[:PORT]/DATABASE`.

    Raises:
        InputError: the URL is another; the database cannot be reached, read or written, or is of
            another Optuna; the driver is missing.
    """
    interval = math.ceil(heartbeat_seconds())
    parsed = url_parts(url)
    with _experimental(), Turn(url, ""), explained(url):
        return Storage(
            parsed.render_as_string(hide_password=False),
            engine_kwargs={"connect_args": driver_options(parsed), "pool_pre_ping": True},
            heartbeat_interval=interval,
            grace_period=GRACE * interval,
            heartbeat_stale_trial_callback=enqueue_again,
        )


def open_to_read(url: str) -> optuna.storages.RDBStorage:
    """Opens a storage only to read from: nothing is locked or written, no table is made.

    A SQLite file in the midst of whose change its process was killed must first be put right, and
    is then opened as by `open_storage`.

    Args:
        url: as of `open_storage`.

    Raises:
        InputError: as `open_storage`, and where there is no such database yet.
    """
    try:
        return _opened_to_read(url)
    except InputError:
        file = sqlite_file(url)
        if file is None or not Path(f"{file}-journal").exists():
            raise
    return open_storage(url)


def _opened_to_read(url: str) -> optuna.storages.RDBStorage:
    parsed = url_parts(url)
    with explained(url):
        storage = optuna.storages.RDBStorage(
            reading_url(parsed),
            engine_kwargs={"connect_args": driver_options(parsed), "pool_pre_ping": True},
            skip_table_creation=True,
        )
        weakref.finalize(storage, storage.engine.dispose)
        return storage


def enqueue_again(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Enqueues a trial that was given up anew, with its parameters and attributes."""
    with _experimental():
        enqueue = optuna.storages.RetryHeartbeatStaleTrialCallback()
    enqueue(study, trial)


class Turn:
    """Mutual exclusion among all workers of a study, on however many machines.

    For SQLite it is a lock on `FILE.lock`, shared by all studies of the file; for PostgreSQL an
    advisory lock of a connection of its own. Both end with the process that has it, however it
    ends. Each thread needs a `Turn` of its own, and no process may hold it across a fork.

    Args:
        url: as of `open_storage`.
        name: the name of the study.

    Raises:
        InputError: the URL is another.
    """

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = url, name
        self._parsed = url_parts(url)
        self._held: TextIO | sa.Connection | None = None

    def acquire(self) -> None:
        """Waits for the turn.

        Raises:
            InputError: the database cannot be reached, or the file's folder not be written.
            RuntimeError: this object has the turn already.
        """
        if self._held is not None:
            raise RuntimeError(f"the turn of {self.name!r} is held already")
        with explained(self.url):
            if self._parsed.drivername == "sqlite":
                self._held = _locked(Path(f"{self._parsed.database}.lock"))
            else:
                self._held = self._connect()

    def release(self) -> None:
        """Gives the turn to the next; does nothing where it is not held."""
        held, self._held = self._held, None
        if isinstance(held, sa.Connection):
            held.invalidate()  # closes it, also where the server is gone
        if held is not None:
            held.close()

    def __enter__(self) -> "Turn":
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _connect(self) -> sa.Connection:
        digest = hashlib.sha256(f"ktg_jax {self.name}".encode()).digest()
        key = int.from_bytes(digest[:8], "big", signed=True)
        engine = sa.create_engine(
            self._parsed,
            poolclass=sa.NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args=driver_options(self._parsed),
        )
        connection = engine.connect()
        try:
            for setting in _SERVER_OPTIONS:
                connection.execute(sa.text(setting))
            connection.execute(sa.select(sa.func.pg_advisory_lock(key)))
        except BaseException:
            connection.invalidate()
            connection.close()
            raise
        return connection


def _locked(path: Path) -> TextIO:
    file = path.open("a")
    try:
        lock(file, wait=True)
    except BaseException:
        file.close()
        raise
    return file
