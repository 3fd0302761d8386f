"""Searches on two machines that share a PostgreSQL server: two commands with a folder each."""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_models  # noqa: F401  (registers its models)
from postgres import PostgresServer
from runs import Ended, end_of, options, start
from searches import small_search

from experiments.search.config import SearchConfig
from experiments.search.database import without_password
from experiments.search.extra import optuna
from experiments.search.folder import SearchFolder
from experiments.search.storage import Storage, open_storage
from experiments.search.study import State, is_counted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("home"),
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]

STUDY = "shared"
SECONDS = 240
LONG: dict[str, Any] = {"epochs": 40, "pruner": "none", "train_limit": 1000}
"""Trials that take a second or more, so that one can be killed."""

Trials = list[optuna.trial.FrozenTrial]
Begin = Callable[[SearchConfig], subprocess.Popen[str]]


def search_with(storage: str, workdir: Path, **changes: Any) -> SearchConfig:
    """A search of one worker in a database."""
    given: dict[str, Any] = {"storage": storage, "study": STUDY, "workers": 1, "retrain_top": 0}
    return small_search(workdir, **given | changes)


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Begins a search, and kills it when the test ends, whose workers then end, too."""
    begun: list[subprocess.Popen[str]] = []

    def begin(config: SearchConfig) -> subprocess.Popen[str]:
        assert config.workdir is not None
        cwd = Path(config.workdir).parent
        begun.append(start("experiments.search", *options(config), cwd=cwd, devices=1))
        return begun[-1]

    yield begin
    for process in begun:
        if process.poll() is None:
            process.kill()
            process.communicate()


def wait_until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.3)
    raise AssertionError("it did not happen")


@pytest.fixture
def storage(postgres_url: str) -> Storage:
    """The database that the searches of a test share."""
    return open_storage(postgres_url)


def trials(storage: Storage) -> Trials:
    """What the database has now; nothing while there is no study."""
    if STUDY not in optuna.get_all_study_names(storage):
        return []
    return optuna.load_study(study_name=STUDY, storage=storage).trials


def counted(found: Trials) -> Trials:
    return [trial for trial in found if is_counted(trial)]


def of(workdir: Path, found: Trials) -> Trials:
    """The trials that the workers of a machine began last."""
    if not (workdir / "search.json").is_file():
        return []
    owner = SearchFolder(workdir).owner
    return [t for t in found if t.user_attrs.get("worker", "").startswith(f"{owner}/")]


def running(workdir: Path, storage: Storage) -> Trials:
    return [trial for trial in of(workdir, trials(storage)) if trial.state == State.RUNNING]


def check_each_once(found: Trials, number: int) -> None:
    """As many trials as were asked for, and no two equivalent graphs were trained to the end."""
    done = counted(found)
    assert len(done) == number
    assert not any(trial.state == State.RUNNING for trial in found)
    keys = [t.user_attrs["key"] for t in done if t.user_attrs.get("duplicate_of") is None]
    assert len(keys) == len(set(keys))


def files_with(text: str, folder: Path) -> list[Path]:
    """The files of a folder that contain a text; and there are files."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if text.encode() in path.read_bytes()]


def processes_with(text: str) -> list[int]:
    """The processes that show a text to whoever lists them."""
    listed = psutil.process_iter(["pid", "cmdline"])
    return [p.info["pid"] for p in listed if text in " ".join(p.info["cmdline"] or [])]


def test_two_machines_search_together_and_tell_no_password(
    postgres_server: PostgresServer,
    postgres_url: str,
    storage: Storage,
    tmp_path: Path,
    begin: Begin,
) -> None:
    machines, secret = [tmp_path / "a", tmp_path / "b"], postgres_server.password
    config: dict[str, Any] = {"trials": 10, "epochs": 10, "pruner": "none"}
    first = begin(search_with(postgres_url, machines[0], **config))
    with pytest.MonkeyPatch.context() as patch:  # the second has the password from here
        patch.setenv("PGPASSWORD", secret)
        second = begin(search_with(without_password(postgres_url), machines[1], **config))
    wait_until(lambda: all(running(machine, storage) for machine in machines))
    assert psutil.Process(first.pid).children()
    assert psutil.Process(second.pid).children()
    assert processes_with(secret) == [first.pid]  # which was told it in this way
    for process in (first, second):
        end = end_of(process)
        assert (end.code, end.err) == (0, "")
        assert secret not in end.out
    found = trials(storage)
    check_each_once(found, 10)
    for machine in machines:
        assert files_with(secret, machine) == []
        trained = [t for t in of(machine, found) if t.user_attrs.get("duplicate_of") is None]
        assert trained
        check_pictures(machine, trained, storage)


