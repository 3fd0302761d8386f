"""The report of a search: its numbers, its page, and the page in a browser."""

import html
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import tiny_models  # noqa: F401  (registers its models)
from chromium import chromium
from made_up_studies import (
    ALONE,
    EPOCHS,
    HEARING,
    PAIR,
    REASON,
    complete,
    ended_study,
    large_study,
    make_study,
    small_study,
)
from runs import in_process
from searches import STUDY, small_search, study_url, work

import experiments.report.command
import experiments.train
from experiments.comparison import compare
from experiments.report.figures import curves_picture, points
from experiments.report.measures import (
    EDGE_KINDS,
    best_tenth,
    compute_curve,
    count_gates,
    summarise,
)
from experiments.report.page import short_form, write_report
from experiments.report.svg import inline
from experiments.runs.command_line import parse
from experiments.runs.config import TrainConfig
from experiments.runs.options import training_fields
from experiments.search.config import SearchConfig, resolved
from experiments.search.contenders import contenders
from experiments.search.display import count
from experiments.search.folder import SearchFolder, load_search
from experiments.search.records import TrialRecord
from ktg_jax import Graph, InputError, Node, SearchSpace
from ktg_jax.graph import named as graphs

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


COMMAND = re.compile("<pre>(.*?)</pre>", re.DOTALL)


