"""Trials per hour: a plain search, ours with one worker and ours with two, on the same graphs."""

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.measure import interleaved, output_of, spread
from benchmarks.plain_search import found
from benchmarks.task import Figures
from experiments.runs.graphs import PRETRAINED
from experiments.search.extra import optuna
from experiments.search.folder import SearchFolder
from experiments.search.storage import open_storage
from ktg_jax.errors import RunError
from ktg_jax.io.files import cache_folder

COMPARED_WITH = {
    "plain": "plain",
    "one_worker": "plain",
    "two_workers": "one_worker",
    "one_worker_warm": "plain",
    "two_workers_warm": "one_worker_warm",
}
"""Which side each is compared with. `warm`: programs that an earlier search compiled are there."""

# A search like the plain one: nothing is pruned, and the same graphs are drawn.
_SEARCH = (
    *("--sampler", "random", "--draw", "uniform", "--pruner", "none", "--no-baselines"),
    *("--trial-seeds", "1", "--race", "0", "--retrain-top", "0"),
)
_WORKERS = {"one_worker": 1, "two_workers": 2}
_COMPILED = "compiled"


def throughput(arguments: Sequence[str], rounds: int, with_warm: bool) -> list[Figures]:
    """Searches in turns; the entry of each side.

    Every search is a process of its own. Ours begins with an empty compilation cache and without
    pre-trained networks; the native operations are built, and the data prepared, before.

    Args:
        arguments: for `experiments.search`: the space, the data, the training, `--trials`.
        rounds: turns of each side.
        with_warm: after each of our searches make it again, with what it compiled, but without
            what it pre-trained.

    Raises:
        RunError: a search failed, or the sides did not train the same graphs.
    """
    arguments = [*arguments, *_SEARCH]
    with tempfile.TemporaryDirectory() as home:
        turns = {"plain": partial(_plain, arguments)}
        for side, workers in _WORKERS.items():
            mine = [*arguments, "--workers", str(workers)]
            cache = Path(home) / side
            turns[side] = partial(_ours, mine, cache, is_warm=False)
            if with_warm:
                turns[f"{side}_warm"] = partial(_ours, mine, cache, is_warm=True)
        results = interleaved(turns, rounds)
    check_same_graphs({side: turn["graphs"] for side in results for turn in results[side]})
    entries: dict[str, Figures] = {}
    for side in COMPARED_WITH:
        if side in results:
            entries[side] = _entry(side, results[side], entries)
    return list(entries.values())


def check_same_graphs(graphs: dict[str, list[Figures]]) -> None:
    """Raises RunError unless all sides have trained the first one's graphs, trial by trial."""
    (first, expected), *others = graphs.items()
    for side, drawn in others:
        differing = [i for i, (a, b) in enumerate(zip(expected, drawn, strict=False)) if a != b]
        if differing or len(expected) != len(drawn):
            raise RunError(
                f"{side} does not train the graphs that {first} trains: {len(drawn)} trials, not "
                f"{len(expected)}; differing: {differing or 'none'}"
            )


def _entry(side: str, turns: Sequence[Figures], entries: dict[str, Figures]) -> Figures:
    rates = spread([3600 * len(turn["graphs"]) / turn["seconds"] for turn in turns])
    other = COMPARED_WITH[side]
    reference = rates.median if other == side else entries[other]["trials_per_hour"]
    return {
        "side": side,
        "trials_per_hour": rates.median,
        "trials_per_hour_quartiles": list(rates.quartiles),
        "compared_with": other,
        "ratio": rates.median / reference,
        "seconds": statistics.median(turn["seconds"] for turn in turns),
        "command_s": statistics.median(turn["command_s"] for turn in turns),
        "programs_compiled": statistics.median(turn["programs_compiled"] for turn in turns),
        "duplicates": turns[0].get("duplicates", 0),
        "mean_accuracy": statistics.mean(turns[0]["values"]),
    }


def _plain(arguments: Sequence[str]) -> Figures:
    begin = time.perf_counter()
    answer = output_of("the plain search", "benchmarks.plain_search", *arguments)
    return json.loads(answer.splitlines()[-1]) | {"command_s": time.perf_counter() - begin}


def _ours(arguments: Sequence[str], cache: Path, is_warm: bool) -> Figures:
    """Runs the command; what it keeps for other searches goes into `cache`."""
    prepare_cache(cache, is_warm)
    environment = {
        "KTG_CACHE_DIR": str(cache),
        # What `experiments.runs.process.prepare` sets, wherever the user's own cache is.
        "JAX_COMPILATION_CACHE_DIR": str(cache / _COMPILED),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "search"
        begin = time.perf_counter()
        where = ("--workdir", str(workdir))
        output_of("our search", "experiments.search", *arguments, *where, **environment)
        seconds = time.perf_counter() - begin
        with _trials(SearchFolder(workdir)) as trials:
            known = [trial.user_attrs for trial in trials]
            return found(trials) | {
                "command_s": seconds,
                "programs_compiled": sum(about.get("programs_compiled", 0) for about in known),
                "duplicates": sum(about.get("duplicate_of") is not None for about in known),
            }


def prepare_cache(cache: Path, is_warm: bool) -> None:
    """Makes a cache in which nothing is trained, and nothing compiled unless it is `warm`.

    Prepared data and native operations are those of the user's cache.
    """
    for kept in (PRETRAINED,) if is_warm else (PRETRAINED, _COMPILED):
        shutil.rmtree(cache / kept, ignore_errors=True)
    cache.mkdir(exist_ok=True)
    users = cache_folder()
    for path in users.iterdir() if users.is_dir() else ():
        if path.name not in (PRETRAINED, _COMPILED) and not os.path.lexists(cache / path.name):
            (cache / path.name).symlink_to(path.absolute())


@contextmanager
def _trials(folder: SearchFolder) -> Iterator[list[optuna.trial.FrozenTrial]]:
    storage = open_storage(folder.own_storage)
    try:
        name = folder.read("search.json")["study"]
        yield optuna.load_study(study_name=name, storage=storage).get_trials()
    finally:
        storage.engine.dispose()
