"""Stages: what networks put out, and which convolutions a prior speaks of."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_variables import random_variables

import ktg_jax as ktg
from ktg_jax.errors import InputError
from ktg_jax.models.network import stage_number
from ktg_jax.priors import stage_convolutions, stage_kernels, stage_outputs

IMAGES = jnp.asarray(np.random.default_rng(0).random((2, 8, 8, 3), np.float32))
KEY = jax.random.key(0)


def shapes_of(model: str) -> Any:
    return jax.eval_shape(ktg.build_model(model, 10).init, KEY, IMAGES)


class Block(nn.Module):
    factor: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        self.sow("intermediates", "seen", x)
        return self.factor * x


class Reverse(nn.Module):
    """Calls its stages' submodules in another order than that of their names, one of them twice."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = Block(2.0, name="stage1_b")(images)
        x = nn.remat(Block)(3.0, name="stage1_a")(x)
        again = Block(5.0, name="stage10")
        x = Block(7.0, name="stage2")(again(again(x)))
        return jnp.mean(x, axis=(1, 2))


@pytest.mark.parametrize(
    ("model", "widths", "kernels"),
    [
        ("cnn", (16, 32, 64), ("stage1_conv", "stage2_conv", "stage3_conv")),
        (
            "resnet14",
            (16, 32, 64),
            ("stage1_block2.conv2", "stage2_block2.conv2", "stage3_block2.conv2"),
        ),
        (
            "wrn10_2",
            (32, 64, 128),
            ("stage1_block1.conv2", "stage2_block1.conv2", "stage3_block1.conv2"),
        ),
    ],
)
def test_built_in_models_have_three_stages(
    model: str, widths: tuple[int, ...], kernels: tuple[str, ...]
) -> None:
    params, model_state = shapes_of(model)
    fns = ktg.build_model(model, 10)
    _, outputs = jax.eval_shape(
        lambda *args: stage_outputs(fns, *args), params, model_state, IMAGES
    )
    sizes = (8, 4, 2)
    assert [o.shape for o in outputs] == [(2, s, s, w) for s, w in zip(sizes, widths, strict=True)]
    found = stage_kernels(params)
    assert tuple(found) == tuple(f"{kernel}.kernel" for kernel in kernels)
    inputs = (3, 16, 32) if model == "cnn" else widths
    assert list(found.values()) == [(3, 3, i, w) for i, w in zip(inputs, widths, strict=True)]


def test_the_tenth_block_comes_after_the_ninth() -> None:
    params, _ = shapes_of("resnet62")
    assert next(iter(stage_kernels(params))) == "stage1_block10.conv2.kernel"


@pytest.mark.parametrize("train", [False, True], ids=["stored statistics", "in training"])
@pytest.mark.parametrize("model", ["cnn", "resnet8"])
def test_stages_change_neither_logits_nor_state(model: str, train: bool) -> None:
    fns = ktg.build_model(model, 10)
    params, model_state = random_variables(fns, IMAGES, seed=1)

    @jax.jit
    def both(params: Any, model_state: Any) -> Any:
        given: dict[str, Any] = {"fns": fns, "frozen": not train}
        with_stages = ktg.node_forward(params, model_state, IMAGES, with_stages=True, **given)
        return with_stages, ktg.node_forward(params, model_state, IMAGES, **given)

    ((logits, outputs), new_state), expected = both(params, model_state)
    chex.assert_trees_all_equal((logits, new_state), expected)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), new_state, model_state)
    assert set(jax.tree.leaves(moved)) == {train}
    # The classifier reads the last stage: averaged, for a ResNet (a cnn's ends before its ReLU).
    last = nn.relu(outputs[-1]).mean((1, 2))
    classifier = params["classifier"]
    np.testing.assert_allclose(
        logits, last @ classifier["kernel"] + classifier["bias"], rtol=1e-4, atol=1e-5
    )


