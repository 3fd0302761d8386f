"""Priors: distances by hand, gradients, matching, files."""

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ktg_jax.errors import InputError
from ktg_jax.io.trees import digest
from ktg_jax.priors import (
    PRIOR_FILE,
    Prior,
    about_prior,
    assigned,
    initialised,
    load_prior,
    match_prior,
    normalised,
    prior_distance,
    prior_loss,
    recoding_loss,
    save_prior,
    soft_threshold,
)

RNG = np.random.default_rng(0)
PATHS = ("stage1_block1.conv2.kernel", "stage2_block1.conv2.kernel")


def random(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def params_of(*kernels: jax.Array) -> Any:
    blocks = {
        f"stage{stage}_block1": {"conv2": {"kernel": kernel}, "norm2": {"scale": jnp.ones(3)}}
        for stage, kernel in enumerate(kernels, start=1)
    }
    return {**blocks, "classifier": {"kernel": jnp.ones((4, 2))}}


SHAPES = ((3, 3, 2, 5), (3, 3, 5, 8))
PARAMS = params_of(*(random(*shape) for shape in SHAPES))
PRIOR = Prior(tuple(random(*shape) for shape in SHAPES), PATHS)


def kernel_of(params: Any, stage: int) -> jax.Array:
    return params[f"stage{stage}_block1"]["conv2"]["kernel"]


# --- distances


def test_distances_by_hand() -> None:
    # Two filters of two weights: (3, 4) against (6, 8): 0; (1, 0) against (0, -5): 2; mean 1.
    student = jnp.array([[3.0, 1.0], [4.0, 0.0]]).reshape(1, 2, 1, 2)
    prior = jnp.array([[6.0, 0.0], [8.0, -5.0]]).reshape(1, 2, 1, 2)
    # The second stage points the other way: 4.
    params = params_of(student, student)
    prior_of_both = Prior((prior, -7 * student), PATHS)
    np.testing.assert_allclose(prior_distance(params, prior_of_both), [1.0, 4.0], rtol=1e-6)
    np.testing.assert_allclose(prior_loss(params, prior_of_both), 2.5, rtol=1e-6)


def test_standardised_filters_are_free_of_offset_and_scale() -> None:
    kernel = kernel_of(PARAMS, 1)
    params, prior = params_of(kernel), Prior((3 * kernel + 2,), PATHS[:1])
    np.testing.assert_allclose(prior_loss(params, prior, normalise="standard"), 0, atol=1e-6)
    assert prior_loss(params, prior) > 0.1
    z = np.asarray(normalised(kernel, "standard")).reshape(-1, 5)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(np.square(z).sum(0), 1, rtol=1e-5)


def test_scale_never_matters() -> None:
    scaled = jax.tree.map(lambda leaf: leaf * 100, PARAMS)
    np.testing.assert_allclose(
        prior_distance(scaled, PRIOR), prior_distance(PARAMS, PRIOR), rtol=1e-5
    )


def test_filters_of_zeros_are_finite_and_say_nothing() -> None:
    kernel = kernel_of(PARAMS, 1).at[..., 0].set(0.0)
    target = PRIOR.kernels[0].at[..., 1].set(0.0)
    prior = Prior((target,), PATHS[:1])
    loss, gradient = jax.value_and_grad(prior_loss)(params_of(kernel), prior)
    assert np.isfinite(loss)
    gradient = kernel_of(gradient, 1)
    np.testing.assert_array_equal(gradient[..., 0], np.zeros((3, 3, 2)))
    np.testing.assert_allclose(gradient[..., 1], 0, atol=1e-7)
    assert (jnp.abs(gradient[..., 2:]).max((0, 1, 2)) > 0).all()


def test_only_the_priors_kernels_learn() -> None:
    gradient, of_prior = jax.jit(jax.grad(prior_loss, argnums=(0, 1)))(PARAMS, PRIOR)
    chex.assert_trees_all_equal(of_prior, jax.tree.map(jnp.zeros_like, PRIOR))
    for stage in (1, 2):
        assert jnp.abs(kernel_of(gradient, stage)).max() > 0
        np.testing.assert_array_equal(gradient[f"stage{stage}_block1"]["norm2"]["scale"], 0)
    np.testing.assert_array_equal(gradient["classifier"]["kernel"], 0)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_cosine() -> None:
    # ||z(w) - z(a)||^2 = 2 - 2 cos: gradient -2 (z(a) - cos z(w)) / ||w||, over out and stages.
    gradient = kernel_of(jax.grad(prior_loss)(PARAMS, PRIOR), 2)
    w, a = np.asarray(kernel_of(PARAMS, 2)), np.asarray(normalised(PRIOR.kernels[1]))
    norm = np.sqrt(np.square(w).sum((0, 1, 2)))
    cosine = (w / norm * a).sum((0, 1, 2))
    expected = -2 * (a - cosine * w / norm) / norm / 8 / 2
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("normalise", ["unit", "standard"])
def test_descent_ends_at_the_prior(normalise: str) -> None:
    value_and_grad = jax.jit(
        jax.value_and_grad(lambda params: prior_loss(params, PRIOR, normalise=normalise))
    )
    params = PARAMS
    for _ in range(200):
        loss, gradient = value_and_grad(params)
        params = jax.tree.map(lambda p, g: p - 20.0 * g, params, gradient)
    assert loss < 0.01 < value_and_grad(PARAMS)[0]


# --- the other forms


@pytest.mark.parametrize("normalise", ["unit", "standard"])
def test_without_a_dead_zone_both_forms_are_one(normalise: str) -> None:
    distance = prior_distance(PARAMS, PRIOR, normalise=normalise)
    expected = [
        np.square(normalised(kernel_of(PARAMS, i + 1), normalise) - normalised(k, normalise)).sum()
        / k.shape[-1]
        for i, k in enumerate(PRIOR.kernels)
    ]
    np.testing.assert_allclose(distance, expected, rtol=1e-5)
    assert (prior_distance(PARAMS, PRIOR, normalise=normalise, dead_zone=0.7) < distance).all()
    assert prior_loss(PARAMS, PRIOR, normalise=normalise, dead_zone=1.0) == 0


def test_a_dead_zone_thresholds_the_residual() -> None:
    residual = normalised(kernel_of(PARAMS, 1)) - normalised(PRIOR.kernels[0])
    tau = np.sort(np.abs(residual), axis=None)[round(0.7 * residual.size) - 1]
    expected = jnp.sum(jnp.square(soft_threshold(residual, tau))) / 5
    one = Prior(PRIOR.kernels[:1], PATHS[:1])
    np.testing.assert_allclose(prior_loss(PARAMS, one, dead_zone=0.7), expected, rtol=1e-5)


@pytest.mark.slow
def test_recoding_leaves_filters_alone_that_are_not_alike() -> None:
    # Cosines 0.8, 0.1 and -0.8 with penalty 0.5: alpha 0.3, 0 and -0.3; loss 1 - (|c| - 0.5)^2.
    cosines = np.array([0.8, 0.1, -0.8])
    target = jnp.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]).reshape(1, 2, 1, 3)
    student = jnp.asarray(np.stack([cosines, np.sqrt(1 - cosines**2)])).reshape(1, 2, 1, 3)
    prior = Prior((target,), PATHS[:1])
    loss, gradient = jax.value_and_grad(recoding_loss)(params_of(student), prior, 0.5)
    np.testing.assert_allclose(loss, (0.91 + 1 + 0.91) / 3, rtol=1e-6)
    gradient = np.asarray(kernel_of(gradient, 1)).reshape(2, 3)
    np.testing.assert_allclose(gradient[:, 1], 0, atol=1e-7)
    assert gradient[0, 0] < 0 < gradient[0, 2]  # each to the nearer of a and -a
    # d/dw of 1 - (cos - 0.5)^2 along the first axis at norm 1: -2 (0.3) (1 - 0.64), over 3 filters
    np.testing.assert_allclose(gradient[0, 0], -0.6 * 0.36 / 3, rtol=1e-5)


