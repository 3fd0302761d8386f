"""What commands print: brackets are brackets, and every console takes every text."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from runs import ROOT, small

from experiments.runs import cli
from experiments.runs.console import Table, Verbatim, busy, is_watched, make_console, text_column
from experiments.runs.progress import Countdown, Display, decoding_shown
from experiments.search.display import SearchDisplay
from experiments.search.records import TrialRecord
from experiments.train import train

MARKUP = "runs/a[/b] [red]x[/red] ktg_jax[cpu] :smile:"


class Terminal(io.StringIO):
    """A terminal that remembers what it was sent."""

    def isatty(self) -> bool:
        return True


def consoles() -> list[Console]:
    """That of a command, and one that somebody passes."""
    return [make_console(io.StringIO(), width=100), Console(file=io.StringIO(), width=100)]


@pytest.mark.parametrize("console", consoles())
def test_text_is_shown_as_it_is(console: Console) -> None:
    table = Table("name", "number")
    table.add_row(MARKUP, Verbatim("[1]"))
    cli.say(console, MARKUP)
    console.print(table)
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert out.startswith(MARKUP + "\n")
    assert out.count(MARKUP) == 2
    assert "[1]" in out


def test_a_line_is_never_broken() -> None:
    file = io.StringIO()
    cli.say(make_console(file, width=20), "word " * 50)
    assert file.getvalue() == "word " * 50 + "\n"


def test_a_console_says_brackets_whatever_prints_to_it() -> None:
    file = io.StringIO()
    make_console(file).print(MARKUP)
    assert file.getvalue() == f"{MARKUP}\n"


def test_progress_shows_text_as_it_is() -> None:
    task: Any = type("Task", (), {"description": MARKUP})()
    assert text_column("{task.description}").render(task).plain == MARKUP


def test_decoding_is_shown_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with decoding_shown() as on_progress:
            on_progress("train [1]", 250, 500)
            on_progress("train [1]", 500, 500)
        assert ("decoding train [1]" in stream.getvalue()) == shown


def test_nothing_of_ours_makes_a_console_or_a_table_by_itself() -> None:
    wrong = re.compile(
        r"\bConsole\(|rich\.table|\bTextColumn\(|console\.status\(|Text\.from_markup"
    )
    packages = [ROOT / name for name in ("experiments", "benchmarks")]
    sources = [path for package in packages for path in package.rglob("*.py")]
    assert [p.name for p in sources if wrong.search(p.read_text())] == ["console.py"]


@pytest.mark.parametrize("name", ["a[/b]", "a[red]b", "ü [/] x"])
def test_a_workdir_has_any_name(tmp_path: Path, name: str) -> None:
    file = io.StringIO()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    config = small(tmp_path / name, models=("tiny",), graph="independent", epochs=1, resume=False)
    with pytest.MonkeyPatch.context() as patch:  # up to where it would be trained
        patch.setattr("experiments.train._Training._resume", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, Console(file=file))
    assert f"Training in {tmp_path / name}: 1 nodes (tiny)" in file.getvalue()


# --- consoles of other encodings

PRINTS = """
from experiments.runs import cli
from experiments.runs.console import Table, busy, make_console

def main():
    console = make_console()
    with busy(console, "Drawing"):
        cli.say(console, "w\\xfcrde \\u8bad\\u7ec3 \\udcfc 1 \\xb1 2 \\u2026")
    table = Table("mean", "n", box=None)
    table.add_row("1.0 \\xb1 0.5", "3")
    table.add_row("1.0", "4")
    console.print(table)
    print("\\xfc")

