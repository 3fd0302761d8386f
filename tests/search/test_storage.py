"""Storages of studies, in SQLite and in a real PostgreSQL, whose workers die and take turns."""

import multiprocessing
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import storage_workers as workers
from postgres import PostgresServer

from experiments.search.database import without_password
from experiments.search.extra import optuna
from experiments.search.storage import Storage, Turn, open_storage
from ktg_jax import InputError

pytestmark = pytest.mark.slow

FAIL, COMPLETE = optuna.trial.TrialState.FAIL, optuna.trial.TrialState.COMPLETE
# Its processes are forked from one that has imported what they need, and nothing else.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["experiments.search.storage"])
PATIENCE = 60  # seconds


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/studies.db"
    return request.getfixturevalue("postgres_url")


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Starts a process that does a function, and kills it when the test ends."""
    started = []

    def start(function: Callable[..., None], *arguments: Any) -> Any:
        process = PROCESSES.Process(target=function, args=arguments, daemon=True)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join(PATIENCE)


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def select(url: str, query: str) -> list[Any]:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        return list(connection.scalars(sa.text(query)))


def change(url: str, statement: str) -> None:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(sa.text(statement))


def ask(study: Any) -> Any:
    with pytest.warns(UserWarning, match="supposed to be used with Study.optimize"):
        return study.ask()


HEARTBEATS = "SELECT heartbeat FROM trial_heartbeats"


def test_a_fresh_database_can_be_opened_by_many_at_once(
    url: str, start: Callable[..., Any]
) -> None:
    all_there = PROCESSES.Barrier(4)
    processes = [start(workers.open_at_once, url, all_there) for _ in range(4)]
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert select(url, "SELECT study_name FROM studies") == ["shared"]
    for table in ("alembic_version", "version_info"):
        assert select(url, f"SELECT count(*) FROM {table}") == [1]


def is_given_up(study: Any, storage: Storage) -> bool:
    storage.give_up_silent(study)
    return study.get_trials(deepcopy=False)[0].state == FAIL


def test_the_trial_of_a_killed_worker_is_run_again(url: str, start: Callable[..., Any]) -> None:
    started = PROCESSES.Event()
    worker = start(workers.train_forever, url, started)
    assert started.wait(PATIENCE)
    storage = open_storage(url)
    study = workers.study_of(url, storage)
    first_heartbeat = select(url, HEARTBEATS)
    wait_for(lambda: select(url, HEARTBEATS) > first_heartbeat)
    assert not is_given_up(study, storage)

    worker.kill()
    wait_for(lambda: is_given_up(study, storage))
    study.optimize(workers.objective, n_trials=1)
    killed, again = study.trials
    assert (killed.state, again.state) == (FAIL, COMPLETE)
    assert again.params == killed.params
    assert again.params.keys() == {"x", "y"}
    assert again.system_attrs["retry_history"] == [killed.number]

    study.optimize(workers.objective, n_trials=1)
    assert study.trials[2].params != killed.params  # once was enough


def test_a_worker_killed_before_its_first_heartbeat_is_missed_too(url: str) -> None:
    storage = open_storage(url)
    study = workers.study_of(url, storage)
    study.enqueue_trial({"x": 0.25, "y": 2.0})
    ask(study)  # Optuna's heartbeats begin after this
    assert select(url, HEARTBEATS) == []
    assert not is_given_up(study, storage)
    (given,) = select(url, HEARTBEATS)
    wait_for(lambda: is_given_up(study, storage))
    assert select(url, HEARTBEATS) == [given]  # given once, or it would never be silent
    study.optimize(workers.objective, n_trials=1)
    assert [trial.state for trial in study.trials] == [FAIL, COMPLETE]
    assert study.best_trial.params == {"x": 0.25, "y": 2.0}


def test_heartbeats_and_storages_outlive_a_restart(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    storage = open_storage(postgres_url)
    study = workers.study_of(postgres_url, storage)
    trial = ask(study)
    trial_id = storage.trial_id(study, study.trials[0])
    postgres_server.stop()
    try:
        storage.record_heartbeat(trial_id)
        with pytest.raises(optuna.exceptions.StorageInternalError):
            trial.suggest_float("x", 0, 1)
    finally:
        postgres_server.start()
    assert select(postgres_url, HEARTBEATS) == []
    storage.record_heartbeat(trial_id)
    assert len(select(postgres_url, HEARTBEATS)) == 1
    study.tell(trial, workers.objective(trial))
    assert study.trials[0].state == COMPLETE


def test_heartbeats_are_whole_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(heartbeat: str) -> Storage:
        monkeypatch.setenv("KTG_HEARTBEAT", heartbeat)
        return open_storage(f"sqlite:///{tmp_path}/studies.db")

    assert [opened(s).heartbeat_interval for s in ("0.1", "1", "1.5", "60.0")] == [1, 1, 2, 60]
    assert opened("1.5").grace_period == 6


@pytest.mark.parametrize("heartbeat", ["0", "-1", "nan", "inf", "1e9", "often", ""])
def test_a_bad_heartbeat_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heartbeat: str
) -> None:
    monkeypatch.setenv("KTG_HEARTBEAT", heartbeat)
    allowed = "a number of seconds above 0, at most 86,400"
    with pytest.raises(InputError, match=f"^KTG_HEARTBEAT: got '{heartbeat}'; allowed: {allowed}"):
        open_storage(f"sqlite:///{tmp_path}/studies.db")
    assert list(tmp_path.iterdir()) == []


def test_turns_exclude_each_other(url: str, tmp_path: Path, start: Callable[..., Any]) -> None:
    file = tmp_path / "count"
    file.write_text("0")
    all_there = PROCESSES.Barrier(3)
    processes = [start(workers.count, url, 40, file, all_there) for _ in range(3)]
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert int(file.read_text()) == 120


def test_the_turn_of_a_killed_process_is_free(url: str, start: Callable[..., Any]) -> None:
    held = PROCESSES.Event()
    holder = start(workers.hold, url, held)
    assert held.wait(PATIENCE)
    turn, acquired = Turn(url, "shared"), threading.Event()

    def wait() -> None:
        turn.acquire()
        acquired.set()

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    assert not acquired.wait(0.5)
    holder.kill()
    assert acquired.wait(PATIENCE)
    waiting.join()
    turn.release()


def test_a_turn_is_released_once_and_taken_again(url: str) -> None:
    turn = Turn(url, "shared")
    turn.release()
    for _ in range(2):
        turn.acquire()
        with pytest.raises(RuntimeError, match="held already"):
            turn.acquire()
        turn.release()
        turn.release()
    with pytest.raises(ZeroDivisionError), turn:
        _ = 1 / 0
    with Turn(url, "shared"):
        pass


def test_studies_in_postgresql_have_turns_of_their_own(postgres_url: str) -> None:
    with Turn(postgres_url, "one"), Turn(postgres_url, "two"):
        open_storage(postgres_url)


def test_a_turn_can_be_released_after_the_server_is_gone(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    with Turn(postgres_url, "shared"):
        postgres_server.stop()
        postgres_server.start()
    with Turn(postgres_url, "shared"):
        pass


def refused(url: str) -> str:
    """The one line that both uses of the database end with."""
    lines = []
    for use in (lambda: open_storage(url), lambda: Turn(url, "shared").acquire()):
        with pytest.raises(InputError, match=r"^storage: got ") as info:
            use()
        lines.append(str(info.value))
    assert lines[0] == lines[1]
    assert "\n" not in lines[0]
    return lines[0]


def test_a_server_that_is_down_is_an_error(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    postgres_server.stop()
    try:
        message = refused(postgres_url)
    finally:
        postgres_server.start()
    assert "Connection refused" in message
    assert f"ktg:***@127.0.0.1:{postgres_server.port}" in message


def test_a_server_that_does_not_answer_is_an_error_soon() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        begin = time.monotonic()
        message = refused(f"postgresql+psycopg://me:secret@{address}/studies?connect_timeout=2")
    assert "timeout" in message
    assert time.monotonic() - begin < 20


def test_a_wrong_password_is_an_error_that_does_not_tell_it(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    message = refused(postgres_url.replace(postgres_server.password, "wrong-secret"))
    assert "password authentication failed" in message
    assert "wrong-secret" not in message


def test_a_database_that_is_not_there_is_an_error(postgres_server: PostgresServer) -> None:
    assert 'database "nothing" does not exist' in refused(postgres_server.url("nothing"))


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "nothing", tmp_path / "file", Path("/proc")):
        assert "a database that can be" in refused(f"sqlite:///{folder}/studies.db")


def test_a_file_that_is_no_database_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "studies.db").write_text("Some text that is no database. " * 100)
    with pytest.raises(InputError, match=r"storage: .*file is not a database"):
        open_storage(f"sqlite:///{tmp_path}/studies.db")


def test_tables_of_another_optuna_are_an_error(url: str) -> None:
    open_storage(url)
    change(url, "UPDATE alembic_version SET version_num = 'v9.9.9'")
    with pytest.raises(InputError, match=r"storage: .* a database of this Optuna .*no longer"):
        open_storage(url)


def test_without_the_driver_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    message = refused("postgresql+psycopg://me:secret@localhost/studies")
    assert 'pip install "ktg_jax[postgresql]"' in message
    assert "secret" not in message


def test_the_password_may_come_from_the_environment(
    postgres_server: PostgresServer, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = without_password(postgres_url)
    monkeypatch.delenv("PGPASSWORD", raising=False)
    assert "no password supplied" in refused(kept)
    monkeypatch.setenv("PGPASSWORD", postgres_server.password)
    with Turn(kept, "shared"):
        open_storage(kept)