@pytest.mark.parametrize("penalty", [-0.1, float("nan"), float("inf"), True])
def test_a_bad_penalty_is_refused(penalty: Any) -> None:
    with pytest.raises(InputError, match=r"^penalty: got .*; allowed: a finite number"):
        recoding_loss(PARAMS, PRIOR, penalty)


def test_a_penalty_may_be_an_array() -> None:
    expected = recoding_loss(PARAMS, PRIOR, 0.25)
    assert recoding_loss(PARAMS, PRIOR, jnp.float32(0.25)) == expected


def test_bad_options_are_refused() -> None:
    with pytest.raises(InputError, match=r"^normalise: got 'layer'; allowed: unit, standard$"):
        prior_loss(PARAMS, PRIOR, normalise="layer")
    with pytest.raises(InputError, match=r"^dead_zone: got 2; allowed: a number from 0 to 1$"):
        prior_loss(PARAMS, PRIOR, dead_zone=2)
    with pytest.raises(
        InputError, match=r"^matching: got 'best'; allowed: initialise, kernels, assignment"
    ):
        match_prior(PARAMS, PRIOR, "best")


# --- matching


def test_an_assignment_undoes_a_permutation() -> None:
    order = RNG.permutation(8)
    kernels = (kernel_of(PARAMS, 1), 2 * kernel_of(PARAMS, 2)[..., order])
    params, matched = match_prior(PARAMS, replace(PRIOR, kernels=kernels), "assignment")
    assert params is PARAMS
    np.testing.assert_array_equal(matched.kernels[0], kernels[0])
    np.testing.assert_array_equal(matched.kernels[1], 2 * kernel_of(PARAMS, 2))
    assert matched.paths == PATHS