class Parsed(HTMLParser):
    """Tags with their attributes, and the text, of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._inside: list[str] = []
        self._all = path.read_text(encoding="utf-8")
        self.feed(self._all)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._inside.append(tag)

    def handle_data(self, data: str) -> None:
        if self._inside[-1:] not in (["style"], ["script"]):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def commands(self) -> list[str]:
        return [html.unescape(re.sub("<.*?>", "", pre)) for pre in re.findall(COMMAND, self._all)]

    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def small_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(small_study(), tmp_path_factory.mktemp("report") / "report.html")


def test_gates_are_counted_by_the_kind_of_edge() -> None:
    graph = Graph(
        (Node("cnn"),) * 3,
        (
            ("through", "linear", "cutoff"),
            ("correct", "linear", "cutoff"),
            ("correct", "through", "cutoff"),
        ),
    )
    counts = count_gates([graph, graphs.mutual(["cnn", "cnn", "cnn"])])
    assert counts == {
        "label to target": {"through": 2},
        "label to others": {"linear": 1, "cutoff": 1, "through": 2},
        "others to target": {"linear": 1, "cutoff": 1, "through": 2},
        "target to others": {"correct": 2, "through": 2},
        "among others": {"cutoff": 1, "through": 3},
    }
    assert tuple(counts) == EDGE_KINDS
    alone = Graph((Node("cnn"),), (("linear",),))
    assert count_gates([alone]) == {"label to target": {"linear": 1}}


def test_the_best_tenth_has_no_baseline_and_no_graph_twice() -> None:
    best, drawn = best_tenth(small_study())
    assert best == [HEARING]
    assert drawn == [HEARING, ALONE]
    space = SearchSpace(3, "cnn", ("cnn", "resnet8"))
    rng = np.random.default_rng(0)
    trials = [complete(i, space.sample(rng), i / 100) for i in range(21)]
    best, drawn = best_tenth(make_study(*trials, space=space))
    assert best == [trials[i].graph for i in (20, 19, 18)]
    assert len(drawn) == 21
    assert best_tenth(make_study(TrialRecord(0, "pruned", ALONE, curve={1: 0.2})))[0] == []


@pytest.mark.slow
def test_interrupted_trials_are_no_trials(tmp_path: Path) -> None:
    graph = Graph(PAIR, (("through", "correct"), ("cutoff", "through")))
    whole = small_study()
    again = make_study(*whole.trials, complete(8, graph, 0.5, node_epochs=8.0))
    other = Graph(PAIR, (("linear", "correct"), ("cutoff", "through")))
    killed = TrialRecord(9, "failed", graph, curve={1: 0.25}, node_epochs=2.0)
    waited = TrialRecord(10, "failed", HEARING, duplicate_of=1)
    waiting = TrialRecord(11, "failed", other)  # is to be run again
    study = make_study(*again.trials, killed, waited, waiting)
    before, summary = summarise(again), summarise(study)
    assert (before.trials, before.interrupted) == (9, 0)
    assert summary == replace(before, interrupted=3, node_epochs=before.node_epochs + 2)
    assert best_tenth(study) == best_tenth(again)
    curves, same = curves_picture(study), curves_picture(again)
    assert curves is not None
    assert same is not None
    assert curves.tooltips == same.tooltips
    assert curves_picture(make_study(killed)) is None
    page = Parsed(write_report(study, tmp_path / "report.html"))
    assert "9 trials of graphs of 2 nodes" in page.text
    assert "2 failed, 1 running; 3 were interrupted and run again." in page.text
    assert "9 interrupted" in page.text  # in the table
    path = write_report(again, tmp_path / "again.html")
    assert "interrupted" not in Parsed(path).text


def test_trials_of_another_seed_are_counted_as_equivalent(tmp_path: Path) -> None:
    first, again = complete(0, ALONE, 0.5), complete(1, ALONE, 0.75, equivalent_to=0)
    study = make_study(first, again)
    summary = summarise(study)
    assert (summary.duplicates, summary.repeated, summary.trained) == (0, 1, 2)
    assert count(study.trials)["equivalent"] == 1
    text = Parsed(write_report(study, tmp_path / "report.html")).text
    assert (
        "1 trial had a graph equivalent to an earlier one and was trained with another seed."
        in text
    )
    assert "another seed of 0" in text


def test_a_graph_that_was_trained_twice_is_drawn_once() -> None:
    first, second = complete(0, HEARING, 0.5), complete(1, HEARING, 0.75)
    assert best_tenth(make_study(first, second)) == ([HEARING], [HEARING])


def test_compute_adds_up_and_the_best_never_falls() -> None:
    points = compute_curve(small_study().trials)
    assert [point.node_epochs for point in points] == [8, 16, 17, 17, 19, 20, 20, 24]
    assert [point.best for point in points] == [0.5, *[0.75] * 7]
    assert compute_curve([TrialRecord(0, "failed", node_epochs=3.0)])[0].best is None


def test_the_summary_adds_up() -> None:
    summary = summarise(small_study())
    assert summary.states == {"complete": 4, "pruned": 1, "failed": 2, "running": 1}
    assert (summary.duplicates, summary.trained) == (1, 6)
    assert (summary.compiled, summary.loaded) == (6, 2)
    assert summary.best is not None
    assert summary.best.trial.number == 1
    assert summary.node_epochs == 24
    assert summary.whole == 5 * 2 * EPOCHS  # four complete trials and a pruned one
    assert summary.seconds == 180


def test_epochs_are_those_of_the_longest_curve_where_they_are_not_set() -> None:
    study = replace(small_study(), config={})
    assert summarise(study).epochs == EPOCHS
    assert summarise(make_study(config={})).epochs is None


def test_long_curves_are_thinned_to_their_ends() -> None:
    known = {epoch: epoch / 1000 for epoch in range(1, 301)} | {150: math.nan}
    thin = points(TrialRecord(0, "pruned", ALONE, curve=known))
    assert len(thin) == 100
    assert thin[0] == (1, 0.1)
    assert thin[-1] == (300, 30.0)
    assert 150 not in dict(thin)


def test_every_trained_trial_has_its_curve() -> None:
    picture = curves_picture(small_study())
    assert picture is not None
    assert {state: len(texts) for state, texts in picture.tooltips.items()} == {
        "curves-complete": 3,
        "curves-pruned": 1,
        "curves-running": 1,
        "curves-failed": 1,
    }
    assert picture.tooltips["curves-pruned"] == ["trial 2: pruned, 25.00 % after epoch 1"]
    assert curves_picture(make_study(TrialRecord(0, "running", ALONE))) is None


def test_inlined_pictures_share_no_id_and_point_at_their_own() -> None:
    svg = (
        '<?xml version="1.0"?><!DOCTYPE svg><svg xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 9 9"><metadata>x</metadata>'
        '<defs><style>*{fill:red}</style><clipPath id="c"/></defs><g id="lines">'
        '<path d="M 0.123456 1\nL 2 -3.98765 " clip-path="url(#c)"/></g>'
        '<use xlink:href="#c"/><text>a &lt; b</text></svg>'
    )
    assert inline(svg, "one", "a picture", {"lines": ["<first>"]}) == (
        '<svg viewBox="0 0 9 9" role="img" aria-label="a picture">'
        '<defs><clipPath id="one-c" /></defs><g id="one-lines">'
        '<path d="M 0.12 1 L 2 -3.99" clip-path="url(#one-c)"><title>&lt;first&gt;</title></path>'
        '</g><use href="#one-c" /><text>a &lt; b</text></svg>'
    )
    with pytest.raises(ValueError, match="argument 2 is longer"):
        inline(svg, "one", "a picture", {"lines": ["first", "second"]})


def test_the_short_form_has_a_letter_for_each_gate() -> None:
    assert re.sub("<.*?>", "", short_form(HEARING)) == "cnn TL&ensp; resnet8 C·"


def test_the_page_says_what_the_record_holds(tmp_path: Path) -> None:
    page = Parsed(write_report(ended_study(), tmp_path / "a.html"))
    assert "8 trials of graphs of 2 nodes" in page.text
    assert "24 node-epochs" in page.text
    assert "would have cost 40: 40 % saved" in page.text
    assert "The best validation accuracy is 75.00 %" in page.text
    assert "71.00 % ± 1.41" in page.text
    assert "found-0 (is mutual) 50.00 % 72.25 % ± 1.06" in page.text
    numbers = "−1.25 −3.00 to +0.50 0.062 0.125"  # noqa: RUF001
    assert f"found-1 found-0 (is mutual) {numbers} found-1 independent" in page.text
    assert "1 node left out" in page.text  # of ALONE, whose target hears its label alone
    assert page.commands() == [
        "python -m experiments.search --nodes 2 --data 'npz:<a>.npz'",
        "python -m experiments.train --graph 'runs/a search:1' --epochs 4",
    ]
    assert re.findall("<h2>(.*?)</h2>", (tmp_path / "a.html").read_text(encoding="utf-8")) == [
        "Fair ending",
        "The best graphs",
        "What gates do",
        "Learning curves",
        "Gates of good graphs",
        "Accuracy against compute",
        "All trials",
        "How to reproduce it",
    ]
    assert page.count("svg") == 3 + 4  # three distinct complete graphs, four figures


def test_the_page_says_what_recordings_saved(tmp_path: Path) -> None:
    study = small_study()
    heard = complete(8, HEARING, 0.7, recorded_epochs=4, read_epochs=4)
    again = complete(9, HEARING, 0.7, read_epochs=4)
    study = replace(study, trials=[*study.trials, heard, again])
    summary = summarise(study)
    assert (summary.recorded, summary.read) == (4, 8)
    page = Parsed(write_report(study, tmp_path / "a.html"))
    assert "recorded once, for 4 epochs in all, and read for 8 epochs of trials" in page.text
    assert "4 epochs of forward passes saved" in page.text
    plain = Parsed(write_report(small_study(), tmp_path / "b.html"))
    assert "recorded once" not in plain.text


def test_pictures_of_tested_graphs_show_all_nodes(tmp_path: Path) -> None:
    path = write_report(ended_study(), tmp_path / "report.html")
    figures = re.findall("<figure>(.*?)</figure>", path.read_text(encoding="utf-8"), re.DOTALL)
    texts = [" ".join(re.sub("<.*?>", " ", figure).split()) for figure in figures]
    tested, alone, mutual = texts  # trials 1, 7 and 0
    assert re.findall(r"\S+ %", tested) == ["71.00 %", "68.25 %", "75.00 %"]  # the last below it
    assert "In the nodes: their test accuracy after the fair ending, mean of 2 seeds" in tested
    for text, accuracy in ((alone, "62.50 %"), (mutual, "50.00 %")):
        assert re.findall(r"\S+ %", text) == [accuracy] * 2
        assert "In the target: its validation accuracy" in text


def test_text_is_escaped(small_report: Path) -> None:
    page = Parsed(small_report)
    assert REASON in page.text
    assert "small & <quiet>" in page.text
    assert "'npz:<a>.npz'" in page.text
    assert page.count("quiet") == 0
    assert "duplicate of 1" in page.text


def test_nothing_lies_outside_the_file(small_report: Path) -> None:
    page, text = Parsed(small_report), small_report.read_text(encoding="utf-8")
    for _, attributes in page.tags:
        assert not {"src", "srcset", "action", "data", "poster", "xmlns"} & attributes.keys()
        assert attributes.get("href", "#")[:1] == "#" or attributes["href"] == "data:,"
    assert "://" not in text
    references = re.findall(r"url\(#(.*?)\)", text)
    links = [a["href"][1:] for _, a in page.tags if a.get("href", "").startswith("#")]
    assert set(references + links) <= set(page.ids())
    assert len(page.ids()) == len(set(page.ids()))


def test_the_same_record_gives_the_same_bytes(small_report: Path, tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        again = write_report(small_study(), tmp_path / "again.html")
    assert again.read_bytes() == small_report.read_bytes()


@pytest.mark.parametrize(
    ("trials", "says", "pictures"),
    [
        ((), "No trial has begun yet", 0),
        ((TrialRecord(0, "running", ALONE),), "No trial is complete yet", 0),
        ((TrialRecord(0, "failed", None, reason="x"),), "0 pruned, 1 failed", 0),
        ((TrialRecord(0, "pruned", ALONE, curve={1: 0.5}),), "No trial is complete yet", 1),
    ],
)
def test_a_search_without_a_complete_trial(
    tmp_path: Path, trials: tuple[TrialRecord, ...], says: str, pictures: int
) -> None:
    page = Parsed(write_report(make_study(*trials), tmp_path / "report.html"))
    assert says in page.text
    assert "the test set has not been read" in page.text
    assert page.count("svg") == pictures


@pytest.mark.slow
def test_hundreds_of_long_trials_make_a_file_of_a_megabyte(tmp_path: Path) -> None:
    path = write_report(large_study(3, 400, 200), tmp_path / "report.html")
    assert path.stat().st_size < 1_500_000


SIZES = """[...document.querySelectorAll("svg, img")].map(picture => {
  const box = picture.getBoundingClientRect();
  return {width: box.width, height: box.height, children: picture.querySelectorAll("path").length};
})"""
FIRST_COLUMN = """[...document.querySelectorAll("#trials tbody tr")].map(
  row => row.cells[0].textContent)"""
NARROW = "document.body.style.width = '390px'"
TEXT_HEIGHTS = """[...document.querySelectorAll(".chart text")].map(
  text => text.getBoundingClientRect().height)"""
BROKEN = """[...document.querySelectorAll("td.name, pre span")].filter(element => {
  const range = document.createRange();
  range.selectNodeContents(element);
  return new Set([...range.getClientRects()].map(box => box.top)).size > 1;
}).map(element => element.textContent)"""
CLICK = "document.querySelectorAll('#trials th button')[2].click()"


@pytest.mark.slow
def test_chromium_shows_the_page(tmp_path: Path) -> None:
    studies = {
        "small": ended_study(),
        "empty": make_study(),
        "one": large_study(1, 4, 3),
        "seven": large_study(7, 12, 8),
    }
    paths = [write_report(study, tmp_path / f"{name}.html") for name, study in studies.items()]
    with chromium(tmp_path) as page:
        pictures = {}
        for path in paths:
            page.open(path)
            sizes = page.run(SIZES)
            pictures[path.stem] = len(sizes)
            for size in sizes:
                assert 100 < size["width"] <= 1000
                assert 100 < size["height"] < 1000
                assert size["children"] > 1
            assert page.run("document.documentElement.scrollWidth <= innerWidth")
        page.open(paths[0])
        page.run(CLICK)
        ascending = page.run(FIRST_COLUMN)
        page.run(CLICK)
        descending = page.run(FIRST_COLUMN)
    assert pictures == {"small": 7, "empty": 0, "one": 5, "seven": 8}
    assert ascending == ["0", "7", "1", "3", "2", "4", "5", "6"]
    assert descending == ["1", "3", "7", "0", "2", "4", "5", "6"]
    assert page.problems == []
    assert page.requests == [path.as_uri() for path in [*paths, paths[0]]]
    assert "CONSOLE" not in (tmp_path / "chromium.log").read_text()


def test_chromium_shows_the_page_on_a_phone(tmp_path: Path) -> None:
    command = "python -m experiments.search" + " --retrain-seeds 5 --val-fraction 0.3" * 4
    study = replace(ended_study(), command=command)
    path = write_report(study, tmp_path / "report.html")
    with chromium(tmp_path) as page:
        page.open(path)
        page.run(NARROW)
        assert page.run("document.body.scrollWidth") <= 390
        assert min(page.run(TEXT_HEIGHTS)) > 8  # pixels
        assert page.run(BROKEN) == []


SCROLLED = """[...document.querySelectorAll(".chart, .table")].map(box => ({
  cut: box.scrollWidth > box.clientWidth + 1,
  hinted: getComputedStyle(box.previousElementSibling).display !== "none",
  faded: getComputedStyle(box).maskImage !== "none",
  sides: [box.classList.contains("cut-left"), box.classList.contains("cut-right")],
}))"""
"""What a reader sees of what is wider than its box."""
SETTLED = "new Promise(done => requestAnimationFrame(() => setTimeout(done, 100)))"
TO_THE_END = """for (const box of document.querySelectorAll(".chart, .table"))
  box.scrollLeft = box.scrollWidth"""


def test_chromium_shows_what_can_be_scrolled(tmp_path: Path) -> None:
    path = write_report(ended_study(), tmp_path / "report.html")
    with chromium(tmp_path) as page:
        page.open(path)
        wide = page.run(SCROLLED)
        page.run(NARROW)
        page.run(SETTLED)
        narrow = page.run(SCROLLED)
        page.run(TO_THE_END)
        page.run(SETTLED)
        at_the_end = page.run(SCROLLED)
    assert len(wide) == len(narrow) == 9
    assert not any(box["cut"] or box["hinted"] or box["faded"] for box in wide)
    assert sum(box["cut"] for box in narrow) >= 5
    for box, later in zip(narrow, at_the_end, strict=True):
        assert box["hinted"] == box["faded"] == box["cut"]
        assert box["sides"] == [False, box["cut"]]
        assert later["sides"] == [later["cut"], False]
    assert page.problems == []


def test_chromium_tells_of_a_broken_page(tmp_path: Path) -> None:
    """The check above can fail."""
    path = tmp_path / "broken.html"
    path.write_text('<link rel=icon href="data:,"><img src="none.png"><script>nothing()</script>')
    with chromium(tmp_path) as page:
        page.open(path)
    assert any("nothing is not defined" in problem for problem in page.problems)
    assert (tmp_path / "none.png").as_uri() in page.requests
    assert any("ERR_FILE_NOT_FOUND" in problem for problem in page.problems)


# --- from the folder of a search

SEARCHED = small_search(trials=8, pruner="none", augment=False, epochs=2, baselines=True)
SEEDS = [3, 4]


def begin_folder(path: Path, config: SearchConfig, *words: str, study: str = STUDY) -> SearchFolder:
    """What the command notes when it starts."""
    folder = SearchFolder(path)
    fields = resolved(config, config.space())
    with folder.begun_search(fields, study, None, config.data_dir, words):
        return folder


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search that only pretended to train; to be read only."""
    path = tmp_path_factory.mktemp("folders") / "a search"
    begin_folder(path, SEARCHED, "--imports", "tiny_models", "--data", "a b")
    work(study_url(path), SEARCHED, lambda graph, seed: [0.25, 0.5])
    return path


