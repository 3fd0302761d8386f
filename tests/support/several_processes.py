"""Trainings by several processes, and runs that are alike but for the rounding of sums."""

import re
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from runs import Ended, end_of, metrics, options, result, small, start

OPTIONS: dict[str, Any] = {"models": ("tiny", "tiny"), "epochs": 3, "engine": "fused"}
NOISE = re.compile(r"^(\[Gloo\]|[EWI]\d{4} ).*\n", re.MULTILINE)
"""What XLA says by itself."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def started(
    number: int, workdir: Path, cwd: Path, devices: int = 2, **changes: Any
) -> list[subprocess.Popen[str]]:
    """As many processes, each with so many devices."""
    config = small(workdir, **OPTIONS | {"engine": "auto"} | changes)
    where = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", str(number)]
    return [
        start(
            "experiments.train",
            *options(config),
            *where,
            *("--process-id", str(i)),
            cwd=cwd,
            devices=devices,
            cache=cwd / "cache",
        )
        for i in range(number)
    ]


def ends_of(processes: Sequence[subprocess.Popen[str]]) -> list[Ended]:
    ended = [end_of(process) for process in processes]
    return [Ended(e.code, NOISE.sub("", e.out), NOISE.sub("", e.err)) for e in ended]


def assert_alike(workdir: Path, other: Path) -> None:
    """Two runs of one configuration, to the rounding of sums."""
    for ours, theirs in zip(metrics(workdir), metrics(other), strict=True):
        for a, b in zip(ours["nodes"], theirs["nodes"], strict=True):
            for key in ("train_loss", "train_accuracy", "val_loss", "edge_losses"):
                np.testing.assert_allclose(a[key], b[key], rtol=2e-3, atol=1e-4)
    found, wanted = (result(each)["target"]["test_loss"] for each in (workdir, other))
    np.testing.assert_allclose(found, wanted, rtol=2e-3)
