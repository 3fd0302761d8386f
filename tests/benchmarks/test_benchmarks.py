"""The benchmarks measure the same thing on both sides, in turns, and say what they found."""

import doctest
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from runs import Ended, in_process

import ktg_jax as ktg
from benchmarks import agreement, device_peaks, loop, measure, recorded, report, step, task
from benchmarks import compile as compile_module
from benchmarks.flops import Layer, layers, train_step_flops
from benchmarks.machine import machine
from benchmarks.measure import Spread, Worker, check_same_losses, interleaved, spread
from benchmarks.ours import initial_state
from benchmarks.task import LEARNING_RATE, PROGRESS, Task, Unavailable
from ktg_jax.errors import InputError, RunError
from ktg_jax.io.trees import flatten

pytestmark = pytest.mark.slow
TINY = Task("xla", ("resnet8", "wrn10_2"), batch_size=8, image_shape=(8, 8, 3), num_classes=5)


# ------------------------------------------------------------------------------- the baseline


@pytest.fixture(scope="module")
def torch_baseline() -> Any:
    pytest.importorskip("torch", reason='needs: pip install "ktg_jax[bench]"')
    from benchmarks import torch_baseline

    return torch_baseline


def test_the_baseline_trains_as_ours_from_the_same_weights(torch_baseline: Any) -> None:
    graph, optimizer = ktg.graphs.mutual(TINY.models), ktg.sgd(LEARNING_RATE)
    node_fns = [ktg.build_model(model, TINY.num_classes) for model in TINY.models]
    state = initial_state(TINY, node_fns, optimizer)
    networks = [
        torch_baseline.build(model, flatten({"params": params, **stats}))
        for model, params, stats in zip(TINY.models, state.params, state.model_state, strict=True)
    ]
    through = [[gate == "through" for gate in row] for row in graph.gates]
    trainer = torch_baseline.Trainer(networks, through, LEARNING_RATE)
    images, labels = TINY.batch()
    batch = torch_baseline.to_nchw(images), torch_baseline.torch.tensor(labels).long()
    assert batch[0].is_contiguous(memory_format=torch_baseline.torch.channels_last)
    assert networks[0].stem_conv.weight.is_contiguous(
        memory_format=torch_baseline.torch.channels_last
    )

    @jax.jit
    def train(state: ktg.GraphState) -> Any:
        return ktg.train_step(
            state,
            jnp.asarray(images),
            jnp.asarray(labels),
            graph.gate_codes,
            PROGRESS,
            node_fns=node_fns,
            optimizer=optimizer,
        )

    for _ in range(3):
        state, metrics = train(state)
        np.testing.assert_allclose(metrics["loss"], trainer.step(*batch), rtol=1e-4)


def test_the_baselines_losses_follow_the_gates(torch_baseline: Any) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((2, 6, 4), np.float32), rng.integers(4, size=6)
    for gates in ((("through", "cutoff"), ("through", "through")), (("cutoff", "through"),) * 2):
        codes = np.array([[ktg.GATES.index(gate) for gate in row] for row in gates])
        tensors = [torch_baseline.torch.tensor(z) for z in logits]
        through = [[gate == "through" for gate in row] for row in gates]
        losses = torch_baseline.graph_losses(tensors, torch_baseline.torch.tensor(labels), through)
        expected = ktg.node_losses(logits, labels, codes, PROGRESS)
        np.testing.assert_allclose(expected, losses, rtol=1e-5)


# ------------------------------------------------------------------------------------ counting


def test_the_layers_of_a_network_are_counted() -> None:
    stem, *blocks, classifier = layers("resnet8", (8, 8, 3), num_classes=5)
    assert stem == Layer((3, 3, 3, 16), (8, 8, 16))
    assert classifier == Layer((64, 5), (5,))
    assert [layer.output for layer in blocks] == [
        *[(8, 8, 16)] * 2,
        *[(4, 4, 32)] * 2,
        *[(2, 2, 64)] * 2,
    ]
    assert stem.multiply_adds == 8 * 8 * 16 * 27


def test_a_training_step_is_three_forward_passes_less_the_images_gradient() -> None:
    stem = 8 * 8 * 16 * 3 * 9
    first = 2 * 8 * 8 * 16 * 16 * 9
    second = 4 * 4 * 32 * (16 + 32) * 9
    third = 2 * 2 * 64 * (32 + 64) * 9
    forward = stem + first + second + third + 64 * 5
    found = train_step_flops("resnet8", batch_size=2, image_shape=(8, 8, 3), num_classes=5)
    assert found == 2 * 2 * (3 * forward - stem)


