import itertools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ktg_jax as ktg

# Two nodes, three samples: who classifies what correctly.
CORRECT = np.array([[True, False, True], [False, False, True]])
ONES, ZEROS = [1, 1, 1], [0, 0, 0]
QUARTERS, THREE_QUARTERS = [0.25] * 3, [0.75] * 3

Weights = Callable[..., jax.Array]


@pytest.fixture(params=["eager", "jit"])
def gate_weights(request: pytest.FixtureRequest) -> Weights:
    return ktg.gate_weights if request.param == "eager" else jax.jit(ktg.gate_weights)


def codes(*rows: list[str]) -> np.ndarray:
    return np.array([[ktg.GATES.index(gate) for gate in row] for row in rows], np.int32)


def test_the_gates_and_their_codes_are_these() -> None:
    # Codes are written into checkpoints and studies only as names, but traced programs use them.
    assert ktg.GATES == ("through", "cutoff", "linear", "correct", "negative_linear")


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        ("through", [[ONES, ONES], [ONES, ONES]]),
        ("cutoff", [[ZEROS, ZEROS], [ZEROS, ZEROS]]),
        ("linear", [[QUARTERS, QUARTERS], [QUARTERS, QUARTERS]]),
        ("correct", [[ONES, [0, 0, 1]], [[1, 0, 1], ONES]]),
        ("negative_linear", [[THREE_QUARTERS, THREE_QUARTERS]] * 2),
    ],
)
def test_each_gate_weighs_as_worked_out_by_hand(
    gate_weights: Weights, gate: str, expected: list[list[list[float]]]
) -> None:
    weights = gate_weights(codes([gate] * 2, [gate] * 2), 0.25, CORRECT)
    chex.assert_type(weights, jnp.float32)
    np.testing.assert_array_equal(weights, np.array(expected, np.float32))


def test_rows_are_receivers_and_columns_are_senders(gate_weights: Weights) -> None:
    weights = gate_weights(codes(["linear", "correct"], ["cutoff", "through"]), 0.25, CORRECT)
    expected = [[QUARTERS, [0, 0, 1]], [ZEROS, ONES]]
    np.testing.assert_array_equal(weights, np.array(expected, np.float32))


@pytest.mark.parametrize(("progress", "linear", "negative"), [(0.0, 0, 1), (1.0, 1, 0)])
def test_linear_gates_ramp_from_end_to_end(
    gate_weights: Weights, progress: float, linear: float, negative: float
) -> None:
    weights = gate_weights(codes(["linear", "negative_linear"], ["cutoff"] * 2), progress, CORRECT)
    np.testing.assert_array_equal(weights[0], [[linear] * 3, [negative] * 3])


def test_correct_can_be_given_for_each_edge(gate_weights: Weights) -> None:
    correct = np.zeros((2, 2, 3), bool)
    correct[0, 1] = [False, True, True]
    weights = gate_weights(codes(["correct"] * 2, ["correct"] * 2), 0.5, correct)
    expected = [[ONES, [0, 1, 1]], [ZEROS, ONES]]
    np.testing.assert_array_equal(weights, np.array(expected, np.float32))


@pytest.mark.parametrize("unknown", [-1, 5, 1000])
def test_a_code_that_is_no_gate_gives_nan_on_its_edge_alone(
    gate_weights: Weights, unknown: int
) -> None:
    weights = gate_weights(np.array([[0, unknown], [1, 0]]), 0.5, CORRECT)
    assert np.isnan(weights[0, 1]).all()
    np.testing.assert_array_equal(weights[0, 0], ONES)
    np.testing.assert_array_equal(weights[1], [ZEROS, ONES])


def test_one_compilation_serves_every_gate_matrix_of_two_nodes() -> None:
    weights_of = {
        "through": np.ones((2, 2, 3)),
        "cutoff": np.zeros((2, 2, 3)),
        "linear": np.full((2, 2, 3), 0.25),
        "correct": np.array([[ONES, [0, 0, 1]], [[1, 0, 1], ONES]]),
        "negative_linear": np.full((2, 2, 3), 0.75),
    }
    by_code = np.stack([weights_of[gate] for gate in ktg.GATES])
    compiled = jax.jit(chex.assert_max_traces(ktg.gate_weights, n=1))
    for matrix in itertools.product(range(5), repeat=4):
        gates = np.array(matrix, np.int32).reshape(2, 2)
        expected = by_code[gates, np.arange(2)[:, None], np.arange(2)]
        np.testing.assert_array_equal(compiled(gates, 0.25, CORRECT), expected.astype(np.float32))


@pytest.mark.parametrize(
    ("gates", "correct"),
    [
        (np.zeros((2, 2), np.float32), CORRECT),
        (np.zeros(4, np.int32), CORRECT),
        (np.zeros((2, 2), np.int32), CORRECT[0]),
    ],
    ids=["gates that are no integers", "gates that are no matrix", "correctness of no sample"],
)
def test_wrong_types_and_ranks_are_refused(gates: np.ndarray, correct: np.ndarray) -> None:
    with pytest.raises(AssertionError):
        ktg.gate_weights(gates, 0.5, correct)
