"""The benchmark of what searches find: trained once, counted each time, and its figures."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_models  # noqa: F401  (registers its models)
from rich.console import Console
from searches import small_search

import ktg_jax as ktg
from benchmarks import found as benchmark
from benchmarks.found import FoundOptions, compare, search_of
from benchmarks.ledger import LedgerTrainer, found_graph
from experiments.runs.assemble import load
from experiments.search.baselines import baselines
from experiments.search.trial import Trainer
from ktg_jax import InputError

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

PAIR = ktg.Graph(["tiny", "tiny"], [["through", "linear"], ["cutoff", "cutoff"]])
SAME = ktg.Graph(["tiny", "tiny"], [["correct", "linear"], ["cutoff", "cutoff"]])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """The epochs that are really trained, by graph and seed; each is a little better."""
    epochs: list[tuple[str, int, int]] = []

    def pretend(self: Any, graph: ktg.Graph, seed: int) -> Iterator[tuple[int, float]]:
        for epoch in range(1, 4):
            epochs.append((graph.to_json(), seed, epoch))
            yield epoch, 0.1 * epoch + 0.01 * sum(g != "cutoff" for g in graph.gates[0])

    monkeypatch.setattr(Trainer, "epochs", pretend)
    return epochs


def ledger(tmp_path: Path) -> LedgerTrainer:
    config = small_search(draw="roles")
    return LedgerTrainer(config, load(config, with_test=False), tmp_path)


def test_equivalent_graphs_are_trained_once_and_paid_each_time(
    trained: list[Any], tmp_path: Path
) -> None:
    trainer = ledger(tmp_path)
    assert next(trainer.epochs(PAIR, 0)) == (1, pytest.approx(0.12))  # as one that is pruned
    assert len(trained) == 1
    assert trainer.node_epochs == pytest.approx(1 + 1 / 3)
    assert [epoch for epoch, _ in trainer.epochs(SAME, 0)] == [1, 2, 3]
    assert len(trained) == 3
    assert trainer.node_epochs == pytest.approx(3 * (1 + 1 / 3))
    assert len(list(trainer.epochs(PAIR, 1))) == 3
    assert len(trained) == 6  # another seed is another training


def test_a_search_spends_its_budget_and_then_races(trained: list[Any], tmp_path: Path) -> None:
    config = small_search(nodes=3, race=2, sampler="random", pruner="none")
    found = found_graph(config, 60.0, tmp_path)
    raced = 2 * 2  # two further seeds of two graphs
    assert found.trainings > raced
    # The trainings before the race cost at most 9 node-epochs, and come five at a time.
    assert 60 <= found.node_epochs < 60 + (5 + raced) * 9
    assert all(gate != "cutoff" for gate in found.graph.gates[0])
    again = type(found).from_json(json.loads(json.dumps(found.to_json())))
    assert again == found


def test_figures_count_who_is_ahead() -> None:
    graphs = {"a": ktg.graphs.independent(["cnn"]), "b": ktg.graphs.mutual(["cnn", "cnn"])}
    good, bad = PAIR.canonical(), ktg.graphs.chain(["cnn", "cnn", "cnn"])
    accuracies = {
        graphs["a"].to_json(): [0.5, 0.6],
        graphs["b"].to_json(): [0.4, 0.4],
        good.to_json(): [0.6, 0.6],
        bad.to_json(): [0.5, 0.5],
    }
    make = benchmark.Found
    found = {
        (0, "effects", 1.0): make(good, 100.0, 10),
        (1, "effects", 1.0): make(bad, 120.0, 10),
        (0, "random + asha", 3.0): make(bad, 300.0, 40),
        (1, "random + asha", 3.0): make(bad, 340.0, 44),
    }
    figures = benchmark._figures(found, graphs, accuracies)
    assert figures["best_designed"] == "a"
    assert figures["designed"] == pytest.approx({"a": 0.55, "b": 0.4})
    effects, random = figures["methods"]
    assert effects["accuracies"] == pytest.approx([0.6, 0.5])
    assert (effects["node_epochs"], effects["beats_designed"]) == (110.0, 1)
    assert (random["times"], random["behind_effects"], random["beats_designed"]) == (3.0, 1, 0)


def test_bad_options_are_refused() -> None:
    for changes, message in (
        ({"times": (0.0,)}, "times: got 0.0"),
        ({"trials": 3}, "trials: got 3; allowed: at least 9, the designed graphs"),
        ({"teachers": ("nowhere",)}, r"teachers\[0\]"),
    ):
        with pytest.raises(InputError, match=message):
            search_of(FoundOptions(**changes))


SLEEPS = """import os, time
from pathlib import Path
Path(f"{os.environ['PIDS']}/{os.getpid()}").touch()
time.sleep(300)
"""

RUNS = """import runpy, sys
from functools import partial
from benchmarks import found, report
from experiments.runs import cli

def main():
    jobs = [partial(runpy.run_path, sys.argv[1])] * 3
    found._run(jobs, found.FoundOptions(), report.console(), "jobs")

cli.run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_the_benchmark(tmp_path: Path, number: int) -> None:
    job, pids = tmp_path / "job.py", tmp_path / "pids"
    job.write_text(SLEEPS)
    pids.mkdir()
    environment = os.environ | {"PIDS": str(pids)}
    process = subprocess.Popen([sys.executable, "-c", RUNS, str(job)], env=environment)
    with process:
        end = time.monotonic() + 60
        while len(begun := list(pids.iterdir())) < 2:
            assert time.monotonic() < end
            time.sleep(0.1)
        workers = [psutil.Process(int(path.name)) for path in begun]
        process.send_signal(number)
        assert process.wait(30) != 0
    psutil.wait_procs(workers, timeout=60)
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_the_whole_benchmark_and_again_from_what_it_kept(tmp_path: Path) -> None:
    options = FoundOptions(
        quick=True,
        nodes=2,
        train_limit=200,
        seeds=(0, 1),
        fresh_seeds=2,
        race=2,
        trials=16,
        methods=("effects", "random + asha"),
        times=(1.0,),
        folder=str(tmp_path / "found"),
        json=str(tmp_path / "found.json"),
    )
    content = compare(options, Console(width=160))
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(json.dumps(content))
    effects, random = content["methods"]
    assert (effects["method"], random["method"]) == ("effects", "random + asha")
    assert all(0 <= value <= 1 for entry in content["methods"] for value in entry["accuracies"])
    config = search_of(options)
    assert set(content["designed"]) == set(baselines(config.space()))
    assert effects["trainings"] == config.trials
    files = {path: path.stat().st_mtime for path in (tmp_path / "found").glob("*.json")}
    assert len(files) == 1 + 2 * 2 + 2
    again = compare(options, Console(width=160))
    assert again["methods"] == content["methods"]  # of the machine, the free memory is another
    assert {path: path.stat().st_mtime for path in files} == files
    other = dataclasses.replace(options, val_fraction=0.2)
    with pytest.raises(InputError, match=r"folder: got .*training.val_fraction: 0.4, now 0.2"):
        compare(other, Console(width=160))
