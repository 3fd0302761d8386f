"""The search as one runs it: to its fair ending, killed and resumed, and with bad input."""

import json
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_models  # noqa: F401  (registers its models)
from runs import Ended, end_of, in_process, options, start
from searches import small_search

import experiments.evaluate
import experiments.report.command
import experiments.search.command
import experiments.train
import ktg_jax as ktg
from experiments.runs.config import TrainConfig
from experiments.runs.graphs import build_graph
from experiments.search.config import SearchConfig
from experiments.search.extra import optuna
from experiments.search.folder import SearchFolder, load_search
from experiments.search.plan import reserved
from experiments.search.race import key_of
from experiments.search.records import StudyRecord, TrialRecord
from experiments.search.storage import open_storage
from experiments.search.study import records
from ktg_jax.errors import InputError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("home"),
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]

SECONDS = 120


def begin(config: SearchConfig) -> subprocess.Popen[str]:
    assert config.workdir is not None
    folder = Path(config.workdir).parent
    return start("experiments.search", *options(config), cwd=folder, devices=1)


def run(config: SearchConfig) -> Ended:
    return end_of(begin(config))


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children()


def wait_until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def trials(workdir: Path) -> list[TrialRecord]:
    """What the search's database has now; nothing while there is none."""
    if not (workdir / "study.db").is_file():
        return []
    try:
        return list(load_search(workdir).trials)
    except InputError:  # being made
        return []


def ended(workdir: Path) -> list[TrialRecord]:
    return [t for t in trials(workdir) if t.state in ("complete", "pruned")]


# --- from the first trial to the report of tests


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, home: Path) -> tuple[Path, Ended]:
    workdir = tmp_path_factory.mktemp("searches") / "finished"
    return workdir, run(small_search(workdir, trials=8, baselines=True))


@pytest.fixture
def found(finished: tuple[Path, Ended]) -> StudyRecord:
    return load_search(finished[0])


def test_it_searches_and_ends_fairly(finished: tuple[Path, Ended], found: StudyRecord) -> None:
    workdir, end = finished
    assert end.code == 0, end.err
    assert end.err == ""
    assert [trial.number for trial in found.trials] == list(range(8))
    assert {trial.state for trial in found.trials} <= {"complete", "pruned"}
    for trial in found.trials:
        assert f"trial {trial.number}" in end.out
        assert 0 <= trial.curve[1] <= 1
        assert trial.state == "pruned" or sorted(trial.curve) == [1, 2, 3]
        assert trial.state == "pruned" or trial.value == trial.curve[3]
    results = found.results
    assert results is not None
    assert results["seeds"] == [1, 2]  # the trials had seed 0
    best = found.best(1)[0].trial
    assert results["entries"][0]["trial"] == best.number
    assert max(t.value or 0 for t in found.trials) == best.value
    kinds = [entry["kind"] for entry in results["entries"]]
    assert kinds[0] == "found"
    assert set(kinds[1:]) <= {"independent", "control", "mutual", "distillation", "designed"}
    for entry in results["entries"]:
        runs = sorted((workdir / "retrained" / entry["name"]).glob("seed-*"))
        tested = [json.loads((r / "result.json").read_text())["target"] for r in runs]
        assert entry["accuracies"] == [target["test_accuracy"] for target in tested]
        assert {target["val_accuracy"] for target in tested} == {None}  # all images trained on
    assert "independent" in (workdir / "results.md").read_text()


def test_programs_are_compiled_once_a_model(found: StudyRecord) -> None:
    trained = [trial for trial in found.trials if trial.duplicate_of is None]
    compiled = [trial.programs_compiled + trial.programs_loaded for trial in trained]
    # Only a worker's first trial, and what a graph of another size needs, ask for any.
    assert sum(count == 0 for count in compiled) >= len(trained) - 4
    assert all(trial.node_epochs > 0 for trial in trained)


