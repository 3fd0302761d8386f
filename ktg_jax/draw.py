"""Pictures of a knowledge transfer graph and of its learning curves (SVG and PNG).

Only matplotlib's object-oriented interface is used: no display, no global figure. The same input
gives the same bytes, whatever style the user's own matplotlib settings ask for.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ktg_jax.curves import Records, curves_figure
from ktg_jax.errors import InputError
from ktg_jax.graph.edge import Edge
from ktg_jax.graph.graph import Graph
from ktg_jax.io.files import atomic_path
from ktg_jax.mpl import (
    Axes,
    Circle,
    Curve,
    FancyArrowPatch,
    Figure,
    FontProperties,
    Line2D,
    PathPatch,
    Rectangle,
    TextPath,
    matplotlib,
)

GATE_COLOURS: dict[str, str] = {
    "through": "#0072B2",
    "cutoff": "#BBBBBB",
    "linear": "#E69F00",
    "correct": "#009E73",
    "negative_linear": "#CC79A7",
}
"""A colour for each gate, from the palette of Okabe and Ito (safe for colour-blind readers)."""

_OTHER_COLOUR = "#7F4F24"  # of all gates that somebody registered

FilePath = str | os.PathLike[str]

_MOST_DOTS = 4000  # of a PNG's width and height
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "ktg_jax",  # the ids in an SVG are random without it
    "font.size": 8,
    "axes.titlesize": 9,
    "figure.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "savefig.bbox": "tight",
    "savefig.dpi": 300,
}

# Lengths of the graph's picture: 1 unit of its axes is 1 inch on paper.
_NODE_RADIUS = 0.5
_TARGET_RADIUS = 0.55  # of its outer ring
_NODE_DISTANCE = 1.95  # between the centres of neighbours
_CLEARANCE = 0.75  # from a node's centre to the straight line between its two neighbours
_FARTHEST = 10.0  # from the middle, for that clearance's sake
_LABEL_SIDE = 0.36
_LABEL_EDGE = 0.36
_POINT = 1 / 72


def draw_graph(
    graph: Graph,
    paths: Sequence[FilePath],
    accuracies: Mapping[str, float] | None = None,
    title: str | None = None,
) -> None:
    """Draws a graph as the paper's figures do: nodes, label edges and transfer edges.

    An edge has the colour of its gate, and beside it what it carries where that is not the papers'
    divergence or cross-entropy; cutoff edges are absent. In an SVG each edge is a group with the id
    `edge-<sender>-<receiver>` (node indices), or `edge-label-<receiver>`.

    Args:
        graph: the graph; node 0, the target, has a double ring, frozen nodes a dashed outline.
        paths: files to write, `.svg` or `.png` each.
        accuracies: accuracy in [0, 1] by node name, shown in per cent; nodes may be left out.
        title: text above the picture.

    Raises:
        InputError: another suffix, an accuracy outside [0, 1], or one of an unknown node.
    """
    files = [_checked_path("paths", path) for path in paths]
    _check_accuracies(graph, accuracies or {})
    with style():
        figure = _graph_figure(graph, accuracies or {}, title)
        for file in files:
            save_figure(figure, file)


def draw_curves(
    records: Records, path: FilePath | Sequence[FilePath], title: str | None = None
) -> None:
    """Draws losses and accuracy of every node against the epoch.

    Panels of their own have the training loss, which is the sum over a node's edges, and the
    validation loss, which is the cross-entropy: the two cannot be compared.

    Args:
        records: one mapping an epoch, `{"epoch": 1, "nodes": [{"name": ..., "train_loss": ...,
            "train_accuracy": ..., "val_loss": ..., "val_accuracy": ...}, ...]}`, the target first
            among the nodes; accuracies in [0, 1]. A value that is None or missing is left out, and
            so is the training loss of a node that never has any, a frozen one.
        path: file to write, `.svg` or `.png`, or several of them.
        title: text above the picture.

    Raises:
        InputError: another suffix, or no record.
    """
    paths = [path] if isinstance(path, str | os.PathLike) else path
    files = [_checked_path("path", one) for one in paths]
    if not records:
        raise InputError("records", records, "at least one record (one an epoch)")
    with style():
        figure = curves_figure(records, title)
        for file in files:
            save_figure(figure, file)


def _checked_path(field: str, path: FilePath) -> Path:
    if Path(path).suffix.lower() not in (".svg", ".png"):
        raise InputError(field, str(path), "file names that end in .svg or .png")
    return Path(path)


def _check_accuracies(graph: Graph, accuracies: Mapping[str, float]) -> None:
    names = [str(node.name) for node in graph.nodes]
    for name, accuracy in accuracies.items():
        if name not in names:
            raise InputError("accuracies", name, f"names of nodes: {', '.join(names)}")
        if not 0 <= accuracy <= 1:
            raise InputError(f"accuracies[{name!r}]", accuracy, "a number in [0, 1]")


@contextmanager
def style() -> Iterator[None]:
    """The pictures' look, in place of the user's matplotlib settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure, as SVG or PNG by the path's suffix; to be called within `style`."""
    kind = path.suffix[1:].lower()
    undated = {"Date": None} if kind == "svg" else None
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind, metadata=undated, dpi=_dpi(figure))


