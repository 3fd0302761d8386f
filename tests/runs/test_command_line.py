"""The commands' options: their help at 80 columns, and what a command line says."""

import dataclasses
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
from runs import ROOT, Ended, in_process

from experiments import evaluate, record, train
from experiments.ablation import command as ablation
from experiments.ablation.config import AblationConfig
from experiments.evaluate import EvaluateConfig
from experiments.record import RecordConfig
from experiments.report import command as report
from experiments.report.command import ReportConfig
from experiments.represent import command as represent
from experiments.represent.config import RepresentConfig
from experiments.runs import command_line
from experiments.runs.command_line import Command, parse
from experiments.runs.config import TrainConfig
from experiments.search import command as search
from experiments.search.config import SearchConfig

COMMANDS: dict[str, tuple[Callable[[], None], type, set[str]]] = {
    "train": (
        train.main,
        TrainConfig,
        {"graph", "data", "training", "stream", "speed", "hosts", "folder"},
    ),
    "evaluate": (evaluate.main, EvaluateConfig, {"evaluation", "file", "export", "speed"}),
    "record": (record.main, RecordConfig, {"recording", "batches", "data", "file", "speed"}),
    "report": (report.main, ReportConfig, set()),
    "search": (
        search.main,
        SearchConfig,
        {"graph", "search", "data", "training", "ending", "folder", "speed"},
    ),
    "represent": (
        represent.main,
        RepresentConfig,
        {"teacher", "student", "prior", "fit", "data", "training", "speed", "folder"},
    ),
    "ablation": (
        ablation.main,
        AblationConfig,
        {"teacher", "study", "fit", "data", "training", "speed", "folder"},
    ),
}


@pytest.fixture(params=COMMANDS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def help_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Ended:
    monkeypatch.setenv("COLUMNS", "80")
    return in_process(COMMANDS[name][0], "--help")


def test_the_help_can_be_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = help_of(name, monkeypatch)
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[0].startswith(f"usage: python -m experiments.{name} [-h]")
    assert [line for line in lines if len(line) > 80] == []
    for wrong in ("default: None", "{None}", "default: )", "STR", "INT", "FLOAT", "default: True"):
        assert wrong not in ended.out
    boxes = set(re.findall(r"^\W*(\w+) options\b", ended.out, re.MULTILINE))
    assert boxes == COMMANDS[name][2]


def test_every_option_is_in_the_help_with_its_text_in_one_piece(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, config, _ = COMMANDS[name]
    out = help_of(name, monkeypatch).out
    for field in dataclasses.fields(config):
        is_positional = field.default is dataclasses.MISSING
        assert is_positional or f" --{field.name.replace('_', '-')}" in out, field.name
    text = in_one_line(out)
    for words in command_line.texts_of(config).values():
        assert words
        assert in_one_line(words) in text


def in_one_line(text: str) -> str:
    """Without the sides of boxes."""
    return " ".join(re.sub(r"[|│]", " ", text).split())


def test_the_examples_come_last_as_they_are_and_are_accepted(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = help_of(name, monkeypatch).out
    _, _, examples = out.rpartition("Examples:\n")
    assert "options" not in examples
    commands = [shlex.split(line) for line in examples.replace("\\\n", " ").splitlines()]
    assert commands
    _, config, _ = COMMANDS[name]
    for python, m, module, *words in commands:
        assert (python, m, module) == ("python", "-m", f"experiments.{name}")
        assert isinstance(parse(config, words), config)


def test_no_example_of_a_command_has_a_password_in_it() -> None:
    found = []
    for pattern in ("*.md", "docs/*.md", "experiments/**/*.py", "benchmarks/**/*.py"):
        for path in ROOT.glob(pattern):
            for line in path.read_text().splitlines():
                if re.search(r"://\w+:[^@\s*]+@", line) and ">>>" not in line:
                    found.append((path.name, line))
    assert found == []


def test_options_are_called_as_their_fields_and_none_can_be_said() -> None:
    words = "--models a b --train-limit None --no-resume --prune --workdir x --temperature 2"
    expected = TrainConfig(models=("a", "b"), resume=False, prune=True, workdir="x", temperature=2)
    assert parse(TrainConfig, words.split()) == expected
    assert parse(TrainConfig, []) == TrainConfig()


@dataclass(frozen=True)
class Base:
    size: int = 1
    """The size,
    in pixels."""
    names: tuple[str, ...] = ()
    """Names."""


THERE = Command("there", {"first": "size", "second": "is_big"}, "Examples:\n  a  [b]")


@dataclass(frozen=True)
class Derived(Base):
    """What it is.

    And more.
    """

    command: ClassVar = THERE

    size: int = 2
    """Another size."""
    is_big: bool = True
    """Whether it is."""


def test_a_derived_class_says_what_it_changes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(Derived, ["-h"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert re.search(r"--size N +Another size. \(default: 2\)", out)
    assert re.search(r"--names NAMES \.\.\. +Names\. +\W$", out, re.MULTILINE)
    assert "(default: yes)" in out
    assert out.startswith("usage: python -m there [-h]")
    assert "  What it is. And more.\n" in out
    assert out.endswith("\n\nExamples:\n  a  [b]\n")


@pytest.mark.parametrize("words", [["--siez", "3"], ["--size", "three"], ["more"]])
def test_other_words_are_errors_without_examples(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(Derived, words)
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert "Examples" not in said.out + said.err


@pytest.mark.parametrize("groups", [{}, {"all": "size"}, {"second": "is_big"}])
def test_groups_do_not_change_what_is_parsed(
    groups: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Derived, "command", Command("there", groups))
    words = ["--size", "7", "--names", "x", "y", "--no-is-big"]
    assert parse(Derived, words) == Derived(7, ("x", "y"), False)
