"""Graphs over tokens: masks, chunks, memory, and a language model that learns."""

import importlib.util
import sys
from functools import partial
from types import ModuleType
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import ROOT

import ktg_jax as ktg
from ktg_jax import Edge, Graph, InputError, Mixed, Node, chunks
from ktg_jax.training.per_node import per_node_step
from ktg_jax.training.placement import place

SHAPE = (3, 4, 7, 5)  # nodes, sequences, tokens, words
LOGITS = jax.random.normal(jax.random.key(0), SHAPE)
LABELS = jax.random.randint(jax.random.key(1), SHAPE[1:3], 0, 5)
WHERE = jnp.arange(7)[None] < jnp.array([7, 5, 2, 6])[:, None]
GRAPH = Graph(
    ["cnn"] * 3,
    [["through", Edge("linear", "decoupled_kl", 2.0), Edge("correct", temperature=3.0)],
     ["cutoff", "negative_linear", {"gate": "through", "loss": {"reverse_kl": 1, "dist": 0.5}}],
     ["correct", Edge("through", "jensen_shannon(beta=0.2)"), "linear"]],
)  # fmt: skip


@pytest.fixture(params=[1, 2, 3, 5])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many tokens are in a chunk."""
    monkeypatch.setattr(chunks, "MOST_NUMBERS", request.param * 9 * 4 * 5)
    return request.param


def test_masked_tokens_do_not_count_and_each_other_one_counts_alike() -> None:
    edges = jnp.array([[0, 0], [1, 1]])
    found = ktg.edge_losses(LOGITS[:2], LABELS, edges, 1.0, where=WHERE)
    cross_entropy = ktg.cross_entropy(LOGITS[0], LABELS)
    divergence = ktg.kl_divergence(LOGITS[0], LOGITS[1])
    for entry, losses in ((found[0, 0], cross_entropy), (found[0, 1], divergence)):
        np.testing.assert_allclose(entry, losses[WHERE].mean(), rtol=1e-5)
    dirty = jnp.where(WHERE[None, :, :, None], LOGITS[:2], jnp.nan)
    labels = jnp.where(WHERE, LABELS, -100)
    again = ktg.edge_losses(dirty, labels, edges, 1.0, where=WHERE)
    np.testing.assert_allclose(again, found, rtol=1e-6)


@pytest.mark.parametrize("where", [None, WHERE], ids=["all", "masked"])
@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "mixed"])
def test_chunks_change_neither_losses_nor_gradients(
    at_once: int, where: Any, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(logits: Any) -> Any:
        mix = Mixed(LABELS[::-1], jnp.full(LABELS.shape, 0.75)) if mixed else None
        given = list(logits), LABELS, GRAPH.edge_arrays, 0.3
        return ktg.edge_losses(*given, where=where, mixed=mix)

    assert chunks.tokens_at_once(3, SHAPE[1:]) == at_once
    found = losses(LOGITS), jax.grad(lambda z: losses(z).sum())(LOGITS)
    monkeypatch.undo()
    assert chunks.tokens_at_once(3, SHAPE[1:]) == 7
    expected = losses(LOGITS), jax.grad(lambda z: losses(z).sum())(LOGITS)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_chunks_go_through_connectors(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [Node("cnn", "a"), Node("cnn", "b", classes=3)]
    by = Edge("linear", connector="linear")
    edges = Graph(nodes, [["through", by], ["cutoff"] * 2]).edge_arrays
    layer = {"kernel": jnp.arange(15.0).reshape(5, 3) / 9, "bias": jnp.zeros(3)}
    connectors = [{"b": {"logits": {"layer1": layer}}}, {}]
    given = [LOGITS[0], LOGITS[1, ..., :3]], LABELS, edges, 0.3
    found = ktg.edge_losses(*given, connectors=connectors)
    monkeypatch.undo()
    np.testing.assert_allclose(found, ktg.edge_losses(*given, connectors=connectors), rtol=1e-5)
    assert found[0, 1] > 0


def test_memory_does_not_grow_with_all_pairs_of_nodes_and_all_tokens() -> None:
    nodes, batch, words = 6, 4, 2048
    gates = jnp.zeros((nodes, nodes), jnp.int32)

    def memory(length: int) -> int:
        labels = jnp.zeros((batch, length), jnp.int32)
        gradient = jax.jit(jax.grad(lambda z: ktg.graph_loss(z, labels, gates, 1.0)))
        logits = jax.ShapeDtypeStruct((nodes, batch, length, words), jnp.float32)
        found = gradient.lower(logits).compile().memory_analysis()
        assert found is not None
        return int(found.temp_size_in_bytes)

    more = memory(512) - memory(256)
    # With all pairs of nodes at once it is 31 times as much as the logits of these tokens.
    assert more < 4 * (4 * nodes * batch * 256 * words)


class Words(nn.Module):
    """A language model of one word."""

    vocabulary: int = 5

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        return nn.Dense(self.vocabulary)(nn.Embed(self.vocabulary, 8)(tokens))


def test_both_engines_train_tokens_alike() -> None:
    graph, fns, optimizer = ktg.graphs.mutual(["cnn"] * 2), [ktg.from_linen(Words())] * 2, ktg.sgd()
    tokens = jax.random.randint(jax.random.key(2), (4, 7), 0, 5)
    state = ktg.init_state(graph, fns, optimizer, jax.random.key(0), tokens)
    how: dict[str, Any] = {"node_fns": fns, "optimizer": optimizer, "where": WHERE}
    step = jax.jit(partial(ktg.train_step, **how))
    placement = (jax.local_devices()[0],) * 2
    other = place(state, placement)
    for k in (1, 2):
        state, metrics = step(state, tokens, LABELS, graph.edge_arrays, k / 2)
        images = {placement[0]: tokens}
        other, found = per_node_step(
            other, images, LABELS, graph.edge_arrays, k / 2, placement=placement, **how
        )
    chex.assert_trees_all_close(found, metrics, rtol=1e-5)
    chex.assert_trees_all_close(other.params, state.params, rtol=1e-5, atol=1e-6)
    sums = ktg.eval_step(state, tokens, LABELS, WHERE, node_fns=fns)
    logits = [fns[0].apply(p, s, tokens, False)[0]
              for p, s in zip(state.params, state.model_state, strict=True)]  # fmt: skip
    assert float(sums["count"]) == float(WHERE.sum())
    expected = [float(ktg.cross_entropy(z, LABELS)[WHERE].sum()) for z in logits]
    np.testing.assert_allclose(sums["loss"], expected, rtol=1e-5)


def test_integers_that_are_no_tokens_are_still_refused() -> None:
    fns = ktg.from_linen(Words())
    params, state = fns.init(jax.random.key(0), jnp.zeros((1, 7), jnp.int32))
    for images in (jnp.zeros((4, 8, 8, 1), jnp.int32), jnp.zeros((4, 7), jnp.uint8)):
        with pytest.raises(InputError, match=r"images: .*floats"):
            ktg.node_forward(params, state, images, fns=fns)


@pytest.fixture
def example() -> ModuleType:
    """The example of the docs."""
    path = ROOT / "docs" / "examples" / "language_model.py"
    spec = importlib.util.spec_from_file_location("language_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["language_model"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_language_model_learns(example: ModuleType) -> None:
    tokens, vocabulary = example.paragraphs()
    assert len(tokens) > 1000
    found = example.train(steps=120, batch_size=16, quiet=True)
    counts = np.bincount(tokens[:, 1:][tokens[:, 1:] != 0], minlength=vocabulary)
    shares = counts[counts > 0] / counts.sum()
    of_letters_alone = -np.sum(shares * np.log(shares))
    assert max(found["loss"]) < of_letters_alone - 0.2
    assert min(found["accuracy"]) > 0.25
