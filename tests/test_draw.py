import itertools
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import ktg_jax as ktg
from ktg_jax import gates
from ktg_jax.draw import GATE_COLOURS, draw_curves, draw_graph
from ktg_jax.errors import InputError
from ktg_jax.gates import GATES
from ktg_jax.graph.graph import Graph, Node

MODELS = ("resnet32", "wrn28_10", "resnet110")
TARGET_RING = 1.1  # radius of the target's outer ring over that of its circle


def make_graph(nodes: list[Node], gates: list[list[str]]) -> Graph:
    return Graph(tuple(nodes), tuple(tuple(row) for row in gates))


def full_graph(num_nodes: int) -> Graph:
    """All edges, with every gate but cutoff in turn."""
    open_gates = [gate for gate in GATES if gate != "cutoff"]
    gates = [
        [open_gates[(receiver + 2 * sender) % 4] for sender in range(num_nodes)]
        for receiver in range(num_nodes)
    ]
    return make_graph([Node(MODELS[i % 3], f"net{i}") for i in range(num_nodes)], gates)


def sparse_graph() -> Graph:
    """A target, a frozen teacher and a peer without a label edge."""
    gates = [
        ["through", "linear", "cutoff"],
        ["cutoff", "cutoff", "cutoff"],
        ["correct", "linear", "cutoff"],
    ]
    nodes = [Node("resnet8", "student"), Node("wrn28_10", "teacher", "runs/a"), Node("vgg", "peer")]
    return make_graph(nodes, gates)


def svg_of(folder: Path, graph: Graph, **options: Any) -> ET.Element:
    draw_graph(graph, [folder / "graph.svg"], **options)
    return ET.parse(folder / "graph.svg").getroot()


def texts(svg: ET.Element) -> list[str]:
    return [element.text or "" for element in svg.findall(".//{*}text")]


def gids(svg: ET.Element, prefix: str) -> list[str]:
    every = (element.get("id", "") for element in svg.findall(".//{*}g"))
    return sorted(gid for gid in every if gid.startswith(prefix))


def shapes(svg: ET.Element, gid: str, kind: str = "path") -> list[ET.Element]:
    (group,) = svg.findall(f".//{{*}}g[@id='{gid}']")
    return group.findall(f".//{{*}}{kind}")


def style(svg: ET.Element, gid: str) -> str:
    return shapes(svg, gid)[0].get("style", "")


def points(path: ET.Element) -> np.ndarray:
    """The vertices and control points of an SVG path, `[n, 2]`."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", path.get("d", ""))
    return np.array(numbers, float).reshape(-1, 2)


def rim(svg: ET.Element, node: int) -> tuple[np.ndarray, float]:
    """Centre and radius, in SVG points, of the circle where a node's edges begin and end."""
    corners = points(shapes(svg, f"node-{node}")[0])
    low, high = corners.min(axis=0), corners.max(axis=0)
    return (low + high) / 2, float(high[0] - low[0]) / 2 * (TARGET_RING if node == 0 else 1)


def record(epoch: int, num_nodes: int, validation: bool = True) -> dict[str, Any]:
    nodes = [
        {
            "name": f"net{i}",
            "train_loss": 2.0 / epoch + i,
            "train_accuracy": 1 - 0.5 / epoch,
            "val_loss": 2.5 / epoch + i if validation else None,
            "val_accuracy": 0.9 - 0.5 / epoch if validation else None,
        }
        for i in range(num_nodes)
    ]
    return {"epoch": epoch, "step": 10 * epoch, "nodes": nodes}


def curves_of(folder: Path, records: list[dict[str, Any]]) -> ET.Element:
    draw_curves(records, folder / "curves.svg")
    return ET.parse(folder / "curves.svg").getroot()


def test_every_gate_has_its_own_colour() -> None:
    assert set(GATE_COLOURS) == set(GATES)
    assert len(set(GATE_COLOURS.values())) == len(GATES)


def test_names_models_and_accuracies_are_text(tmp_path: Path) -> None:
    svg = svg_of(tmp_path, sparse_graph(), accuracies={"student": 0.7155, "peer": 1.0})
    shown = texts(svg)
    assert {"student", "resnet8", "teacher", "wrn28_10", "peer", "vgg"} <= set(shown)
    assert sorted(text for text in shown if "%" in text) == ["100.00 %", "71.55 %"]


def test_target_and_frozen_nodes_are_marked(tmp_path: Path) -> None:
    svg = svg_of(tmp_path, sparse_graph())
    assert texts(svg).count("target") == 1
    assert texts(svg).count("frozen") == 1
    dashed = ["stroke-dasharray" in style(svg, f"node-{i}") for i in range(3)]
    assert dashed == [False, True, False]
    assert "frozen" not in texts(svg_of(tmp_path, full_graph(3)))


