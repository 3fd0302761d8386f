"""The benchmark of streams, on little data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT


@pytest.mark.slow
def test_all_parts_have_their_figures(tmp_path: Path) -> None:
    few = ["--batches", "6", "--rounds", "1", "--workers", "0", "1", "--images", "300", "4000"]
    command = [sys.executable, "-m", "benchmarks.streams", *few, "--json", str(tmp_path / "a.json")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "a.json").read_text())
    assert [(row["pictures"], row["workers"]) for row in found["loader"]] == [
        (pictures, workers) for pictures in ("small", "photographs") for workers in (0, 1)
    ]
    small, photographs = found["loader"][0], found["loader"][2]
    assert small["images_per_second"] > 2 * photographs["images_per_second"] > 0
    assert found["waiting"][0] == {**found["waiting"][0], "images": "memory", "waiting": 0}
    assert all(0 <= row["waiting"] < 1 < row["step_ms"] for row in found["waiting"])
    assert [(row["images"], row["decoded"]) for row in found["memory"]] == [
        (300, "3.5 MiB"),
        (4000, "46.9 MiB"),
    ]
    assert "photographs" in ended.stdout
