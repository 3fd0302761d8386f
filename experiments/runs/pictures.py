"""Pictures of a run. None of them costs a result: one that cannot be drawn costs a line."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

import ktg_jax as ktg

from . import cli
from .shapes import Record
from .workdir import Workdir

_CURVES, _GRAPHS = ("curves.png", "curves.svg"), ("graph.svg", "graph.png")


def drawn(console: Console, path: Path, draw: Callable[[], None]) -> bool:
    """Draws, or says why that failed, whatever it was; returns whether it did not fail.

    Args:
        console: where to say it.
        path: the path of the picture, or of the folder of pictures.
        draw: draws it.
    """
    try:
        draw()
    except Exception as error:
        cli.say(
            console, f"{path} is not drawn: {type(error).__name__}: {' '.join(str(error).split())}"
        )
        return False
    return True


def draw_curves(workdir: Workdir, records: list[Record], console: Console) -> bool:
    """Draws the curves of a run, finished or not."""

    def draw() -> None:
        from ktg_jax.draw import draw_curves  # matplotlib: not before the first step

        draw_curves(records, paths)

    paths = [workdir.path / name for name in _CURVES]
    return drawn(console, paths[0], draw)


def draw_result(
    workdir: Workdir, graph: ktg.Graph, records: list[Record], result: Record, console: Console
) -> None:
    """Draws the curves of a finished run, and its graph with the nodes' accuracies."""
    draw_curves(workdir, records, console)
    tested = result["target"]["test_accuracy"] is not None
    key = "test_accuracy" if tested else "val_accuracy"
    known = {node["name"]: node[key] for node in result["nodes"] if node[key] is not None}
    paths = [workdir.path / name for name in _GRAPHS]

    def draw() -> None:
        from ktg_jax.draw import draw_graph

        draw_graph(graph, paths, known)

    drawn(console, paths[0], draw)


def draw_missing(workdir: Workdir, result: Record, console: Console) -> None:
    """Draws the pictures of a finished run, unless all are there."""
    if not all((workdir.path / name).is_file() for name in (*_CURVES, *_GRAPHS)):
        graph, records = workdir.graph, workdir.records()
        draw_result(workdir, graph, records, result, console)
