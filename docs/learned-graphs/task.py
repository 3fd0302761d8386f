"""One target, its two recorded teachers, and trainings of it under any coefficients of its gates.

A graph is `theta`, float `[3, 4]`: the row of the target in `[receiver, sender, 4]`, of its label
edge and of the edges from both teachers. A gate weighs a sample by a + b p + c [sender right], p
being the progress; d is not used, nor is c of the label.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ktg_jax as ktg
from ktg_jax.data.sources import load_dataset
from ktg_jax.models.network import NO_NETWORK
from ktg_jax.recording import Recording
from ktg_jax.training.batches import Arrays, Batches, steps_per_epoch
from ktg_jax.training.evaluation import make_evaluator
from ktg_jax.training.host_batches import BatchStream

EPOCHS, BATCH_SIZE, TEMPERATURE = 6, 32, 1.0
FREE = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]], np.float32)
"""Which coefficients are looked for: eight numbers."""

Theta = Any
"""float `[3, 4]`, or a function from the epoch (0 ..) to such."""


class Scores(NamedTuple):
    """What the target is worth on some images."""

    accuracy: float
    loss: float


class Task:
    """The images and recordings, and what is compiled for them.

    Args:
        data_dir: where CIFAR-10 is.
        recordings: of both teachers, of the batches of the training.
    """

    def __init__(self, data_dir: str, recordings: Sequence[Path]) -> None:
        given = {"train_limit": 4000, "val_fraction": 0.4, "image_size": 16}
        self.data = load_dataset("cifar10", data_dir, **given)
        train = self.data.train
        stream = BatchStream(
            train.images, train.labels, Batches(len(train), BATCH_SIZE, max_offset=2, flip=True), 0
        )
        self.per_epoch = steps_per_epoch(len(train), BATCH_SIZE)
        self.steps = EPOCHS * self.per_epoch
        read = [Recording(folder) for folder in recordings]
        for each in read:
            each.check(stream.facts, classes=10, steps=self.steps)
        self.outputs = np.stack([each.rows(0, self.steps) for each in read], axis=1)
        teachers = [ktg.Node(name=f"teacher{i}", outputs=str(f)) for i, f in enumerate(recordings)]
        cut = ["cutoff"] * 3
        self.graph = ktg.Graph([ktg.Node("resnet8"), *teachers], [["through"] * 3, cut, cut])
        self.node_fns = [ktg.build_model("resnet8", 10), NO_NETWORK, NO_NETWORK]
        self.optimizer = ktg.sgd(ktg.step_schedule(0.1, total_steps=self.steps), 5e-4)
        self.images, self.labels = map(np.stack, zip(*stream.host(0, self.steps), strict=True))
        self._step = jax.jit(self.step)
        here = ktg.Parallel("jit", jax.local_devices()[:1])
        self._evaluate = make_evaluator(self.node_fns, here)
        splits = {"val": self.data.val, "test": self.data.test}
        self._splits = {name: Arrays(each.images, each.labels) for name, each in splits.items()}

    def begin(self, seed: int) -> Any:
        """The state before the first step."""
        key = jax.random.split(jax.random.key(seed))[0]
        sample = jnp.zeros((1, *self.data.image_shape))
        return ktg.init_state(self.graph, self.node_fns, self.optimizer, key, sample)

    def batch(self, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images, labels and the teachers' logits of a step."""
        return self.images[k], self.labels[k], self.outputs[k]

    def step(self, state: Any, theta: Any, images: Any, labels: Any, outputs: Any) -> Any:
        """The state after one more step; differentiable in `theta` and in the state."""
        gates = jnp.zeros((3, 3, 4)).at[0].set(theta)
        progress = (state.step + 1) / self.steps
        recorded = {1: outputs[0], 2: outputs[1]}
        how = {"node_fns": self.node_fns, "optimizer": self.optimizer, "recorded": recorded}
        how["temperature"] = TEMPERATURE
        return ktg.train_step(state, images, labels, gates, progress, **how)[0]

    def run(self, state: Any, theta: Any, first: int, last: int) -> Any:
        """The state after the steps from the first on, without the last."""
        theta = jnp.asarray(theta, jnp.float32)
        for k in range(first, last):
            state = self._step(state, theta, *self.batch(k))
        return state

    def scores(self, state: Any, split: str = "val") -> Scores:
        """Of the target on the validation or the test images."""
        means = self._evaluate(state, self._splits[split])
        return Scores(float(means["accuracy"][0]), float(means["loss"][0]))

    def train(self, theta: Theta, seed: int, epochs: int = EPOCHS) -> Any:
        """The state after so many epochs from new weights."""
        state, of_epoch = self.begin(seed), theta if callable(theta) else lambda epoch: theta
        for epoch in range(epochs):
            first = epoch * self.per_epoch
            state = self.run(state, of_epoch(epoch), first, first + self.per_epoch)
        return state
