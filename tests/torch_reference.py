"""The authors' networks, losses and training step in PyTorch, written again in short.

What ours must equal. Submodules have the names of ours, so that weights convert by name.
"""

from collections.abc import Sequence
from typing import Any

import flax.traverse_util
import numpy as np
import pytest
from jax.typing import ArrayLike

from ktg_jax.nodes import PyTree

torch = pytest.importorskip("torch", reason='needs: pip install "ktg_jax[reference]"')
nn, functional = torch.nn, torch.nn.functional
Module: Any = nn.Module
torch.set_num_threads(1)  # more would wait for each other, and for XLA's, in arrays this small


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> Any:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class BasicBlock(Module):
    """Option A: where the width doubles, every second pixel and as many channels of zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        self.halves = stride == 2

    def forward(self, x: Any) -> Any:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        if self.halves:
            x = functional.avg_pool2d(x, kernel_size=1, stride=2)
            x = torch.cat([x, torch.zeros_like(x)], dim=1)
        return (x + y).relu()


class WideBlock(Module):
    """Pre-activation; the 1x1 shortcut sees the activation, too."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, 3, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs, 3)
        self.shortcut = None if inputs == outputs else conv(inputs, outputs, 1, stride)

    def forward(self, x: Any) -> Any:
        active = self.norm1(x).relu()
        y = self.conv2(self.norm2(self.conv1(active)).relu())
        return y + (x if self.shortcut is None else self.shortcut(active))


class Network(Module):
    """Both families: `resnet<6n+2>` and `wrn<6n+4>_<width>`."""

    def __init__(self, name: str, num_classes: int, channels: int = 3) -> None:
        super().__init__()
        self.is_wide = name.startswith("wrn")
        depth, width = map(int, name[3:].split("_")) if self.is_wide else (int(name[6:]), 1)
        block = WideBlock if self.is_wide else BasicBlock
        self.stem_conv = conv(channels, 16, 3)
        outputs = 16
        for stage in (1, 2, 3):
            for i in range(depth // 6):
                inputs, outputs = outputs, 2 ** (stage + 3) * width
                stride = 2 if stage > 1 and i == 0 else 1
                self.add_module(f"stage{stage}_block{i + 1}", block(inputs, outputs, stride))
        norm = nn.BatchNorm2d(outputs if self.is_wide else 16)
        self.add_module("final_norm" if self.is_wide else "stem_norm", norm)
        self.classifier = nn.Linear(outputs, num_classes)

    def forward(self, images: Any) -> Any:
        x = self.stem_conv(images)
        if not self.is_wide:
            x = self.stem_norm(x).relu()
        for name, module in self.named_children():
            if "block" in name:
                x = module(x)
        if self.is_wide:
            x = self.final_norm(x).relu()
        return self.classifier(x.mean(dim=(2, 3)))


def num_parameters(name: str, num_classes: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Network(name, num_classes).parameters())


def to_torch(params: PyTree, model_state: PyTree) -> dict[str, Any]:
    """The state_dict of `Network` for our params and batch statistics."""
    torch_names = {"kernel": "weight", "scale": "weight", "mean": "running_mean"}
    torch_names |= {"bias": "bias", "var": "running_var"}
    state_dict = {}
    for tree in (params, model_state["batch_stats"]):
        for path, leaf in flax.traverse_util.flatten_dict(dict(tree)).items():
            values = np.array(leaf)
            if values.ndim > 1:  # HWIO -> OIHW; of a dense layer IO -> OI
                values = np.moveaxis(values, (-1, -2), (0, 1))
            state_dict[".".join((*path[:-1], torch_names[path[-1]]))] = torch.tensor(values)
    return state_dict


def build(name: str, params: PyTree, model_state: PyTree) -> Any:
    """A `Network` with our weights."""
    outputs, channels = params["classifier"]["bias"].size, params["stem_conv"]["kernel"].shape[2]
    network = Network(name, outputs, channels)
    missing, unexpected = network.load_state_dict(to_torch(params, model_state), strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    return network


def to_nchw(images: ArrayLike) -> Any:
    return torch.tensor(np.asarray(images)).permute(0, 3, 1, 2)


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
