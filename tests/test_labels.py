"""Labels that are no class, are not one a sample, or are no integers: in every loss on labels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from carried import carrying, stage_edge_losses

import ktg_jax as ktg
from ktg_jax.losses import is_correct
from ktg_jax.training.evaluation import eval_sums

# Three nodes, two samples, three classes, as probabilities. Sample 1 is the one with a bad label.
P = np.array([[[2, 1, 1], [1, 1, 2]], [[1, 2, 1], [1, 2, 1]], [[1, 1, 2], [2, 1, 1]]]) / 4
LOGITS = jnp.asarray(np.log(P), jnp.float32)
NO_CLASS = (-1, -3, 3, 4, 2**31 - 1, -(2**31))
THROUGH = np.zeros((3, 3), np.int32)
CORRECT = np.full((3, 3), ktg.GATES.index("correct"), np.int32)


def labels_with(bad: int) -> np.ndarray:
    return np.array([0, bad], np.int32)


@pytest.mark.parametrize("how", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("bad", NO_CLASS)
def test_a_label_that_is_no_class_has_neither_loss_nor_gradient(bad: int, how: Any) -> None:
    def losses(z: jax.Array, labels: jax.Array) -> jax.Array:
        return ktg.cross_entropy(z, labels)

    found, pullback = jax.vjp(lambda z: how(losses)(z, labels_with(bad)), LOGITS[0])
    np.testing.assert_allclose(found, [np.log(2), np.nan], rtol=1e-6)
    (gradient,) = pullback(jnp.ones(2, jnp.float32))
    np.testing.assert_allclose(gradient[0], P[0, 0] - [1, 0, 0], atol=1e-6)
    assert np.isnan(gradient[1]).all()


def test_every_class_of_every_integer_type_is_one() -> None:
    logits = jnp.zeros((3, 300), jnp.float32)
    for dtype in (np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64):
        losses = ktg.cross_entropy(logits, np.array([0, 7, 255], dtype))
        np.testing.assert_allclose(losses, [np.log(300)] * 3, rtol=1e-6)
    assert np.isnan(ktg.cross_entropy(logits, np.array([-1, -44, -128], np.int8))).all()
    assert np.isnan(ktg.cross_entropy(logits, np.array([300, 2**31, 2**32 - 1], np.uint32))).all()


def test_half_of_a_wide_label_is_not_taken_for_all_of_it() -> None:
    # The least int64 is what a missing value becomes; its lower half is 0.
    for bad in (np.iinfo(np.int64).min, 2**32, 2**32 + 1, -(2**32)):
        losses = ktg.cross_entropy(LOGITS[0], np.array([1, bad]))
        assert np.isnan(losses).tolist() == [False, True]


@pytest.mark.parametrize("bad", NO_CLASS)
def test_in_a_graph_it_is_the_label_edges_that_are_nan(bad: int) -> None:
    labels = labels_with(bad)
    losses = ktg.edge_losses(LOGITS, labels, THROUGH, 0.5)
    np.testing.assert_array_equal(np.isnan(losses), np.eye(3, dtype=bool))
    expected = ktg.edge_losses(LOGITS, np.array([0, 1]), THROUGH, 0.5)
    np.testing.assert_array_equal(losses[~np.eye(3, dtype=bool)], expected[~np.eye(3, dtype=bool)])
    assert np.isnan(ktg.node_losses(LOGITS, labels, THROUGH, 0.5)).all()
    assert np.isnan(ktg.graph_loss(LOGITS, labels, THROUGH, 0.5))
    gradients, metrics = jax.jit(ktg.graph_gradients)(list(LOGITS), labels, THROUGH, 0.5)
    assert np.isnan(metrics["loss"]).all()
    np.testing.assert_array_equal(metrics["accuracy"], [0.5, 0.0, 0.0])  # sample 0 alone
    for gradient in gradients:
        assert np.isnan(gradient).all(axis=1).tolist() == [False, True]


@pytest.mark.parametrize("bad", NO_CLASS)
def test_no_sender_is_right_about_it(bad: int) -> None:
    losses = np.asarray(ktg.edge_losses(LOGITS, labels_with(bad), CORRECT, 0.5))
    # Node 0 is right on sample 0. KL(p_0 || p_1) = 1/2 log 2 - 1/4 log 2, and so for p_2.
    heard = np.log(2) / 4 / 2
    expected = [[np.nan, 0, 0], [heard, np.nan, 0], [heard, 0, np.nan]]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert is_correct(LOGITS, labels_with(bad)).tolist() == [[True, False]] + [[False] * 2] * 2


@pytest.mark.parametrize("bad", NO_CLASS)
def test_no_sender_of_stages_is_right_about_it(bad: int) -> None:
    here, there = jnp.array([[[[1.0, 0.0]]]] * 2), jnp.array([[[[0.0, 1.0]]]] * 2)
    edges = carrying(CORRECT[:2, :2], {"features": 1.0})
    args = [[here], [there]], list(LOGITS[:2]), labels_with(bad), 0.5, edges
    # Node 1 hears node 0 on sample 0, where the squared distance is 2.
    np.testing.assert_allclose(stage_edge_losses(*args), [[0, 0], [1, 0]], rtol=1e-6)


def test_unlabelled_samples_teach_where_the_label_edges_are_cut() -> None:
    gates = THROUGH + np.eye(3, dtype=np.int32) * ktg.GATES.index("cutoff")
    labelled, unlabelled = np.array([0, 1]), np.array([-1, -1])
    value_and_gradient = jax.value_and_grad(ktg.graph_loss)
    expected, expected_gradient = value_and_gradient(LOGITS, labelled, gates, 0.5)
    value, gradient = value_and_gradient(LOGITS, unlabelled, gates, 0.5)
    assert value == expected > 0
    np.testing.assert_array_equal(gradient, expected_gradient)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("bad", NO_CLASS)
def test_in_evaluation_only_samples_that_count_matter(bad: int) -> None:
    labels, counted = labels_with(bad), np.array([True, False])
    evaluate = jax.jit(eval_sums)
    sums = evaluate(list(LOGITS), labels, counted)
    for key, value in evaluate(list(LOGITS), np.array([0, 1]), counted).items():
        np.testing.assert_array_equal(sums[key], value)
    assert np.isfinite(sums["loss"]).all()
    everything = evaluate(list(LOGITS), labels)
    assert np.isnan(everything["loss"]).all()
    assert np.isnan(everything["ensemble_loss"])
    assert everything["correct"].tolist() == [1, 0, 0]
    assert everything["count"] == 2


def in_graph(labels: Any) -> Any:
    return ktg.edge_losses(LOGITS, labels, THROUGH, 0.5)


TAKE_LABELS: dict[str, Callable[[Any], Any]] = {
    "cross_entropy": lambda labels: ktg.cross_entropy(LOGITS[0], labels),
    "edge_losses": in_graph,
    "node_losses": lambda labels: ktg.node_losses(LOGITS, labels, THROUGH, 0.5),
    "graph_loss": lambda labels: ktg.graph_loss(LOGITS, labels, THROUGH, 0.5),
    "graph_gradients": lambda labels: ktg.graph_gradients(list(LOGITS), labels, THROUGH, 0.5),
    "is_correct": lambda labels: is_correct(LOGITS, labels),
    "stage_edge_losses": lambda labels: stage_edge_losses(
        [[jnp.ones((2, 1, 1, 1), jnp.float32)]] * 3,
        list(LOGITS),
        labels,
        0.5,
        carrying(THROUGH, {"features": 1.0}),
    ),
    "eval_sums": lambda labels: eval_sums(list(LOGITS), labels),
    "eval_sums, some": lambda labels: eval_sums(list(LOGITS), labels, jnp.array([True, False])),
}
WRONG = {
    "one for all": np.array([0]),
    "a scalar": np.int32(0),
    "too many": np.array([0, 1, 2]),
    "of rank 2": np.array([[0], [1]]),
    "one-hot": np.eye(3, dtype=np.int32)[[0, 1]],
    "floats": np.array([0.0, 1.0], np.float32),
    "booleans": np.array([False, True]),
}


@pytest.mark.parametrize("name", TAKE_LABELS)
def test_labels_of_other_shapes_and_types_are_refused(name: str) -> None:
    of_labels = jax.jit(TAKE_LABELS[name])
    of_labels(np.array([0, 1]))
    for kind, labels in WRONG.items():
        with pytest.raises(AssertionError):
            pytest.fail(f"{kind}: {of_labels(labels)}")


def test_a_mask_and_stages_for_other_batches_are_refused() -> None:
    labels = np.array([0, 1])
    with pytest.raises(AssertionError):
        eval_sums(list(LOGITS), labels, jnp.array([True]))
    output, edges = jnp.ones((1, 1, 1, 1), jnp.float32), carrying(THROUGH, {"features": 1.0})
    with pytest.raises(AssertionError):
        stage_edge_losses([[output]] * 3, list(LOGITS), labels, 0.5, edges)
    with pytest.raises(AssertionError):
        stage_edge_losses([[output]] * 2, list(LOGITS[:2]), labels[:1], 0.5, edges)
