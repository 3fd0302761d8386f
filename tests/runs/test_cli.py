"""How commands end."""

import logging
import subprocess
import sys

import pytest
from runs import in_process

SECONDS = 60

DROPS_AN_INTERRUPT = """
import signal, time
from experiments.runs import cli

class Deaf:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)  # Python cannot raise from here

def main():
    Deaf()
    time.sleep(10)
    print("went on")

cli.run(main, "interrupted; that is all")
"""


def test_an_interrupt_that_python_drops_is_not_lost() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", DROPS_AN_INTERRUPT], capture_output=True, text=True, timeout=SECONDS
    )
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == "interrupted; that is all\n"


def test_other_errors_that_cannot_be_raised_are_still_shown() -> None:
    program = DROPS_AN_INTERRUPT.replace("signal.raise_signal(signal.SIGINT)", "1 / 0")
    program = program.replace("time.sleep(10)", "pass")
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS
    )
    assert (ended.returncode, ended.stdout) == (0, "went on\n")
    assert "ZeroDivisionError" in ended.stderr


def test_what_the_system_refuses_is_one_line() -> None:
    def main() -> None:
        raise OSError(28, "No space left on device", "run/metrics.jsonl")

    ended = in_process(main)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err == "failed: [Errno 28] No space left on device: 'run/metrics.jsonl'\n"


def test_a_warning_of_the_library_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("ktg_jax.data.npz")
    ended = in_process(lambda: logger.warning("arrays that are not used: %s", "mean\nof all"))
    assert (ended.code, ended.out) == (0, "")
    assert ended.err == "warning: arrays that are not used: mean of all\n"
    logger.warning("said to whom the program has chosen")
    assert [record.getMessage() for record in caplog.records] == [
        "said to whom the program has chosen"
    ]
