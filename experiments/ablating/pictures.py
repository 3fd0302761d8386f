"""The arms' curves: validation accuracy, and the distance of each stage from its prior."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ktg_jax.draw import save_figure, style


def draw_arms(results: dict[str, Any], paths: Sequence[Path]) -> None:
    """Draws mean curves over seeds, a colour an arm; distances only where arms have priors.

    Args:
        results: as of `study.results_of`.
        paths: files to write, `.svg` or `.png`.
    """
    entries = results["entries"]
    stages = max(
        (len(e["prior_distance_by_epoch"][0]) for e in entries if _has_prior(e)), default=0
    )
    with style():
        figure = Figure(figsize=(3.2 * (1 + stages), 3), layout="constrained")
        accuracy, *distances = figure.subplots(1, 1 + stages, squeeze=False)[0]
        colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
        for i, entry in enumerate(entries):
            look = {"color": colours[i % len(colours)], "label": entry["name"]}
            if entry["val_accuracy_by_epoch"]:
                _plot(accuracy, [100 * a for a in entry["val_accuracy_by_epoch"]], look)
            if _has_prior(entry):
                for g, ax in enumerate(distances):
                    _plot(ax, [by_stage[g] for by_stage in entry["prior_distance_by_epoch"]], look)
        accuracy.set(ylabel="validation accuracy (%)")
        for g, ax in enumerate(distances):
            ax.set(ylabel=f"distance from the prior, stage {g + 1}")
        handles = accuracy.get_lines()
        if handles:
            figure.legend(handles=handles, loc="outside right upper")
        for path in paths:
            save_figure(figure, path)


def _plot(ax: Axes, values: Sequence[float], look: dict[str, Any]) -> None:
    ax.plot(range(1, len(values) + 1), values, linewidth=1.2, **look)
    ax.set(xlabel="epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _has_prior(entry: dict[str, Any]) -> bool:
    return entry["prior_distance_by_epoch"] is not None
