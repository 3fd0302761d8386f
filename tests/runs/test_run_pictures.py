"""Pictures, evaluations and TensorBoard at the end of a training: none of them costs its result."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT, in_process, options, result, small, train

import experiments.train as command
from ktg_jax.errors import RunError

pytestmark = pytest.mark.slow

PICTURES = ("curves.png", "curves.svg", "graph.png", "graph.svg")
ONE: dict[str, Any] = {"models": ("tiny",), "graph": "independent", "epochs": 1}
DRAWS = """
from ktg_jax.draw import draw_graph
import ktg_jax as ktg, matplotlib, os
draw_graph(ktg.graphs.mutual(["cnn", "cnn"]), ["graph.svg", "graph.png"])
print(matplotlib.rcParams["backend"])
print(os.environ["MPLBACKEND"])
"""


@pytest.mark.parametrize(
    "backend", ["module://matplotlib_inline.backend_inline", "nonsense", "", "svg"]
)
def test_pictures_are_drawn_whatever_the_backend(tmp_path: Path, backend: str) -> None:
    (tmp_path / "matplotlibrc").write_text("backend: nonsense\nfont.size: big\nno colon\n")
    ended = subprocess.run(
        [sys.executable, "-c", DRAWS],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": backend, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    found, environment, _ = ended.stdout.lower().split("\n")
    assert environment == backend
    assert found == "svg" or backend != "svg"  # the user's own figures go on to use it
    assert (tmp_path / "graph.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "graph.svg").read_text()


def test_matplotlib_is_imported_in_one_place() -> None:
    importing = re.compile(r"^\s*(import|from) matplotlib\b", re.MULTILINE)
    packages = [ROOT / name for name in ("ktg_jax", "experiments", "benchmarks")]
    sources = [path for package in packages for path in package.rglob("*.py")]
    assert [p.name for p in sources if importing.search(p.read_text())] == ["mpl.py"]


@pytest.mark.parametrize("error", [ValueError("no such font [a/b]"), OSError(28, "No space left")])
def test_a_picture_that_fails_costs_one_line_and_is_drawn_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    workdir = tmp_path / "run"
    words = options(small(workdir, **ONE))

    def fails(*arguments: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("ktg_jax.draw.draw_curves", fails)
        ended = in_process(command.main, *words)
    assert (ended.code, ended.err) == (0, "")
    (line,) = (line for line in ended.out.splitlines() if "is not drawn" in line)
    assert line.startswith(f"{workdir / 'curves.png'} is not drawn: ")
    assert str(error) in line
    trained = result(workdir)
    assert trained["epochs"] == 1
    assert f"{100 * trained['target']['test_accuracy']:.2f} %" in ended.out
    assert drawn(workdir) == ["graph.png", "graph.svg"]

    again = in_process(command.main, *words)
    assert again.code == 0
    assert "is finished; nothing to do" in again.out
    assert drawn(workdir) == list(PICTURES)
    assert result(workdir) == trained


def drawn(workdir: Path) -> list[str]:
    return [name for name in PICTURES if (workdir / name).is_file()]


def test_curves_that_cannot_be_drawn_meanwhile_are_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def fails(records: list[Any], path: Path) -> None:
        tried.append(len(records))
        raise ValueError("no font")

    monkeypatch.setattr(command, "_REDRAW_SECONDS", 0)
    monkeypatch.setattr("ktg_jax.draw.draw_curves", fails)
    said = train(tmp_path / "run", **ONE | {"epochs": 3})
    assert tried == [1, 3]  # and once more with the result
    assert said.count("is not drawn") == 2
    assert result(tmp_path / "run")["epochs"] == 3


def test_an_evaluation_that_fails_at_the_end_keeps_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> Any:
        raise MemoryError("RESOURCE_EXHAUSTED: out of memory\nand more")

    with monkeypatch.context() as patched:
        patched.setattr("experiments.runs.assemble.Run.evaluate_val_and_test", fails)
        with pytest.raises(RunError) as raised:
            train(tmp_path / "run", **ONE)
    assert str(raised.value) == (
        "the trained networks cannot be evaluated (RESOURCE_EXHAUSTED: out of memory); they are "
        "kept, and the same command evaluates them again"
    )
    assert not (tmp_path / "run" / "result.json").exists()
    assert "Resuming after epoch 1 of 1" in train(tmp_path / "run", **ONE)
    assert result(tmp_path / "run")["epochs"] == 1


@pytest.mark.parametrize("method", ["__init__", "add_scalar", "flush", "close"])
def test_tensorboard_files_that_cannot_be_written_cost_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    tensorboard = pytest.importorskip("tensorboardX")

    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorboard.SummaryWriter, method, full)
    said = train(tmp_path / "run", **ONE | {"epochs": 2, "tensorboard": True})
    (line,) = (line for line in said.splitlines() if "No space left on device" in line)
    assert line.startswith(f"{tmp_path / 'run' / 'tensorboard'} is not written any more: ")
    assert result(tmp_path / "run")["epochs"] == 2


def test_a_tensorboard_that_cannot_be_imported_is_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken").mkdir()
    broken = "raise TypeError('Descriptors cannot be created directly.\\nMore')"
    (tmp_path / "broken" / "tensorboardX.py").write_text(broken)
    monkeypatch.delitem(sys.modules, "tensorboardX", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "broken")
    ended = in_process(command.main, *options(small(tmp_path / "run", tensorboard=True, **ONE)))
    assert ended.code == 2
    assert ended.err.startswith("error: tensorboard: got True; allowed: ")
    assert ended.err.endswith("(Descriptors cannot be created directly.)\n")
    assert not (tmp_path / "run").exists()
