"""What is installed: one name, with the commands in it, and they work away from the checkout."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from runs import ROOT

from experiments import __main__ as commands

SHORT = ("--train-limit", "120", "--epochs", "1", "--batch-size", "32")
SMALL = ("--image-size", "8", *SHORT)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    checkout = folder / "checkout"  # a build leaves files behind
    checkout.mkdir()
    for name in ("ktg_jax", "experiments", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (checkout / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder)]
    subprocess.run([*command, str(checkout)], check=True)
    (found,) = folder.glob("*.whl")
    return found


def modules(folder: Path) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in folder.rglob("*.py")}


@pytest.mark.slow
def test_it_has_one_name_and_every_module(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in names} == {"ktg_jax"}
    # Scripts of results are no part of the package.
    commands = {f"ktg_jax/{n}" for n in modules(ROOT / "experiments") if "/results/" not in n}
    assert {name for name in names if name.endswith(".py")} == modules(ROOT / "ktg_jax") | commands
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "ktg_jax/cpu/src").iterdir()}
    assert sources | {"ktg_jax/experiments/report/page.html.jinja"} <= names


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of an environment in which there is the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    wanted = f"{wheel}[search]"
    subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", wanted], check=True)
    return folder / "bin"


@pytest.mark.slow
def test_all_commands_work_where_it_is_installed(installed: Path, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"COLUMNS": "80", "JAX_NUM_CPU_DEVICES": "1"}

    def ktg(*words: str) -> str:
        ran = subprocess.run(
            [installed / "ktg", *words], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert (ran.returncode, ran.stderr) == (0, ""), (words, ran.stdout)
        return ran.stdout

    nodes = ("--models", "cnn", "cnn")
    assert "test" in ktg("train", *nodes, *SMALL, "--workdir", "run")
    assert "ensemble" in ktg("evaluate", "run")
    assert "Complete" in ktg("record", "run", "--out", "recorded")
    space = (
        "--target",
        "cnn",
        "--candidates",
        "cnn",
        "--nodes",
        "2",
        "--trials",
        "2",
        "--no-baselines",
    )
    ending = ("--retrain-top", "1", "--retrain-seeds", "1", "--workers", "1")
    said = ktg("search", *space, *ending, *SMALL, "--workdir", "search")
    assert "ktg report search makes the report." in " ".join(said.split()).replace(
        f"{tmp_path}/", ""
    )
    ktg("report", "search")
    page = (tmp_path / "search/report.html").read_text()
    assert "<span>ktg</span> <span>search</span>" in page
    assert "<span>ktg</span> <span>train</span>" in page
    assert "test" in ktg("train", "--graph", "search", *SMALL, "--workdir", "found")
    fit = ("--teacher", "run", "--fit-steps", "2")
    ktg("represent", "--student", "cnn", *fit, *SMALL, "--workdir", "represented")
    arms = ("--teacher", "run", "--students", "cnn", "--arms", "plain", "select")
    ktg(
        "ablation",
        *arms,
        "--learning-rates",
        "0.1",
        "--seeds",
        "1",
        "--fit-steps",
        "2",
        *SMALL,
        "--workdir",
        "ablated",
    )
    for name in commands.COMMANDS:
        said = ktg(name, "--help")
        assert said.startswith(f"usage: ktg {name} [-h]")
        assert f"\n  ktg {name} " in said.partition("Examples:")[2]
        assert "python -m" not in said


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_without_a_command_they_are_listed() -> None:
    listed = run()
    assert (listed.returncode, listed.stderr) == (0, "")
    assert listed.stdout == run("--help").stdout
    assert all(f"\n  {name} " in listed.stdout for name in commands.COMMANDS)
    assert run("--version").stdout == "ktg_jax 0.1.0\n"


def test_a_command_is_run_by_its_name() -> None:
    ran = run("evaluate", "no such run")
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: workdir: got 'no such run'; allowed: the folder of a run")


@pytest.mark.parametrize("word", ["trian", "--verbose", "experiments"])
def test_no_other_word_is_one(word: str) -> None:
    ran = run(word)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"error: command: got {word!r}; allowed: train, evaluate, record")
    assert ran.stderr.count("\n") == 1
