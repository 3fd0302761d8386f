from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_variables import random_variables

import ktg_jax as ktg
from ktg_jax import InputError, NodeFns, build_model, register_model

RESNETS = ["resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]
WIDE_RESNETS = ["wrn10_2", "wrn16_2", "wrn28_2", "wrn28_10"]


def images_of(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).random(shape, np.float32))


def num_parameters(fns: NodeFns, image_shape: tuple[int, ...] = (32, 32, 3)) -> int:
    params, _ = jax.eval_shape(fns.init, jax.random.key(0), jnp.zeros((1, *image_shape)))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", RESNETS + WIDE_RESNETS)
def test_networks_have_as_many_parameters_as_the_authors(name: str) -> None:
    reference = pytest.importorskip("torch_reference")
    assert num_parameters(build_model(name, 10)) == reference.num_parameters(name, 10)


@pytest.mark.parametrize(
    ("name", "classes", "millions"),
    [("resnet20", 10, 0.27), ("resnet110", 10, 1.7), ("wrn28_10", 10, 36.5), ("wrn16_2", 10, 0.7)],
)
def test_networks_are_of_their_papers_size(name: str, classes: int, millions: float) -> None:
    count = num_parameters(build_model(name, classes))
    assert round(count / 1e6, len(str(millions).split(".")[1])) == millions


