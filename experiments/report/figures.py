"""The report's figures, each as the text of an SVG file."""

import io
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import ktg_jax as ktg
from ktg_jax.draw import GATE_COLOURS, draw_graph, style
from ktg_jax.mpl import Axes, Figure, Line2D, LineCollection, MaxNLocator

from ..search.records import StudyRecord, TrialRecord
from .measures import GateCounts, best_baselines, compute_curve

_WIDTH = 9.0  # inches
_MOST_POINTS = 100  # of a curve: more cannot be told apart in so wide a figure
_MANY = 50  # curves of one state: more of them are drawn fainter
_BEST: dict[str, Any] = {"color": "#000000", "linewidth": 2.0}
_STATE_LOOKS: dict[str, dict[str, Any]] = {
    "pruned": {"color": "#AEB6C2", "linewidth": 0.7},
    "running": {"color": "#56B4E9", "linewidth": 0.9},
    "complete": {"color": "#6F7F95", "linewidth": 0.9},
    "failed": {"color": "#D55E00", "linewidth": 1.1},
}
_END_MARKERS = {"pruned": "x", "failed": "X"}
_BASELINE_COLOUR = "#7B4FA3"
_BASELINE_LOOKS: dict[str, tuple[str, Any]] = {  # its marker and its line
    "independent": ("^", ":"),
    "control": ("v", (0, (1, 4))),
    "mutual": ("s", "--"),
    "distillation": ("D", "-."),
}
_DARK_TEXT_ON = ("cutoff", "linear", "negative_linear")
_LEAST_SHARE = 0.06  # of a bar, to have its number written into it


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        svg: content of an SVG file.
        tooltips: by the id of a group in it, a text for each of its paths.
    """

    svg: str
    tooltips: Mapping[str, Sequence[str]] = field(default_factory=dict)


def graph_picture(graph: ktg.Graph, accuracies: Mapping[str, float]) -> Picture:
    """Draws a graph, with accuracies in [0, 1] of the nodes of these names."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "graph.svg")
        draw_graph(graph, [path], accuracies)
        return Picture(path.read_text(encoding="utf-8"))


def curves_picture(study: StudyRecord) -> Picture | None:
    """Draws the learning curve of every trained trial; None: there is none.

    Interrupted ones are left out: a later trial has the whole curve.

    The id of the group of lines of each state is `curves-<state>`.
    """
    counted = [t for t in study.trials if t.duplicate_of is None and not t.is_interrupted]
    trials = [trial for trial in counted if points(trial)]
    if not trials:
        return None
    tooltips: dict[str, list[str]] = {}
    handles: list[Line2D] = []
    with style():
        figure = Figure(figsize=(_WIDTH, 4.2), layout="constrained")
        ax = figure.add_subplot()
        for state, look in _STATE_LOOKS.items():
            same = [trial for trial in trials if trial.state == state]
            if same:
                _draw_trials(ax, same, look, f"curves-{state}")
                tooltips[f"curves-{state}"] = [_described(trial) for trial in same]
                marker = _END_MARKERS.get(state, "")
                handles.append(Line2D([], [], **look, marker=marker, label=state))
        for kind, trial in best_baselines(study.trials).items():
            if points(trial):
                handles.append(_highlight(ax, trial, _baseline_line(kind)))
        for trial in (standing.trial for standing in study.best(1)):
            if points(trial):
                handles.append(_highlight(ax, trial, _BEST, f"best: trial {trial.number}"))
        ax.set(xlabel="epoch", ylabel="validation accuracy of the target (%)")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.margins(x=0.02)
        figure.legend(handles=handles, loc="outside right upper")
        return Picture(svg_of(figure), tooltips)


def points(trial: TrialRecord) -> list[tuple[int, float]]:
    """Epochs and accuracies in per cent of a trial's curve, at most 100, its last among them."""
    known = [(epoch, 100 * trial.curve[epoch]) for epoch in sorted(trial.curve)]
    known = [point for point in known if math.isfinite(point[1])]
    if len(known) <= _MOST_POINTS:
        return known
    kept = np.linspace(0, len(known) - 1, _MOST_POINTS).round().astype(int)
    return [known[i] for i in kept]


