"""Signals: a command ends with one line and the right code, and finishes what is pending."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runs import ROOT, Ended, end_of, in_process, metrics, options, small, start

from ktg_jax.training.checkpoint_reading import checkpoint_epochs

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
LINES = {
    signal.SIGINT: "interrupted; that is all\n",
    signal.SIGTERM: "interrupted by SIGTERM; that is all\n",
    signal.SIGHUP: "interrupted by SIGHUP; that is all\n",
}
SLEEPS = """
import time
from experiments.runs import cli
from experiments.runs import signals

def main():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("finishing", flush=True)
        time.sleep({finishing})
        print("finished", flush=True)

cli.run(main, "interrupted; that is all")
"""


@pytest.fixture(params=CODES, ids=lambda number: number.name)
def number(request: pytest.FixtureRequest) -> signal.Signals:
    if signal.getsignal(request.param) == signal.SIG_IGN:
        pytest.skip("ignored where the tests run, and so by what they start")
    return request.param


@pytest.fixture
def light(tmp_path: Path) -> Path:
    """A folder in which `experiments.runs.cli` is imported at once: what it needs, without JAX."""
    (tmp_path / "ktg_jax").mkdir()
    (tmp_path / "ktg_jax" / "__init__.py").touch()
    (tmp_path / "ktg_jax" / "errors.py").symlink_to(ROOT / "ktg_jax" / "errors.py")
    return tmp_path


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def run(light: Path) -> Iterator[Start]:
    """Starts a program and waits for its first line, which is `ready`."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str, ignored: signal.Signals | None = None) -> "subprocess.Popen[str]":
        command = [sys.executable, *words]
        if ignored is not None:
            command = ["sh", "-c", f"trap '' {ignored.value}; exec \"$@\"", "sh", *command]
        process = subprocess.Popen(
            command,
            cwd=light,
            env={"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_signal_unwinds_the_command(run: Start, number: signal.Signals) -> None:
    process = run("-c", SLEEPS.format(finishing=0.5))
    process.send_signal(number)
    assert end_of(process) == Ended(CODES[number], "finishing\nfinished\n", LINES[number])


def test_a_second_one_ends_it_at_once(run: Start, number: signal.Signals) -> None:
    process = run("-c", SLEEPS.format(finishing=60))
    process.send_signal(number)
    assert process.stdout is not None
    assert process.stdout.readline() == "finishing\n"
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(number)
    ended = end_of(process)
    assert time.monotonic() - began < 30
    assert (ended.code, ended.out) == (CODES[number], "")
    assert ended.err == LINES[number].partition(";")[0].strip() + "\n"


def test_two_that_come_at_once_are_one(run: Start) -> None:
    process = run("-c", SLEEPS.format(finishing=0.5))
    for _ in range(2):  # as from a terminal that is closed
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    ended = end_of(process)
    assert (ended.code, ended.out) == (143, "finishing\nfinished\n")


HELD = """
import time
from experiments.runs import cli
from experiments.runs import signals

def main():
    with signals.held():
        with signals.held():
            print("ready", flush=True)
            time.sleep({seconds})
        print("still held", flush=True)
    print("too late", flush=True)

cli.run(main, "interrupted; that is all")
"""


def test_one_that_is_held_waits_for_the_end(run: Start, number: signal.Signals) -> None:
    process = run("-c", HELD.format(seconds=1))
    process.send_signal(number)
    assert end_of(process) == Ended(CODES[number], "still held\n", LINES[number])


def test_a_second_one_does_not_wait(run: Start, number: signal.Signals) -> None:
    process = run("-c", HELD.format(seconds=60))
    process.send_signal(number)
    time.sleep(0.5)
    process.send_signal(number)
    ended = end_of(process)
    assert (ended.code, ended.out) == (CODES[number], "")


def test_what_is_ignored_stays_ignored(run: Start, number: signal.Signals) -> None:
    process = run("-c", SLEEPS.replace("60", "1").format(finishing=0), ignored=number)
    process.send_signal(number)  # as under nohup, or in the background of a shell
    assert end_of(process) == Ended(0, "finishing\nfinished\n", "")


def test_it_counts_whatever_becomes_of_it_on_its_way(run: Start) -> None:
    program = SLEEPS.format(finishing=0).replace("finally:", "except BaseException:")
    process = run("-c", program.replace('print("finished", flush=True)', "1 / 0"))
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == Ended(143, "finishing\n", LINES[signal.SIGTERM])


def test_a_worker_leaves_signals_to_the_system(run: Start, number: signal.Signals) -> None:
    leaving = SLEEPS.replace("    try:", "    signals.leave_to_system()\n    try:")
    process = run("-c", leaving.format(finishing=0))
    process.send_signal(number)
    assert end_of(process) == Ended(-number, "", "")


@pytest.mark.parametrize("module", ["experiments.train", "experiments.search", "benchmarks.step"])
def test_while_a_command_imports_a_signal_is_one_line(
    run: Start, light: Path, number: signal.Signals, module: str
) -> None:
    (light / "jax.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    (light / "numpy.py").write_text("import jax\n")
    (light / "ktg_jax" / "errors.py").unlink()
    (light / "ktg_jax" / "errors.py").write_text("import jax\n")
    process = run("-m", module)
    process.send_signal(number)
    line = LINES[number].partition(";")[0].strip() + "\n"
    assert end_of(process) == Ended(CODES[number], "", line)


def test_what_was_set_before_is_set_again() -> None:
    in_process(lambda: None)  # from the first command on, the orphans of Orbax are not told
    before = [signal.getsignal(number) for number in CODES], sys.unraisablehook
    seen = []
    ended = in_process(lambda: seen.append(signal.getsignal(signal.SIGTERM)))
    assert ended == Ended(0, "", "")
    assert ([signal.getsignal(number) for number in CODES], sys.unraisablehook) == before
    assert seen[0] != before[0][1]


@pytest.mark.parametrize("number", [signal.SIGTERM], indirect=True)
def test_a_training_finishes_its_pending_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    workdir = tmp_path / "run"
    process = start("experiments.train", *options(small(workdir, epochs=100_000)), cwd=tmp_path)
    until = time.monotonic() + 200
    while not (workdir / "checkpoints" / "3").is_dir():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(number)
    ended = end_of(process)
    assert ended.code == CODES[number]
    assert re.fullmatch("interrupted by SIGTERM; the same command .*\n", ended.err), ended.err
    checkpoints = checkpoint_epochs(workdir / "checkpoints")
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == set(map(str, checkpoints))
    assert len(metrics(workdir)) - max(checkpoints) in (0, 1)


# --- outputs that nobody reads


@pytest.mark.parametrize("end", ["", "raise SystemExit"])
@pytest.mark.parametrize("printed", ["print('line ' * 20)", "make_console().print('line ' * 20)"])
def test_an_output_that_is_closed_ends_the_command_quietly(
    run: Start, printed: str, end: str
) -> None:
    program = f"""
import time
from experiments.runs import cli
from experiments.runs.console import make_console

def main():
    print("ready", flush=True)
    time.sleep(0.3)
    {printed}
    {end}

cli.run(main)
"""
    process = run("-c", program)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait()) == ("", 141)