def test_a_thinner_resnet_has_fewer_channels_in_every_stage() -> None:
    """By hand: 4, 8 and 16 channels; two numbers of each norm's channels."""
    convolutions = 9 * (3 * 4 + 2 * 4 * 4 + 4 * 8 + 8 * 8 + 8 * 16 + 16 * 16)
    norms = 2 * (4 + 2 * 4 + 2 * 8 + 2 * 16)
    assert num_parameters(build_model("resnet8_4", 10)) == convolutions + norms + 16 * 10 + 10
    assert num_parameters(build_model("resnet14_16", 10)) == num_parameters(
        build_model("resnet14", 10)
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet8", (4, 32, 32, 3)),
        ("resnet8", (2, 64, 64, 3)),
        ("resnet8", (4, 15, 18, 1)),
        ("resnet20", (4, 32, 32, 3)),
        ("wrn10_2", (4, 32, 32, 3)),
        ("wrn10_2", (4, 15, 18, 1)),
        ("wrn16_2", (4, 32, 32, 3)),
    ],
)
def test_the_same_weights_give_the_authors_logits_and_statistics(
    name: str, shape: tuple[int, ...]
) -> None:
    reference = pytest.importorskip("torch_reference")
    fns, images = build_model(name, 7), images_of(*shape)
    params, model_state = random_variables(fns, images, seed=1)
    network = reference.build(name, params, model_state)

    @jax.jit
    def evaluate_and_train() -> tuple[Any, Any]:
        run = fns.apply
        return run(params, model_state, images, False), run(params, model_state, images, True)

    (stored, unchanged), (normalised, updated) = evaluate_and_train()
    with reference.torch.no_grad():
        theirs_stored = network.eval()(reference.to_nchw(images)).numpy()
        theirs_normalised = network.train()(reference.to_nchw(images)).numpy()
    assert np.abs(theirs_stored - theirs_normalised).max() > 1e-2
    np.testing.assert_allclose(stored, theirs_stored, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(normalised, theirs_normalised, atol=1e-4, rtol=1e-4)
    chex.assert_trees_all_equal(unchanged, model_state)
    theirs = network.state_dict()
    for key, ours in reference.to_torch(params, updated).items():
        np.testing.assert_allclose(ours, theirs[key], atol=1e-5, rtol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", ["resnet8", "wrn10_2"])
def test_initial_weights_have_the_authors_distribution(name: str) -> None:
    init = jax.jit(build_model(name, 100).init)
    key = jax.random.key(0, impl="rbg")  # compiles faster than the default
    params, model_state = init(key, jnp.zeros((1, 8, 8, 3)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        layer, kind = path[-2].key, path[-1].key
        values = np.asarray(leaf, np.float64)
        if kind == "bias":
            np.testing.assert_array_equal(values, 0)
        elif kind == "scale":
            np.testing.assert_array_equal(values, 1)
        else:
            fan_in, fan_out = values.size / values.shape[-1], values.size / values.shape[-2]
            expected = np.sqrt(2 / fan_out)  # size * size * output channels
            if layer == "classifier":
                expected = np.sqrt((1 / 3 if name == "wrn10_2" else 2) / fan_in)
            standard_error = expected / np.sqrt(2 * values.size)
            assert abs(values.std() - expected) < 5 * standard_error, path
            assert abs(values.mean()) < 5 * expected / np.sqrt(values.size), path
            is_uniform = name == "wrn10_2" and layer == "classifier"
            assert (np.abs(values).max() <= 1 / np.sqrt(fan_in)) == is_uniform, path
    for path, leaf in jax.tree_util.tree_leaves_with_path(model_state):
        np.testing.assert_array_equal(leaf, 1 if path[-1].key == "var" else 0)


@pytest.mark.parametrize("name", ["cnn", "resnet8", "wrn10_2"])
@pytest.mark.parametrize("shape", [(1, 8, 8, 1), (1, 64, 64, 3), (3, 9, 7, 3), (2, 1, 1, 3)])
def test_images_of_any_size_and_depth_give_finite_logits(name: str, shape: tuple[int, ...]) -> None:
    fns = build_model(name, 5)
    images = images_of(*shape)
    params, model_state = random_variables(fns, images, seed=0)
    logits, unchanged = jax.jit(fns.apply, static_argnums=3)(params, model_state, images, False)
    chex.assert_shape(logits, (shape[0], 5))
    chex.assert_tree_all_finite(logits)
    chex.assert_trees_all_equal(unchanged, model_state)


def test_the_result_for_an_image_does_not_depend_on_its_batch_in_evaluation() -> None:
    fns, images = build_model("cnn", 5), images_of(3, 8, 8, 3)
    params, model_state = random_variables(fns, images, seed=0)
    apply = jax.jit(lambda images: fns.apply(params, model_state, images, False)[0])
    np.testing.assert_allclose(apply(images)[1:2], apply(images[1:2]), atol=1e-6)


@pytest.mark.parametrize("name", ["cnn", "resnet8", "wrn10_2"])
def test_bfloat16_computes_coarsely_with_float32_parameters(name: str) -> None:
    images = images_of(4, 8, 8, 3)
    fine, coarse = build_model(name, 5), build_model(name, 5, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(coarse.init, jax.random.key(0), images)
    chex.assert_type(jax.tree.leaves(shapes), jnp.float32)
    params, model_state = random_variables(coarse, images, seed=0)

    @jax.jit
    def evaluate() -> tuple[Any, Any]:
        args = (params, model_state, images, True)
        return fine.apply(*args), coarse.apply(*args)

    (fine_logits, fine_state), (coarse_logits, coarse_state) = evaluate()
    chex.assert_type([fine_logits, coarse_logits], [jnp.float32, jnp.bfloat16])
    error = np.abs(fine_logits - coarse_logits.astype(jnp.float32)).max()
    assert 0 < error < 0.1 * np.abs(fine_logits).max()
    chex.assert_trees_all_equal_dtypes(coarse_state, fine_state)
    chex.assert_trees_all_close(coarse_state, fine_state, atol=0.05, rtol=0.1)


@pytest.mark.parametrize("name", ["cnn", "resnet8", "wrn10_2"])
def test_batches_spread_over_a_mapped_axis_are_normalised_as_one(name: str) -> None:
    images = images_of(4, 8, 8, 3)
    whole, spread = build_model(name, 5), build_model(name, 5, axis_name="devices")
    params, model_state = random_variables(whole, images, seed=0)

    def run(fns: NodeFns, images: jax.Array) -> tuple[jax.Array, Any]:
        return fns.apply(params, model_state, images, True)

    logits, expected = jax.jit(run, static_argnums=0)(whole, images)
    halves = images.reshape(2, 2, 8, 8, 3)
    mapped = jax.pmap(lambda images: run(spread, images), axis_name="devices")
    half_logits, updated = mapped(halves)
    np.testing.assert_allclose(half_logits.reshape(4, 5), logits, atol=1e-4)
    for device in (0, 1):
        on_device = jax.tree.map(lambda leaf, d=device: leaf[d], updated)
        chex.assert_trees_all_close(on_device, expected, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "resnet9",
        "resnet2",
        "resnet08",
        "resnet",
        "resnet8_0",
        "resnet8_",
        "wrn28",
        "wrn4_2",
        "wrn12_2",
        "wrn16_0",
        "",
        "vgg",
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(InputError) as error:
        build_model(name, 10)
    assert str(error.value).startswith(f"model: got {name!r}; allowed: ")
    for known in (*RESNETS, *WIDE_RESNETS, "cnn", "resnet<6n+2>", "wrn<6n+4>_<width>"):
        assert known in str(error.value)


def test_every_listed_name_can_be_built_and_others_of_the_families() -> None:
    assert {*RESNETS, *WIDE_RESNETS, "cnn"} <= set(ktg.model_names())
    for name in (*RESNETS, *WIDE_RESNETS, "cnn", "resnet26", "resnet8_8", "wrn22_1"):
        assert isinstance(build_model(name, 10), NodeFns)


class Linear(nn.Module):
    """Has neither a field dtype nor axis_name."""

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        return nn.Dense(self.num_classes)(images.reshape(len(images), -1))


def test_a_registered_linen_module_is_built_by_name() -> None:
    register_model("test-linear", Linear)
    assert "test-linear" in ktg.model_names()
    fns = build_model("test-linear", 5)
    assert num_parameters(fns, (4, 4, 1)) == 16 * 5 + 5


def test_registered_node_functions_are_given_back() -> None:
    made = {}

    def factory(num_classes: int) -> NodeFns:
        made[num_classes] = ktg.from_linen(Linear(num_classes))
        return made[num_classes]

    register_model("test-functions", factory)
    assert build_model("test-functions", 3) is made[3]


def test_a_built_in_models_name_is_refused() -> None:
    for name in ("cnn", "resnet8", "wrn40_4"):
        with pytest.raises(InputError, match=f"name: got '{name}'; allowed: a name that no built-"):
            register_model(name, Linear)
    assert num_parameters(build_model("resnet8", 10)) > 50_000


def test_registering_a_name_again_replaces_its_model() -> None:
    register_model("test-again", Linear)
    register_model("test-again", lambda num_classes: Linear(2 * num_classes))
    assert num_parameters(build_model("test-again", 5), (4, 4, 1)) == 16 * 10 + 10
    assert ktg.model_names().count("test-again") == 1


@pytest.mark.parametrize("name", ["", "a b", "-a", "a/b", "a\n"])
def test_a_malformed_name_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"name: got .*; allowed: letters, digits, '_', '.' and"):
        register_model(name, Linear)


def test_a_factory_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(InputError, match=r"factory: got .*; allowed: a function of the number of"):
        register_model("test-uncallable", 10)  # type: ignore[arg-type]
    assert "test-uncallable" not in ktg.model_names()


def test_a_model_without_a_dtype_cannot_be_built_in_another() -> None:
    register_model("test-float32", Linear)
    register_model("test-float32-functions", lambda n: ktg.from_linen(Linear(n)))
    for name in ("test-float32", "test-float32-functions"):
        with pytest.raises(InputError, match=f"model: got '{name}'; allowed: for bfloat16, a lin"):
            build_model(name, 5, dtype=jnp.bfloat16)
        assert isinstance(build_model(name, 5, axis_name="devices"), NodeFns)


def test_the_same_model_is_the_same_functions_and_another_is_not() -> None:
    fns = ktg.build_model("resnet8", 10)
    assert ktg.build_model("resnet8", 10) is fns
    assert ktg.build_model("resnet8", 11) is not fns
    assert ktg.build_model("resnet8", 10, dtype=jnp.bfloat16) is not fns
    assert ktg.build_model("resnet8", 10, axis_name="data") is not fns
    ktg.register_model("again", lambda num_classes: nn.Dense(num_classes))
    first = ktg.build_model("again", 10)
    ktg.register_model("again", lambda num_classes: nn.Dense(num_classes))
    assert ktg.build_model("again", 10) is not first
