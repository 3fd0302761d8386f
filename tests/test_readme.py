"""What the documents say is run, and every public name has an example."""

import dataclasses
import inspect
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import ktg_jax as ktg
from experiments import record
from experiments.ablation import config as ablating
from experiments.evaluate import EvaluateConfig
from experiments.represent import config as representing
from experiments.runs import config
from experiments.runs.command_line import parse
from experiments.search import config as searching

ROOT = Path(__file__).parent.parent
DOCUMENTS = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("experiments", "graphs", "search", "design", "devices", "streams")
    ),
)


def blocks(language: str) -> list[Any]:
    found = []
    for document in DOCUMENTS:
        for number, block in enumerate(
            re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.S | re.M)
        ):
            found.append(pytest.param(block, id=f"{document.name}-{number}"))
    assert found
    return found


@pytest.mark.parametrize("snippet", blocks("python"))
def test_python_snippets_run(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "import torch" in snippet:
        pytest.importorskip("torch", reason='needs: pip install "ktg_jax[reference]"')
    monkeypatch.chdir(tmp_path)
    fns = ktg.build_model("cnn", num_classes=10)
    params, model_state = fns.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    ktg.save_node(
        "teacher.safetensors",
        params,
        model_state,
        model="cnn",
        num_classes=10,
        image_shape=(8, 8, 1),
    )
    exec(compile(snippet, "snippet", "exec"), {})


COMMANDS: dict[str, Callable[[list[str]], object]] = {
    "train": lambda words: config.check(parse(config.TrainConfig, words)),
    "evaluate": lambda words: parse(EvaluateConfig, words),
    "record": lambda words: record.check(parse(record.RecordConfig, words)),
    "represent": lambda words: representing.check(parse(representing.RepresentConfig, words)),
    "search": lambda words: _check_search(parse(searching.SearchConfig, words)),
    "ablation": lambda words: ablating.check(parse(ablating.AblationConfig, words)),
}


def _check_search(search: searching.SearchConfig) -> None:
    """Checks all but the files of teachers, which are not there."""
    assert len(search.teacher_inputs) in (0, 1, len(search.teachers))
    searching.check(dataclasses.replace(search, teachers=(), teacher_inputs=()))


def commands() -> list[str]:
    shell = "\n".join(block.values[0] for block in blocks("bash")).replace("\\\n", " ")
    lines = [line.split("&&")[-1].strip() for line in shell.splitlines()]
    prefixes = tuple(f"python -m experiments.{name}" for name in COMMANDS)
    found = [line for line in lines if line.startswith(prefixes)]
    assert all(any(line.startswith(prefix) for line in found) for prefix in prefixes)
    return found


@pytest.mark.parametrize("command", commands())
def test_commands_are_accepted(command: str) -> None:
    module, *words = shlex.split(command)[2:]
    COMMANDS[module.removeprefix("experiments.")](words)


@pytest.mark.parametrize("text", blocks("json"))
def test_json_examples_are_graphs(text: str) -> None:
    graph = ktg.Graph.from_json(text)
    assert json.loads(graph.to_json()) == json.loads(text)


@pytest.mark.parametrize("name", sorted(ktg.__all__))
def test_every_public_function_has_an_example(name: str) -> None:
    thing = getattr(ktg, name)
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        pytest.skip("not a function")
    assert ">>>" in (thing.__doc__ or "")


def test_local_links_lead_somewhere() -> None:
    for document in (*DOCUMENTS, ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r'\]\((?!http)([^)#]+)\)|src="([^"]+)"', document.read_text()):
            assert (document.parent / "".join(target)).exists(), (document.name, target)