cli.run(main)
"""
COLUMNS = " mean        n \n 1.0 +- 0.5  3 \n 1.0         4 \n"
OTHERS = {
    "ascii": "w\\xfcrde \\u8bad\\u7ec3 \\udcfc 1 +- 2 ...\n" + COLUMNS + "\\xfc\n",
    "latin-1": "würde \\u8bad\\u7ec3 \\udcfc 1 +- 2 ...\n" + COLUMNS + "ü\n",
    "utf-8": "würde 训练 \\udcfc 1 ± 2 …\n mean       n \n 1.0 ± 0.5  3 \n 1.0        4 \nü\n",
}


@pytest.mark.parametrize("encoding", OTHERS)
def test_every_encoding_takes_every_text(tmp_path: Path, encoding: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PRINTS],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "LC_ALL": "C"}
        | {"PYTHONUTF8": "0"},
        capture_output=True,
    )
    assert ended.stderr.decode() == ""
    assert ended.returncode == 0
    assert ended.stdout.decode(encoding) == OTHERS[encoding]


def test_a_terminal_of_ascii_alone_sees_ascii_alone() -> None:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, "ascii") as file:
        console = Console(file=file, force_terminal=True, width=80, _environ={"TERM": "xterm"})
        display = Display(
            [("a", "cnn", "target")],
            first_step=0,
            total_steps=4,
            epochs=2,
            batch_size=8,
            console=console,
        )
        with busy(console, "Preparing"):
            console.print(display._render())
        file.flush()
        assert "Preparing" in raw.getvalue().decode("ascii")


@pytest.mark.parametrize("path", ["/tmp/\udcfc", "a\udcc3\udcbc"])
def test_a_workdir_that_is_no_text_is_refused(path: str) -> None:
    from experiments.runs.workdir import Workdir
    from ktg_jax.errors import InputError

    with pytest.raises(InputError, match=r"^workdir: got .*allowed: a path in UTF-8"):
        Workdir(path)


# --- how far a training is, where nothing moves


def record(epoch: int, **changes: Any) -> dict[str, Any]:
    target = {"name": "a[/b]", "train_accuracy": 0.5, "train_loss": 1.25}
    target |= {"val_accuracy": 0.75, "val_loss": 0.5} | changes
    return {"epoch": epoch, "images_per_second": 640.4, "nodes": [target]}


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 50.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


def display_on(file: io.StringIO, first_step: int = 0) -> Display:
    console = make_console(file, width=80)
    rows = [("a[/b]", "cnn", "target")]
    return Display(
        rows, first_step=first_step, total_steps=12, epochs=4, batch_size=8, console=console
    )


def test_a_line_an_epoch_is_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, file = Clock(monkeypatch), io.StringIO()
    lines = []
    with display_on(file) as display:
        for epoch, seconds in ((1, 30.0), (2, 5.0), (3, 7.0), (4, 6.0)):  # the first compiles
            clock.now += seconds
            display.epoch(record(epoch, **({} if epoch > 1 else {"val_accuracy": None})))
            lines.append(file.getvalue().splitlines()[-1])
    assert lines == [
        "epoch 1/4, a[/b]: train 50.00 % (loss 1.2500); 640 images/s; time left 0:01:30",
        *(
            f"epoch {epoch}/4, a[/b]: train 50.00 % (loss 1.2500), val. 75.00 % (loss 0.5000); "
            f"640 images/s; time left 0:00:{left}"
            for epoch, left in ((2, "10"), (3, "06"), (4, "00"))
        ),
    ]
    assert file.getvalue().splitlines() == lines


def test_the_pace_of_steps_is_shown_when_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, shown = Clock(monkeypatch), []
    with display_on(io.StringIO()) as display:
        for number, seconds in enumerate((0, 0.001, 0.499, 0.5, 1), start=1):
            clock.now += seconds
            display.step(number, {"loss": [1.0], "accuracy": [0.5]})
            shown.append(display._progress.tasks[0].fields["rate"])
    assert shown[:3] == ["-"] * 3
    assert "-" not in shown[3:]


def test_the_time_left_of_a_resumed_run_counts_its_own_epochs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, file = Clock(monkeypatch), io.StringIO()
    with display_on(file, first_step=6) as display:  # after epoch 2
        clock.now += 3600
        display.epoch(record(3))
    assert file.getvalue().endswith("time left 1:00:00\n")


def test_on_a_terminal_nothing_but_the_display_moves() -> None:
    file = Terminal()
    console = Console(file=file, width=80, force_terminal=True, _environ={"TERM": "xterm"})
    with Display(
        [("a", "cnn", "target")],
        first_step=0,
        total_steps=4,
        epochs=2,
        batch_size=8,
        console=console,
    ) as display:
        display.epoch(record(1))
    assert "cnn" in file.getvalue()
    assert "epoch 1/2" not in file.getvalue()


@pytest.mark.parametrize(
    ("file", "environment", "watched"),
    [
        (Terminal(), {"TERM": "xterm"}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {"TERM": "xterm"}, False),
        (io.StringIO(), {"TERM": "xterm", "FORCE_COLOR": "1"}, False),  # as a CI sets it
    ],
)
def test_a_display_moves_only_on_a_terminal_that_can(
    file: io.StringIO, environment: dict[str, str], watched: bool
) -> None:
    assert is_watched(Console(file=file, _environ=environment)) == watched


def test_a_countdown_knows_nothing_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    countdown = Countdown(10, done=4)
    assert [countdown.left(done) for done in (0, 4)] == ["time left -"] * 2
    clock.now += 90
    assert countdown.left(5) == "time left 0:07:30"
    assert countdown.left(10) == "time left 0:00:00"


def test_a_search_says_each_trial_in_a_line_and_how_many_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, file = Clock(monkeypatch), io.StringIO()
    display = SearchDisplay(4, 2, make_console(file))
    trials = [trial(0)]
    display.update(trials)  # those of the search before it was resumed
    assert file.getvalue() == ""
    clock.now += 20
    display.update([*trials, trial(1, state="failed", reason="no [/b]")])
    assert file.getvalue() == "trial 1: failed: no [/b]; 2 of 4 trials, time left 0:00:40\n"


def trial(number: int, **changes: Any) -> TrialRecord:
    fields: dict[str, Any] = {
        "number": number,
        "state": "complete",
        "value": 0.5,
        "curve": {1: 0.5},
    }
    return TrialRecord(**fields | changes)
