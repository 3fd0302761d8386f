"""The benchmark of a device: it compares, it times in turns, and it ends in time."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import accelerator, device_cases
from benchmarks.agreement import Check, checks, relative_error
from benchmarks.device_cases import Torch, variants_of
from benchmarks.task import Task, Variant
from ktg_jax.errors import RunError

pytestmark = pytest.mark.slow
TINY = ("--graphs", "resnet8+resnet8", "--image-size", "8", "--batch-sizes", "8", "--rounds", "2")


def test_a_cpu_agrees_with_itself() -> None:
    found = {(check.what, check.precision): check for check in checks(jax.devices("cpu")[0])}
    assert [check for check in found.values() if not check.passed] == []
    assert {"float32", "default", "bfloat16"} == {precision for _, precision in found}
    rounded = found["update of four steps, fused", "bfloat16"]
    assert rounded.error > 1e-3  # what is compared is not the same computation


def test_an_error_is_relative_to_what_is_expected_and_nan_does_not_pass() -> None:
    assert relative_error([np.array([0.0, 5.0])], [np.array([0.0, 4.0])]) == 0.25
    assert Check("", "float32", 0.1, 0.1).passed
    assert not Check("", "float32", 0.2, 0.1).passed
    assert not Check("", "float32", float("nan"), 0.1).passed


def test_steps_are_timed_in_all_variants_beside_torch(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason='needs: pip install "ktg_jax[bench]"')
    file = tmp_path / "device.json"
    assert accelerator.main(["--parts", "peaks", "steps", *TINY, "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    assert content["left_out"] == []
    cases = {str(Variant(c["engine"], c["precision"], c["steps"])): c for c in content["cases"]}
    assert set(cases) == set(map(str, variants_of(["resnet8"] * 2, "cpu")))
    assert all(case["step_s"] > 0 and case["ready_s"] > 0 for case in cases.values())
    product = cases["fused float32"]["flops"] / cases["fused float32"]["step_s"]
    expected = product / content["peaks"]["float32"]
    assert cases["fused float32"]["share_of_product"] == pytest.approx(expected)


def test_a_variant_with_other_losses_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = device_cases.make_ready

    def off(task: Task, variant: Variant, *rest: Any) -> Any:
        ready = made(task, variant, *rest)
        wrong = variant.engine == "per_node"
        return ready._replace(losses=[1.1 * loss for loss in ready.losses]) if wrong else ready

    monkeypatch.setattr(device_cases, "make_ready", off)
    file = tmp_path / "device.json"
    variants = ("--variants", "fused float32", "per_node float32")
    assert accelerator.main(["--parts", "steps", *TINY, *variants, "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    assert [case["engine"] for case in content["cases"]] == ["fused"]
    (left_out,) = content["left_out"]
    assert left_out["what"].endswith("per_node float32")
    assert left_out["why"] == "its losses are off by 0.1"


def test_no_case_begins_when_time_is_up(tmp_path: Path) -> None:
    file = tmp_path / "device.json"
    arguments = ["--parts", "steps", *TINY, "--minutes", "0.2", "--json", str(file)]
    assert accelerator.main(arguments) == 0
    content = json.loads(file.read_text())
    assert content["cases"] == []
    assert [each["why"] for each in content["left_out"]] == ["no time left"]


def test_a_variant_that_fails_in_its_turn_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_turn, turns = device_cases.turn, 0

    def failing(ready: Any, calls: int) -> float:
        nonlocal turns
        is_that = ready.variant.engine == "per_node"
        turns += is_that
        if is_that and turns == 4:  # amid the rounds
            raise RunError("an illegal memory access")
        return take_turn(ready, calls)

    monkeypatch.setattr(device_cases, "turn", failing)
    file = tmp_path / "device.json"
    variants = ("--variants", "fused float32", "per_node float32")
    assert accelerator.main(["--parts", "steps", *TINY, *variants, "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    assert [case["engine"] for case in content["cases"]] == ["fused"]
    (left_out,) = content["left_out"]
    assert left_out["what"].endswith("per_node float32")
    assert left_out["why"] == "an illegal memory access"


def test_torch_says_what_it_cannot_do() -> None:
    pytest.importorskip("torch", reason='needs: pip install "ktg_jax[bench]"')
    with Torch() as torch:
        for _ in range(2):  # it goes on after an error
            torch.ask({"turn": Variant("eager"), "calls": 1})
            with pytest.raises(RunError, match="KeyError"):
                torch.answer(120)
        with pytest.raises(RunError, match="no time left"):
            torch.answer(0.1)
        torch.ask({"turn": Variant("eager"), "calls": 1})
        with pytest.raises(RunError):
            torch.answer(10)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--graphs", "resnet9"], "resnet9"),
        (["--batch-sizes", "0"], "batch_sizes: got 0; allowed: at least 1"),
        (["--variants", "fused tf33"], "variants: got 'fused tf33'; allowed: eager float32"),
        (["--rounds", "-1"], "rounds: got -1; allowed: at least 1"),
        (["--minutes", "0"], "minutes: got 0.0; allowed: above 0"),
        (["--json", "/nowhere/device.json"], "json: got '/nowhere/device.json'"),
    ],
)
def test_bad_input_is_named_before_anything_is_computed(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert accelerator.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_case_that_fails_does_not_keep_others_from_being_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(task: Task) -> Any:
        raise ValueError(task.graph)

    monkeypatch.setattr(device_cases, "initial_state", fail)
    file = tmp_path / "device.json"
    arguments = ["--parts", "steps", "--graphs", "resnet8", "resnet14", "--json", str(file)]
    assert accelerator.main(arguments) == 1
    said = [each["why"] for each in json.loads(file.read_text())["left_out"]]
    assert said == ["it failed: ValueError('resnet8')", "it failed: ValueError('resnet14')"]
