"""Stages of any module by the paths of its submodules, and nnx modules in mixed precision."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_networks import Block, Net
from runs import in_process, options, small

import ktg_jax as ktg
from experiments import train
from ktg_jax import InputError, NodeFns, Outputs
from ktg_jax.io.trees import flatten

IMAGES = jnp.asarray(np.random.default_rng(0).random((4, 8, 8, 1), np.float32))


class LinenBlock(nn.Module):
    """A convolution with batch statistics."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(self.width, (3, 3), strides=2)(x)
        return nn.relu(nn.BatchNorm(not train)(x))


class LinenBackbone(nn.Module):
    """Two blocks, named as somebody else does."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return LinenBlock(6, name="second")(LinenBlock(4, name="first")(x, train), train)


class LinenNet(nn.Module):
    """A backbone and a head."""

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = LinenBackbone(name="backbone")(images, train)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


class Named(nnx.Module):
    """Stages named as ours are, not in the order of their numbers."""

    def __init__(self, num_classes: int, *, rngs: nnx.Rngs) -> None:
        self.stage2 = Block(4, 6, rngs=rngs)
        self.stage1 = Block(1, 4, rngs=rngs)
        self.head = nnx.Linear(6, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.head(self.stage2(self.stage1(images)).mean((1, 2)))


def staged(fns: NodeFns, train: bool = False) -> tuple[Outputs, Any, Any, Any]:
    params, state = fns.init(jax.random.key(0), IMAGES)
    assert fns.stages is not None
    given, new = fns.stages(params, state, IMAGES, train)
    return Outputs(*given[:2]), params, state, new


LINEN = ktg.from_linen(LinenNet(5), stages=["backbone.first", "backbone.second"])
NNX = ktg.from_nnx(Net, 5, stages=["blocks.0", "blocks.1"])
NAMED = ktg.from_nnx(Named, 5)


@pytest.mark.parametrize("fns", [LINEN, NNX, NAMED], ids=["linen", "nnx", "named"])
@pytest.mark.parametrize("train", [False, True], ids=["evaluates", "trains"])
def test_stages_come_beside_the_same_logits_and_state(fns: NodeFns, train: bool) -> None:
    found, params, state, new = staged(fns, train)
    logits, expected = fns.apply(params, state, IMAGES, train)
    np.testing.assert_allclose(found.logits, logits, rtol=1e-5, atol=1e-6)
    given = flatten(new), flatten(expected)
    chex.assert_trees_all_close(*given, rtol=1e-5)
    assert [stage.shape for stage in found.stages] == [(4, 4, 4, 4), (4, 2, 2, 6)]


def test_the_stages_are_what_their_submodules_return() -> None:
    found, params, state, _ = staged(LINEN)
    module = LinenBlock(4)
    variables = {"params": params["backbone"]["first"],
                 "batch_stats": state["batch_stats"]["backbone"]["first"]}  # fmt: skip
    expected: Any = module.apply(variables, IMAGES, False)
    np.testing.assert_allclose(found.stages[0], expected, rtol=1e-6)
    found, params, state, _ = staged(NNX)
    block = Block(1, 4, rngs=nnx.Rngs(0))
    nnx.update(block, nnx.State({"conv": params["blocks"][0]["conv"]}))
    nnx.update(block, nnx.State({"norm": params["blocks"][0]["norm"]}))
    block.eval()
    np.testing.assert_allclose(found.stages[0], block(IMAGES), rtol=1e-5, atol=1e-6)


def test_paths_are_taken_in_their_order() -> None:
    fns = ktg.from_nnx(Net, 5, stages=["blocks.1", "blocks.0"])
    assert [stage.shape[-1] for stage in staged(fns)[0].stages] == [6, 4]


def test_one_step_of_linen_beside_nnx_compares_their_stages() -> None:
    fns, optimizer = [LINEN, NNX], ktg.sgd()
    graph = ktg.Graph(["a", "b"], [["through", ktg.Edge(loss="features")], ["through"] * 2])
    state = ktg.init_state(graph, fns, optimizer, jax.random.key(0), IMAGES)
    labels = jnp.arange(4)
    state, metrics = jax.jit(
        lambda s: ktg.train_step(
            s, IMAGES, labels, graph.edge_arrays, 1.0, node_fns=fns, optimizer=optimizer
        )
    )(state)
    assert float(metrics["edge_losses"][0, 1]) > 0


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda: staged(ktg.from_linen(LinenNet(5), stages=["backbone.third"])), "backbone.third"),
        (lambda: ktg.from_nnx(Net, 5, stages=["blocks.7"]), "blocks.7"),
        (lambda: ktg.from_nnx(Net, 5, stages="blocks.0"), "blocks.0"),
        (lambda: ktg.from_nnx(Net, 5, stages=[]), []),
        (lambda: ktg.from_linen(LinenNet(5), stages=["a", "a"]), ["a", "a"]),
        (lambda: ktg.register_model("x", LinenNet, stages=[3]), [3]),  # type: ignore[list-item]
    ],
)
def test_paths_that_are_not_there_are_refused(make: Any, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        make()
    assert (caught.value.field, caught.value.value) == ("stages", value)


def test_without_names_or_paths_there_are_none() -> None:
    assert ktg.from_nnx(Net, 5).stages is None


# --- mixed precision of nnx


def test_an_nnx_module_computes_in_bfloat16_and_keeps_its_parameters() -> None:
    ktg.register_model("nnx_net", lambda n: ktg.from_nnx(Net, n, stages=["blocks.1"]))
    plain = ktg.build_model("nnx_net", 5)
    mixed = ktg.build_model("nnx_net", 5, dtype=jnp.bfloat16)
    assert mixed == ktg.build_model("nnx_net", 5, dtype=jnp.bfloat16)
    found, params, state, _ = staged(mixed)
    expected = staged(plain)
    assert (found.logits.dtype, found.stages[0].dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    chex.assert_trees_all_equal(params, expected[1])
    np.testing.assert_allclose(
        found.logits.astype(jnp.float32), expected[0].logits, rtol=0.05, atol=0.05
    )
    _, new = mixed.apply(params, state, IMAGES, True)
    kinds = [jax.tree.map(lambda leaf: leaf.dtype, each) for each in (state, new)]
    assert kinds[0] == kinds[1]


def test_what_was_told_another_dtype_keeps_it() -> None:
    def make(num_classes: int) -> NodeFns:
        return ktg.from_nnx(nnx.Linear, 64, num_classes, dtype=jnp.float16)

    ktg.register_model("told", make)
    fns = ktg.build_model("told", 5, dtype=jnp.bfloat16)
    params, state = fns.init(jax.random.key(0), jnp.zeros((1, 64)))
    assert fns.apply(params, state, jnp.ones((2, 64)), False)[0].dtype == jnp.float16


@pytest.mark.slow
def test_a_run_trains_it_in_mixed_precision(tmp_path: Any) -> None:
    how: dict[str, Any] = {"models": ("dropping", "tiny"), "mixed_precision": True, "epochs": 1}
    ended = in_process(train.main, *options(small(tmp_path / "run", **how)))
    assert (ended.code, ended.err) == (0, "")
