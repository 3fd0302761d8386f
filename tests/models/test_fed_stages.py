"""Stages that are fed from outside: what networks pass from one to the next, seen and replaced."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nnx_networks import Net
from random_variables import random_variables

import ktg_jax as ktg
from ktg_jax.inputs import Input
from ktg_jax.models.input import with_input
from ktg_jax.models.pixels import taking_pixels

IMAGES = jnp.asarray(np.random.default_rng(0).random((4, 32, 32, 3), np.float32))
KEY = jax.random.key(0)
MODELS = {
    "cnn": [3, 16, 32, 64],
    "resnet14": [16, 16, 32, 64],
    "wrn10_2": [16, 32, 64, 128],
    "resnet8x4": [32, 64, 128, 256],
    "vgg8": [3, 64, 128, 256, 512, 512],
    "vit_tiny": [192, 192, 192, 192],
    "mobilenet_v2": [32, 24, 32, 96, 320],
}


def fed(fns: ktg.NodeFns, *arguments: Any) -> Any:
    assert fns.fed_stages is not None
    return fns.fed_stages(*arguments)


@pytest.mark.parametrize("train", [False, True], ids=["stored statistics", "in training"])
@pytest.mark.parametrize("model", MODELS)
def test_a_network_that_is_fed_nothing_does_what_it_does(model: str, train: bool) -> None:
    fns = ktg.build_model(model, 10)
    params, model_state = random_variables(fns, IMAGES, seed=1)
    inputs = (None,) * len(MODELS[model])

    @jax.jit
    def both(params: Any, model_state: Any) -> Any:
        assert fns.stages is not None
        return (
            fed(fns, params, model_state, IMAGES, inputs, train),
            fns.stages(params, model_state, IMAGES, train),
        )

    ((logits, places), after), ((expected, outputs), expected_after) = both(params, model_state)
    assert [place.shape[-1] for place in places] == MODELS[model]
    chex.assert_trees_all_equal((logits, places[1:], after), (expected, outputs, expected_after))


@pytest.mark.parametrize("model", ["resnet14", "wrn10_2", "vgg8"])
def test_what_a_stage_is_fed_decides_its_output_and_nothing_else_does(model: str) -> None:
    fns = ktg.build_model(model, 10)
    variables = random_variables(fns, IMAGES, seed=1)
    _, places = fed(fns, *variables, IMAGES, (None,) * len(MODELS[model]), False)[0]
    (logits, outputs), _ = fed(fns, *variables, 0 * IMAGES, places, False)
    expected = fed(fns, *variables, IMAGES, (None,) * len(MODELS[model]), False)[0]
    chex.assert_trees_all_close((logits, outputs[1:]), (expected[0], expected[1][1:]), rtol=1e-5)
    for g in range(1, len(places)):
        changed = [2 * place if place_g == g else place for place_g, place in enumerate(places)]
        (other, others), _ = fed(fns, *variables, 0 * IMAGES, changed, False)
        is_same = [bool((a == b).all()) for a, b in zip(others, outputs, strict=True)]
        assert is_same == [place != g + 1 for place in range(len(places))]
        assert bool((other == logits).all()) == (g < len(places) - 1)


def test_no_gradient_passes_a_place_that_is_fed() -> None:
    fns = ktg.build_model("resnet8", 10)
    params, model_state = random_variables(fns, IMAGES, seed=1)
    given = [jnp.ones((4, 32, 32, 16)), None, jnp.ones((4, 16, 16, 32)), None]

    def of_third(params: Any) -> jax.Array:
        return jnp.sum(fed(fns, params, model_state, IMAGES, given, False)[0].stages[3])

    gradients = jax.grad(of_third)(params)
    reached = {name for name, part in gradients.items() if any(map(np.any, jax.tree.leaves(part)))}
    assert reached == {"stage3_block1"}


class Block(nn.Module):
    factor: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.factor * x


class Twice(nn.Module):
    """Calls a submodule of its second stage twice, another one rematerialised."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.remat(Block)(2.0, name="stage1")(images + 1)
        again = Block(3.0, name="stage2_block")
        return Block(5.0, name="last")(again(again(x))).mean((1, 2))