def _dpi(figure: Figure) -> float:
    """Dots an inch: those of the style, unless the picture would get too large."""
    largest = float(max(figure.get_size_inches()))
    return min(matplotlib.rcParams["savefig.dpi"], _MOST_DOTS / largest)


def _graph_figure(graph: Graph, accuracies: Mapping[str, float], title: str | None) -> Figure:
    figure = Figure()
    ax = figure.add_axes((0, 0, 1, 1), aspect="equal")
    ax.set_axis_off()
    directions, ring = _layout(len(graph.nodes))
    centres = ring * directions
    for receiver, row in enumerate(graph.edges):
        for sender, edge in enumerate(row):
            if edge.gate == "cutoff":
                continue
            if sender == receiver:
                _draw_label(ax, receiver, centres[receiver], directions[receiver], edge)
            else:
                _draw_transfer(ax, sender, receiver, centres, edge)
    for i, node in enumerate(graph.nodes):
        name = str(node.name)
        accuracy = f"{100 * accuracies[name]:.2f} %" if name in accuracies else ""
        role = "target" if i == 0 else "frozen" if i in graph.frozen else ""
        _draw_circles(ax, i, centres[i], is_frozen=i in graph.frozen)
        _write_in_circle(ax, centres[i], [role, name, node.model, accuracy])
    bounds = ax.dataLim.padded(0.05)  # of circles and squares: they enclose the arrows
    figure.set_size_inches(bounds.width, bounds.height)
    ax.set(xlim=bounds.intervalx, ylim=bounds.intervaly)
    _add_legend(ax, graph)
    if title:
        ax.set_title(title)
    return figure


def _layout(num_nodes: int) -> tuple[np.ndarray, float]:
    """Unit directions of the nodes from the centre, `[N, 2]`, and the radius of their ring."""
    first = math.pi if num_nodes <= 2 else math.pi / 2  # a row, or the target on top
    angles = first - 2 * math.pi * np.arange(num_nodes) / num_nodes
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if num_nodes == 1:
        return directions, 0.0
    ring = _NODE_DISTANCE / (2 * math.sin(math.pi / num_nodes))
    if num_nodes > 3:  # edges between a node's two neighbours must not cross it
        clear = _CLEARANCE / (1 - math.cos(2 * math.pi / num_nodes))
        ring = max(ring, min(clear, _FARTHEST))
    return directions, ring


def _rim(node: int) -> float:
    return _TARGET_RADIUS if node == 0 else _NODE_RADIUS


def _draw_circles(ax: Axes, node: int, centre: np.ndarray, is_frozen: bool) -> None:
    """The outline of a node; a second ring around the target."""
    for radius in sorted({_rim(node), _NODE_RADIUS}, reverse=True):
        circle = Circle(tuple(centre), radius, linewidth=1.1, zorder=3)
        circle.set(facecolor="white", edgecolor="black")
        if is_frozen:
            circle.set(facecolor="#F2F2F2", edgecolor="#777777", linestyle=(0, (4, 2)))
        ax.add_patch(circle)
    circle.set_gid(f"node-{node}")


def _write_in_circle(ax: Axes, centre: np.ndarray, lines: Sequence[str]) -> None:
    """Writes role, name, model and accuracy in a node, each line made small enough to fit."""
    fonts = (
        FontProperties(size=6.5, style="italic"),
        FontProperties(size=8.5, weight="bold"),
        FontProperties(size=7.5),
        FontProperties(size=7.5),
    )
    written = [(line, font) for line, font in zip(lines, fonts, strict=True) if line]
    heights = [1.25 * font.get_size_in_points() * _POINT for _, font in written]
    top = sum(heights) / 2
    for (line, font), height in zip(written, heights, strict=True):
        farthest = max(abs(top), abs(top - height)) - height / 6  # from the node's centre
        room = 2 * math.sqrt((_NODE_RADIUS - 0.04) ** 2 - farthest**2)
        width = TextPath((0, 0), line, prop=font).get_extents().width * _POINT
        font.set_size(font.get_size_in_points() * min(1, room / width))
        text = ax.text(centre[0], centre[1] + top - height / 2, line, fontproperties=font)
        text.set(horizontalalignment="center", verticalalignment="center_baseline", zorder=4)
        text.set_parse_math(False)
        top -= height