def test_a_finished_search_has_nothing_to_do(finished: tuple[Path, Ended]) -> None:
    workdir, _ = finished
    before = [*trials(workdir)]
    times = {p: p.stat().st_mtime_ns for p in (workdir / "retrained").rglob("result.json")}
    end = run(small_search(workdir, trials=8, baselines=True))
    assert end.code == 0, end.err
    assert trials(workdir) == before
    assert times == {p: p.stat().st_mtime_ns for p in times}


def test_what_edges_carry_is_searched(tmp_path: Path) -> None:
    losses = ("kl", '{"attention": 10, "kl": 1}')
    carried = {"losses": losses, "loss_weights": (0.5, 2.0), "edge_temperatures": (1.0, 4.0)}
    models = {"target": "staged", "candidates": ("staged",)}
    workdir = tmp_path / "search"
    end = run(small_search(workdir, trials=5, retrain_top=1, retrain_seeds=1, **models, **carried))
    assert (end.code, end.err) == (0, "")
    edges = [trial.graph.edges[0][1] for trial in trials(workdir) if trial.graph is not None]
    assert all(edge.loss in ("kl", {"attention": 10, "kl": 1}) for edge in edges)
    assert {edge.weight for edge in edges} <= {0.5, 2.0}
    assert {edge.temperature for edge in edges} <= {1.0, 4.0}
    assert len({edge.says for edge in edges}) > 1
    assert any(f"[{edge.says}]" in end.out for edge in edges if edge.carries)
    end = in_process(experiments.report.command.main, workdir)
    assert (end.code, end.err) == (0, "")
    page = (workdir / "report.html").read_text()
    assert any(f"<small>[{edge.says}]</small>" in page for edge in edges if edge.carries)


def test_its_graphs_can_be_trained(finished: tuple[Path, Ended], found: StudyRecord) -> None:
    workdir, _ = finished
    best = found.best(1)[0].trial
    assert best.graph is not None
    graph = build_graph(TrainConfig(graph=str(workdir)))
    assert graph.gates == best.graph.pruned().gates
    teacher = next(trial for trial in found.trials if trial.baseline == "distillation tiny")
    graph = build_graph(TrainConfig(graph=f"{workdir}:{teacher.number}"))
    assert graph.gates == (("through", "through"), ("cutoff", "cutoff"))
    assert graph.nodes[1].weights == "pretrained"
    config = TrainConfig(
        graph=f"{workdir}:{teacher.number}",
        imports=("tiny_models",),
        train_limit=100,
        epochs=1,
        workdir=str(workdir.parent / "carried"),
    )
    end = in_process(experiments.train.main, *options(config))
    assert end.code == 0, end.err
    assert "tiny is trained first" in end.out
    end = in_process(experiments.evaluate.main, workdir.parent / "carried")
    assert end.code == 0, end.err


def test_a_trial_that_is_not_there_is_named(finished: tuple[Path, Ended]) -> None:
    workdir, _ = finished
    with pytest.raises(InputError, match=r"graph.*finished:99.*0 to 7"):
        build_graph(TrainConfig(graph=f"{workdir}:99"))
    with pytest.raises(InputError, match="models"):
        build_graph(TrainConfig(graph=str(workdir), models=("tiny",) * 9))


def test_a_study_of_another_search_is_refused(finished: tuple[Path, Ended], tmp_path: Path) -> None:
    workdir, _ = finished
    other = small_search(workdir, trials=8, gates=("through", "cutoff"), epochs=4, baselines=True)
    end = in_process(experiments.search.command.main, *options(other))
    assert end.code == 2
    assert "space.gates" in end.err
    assert "training.epochs: 3, now 4" in end.err
    shared = small_search(
        tmp_path / "new",
        train_limit=100,
        trials=8,
        baselines=True,
        storage=f"sqlite:///{workdir}/study.db",
        study=load_search(workdir).name,
    )
    end = in_process(experiments.search.command.main, *options(shared))
    assert end.code == 2
    assert "study" in end.err
    assert "train_limit: 200, now 100" in end.err
    assert not (tmp_path / "new").exists()


