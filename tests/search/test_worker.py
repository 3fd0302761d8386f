"""Workers: as many trials as asked for, equivalent ones once, failures noted, none run twice."""

import itertools
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_models  # noqa: F401  (registers its models)
from searches import (
    STUDY,
    Killed,
    PretendedTrainer,
    begin,
    rising,
    small_search,
    study_url,
    trials_of,
    work,
    worker,
)

import ktg_jax as ktg
from experiments.runs.folder import Folder
from experiments.search.baselines import baselines
from experiments.search.extra import optuna
from experiments.search.storage import open_storage
from experiments.search.study import (
    State,
    begin_trial,
    open_study,
    run_all_again,
)
from experiments.search.worker import MOST_FAILURES
from ktg_jax.errors import InputError, RunError

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed:UserWarning"),
]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return study_url(tmp_path)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)


# --- how many


def test_there_are_exactly_as_many_trials_as_asked_for(url: str) -> None:
    def slowly(graph: ktg.Graph, seed: int) -> list[float]:
        time.sleep(0.02)
        return rising(graph, seed)

    config = small_search(trials=11, pruner="none")
    trainer = work(url, config, slowly, workers=3)
    trials = trials_of(url)
    assert [trial.number for trial in trials] == list(range(11))
    assert all(trial.state == "complete" for trial in trials)
    keys = Counter(graph.canonical() for graph, _ in trainer.trained)
    assert set(keys.values()) == {1}
    assert len(keys) == sum(trial.duplicate_of is None for trial in trials)


def test_the_same_search_with_more_trials_goes_on(url: str) -> None:
    work(url, small_search(trials=4), rising)
    before = trials_of(url)
    work(url, small_search(trials=4), rising)
    assert trials_of(url) == before
    work(url, small_search(trials=7), rising)
    assert trials_of(url)[:4] == before
    assert len(trials_of(url)) == 7


def test_the_baselines_are_the_first(url: str) -> None:
    work(url, small_search(trials=8, pruner="none", baselines=True), rising)
    trials = trials_of(url)
    assert [trial.baseline for trial in trials] == [
        *("independent", "control", "mutual", "distillation tiny"),
        *("distillation tiny, label linear", "distillation tiny, label cut"),
        *(None, None),
    ]
    graphs = [trial.graph for trial in trials[:6] if trial.graph is not None]
    frozen = ("cutoff", "cutoff")
    assert [graph.pruned().gates for graph in graphs] == [
        (("through",),),
        (("linear",),),
        (("through", "through"),) * 2,
        (("through", "through"), frozen),
        (("linear", "through"), frozen),
        (("cutoff", "through"), frozen),
    ]


def test_nothing_begins_after_the_deadline(url: str) -> None:
    config = small_search()
    begin(url, config)
    trainer = PretendedTrainer(rising)
    worker(url, config, trainer, deadline=time.time() - 1).search()
    assert not trainer.trained
    assert not trials_of(url)


# --- equivalent graphs


def test_equivalent_graphs_are_trained_once(url: str) -> None:
    # One node: through and correct are the same, cutoff is not allowed: two graphs.
    config = small_search(nodes=1, candidates=(), trials=8, pruner="none")
    trainer = work(url, config, rising)
    assert len(trainer.trained) == 2
    trials = trials_of(url)
    first = {trial.number: trial for trial in trials if trial.duplicate_of is None}
    assert len(first) == 2
    for trial in trials:
        if trial.duplicate_of is not None:
            original = first[trial.duplicate_of]
            assert trial.graph is not None
            assert original.graph is not None
            assert trial.graph.equivalent(original.graph)
            assert (trial.value, trial.curve) == (original.value, original.curve)
            assert trial.node_epochs == 0


