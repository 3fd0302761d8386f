"""What searches find, by the method and the compute: `python -m benchmarks.found --help`.

Random search and TPE with ASHA, as in the papers, beside the search by effects: on the same space,
teachers and data, each found graph being the winner of a race over seeds. The graphs that were
found are then trained with fresh seeds, next to all designed graphs, and tested.
"""

import dataclasses
import itertools
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from rich.console import Console

from benchmarks import report
from benchmarks.ledger import Found, accuracies_on_test, found_graph
from benchmarks.machine import machine
from experiments.runs import cli
from experiments.runs.command_line import Command, parse
from experiments.runs.console import Table
from experiments.runs.identity import differences
from experiments.runs.options import at_least
from experiments.runs.process import prepare, share_cores
from experiments.search.baselines import baselines, check_baselines
from experiments.search.config import Sampler, SearchConfig, resolved
from experiments.search.config import check as check_search
from experiments.search.teachers import with_teachers
from ktg_jax.errors import InputError
from ktg_jax.io.files import write_text

Method = Literal["effects", "random + asha", "tpe + asha"]
METHODS: tuple[Method, ...] = get_args(Method)

_FRESH = 10_000
"""The first seed of the test, far from those of all searches."""

_OF_SEARCH = (
    *("nodes", "target", "candidates", "teachers", "teacher_models", "teacher_inputs"),
    *("gates", "temperatures", "data", "data_dir", "train_limit", "val_fraction", "image_size"),
    *("epochs", "batch_size", "race"),
)
"""The options that a search has, too."""

EXAMPLES = """Examples:
  python -m benchmarks.found --quick
  python -m benchmarks.found --target resnet8 --candidates resnet8 --data cifar10 \\
      --data-dir data --train-limit 5000 --val-fraction 0.4 --image-size 16 --epochs 8 \\
      --temperatures 1 4 --teachers runs/teacher --seeds 0 1 2 3 4 --json found.json"""


@dataclass(frozen=True)
class FoundOptions(report.Output):
    """Compare what searches find on the same space at the same compute."""

    command: ClassVar = Command("benchmarks.found", examples=EXAMPLES)

    nodes: int = 3
    """Nodes of the graphs."""
    target: str = "cnn"
    """Model of the target, node 0."""
    candidates: tuple[str, ...] = ("cnn",)
    """Models that each other node is chosen from."""
    teachers: tuple[str, ...] = ()
    """Networks that are trained already, as of experiments.search."""
    teacher_models: tuple[str, ...] = ()
    """The teachers' models."""
    teacher_inputs: tuple[str, ...] = ()
    """How the teachers want their images."""
    gates: tuple[str, ...] = SearchConfig.gates
    """Of edges."""
    temperatures: tuple[float, ...] = (1.0,)
    """Temperatures of a graph."""
    data: str = "digits"
    """As of experiments.search."""
    data_dir: str | None = None
    """Where cifar10, cifar100 or tiny_imagenet are."""
    train_limit: int | None = None
    """Use only so many training images, validation images included."""
    val_fraction: float = 0.4
    """Share of the images held out."""
    image_size: int | None = None
    """Resize images to so many pixels a side."""
    epochs: int = 8
    """Of a trial that is not pruned."""
    batch_size: int = 64
    """Images a step."""
    trials: int | None = None
    """Of each search by effects; else the designed graphs, 20 more, and the race."""
    race: int = 4
    """Graphs in each race."""
    methods: tuple[Method, ...] = METHODS
    """What to compare."""
    times: tuple[float, ...] = (1.0, 3.0)
    """Node-epochs of the other methods, in those of the search by effects."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the searches: of what is drawn, and of initial weights."""
    fresh_seeds: int = 5
    """With how many seeds the found and the designed graphs are trained and tested."""
    workers: int = 2
    """Processes, each on its share of the cores."""
    folder: str = "runs/found"
    """Where what was found and tested is kept; the same command goes on from there."""


def main() -> None:
    """Compares what the command line asks for."""
    options = parse(FoundOptions)
    prepare()
    compare(options, report.console())