def test_shortcuts_of_wide_networks_count_too() -> None:
    kernels = [layer.kernel for layer in layers("wrn10_2", (8, 8, 3), 5)]
    assert sorted(k[2:] for k in kernels if k[:2] == (1, 1)) == [(16, 32), (32, 64), (64, 128)]


def test_the_papers_graph_is_206_gflop_a_step() -> None:
    models = ("resnet32", "resnet110", "wrn28_2")
    total = sum(train_step_flops(model, 64, (32, 32, 3), 100) for model in models)
    assert round(total / 1e9) == 206


# ------------------------------------------------------------------------------- taking turns


def test_turns_are_interleaved_and_the_first_ones_dropped() -> None:
    order: list[str] = []

    def turn(name: str) -> int:
        order.append(name)
        return len(order)

    found = interleaved({"a": lambda: turn("a"), "b": lambda: turn("b")}, rounds=2, warm_up=1)
    assert order == ["a", "b"] * 3
    assert found == {"a": [3, 5], "b": [4, 6]}


def test_a_spread_is_the_median_between_the_quartiles() -> None:
    assert spread([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(3.0, (2.0, 4.0))
    assert spread([2.0]) == Spread(2.0, (2.0, 2.0))


@pytest.mark.parametrize("module", [measure, report, task, agreement, device_peaks])
def test_examples_are_right(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


def test_other_losses_than_the_baselines_are_an_error() -> None:
    check_same_losses({"torch": [1.0, 2.0], "xla": [1.00009, 2.0]})
    with pytest.raises(
        RunError, match=r"xla does not compute what torch does: .* 1, 2.001, not 1, 2"
    ):
        check_same_losses({"torch": [1.0, 2.0], "xla": [1.0, 2.001]})
    with pytest.raises(RunError, match="torch: losses not finite"):
        check_same_losses({"torch": [float("nan")], "xla": [float("nan")]})


def test_the_machine_is_described() -> None:
    found = machine()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["versions"]["jax"] == jax.__version__
    json.dumps(found)


# ------------------------------------------------------------------------------------- workers


def test_a_worker_that_fails_is_named_with_its_last_words() -> None:
    task = Task("xla", ("no_such_model",))
    with pytest.raises(RunError, match=r"worker xla \(no_such_model, 1 threads\): .*no_such_model"):
        Worker(task)


def test_an_implementation_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="no_such: no implementation no_such"):
        Worker(Task("no_such", ("resnet8",)))


def test_a_worker_that_dies_at_work_is_named_and_ended() -> None:
    with Worker(Task("xla", ("cnn",), batch_size=4, image_shape=(8, 8, 1))) as worker:
        assert worker.figures["ready_s"] > 0
        assert worker.ask("loop 2")["seconds"] > 0
        with pytest.raises(RunError, match=r"worker xla \(cnn, 1 threads\): .*no command jump"):
            worker.ask("jump")


# ------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def step_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Ended]:
    """A small run of the step's benchmark."""
    pytest.importorskip("torch", reason='needs: pip install "ktg_jax[bench]"')
    path = tmp_path_factory.mktemp("step") / "step.json"
    size = ["--image-size", "8", "--batch-size", "8", "--steps", "1", "--rounds", "2"]
    which = ["--cases", "resnet8+resnet8", "--implementations", "xla", "--threads", "1"]
    ended = in_process(step.main, *size, *which, "--json", path)
    assert ended.code == 0, ended.err
    return json.loads(path.read_text()), ended


def test_a_step_is_timed_beside_pytorch(step_run: tuple[dict[str, Any], Ended]) -> None:
    content, ended = step_run
    (case,) = content["cases"]
    assert (case["graph"], case["cores"], case["implementation"]) == ("resnet8+resnet8", 1, "xla")
    assert case["ratio"] == case["baseline_s"] / case["ours_s"]
    assert case["compiled_ratio"] is None
    for side in ("ours", "baseline"):
        figures = case[side]
        low, high = figures["step_quartiles_s"]
        assert 0 < low <= figures["step_s"] <= high
        assert figures["step_s"] == case[f"{side}_s"]
        assert figures["images_per_second_per_node"] == 8 / figures["step_s"]
        assert figures["flops"] == 2 * train_step_flops("resnet8", 8, (8, 8, 3), 100)
        assert figures["share_of_matmul_peak"] > 0
        assert figures["peak_memory_bytes"] > 2**20
    ours = case["ours"]
    assert min(ours["trace_s"], ours["compile_s"], ours["host_s"], ours["flops_by_compiler"]) > 0
    assert ours["ready_s"] == ours["trace_s"] + ours["compile_s"] + ours["first_step_s"]
    assert content["machine"]["matmul_peak"]["1"].keys() == {"torch", "jax"}
    assert "2 x resnet8" in ended.out


def test_recorded_teachers_are_timed_beside_live_ones(tmp_path: Path) -> None:
    path = tmp_path / "recorded.json"
    words = ("--student", "cnn", "--teachers", "cnn", "cnn+cnn", "--image-size", "8")
    ended = in_process(recorded.main, *words, "--quick", "--rounds", "1", "--json", path)
    assert ended.code == 0, ended.err
    content = json.loads(path.read_text())
    assert [case["teachers"] for case in content["cases"]] == ["cnn", "cnn+cnn"]
    for case in content["cases"]:
        assert case["alone_ratio"] == 1
        assert case["live_ratio"] == case["live_s"] / case["alone_s"] > 0
    assert "2 x cnn" in ended.out
    ended = in_process(recorded.main, "--teachers", "cn")
    assert ended.err.startswith("error: teachers: got 'cn'; allowed: models joined by +")


def test_compilation_is_timed(tmp_path: Path) -> None:
    path = tmp_path / "compile.json"
    options = ["--models", "cnn+cnn+cnn", "--implementations", "xla", "--threads", "1"]
    size = ["--image-size", "8", "--batch-size", "8", "--rounds", "1"]
    ended = in_process(compile_module.main, *options, *size, "--json", path)
    assert ended.code == 0, ended.err
    small, large = json.loads(path.read_text())["cases"]
    assert (small["nodes"], large["nodes"]) == (3, 7)
    assert small["ratio"] == 1
    assert large["ratio"] == large["ready_s"] / small["ready_s"]
    assert large["graph"] == "+".join(["cnn"] * 7)
    assert large["process_s"] > large["ready_s"] > large["compile_s"] > 0


def test_the_loop_and_the_start_are_timed(tmp_path: Path) -> None:
    options = loop.LoopOptions(str(tmp_path / "loop.json"), True, ("xla",), (1,), 1)
    jobs = [loop.Job("random", ("cnn",), (8, 8, 1), epochs=2, steps=3, images=128)]
    content = loop.measure(options, Console(file=io.StringIO()), jobs, ("--models", "cnn"))
    assert json.loads((tmp_path / "loop.json").read_text()) == content
    (case,), (found,) = content["cases"], content["starts"]
    rates = case["train_images_per_second"], case["bare_images_per_second"]
    assert case["ratio"] == rates[0] / rates[1] > 0
    assert found["first_start_s"] > 0
    assert found["second_start_s"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--cases resnet8+resnt8", "error: cases: got 'resnet8+resnt8'; allowed: models joined"),
        ("--cases cnn", "error: cases: got 'cnn'; allowed: resnet<6n+2> and"),
        ("--cases resnet8x4", "error: cases: got 'resnet8x4'; allowed: resnet<6n+2> and"),
        ("--cases resnet50", "error: cases: got 'resnet50'; allowed: resnet<6n+2> and"),
        ("--implementations magic", "error: implementations: got 'magic'; allowed: torch, "),
        ("--implementations torch", "error: implementations: got ['torch']; allowed: also xla"),
        ("--threads 0", "error: threads: got 0; allowed: 1 to "),
        ("--threads 4096", "error: threads: got 4096; allowed: 1 to "),
        ("--rounds 0", "error: rounds: got 0; allowed: at least 1"),
        ("--batch-size 0", "error: batch_size: got 0; allowed: at least 1"),
        ("--json no/such/folder.json", "error: json: got 'no/such/folder.json'; allowed: a file"),
    ],
)
def test_bad_input_is_one_line(options: str, said: str) -> None:
    pytest.importorskip("torch", reason='needs: pip install "ktg_jax[bench]"')
    ended = in_process(step.main, *options.split())
    assert ended.code == 2
    assert ended.err.startswith(said)
    assert ended.err.count("\n") == 1


def test_compilation_is_timed_with_three_models() -> None:
    ended = in_process(compile_module.main, "--models", "resnet8+resnet8")
    assert ended.code == 2
    assert ended.err == ("error: models: got 'resnet8+resnet8'; allowed: 3 models joined by +\n")


def test_without_pytorch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'the extra: pip install "ktg_jax\[bench\]"'):
        report.require_torch()


def test_what_was_asked_for_by_name_must_be_available() -> None:
    text = io.StringIO()
    say = report.left_out(report.Options(), Console(file=text))
    say("onednn: not built")
    say("onednn: not built")
    assert text.getvalue() == "Left out: onednn: not built.\n"
    say = report.left_out(report.Options(implementations=("onednn",)), Console(file=text))
    with pytest.raises(InputError, match=r"implementations: got 'onednn'; .*not built"):
        say("onednn: not built")