def test_no_permutation_is_nearer_than_the_assigned() -> None:
    kernels = tuple(kernel.at[..., 1].set(0.0) for kernel in PRIOR.kernels)
    prior = replace(PRIOR, kernels=kernels)
    best = prior_distance(PARAMS, assigned(PARAMS, prior))
    for _ in range(30):
        shuffled = tuple(k[..., RNG.permutation(k.shape[-1])] for k in kernels)
        assert (prior_distance(PARAMS, replace(prior, kernels=shuffled)) >= best - 1e-6).all()


@pytest.mark.slow
def test_a_student_may_start_from_the_prior() -> None:
    prior = replace(PRIOR, kernels=(PRIOR.kernels[0].at[..., 2].set(0.0), PRIOR.kernels[1]))
    params, same = match_prior(PARAMS, prior, "initialise")
    assert same is prior
    for stage in (1, 2):  # the prior's directions, the student's own sizes
        started, own = kernel_of(params, stage), kernel_of(PARAMS, stage)
        norms, expected = (np.sqrt(np.sum(k**2, axis=(0, 1, 2))) for k in (started, own))
        np.testing.assert_allclose(norms, expected, rtol=1e-6)
        cosines = jnp.sum(normalised(started) * normalised(prior.kernels[stage - 1]), (0, 1, 2))
        expected = np.ones(len(cosines))
        if stage == 1:
            np.testing.assert_array_equal(started[..., 2], own[..., 2])
            expected[2] = 0
        np.testing.assert_allclose(cosines, expected, atol=1e-6)
    np.testing.assert_allclose(prior_distance(params, prior), [1 / 5, 0], atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, PARAMS)
    assert params["classifier"] == PARAMS["classifier"]
    whole = initialised(PARAMS, prior, size="prior")
    np.testing.assert_array_equal(kernel_of(whole, 2), prior.kernels[1])
    np.testing.assert_array_equal(kernel_of(whole, 1)[..., 2], kernel_of(PARAMS, 1)[..., 2])
    with pytest.raises(InputError, match=r"^size: got 'large'; allowed: own, prior"):
        initialised(PARAMS, prior, size="large")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    chex.assert_trees_all_equal_dtypes(initialised(half, prior), half)


def test_filters_may_be_left_as_they_are() -> None:
    params, prior = match_prior(PARAMS, PRIOR, "none")
    assert params is PARAMS
    assert prior is PRIOR


# --- priors of another student

