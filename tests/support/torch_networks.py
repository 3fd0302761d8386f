"""Other people's networks in PyTorch, in short: their names and their shortcuts, not their code."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason='needs: pip install "ktg_jax[reference]"')
import safetensors.torch  # noqa: E402 - it needs torch

from benchmarks.torch_baseline import conv  # noqa: E402

nn, functional = torch.nn, torch.nn.functional


class PadsBothSides(nn.Module):  # type: ignore[name-defined]
    """Every second pixel; the new channels are zeros, half before and half behind the old ones."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.each = outputs // 4

    def forward(self, x: Any) -> Any:
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.each, self.each))


class Block(nn.Module):  # type: ignore[name-defined]
    """A basic block or a bottleneck, whose shortcut is called by a name of one's choice."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, shortcut: str, bottleneck: bool
    ) -> None:
        super().__init__()
        inner = outputs // 4 if bottleneck else outputs
        sizes = [(inputs, inner, 3, stride), (inner, inner, 3, 1)]
        if bottleneck:
            sizes = [(inputs, inner, 1, 1), (inner, inner, 3, stride), (inner, outputs, 1, 1)]
        self.number = len(sizes)
        for i, size in enumerate(sizes, start=1):
            self.add_module(f"conv{i}", conv(*size))
            self.add_module(f"bn{i}", nn.BatchNorm2d(size[1]))
        self.way = shortcut
        if stride != 1 or inputs != outputs:
            made = [conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)]
            is_padded = shortcut == "padded"
            self.add_module(shortcut, PadsBothSides(outputs) if is_padded else nn.Sequential(*made))

    def forward(self, x: Any) -> Any:
        y, modules = x, dict(self.named_children())
        for i in range(1, self.number + 1):
            y = modules[f"bn{i}"](modules[f"conv{i}"](y))
            y = y if i == self.number else y.relu()
        return (y + (modules[self.way](x) if self.way in modules else x)).relu()


class ResNet(nn.Module):  # type: ignore[name-defined]
    """A ResNet of `layer<g>.<b>` whose classifier and shortcuts have names of one's choice."""

    def __init__(
        self,
        blocks: Iterable[int],
        widths: Iterable[int],
        *,
        stem: int = 16,
        classifier: str = "fc",
        shortcut: str = "downsample",
        bottleneck: bool = False,
        channels: int = 3,
        classes: int = 7,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, stem, 3), nn.BatchNorm2d(stem)
        inputs, self.layers = stem, []
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), start=1):
            made = []
            for i in range(count):
                stride = 2 if stage > 1 and i == 0 else 1
                made.append(Block(inputs, width, stride, shortcut, bottleneck))
                inputs = width
            self.add_module(f"layer{stage}", nn.Sequential(*made))
            self.layers.append(f"layer{stage}")
        self.add_module(classifier, nn.Linear(inputs, classes))
        self.last = classifier

    def forward(self, x: Any) -> Any:
        modules = dict(self.named_children())
        x = self.bn1(self.conv1(x)).relu()
        for name in self.layers:
            x = modules[name](x)
        return modules[self.last](x.mean(dim=(2, 3)))


def randomised(network: Any, seed: int = 0) -> Any:
    """The network with random scales, biases and statistics, as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.copy_(torch.exp(0.3 * torch.randn(tensor.shape, generator=generator)))
            for tensor in (module.bias.data, module.running_mean):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return network


def save(state: dict[str, Any], path: Path) -> Path:
    safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path