class Counting(nn.Module):
    """A stage, and state of which a stage outputs' collection is no part."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        count = self.variable("counts", "steps", lambda: jnp.zeros((), jnp.int32))
        if not self.is_initializing() and self.is_mutable_collection("counts"):
            count.value += 1
        return Block(1.0, name="stage1")((1 + count.value) * images).mean((1, 2))


def test_training_with_stages_updates_every_collection_and_adds_none() -> None:
    fns = ktg.from_linen(Counting())
    params, before = fns.init(KEY, IMAGES)
    assert fns.stages is not None
    for train, factor in ((True, 2.0), (False, 1.0)):
        (logits, (output,)), after = fns.stages(params, before, IMAGES, train)
        np.testing.assert_allclose(output, factor * IMAGES, rtol=1e-6)
        expected = fns.apply(params, before, IMAGES, train)
        chex.assert_trees_all_equal((logits, after), expected)
        assert after == {"counts": {"steps": factor - 1}}


def test_a_stages_output_is_that_of_its_last_call() -> None:
    fns = ktg.from_linen(Reverse())
    params, model_state = fns.init(KEY, IMAGES)
    logits, outputs = jax.jit(lambda x: stage_outputs(fns, params, model_state, x))(IMAGES)
    factors = [6.0, 6 * 25 * 7.0, 6 * 25.0]  # stages 1, 2 and 10
    for output, factor in zip(outputs, factors, strict=True):
        np.testing.assert_allclose(output, factor * IMAGES, rtol=1e-6)
    np.testing.assert_allclose(logits, factors[1] * IMAGES.mean((1, 2)), rtol=1e-5)


def test_names_of_stages() -> None:
    named = {"stage1": 1, "stage12_conv": 12, "stages1": None, "stage1a": None, "substage1": None}
    assert {name: stage_number((name,)) for name in named} == named
    assert stage_number(("trunk", "stage3_block", "stage1_inner")) == 3
    assert stage_number(()) is None


def test_a_network_without_named_stages_is_refused() -> None:
    fns = ktg.from_linen(nn.Sequential([lambda x: x.mean((1, 2)), nn.Dense(10)]))
    params, model_state = fns.init(KEY, IMAGES)
    with pytest.raises(InputError, match=r"^stages: got 'Sequential'; allowed: a module with"):
        stage_outputs(fns, params, model_state, IMAGES)
    with pytest.raises(InputError, match=r"^params: got \['layers_1.bias', 'layers_1.kernel'\]"):
        stage_kernels(params)
    silent = ktg.NodeFns(fns.init, fns.apply)
    with pytest.raises(InputError, match=r"^stages: got None; allowed: a network that names"):
        stage_outputs(silent, params, model_state, IMAGES)


def test_users_may_say_what_their_stages_are() -> None:
    fns = ktg.NodeFns(
        init=lambda rng, images: ({"trunk": {"stage2": jnp.ones((1, 1, 3, 4))}}, {}),
        apply=lambda params, state, images, train: (images.mean((1, 2)), state),
        stages=lambda params, state, images, train: (
            (images.mean((1, 2)), (images, 2 * images)),
            state,
        ),
    )
    params, model_state = fns.init(KEY, IMAGES)
    _, outputs = stage_outputs(fns, params, model_state, IMAGES)
    chex.assert_trees_all_equal(outputs, (IMAGES, 2 * IMAGES))
    assert stage_kernels(params) == {"trunk.stage2": (1, 1, 3, 4)}


def test_an_output_that_is_no_image_is_refused() -> None:
    fns = ktg.NodeFns(
        init=lambda rng, images: ({}, {}),
        apply=lambda params, state, images, train: (images.mean((1, 2)), state),
        stages=lambda params, state, images, train: (
            (images.mean((1, 2)), (images, images.mean(3))),
            state,
        ),
    )
    with pytest.raises(InputError, match=r"^stage 2: got \(2, 8, 8\); allowed: an output \[B"):
        stage_outputs(fns, {}, {}, IMAGES)


def test_functions_with_other_stages_are_other_nodes() -> None:
    fns = ktg.build_model("cnn", 10)
    same = ktg.NodeFns(fns.init, fns.apply, fns.stages, fns.fed_stages)
    assert (same, hash(same)) == (fns, hash(fns))
    assert ktg.NodeFns(fns.init, fns.apply) != fns
    assert ktg.NodeFns(fns.init, fns.apply) == ktg.NodeFns(fns.init, fns.apply)


def test_other_convolutions_may_be_chosen() -> None:
    params, _ = shapes_of("wrn10_2")
    chosen = ["stage3_block1.shortcut.kernel", "stem_conv.kernel"]
    assert stage_kernels(params, chosen) == dict(
        zip(chosen, [(1, 1, 64, 128), (3, 3, 3, 16)], strict=True)
    )


@pytest.mark.parametrize("path", ["stage4_conv.kernel", "stage1_norm.scale", ""])
def test_a_layer_that_is_no_convolution_is_refused_with_those_that_are(path: str) -> None:
    params, _ = shapes_of("cnn")
    with pytest.raises(InputError) as error:
        stage_kernels(params, ["stage1_conv.kernel", path])
    assert str(error.value).startswith(f"student layer: got {path!r}; allowed: a convolution's")
    assert "stage1_conv.kernel, stage2_conv.kernel, stage3_conv.kernel" in str(error.value)


def test_nnx_models_have_stages_by_name_too() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.stage1_conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)

    params, _ = jax.eval_shape(ktg.from_nnx(Net).init, KEY, IMAGES)
    assert stage_kernels(params) == {"stage1_conv.kernel": (3, 3, 3, 4)}


def test_a_stages_convolutions_are_all_of_its_kernels() -> None:
    params, _ = shapes_of("wrn10_2")
    stages = stage_convolutions(params)
    assert [path.split(".")[1] for path in stages[1]] == ["conv1", "conv2", "shortcut"]
    assert len(stages) == 3