def test_those_drawn_at_the_same_time_wait_for_the_first(url: str) -> None:
    def slowly(graph: ktg.Graph, seed: int) -> list[float]:
        time.sleep(0.5)
        return rising(graph, seed)

    config = small_search(nodes=1, candidates=(), trials=6, pruner="none")
    trainer = work(url, config, slowly, workers=3)
    assert len(trainer.trained) <= 2
    assert len({graph.canonical() for graph, _ in trainer.trained}) == len(trainer.trained)
    assert all(trial.state == "complete" for trial in trials_of(url))


def test_one_that_was_pruned_prunes_its_equivalents(url: str) -> None:
    def linear_is_bad(graph: ktg.Graph, seed: int) -> list[float]:
        return [0.1, 0.1, 0.1] if graph.gates == (("linear",),) else [0.8, 0.85, 0.9]

    config = small_search(nodes=1, candidates=(), trials=8)
    work(url, config, linear_is_bad)
    linear = [t for t in trials_of(url) if t.graph is not None and t.graph.gates == (("linear",),)]
    assert len(linear) >= 2
    assert {trial.state for trial in linear} == {"pruned"}
    assert {tuple(trial.curve.items()) for trial in linear} == {((1, 0.1),)}


def test_on_request_they_are_trained_with_other_seeds(url: str) -> None:
    config = small_search(
        nodes=1, candidates=(), trials=6, pruner="none", duplicates="retrain", seed=5
    )
    trainer = work(url, config, rising)
    assert len(trainer.trained) == 6
    seeds: dict[ktg.Graph, list[int]] = {}
    for graph, seed in trainer.trained:
        seeds.setdefault(graph.canonical(), []).append(seed)
    for of_graph in seeds.values():
        assert of_graph == list(range(5, 5 + len(of_graph)))


ALL_EQUIVALENT: dict[str, Any] = {
    "nodes": 1,
    "candidates": (),
    "gates": ("through", "correct"),
    "pruner": "none",
    "duplicates": "retrain",
    "seed": 5,
}


def test_those_trained_at_the_same_time_have_a_seed_each(url: str) -> None:
    def slowly(graph: ktg.Graph, seed: int) -> list[float]:
        time.sleep(0.3)
        return rising(graph, seed)

    config = small_search(trials=7, **ALL_EQUIVALENT)
    trainer = work(url, config, slowly, workers=3)
    assert sorted(seed for _, seed in trainer.trained) == list(range(5, 12))
    known = [trial.user_attrs for trial in stored(url)]
    assert sorted(about["seed"] for about in known) == list(range(5, 12))
    assert [about.get("equivalent_to") for about in known] == [None, *[0] * 6]


def test_one_that_is_run_again_keeps_its_seed(url: str) -> None:
    def killed(graph: ktg.Graph, seed: int) -> list[float]:
        if seed == 6:
            raise Killed
        return rising(graph, seed)

    config = small_search(trials=4, **ALL_EQUIVALENT)
    with pytest.raises(Killed):
        work(url, config, killed)
    study = open_study(open_storage(url), STUDY, config, config.space())
    other = study.ask(study.trials[0].distributions)
    begin_trial(other, ktg.graphs.independent(["tiny"]), "elsewhere/0")
    run_all_again(study, "elsewhere")  # comes first, but the other has its seed
    run_all_again(study, "here")
    trainer = work(url, config, rising)
    assert [seed for _, seed in trainer.trained] == [7, 6, 8]
    ended = [trial for trial in stored(url) if trial.state == State.COMPLETE]
    about = [(t.number, t.user_attrs["seed"], t.user_attrs.get("equivalent_to")) for t in ended]
    assert about == [(0, 5, None), (3, 7, 0), (4, 6, 0), (5, 8, 0)]


def stored(url: str) -> list[optuna.trial.FrozenTrial]:
    """The trials as they are in the database."""
    return optuna.load_study(study_name=STUDY, storage=open_storage(url)).trials


# --- failures


