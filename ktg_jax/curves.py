"""Learning curves: losses and accuracy of every node against the epoch, as a figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ktg_jax.mpl import Axes, Figure, Line2D, MaxNLocator

Records = Sequence[Mapping[str, Any]]

_PEER_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7"),
    *("#E69F00", "#56B4E9", "#8B8B00"),
)
_PARTS: dict[str, dict[str, Any]] = {
    "train": {"linestyle": "--", "markerfacecolor": "white"},
    "val": {"linestyle": "-"},
}
_PANELS: dict[str, tuple[str, ...]] = {
    "training loss (sum over edges)": ("train_loss",),
    "validation loss (cross-entropy)": ("val_loss",),
    "accuracy (%)": ("train_accuracy", "val_accuracy"),
}
"""The panels of learning curves by the labels of their axes: the fields of records in each."""

_MOST_MARKERS = 20  # on a line; one epoch alone is seen only by its marker


def curves_figure(records: Records, title: str | None) -> Figure:
    """The figure, with a panel for each kind of number: the training loss is no cross-entropy.

    Args:
        records: at least one, as `draw_curves` takes them.
        title: text above the panels.
    """
    names = list(dict.fromkeys(node["name"] for record in records for node in record["nodes"]))
    panels = [
        (label, fields)
        for label, fields in _PANELS.items()
        if any(_points(records, name, field) for name in names for field in fields)
    ]
    panels = panels or list(_PANELS.items())[:1]
    height = max(3, 0.18 * (len(names) + 2))  # of the legend
    figure = Figure(figsize=(0.8 + 3.2 * len(panels), height), layout="constrained")
    markers: dict[str, Any] = {}
    axes = np.ravel(figure.subplots(1, len(panels)))
    for ax, (label, fields) in zip(axes, panels, strict=True):
        ax.set(xlabel="epoch", ylabel=label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        for field in fields:
            for line in _plot(ax, records, names, field):
                markers.setdefault(_part(field), line.get_marker())
    handles = [Line2D([], [], **_look(i), label=_short(name)) for i, name in enumerate(names)]
    for part, marker in markers.items():
        look = {"color": "#666666", "marker": marker, **_PARTS[part]}
        handles.append(Line2D([], [], **look, label={"val": "validation"}.get(part, part)))
    figure.legend(handles=handles, loc="outside right upper")
    if title:
        figure.suptitle(title)
    return figure


def _part(field: str) -> str:
    """The part of the data that a field of a record is about."""
    return field.partition("_")[0]


def _look(node: int) -> dict[str, Any]:
    """The target's line is broad and lies beneath: where others are the same they lie upon it."""
    is_target = node == 0
    colour = "#000000" if is_target else _PEER_COLOURS[(node - 1) % len(_PEER_COLOURS)]
    size = (
        {"linewidth": 2.8, "markersize": 6.5} if is_target else {"linewidth": 1.1, "markersize": 4}
    )
    return {"color": colour, **size}


def _points(records: Records, name: str, field: str) -> list[tuple[int, float]]:
    """Epochs and values of one metric of a node; no values where it is a frozen node's loss, 0."""
    found = [
        (record["epoch"], node[field])
        for record in records
        for node in record["nodes"]
        if node["name"] == name and node.get(field) is not None
    ]
    is_frozen = field == "train_loss" and not any(value for _, value in found)
    return [] if is_frozen else found


def _plot(ax: Axes, records: Records, names: Sequence[str], field: str) -> list[Line2D]:
    """Plots one metric of every node against the epoch; no line for a node without values."""
    scale = 100 if field.endswith("accuracy") else 1
    lines = []
    for i, name in enumerate(names):
        if points := _points(records, name, field):
            epochs, values = zip(*points, strict=True)
            scaled = [scale * value for value in values]
            look = _look(i) | _PARTS[_part(field)]
            (line,) = ax.plot(epochs, scaled, **look, gid=f"{field}-{i}")
            line.set_marker("o" if len(points) <= _MOST_MARKERS else "")
            lines.append(line)
    return lines


def _short(name: str) -> str:
    """A node's name, as far as the legend leaves room for the curves."""
    return name if len(name) <= 24 else f"{name[:11]}...{name[-10:]}"
