"""A disk that fills up: one line, and what was whole is kept."""

import errno
import re
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from runs import assert_same_end, end_of, finished, options, small, start, train

from ktg_jax.io.files import naming, write_text
from ktg_jax.training.checkpoint_reading import read_nodes

pytestmark = pytest.mark.slow

LONG: dict[str, Any] = {"models": ("cnn", "tiny"), "epochs": 30}
SMALLER_THAN_A_CHECKPOINT = 50_000  # bytes, and more than any other file has


def is_there(path: Path) -> bool:
    until = time.monotonic() + 200
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.002)
    return True


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_checkpoint_that_cannot_be_written_is_one_line(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, epoch: int
) -> None:
    workdir = tmp_path / "run"
    command = options(small(workdir, **LONG))
    process = start("experiments.train", *command, cwd=tmp_path, cache=tmp_path / "cache")
    # As on a full disk, writing fails, but for this process alone.
    assert is_there(workdir / "checkpoints" / (str(epoch) if epoch else ""))
    size = SMALLER_THAN_A_CHECKPOINT
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    ended = end_of(process)
    assert ended.code == 1
    assert re.fullmatch(
        f"failed: a checkpoint in {workdir}/checkpoints cannot be written .File too large.; .*\n",
        ended.err,
    ), ended.err
    if epoch:
        assert read_nodes(workdir / "checkpoints")[0] >= epoch
    train(workdir, **LONG)  # with room again
    assert_same_end(workdir, finished(tmp_path_factory, "full", **LONG))
    assert not list(workdir.rglob("*tmp*"))


def test_what_the_system_refuses_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "result.json"
    path.write_text("former")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
            write_text(path, "new")
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="'another'"), naming(path):
        raise OSError(errno.ENOSPC, "No space left on device", "another")
