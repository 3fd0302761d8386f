"""A tiny causal language model learns beside a larger one, from the text of Python's own help.

    python docs/examples/language_model.py

The nodes of a graph need not see images: here they see tokens, int `[B, T]`, and put out logits
`[B, T, V]`. Losses, gates and masks are the same as ever.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pydoc_data.topics import topics
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import ktg_jax as ktg

PADDING = 0
LENGTH = 64


class LanguageModel(nn.Module):
    """A causal transformer over characters."""

    vocabulary: int
    width: int
    layers: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of each next character, `[B, T, V]`."""
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x = x + nn.Embed(LENGTH, self.width)(jnp.arange(tokens.shape[1]))
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(y, mask=mask)
            y = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
            x = x + nn.Dense(self.width)(nn.gelu(y))
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


def paragraphs() -> tuple[np.ndarray, int]:
    """The help's paragraphs as padded tokens, int32 `[n, LENGTH + 1]`, and how many there are."""
    texts = [part for topic in sorted(topics) for part in topics[topic].split("\n\n")]
    texts = [" ".join(text.split())[: LENGTH + 1] for text in texts]
    texts = [text for text in texts if len(text) > LENGTH // 4 and text.isascii()]
    characters = sorted(set("".join(texts)))
    number = {character: i for i, character in enumerate(characters, 1)}
    tokens = np.full((len(texts), LENGTH + 1), PADDING, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = [number[character] for character in text]
    return tokens, len(characters) + 1


def batch_of(tokens: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the models see, what comes next, and where there is something to come."""
    seen, following = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
    return seen, following, following != PADDING


def train(steps: int, batch_size: int, seed: int = 0, quiet: bool = False) -> dict[str, Any]:
    """Trains both models together; returns their losses and accuracies on held-out paragraphs."""
    tokens, vocabulary = paragraphs()
    tokens = np.random.default_rng(0).permutation(tokens)
    held_out, tokens = tokens[:256], tokens[256:]
    graph = ktg.Graph(
        [ktg.Node("small", "student"), ktg.Node("large", "partner")],
        [["through", ktg.Edge("linear", temperature=2.0)], ["correct", "through"]],
    )
    node_fns = [
        ktg.from_linen(LanguageModel(vocabulary, width, layers))
        for width, layers in ((32, 1), (64, 2))
    ]
    optimizer = optax.adamw(2e-3)
    state = ktg.init_state(
        graph, node_fns, optimizer, jax.random.key(seed), jnp.zeros((1, LENGTH), jnp.int32)
    )
    step = jax.jit(partial(ktg.train_step, node_fns=node_fns, optimizer=optimizer))
    rng = np.random.default_rng(seed)
    for k in range(1, steps + 1):
        seen, following, where = batch_of(tokens[rng.integers(len(tokens), size=batch_size)])
        state, metrics = step(state, seen, following, graph.edge_arrays, k / steps, where=where)
        if not quiet and (k % 50 == 0 or k == steps):
            losses = ", ".join(f"{loss:.3f}" for loss in metrics["loss"])
            print(f"step {k}: losses {losses}", flush=True)
    sums = jax.jit(partial(ktg.eval_step, node_fns=node_fns))(state, *batch_of(held_out))
    return {
        "characters": float(sums["count"]),
        "loss": (sums["loss"] / sums["count"]).tolist(),
        "accuracy": (sums["correct"] / sums["count"]).tolist(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="updates (default: 300)")
    parser.add_argument("--batch-size", type=int, default=32, help="paragraphs (default: 32)")
    options = parser.parse_args(arguments)
    found = train(options.steps, options.batch_size)
    for i, name in enumerate(("student", "partner")):
        print(
            f"{name}: {found['loss'][i]:.3f} nats a character, "
            f"{100 * found['accuracy'][i]:.1f} % of the next characters right"
        )


if __name__ == "__main__":
    main()