@pytest.fixture
def folder(searched: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(searched, tmp_path / "a search"))


def test_the_modules_of_a_search_are_imported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ktg_jax.models.registry._registered", {})
    monkeypatch.delitem(sys.modules, "tiny_models")
    end = in_process(experiments.report.command.main, folder)
    assert end.code == 0, end.err
    assert (folder / "report.html").is_file()


def test_a_module_that_is_gone_is_named(folder: Path) -> None:
    begun = json.loads((folder / "config.json").read_text())
    begun["config"]["imports"] = ["no_such_module"]
    (folder / "config.json").write_text(json.dumps(begun))
    end = in_process(experiments.report.command.main, folder)
    assert end.code == 2
    assert "imports: got 'no_such_module'; allowed: a module" in end.err


def test_commands_can_be_copied_into_a_shell(folder: Path) -> None:
    study = load_search(folder)
    search, train = Parsed(write_report(study, folder / "report.html")).commands()
    given = ["--imports", "tiny_models", "--data", "a b"]
    assert shlex.split(search) == ["python", "-m", "experiments.search", *given]
    words = shlex.split(train)
    assert words[:3] == ["python", "-m", "experiments.train"]
    config = parse(TrainConfig, words[3:])
    assert config.graph == f"{folder}:{study.best(1)[0].trial.number}"
    assert config.imports == ("tiny_models",)
    assert training_fields(config) == training_fields(SEARCHED)


