"""Times the search, and compares its methods: `python -m benchmarks.search --help`.

Trials per hour: a plain search, which compiles and trains every graph whole, beside ours with one
worker and with two, on the same drawn graphs, data and epochs. Quality: the best validated accuracy
by the node-epochs spent, of random + asha, random + patient and tpe + asha.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.console import Console

import ktg_jax as ktg
from benchmarks import report
from benchmarks.machine import cores, machine
from benchmarks.task import Figures
from experiments.runs import cli
from experiments.runs.assemble import load
from experiments.runs.command_line import Command, parse
from experiments.runs.console import Table
from experiments.runs.options import at_least, import_modules
from experiments.runs.pictures import drawn
from experiments.runs.process import prepare
from experiments.runs.texts import mean_and_std
from experiments.search import config as search_config
from experiments.search.config import SearchConfig
from ktg_jax.errors import InputError

Part = Literal["throughput", "quality"]

BUDGETS = (50.0, 100.0, 200.0, 400.0)
QUICK_BUDGETS = (50.0, 100.0)
EXAMPLES = """Examples:
  python -m benchmarks.search
  python -m benchmarks.search --quick --json search.json
  python -m benchmarks.search --parts throughput --nodes 3 --trials 20 --rounds 3 --warm
  python -m benchmarks.search --parts quality --seeds 0 1 2 3 4 --picture quality.svg"""

_SIDES = {
    "plain": "plain, each graph compiled whole",
    "one_worker": "ours, one worker",
    "two_workers": "ours, two workers",
    "one_worker_warm": "ours, one worker, compiled before",
    "two_workers_warm": "ours, two workers, compiled before",
}


@dataclass(frozen=True)
class SearchOptions(report.Output):
    """Time searches beside a plain one, and compare methods by the best graph for their compute."""

    command: ClassVar = Command("benchmarks.search", examples=EXAMPLES)

    parts: tuple[Part, ...] = ("throughput", "quality")
    """What to measure."""
    target: str = "cnn"
    """Model of the target, node 0."""
    candidates: tuple[str, ...] = ("cnn", "resnet8")
    """Models that each other node is chosen from."""
    data: str = "digits"
    """As of experiments.search."""
    data_dir: str | None = None
    """Where cifar10, cifar100 or tiny_imagenet are."""
    train_limit: int | None = None
    """Use only so many training images, validation images included."""
    image_size: int | None = None
    """Resize images to so many pixels a side."""
    imports: tuple[str, ...] = ()
    """Python modules to import first, such as those that call ktg_jax.register_model."""

    nodes: tuple[int, ...] = (3, 5)
    """Throughput: nodes of the graphs, one number after the other."""
    trials: int | None = None
    """Throughput: of each search. Else 6; with --quick 4."""
    epochs: int = 4
    """Throughput: of each trial."""
    rounds: int | None = None
    """Throughput: searches of each side. Else 2; with --quick 1."""
    warm: bool = False
    """Throughput: make each of our searches again, with the programs that it compiled."""

    quality_nodes: int = 3
    """Quality: nodes of the graphs."""
    quality_epochs: int = 8
    """Quality: of a trial that is not pruned."""
    seeds: tuple[int, ...] = ()
    """Quality: of the samplers. Else 0 1 2; with --quick 0."""
    budgets: tuple[float, ...] = ()
    """Quality: node-epochs. Else 50 100 200 400; with --quick 50 100."""
    quality_val_fraction: float = 0.5
    """Quality: share of the images held out; many, so that good graphs can be told apart."""
    picture: str | None = None
    """Quality: file to draw the curves into, .svg or .png."""


def main() -> None:
    """Measures what the command line asks for."""
    options = parse(SearchOptions)
    prepare()
    measure(options, report.console())


def measure(options: SearchOptions, console: Console) -> dict[str, Any]:
    """Measures all that is asked for, writes and prints the figures, and returns them.

    Raises:
        InputError: bad input, found before anything is computed.
        RunError: a search failed, or the sides of a comparison did not train the same graphs.
    """
    check(options)
    ktg.cpu_convolution()  # built now where it has to be, and not while something is measured
    content: dict[str, Any] = {"machine": machine(), "throughput": [], "quality": None}
    if "throughput" in options.parts:
        _measure_throughput(options, console, content)
    if "quality" in options.parts:
        _measure_quality(options, console, content)
    return content


def check(options: SearchOptions) -> None:
    """Raises InputError for the first option that is out of range."""
    report.check_output(options)
    at_least(options, 1, "trials", "epochs", "rounds")
    import_modules(options.imports)
    for nodes in options.nodes:
        search_config.check(search_of(options, nodes))
    config = _quality_search(options)
    search_config.check(config)
    for budget in options.budgets:
        if budget <= config.epochs * config.nodes:
            allowed = f"above {config.epochs * config.nodes}, those of one whole trial"
            raise InputError("budgets", budget, allowed)
    for seed in options.seeds:
        if seed < 0:
            raise InputError("seeds", seed, "at least 0")
    if options.picture is not None and Path(options.picture).suffix not in (".svg", ".png"):
        raise InputError("picture", options.picture, "a file name that ends in .svg or .png")


def search_of(options: SearchOptions, nodes: int) -> SearchConfig:
    """The search over graphs of so many nodes."""
    return parse(SearchConfig, _arguments(options, nodes))


def _quality_search(options: SearchOptions) -> SearchConfig:
    return replace(
        search_of(options, options.quality_nodes),
        epochs=options.quality_epochs,
        val_fraction=options.quality_val_fraction,
    )


def _arguments(options: SearchOptions, nodes: int) -> list[str]:
    """The options of `experiments.search`."""
    trials = options.trials or (4 if options.quick else 6)
    words = ["--nodes", str(nodes), "--target", options.target]
    words += ["--candidates", *options.candidates, "--data", options.data]
    words += ["--trials", str(trials), "--epochs", str(options.epochs)]
    for name in ("data_dir", "train_limit", "image_size"):
        if getattr(options, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return [*words, "--imports", *options.imports] if options.imports else words


def _measure_throughput(options: SearchOptions, console: Console, content: dict[str, Any]) -> None:
    from benchmarks.search_throughput import throughput

    rounds = options.rounds or (1 if options.quick else 2)
    with report.progress(console, total=len(options.nodes)) as begin:
        for nodes in options.nodes:
            begin(f"trials per hour, {nodes} nodes")
            config = search_of(options, nodes)
            load(config, with_test=False)  # prepared now, where that has to be
            about = {
                "nodes": nodes,
                "target": config.target,
                "candidates": list(config.candidates),
                "data": config.data,
                "trials": config.trials,
                "epochs": config.epochs,
                "cores": cores(),
                "rounds": rounds,
            }
            entries = throughput(_arguments(options, nodes), rounds, options.warm)
            content["throughput"] += [about | entry for entry in entries]
            report.save(options, content)
    console.print(_throughput_table(content["throughput"]))


def _measure_quality(options: SearchOptions, console: Console, content: dict[str, Any]) -> None:
    from benchmarks.search_quality import METHODS, draw_quality, quality

    seeds = options.seeds or ((0,) if options.quick else (0, 1, 2))
    budgets = sorted(options.budgets or (QUICK_BUDGETS if options.quick else BUDGETS))
    with report.progress(console, total=len(seeds) * len(METHODS)) as begin:
        curves, content["quality"] = quality(_quality_search(options), seeds, budgets, begin)
    report.save(options, content)
    if options.picture is not None:
        path = Path(options.picture)
        drawn(console, path, lambda: draw_quality(curves, path))
    console.print(_quality_table(content["quality"]))


def _throughput_table(cases: Sequence[Figures]) -> Table:
    table = Table(title="Trials per hour (median and quartiles) and their ratio")
    table.add_column("nodes", justify="right")
    table.add_column("search")
    for title in ("trials per hour", "ratio", "s", "command, s", "programs", "mean accuracy"):
        table.add_column(title, justify="right")
    for case in cases:
        low, high = case["trials_per_hour_quartiles"]
        is_first = case["side"] == case["compared_with"]
        table.add_row(
            str(case["nodes"]),
            _SIDES[case["side"]],
            f"{case['trials_per_hour']:.0f} ({low:.0f}-{high:.0f})",
            "" if is_first else f"{case['ratio']:.2f} x {case['compared_with']}",
            f"{case['seconds']:.1f}",
            f"{case['command_s']:.1f}",
            f"{case['programs_compiled']:.0f}",
            f"{case['mean_accuracy']:.3f}",
        )
    return table


def _quality_table(found: Figures) -> Table:
    seeds = len(found["seeds"])
    table = Table(
        title=f"Best validation accuracy (%) by node-epochs (mean and standard deviation, {seeds} "
        f"seeds); {found['trained_graphs']} graphs trained"
    )
    table.add_column("method")
    for at in found["methods"][0]["budgets"]:
        table.add_column(f"{at['node_epochs']:g}", justify="right")
    for title in ("trials", "pruned", "duplicates"):
        table.add_column(title, justify="right")
    for entry in found["methods"]:
        counts = (f"{entry[name]:.0f}" for name in ("trials", "pruned", "duplicates"))
        table.add_row(entry["method"], *map(mean_and_std, entry["budgets"]), *counts)
    return table


if __name__ == "__main__":
    cli.run(
        main, interrupted="interrupted; finished cases are in the file of --json, if one was given"
    )