def test_cutoff_edges_and_their_label_squares_are_absent(tmp_path: Path) -> None:
    svg = svg_of(tmp_path, sparse_graph())
    assert gids(svg, "edge-") == ["edge-0-2", "edge-1-0", "edge-1-2", "edge-label-0"]
    assert gids(svg, "label-") == ["label-0"]
    assert texts(svg).count("label") == 1


def test_what_edges_carry_is_written_beside_them(tmp_path: Path) -> None:
    several = {"gate": "linear", "loss": {"kl": 1, "attention": 1000}, "temperature": 4}
    cut = {"gate": "cutoff", "loss": "attention"}
    gates = [[{"weight": 0.5}, several, "through"], [cut, "through", "through"], ["cutoff"] * 3]
    svg = svg_of(tmp_path, Graph(["cnn", "cnn", "cnn"], gates))
    carried = [text for text in texts(svg) if "kl" in text or "attention" in text]
    assert carried == ["kl + 1000 attention, T 4"]
    assert "0.5 cross_entropy" in texts(svg)
    plain = texts(svg_of(tmp_path, full_graph(3)))
    assert not any("kl" in text or "cross" in text for text in plain)


def test_a_gate_that_somebody_registered_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ktg_jax.gates._registered", dict(gates._registered))
    ktg.register_gate("late_gate", lambda progress, *given: progress)
    svg = svg_of(tmp_path, Graph(["cnn", "cnn"], [["through", "late_gate"], ["cutoff", "linear"]]))
    assert gids(svg, "edge-") == ["edge-1-0", "edge-label-0", "edge-label-1"]
    assert "late gate" in texts(svg)


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 5, 7, 10])
def test_every_edge_has_the_colour_of_its_gate(tmp_path: Path, num_nodes: int) -> None:
    graph = full_graph(num_nodes)
    svg = svg_of(tmp_path, graph)
    assert len(gids(svg, "edge-")) == num_nodes**2
    for receiver, row in enumerate(graph.gates):
        for sender, gate in enumerate(row):
            source = "label" if sender == receiver else sender
            shaft, head = shapes(svg, f"edge-{source}-{receiver}")
            for path in (shaft, head):
                assert f"stroke: {GATE_COLOURS[gate].lower()}" in path.get("style", "")


def test_legend_names_only_the_gates_that_occur(tmp_path: Path) -> None:
    assert texts(svg_of(tmp_path, sparse_graph()))[-3:] == ["through", "linear", "correct"]
    assert "negative linear" in texts(svg_of(tmp_path, full_graph(2)))


@pytest.mark.parametrize("num_nodes", [2, 3, 7, 10])
def test_arrows_lead_from_the_senders_rim_to_the_receivers_rim(
    tmp_path: Path, num_nodes: int
) -> None:
    svg = svg_of(tmp_path, full_graph(num_nodes))
    for sender, receiver in itertools.product(range(num_nodes), repeat=2):
        source = "label" if sender == receiver else sender
        shaft, head = (points(path) for path in shapes(svg, f"edge-{source}-{receiver}"))
        centre, radius = rim(svg, receiver)
        assert 0 <= np.linalg.norm(head - centre, axis=1).min() - radius < 1.5
        if sender != receiver:
            centre, radius = rim(svg, sender)
            assert np.linalg.norm(shaft[0] - centre) == pytest.approx(radius, abs=0.1)


@pytest.mark.parametrize("num_nodes", [4, 7, 10])
def test_edges_keep_clear_of_the_other_nodes(tmp_path: Path, num_nodes: int) -> None:
    svg = svg_of(tmp_path, full_graph(num_nodes))
    t = np.linspace(0, 1, 50)[:, None]
    for edge in itertools.permutations(range(num_nodes), 2):
        start, control, end = points(shapes(svg, "edge-{}-{}".format(*edge))[0])
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * control + t**2 * end
        for node in set(range(num_nodes)) - set(edge):
            centre, radius = rim(svg, node)
            assert np.linalg.norm(curve - centre, axis=1).min() > radius + 2


def test_the_two_directions_between_nodes_lie_apart(tmp_path: Path) -> None:
    svg = svg_of(tmp_path, full_graph(7))
    for a, b in ((0, 1), (0, 3), (2, 6)):
        middles = [points(shapes(svg, f"edge-{i}-{j}")[0])[1] for i, j in ((a, b), (b, a))]
        assert math.dist(*middles) > 8