def _draw_label(
    ax: Axes, receiver: int, centre: np.ndarray, direction: np.ndarray, edge: Edge
) -> None:
    """A square with the word "label" outside the ring of nodes, and its arrow to the node."""
    start = centre + (_NODE_RADIUS + _LABEL_EDGE) * direction
    middle = start + _LABEL_SIDE / 2 / np.abs(direction).max() * direction
    square = Rectangle(
        tuple(middle - _LABEL_SIDE / 2), _LABEL_SIDE, _LABEL_SIDE, gid=f"label-{receiver}"
    )
    square.set(facecolor="#F2F2F2", edgecolor="black", linewidth=0.8, zorder=3)
    ax.add_patch(square)
    text = ax.text(middle[0], middle[1], "label", fontsize=7, zorder=4)
    text.set(horizontalalignment="center", verticalalignment="center_baseline")
    end = centre + _rim(receiver) * direction
    _draw_arrow(ax, Curve([start, end]), edge.gate, f"edge-label-{receiver}")
    outwards = math.copysign(_LABEL_SIDE / 2 + 0.08, direction[1])
    _write_beside(ax, middle + np.array([0, outwards]), edge)


def _draw_transfer(ax: Axes, sender: int, receiver: int, centres: np.ndarray, edge: Edge) -> None:
    """A curve that leaves and meets the circles at right angles, to the left of its way.

    The edge in the other direction lies on the other side of the straight line between the nodes.
    """
    between = centres[receiver] - centres[sender]
    distance = float(np.hypot(*between))
    along = between / distance
    left = np.array([-along[1], along[0]])
    # The straight lines to the other nodes are 180 / N degrees apart: each pair takes half of it.
    bend = math.radians(min(45 / len(centres), 12))
    aside = math.sin(bend) * left
    start = centres[sender] + _rim(sender) * (math.cos(bend) * along + aside)
    end = centres[receiver] + _rim(receiver) * (aside - math.cos(bend) * along)
    control = centres[sender] + between / 2 + distance / 2 * math.tan(bend) * left
    curve = Curve([start, control, end], [Curve.MOVETO, Curve.CURVE3, Curve.CURVE3])
    _draw_arrow(ax, curve, edge.gate, f"edge-{sender}-{receiver}")
    _write_beside(ax, (start + 2 * control + end) / 4, edge)


def _write_beside(ax: Axes, place: np.ndarray, edge: Edge) -> None:
    """Writes there what the edge carries, where its gate does not say all."""
    if edge.says:
        text = ax.text(place[0], place[1], edge.says, fontsize=6, zorder=5)
        text.set(horizontalalignment="center", verticalalignment="center_baseline")
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85})
        text.set_parse_math(False)


def _draw_arrow(ax: Axes, curve: Curve, gate: str, gid: str) -> None:
    halo = PathPatch(curve, fill=False, edgecolor="white", linewidth=2.8, zorder=2)
    ax.add_artist(halo)  # where two lines cross, it shows which is which
    arrow = FancyArrowPatch(
        path=curve,
        arrowstyle="-|>,head_length=0.5,head_width=0.25",
        mutation_scale=10,
        linewidth=1.2,
        color=_colours([gate])[gate],
        zorder=2,
        gid=gid,
    )
    ax.add_artist(arrow)


def _colours(gates: Iterable[str]) -> dict[str, str]:
    """The colours of these gates, the built-in ones first."""
    given = set(gates)
    others = dict.fromkeys(sorted(given - set(GATE_COLOURS)), _OTHER_COLOUR)
    return {gate: colour for gate, colour in (GATE_COLOURS | others).items() if gate in given}


def _add_legend(ax: Axes, graph: Graph) -> None:
    """Names the gates that occur, below the graph."""
    occurring = [gate for row in graph.gates for gate in row if gate != "cutoff"]
    handles = [
        Line2D([], [], color=colour, linewidth=2, label=gate.replace("_", " "))
        for gate, colour in _colours(occurring).items()
    ]
    ax.legend(handles=handles, ncols=len(handles), loc="upper center", bbox_to_anchor=(0.5, 0))
