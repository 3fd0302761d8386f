"""Priors without fitting: a teacher's kernels, reduced to a student's shape."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ktg_jax as ktg
from ktg_jax.errors import InputError
from ktg_jax.priors import cluster_prior, layer_kernels, layer_prior, svd_prior

RNG = np.random.default_rng(0)


def random(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def teacher_of(*shapes: tuple[int, ...]) -> Any:
    return {f"stage1_block{i}": {"conv1": {"kernel": random(*s)}} for i, s in enumerate(shapes)}


@pytest.mark.parametrize("make", [svd_prior, cluster_prior])
@pytest.mark.parametrize("pair", [("resnet8", "wrn10_2"), ("wrn10_2", "resnet8"), ("cnn", "cnn")])
def test_unfitted_priors_have_the_students_shapes(make: Any, pair: tuple[str, str]) -> None:
    images, key = jnp.zeros((1, 8, 8, 3)), jax.random.key(0)
    shapes, _ = jax.eval_shape(ktg.build_model(pair[0], 10).init, key, images)
    teacher = jax.tree.map(lambda leaf: random(*leaf.shape), shapes)
    student, _ = jax.eval_shape(ktg.build_model(pair[1], 10).init, key, images)
    kernels = ktg.stage_kernels(student)
    prior = make(teacher, kernels)
    assert prior.shapes == kernels
    assert prior.accuracy is None
    for kernel in prior.kernels:
        assert np.isfinite(kernel).all()
        assert jnp.abs(kernel).max() > 0


def test_svd_keeps_the_best_of_the_filters() -> None:
    # A bank of rank 2 in filters is kept whole by 2 principal ones (Eckart and Young).
    basis = RNG.standard_normal((3, 3, 4, 2))
    bank = basis @ RNG.standard_normal((2, 6))
    prior = svd_prior({"stage1": bank}, {"k": (3, 3, 4, 2)})
    # In channels are rotated, not lost: the norm of the whole stays.
    np.testing.assert_allclose(jnp.linalg.norm(prior.kernels[0]), np.linalg.norm(bank), rtol=1e-5)
    one = svd_prior({"stage1": bank}, {"k": (3, 3, 4, 1)}).kernels[0]
    np.testing.assert_allclose(
        jnp.linalg.norm(one), np.linalg.norm(bank.reshape(-1, 6), 2), rtol=1e-5
    )
    flat = np.asarray(prior.kernels[0]).reshape(-1, 2)
    np.testing.assert_allclose(flat[:, 0] @ flat[:, 1], 0, atol=1e-4)


def test_all_kernels_of_a_stage_that_are_alike_make_its_bank() -> None:
    # The first has another input width and does not count; what is missing is filled with zeros.
    teacher = teacher_of((3, 3, 1, 2), (3, 3, 2, 2), (3, 3, 2, 2))
    kernel = np.asarray(svd_prior(teacher, {"k": (3, 3, 3, 6)}).kernels[0])
    np.testing.assert_allclose(kernel[:, :, 2], 0, atol=1e-12)
    assert (np.abs(kernel).max((0, 1, 2)) > 0).tolist() == [True] * 4 + [False] * 2
    bank = [teacher[f"stage1_block{i}"]["conv1"]["kernel"] for i in (1, 2)]
    np.testing.assert_allclose(np.square(kernel).sum(), np.square(bank).sum(), rtol=1e-5)


def test_directions_that_a_teacher_does_not_have_are_exactly_zero() -> None:
    bank = RNG.standard_normal((3, 3, 4, 1)) @ RNG.standard_normal((1, 6))
    kernel = np.asarray(svd_prior({"stage1": bank}, {"k": (3, 3, 4, 5)}).kernels[0])
    np.testing.assert_array_equal(kernel[..., 1:], np.zeros((3, 3, 4, 4)))


def test_clusters_are_means_and_the_same_every_time() -> None:
    filters = np.repeat(np.array([[1.0, -3.0], [2.0, 5.0]]), 3, axis=1).reshape(2, 1, 1, 6)
    kernels = {"k": (2, 1, 1, 3)}
    kernel = np.asarray(cluster_prior({"stage1": filters}, kernels).kernels[0]).reshape(2, 3)
    assert sorted(map(tuple, kernel.T)) == [(-3.0, 5.0), (0.0, 0.0), (1.0, 2.0)]
    teacher = teacher_of((3, 3, 4, 16))
    first, second = (cluster_prior(teacher, {"k": (3, 3, 2, 5)}) for _ in range(2))
    chex.assert_trees_all_equal(first, second)


@pytest.mark.parametrize("make", [svd_prior, cluster_prior])
def test_teachers_that_do_not_fit_are_refused(make: Any) -> None:
    teacher = teacher_of((3, 3, 2, 2))
    with pytest.raises(InputError, match=r"^student_kernels: got 2; allowed: 1, as many as the t"):
        make(teacher, {"a": (3, 3, 2, 2), "b": (3, 3, 2, 2)})
    with pytest.raises(InputError, match=r"^student_kernels a: got \(5, 5, 2, 2\); allowed: heigh"):
        make(teacher, {"a": (5, 5, 2, 2)})
    with pytest.raises(InputError, match=r"^params: got "):
        make({"conv": jnp.ones((3, 3, 2, 2))}, {"a": (3, 3, 2, 2)})


# --- layer by layer


def test_each_layer_speaks_to_the_one_at_its_depth() -> None:
    teacher = teacher_of(*[(3, 3, 1, 1)] * 5)
    kernels = [np.asarray(block["conv1"]["kernel"]) for block in teacher.values()]
    paths = [f"stage1_block{i}.conv1.kernel" for i in range(3)]
    prior = layer_prior(teacher, dict.fromkeys(paths, (3, 3, 1, 1)))
    # Of 5 layers for 3 it is the 2nd, the 4th and the last; SVD may only turn the sign.
    for kernel, i in zip(prior.kernels, (1, 3, 4), strict=True):
        np.testing.assert_allclose(np.abs(kernel), np.abs(kernels[i]), rtol=1e-5)
    assert prior.paths == tuple(paths)


@pytest.mark.parametrize("pair", [("resnet20", "resnet8_8"), ("wrn16_2", "resnet8")])
def test_all_layers_of_built_in_students(pair: tuple[str, str]) -> None:
    images, key = jnp.zeros((1, 8, 8, 3)), jax.random.key(0)
    shapes, student = (
        jax.eval_shape(ktg.build_model(name, 10).init, key, images)[0] for name in pair
    )
    teacher = jax.tree.map(lambda leaf: random(*leaf.shape), shapes)
    kernels = layer_kernels(student)
    assert len(kernels) == 6  # two in each of three blocks
    prior = layer_prior(teacher, kernels)
    assert prior.shapes == kernels
    assert all(jnp.abs(kernel).max() > 0 for kernel in prior.kernels)
    stages = svd_prior(teacher, ktg.stage_kernels(student))
    assert set(stages.paths) < set(prior.paths)


def test_shortcuts_are_no_layers() -> None:
    images = jnp.zeros((1, 8, 8, 3))
    params, _ = jax.eval_shape(ktg.build_model("wrn10_2", 10).init, jax.random.key(0), images)
    assert [path.split(".")[-2] for path in layer_kernels(params)] == ["conv1", "conv2"] * 3


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        ({"stage2_a": (3, 3, 1, 1)}, "got 'stage2_a'; allowed: a layer in one of the teacher's 1"),
        ({"a": (3, 3, 1, 1)}, "got 'a'; allowed: a layer in one of the teacher's 1 stages"),
        ({"stage1_a": (1, 1, 1, 1)}, "student_kernels stage1_a: got (1, 1, 1, 1); allowed: height"),
    ],
)
def test_layers_without_a_counterpart_are_refused(kernels: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        layer_prior(teacher_of((3, 3, 1, 1)), kernels)
    assert message in str(error.value)