def test_a_search_that_goes_on_has_its_last_command(folder: Path) -> None:
    before = json.loads((folder / "search.json").read_text())
    more = replace(SEARCHED, trials=9)
    begin_folder(folder, more, "--trials", "9")
    command = ["python", "-m", "experiments.search", "--trials", "9"]
    assert json.loads((folder / "search.json").read_text()) == before | {"command": command}
    with pytest.raises(InputError, match="study: got 'another'"):
        begin_folder(folder, more, "--trials", "10", study="another")
    with pytest.raises(InputError, match="epochs: 2, now 3"):
        begin_folder(folder, replace(more, epochs=3), "--epochs", "3")
    with SearchFolder(folder).locked(), pytest.raises(InputError, match="no other process"):
        begin_folder(folder, more, "--trials", "10")
    assert load_search(folder).command == shlex.join(command)


def test_a_command_that_cannot_be_noted_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SearchFolder, "write", full)
    with pytest.raises(InputError, match=r"a folder that can be written.*No space left"):
        begin_folder(folder, SEARCHED, "--trials", "9")
    begin_folder(folder, SEARCHED, "--imports", "tiny_models", "--data", "a b")  # noted already


def result_of(names: Sequence[str], accuracies: Sequence[float]) -> dict[str, Any]:
    """The result of a run whose nodes have these accuracies on the test images."""
    others = dict.fromkeys(("val_accuracy", "val_loss", "test_loss"))
    nodes = [
        {"name": name, "model": "tiny", "frozen": False, "test_accuracy": accuracy, **others}
        for name, accuracy in zip(names, accuracies, strict=True)
    ]
    ends = {"ensemble": nodes[0], "epochs": 2, "seconds": 1.0}
    return {"target": nodes[0], "nodes": nodes, **ends}


