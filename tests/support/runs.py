"""Small runs for tests: the real command in a process of its own, and the same in this one."""

import atexit
import dataclasses
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from experiments.runs import cli
from experiments.runs.config import TrainConfig
from experiments.runs.options import Training
from experiments.train import train as train_config
from ktg_jax.io.files import cache_folder
from ktg_jax.io.trees import FlatTree, flatten

ROOT = Path(__file__).parents[2]
TIMES = ("seconds", "images_per_second")
"""What no two runs have in common."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@contextmanager
def compiled_once() -> Iterator[None]:
    """Within it, a program that was compiled in the session before is not compiled again."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    compilation_cache.set_cache_dir(_cache_folder())
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


@functools.cache
def _cache_folder() -> str:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def own_cache(home: Path) -> Path:
    """A cache folder in which only the native operations are there already."""
    native = cache_folder() / "native"
    native.mkdir(parents=True, exist_ok=True)
    (home / "native").symlink_to(native)
    return home


def small(workdir: str | Path, **changes: Any) -> TrainConfig:
    """A run of two tiny networks that takes seconds, with its workdir."""
    defaults: dict[str, Any] = {
        "models": ("tiny", "tiny"),
        "imports": ("tiny_models",),
        "train_limit": 200,
        "epochs": 3,
        "batch_size": 32,
    }
    return TrainConfig(**defaults | {"workdir": str(workdir)} | changes)


def train(workdir: str | Path, **changes: Any) -> str:
    """Trains such a run in this process; returns what it says."""
    text = io.StringIO()
    with compiled_once():
        train_config(small(workdir, **changes), Console(file=text))
    return text.getvalue()


def finished(factory: pytest.TempPathFactory, name: str, **changes: Any) -> Path:
    """A finished run that all tests of a session share, to be read only."""
    workdir = factory.getbasetemp() / "shared" / name
    train(workdir, **changes)
    return workdir


def options(config: Training) -> list[str]:
    """The command line of a configuration."""
    words: list[str] = []
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), field.name.replace("_", "-")
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            several = isinstance(value, tuple)
            words += [f"--{flag}", *map(str, value if several else [value])]
    return words


def in_process(main: Callable[[], None], *arguments: str | Path) -> Ended:
    """Runs a command's main function as its module does."""
    out, err = io.StringIO(), io.StringIO()
    with (
        compiled_once(),
        mock.patch.object(sys, "argv", ["command", *map(str, arguments)]),
        # The command leaves a folder that the environment names, and all that goes with it, alone.
        mock.patch.dict(os.environ, {"JAX_COMPILATION_CACHE_DIR": _cache_folder()}),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        cli.run(main)
    assert isinstance(ended.value.code, int)
    return Ended(ended.value.code, out.getvalue(), err.getvalue())


def start(
    module: str, *arguments: str | Path, cwd: Path, devices: int = 2, cache: Path | None = None
) -> subprocess.Popen[str]:
    """Starts `python -m module`; two devices are what this process has.

    Processes with the same `cache` compile their programs only once.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    env = {**os.environ, "PYTHONPATH": path, "JAX_NUM_CPU_DEVICES": str(devices)}
    if cache is not None:
        env["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_of(process: subprocess.Popen[str]) -> Ended:
    """Waits for a started command."""
    out, err = process.communicate(timeout=300)
    return Ended(process.returncode, out, err)


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without times."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [without_times(json.loads(line)) for line in lines]


def result(workdir: Path) -> dict[str, Any]:
    """The content of result.json, without times."""
    return without_times(json.loads((workdir / "result.json").read_text()))


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in TIMES}


def saved_state(workdir: Path, epoch: int) -> FlatTree:
    """Everything of a checkpoint, optimisers included, as it is on disk."""
    folder = workdir / "checkpoints" / str(epoch)
    with ocp.PyTreeCheckpointer() as reader:
        return flatten({item: reader.restore(folder / item) for item in ("nodes", "training")})


def assert_same_arrays(a: FlatTree, b: FlatTree) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name, array in a.items():
        assert array.dtype == b[name].dtype, name
        np.testing.assert_array_equal(array, b[name], err_msg=name)


def assert_same_end(workdir: Path, other: Path) -> None:
    """Two runs of one configuration ended alike, bit for bit."""
    assert metrics(workdir) == metrics(other)
    assert result(workdir) == result(other)
    epoch = result(workdir)["epochs"]
    assert_same_arrays(saved_state(workdir, epoch), saved_state(other, epoch))