def test_long_names_are_made_to_fit_their_circle(tmp_path: Path) -> None:
    name = "a_name_much_longer_than_a_circle_is_wide"
    svg = svg_of(tmp_path, make_graph([Node("resnet8", name)], [["through"]]))
    sizes = {
        text.text: float(re.findall(r"font-size: ([\d.]+)", text.get("style", ""))[0])
        for text in svg.findall(".//{*}text")
    }
    letter = 0.5 * sizes[name]  # letters are wider than half their size
    assert letter * len(name) < 2 * rim(svg, 0)[1] / TARGET_RING
    assert sizes[name] < sizes["resnet8"]


def test_pictures_are_the_same_bytes_whatever_the_users_settings(tmp_path: Path) -> None:
    files = [tmp_path / "graph.svg", tmp_path / "graph.png", tmp_path / "curves.svg"]

    def draw() -> list[bytes]:
        draw_graph(full_graph(3), files[:2], {"net0": 0.5}, title="three")
        draw_curves([record(1, 2), record(2, 2)], files[2])
        return [file.read_bytes() for file in files]

    first = draw()
    users: dict[Any, Any] = {"font.size": 20, "svg.fonttype": "path", "lines.linewidth": 7}
    with matplotlib.rc_context(users):
        assert draw() == first
        assert matplotlib.rcParams["font.size"] == 20


def test_png_shows_the_edge_colours(tmp_path: Path) -> None:
    gates = [["through", "correct"], ["cutoff", "linear"]]
    draw_graph(make_graph([Node("resnet8"), Node("resnet8")], gates), [tmp_path / "graph.PNG"])
    pixels = np.asarray(Image.open(tmp_path / "graph.PNG").convert("RGB"))
    drawn = {
        gate
        for gate, colour in GATE_COLOURS.items()
        if (pixels == list(bytes.fromhex(colour[1:]))).all(axis=-1).sum() > 200
    }
    assert drawn == {"through", "correct", "linear"}


def test_only_the_pictures_are_left_in_the_folder(tmp_path: Path) -> None:
    draw_graph(full_graph(2), [tmp_path / "a.svg", str(tmp_path / "b.png")])
    draw_curves([record(1, 1)], tmp_path / "c.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.svg", "b.png", "c.png"]


def test_a_reader_of_the_old_picture_never_sees_parts_of_the_new_one(tmp_path: Path) -> None:
    draw_graph(full_graph(1), [tmp_path / "a.svg"])
    old = (tmp_path / "a.svg").read_bytes()
    with (tmp_path / "a.svg").open("rb") as reader:
        draw_graph(full_graph(2), [tmp_path / "a.svg"])
        assert reader.read() == old
    assert (tmp_path / "a.svg").read_bytes() != old


def test_a_failed_write_keeps_the_old_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_graph(full_graph(1), [tmp_path / "a.svg"])
    old = (tmp_path / "a.svg").read_bytes()

    def full_disk(figure: Figure, path: Path, **options: object) -> None:
        path.write_bytes(b"half a picture")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="no space"):
        draw_graph(full_graph(2), [tmp_path / "a.svg"])
    assert [file.name for file in tmp_path.iterdir()] == ["a.svg"]
    assert (tmp_path / "a.svg").read_bytes() == old


def test_curves_show_train_dashed_and_validation_solid(tmp_path: Path) -> None:
    svg = curves_of(tmp_path, [record(epoch, 2) for epoch in range(1, 4)])
    for metric in ("loss", "accuracy"):
        for node in (0, 1):
            assert "stroke-dasharray" in style(svg, f"train_{metric}-{node}")
            assert "stroke-dasharray" not in style(svg, f"val_{metric}-{node}")
    assert {"net0", "net1", "train", "validation", "accuracy (%)"} <= set(texts(svg))


def panel_of(svg: ET.Element, gid: str) -> str:
    """The panel that a line is in."""
    panels = [axes for axes in svg.findall(".//{*}g") if axes.get("id", "").startswith("axes_")]
    (found,) = [p for p in panels if any(g.get("id") == gid for g in p.findall(".//{*}g"))]
    return found.get("id", "")


def test_the_two_losses_have_axes_of_their_own_which_say_what_they_are(tmp_path: Path) -> None:
    svg = curves_of(tmp_path, [record(epoch, 2) for epoch in (1, 2)])
    names = "training loss (sum over edges)", "validation loss (cross-entropy)"
    assert {*names, "accuracy (%)"} <= set(texts(svg))
    panels = [panel_of(svg, f"{field}-0") for field in ("train_loss", "val_loss")]
    assert panels == [panel_of(svg, f"{field}-1") for field in ("train_loss", "val_loss")]
    accuracy = {panel_of(svg, f"{part}_accuracy-{i}") for part in ("train", "val") for i in (0, 1)}
    assert len({*panels, *accuracy}) == 3


