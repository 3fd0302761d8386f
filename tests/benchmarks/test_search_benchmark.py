"""The benchmark of searches: the same graphs on all sides, and all compute counted."""

import dataclasses
import datetime
import io
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models  # noqa: F401  (registers its models)
from rich.console import Console
from runs import ROOT, compiled_once, in_process
from searches import small_search

import ktg_jax as ktg
from benchmarks import search, search_quality, search_throughput
from benchmarks.plain_search import PlainTrainer, found
from benchmarks.search_quality import SharedTrainer, best_at, search_until
from benchmarks.search_throughput import check_same_graphs, prepare_cache
from benchmarks.task import Figures
from experiments.report.measures import ComputePoint
from experiments.runs.assemble import load
from experiments.search.config import SearchConfig
from experiments.search.extra import optuna
from experiments.search.records import TrialRecord
from experiments.search.trial import Trainer
from ktg_jax import Graph
from ktg_jax.errors import InputError, RunError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]

TINY = ktg.Node("tiny")
HEARS_FROZEN = Graph((TINY,) * 2, (("linear", "through"), ("cutoff", "cutoff")))
HEARS_ALL = Graph(
    (TINY,) * 3,
    (
        ("through", "correct", "linear"),
        ("linear", "through", "cutoff"),
        ("through", "cutoff", "through"),
    ),
    temperature=2.0,
)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is pre-trained is kept for a test alone; processes that it starts find the models."""
    monkeypatch.setenv("KTG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("KTG_CPU_CONVOLUTION", "xla")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "support"))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with compiled_once():
        yield


@pytest.mark.parametrize("graph", [HEARS_FROZEN, HEARS_ALL])
def test_the_plain_search_trains_the_target_as_ours(graph: Graph) -> None:
    config = small_search(epochs=2)
    dataset = load(config, with_test=False)
    plain = list(PlainTrainer(config.training(), dataset).accuracies(graph))
    device = ktg.Parallel().devices[0]
    ours = [value for _, value in Trainer(config.training(), dataset, device).epochs(graph, 0)]
    assert len(plain) == 2
    assert plain == pytest.approx(ours, abs=1 / len(dataset.val or ()) + 1e-6)


def test_a_search_takes_from_its_first_start_to_its_last_end() -> None:
    study = optuna.create_study()
    study.optimize(lambda trial: 0.5, n_trials=2)
    first, second = study.get_trials()
    now = datetime.datetime(2024, 1, 1)
    for number, trial in enumerate((first, second)):
        trial.set_user_attr("graph", {"number": number})
        trial.datetime_start = now + datetime.timedelta(seconds=10 * number)
        trial.datetime_complete = now + datetime.timedelta(seconds=26 - number)
    taken = found([first, second])
    assert taken["seconds"] == 26
    assert taken["graphs"] == [{"number": 0}, {"number": 1}]
    assert taken["values"] == [0.5, 0.5]


def test_a_trial_that_failed_is_named() -> None:
    study = optuna.create_study()
    study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL))
    with pytest.raises(RunError, match="trial 0 is not complete: fail"):
        found(study.get_trials())


def test_other_graphs_than_the_plain_searchs_are_an_error() -> None:
    check_same_graphs({"plain": [{"a": 1}, {"b": 1}], "one_worker": [{"a": 1}, {"b": 1}]})
    with pytest.raises(RunError, match=r"one_worker .* plain trains: 2 trials.* differing: \[1\]"):
        check_same_graphs({"plain": [{"a": 1}, {"b": 1}], "one_worker": [{"a": 1}, {"b": 2}]})
    with pytest.raises(RunError, match=r"1 trials, not 2; differing: none"):
        check_same_graphs({"plain": [{"a": 1}, {"b": 1}], "one_worker": [{"a": 1}]})


# ------------------------------------------------------------------------------- the methods


def small_quality(**changes: Any) -> SearchConfig:
    return small_search(nodes=3, epochs=2, **changes)


def test_equivalent_graphs_are_trained_once_and_paid_by_every_search() -> None:
    trainer = SharedTrainer(small_quality())
    trainer.pretrain(small_quality().space())
    turned = Graph((TINY,) * 2, (("linear", "correct"), ("cutoff", "cutoff")))
    first = next(trainer.epochs(HEARS_FROZEN, 0))
    # The pre-training of one network, and an epoch of a node and of a frozen one.
    assert trainer.node_epochs == pytest.approx(2 + 4 / 3)
    assert trainer.trained == pytest.approx(4 / 3)
    curve = list(trainer.epochs(Graph((TINY,) * 2, HEARS_FROZEN.gates), 7))
    assert curve[0] == first
    assert [epoch for epoch, _ in curve] == [1, 2]
    assert trainer.node_epochs == pytest.approx(8 / 3)
    assert trainer.trained == pytest.approx(8 / 3)
    assert trainer.graphs == 1

    trainer.begin_search()
    assert list(trainer.epochs(HEARS_FROZEN, 0)) == curve
    assert trainer.node_epochs == pytest.approx(2 + 8 / 3)
    list(trainer.epochs(turned, 0))
    assert trainer.node_epochs == pytest.approx(8 / 3)
    assert (trainer.graphs, trainer.trained) == (2, pytest.approx(16 / 3))


def test_its_curves_are_the_trainers() -> None:
    config = small_quality()
    shared = SharedTrainer(config)
    shared.pretrain(config.space())
    device = ktg.Parallel().devices[0]
    alone = Trainer(config.training(), load(config, with_test=False), device)
    a, b = HEARS_ALL.canonical(), HEARS_FROZEN.canonical()
    # Epochs of two graphs in turns, as of trials that are pruned and asked for again.
    turns = list(zip(shared.epochs(a, 0), shared.epochs(b, 0), strict=True))
    assert [turn[0] for turn in turns] == list(alone.epochs(a, 0))
    assert [turn[1] for turn in turns] == list(alone.epochs(b, 0))


def test_a_search_goes_on_until_the_budget_is_spent() -> None:
    config = small_quality(sampler="random", pruner="asha")
    trainer = SharedTrainer(config)
    trainer.pretrain(config.space())
    trials = search_until(config, 20, trainer)
    again = search_until(config, 20, trainer)
    other = search_until(dataclasses.replace(config, seed=1), 20, trainer)
    assert sum(t.node_epochs for t in trials) >= 20
    assert sum(t.node_epochs for t in trials[:-10]) < 20
    assert [t.curve for t in again] == [t.curve for t in trials]
    assert [t.node_epochs for t in again] == [t.node_epochs for t in trials]
    assert [t.graph for t in other] != [t.graph for t in trials]


def test_a_search_of_a_small_space_ends() -> None:
    config = dataclasses.replace(small_quality(), nodes=1, candidates=())
    trainer = SharedTrainer(config)
    trials = search_until(config, 1000, trainer)
    assert trainer.graphs == len({t.graph.canonical() for t in trials if t.graph}) > 0
    assert sum(t.duplicate_of is None for t in trials) == trainer.graphs


def test_the_best_within_a_budget() -> None:
    trial = TrialRecord(0, "complete")
    curve = [ComputePoint(trial, *at) for at in ((4.0, None), (8.0, 0.5), (12.0, 0.75))]
    assert [best_at(curve, budget) for budget in (3, 4, 8, 11.9, 12, 99)] == [
        *(None, None, 0.5, 0.5, 0.75, 0.75)
    ]


# ------------------------------------------------------------------------------- the command


def small_options(tmp_path: Path, **changes: Any) -> search.SearchOptions:
    defaults: dict[str, Any] = {
        "json": str(tmp_path / "search.json"),
        "target": "tiny",
        "candidates": ("tiny",),
        "imports": ("tiny_models",),
        "train_limit": 200,
        "nodes": (2,),
        "trials": 3,
        "epochs": 1,
        "rounds": 1,
        "quality_nodes": 2,
        "quality_epochs": 2,
        "seeds": (0, 1),
        "budgets": (6.0, 12.0),
    }
    return search.SearchOptions(**defaults | changes)


def test_searches_are_timed_side_by_side(tmp_path: Path) -> None:
    text = io.StringIO()
    options = small_options(tmp_path, parts=("throughput",))
    content = search.measure(options, Console(file=text, width=160))
    assert json.loads((tmp_path / "search.json").read_text()) == content
    sides = {case["side"]: case for case in content["throughput"]}
    assert list(sides) == ["plain", "one_worker", "two_workers"]
    for case in sides.values():
        assert case["trials_per_hour"] == pytest.approx(3600 * 3 / case["seconds"])
        assert 0 < case["seconds"] < case["command_s"]
        assert case["programs_compiled"] > 0
        compared = sides[case["compared_with"]]
        assert case["ratio"] == case["trials_per_hour"] / compared["trials_per_hour"]
        assert case["mean_accuracy"] == pytest.approx(compared["mean_accuracy"], abs=0.03)
    assert sides["two_workers"]["compared_with"] == "one_worker"
    assert f"{sides['two_workers']['ratio']:.2f} x one_worker" in text.getvalue()


def test_a_warm_search_follows_each_cold_one(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, bool]] = []

    def turn(arguments: Sequence[str], cache: Path | None = None, is_warm: bool = False) -> Figures:
        workers = "plain" if cache is None else arguments[arguments.index("--workers") + 1]
        taken.append((workers, is_warm))
        seconds = 8.0 if cache is None else 4.0 / int(workers) / (1 + is_warm)
        found = {"graphs": [{}], "values": [0.5], "seconds": seconds, "command_s": 9.0}
        return found | {"programs_compiled": 1}

    monkeypatch.setattr(search_throughput, "_plain", turn)
    monkeypatch.setattr(search_throughput, "_ours", turn)
    entries = search_throughput.throughput(["--trials", "1"], rounds=2, with_warm=True)
    once = [("plain", False), ("1", False), ("1", True), ("2", False), ("2", True)]
    assert taken == 2 * once
    assert [(e["side"], e["compared_with"], e["ratio"]) for e in entries] == [
        ("plain", "plain", 1),
        ("one_worker", "plain", 2),
        ("two_workers", "one_worker", 2),
        ("one_worker_warm", "plain", 4),
        ("two_workers_warm", "one_worker_warm", 2),
    ]


def test_a_searchs_cache_is_empty_but_for_what_is_prepared(tmp_path: Path) -> None:
    users, cache = tmp_path / "cache", tmp_path / "searchs"
    for folder in ("native", "compiled", "pretrained"):
        (users / folder).mkdir(parents=True)
        (users / folder / "file").write_text(folder)
    prepare_cache(cache, is_warm=False)
    assert [path.name for path in cache.rglob("*")] == ["native"]
    assert (cache / "native" / "file").read_text() == "native"
    for is_warm, left in ((True, {"native", "compiled"}), (False, {"native"})):
        for folder in ("compiled", "pretrained"):
            (cache / folder).mkdir(exist_ok=True)
            (cache / folder / "of a search").touch()
        prepare_cache(cache, is_warm)
        assert {path.name for path in cache.iterdir()} == left
    assert len(list(users.rglob("file"))) == 3


def test_methods_are_compared_by_their_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_quality, "_TRIALS_AT_ONCE", 4)
    text = io.StringIO()
    picture = tmp_path / "quality.svg"
    options = small_options(tmp_path, parts=("quality",), nodes=(), picture=str(picture))
    content = search.measure(options, Console(file=text, width=160))
    assert json.loads((tmp_path / "search.json").read_text()) == content
    found = content["quality"]
    assert found["seeds"] == [0, 1]
    assert [entry["method"] for entry in found["methods"]] == [
        *("random + asha", "random + patient", "tpe + asha")
    ]
    for entry in found["methods"]:
        small, large = entry["budgets"]
        assert (small["node_epochs"], large["node_epochs"]) == (6, 12)
        assert large["mean"] == sum(large["accuracies"]) / 2
        assert all(a <= b for a, b in zip(small["accuracies"], large["accuracies"], strict=True))
        assert f"{100 * large['mean']:.2f} ± {100 * large['std']:.2f}" in text.getvalue()
        assert entry["method"] in "".join(ET.parse(picture).getroot().itertext())
    drawn = sum(entry["trials"] - entry["duplicates"] for entry in found["methods"])
    assert 0 < found["trained_graphs"] < 2 * drawn


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--trials 0", "error: trials: got 0; allowed: at least 1"),
        ("--nodes 101", "error: nodes: got 101; allowed: "),
        ("--candidates nobody", "error: candidates[0]: got 'nobody'; allowed: "),
        ("--budgets 24", "error: budgets: got 24.0; allowed: above 24, those of one whole trial"),
        ("--seeds -1", "error: seeds: got -1; allowed: at least 0"),
        ("--picture a.txt", "error: picture: got 'a.txt'; allowed: a file name that ends in .svg"),
        ("--json no/such/folder.json", "error: json: got 'no/such/folder.json'; allowed: a file"),
    ],
)
def test_bad_input_is_one_line(options: str, said: str) -> None:
    ended = in_process(search.main, *options.split())
    assert ended.code == 2
    assert ended.err.startswith(said)
    assert ended.err.count("\n") == 1


def test_the_same_fields_mean_the_same_in_a_search() -> None:
    options = search.SearchOptions(data_dir="there", train_limit=500, image_size=16)
    config = search.search_of(options, 5)
    assert (config.nodes, config.trials, config.epochs) == (5, 6, 4)
    assert (config.data_dir, config.train_limit, config.image_size) == ("there", 500, 16)
    with pytest.raises(InputError, match="epochs: got 0"):
        search.check(dataclasses.replace(options, quality_epochs=0))