def check_pictures(machine: Path, trained: Trials, storage: Storage) -> None:
    """A machine has drawn its own trials' graphs, and no others."""
    named = [optuna.artifacts.get_all_artifact_meta(trial, storage=storage) for trial in trained]
    files = list((machine / "artifacts").iterdir())
    assert {file.name for file in files} == {meta.artifact_id for (meta,) in named}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_a_killed_machines_trial_is_run_again_by_the_other(
    postgres_url: str, storage: Storage, tmp_path: Path, begin: Begin
) -> None:
    machines = [tmp_path / "a", tmp_path / "b"]
    configs = [search_with(postgres_url, m, trials=5, **LONG) for m in machines]
    doomed, other = map(begin, configs)
    wait_until(lambda: all(running(machine, storage) for machine in machines))
    all_of_it = [psutil.Process(doomed.pid), *psutil.Process(doomed.pid).children(recursive=True)]

    def has_stopped_while_it_trains() -> Trials:
        for process in all_of_it:
            process.suspend()
        found = running(machines[0], storage)
        if not found:
            for process in all_of_it:
                process.resume()
        return found

    (killed,) = wait_until(has_stopped_while_it_trains)
    for process in all_of_it:
        process.kill()
    doomed.communicate()
    end = end_of(other)
    assert (end.code, end.err) == (0, "")
    found = trials(storage)
    check_each_once(found, 5)
    given_up = found[killed.number]
    assert (given_up.state, is_counted(given_up)) == (State.FAIL, False)
    (again,) = (t for t in found if killed.number in t.system_attrs.get("retry_history", []))
    assert again.params == killed.params
    assert again in of(machines[1], found)
    assert again.state == State.COMPLETE


def test_a_search_whose_database_stops_goes_on_when_it_is_back(
    postgres_server: PostgresServer,
    postgres_url: str,
    storage: Storage,
    tmp_path: Path,
    begin: Begin,
) -> None:
    config = search_with(postgres_url, tmp_path / "search", trials=5, **LONG)
    process = begin(config)
    before = wait_until(lambda: counted(trials(storage)))
    postgres_server.stop()
    try:
        check_one_line(end_of(process), postgres_server)
        check_one_line(end_of(begin(config)), postgres_server)  # it cannot even be begun
        assert files_with(postgres_server.password, tmp_path / "search") == []
    finally:
        postgres_server.start()
    end = end_of(begin(config))
    assert (end.code, end.err) == (0, "")
    found = trials(storage)
    check_each_once(found, 5)
    assert [found[trial.number] for trial in before] == before


def test_after_a_wrong_address_the_right_one_is_taken(
    postgres_server: PostgresServer,
    postgres_url: str,
    storage: Storage,
    tmp_path: Path,
    begin: Begin,
) -> None:
    workdir, config = tmp_path / "search", {"trials": 1, "epochs": 1}
    wrong = postgres_url.replace(f":{postgres_server.port}/", ":1/")
    end = end_of(begin(search_with(wrong, workdir, **config)))
    assert (end.code, len(end.err.splitlines())) == (2, 1)
    assert "127.0.0.1:1" in end.err
    assert not workdir.exists()
    end = end_of(begin(search_with(postgres_url, workdir, **config)))
    assert (end.code, end.err) == (0, "")
    assert len(counted(trials(storage))) == 1


def check_one_line(end: Ended, server: PostgresServer) -> None:
    """A search without its database ended with an error that names it, but no password."""
    assert end.code in (1, 2)
    assert len(end.err.splitlines()) == 1
    assert f"127.0.0.1:{server.port}" in end.err
    assert server.password not in end.out + end.err
