"""The arms' curves: validation accuracy, and the distance of their kernels from the prior's."""

import math
from collections.abc import Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any

from ktg_jax.draw import save_figure, style
from ktg_jax.mpl import Axes, Figure, MaxNLocator, matplotlib

MOST_PLOTS, MOST_NAMES = 4, 16
"""Plots beside each other, and names of arms beneath each other at their right."""

LINES = ("solid", "dashed", "dotted", "dashdot")
"""When there are no more colours the lines change."""


def draw_arms(results: dict[str, Any], paths: Sequence[Path]) -> None:
    """Draws mean curves over seeds, a look an arm; distances only where arms have priors.

    They are drawn for the kernels that the priors of all these arms speak of.

    Args:
        results: as of `study.results_of`.
        paths: files to write, `.svg` or `.png`.
    """
    entries = results["entries"]
    of_arms = [entry["prior_kernels"] for entry in entries if entry["prior_kernels"]]
    kernels = [k for k in min(of_arms, key=len, default=[]) if all(k in of for of in of_arms)]
    plots, columns = 1 + len(kernels), math.ceil(len(entries) / MOST_NAMES)
    rows, across = math.ceil(plots / MOST_PLOTS), min(plots, MOST_PLOTS)
    with style():
        size = 3.2 * across + 1.2 * (columns - 1), 3 * rows
        figure = Figure(figsize=size, layout="constrained")
        accuracy, *others = figure.subplots(rows, across, squeeze=False).flat
        distances, unused = others[: len(kernels)], others[len(kernels) :]
        colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
        looks = cycle(product(LINES, colours))
        for (line, colour), entry in zip(looks, entries, strict=False):
            look = {"color": colour, "linestyle": line, "label": entry["name"]}
            if entry["val_accuracy_by_epoch"]:
                _plot(accuracy, [100 * a for a in entry["val_accuracy_by_epoch"]], look)
            if entry["prior_kernels"]:
                for kernel, ax in zip(kernels, distances, strict=True):
                    g = entry["prior_kernels"].index(kernel)
                    _plot(ax, [of_all[g] for of_all in entry["prior_distance_by_epoch"]], look)
        accuracy.set(ylabel="validation accuracy (%)")
        for kernel, ax in zip(kernels, distances, strict=True):
            ax.set(ylabel="distance from the prior", title=kernel.removesuffix(".kernel"))
        for ax in unused:
            ax.remove()
        handles = accuracy.get_lines()
        if handles:
            figure.legend(handles=handles, loc="outside right upper", ncols=columns)
        for path in paths:
            save_figure(figure, path)


def _plot(ax: Axes, values: Sequence[float], look: dict[str, Any]) -> None:
    ax.plot(range(1, len(values) + 1), values, linewidth=1.2, **look)
    ax.set(xlabel="epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