# --- kills

LONG: dict[str, Any] = {
    "trials": 6,
    "epochs": 60,
    "pruner": "none",
    "retrain_top": 0,
    "train_limit": 1000,
    "gates": ktg.GATES,
}


def check_whole(workdir: Path, before: list[TrialRecord]) -> None:
    """No finished trial was lost or run again, and there are as many as were asked for."""
    after = {trial.number: trial for trial in trials(workdir)}
    for trial in before:
        assert after[trial.number] == trial
    done = [trial for trial in after.values() if trial.state == "complete"]
    assert len(done) == LONG["trials"]
    trained = [trial.graph.canonical() for trial in done if trial.duplicate_of is None]  # type: ignore[union-attr]
    assert len(trained) == len(set(trained))
    assert {t.state for t in after.values()} <= {"complete", "failed"}
    assert all(trial.reason is None for trial in after.values())


def test_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    workdir = tmp_path / "search"
    process = begin(small_search(workdir, **LONG))
    before = wait_until(lambda: ended(workdir))
    victim = workers_of(process)[0]
    victim.kill()
    end = end_of(process)
    assert (end.code, end.err) == (0, "")
    check_whole(workdir, before)
    assert (workdir / "logs" / "worker-1.log").is_file()


def test_all_are_killed_and_the_same_command_goes_on(tmp_path: Path) -> None:
    workdir = tmp_path / "search"
    config = small_search(workdir, **LONG)
    process = begin(config)
    before = wait_until(lambda: ended(workdir))
    workers = workers_of(process)
    process.kill()
    process.communicate()
    psutil.wait_procs(workers, timeout=SECONDS)
    assert not any(worker.is_running() for worker in workers)  # they end by themselves
    end = run(config)
    assert end.code == 0, end.err
    check_whole(workdir, before)


def test_all_are_killed_amid_a_race_and_the_same_command_goes_on(tmp_path: Path) -> None:
    workdir = tmp_path / "search"
    racing = {"trials": 14, "race": 2, "trial_seeds": 2, "sampler": "effects", "epochs": 30}
    config = small_search(workdir, **LONG | racing | {"draw": "roles"})

    def of_race(state: str) -> list[TrialRecord]:
        return [t for t in trials(workdir) if t.race is not None and t.state == state]

    process = begin(config)
    wait_until(lambda: of_race("complete") and of_race("running"))
    before = ended(workdir)
    workers = workers_of(process)
    process.kill()
    process.communicate()
    psutil.wait_procs(workers, timeout=SECONDS)
    end = run(config)
    assert end.code == 0, end.err
    after = {trial.number: trial for trial in trials(workdir)}
    assert all(after[trial.number] == trial for trial in before)
    done = [trial for trial in after.values() if trial.state == "complete"]
    assert len(done) == config.trials
    raced = [(key_of(t.graph), t.seed) for t in done if t.race is not None and t.graph is not None]
    assert len(raced) == len(set(raced)) == reserved(config, config.space()).trials
    raced_in_vain = [t for t in after.values() if t.race is not None and t.is_interrupted]
    # One may be killed before it is said which graph it has.
    killed = {(t.graph, t.seed) for t in raced_in_vain if t.graph is not None}
    assert {(t.graph, t.seed) for t in done} >= killed


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_and_leaves_nothing_running(
    tmp_path: Path, number: int, code: int
) -> None:
    workdir = tmp_path / "search"
    config = small_search(workdir, **LONG)
    process = begin(config)
    before = wait_until(lambda: ended(workdir))
    workers = workers_of(process)
    assert workers
    process.send_signal(number)
    end = end_of(process)
    assert end.code == code
    assert end.err.startswith("interrupted")
    assert end.err.endswith("; the same command goes on where it stopped\n")
    assert end.err.count("\n") == 1
    psutil.wait_procs(workers, timeout=SECONDS)
    assert not any(worker.is_running() for worker in workers)
    assert not any(trial.state == "running" for trial in trials(workdir))
    end = run(config)
    assert end.code == 0, end.err
    check_whole(workdir, before)