def compare(options: FoundOptions, console: Console) -> dict[str, Any]:
    """Searches with every method and seed, tests what was found, and returns the figures.

    Raises:
        InputError: bad input, found before anything is computed.
        RunError: a training failed.
    """
    config = search_of(options)
    folder = Path(options.folder)
    _begin_folder(folder, config)
    designed = baselines(config.space())
    content: dict[str, Any] = {"machine": machine(), "epochs": config.epochs}
    runs = [(seed, method, times) for seed in options.seeds for method, times in _sides(options)]
    others: list[Method] = [method for method in options.methods if method != "effects"]
    first: list[Method] = ["effects"]
    for methods in filter(None, (first, others)):
        pairs = itertools.product(options.seeds, methods)
        jobs = [partial(_search, options, config, seed, method) for seed, method in pairs]
        _run(jobs, options, console, f"searches, {' and '.join(methods)}")
    found = {run: _read_found(_path(folder, *run)) for run in runs}
    graphs = {name: config.space().graph(p).canonical() for name, p in designed.items()}
    listed = [*graphs.values(), *(each.graph for each in found.values())]
    texts = list(dict.fromkeys(graph.to_json() for graph in listed))
    seeds = [_FRESH + i for i in range(options.fresh_seeds)]
    _run([partial(_test, options, config, texts, s) for s in seeds], options, console, "tests")
    tested = [json.loads((folder / f"tested-{seed}.json").read_text()) for seed in seeds]
    accuracies = {text: [of_seed[text] for of_seed in tested] for text in texts}
    content |= _figures(found, graphs, accuracies)
    report.save(options, content)
    console.print(_table(content))
    return content


def _begin_folder(folder: Path, config: SearchConfig) -> None:
    """Notes what the folder is of, or raises InputError where it is of other searches."""
    about, fields = folder / "search.json", resolved(config, config.space())
    fields["trials"] = config.trials
    if about.is_file():
        if different := differences(json.loads(about.read_text()), fields):
            allowed = f"a folder of the same searches (differing: {different})"
            raise InputError("folder", str(folder), allowed)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(about, json.dumps(fields, indent=1) + "\n")


def search_of(options: FoundOptions) -> SearchConfig:
    """The search by effects, checked, its teachers read."""
    report.check_output(options)
    at_least(options, 1, "fresh_seeds", "workers")
    given = {name: getattr(options, name) for name in _OF_SEARCH}
    if options.quick:
        given |= {"epochs": 2, "train_limit": options.train_limit or 400}
    config, _ = with_teachers(SearchConfig(**given))
    number = len(baselines(config.space()))
    config = dataclasses.replace(config, trials=options.trials or number + 20 + 5 * options.race)
    check_baselines(config, check_search(config))
    for times in options.times:
        if times <= 0:
            raise InputError("times", times, "above 0")
    return config


def _sides(options: FoundOptions) -> list[tuple[str, float]]:
    """The methods, each with how often it has the node-epochs of the search by effects."""
    others = [method for method in options.methods if method != "effects"]
    return [("effects", 1.0), *((m, times) for m in others for times in options.times)]


def _path(folder: Path, seed: int, method: str, times: float) -> Path:
    return folder / f"found-{seed}-{method.replace(' + ', '-')}-{times:g}.json"


def _read_found(path: Path) -> Found:
    return Found.from_json(json.loads(path.read_text()))


def _search(options: FoundOptions, config: SearchConfig, seed: int, method: Method) -> None:
    """The searches of a seed by a method; those that are done are kept.

    How much others than the search by effects may spend is what that one did.
    """
    folder, budget = Path(options.folder), 0.0
    if method != "effects":
        budget = _read_found(_path(folder, seed, "effects", 1.0)).node_epochs
    for _, times in (side for side in _sides(options) if side[0] == method):
        path = _path(folder, seed, method, times)
        if not path.is_file():
            mine = _config_of(config, method, seed)
            found = found_graph(mine, budget * times or None, folder / "recordings")
            write_text(path, json.dumps(found.to_json()))


def _config_of(config: SearchConfig, method: str, seed: int) -> SearchConfig:
    """The search of a method; seeds of searches are so far apart that no two share one."""
    mine = dataclasses.replace(config, seed=1000 * seed)
    if method == "effects":
        return mine
    sampler: Sampler = "random" if method.startswith("random") else "tpe"
    return dataclasses.replace(
        mine, sampler=sampler, draw="uniform", pruner="asha", trial_seeds=1, baselines=False
    )