def gates_picture(best: GateCounts, drawn: GateCounts) -> Picture:
    """Draws the share of each gate on each kind of edge, for the best graphs and for all.

    The id of a bar's part is `share-<kind's place>-<best or all>-<gate>`.
    """
    tooltips: dict[str, list[str]] = {}
    with style():
        figure = Figure(figsize=(_WIDTH, 0.55 + 0.62 * len(drawn)), layout="constrained")
        ax = figure.add_subplot()
        ticks: dict[float, str] = {}
        for i, kind in enumerate(drawn):
            for name, counts, y in (("best", best, 2.6 * i), ("all", drawn, 2.6 * i + 1)):
                if kind in counts:
                    tooltips |= _draw_shares(ax, counts[kind], y, f"share-{i}-{name}", kind)
                ticks[y] = "best tenth" if name == "best" else "all drawn"
            ax.text(-0.105, 2.6 * i + 0.5, kind, ha="right", va="center", fontweight="bold")
        ax.set_yticks(list(ticks), list(ticks.values()))
        ax.set(xlim=(0, 1), ylim=(2.6 * len(drawn) - 0.9, -0.6))
        ax.tick_params(length=0)
        ax.set_xticks([])
        ax.spines[:].set_visible(False)
        ax.grid(visible=False)
        occurring = {gate for counts in drawn.values() for gate in counts}
        handles = [
            Line2D([], [], color=colour, linewidth=6, label=gate.replace("_", " "))
            for gate, colour in GATE_COLOURS.items()
            if gate in occurring
        ]
        figure.legend(handles=handles, ncols=len(handles), loc="outside lower center")
        return Picture(svg_of(figure), tooltips)


def compute_picture(study: StudyRecord) -> Picture | None:
    """Draws the best value so far against compute spent; None: no trial is complete."""
    curve = [point for point in compute_curve(study.trials) if point.best is not None]
    if not curve:
        return None
    spent = [point.node_epochs for point in curve]
    best = [100 * (point.best or 0.0) for point in curve]
    with style():
        figure = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
        ax = figure.add_subplot()
        ax.step(spent, best, where="post", **_BEST, label="best so far", gid="best-so-far")
        ax.lines[-1].set_zorder(3)  # above the baselines' lines, below their marks
        at = {point.trial.number: point.node_epochs for point in curve}
        for kind, trial in best_baselines(study.trials).items():
            line, value = _baseline_line(kind), 100 * (trial.value or 0.0)
            ax.plot([at[trial.number], spent[-1]], [value] * 2, **line)
            mark = {**line, "marker": _BASELINE_LOOKS[kind][0], "markersize": 6, "zorder": 4}
            ax.plot(at[trial.number], value, **mark, label=kind, gid=f"baseline-{kind}")
        if len(curve) == 1:
            ax.plot(spent, best, "o", color="black")
        ax.set(xlabel="node-epochs spent", ylabel="best validation accuracy (%)")
        figure.legend(loc="outside right upper")
        return Picture(svg_of(figure))


def svg_of(figure: Figure) -> str:
    """The text of a figure's SVG file, the same for the same figure."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _draw_trials(
    ax: Axes, trials: Sequence[TrialRecord], look: Mapping[str, Any], gid: str
) -> None:
    """Draws the curves of trials of one state, and where they ended early."""
    lines = LineCollection([points(trial) for trial in trials], **look)
    lines.set(gid=gid, alpha=float(np.clip(_MANY / len(trials), 0.2, 1)))
    ax.add_collection(lines)
    marker = _END_MARKERS.get(trials[0].state)
    # A single epoch is no line: only a marker shows it.
    ends = [points(t)[-1] for t in trials if marker or len(t.curve) == 1]
    if ends:
        ax.plot(*zip(*ends, strict=True), marker or ".", color=look["color"], linestyle="none")


def _highlight(
    ax: Axes, trial: TrialRecord, look: Mapping[str, Any], label: str | None = None
) -> Line2D:
    (line,) = ax.plot(
        *zip(*points(trial), strict=True),
        **look,
        marker="o" if len(trial.curve) == 1 else "",
        label=label or f"{trial.baseline}: trial {trial.number}",
        gid=f"trial-{trial.number}",
    )
    return line


def _baseline_line(kind: str) -> dict[str, Any]:
    line = _BASELINE_LOOKS[kind][1]
    return {"color": _BASELINE_COLOUR, "linewidth": 1.3, "linestyle": line}


def _described(trial: TrialRecord) -> str:
    epoch, accuracy = points(trial)[-1]
    name = f", {trial.baseline}" if trial.baseline else ""
    return f"trial {trial.number}{name}: {trial.state}, {accuracy:.2f} % after epoch {epoch}"


def _draw_shares(
    ax: Axes, counts: Mapping[str, int], y: float, gid: str, kind: str
) -> dict[str, list[str]]:
    """Draws one bar, its parts in the gates' colours; returns the parts' tooltips by their ids."""
    total, left = sum(counts.values()), 0.0
    tooltips = {}
    for gate, colour in GATE_COLOURS.items():
        share = counts.get(gate, 0) / total
        if share == 0:
            continue
        (bar,) = ax.barh(y, share, left=left, height=0.9, color=colour, edgecolor="white")
        bar.set_gid(f"{gid}-{gate}")
        tooltips[f"{gid}-{gate}"] = [
            f"{kind}: {gate.replace('_', ' ')} on {counts[gate]} of {total} edges"
        ]
        if share >= _LEAST_SHARE:
            text = ax.text(left + share / 2, y, f"{100 * share:.0f} %", ha="center", va="center")
            text.set_color("black" if gate in _DARK_TEXT_ON else "white")
        left += share
    return tooltips