INTERRUPTER = """
import os, signal
import sqlalchemy as sa
import tiny_models

sent = []  # once: a second signal ends the command at once

@sa.event.listens_for(sa.Engine, "after_cursor_execute")
def interrupt(connection, cursor, statement, parameters, context, many):
    if statement.startswith("SELECT trials.") and signal.getsignal(signal.SIGINT) not in (
        signal.SIG_DFL,  # a worker's
        signal.default_int_handler,
    ):
        # The rows that were found are not fetched yet, and the file is locked until they are.
        running = sa.text("SELECT count(*) FROM trials WHERE state = 'RUNNING'")
        with connection.engine.connect() as other:
            if not sent and other.execute(running).scalar():
                sent.append(signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
"""


def test_an_interrupt_amid_reading_the_database_leaves_nothing_running(tmp_path: Path) -> None:
    (tmp_path / "interrupter.py").write_text(INTERRUPTER)
    workdir = tmp_path / "search"
    process = begin(small_search(workdir, **LONG | {"imports": ("interrupter",)}))
    end = end_of(process)
    assert (end.code, end.err) == (130, "interrupted; the same command goes on where it stopped\n")
    storage = open_storage(SearchFolder(workdir).storage)
    (name,) = optuna.get_all_study_names(storage)
    states = [trial.state for trial in optuna.load_study(study_name=name, storage=storage).trials]
    assert optuna.trial.TrialState.FAIL in states
    assert optuna.trial.TrialState.RUNNING not in states


KILLER = """
import os, signal
import flax.linen as nn
import jax
import ktg_jax as ktg

def kill(images):
    os.kill(os.getpid(), signal.SIGKILL)

class Killer(nn.Module):  # when it computes, not when it is only traced
    num_classes: int

    @nn.compact
    def __call__(self, images):
        jax.debug.callback(kill, images[0, 0, 0, 0])
        return nn.Dense(self.num_classes)(images.reshape(len(images), -1))

ktg.register_model("killer", Killer)
"""


def test_a_graph_that_kills_its_worker_fails_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KTG_HEARTBEAT", "60")
    (tmp_path / "killer_model.py").write_text(KILLER)
    workdir = tmp_path / "search"
    config = small_search(
        workdir,
        candidates=("tiny", "killer"),
        imports=("tiny_models", "killer_model"),
        gates=("through",),
        trials=5,
        workers=1,
        retrain_top=0,
    )
    end = run(config)
    assert (end.code, end.err) == (0, "")
    # Without `load_search`, which would import the model here.
    storage = open_storage(SearchFolder(workdir).storage)
    (name,) = optuna.get_all_study_names(storage)
    known = records(optuna.load_study(study_name=name, storage=storage).trials)
    counted = [trial for trial in known if not trial.is_interrupted]
    reasons = {t.graph.nodes[1].model: t.reason for t in reversed(counted) if t.graph is not None}
    assert reasons == {"tiny": None, "killer": "killed its worker 3 times (signal 9)"}
    assert "failed: killed its worker 3 times (signal 9)" in end.out
    assert (len(counted), len(known)) == (5, 7)


# --- a full disk


def test_a_disk_that_fills_up_ends_the_search(tmp_path: Path) -> None:
    workdir = tmp_path / "search"
    config = small_search(workdir, **LONG)
    process = begin(config)
    before = wait_until(lambda: ended(workdir))
    size = (workdir / "study.db").stat().st_size
    for one in (process, *workers_of(process)):
        resource.prlimit(one.pid, resource.RLIMIT_FSIZE, (size, size))
    end = end_of(process)
    assert end.code in (1, 2)
    assert len(end.err.splitlines()) == 1
    assert "Traceback" not in end.err
    end = run(config)  # with room again
    assert end.code == 0, end.err
    after = {trial.number: trial for trial in trials(workdir)}
    assert [after[trial.number] for trial in before] == before
