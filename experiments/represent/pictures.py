"""A picture for each stage of a prior: kernels before and after, and what the penalty keeps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ktg_jax.draw import save_figure, style
from ktg_jax.mpl import Axes, Figure

from .measures import QUANTILES, share_kept, singular_values

LOOKS: dict[str, dict[str, Any]] = {
    "teacher": {"color": "#D55E00", "linestyle": "--"},
    "prior": {"color": "#000000", "linestyle": "-"},
    "student before": {"color": "#56B4E9", "linestyle": ":"},
    "student after": {"color": "#0072B2", "linestyle": "-"},
}
"""A line for each kind of kernel, in colours of Okabe and Ito."""


def draw_stage(
    path: Path,
    title: str,
    kernels: Mapping[str, np.ndarray],
    gradients: Mapping[str, np.ndarray],
    quantile: float | None,
) -> None:
    """Draws the singular values of a stage's kernels and the share that the penalty keeps.

    Args:
        path: file to write, `.svg` or `.png`.
        title: text above the picture.
        kernels: float `[h, w, in, out]` by what they are, one of `LOOKS`.
        gradients: the gradients of the prior's distance, by the kernel that they are taken at.
        quantile: the quantile of the sparse recoding penalty; None: it is not marked.
    """
    with style():
        figure = Figure(figsize=(7, 2.8), layout="constrained")
        values, kept = figure.subplots(1, 2)
        _draw_values(values, kernels)
        _draw_kept(kept, gradients, quantile)
        figure.suptitle(title)
        save_figure(figure, path)


def _draw_values(ax: Axes, kernels: Mapping[str, np.ndarray]) -> None:
    for name, kernel in kernels.items():
        values = singular_values(kernel)
        ax.plot(np.arange(1, len(values) + 1) / len(values), values, label=name, **LOOKS[name])
    ax.set(xlabel="rank / full rank", ylabel="singular value / largest", ylim=(0, 1.05))
    ax.legend()


def _draw_kept(ax: Axes, gradients: Mapping[str, np.ndarray], quantile: float | None) -> None:
    ax.plot(QUANTILES, [100 * (1 - q) for q in QUANTILES], color="#999999", label="entries")
    for name, gradient in gradients.items():
        shares = [share_kept(gradient, q) for q in QUANTILES]
        if None not in shares:
            percents = [100 * share for share in shares if share is not None]
            ax.plot(QUANTILES, percents, label=f"squared norm, {name}", **LOOKS[name])
    if quantile is not None:
        ax.axvline(quantile, color="#CC79A7", linewidth=1.0)
    ax.set(xlabel="quantile of the penalty", ylabel="kept of the prior's gradient (%)")
    ax.set(xlim=(0, 1), ylim=(0, 105))
    ax.legend()


def draw_accuracies(
    path: Path, curves: Mapping[str, Sequence[tuple[int, float]]], fit_steps: int
) -> None:
    """Draws validation accuracies by steps, those of the fit counted.

    Args:
        path: file to write, `.svg` or `.png`.
        curves: points (steps, accuracy in 0..1) by what learns, at most two.
        fit_steps: how long the fit took; 0: there was none.
    """
    with style():
        figure = Figure(figsize=(5, 3), layout="constrained")
        ax = figure.subplots()
        for colour, (name, points) in zip(("#0072B2", "#666666"), curves.items(), strict=False):
            steps, accuracies = zip(*points, strict=True)
            ax.plot(steps, [100 * a for a in accuracies], color=colour, marker=".", label=name)
        if fit_steps:
            ax.axvspan(0, fit_steps, color="#EEEEEE", label="fit")
        ax.set(xlabel="steps, the fit's included", ylabel="validation accuracy (%)", xlim=(0, None))
        ax.legend(loc="lower right")
        save_figure(figure, path)
