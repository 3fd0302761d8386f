"""Networks see floats: stored images are divided by 255, or refused, never taken as they are."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ktg_jax as ktg
from ktg_jax.errors import InputError
from ktg_jax.models.pixels import taking_pixels
from ktg_jax.priors import stage_outputs
from ktg_jax.training.per_node import per_node_step
from ktg_jax.training.per_node_evaluation import per_node_eval
from ktg_jax.training.placement import place

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 1), np.uint8)
LABELS = jnp.arange(4)
INTEGERS = [PIXELS, PIXELS.astype(np.int32), jnp.asarray(PIXELS), PIXELS > 127]
GRAPH = ktg.graphs.independent(["cnn"])
OPTIMIZER = ktg.sgd(learning_rate=0.1)


def mean_of(params: Any, model_state: Any, images: jax.Array, train: bool) -> Any:
    return images.mean((1, 2, 3))[:, None] * params, model_state


def staged(params: Any, model_state: Any, images: jax.Array, train: bool) -> Any:
    return (mean_of(params, model_state, images, train)[0], (images,)), model_state


FNS = ktg.NodeFns(lambda rng, images: (jnp.ones(4), {}), mean_of, staged)


def state_of(images: Any) -> ktg.GraphState:
    return ktg.init_state(GRAPH, [FNS], OPTIMIZER, jax.random.key(0), images)


def test_uint8_is_divided_by_255_and_floats_are_taken_as_they_are() -> None:
    fns = taking_pixels(FNS)
    pixels = jnp.full((1, 2, 2, 1), 51, jnp.uint8)
    for images in (pixels, jnp.full((1, 2, 2, 1), 0.2)):
        logits, _ = fns.apply(jnp.ones(3), {}, images, False)
        np.testing.assert_allclose(logits, [[0.2, 0.2, 0.2]], rtol=1e-6)
        assert fns.stages is not None
        (logits, (seen,)), _ = fns.stages(jnp.ones(3), {}, images, False)
        np.testing.assert_allclose(logits, [[0.2, 0.2, 0.2]], rtol=1e-6)
        np.testing.assert_allclose(seen, np.full((1, 2, 2, 1), 0.2), rtol=1e-6)
    logits, _ = jax.jit(lambda images: fns.apply(jnp.ones(1), {}, images, False))(pixels)
    np.testing.assert_allclose(logits, [[0.2]], rtol=1e-6)
    logits, _ = taking_pixels(FNS, 51.0).apply(jnp.ones(1), {}, pixels, False)
    assert logits.tolist() == [[1.0]]
    assert taking_pixels(FNS) is fns, "what is compiled for one serves the others"
    assert taking_pixels(ktg.NodeFns(FNS.init, FNS.apply)).stages is None


@pytest.mark.parametrize("images", INTEGERS[1:2] + INTEGERS[3:], ids=["int32", "bool"])
def test_other_integers_could_be_anything(images: Any) -> None:
    with pytest.raises(InputError, match=r"^images: got '(int32|bool)\[4, 6, 6, 1\]'.* by 255"):
        taking_pixels(FNS).apply(jnp.ones(1), {}, images, False)


@pytest.mark.parametrize("images", INTEGERS, ids=["uint8", "int32", "on device", "bool"])
def test_the_functions_refuse_integers(images: Any) -> None:
    state, fns, device = state_of(jnp.zeros((1, 6, 6, 1))), [FNS], jax.local_devices()[0]
    params, model_state = state.params[0], state.model_state[0]
    step = partial(ktg.train_step, node_fns=fns, optimizer=OPTIMIZER)
    gates = GRAPH.gate_codes
    on_device: dict[str, Any] = {"node_fns": fns, "placement": (device,)}
    for call in (
        lambda: ktg.node_forward(params, model_state, images, fns=FNS),
        lambda: ktg.node_forward(params, model_state, images, fns=FNS, with_stages=True),
        lambda: step(state, images, LABELS, gates, 0.5),
        lambda: jax.jit(step)(state, images, LABELS, gates, 0.5),
        lambda: ktg.eval_step(state, images, LABELS, node_fns=fns),
        lambda: per_node_step(
            place(state, (device,)),
            {device: jnp.asarray(images)},
            LABELS,
            gates,
            0.5,
            optimizer=OPTIMIZER,
            **on_device,
        ),
        lambda: per_node_eval(state, {device: jnp.asarray(images)}, LABELS, **on_device),
        lambda: stage_outputs(FNS, params, model_state, images),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert str(error.value).startswith(f"images: got '{images.dtype}[4, 6, 6, 1]'; allowed: ")
        assert "divided by 255" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32])
def test_all_floats_are_taken(dtype: Any) -> None:
    images = jnp.asarray(PIXELS / 255, dtype)
    sums = ktg.eval_step(state_of(images), images, LABELS, node_fns=[FNS])
    assert float(sums["count"]) == 4


@pytest.mark.slow
def test_only_the_shape_of_the_sample_matters() -> None:
    fns = [ktg.build_model("cnn", 10)]
    samples: list[Any] = [jnp.zeros((1, 6, 6, 1)), PIXELS, jnp.asarray(PIXELS)]
    states = [ktg.init_state(GRAPH, fns, OPTIMIZER, jax.random.key(0), s) for s in samples]
    chex.assert_trees_all_equal(*states)


def test_what_is_no_array_is_the_networks_own_affair() -> None:
    def apply(params: Any, model_state: Any, images: Any, train: bool) -> Any:
        return mean_of(params, model_state, images["left"], train)

    fns = ktg.NodeFns(FNS.init, apply)
    pair: Any = {"left": jnp.ones((4, 6, 6, 1))}
    logits, _ = ktg.node_forward(jnp.ones(3), {}, pair, fns=fns)
    assert isinstance(logits, jax.Array)
    assert logits.tolist() == [[1.0] * 3] * 4
