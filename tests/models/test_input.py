"""Networks that normalise and resize their images themselves."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ktg_jax as ktg
from ktg_jax import InputError
from ktg_jax.inputs import Input
from ktg_jax.models.input import as_wanted, statistics, with_input
from ktg_jax.models.weights import load_node, read_node, save_node

IMAGES = np.random.default_rng(0).random((4, 8, 8, 3), np.float32)
WANTED = Input((0.1, 0.2, 0.3), (0.5, 0.25, 2.0))


def test_images_are_normalised_by_channel() -> None:
    expected = (IMAGES - np.array(WANTED.mean)) / np.array(WANTED.std)
    np.testing.assert_allclose(
        as_wanted(jnp.asarray(IMAGES), WANTED), expected, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(as_wanted(jnp.asarray(IMAGES), Input()), IMAGES)


def test_images_are_resized_and_then_normalised() -> None:
    halves = np.repeat(np.repeat(IMAGES, 2, axis=1), 2, axis=2)  # each pixel four times
    small = as_wanted(jnp.asarray(halves), Input((0.5,), (0.5,), size=8))
    assert small.shape == (4, 8, 8, 3)
    inner = np.s_[:, 1:-1, 1:-1]
    blurred = jax.image.resize(jnp.asarray(halves), (4, 8, 8, 3), "linear")
    np.testing.assert_allclose(small[inner], (np.asarray(blurred)[inner] - 0.5) / 0.5, rtol=1e-5)
    flat = as_wanted(jnp.full((1, 5, 7, 1), 0.75), Input((0.5,), (0.5,), size=16))
    np.testing.assert_allclose(flat, np.full((1, 16, 16, 1), 0.5), rtol=1e-6)


def test_a_network_sees_them_so() -> None:
    plain = ktg.build_model("cnn", 5)
    fns = with_input(plain, WANTED)
    assert with_input(plain, WANTED) is fns  # what is compiled for one serves the other
    params, state = fns.init(jax.random.key(0), jnp.asarray(IMAGES))
    seen = as_wanted(jnp.asarray(IMAGES), WANTED)
    for train in (False, True):
        found, _ = fns.apply(params, state, jnp.asarray(IMAGES), train)
        np.testing.assert_array_equal(found, plain.apply(params, state, seen, train)[0])


def test_the_stages_are_those_of_what_it_sees() -> None:
    fns = with_input(ktg.build_model("resnet8", 5), Input(size=16))
    params, state = fns.init(jax.random.key(0), jnp.asarray(IMAGES))
    assert fns.stages is not None
    output, _ = fns.stages(params, state, jnp.asarray(IMAGES), False)
    assert [stage.shape[1] for stage in output[1]] == [16, 8, 4]


def test_statistics_are_those_of_numpy() -> None:
    images = np.random.default_rng(1).integers(0, 256, (50, 6, 5, 3), np.uint8)
    found, scaled = statistics(images), images / 255
    np.testing.assert_allclose(found.mean, scaled.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(found.std, scaled.std((0, 1, 2)), rtol=1e-10)
    with pytest.raises(InputError, match="the same everywhere"):
        statistics(np.full((2, 4, 4, 1), 7, np.uint8))


def test_another_number_of_channels_is_refused() -> None:
    with pytest.raises(InputError, match=r"input.mean: .*1 number, or 1, one a channel"):
        as_wanted(jnp.zeros((1, 8, 8, 1)), WANTED)
    with pytest.raises(InputError, match=r"images: .*floats"):
        as_wanted(jnp.zeros((1, 8, 8, 3), jnp.uint8), WANTED)


def test_a_file_says_it_and_its_network_sees_images_so(tmp_path: Path) -> None:
    wanted = Input(WANTED.mean, WANTED.std, size=16)
    plain = ktg.build_model("resnet8", 5)
    params, state = with_input(plain, wanted).init(jax.random.key(0), jnp.asarray(IMAGES))
    file = tmp_path / "node.safetensors"
    about: dict[str, Any] = {"model": "resnet8", "num_classes": 5, "image_shape": (8, 8, 3)}
    save_node(file, params, state, input=wanted, **about)
    assert read_node(file)[0].input == wanted
    fns, params, state = load_node(file)
    uint8 = np.round(IMAGES * 255).astype(np.uint8)
    seen = as_wanted(jnp.asarray(uint8 / np.float32(255)), wanted)
    expected, _ = plain.apply(params, state, seen, False)
    found, _ = fns.apply(params, state, jnp.asarray(uint8), False)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    save_node(file, params, state, **about)
    assert read_node(file)[0].input == Input()
