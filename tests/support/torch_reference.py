"""The authors' losses and training step in PyTorch, written again in short: what ours must equal.

The networks are those that the benchmarks run.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from jax.typing import ArrayLike

from ktg_jax.io.trees import FlatTree, flatten
from ktg_jax.models.network import PyTree

torch = pytest.importorskip("torch", reason='needs: pip install "ktg_jax[reference]"')
from benchmarks import torch_baseline as baseline  # noqa: E402 - it needs torch
from benchmarks.torch_baseline import Network, functional  # noqa: E402

torch.set_num_threads(1)  # more would wait for each other, and for XLA's, in arrays this small


def num_parameters(name: str, num_classes: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Network(name, num_classes).parameters())


def _tensors(params: PyTree, model_state: PyTree) -> FlatTree:
    """As a file of `ktg.save_node` has them."""
    return flatten({"params": params, **model_state})


def to_torch(params: PyTree, model_state: PyTree) -> dict[str, Any]:
    """The state_dict of `Network` for our params and batch statistics."""
    return baseline.to_torch(_tensors(params, model_state))


def build(name: str, params: PyTree, model_state: PyTree) -> Any:
    """A `Network` with our weights."""
    return baseline.build(name, _tensors(params, model_state))


def to_nchw(images: ArrayLike) -> Any:
    return baseline.to_nchw(np.asarray(images))


def node_loss(
    logits: Sequence[Any],
    labels: Any,
    receiver: int,
    gates: Sequence[str],
    progress: float,
    temperature: float,
) -> Any:
    """The authors' loss of a node, with their 1e-10 in the ratio and in the logarithm."""
    losses = []
    for sender, gate in enumerate(gates):
        right = torch.ones(len(labels))
        if sender == receiver:
            loss = functional.cross_entropy(logits[receiver], labels, reduction="none")
        else:
            source = logits[sender].detach()
            right = (source.argmax(dim=1) == labels).float()
            teacher = functional.softmax(source / temperature, dim=1)
            student = functional.softmax(logits[receiver] / temperature, dim=1)
            ratio = torch.log(teacher / (student + 1e-10) + 1e-10)
            loss = (teacher * ratio).sum(dim=1) * temperature**2
        weight = {"through": 1.0, "linear": progress, "negative_linear": 1 - progress}
        if gate == "correct":
            losses.append((loss * right).mean())
        elif gate != "cutoff":
            losses.append(loss.mean() * weight[gate])
    return torch.stack(losses).sum() if losses else torch.zeros((), requires_grad=True)


class Trainer:
    """A graph's training step: one forward pass of all nodes, then each from its own loss.

    In float64: float32 in torch strays from it further than ours does, where a ReLU's input is 0
    but for rounding.
    """

    def __init__(
        self, networks: Sequence[Any], gates: Sequence[Sequence[str]], learning_rate: float
    ) -> None:
        self.networks, self.gates = [network.double() for network in networks], gates
        self.optimizers = {
            i: torch.optim.SGD(
                network.parameters(), learning_rate, 0.9, weight_decay=5e-4, nesterov=True
            )
            for i, network in enumerate(self.networks)
            if set(gates[i]) != {"cutoff"}
        }

    def step(
        self, images: np.ndarray, labels: np.ndarray, progress: float, temperature: float
    ) -> tuple[list[float], list[float]]:
        """Updates every learner; returns all nodes' losses and accuracies before it."""
        for i, network in enumerate(self.networks):
            network.train(i in self.optimizers)  # ours: frozen nodes keep their statistics
        logits = [network(to_nchw(images).double()) for network in self.networks]
        targets = torch.tensor(labels)
        losses = [
            node_loss(logits, targets, i, row, progress, temperature)
            for i, row in enumerate(self.gates)
        ]
        for i, optimizer in self.optimizers.items():
            optimizer.zero_grad()
            losses[i].backward()
            optimizer.step()
        accuracies = [(z.argmax(dim=1) == targets).float().mean().item() for z in logits]
        return [loss.item() for loss in losses], accuracies
