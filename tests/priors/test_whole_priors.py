"""Priors of whole students: what a node starts from, and its file."""

import dataclasses
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_variables import random_variables
from tiny_models import Staged, Tiny

import ktg_jax as ktg
from ktg_jax.errors import InputError
from ktg_jax.io.trees import by_path
from ktg_jax.priors import load_prior, prior_distance, save_prior, whole_prior

IMAGES = jnp.zeros((4, 8, 8, 1))
FNS = ktg.from_linen(Staged(5))
FITTED = random_variables(FNS, IMAGES, seed=3)
ABOUT: dict[str, Any] = {"student": "staged", "num_classes": 5, "image_shape": (8, 8, 1)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prior.safetensors"
    save_prior(path, whole_prior(*FITTED), **ABOUT)
    return path


def begun(file: Path, node_fns: ktg.NodeFns = FNS, **options: Any) -> Any:
    """The state of a node with the prior before and after that is seen to, and its prior."""
    graph = ktg.graphs.independent([ktg.Node("staged", prior=str(file), **options)])
    given = graph, [node_fns], ktg.sgd(), jax.random.key(0), IMAGES
    state = ktg.init_state(*given)
    after, priors = ktg.with_priors(state, graph)
    return state, after, priors[0]


def test_it_speaks_of_every_convolution() -> None:
    prior = whole_prior(*FITTED)
    assert prior.paths == ("stage1_conv.kernel", "stage2_conv.kernel")
    np.testing.assert_allclose(prior_distance(FITTED[0], prior), 0, atol=1e-6)
    resnet = ktg.build_model("resnet8", 10)
    variables = random_variables(resnet, jnp.zeros((1, 8, 8, 3)), 0)
    assert len(whole_prior(*variables).paths) == 7
    with pytest.raises(InputError, match=r"^params: got \['classifier.bias', .*with convolutions"):
        whole_prior(*random_variables(ktg.from_linen(Tiny(5)), IMAGES, 0))


def test_a_node_starts_from_all_of_it(file: Path) -> None:
    before, state, prior = begun(file, prior_weight=0.5)
    chex.assert_trees_all_equal((state.params[0], state.model_state[0]), FITTED)
    assert (
        before.params[0]["classifier"]["kernel"] != state.params[0]["classifier"]["kernel"]
    ).all()
    assert (prior.weight, prior.prior.start) == (0.5, None)
    np.testing.assert_allclose(prior_distance(state.params[0], prior.prior), 0, atol=1e-6)


@pytest.mark.parametrize("matching", ["none", "assignment"])
def test_a_node_that_is_matched_otherwise_starts_as_it_did(file: Path, matching: str) -> None:
    before, state, prior = begun(file, prior_matching=matching)
    chex.assert_trees_all_equal(state, before)
    assert prior.prior.start is None


def test_random_streams_are_each_runs_own(file: Path) -> None:
    class Dropping(Staged):
        @nn.compact
        def __call__(self, images: jax.Array, train: bool) -> jax.Array:
            x = nn.Conv(4, (3, 3), use_bias=False, name="stage1_conv")(images)
            x = nn.Dropout(0.5, deterministic=not train)(x.mean((1, 2)))
            return nn.Dense(5, name="classifier")(x)

    fns = ktg.from_linen(Dropping(5))
    save_prior(file, whole_prior(*fns.init(jax.random.key(1), IMAGES)), **ABOUT)
    before, state, _ = begun(file, fns)
    keys = [jax.random.key_data(s.model_state[0]["random_stream"]["key"]) for s in (before, state)]
    assert (keys[0] == keys[1]).all()
    kernels = [by_path(s.params[0])["classifier.kernel"] for s in (before, state)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0


def test_it_comes_back_from_its_file(file: Path) -> None:
    given, found = whole_prior(*FITTED), load_prior(file)
    assert found.paths == given.paths
    chex.assert_trees_all_equal(found.kernels, given.kernels)
    chex.assert_trees_all_equal(found.start, given.start)
    assert len(file.read_bytes()) < 2 * sum(a.nbytes for a in jax.tree.leaves(FITTED)) + 4000


def test_kernels_that_are_not_the_starts_keep_it_whole(file: Path) -> None:
    whole = whole_prior(*FITTED)
    other = dataclasses.replace(whole, kernels=tuple(2 * kernel for kernel in whole.kernels))
    save_prior(file, other, **ABOUT)
    found = load_prior(file)
    chex.assert_trees_all_equal((found.kernels, found.start), (other.kernels, whole.start))


def test_a_prior_of_other_channels_is_refused_by_node(file: Path) -> None:
    wider = ktg.from_linen(Staged(5, (4, 7)))
    with pytest.raises(InputError) as error:
        begun(file, wider)
    message = "allowed: shape (7, 5); others that differ: stage2_conv.kernel; found prior class"
    assert str(error.value).startswith(f"nodes[0].prior: got '{file}'; {message}")


def test_a_damaged_start_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="an undamaged file"):
        load_prior(file)
