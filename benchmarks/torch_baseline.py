"""The same in PyTorch: networks, losses and the training step of a graph (extra: bench).

Written as one would write it for speed on a CPU: channels_last, every forward pass and every loss
once. Submodules have the names of ours, so that weights convert by name. Imports nothing of JAX.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.task import LEARNING_RATE, Implementation, Task, Unavailable, best_matmul

try:
    import torch
except ModuleNotFoundError:
    raise Unavailable('PyTorch is not installed: pip install "ktg_jax[bench]"') from None

nn, functional = torch.nn, torch.nn.functional
Module: Any = nn.Module

TORCH_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> Any:
    """A size x size convolution without bias, padded evenly."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class BasicBlock(Module):
    """Option A: where the width doubles, every second pixel and as many channels of zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        self.halves = stride == 2

    def forward(self, x: Any) -> Any:
        """Maps float `[B, inputs, H, W]` to `[B, outputs, ceil(H/stride), ceil(W/stride)]`."""
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
        """Maps float `[B, inputs, H, W]` to `[B, outputs, ceil(H/stride), ceil(W/stride)]`."""
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
        """Maps images, float `[B, C, H, W]`, to logits, `[B, num_classes]`."""
        x = self.stem_conv(images)
        if not self.is_wide:
            x = self.stem_norm(x).relu()
        for name, module in self.named_children():
            if "block" in name:
                x = module(x)
        if self.is_wide:
            x = self.final_norm(x).relu()
        return self.classifier(x.mean(dim=(2, 3)))


def to_torch(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The state_dict of a `Network`.

    Args:
        tensors: as in a file of `ktg.save_node`: `params.stem_conv.kernel`,
            `batch_stats.stem_norm.mean`.
    """
    state_dict = {}
    for name, values in tensors.items():
        _, *layer, leaf = name.split(".")
        if values.ndim > 1:  # HWIO -> OIHW; of a dense layer IO -> OI
            values = np.moveaxis(values, (-1, -2), (0, 1))
        state_dict[".".join((*layer, TORCH_NAMES[leaf]))] = torch.tensor(values)
    return state_dict


def build(name: str, tensors: Mapping[str, np.ndarray]) -> Any:
    """A `Network` with our weights, all of them."""
    outputs = len(tensors["params.classifier.bias"])
    network = Network(name, outputs, tensors["params.stem_conv.kernel"].shape[2])
    missing, unexpected = network.load_state_dict(to_torch(tensors), strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    return network


def to_nchw(images: np.ndarray) -> Any:
    """Images `[B, H, W, C]` as `[B, C, H, W]`; their memory stays as it is: channels_last."""
    return torch.tensor(images).permute(0, 3, 1, 2)


def graph_losses(logits: Sequence[Any], labels: Any, through: Sequence[Sequence[bool]]) -> Any:
    """The loss of every node, at temperature 1.

    Args:
        logits: N tensors `[B, C]`.
        labels: int64 `[B]`.
        through: N x N, row = receiver, column = sender: is the gate through, or cutoff?

    Returns:
        Float `[N]`: cross-entropy with the label (diagonal), and KL(p_s || p_t) for each sender,
        which is detached.
    """
    log_p = [functional.log_softmax(z, dim=1) for z in logits]
    senders = [p.detach() for p in log_p]
    losses = []
    for t, row in enumerate(through):
        edges = [
            functional.nll_loss(log_p[t], labels)
            if s == t
            else functional.kl_div(log_p[t], senders[s], reduction="batchmean", log_target=True)
            for s, is_through in enumerate(row)
            if is_through
        ]
        losses.append(torch.stack(edges).sum())
    return torch.stack(losses)


class Trainer:
    """A graph's training step: all nodes forward, all backward, each updated by its optimiser.

    Args:
        networks: one a node; their memory becomes channels_last.
        through: as for `graph_losses`; every row has one.
        learning_rate: the learning rate of the papers' SGD.
        compiled: whether the networks go through `torch.compile`.
        autocast: the kind of device on which networks compute in bfloat16; None: in float32.
    """

    def __init__(
        self,
        networks: Sequence[Any],
        through: Sequence[Sequence[bool]],
        learning_rate: float,
        compiled: bool = False,
        autocast: str | None = None,
    ) -> None:
        modules = [network.to(memory_format=torch.channels_last).train() for network in networks]
        self._forward = [torch.compile(m, dynamic=False) for m in modules] if compiled else modules
        self._autocast = autocast
        self._through = through
        self._optimizers = [
            torch.optim.SGD(m.parameters(), learning_rate, 0.9, weight_decay=5e-4, nesterov=True)
            for m in modules
        ]

    def step(self, images: Any, labels: Any) -> Any:
        """Updates every node; returns the losses before it, `[N]`."""
        with torch.autocast(self._autocast or "cpu", torch.bfloat16, self._autocast is not None):
            logits = [forward(images) for forward in self._forward]
        losses = graph_losses([z.float() for z in logits], labels, self._through)
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        losses.sum().backward()  # senders are detached: to each node the gradient of its own loss
        for optimizer in self._optimizers:
            optimizer.step()
        return losses.detach()


class TorchSession:
    """PyTorch, as `benchmarks.task.Session` describes it."""

    def __init__(self, task: Task, implementation: Implementation) -> None:
        begin = time.perf_counter()
        torch.set_num_threads(task.threads)
        from safetensors.numpy import load_file

        if task.weights is None:
            raise Unavailable("PyTorch needs a folder with the nodes' weights (--weights)")
        networks = [
            build(model, load_file(Path(task.weights) / f"{i}.safetensors"))
            for i, model in enumerate(task.models)
        ]
        images, labels = task.batch()
        self._batch = to_nchw(images), torch.tensor(labels, dtype=torch.int64)
        through = [[True] * len(networks)] * len(networks)
        self._trainer = Trainer(networks, through, LEARNING_RATE, implementation.compiled)
        init_seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        self.step()
        self.figures = {
            "init_s": init_seconds,
            "trace_s": None,
            "compile_s": None,  # torch.compile does it in the first step
            "flops": None,
            "first_step_s": time.perf_counter() - begin,
        }

    @property
    def losses(self) -> list[float]:
        """The nodes' losses in the last step."""
        return self._losses.tolist()

    def step(self) -> None:
        """Makes a step; PyTorch works in the calling thread, so the host's share is not known."""
        self._losses = self._trainer.step(*self._batch)

    def loop(self, steps: int) -> None:
        """Makes steps."""
        for _ in range(steps):
            self.step()

    def matmul_peak(self) -> float:
        """The most FLOP/s of a float32 matrix product with the process's threads."""

        def product_of(size: int) -> Callable[[], Any]:
            a = torch.ones(size, size)
            return lambda: torch.mm(a, a)

        return best_matmul(product_of)