def test_a_stage_is_passed_on_behind_its_last_call() -> None:
    fns = ktg.from_linen(Twice())
    variables = fns.init(KEY, IMAGES)
    run = jax.jit(lambda *inputs: fed(fns, *variables, IMAGES, inputs, False)[0])
    logits, places = run(None, None, None)
    for place, factor in zip(places, (1, 2, 18), strict=True):
        np.testing.assert_allclose(place, factor * (IMAGES + 1), rtol=1e-5)
    logits, places = run(IMAGES, None, 7 * IMAGES)
    for place, value in zip(places, (IMAGES + 1, 2 * IMAGES, 18 * IMAGES), strict=True):
        np.testing.assert_allclose(place, value, rtol=1e-5)
    np.testing.assert_allclose(logits, 35 * IMAGES.mean((1, 2)), rtol=1e-5)


def numbers(tree: Any) -> Any:
    """The same tree, of numbers alone."""
    is_key = jax.dtypes.prng_key
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, is_key) else x, tree
    )


@pytest.mark.parametrize("train", [False, True], ids=["stored statistics", "in training"])
def test_nnx_modules_are_fed_too(train: bool) -> None:
    fns = ktg.from_nnx(Net, 10, (3, 4, 6, 8), stages=["blocks.1", "blocks.2"])
    variables = fns.init(KEY, IMAGES)
    assert fns.stages is not None
    run = jax.jit(lambda *inputs: fed(fns, *variables, IMAGES, inputs, train))
    (logits, places), after = run(None, None, None)
    (expected, outputs), expected_after = fns.stages(*variables, IMAGES, train)
    assert [place.shape[1:] for place in places] == [(16, 16, 4), (8, 8, 6), (4, 4, 8)]
    got, wanted = (logits, places[1:], after), (expected, outputs, expected_after)
    chex.assert_trees_all_close(numbers(got), numbers(wanted), atol=1e-5)
    (_, others), _ = run(None, jnp.zeros_like(places[1]), None)
    np.testing.assert_allclose(others[1], places[1], atol=1e-5)
    assert np.abs(others[2] - places[2]).max() > 0.01


def test_a_network_that_sees_other_images_is_fed_the_same() -> None:
    fns = ktg.build_model("resnet8", 10)
    variables = random_variables(fns, IMAGES, seed=1)
    nothing, pixels = (None,) * 4, jnp.asarray(np.asarray(255 * IMAGES), jnp.uint8)
    seen = (pixels / 255.0 - 0.5) / 0.25
    expected = fed(fns, *variables, seen, nothing, False)
    changed = taking_pixels(with_input(fns, Input((0.5,), (0.25,))))
    chex.assert_trees_all_close(fed(changed, *variables, pixels, nothing, False), expected)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((None,) * 3, r"^inputs: got 3; allowed: 4 entries, one more than ResNet has stages"),
        ((None, IMAGES, None, None), r"^inputs\[1\]: got \(4, 32, 32, 3\); allowed: shape \(4, 32"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: Any, message: str) -> None:
    fns = ktg.build_model("resnet8", 10)
    with pytest.raises(ktg.InputError, match=message):
        fed(fns, *random_variables(fns, IMAGES, seed=1), IMAGES, inputs, False)


def test_a_module_without_stages_cannot_be_fed() -> None:
    fns = ktg.from_linen(nn.Sequential([lambda x: x.mean((1, 2)), nn.Dense(10)]))
    with pytest.raises(ktg.InputError, match=r"^stages: got 'Sequential'; allowed: a module with"):
        fed(fns, *fns.init(KEY, IMAGES), IMAGES, (None,), False)