def test_the_fair_ending_tells_the_accuracy_of_each_node(folder: Path) -> None:
    best = next(b for b in load_search(folder).best(9) if b.trial.baseline == "mutual")
    listed = contenders([best])
    accuracies = {contender.name: [0.5, 0.75] for contender in listed}
    here = SearchFolder(folder)
    results = compare(listed, accuracies, SEEDS)
    here.write("results.json", results)
    assert load_search(folder).tested == {}  # the runs are gone
    of_best = here.retrained / f"found-{best.trial.number}"
    for seed, values in zip(SEEDS, ([0.5, 0.25], [0.75, 0.375]), strict=True):
        run = of_best / f"seed-{seed}"
        run.mkdir(parents=True)
        names = ("tiny-0", "tiny-1")
        (run / "result.json").write_text(json.dumps(result_of(names, values)))
    assert load_search(folder).tested == {best.trial.number: {"tiny-0": 0.625, "tiny-1": 0.3125}}
    end = in_process(experiments.report.command.main, folder)
    assert end.code == 0, end.err
    assert "31.25 %" in Parsed(folder / "report.html").text
    run.rename(of_best / "seed-4-epochs-9")
    assert load_search(folder).tested == {}
    for entry in results["entries"]:
        entry["runs"] = ["seed-3", "seed-4-epochs-9"]
    here.write("results.json", results)
    assert load_search(folder).tested == {best.trial.number: {"tiny-0": 0.625, "tiny-1": 0.3125}}


@pytest.mark.parametrize("missing", ["jinja2", "optuna"])
def test_without_the_extra_the_error_names_it(missing: str, folder: Path) -> None:
    hide = f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['report', {str(folder)!r}]; "
    command = "from experiments.report.command import main"
    code = f"{hide}{command}; from experiments.runs import cli; cli.run(main)"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    assert process.returncode == 2, process.stderr
    assert len(process.stderr.splitlines()) == 1
    assert f"search: got 'no module {missing}'" in process.stderr
    assert "ktg_jax[search]" in process.stderr
