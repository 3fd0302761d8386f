"""The page: all that is known of a search, in one HTML file that needs no network."""

import dataclasses
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ktg_jax as ktg
from ktg_jax.draw import GATE_COLOURS
from ktg_jax.io.files import write_text

from ..runs.command_line import as_called
from ..runs.options import Training
from ..runs.texts import per_cent, points
from ..search.records import Standing, StudyRecord, TrialRecord
from ..search.tables import entry_label
from .extra import Markup, jinja2
from .figures import (
    Picture,
    compute_picture,
    curves_picture,
    gates_picture,
    graph_picture,
)
from .findings import GROUPS, effects_of, effects_picture, race_picture, runners
from .measures import best_tenth, count_gates, summarise
from .svg import inline

NUM_DRAWN = 6
"""So many of the best graphs are drawn."""

_GATE_LETTERS = {
    "through": "T",
    "cutoff": "·",
    "linear": "L",
    "correct": "C",
    "negative_linear": "N",
}


def write_report(study: StudyRecord, path: str | os.PathLike[str]) -> Path:
    """Writes a search's report as one HTML file, pictures and styles included.

    The same record gives the same bytes. Nothing in the file points outside it.

    Args:
        study: the search, finished or not.
        path: the path of the file to write.

    Returns:
        `path`.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(str(__package__), package_path=""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "per_cent": _per_cent,
        "number": _number,
        "points": _points,
        "duration": _duration,
        "short_form": short_form,
        "unbroken": _unbroken,
    }
    environment.globals["plural"] = _plural
    page = environment.get_template("page.html.jinja").render(_content(study))
    write_text(path, page)
    return Path(path)


def short_form(graph: ktg.Graph) -> Markup:
    """A graph in a line: each node's model, and a letter for each of its gates, from node 0 on.

    After a gate stands what its edge carries, where that is not the papers' divergence.
    """
    rows = [
        f"<span>{Markup.escape(node.model)} {''.join(map(_letter, row))}</span>"
        for node, row in zip(graph.nodes, graph.edges, strict=True)
    ]
    return Markup("&ensp; ".join(rows))


def _letter(edge: ktg.Edge) -> str:
    letter = _GATE_LETTERS[edge.gate]
    if edge.gate == "cutoff":
        return letter
    carried = f"<small>[{Markup.escape(edge.says)}]</small>" if edge.says else ""
    return f"<b class={letter}>{letter}</b>{carried}"


def _content(study: StudyRecord) -> dict[str, Any]:
    """What the template shows."""
    best, drawn = best_tenth(study)
    gates = gates_picture(count_gates(best), count_gates(drawn)) if best else None
    best_trial = next((best.trial for best in study.best(1)), None)
    effects = effects_of(study)
    return {
        "study": study,
        "summary": summarise(study),
        "results": _results(study),
        "best_graphs": [_best_graph(study, best) for best in study.best(NUM_DRAWN)],
        "curves": _inlined(curves_picture(study), "curves", "Learning curves of all trials"),
        "gates": _inlined(gates, "gates", "Share of each gate on each kind of edge"),
        "effects": effects,
        "effect_groups": GROUPS,
        "effects_picture": _inlined(
            effects_picture(effects), "effects", "Effects of gates and senders on the target"
        ),
        "runners": runners(study),
        "race_picture": _inlined(race_picture(study.race), "race", "The race over seeds"),
        "num_best": len(best),
        "num_drawn": len(drawn),
        "compute": _inlined(
            compute_picture(study), "compute", "Best validation accuracy by node-epochs"
        ),
        "gate_letters": [
            (letter, gate.replace("_", " "), GATE_COLOURS[gate])
            for gate, letter in _GATE_LETTERS.items()
            if gate in study.space.gates
        ],
        "train_command": best_trial and _train_command(study, best_trial),
        "settings": list(_flattened(study.config)),
    }


def _best_graph(study: StudyRecord, best: Standing) -> dict[str, Any]:
    """A card of the gallery: the graph without the nodes that cannot influence its target.

    Where it was trained again, each node has its test accuracy, else the target that of the search.
    """
    graph, trial = best.graph.pruned(), best.trial
    tested = study.tested.get(trial.number)
    accuracies = tested or {str(graph.nodes[0].name): best.value}
    name = f"Graph of trial {trial.number}"
    return {
        "trial": trial,
        "value": best.value,
        "seeds": best.seeds,
        "graph": graph,
        "left_out": len(best.graph.nodes) - len(graph.nodes),
        "is_tested": tested is not None,
        "picture": _inlined(graph_picture(graph, accuracies), f"graph-{trial.number}", name),
        "is_wide": len(graph.nodes) > 5,
    }


def _inlined(picture: Picture | None, prefix: str, label: str) -> Markup | None:
    if picture is None:
        return None
    return Markup(inline(picture.svg, prefix, label, picture.tooltips))


def _results(study: StudyRecord) -> dict[str, Any] | None:
    """The fair ending, each entry with its graph, and the entries' labels by their names."""
    if study.results is None:
        return None
    entries = [
        {**entry, "graph": ktg.Graph.from_json(entry["graph"])}
        for entry in study.results["entries"]
    ]
    labels = {entry["name"]: entry_label(entry) for entry in entries}
    return {**study.results, "entries": entries, "labels": labels}


def _train_command(study: StudyRecord, trial: TrialRecord) -> str:
    """Trains a trial's graph as the search did."""
    words = [*as_called("python -m experiments.train").split(), "--graph"]
    words.append(f"{study.path}:{trial.number}")
    if study.config.get("imports"):
        words += ["--imports", *study.config["imports"]]
    known = {"data_dir": study.data_dir, **study.config.get("training", {})}
    for field in dataclasses.fields(Training):
        value, flag = known.get(field.name, field.default), field.name.replace("_", "-")
        if value != field.default:
            words += _option(flag, value)
    return shlex.join(words)


def _option(flag: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]


def _unbroken(command: str) -> Markup:
    """A command whose lines are never broken within a word: `--an-option` has hyphens."""
    return Markup(" ").join(Markup("<span>{}</span>").format(word) for word in command.split(" "))


def _flattened(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The settings one by one, nested ones with dotted names."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}.")
        elif isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
            yield f"{prefix}{key}", ", ".join(map(str, value)) or "none"
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


_DASH, _MINUS = "–", "−"  # noqa: RUF001


def _per_cent(share: float | None) -> str:
    return per_cent(share, " %", none=_DASH)


def _points(difference: float | None) -> str:
    return points(difference, none=_DASH).replace("-", _MINUS)


def _number(value: float) -> str:
    """Whole numbers as such, others with one decimal; thousands apart."""
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.1f}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
