"""A short form of `python -m tests.faults`."""

import importlib.util
import sys
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("faults", Path(__file__).parents[1] / "faults.py")
assert SPEC is not None
assert SPEC.loader is not None
faults = importlib.util.module_from_spec(SPEC)
sys.modules["faults"] = faults
SPEC.loader.exec_module(faults)


@pytest.mark.slow
def test_after_every_kind_of_fault_a_run_ends_as_it_would_have_or_says_why(tmp_path: Path) -> None:
    series = faults.Faults(tmp_path, seed=1)
    for number, kind in enumerate(faults.KINDS):
        series.round(number, kind)
    assert series.failures == []
    assert sum(series.counts.values()) == len(faults.KINDS)
    assert sum(n for (_, end), n in series.counts.items() if end == "the undisturbed end") >= 4