def test_a_failed_trial_is_noted_and_the_search_goes_on(url: str) -> None:
    def mutual_diverges(graph: ktg.Graph, seed: int) -> list[float | Exception]:
        if graph == ktg.graphs.mutual(["tiny", "tiny"]):
            return [0.5, RunError("step 9, node tiny-0:\nloss not finite")]
        return [*rising(graph, seed)]

    work(url, small_search(trials=6, baselines=True), mutual_diverges)
    trials = trials_of(url)
    assert len(trials) == 6
    (failed,) = (trial for trial in trials if trial.state == "failed")
    assert failed.baseline == "mutual"
    assert failed.reason == "step 9, node tiny-0: loss not finite"
    assert failed.curve == {1: 0.5}
    assert failed.value is None
    assert failed.node_epochs == 2


def test_equivalents_of_a_failed_trial_fail_as_it_did(url: str) -> None:
    def linear_diverges(graph: ktg.Graph, seed: int) -> list[float | Exception]:
        if graph.gates == (("linear",),):
            return [RunError("diverged")]
        return [*rising(graph, seed)]

    config = small_search(nodes=1, candidates=(), trials=8, pruner="none")
    trainer = work(url, config, linear_diverges)
    assert len(trainer.trained) == 2
    failed = [trial for trial in trials_of(url) if trial.state == "failed"]
    assert len(failed) >= 2
    assert failed[0].reason == "diverged"
    assert {t.reason for t in failed[1:]} == {f"as trial {failed[0].number}: diverged"}


def test_many_failures_in_a_row_end_the_search(url: str) -> None:
    numbers = itertools.count()

    def failing(graph: ktg.Graph, seed: int) -> list[float | Exception]:
        return [MemoryError(f"number {next(numbers)}")]

    with pytest.raises(RunError, match=f"{MOST_FAILURES} trials in a row failed.*number 4"):
        work(url, small_search(trials=30), failing)
    assert sum(t.duplicate_of is None for t in trials_of(url)) == MOST_FAILURES


def test_failures_between_successes_do_not(url: str) -> None:
    numbers = itertools.count()

    def every_second(graph: ktg.Graph, seed: int) -> list[float | Exception]:
        return [RunError("no") if next(numbers) % 2 else 0.5]

    work(url, small_search(trials=15, gates=ktg.GATES), every_second)
    assert len(trials_of(url)) == 15


FULL = "No space left on device"


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (OSError(28, FULL), OSError),
        # As the writer of checkpoints says it.
        (ValueError(f"RESOURCE_EXHAUSTED: Error writing: {FULL} [os_error_code='28']"), RunError),
        (None, InputError),
    ],
    ids=["file", "checkpoint", "folder"],
)
def test_a_full_disk_is_no_failure_of_a_graph(
    failure: Exception | None, raised: type[Exception], url: str, tmp_path: Path
) -> None:
    def full(graph: ktg.Graph, seed: int) -> list[float | Exception]:
        if failure is None:  # a run cannot be begun, as where a network is trained alone
            (tmp_path / "file").touch()
            with Folder(tmp_path / "file" / "run").begun({}):
                pass
        return [0.1, *([] if failure is None else [failure])]

    config = small_search(trials=7, baselines=True)
    with pytest.raises(raised, match=r"No space left|a folder that can be written"):
        work(url, config, full)
    assert [trial.reason for trial in trials_of(url)] == [None]
    study = open_study(open_storage(url), STUDY, config, config.space())
    run_all_again(study, "here")
    work(url, config, rising)  # with room again: nothing was lost
    ended = [trial for trial in trials_of(url) if trial.state in ("complete", "pruned")]
    assert len(ended) == 7
    assert {trial.baseline for trial in ended} == {*baselines(config.space()), None}


def test_bad_input_of_a_graph_is_its_failure(url: str) -> None:
    def misfit(graph: ktg.Graph, seed: int) -> list[float | Exception]:
        return [InputError("image_shape", (8, 8, 1), "larger images")]

    work(url, small_search(trials=2), misfit)
    assert all(str(trial.reason).startswith("image_shape: got") for trial in trials_of(url))
