"""What importing the library brings with it, and which way its imports point."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
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


def test_the_library_draws_no_progress_and_names_no_option_of_a_command() -> None:
    for path in ROOT.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) (rich|tqdm|tyro)\b", text, re.MULTILINE), path
        assert not re.search(r"(?<![-\w])--[a-z]", text), path


LAYERS = (
    ("errors", "checks", "cpu", "io"),
    (
        "inputs",
        "gates",
        "losses",
        "chunks",
        "means",
        "mixed",
        "distillation_losses",
        "relational_losses",
        "stage_losses",
        "outputs",
        "connectors",
        "edge_loss",
        "built_in_losses",
        "named_losses",
        "edge_arrays",
        "gated_weights",
        "transfer",
    ),
    ("graph",),
    ("models",),
    ("choices", "space", "data", "recording"),
    ("training",),
    ("priors",),
    ("mpl", "curves", "draw"),
)
"""The parts of the library, lower ones first; those of one layer may know each other."""


CHECKOUT = ROOT.parent
MODULES = {
    ".".join(path.relative_to(CHECKOUT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("ktg_jax", "experiments", "benchmarks")
    for path in sorted((CHECKOUT / package).rglob("*.py"))
}


def imported(module: str) -> Iterator[str]:
    """The modules of the checkout that a module imports, also where it does so late."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            source = importlib.util.resolve_name(name, package)
            # A submodule, or else what the package itself says.
            names = [f"{source}.{n.name}" for n in node.names]
            names = [name if name in MODULES else source for name in names]
        elif isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        yield from (name for name in names if name in MODULES and name != module)


def test_no_imports_go_round_in_a_circle() -> None:
    graph = {module: set(imported(module)) for module in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


@pytest.mark.parametrize("part", [part for layer in LAYERS for part in layer])
def test_a_layer_knows_nothing_of_higher_ones(part: str) -> None:
    level = next(i for i, layer in enumerate(LAYERS) if part in layer)
    known = {f"ktg_jax.{name}" for layer in LAYERS[: level + 1] for name in layer}
    for module, path in MODULES.items():
        is_of_part = ".".join(module.split(".")[:2]) == f"ktg_jax.{part}"
        if is_of_part and path.name != "__main__.py":
            assert {".".join(name.split(".")[:2]) for name in imported(module)} <= known, module


EXPERIMENTS = (
    ("runs",),
    ("train", "evaluate", "record"),
    ("comparison", "represent"),
    ("search", "ablation"),
    ("report",),
)
"""The parts of the experiments, in the same way."""


@pytest.mark.parametrize("part", [part for layer in EXPERIMENTS for part in layer])
def test_an_experiment_knows_nothing_of_those_built_on_it(part: str) -> None:
    level = next(i for i, layer in enumerate(EXPERIMENTS) if part in layer)
    known = {f"experiments.{name}" for layer in EXPERIMENTS[:level] for name in layer}
    for module in MODULES:
        if ".".join(module.split(".")[:2]) == f"experiments.{part}":
            parts = {".".join(name.split(".")[:2]) for name in imported(module)}
            of_experiments = {name for name in parts if name.startswith("experiments")}
            assert of_experiments <= known | {f"experiments.{part}"}, module


def test_the_library_knows_no_experiments_and_neither_knows_the_benchmarks() -> None:
    for module in MODULES:
        top = module.partition(".")[0]
        allowed = {"ktg_jax": ("ktg_jax",), "experiments": ("ktg_jax", "experiments")}.get(top)
        assert allowed is None or all(n.partition(".")[0] in allowed for n in imported(module))


def test_training_loads_neither_optuna_nor_the_search() -> None:
    code = "import sys, experiments.train, experiments.evaluate; print(*sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    loaded = ran.stdout.split()
    assert [n for n in ("optuna", "sqlalchemy", "experiments.search") if n in loaded] == []


def test_every_part_of_the_library_has_its_layer() -> None:
    modules = {path.stem for path in ROOT.glob("*.py")} - {"__init__"}
    parts = modules | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert parts == {part for layer in LAYERS for part in layer}
