"""Attention transfer: maps, sizes, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ktg_jax as ktg
from ktg_jax.errors import InputError

RNG = np.random.default_rng(0)


def outputs(*shapes: tuple[int, ...]) -> list[jax.Array]:
    return [jnp.asarray(RNG.standard_normal(shape), jnp.float32) for shape in shapes]


def test_the_loss_by_hand() -> None:
    # Squared means over two channels: student (8, 6), teacher (3, 4); over norms 10 and 5.
    student = jnp.array([[[[4.0, 0.0], [0.0, 12.0**0.5]]]])
    teacher = jnp.array([[[[6.0**0.5, 0.0], [2.0, 2.0]]]])
    loss = ktg.attention_transfer_loss([student], [teacher])
    np.testing.assert_allclose(loss, (0.2**2 + 0.2**2) / 2, rtol=1e-5)
    twice = ktg.attention_transfer_loss([student, student], [teacher, teacher])
    np.testing.assert_allclose(twice, 2 * loss, rtol=1e-6)


def test_samples_are_normalised_apart() -> None:
    (student, teacher) = outputs((3, 4, 4, 5), (3, 4, 4, 2))
    scale = jnp.array([1.0, 10.0, 100.0])[:, None, None, None]
    loss = ktg.attention_transfer_loss([student], [teacher])
    np.testing.assert_allclose(
        ktg.attention_transfer_loss([scale * student], [teacher]), loss, rtol=1e-5
    )
    apart = [
        ktg.attention_transfer_loss([student[i : i + 1]], [teacher[i : i + 1]]) for i in range(3)
    ]
    np.testing.assert_allclose(loss, np.mean(apart), rtol=1e-5)


def test_the_larger_map_is_averaged_to_the_smaller() -> None:
    (small,) = outputs((2, 2, 3, 4))
    large = jnp.repeat(jnp.repeat(small, 2, axis=1), 3, axis=2)
    for student, teacher in ((small, large), (large, small)):
        loss = ktg.attention_transfer_loss([student], [teacher])
        np.testing.assert_allclose(loss, 0, atol=1e-12)


def test_cells_that_do_not_divide_overlap() -> None:
    # 3 columns to 2: cells (0, 1) and (1, 2). Energies 1 3 5 become 2 4; against 2 4.
    student = jnp.sqrt(jnp.array([1.0, 3.0, 5.0])).reshape(1, 1, 3, 1)
    teacher = jnp.sqrt(jnp.array([2.0, 4.0])).reshape(1, 1, 2, 1)
    np.testing.assert_allclose(ktg.attention_transfer_loss([student], [teacher]), 0, atol=1e-12)


def test_only_the_student_learns_and_it_comes_nearer() -> None:
    student, teacher = outputs((4, 6, 6, 3), (4, 3, 3, 8))
    value = jax.jit(lambda s, t: ktg.attention_transfer_loss([s], [t]))
    ours, theirs = jax.grad(value, argnums=(0, 1))(student, teacher)
    np.testing.assert_array_equal(theirs, np.zeros(teacher.shape))
    assert np.abs(ours).max() > 0
    assert value(student - 1.0 * ours, teacher) < value(student, teacher)
    numeric = (value(student + 1e-2 * ours, teacher) - value(student - 1e-2 * ours, teacher)) / 2e-2
    np.testing.assert_allclose(numeric, jnp.sum(jnp.square(ours)), rtol=0.05)


def test_a_dead_map_has_finite_loss_and_gradient() -> None:
    zeros, (teacher,) = jnp.zeros((2, 4, 4, 3)), outputs((2, 4, 4, 3))
    loss, gradient = jax.value_and_grad(
        lambda s: ktg.attention_transfer_loss([s], [teacher])  # each map has norm 1: 1/16
    )(zeros)
    np.testing.assert_allclose(loss, 1 / 16, rtol=1e-5)
    np.testing.assert_array_equal(gradient, zeros)


def test_half_precision_is_compared_in_single() -> None:
    student, teacher = (output.astype(jnp.bfloat16) for output in outputs(*[(2, 4, 4, 3)] * 2))
    assert ktg.attention_transfer_loss([student], [teacher]).dtype == jnp.float32


def test_numbers_of_stages_that_differ_are_refused() -> None:
    (output,) = outputs((1, 2, 2, 1))
    with pytest.raises(InputError, match=r"^teacher_stages: got 1; allowed: 2, as many as"):
        ktg.attention_transfer_loss([output, output], [output])


def test_batches_that_differ_are_an_error() -> None:
    with pytest.raises(AssertionError):
        ktg.attention_transfer_loss(outputs((2, 2, 2, 1)), outputs((3, 2, 2, 1)))
