"""The training loop, its records, and the evaluation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_variables import random_variables
from runs import compiled_once
from tiny_models import Tiny

import ktg_jax as ktg
from ktg_jax import GraphState, InputError, Parallel, RunError
from ktg_jax.training.batches import Arrays, Batches, plan_batch, take_batch
from ktg_jax.training.evaluation import make_evaluator
from ktg_jax.training.fused_engine import FusedEngine, fused_step
from ktg_jax.training.loop import train_epochs
from ktg_jax.training.task import Task

NAMES = ("student", "assistant")
RNG = np.random.default_rng(0)
DATA = Arrays(
    jnp.asarray(RNG.integers(0, 256, (23, 8, 8, 1), np.uint8)), jnp.arange(23, dtype=jnp.int32) % 10
)
TINY = ktg.from_linen(Tiny(10))

Metrics = dict[str, Any]


def metrics_of(number: int) -> Metrics:
    """The metrics of an update, unlike those of any other."""
    rng = np.random.default_rng(number)
    random = {"loss": rng.random(2), "accuracy": rng.random(2), "edge_losses": rng.random((2, 2))}
    return {key: value.astype(np.float32) for key, value in random.items()}


def counting_step(calls: list[Any] | None = None) -> Callable[[GraphState, int], Any]:
    """A step that adds 1 to all parameters and has the metrics `metrics_of`."""

    def step(state: GraphState, count: int) -> tuple[GraphState, Metrics]:
        assert count == 1
        number = int(state.step) + 1
        if calls is not None:
            calls.append(("step", number))
        params = jax.tree.map(lambda x: x + 1, state.params)
        stepped = dataclasses.replace(state, params=params, step=state.step + 1)
        return stepped, metrics_of(number)

    return step


def start(step: int = 0) -> GraphState:
    params = {"w": jnp.zeros(2)}, {"w": jnp.full((3,), 10.0)}
    return GraphState(params, ({}, {}), (None, None), jnp.asarray(step, jnp.int32))


def validation(state: GraphState) -> dict[str, np.ndarray]:
    value = float(state.params[0]["w"][0])
    return {"loss": np.array([value, 2 * value]), "accuracy": np.array([0.25, 0.5])}


FIXED: dict[str, Any] = {"epochs": 3, "steps_per_epoch": 4, "batch_size": 32}


# --- the loop


def test_a_record_has_the_means_over_its_epoch() -> None:
    records = [record for record, _ in train_epochs(start(), counting_step(), NAMES, **FIXED)]
    assert [(record["epoch"], record["step"]) for record in records] == [(1, 4), (2, 8), (3, 12)]
    for record in records:
        steps = [metrics_of(record["step"] - k) for k in range(4)]
        assert [node["name"] for node in record["nodes"]] == list(NAMES)
        for i, node in enumerate(record["nodes"]):
            for ours, theirs in (
                ("train_loss", "loss"),
                ("train_accuracy", "accuracy"),
                ("edge_losses", "edge_losses"),
            ):
                expected = np.mean([np.float64(metrics[theirs][i]) for metrics in steps], axis=0)
                np.testing.assert_allclose(node[ours], expected, rtol=1e-12)
            assert len(node["edge_losses"]) == 2


def test_a_record_has_the_times_of_its_epoch() -> None:
    for record, _ in train_epochs(start(), counting_step(), NAMES, **FIXED):
        assert record["seconds"] >= 0
        assert record["images_per_second"] > 0


@pytest.mark.parametrize(
    ("steps", "steps_per_call", "first", "later"),
    [
        (2, 1, 32 / 2, 64 / 4),  # of the first epoch only the second step
        (4, 1, 32 / 2, 128 / 8),
        (5, 2, 96 / 6, 160 / 10),  # calls of 2, 2 and 1
        (2, 2, 64 / 14, 64 / 4),  # one call, which is all that is known
        (1, 1, 32 / 12, 32 / 2),
    ],
)
def test_images_per_second_are_those_of_the_epoch_without_what_compiled(
    monkeypatch: pytest.MonkeyPatch, steps: int, steps_per_call: int, first: float, later: float
) -> None:
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)

    def step(state: GraphState, count: int) -> tuple[GraphState, Metrics]:
        """Takes 2 seconds an update, and 10 more to compile; the call waits for it, as on a CPU."""
        nonlocal now
        now += 2.0 * count + (10 if now == 100 else 0)
        for _ in range(count):
            state, metrics = counting_step()(state, 1)
        several = {key: np.stack([value] * count) for key, value in metrics.items()}
        return state, metrics if count == 1 else several

    epochs = train_epochs(
        start(),
        step,
        NAMES,
        epochs=3,
        steps_per_epoch=steps,
        batch_size=32,
        steps_per_call=steps_per_call,
    )
    rates = [(record["images_per_second"], record["seconds"]) for record, _ in epochs]
    assert rates == [
        (round(first, 1), 10 + 2 * steps),
        (round(later, 1), 2 * steps),
        (round(later, 1), 2 * steps),
    ]


def test_states_are_validated_once_an_epoch_after_its_last_step() -> None:
    calls: list[Any] = []

    def validate(state: GraphState) -> dict[str, np.ndarray]:
        calls.append(("validate", int(state.step)))
        return validation(state)

    epochs = train_epochs(start(), counting_step(calls), NAMES, **FIXED, validate=validate)
    for record, state in epochs:
        value = float(state.params[0]["w"][0])
        assert [node["val_loss"] for node in record["nodes"]] == [value, 2 * value]
        assert [node["val_accuracy"] for node in record["nodes"]] == [0.25, 0.5]
    steps = [[("step", 4 * e + k) for k in (1, 2, 3, 4)] for e in range(3)]
    expected = [call for e in range(3) for call in (*steps[e], ("validate", 4 * e + 4))]
    assert calls == expected


def test_without_validation_there_are_no_such_numbers() -> None:
    record, _ = next(train_epochs(start(), counting_step(), NAMES, **FIXED))
    assert [(n["val_loss"], n["val_accuracy"]) for n in record["nodes"]] == [(None, None)] * 2


def test_training_goes_on_where_the_state_stands() -> None:
    whole = [without_times(record) for record, _ in run_epochs(start())]
    rest = [without_times(record) for record, _ in run_epochs(start(step=4))]
    assert rest == whole[1:]
    assert list(run_epochs(start(step=12))) == []


def run_epochs(state: GraphState) -> list[tuple[Any, GraphState]]:
    return list(train_epochs(state, counting_step(), NAMES, **FIXED))


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k not in ("seconds", "images_per_second")}


def test_metrics_are_read_in_order_each_after_the_next_step_began() -> None:
    calls: list[Any] = []

    def on_step(number: int, metrics: Metrics) -> None:
        chex.assert_trees_all_equal(metrics, metrics_of(number))
        calls.append(("read", number))

    epochs = train_epochs(start(), counting_step(calls), NAMES, **FIXED, on_step=on_step)
    next(epochs)
    assert calls == [
        *[("step", 1), ("step", 2), ("read", 1), ("step", 3), ("read", 2)],
        *[("step", 4), ("read", 3), ("read", 4)],
    ]


@pytest.mark.parametrize("number", [1, 6, 8])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_ends_the_run(number: int, value: float) -> None:
    def step(state: GraphState, count: int) -> tuple[GraphState, Metrics]:
        state, metrics = counting_step()(state, count)
        if int(state.step) == number:
            metrics["loss"][1] = value
        return state, metrics

    records = []
    with pytest.raises(RunError, match=f"^step {number}, node assistant: loss") as error:
        records += [record for record, _ in train_epochs(start(), step, NAMES, **FIXED)]
    assert str(value) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_parameters_that_are_not_finite_are_found_at_the_end_of_the_epoch(value: float) -> None:
    def step(state: GraphState, count: int) -> tuple[GraphState, Metrics]:
        state, metrics = counting_step()(state, count)
        if int(state.step) == 8:
            student, assistant = state.params
            broken = {"w": assistant["w"].at[1].set(value)}
            state = dataclasses.replace(state, params=(student, broken))
        return state, metrics

    validated = []

    def validate(state: GraphState) -> dict[str, np.ndarray]:
        validated.append(int(state.step))
        return validation(state)

    epochs = train_epochs(start(), step, NAMES, **FIXED, validate=validate)
    assert next(epochs)[0]["epoch"] == 1
    with pytest.raises(RunError, match=r"^step 8, node assistant: parameters not finite"):
        next(epochs)
    assert validated == [4]


# --- the step


@pytest.mark.slow
def test_a_step_takes_the_planned_batch_and_updates_every_node() -> None:
    graph = ktg.graphs.mutual(["tiny", "tiny"], temperature=2.0)
    edges, key, optimizer = graph.edge_arrays, jax.random.key(5), optax.sgd(0.1)
    augmented: dict[str, Any] = {"num_images": 23, "batch_size": 8, "max_offset": 1, "flip": True}
    node_fns = (TINY, TINY)
    params, model_state = zip(
        *(random_variables(TINY, DATA.images, i) for i in (1, 2)), strict=True
    )
    opt_state = tuple(optimizer.init(p) for p in params)
    state = GraphState(params, model_state, opt_state, jnp.asarray(3, jnp.int32))

    @jax.jit
    def expected_step(state: GraphState) -> tuple[GraphState, Metrics]:
        images, labels = take_batch(*DATA, plan_batch(key, 3, **augmented))
        fixed: dict[str, Any] = {"node_fns": node_fns, "optimizer": optimizer}
        return ktg.train_step(state, images, labels, edges, 4 / 10, **fixed)

    task = Task(node_fns, optimizer, Batches(**augmented), (8, 8, 1), total_steps=10)
    step = fused_step(task, Parallel())
    with compiled_once():
        expected = expected_step(state)
        parallel = Parallel()
        inputs = DATA.spread_over(parallel), *parallel.replicate((edges, key))
        ours = step(parallel.replicate(state), *inputs)
    chex.assert_trees_all_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert int(ours[0].step) == 4


@pytest.mark.slow
def test_several_steps_a_call_are_the_same_steps() -> None:
    graph, optimizer = ktg.graphs.mutual(["tiny", "tiny"]), optax.sgd(0.1, momentum=0.9)
    variables = [random_variables(TINY, DATA.images, i) for i in (1, 2)]
    params, model_state = zip(*variables, strict=True)
    state = GraphState(
        params, model_state, tuple(map(optimizer.init, params)), jnp.zeros((), jnp.int32)
    )
    state = jax.device_get(state)  # each training consumes its own copy

    def trained(steps_per_call: int) -> tuple[GraphState, dict[int, Metrics], list[int]]:
        seen: dict[int, Metrics] = {}
        counts: list[int] = []
        batches = Batches(num_images=23, batch_size=4, max_offset=1)
        task = Task((TINY, TINY), optimizer, batches, (8, 8, 1), total_steps=10)
        engine = FusedEngine(task, Parallel())
        step = engine.make_step(engine.load(DATA), graph.gate_codes, jax.random.key(5))

        def counted(state: GraphState, count: int) -> Any:
            counts.append(count)
            return step(state, count)

        epochs = train_epochs(
            engine.place(state),
            counted,
            NAMES,
            epochs=2,
            steps_per_epoch=5,
            batch_size=4,
            steps_per_call=steps_per_call,
            on_step=seen.__setitem__,
        )
        *_, (_, last) = epochs
        return jax.device_get(last), seen, counts

    with compiled_once():
        expected, expected_metrics, one_by_one = trained(1)
        ours, metrics, counts = trained(3)
    assert (one_by_one, counts) == ([1] * 10, [3, 2, 3, 2])
    assert list(metrics) == list(expected_metrics) == list(range(1, 11))
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("batch_size", "allowed"),
    [(24, "1 to the 23 training images"), (0, "1 to the 23"), (7, "a multiple of 2, the number")],
)
def test_a_batch_that_cannot_be_made_is_refused(batch_size: int, allowed: str) -> None:
    with pytest.raises(InputError, match=f"^batch_size: got {batch_size}; allowed: {allowed}"):
        FusedEngine(
            Task([TINY], optax.sgd(0.1), Batches(23, batch_size), (8, 8, 1), total_steps=10),
            Parallel(),
        )


# --- the evaluation


@pytest.mark.parametrize("batch_size", [10, 7, 23, 500])
@pytest.mark.parametrize("strategy", ["jit", "pmap"])
def test_an_evaluation_is_a_plain_mean_over_all_images(batch_size: int, strategy: str) -> None:
    variables = [random_variables(TINY, DATA.images, seed) for seed in (1, 2)]
    params, model_state = zip(*variables, strict=True)
    parallel = Parallel(strategy)
    state = parallel.replicate(GraphState(params, model_state, (None, None), jnp.zeros((), int)))
    evaluate = make_evaluator([TINY, TINY], parallel, batch_size)
    with compiled_once():
        means = evaluate(state, DATA.spread_over(parallel))

    images, labels = DATA.images / jnp.float32(255), np.asarray(DATA.labels)
    logits = [np.asarray(TINY.apply(*each, images, False)[0], np.float64) for each in variables]
    for i, z in enumerate(logits):
        assert means["accuracy"][i] == np.mean(np.argmax(z, 1) == labels)
        np.testing.assert_allclose(means["loss"][i], cross_entropy(z, labels), rtol=1e-5)
    summed = logits[0] + logits[1]
    assert means["ensemble_accuracy"] == np.mean(np.argmax(summed, 1) == labels)
    np.testing.assert_allclose(means["ensemble_loss"], cross_entropy(summed, labels), rtol=1e-5)
    assert means.keys() == {"loss", "accuracy", "ensemble_loss", "ensemble_accuracy"}


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    shifted = logits - logits.max(1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return -float(np.mean(log_probabilities[np.arange(len(labels)), labels]))