def _test(options: FoundOptions, config: SearchConfig, texts: Sequence[str], seed: int) -> None:
    """Trains and tests all graphs with one seed; those that are tested are kept."""
    path = Path(options.folder) / f"tested-{seed}.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    wanted = [text for text in texts if text not in known]
    if wanted:
        known |= accuracies_on_test(config, wanted, seed, path.parent / "recordings")
        write_text(path, json.dumps(known))


def _run(jobs: Sequence[Any], options: FoundOptions, console: Console, what: str) -> None:
    """Does the jobs in processes of their own, none of which outlives this one."""
    context = get_context("spawn")
    counter = context.Value("i", 0)
    with (
        report.progress(console, total=len(jobs)) as begin,
        ProcessPoolExecutor(
            options.workers, context, initializer=_begin, initargs=(counter, options.workers)
        ) as pool,
    ):
        begin(what)
        try:
            for i, done in enumerate(as_completed([pool.submit(job) for job in jobs]), 1):
                done.result()
                if i < len(jobs):
                    begin(what)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.kill()
            raise


def _begin(counter: Any, workers: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with counter.get_lock():
        index, counter.value = counter.value, counter.value + 1
    share_cores(index, workers)
    prepare()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _figures(found: Any, designed: Any, accuracies: Any) -> dict[str, Any]:
    """Of each method the test accuracy of what each seed's search found, and against what."""
    means = {text: float(np.mean(values)) for text, values in accuracies.items()}
    best = max(designed, key=lambda name: means[designed[name].to_json()])
    of_best = means[designed[best].to_json()]
    sides: dict[tuple[str, float], list[tuple[int, Found]]] = {}
    for (seed, method, times), each in found.items():
        sides.setdefault((method, times), []).append((seed, each))
    effects = {seed: means[each.graph.to_json()] for seed, each in sides["effects", 1.0]}
    entries = []
    for (method, times), some in sides.items():
        reached = {seed: means[each.graph.to_json()] for seed, each in some}
        listed = list(reached.values())
        entries.append(
            {
                "method": method,
                "times": times,
                "node_epochs": float(np.mean([each.node_epochs for _, each in some])),
                "trainings": float(np.mean([each.trainings for _, each in some])),
                "accuracies": listed,
                "mean": float(np.mean(listed)),
                "std": float(np.std(listed, ddof=1)) if len(listed) > 1 else None,
                "beats_designed": sum(value > of_best for value in listed),
                "behind_effects": sum(effects[seed] > value for seed, value in reached.items()),
                "graphs": [json.loads(each.graph.to_json()) for _, each in some],
            }
        )
    named = {name: means[graph.to_json()] for name, graph in designed.items()}
    return {"best_designed": best, "designed": named, "methods": entries}


def _table(content: dict[str, Any]) -> Table:
    best = content["best_designed"]
    table = Table(
        title="Test accuracy (%) of what each search found, fresh seeds; the best designed graph, "
        f"by the test itself, is {best}: {100 * content['designed'][best]:.2f}"
    )
    table.add_column("method")
    titles = ("node-epochs", "trainings", "each search", "mean", "beats designed", "effects ahead")
    for title in titles:
        table.add_column(title, justify="right")
    for entry in content["methods"]:
        searches = len(entry["accuracies"])
        spread = "" if entry["std"] is None else f" ± {100 * entry['std']:.2f}"
        is_own = entry["method"] == "effects"
        table.add_row(
            f"{entry['method']}, {entry['times']:g} x",
            f"{entry['node_epochs']:.0f}",
            f"{entry['trainings']:.0f}",
            ", ".join(f"{100 * value:.2f}" for value in entry["accuracies"]),
            f"{100 * entry['mean']:.2f}{spread}",
            f"{entry['beats_designed']} of {searches}",
            "" if is_own else f"{entry['behind_effects']} of {searches}",
        )
    return table


if __name__ == "__main__":
    cli.run(main, interrupted="interrupted; the same command goes on")
