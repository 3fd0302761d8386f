"""What importing the library brings with it, and which way its imports point."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ktg_jax

ROOT = Path(ktg_jax.__file__).parent

HEAVY = (
    *("orbax", "matplotlib", "tensorflow_datasets", "tensorflow", "sklearn", "optuna", "scipy"),
    *("rich.progress", "tqdm", "tyro", "PIL"),
)


def test_the_library_is_imported_without_what_only_some_need() -> None:
    code = "import sys, ktg_jax; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "jax" in ran.stdout.split()
    assert [name for name in HEAVY if name in ran.stdout.split()] == []


LAYERS = (
    ("errors", "cpu", "io"),
    ("gates", "losses", "stage_losses", "outputs", "named_losses", "transfer"),
    ("graph",),
    ("models",),
    ("space", "data"),
    ("training",),
    ("priors",),
    ("mpl", "curves", "draw"),
)
"""The parts of the library, lower ones first; those of one layer may know each other."""


def imported(path: Path) -> set[str]:
    """The parts of the library that a module imports, also where it does so late."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{name.name}" for name in node.names]
        elif isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        parts = [name.split(".") for name in names]
        found |= {part[1] for part in parts if part[0] == "ktg_jax" and len(part) > 1}
        assert not any(part[0] == "experiments" for part in parts), path
    return found


@pytest.mark.parametrize("part", [part for layer in LAYERS for part in layer])
def test_a_layer_knows_nothing_of_higher_ones(part: str) -> None:
    level = next(i for i, layer in enumerate(LAYERS) if part in layer)
    known = {name for layer in LAYERS[: level + 1] for name in layer}
    files = sorted((ROOT / part).rglob("*.py")) or [ROOT / f"{part}.py"]
    for path in files:
        if path.name != "__main__.py":
            assert imported(path) <= known, path


def test_every_part_of_the_library_has_its_layer() -> None:
    modules = {path.stem for path in ROOT.glob("*.py")} - {"__init__"}
    parts = modules | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert parts == {part for layer in LAYERS for part in layer}
