"""How commands end."""

import subprocess
import sys

from runs import in_process

SECONDS = 60

DROPS_AN_INTERRUPT = """
import signal, time
from experiments import cli

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