def test_a_frozen_node_has_no_training_loss(tmp_path: Path) -> None:
    records = [record(epoch, 2) for epoch in (1, 2)]
    for one in records:
        one["nodes"][1]["train_loss"] = 0.0
    svg = curves_of(tmp_path, records)
    assert gids(svg, "train_loss-") == ["train_loss-0"]
    assert gids(svg, "val_loss-") == ["val_loss-0", "val_loss-1"]


@pytest.mark.parametrize(("name", "nodes"), [("a" * 255, 1), ("net", 30)])
def test_the_legend_leaves_room_for_the_curves(tmp_path: Path, name: str, nodes: int) -> None:
    records = [record(epoch, nodes) for epoch in (1, 2)]
    for i, node in enumerate(node for one in records for node in one["nodes"]):
        node["name"] = f"{name}{i % nodes}"
    svg = curves_of(tmp_path, records)
    first, last = points(shapes(svg, "val_loss-0")[0])
    assert last[0] - first[0] > 100
    assert max(len(text) for text in texts(svg)) < 40
    assert len([text for text in texts(svg) if text.startswith(name[:3])]) == nodes


def test_several_files_are_written_at_once(tmp_path: Path) -> None:
    draw_curves([record(1, 1)], [tmp_path / "a.svg", str(tmp_path / "b.png")])
    assert (tmp_path / "a.svg").read_text() == curves_text(tmp_path, [record(1, 1)])
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.width > picture.height


def curves_text(folder: Path, records: list[dict[str, Any]]) -> str:
    draw_curves(records, folder / "curves.svg")
    return (folder / "curves.svg").read_text()


def test_the_targets_curves_are_thickest_beneath_and_first_in_the_legend(tmp_path: Path) -> None:
    svg = curves_of(tmp_path, [record(epoch, 7) for epoch in range(1, 201)])
    styles = [style(svg, f"val_loss-{i}") for i in range(7)]
    widths = [re.findall(r"stroke-width: ([\d.]+)", look) or ["1"] for look in styles]
    assert all(float(widths[0][0]) > float(width) for (width,) in widths[1:])
    assert len({re.findall(r"stroke: (#\w+)", look)[0] for look in styles}) == 7
    groups = [element.get("id", "") for element in svg.findall(".//{*}g")]
    assert next(gid for gid in groups if gid.startswith("val_loss")) == "val_loss-0", "beneath"
    names = [text for text in texts(svg) if text.startswith("net")]
    assert names == [f"net{i}" for i in range(7)]


def test_curves_without_validation_show_train_alone(tmp_path: Path) -> None:
    svg = curves_of(tmp_path, [record(epoch, 2, validation=False) for epoch in (1, 2)])
    assert gids(svg, "val_") == []
    assert len(gids(svg, "train_")) == 4
    assert "validation" not in texts(svg)


def test_epochs_without_validation_are_bridged(tmp_path: Path) -> None:
    svg = curves_of(tmp_path, [record(epoch, 1, epoch % 10 == 0) for epoch in range(1, 101)])
    assert len(points(shapes(svg, "val_loss-0")[0])) == 10


def test_one_epoch_is_shown_by_markers(tmp_path: Path) -> None:
    svg = curves_of(tmp_path, [record(1, 2)])
    for part, metric, node in itertools.product(("train", "val"), ("loss", "accuracy"), (0, 1)):
        assert len(shapes(svg, f"{part}_{metric}-{node}", "use")) == 1
    assert len(gids(svg, "xtick_")) == 3, "one tick in each panel"
    assert "1" in texts(svg)


@pytest.mark.parametrize("name", ["graph.pdf", "graph", "svg"])
def test_other_suffixes_are_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"^paths: got .*\.svg or \.png$"):
        draw_graph(full_graph(1), [tmp_path / "good.svg", tmp_path / name])
    with pytest.raises(InputError, match=r"^path: got .*\.svg or \.png$"):
        draw_curves([record(1, 1)], tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("accuracies", "message"),
    [
        ({"net0": 71.55}, r"^accuracies\['net0'\]: got 71\.55;"),
        ({"net0": math.nan}, r"^accuracies\['net0'\]: got nan;"),
        ({"other": 0.5}, r"^accuracies: got 'other'; allowed: names of nodes: net0$"),
    ],
)
def test_bad_accuracies_are_refused(
    tmp_path: Path, accuracies: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        draw_graph(full_graph(1), [tmp_path / "graph.svg"], accuracies)


def test_no_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^records: got \[\]"):
        draw_curves([], tmp_path / "curves.svg")