FUNCTIONS = [prior_distance, prior_loss, initialised, assigned, match_prior]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_prior_of_another_student_is_refused(function: Any) -> None:
    wider = params_of(kernel_of(PARAMS, 1), random(3, 3, 5, 16))
    with pytest.raises(InputError) as error:
        function(wider, PRIOR)
    assert str(error.value) == (
        "prior stage2_block1.conv2.kernel: got (3, 3, 5, 8); allowed: a prior fitted for this "
        "student, where it has shape (3, 3, 5, 16)"
    )
    with pytest.raises(InputError, match=r"^prior: got 'stage2_block1.conv2.kernel'; allowed: a p"):
        function(params_of(kernel_of(PARAMS, 1)), PRIOR)


# --- files

MADE_FOR: dict[str, Any] = {"student": "wide", "num_classes": 7, "image_shape": (8, 8, 3)}


def test_a_prior_comes_back_from_its_file(tmp_path: Path) -> None:
    save_prior(tmp_path / PRIOR_FILE, PRIOR, **MADE_FOR, about={"teacher": "resnet20"})
    for path in (tmp_path / PRIOR_FILE, tmp_path, str(tmp_path)):
        loaded = load_prior(path)
        chex.assert_trees_all_equal(loaded, PRIOR)
        chex.assert_trees_all_equal_structs(loaded, PRIOR)
        assert loaded.shapes == dict(zip(PATHS, SHAPES, strict=True))
    about = about_prior(tmp_path)
    assert (about["student"], about["teacher"]) == ("wide", "resnet20")
    assert (json.loads(about["num_classes"]), json.loads(about["image_shape"])) == (7, [8, 8, 3])
    assert [file.name for file in tmp_path.iterdir()] == ["prior.safetensors"]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / PRIOR_FILE
    save_prior(path, PRIOR, **MADE_FOR)
    whole = path.read_bytes()
    swapped = whole.replace(b"stage2_block1.conv2", b"stage2_block2.conv2")
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    assert swapped != whole
    for damaged in (whole[:-4], whole[:20], b"", swapped, flipped):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"^prior: got '.*prior.safetensors'; allowed: ") as e:
            load_prior(path)
        assert "\n" not in str(e.value)
    path.write_bytes(whole)
    chex.assert_trees_all_equal(load_prior(path), PRIOR)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("paths", "[" * 100_000),
        ("paths", '["gone.kernel"]'),
        ("paths", "3"),
        ("paths", "9" * 5000),
    ],
    ids=lambda text: text[:12],
)
def test_a_file_whose_texts_say_nothing_is_refused(tmp_path: Path, field: str, text: str) -> None:
    """Also where the checksum is right."""
    path = tmp_path / PRIOR_FILE
    save_prior(path, PRIOR, **MADE_FOR)
    texts, tensors = about_prior(path) | {field: text}, load_file(path)
    texts["checksum"] = str(zlib.crc32(texts["paths"].encode(), digest(tensors)))
    save_file(tensors, path, metadata=texts)
    with pytest.raises(InputError, match=r"^prior: got '.*a file that save_prior wrote \("):
        load_prior(path)


def test_another_prior_has_another_checksum(tmp_path: Path) -> None:
    changed = replace(PRIOR, kernels=(PRIOR.kernels[0], -PRIOR.kernels[1]))
    sums = []
    for prior in (PRIOR, changed, PRIOR):
        save_prior(tmp_path / PRIOR_FILE, prior, **MADE_FOR)
        sums.append(about_prior(tmp_path)["checksum"])
    assert sums[0] == sums[2] != sums[1]


def test_files_that_are_no_priors_are_refused(tmp_path: Path) -> None:
    for missing in (tmp_path / "missing.safetensors", tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=r"allowed: a whole .safetensors file, or a folder"):
            load_prior(missing)
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"allowed: a file that save_prior wrote"):
        load_prior(tmp_path / "other.safetensors")
    for name in ("prior.npz", "missing/prior.safetensors"):
        with pytest.raises(InputError, match=r"^prior: got .*; allowed: a file "):
            save_prior(tmp_path / name, PRIOR, **MADE_FOR)
