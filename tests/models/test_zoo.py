"""The networks that distillation papers compare: their sizes, and torchvision's and timm's logits.

The logits were computed by torchvision 0.29.1, timm 1.0.31 and PyTorch 2.14.1 from the same
weights; where these are installed they are computed again.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_networks import CLASSES, IMAGES, NAMES, logits, ours, theirs

import ktg_jax as ktg
from ktg_jax import InputError
from ktg_jax.io.trees import by_path
from ktg_jax.models import check_network

PARAMETERS = {
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "resnet20x1": 278_324,
    "resnet18": 11_220_132,
    "resnet34": 21_328_292,
    "resnet50": 23_705_252,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "mobilenet_v2": 2_351_972,
    "shufflenet_v2": 1_356_104,
    "vit_tiny": 5_379_748,
}
"""Of 100 classes: RepDistiller's, torchvision's and timm's networks have as many."""

LOGITS = {
    "vgg8": [-0.45057, 1.21132, -0.49593],
    "vgg13": [-0.07806, 0.77587, -1.3803],
    "mobilenet_v2": [1.2645, 2.20794, -1.86335],
    "shufflenet_v2": [45.55333, 178.22281, -90.20306],
    "vit_tiny": [-2.0671, -0.15051, 0.65045],
    "resnet18": [-3.85336, 17.47497, -5.82571],
    "resnet50": [5769.4624, -753.66882, -1816.6626],
}
"""Of the second image the first three."""

STAGES = {
    "resnet8x4": [(16, 64), (8, 128), (4, 256)],
    "resnet18": [(16, 64), (8, 128), (4, 256), (2, 512)],
    "vgg8": [(16, 64), (8, 128), (4, 256), (2, 512), (2, 512)],
    "mobilenet_v2": [(16, 24), (8, 32), (4, 96), (2, 320)],
    "shufflenet_v2": [(8, 116), (4, 232), (2, 464)],
    "vit_tiny": [(4, 192), (4, 192), (4, 192)],
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_they_have_as_many_parameters_as_the_published_ones(name: str) -> None:
    init = ktg.build_model(name, 100).init
    params, _ = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_same_weights_give_the_same_logits(name: str) -> None:
    found = logits(name)
    scale = np.abs(found).max()
    np.testing.assert_allclose(found[1, :3] / scale, np.array(LOGITS[name]) / scale, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_so_do_they_with_the_published_network_itself(name: str) -> None:
    expected = theirs(name)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits(name) / scale, expected / scale, atol=1e-4)


@pytest.mark.parametrize("name", STAGES)
def test_their_stages_are_named(name: str) -> None:
    fns, params, state = ours(name)
    assert fns.stages is not None
    output, _ = jax.eval_shape(lambda *x: fns.stages(*x, False), params, state, IMAGES)
    expected = [(len(IMAGES), side, side, channels) for side, channels in STAGES[name]]
    assert [stage.shape for stage in output[1]] == expected


@pytest.mark.parametrize("name", STAGES)
def test_they_can_be_trained_in_mixed_precision_and_on_grey_images(name: str) -> None:
    fns = ktg.build_model(name, CLASSES, dtype=jnp.bfloat16)
    check_network(fns, name, num_classes=CLASSES, image_shape=(12, 16, 1), batch_size=4)
    images = jax.ShapeDtypeStruct((4, 12, 16, 1), jnp.float32)
    variables = jax.eval_shape(fns.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    made, _ = jax.eval_shape(lambda p, s, x: fns.apply(p, s, x, True), *variables, images)
    assert made.dtype == jnp.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet8x1", "vgg8", "mobilenet_v2", "shufflenet_v2", "vit_tiny"])
def test_every_parameter_learns(name: str) -> None:
    fns, params, state = ours(name)
    labels = jnp.arange(len(IMAGES))

    @jax.jit
    def gradients(params: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.mean(ktg.cross_entropy(fns.apply(params, state, IMAGES, True)[0], labels))

        return jax.grad(loss)(params)

    for path, gradient in by_path(gradients(params)).items():
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient != 0), path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet8x1", "mobilenet_v2", "shufflenet_v2"])
def test_statistics_over_devices_are_those_of_the_whole_batch(name: str) -> None:
    images = np.random.default_rng(1).random((4, 8, 8, 3), np.float32)
    fns, params, state = ours(name, images)
    mapped = ktg.build_model(name, CLASSES, axis_name="data")
    _, expected = jax.jit(lambda x: fns.apply(params, state, x, True))(images)
    run = jax.pmap(
        lambda x: mapped.apply(params, state, x, True), axis_name="data", out_axes=(0, None)
    )
    _, found = run(images.reshape(2, 2, 8, 8, 3))
    for path, array in by_path(found).items():
        theirs_ = by_path(expected)[path]
        np.testing.assert_allclose(array, theirs_, rtol=1e-3, atol=1e-4, err_msg=path)


def test_fifty_layers_are_of_either_kind() -> None:
    params = {}
    for name in ("resnet50", "resnet50_16"):
        init = ktg.build_model(name, 10).init
        params[name], _ = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert "stage4_block3" in params["resnet50"]
    assert "stage3_block8" in params["resnet50_16"]


def test_patches_must_fit_the_image() -> None:
    fns = ktg.build_model("vit_tiny", CLASSES)
    with pytest.raises(InputError, match=r"images: .*sides that are multiples of 4"):
        fns.init(jax.random.key(0), jnp.zeros((1, 10, 8, 3)))
