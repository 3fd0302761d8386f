"""What a worker is asked to do. Imports no JAX and no PyTorch: first a process is set up.

Everything that both sides of a comparison must have in common is here, too.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

SEED = 0
LEARNING_RATE = 0.01  # low: one batch again and again must not drive a network to infinity
PROGRESS = 0.5  # of the training, for gates that depend on it
BASELINE = "torch"
COMPILED_BASELINE = "torch_compile"

Figures = dict[str, Any]


@dataclass(frozen=True)
class Implementation:
    """A way to compute the training step of a graph.

    Attributes:
        framework: `torch` (the baseline) or `jax` (ours).
        convolution: what ours uses on a CPU: `xla`, `chunked` or `onednn`.
        engine: how ours composes the step: `fused` or `per_node`.
        spread: whether the CPU is divided into a device for each thread, nodes spread over them.
        compiled: whether PyTorch's networks go through `torch.compile`.
    """

    framework: str
    convolution: str = "xla"
    engine: str = "fused"
    spread: bool = False
    compiled: bool = False


IMPLEMENTATIONS: dict[str, Implementation] = {
    BASELINE: Implementation("torch"),
    COMPILED_BASELINE: Implementation("torch", compiled=True),
    "xla": Implementation("jax"),
    "chunked": Implementation("jax", convolution="chunked"),
    "chunked_per_node": Implementation("jax", convolution="chunked", engine="per_node"),
    "chunked_spread": Implementation("jax", convolution="chunked", engine="per_node", spread=True),
    "onednn": Implementation("jax", convolution="onednn"),
    "onednn_per_node": Implementation("jax", convolution="onednn", engine="per_node"),
    "onednn_spread": Implementation("jax", convolution="onednn", engine="per_node", spread=True),
}
OURS = tuple(name for name, how in IMPLEMENTATIONS.items() if how.framework == "jax")


@dataclass(frozen=True)
class Task:
    """One implementation of one graph, in which every node learns from every other."""

    implementation: str
    """Name in `IMPLEMENTATIONS`."""
    models: tuple[str, ...]
    """The nodes' models."""
    threads: int = 1
    """CPU cores that the process may use."""
    batch_size: int = 64
    """Images a step."""
    image_shape: tuple[int, int, int] = (32, 32, 3)
    """Height, width and channels."""
    num_classes: int = 100
    """Number of logits."""
    weights: str | None = None
    """Folder with the nodes' weights, `0.safetensors` and so on. PyTorch needs it; ours makes the
    same weights itself."""

    @property
    def graph(self) -> str:
        """The graph in a word."""
        return "+".join(self.models)

    def arguments(self) -> list[str]:
        """The command line of a worker with this task."""
        words = ["--implementation", self.implementation, "--models", *self.models]
        words += ["--threads", str(self.threads), "--batch-size", str(self.batch_size)]
        words += ["--image-shape", *map(str, self.image_shape)]
        words += ["--num-classes", str(self.num_classes)]
        return words if self.weights is None else [*words, "--weights", self.weights]

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Random images, float32 `[B, H, W, C]` in [0, 1), and labels, int32 `[B]`."""
        rng = np.random.default_rng(SEED)
        images = rng.random((self.batch_size, *self.image_shape), np.float32)
        return images, rng.integers(self.num_classes, size=self.batch_size, dtype=np.int32)


class Variant(NamedTuple):
    """A way to make a step.

    Attributes:
        engine: ours: `fused`, `batched` (the same, nodes of one network in one pass), each of them
            also `_captured` (XLA may put convolutions into CUDA graphs, too), or `per_node`;
            PyTorch's: `eager`, `graph` (the step as a CUDA graph), `compile` (networks through
            `torch.compile`) or `compile_graph`.
        precision: `float32`, `tf32` or `bfloat16`.
        steps: steps a call.

    >>> str(Variant("fused", "tf32", 20))
    'fused tf32 x20'
    """

    engine: str
    precision: str = "float32"
    steps: int = 1

    @property
    def is_ours(self) -> bool:
        """Whether it is ours."""
        return self.engine == "per_node" or self.engine.startswith(("fused", "batched"))

    def __str__(self) -> str:
        name = f"{self.engine} {self.precision}"
        return name if self.steps == 1 else f"{name} x{self.steps}"


class Ready(NamedTuple):
    """A variant that is compiled, and has made its first steps.

    Attributes:
        variant: what it is.
        call: makes `variant.steps` steps; may return before they are made.
        wait: waits for all that was called.
        losses: the nodes' losses in the first step.
        figures: `ready_s`, the seconds of making ready, with others beside it; `memory_bytes` of
            a step, and `bytes_accessed` of it by the compiler's count; None where it is not known.
    """

    variant: Variant
    call: Callable[[], None]
    wait: Callable[[], None]
    losses: list[float]
    figures: dict[str, float | None]


def turn(ready: Ready, calls: int) -> float:
    """Makes so many calls without waiting in between; returns the seconds a step."""
    ready.wait()
    begin = time.perf_counter()
    for _ in range(calls):
        ready.call()
    ready.wait()
    return (time.perf_counter() - begin) / (calls * ready.variant.steps)


class Session(Protocol):
    """An implementation that is ready: set up, compiled, and its first step done.

    Attributes:
        figures: what setting up took, in seconds (`init_s`, `trace_s`, `compile_s`,
            `first_step_s`), and `flops` of a step by the compiler's count; None where there is no
            such thing.
    """

    figures: Figures

    @property
    def losses(self) -> list[float]:
        """The nodes' losses in the last step."""

    def step(self) -> float | None:
        """Makes a step and waits for it; returns the host's own seconds, where they are known."""

    def loop(self, steps: int) -> None:
        """Makes steps without waiting in between, then waits for the last."""

    def matmul_peak(self) -> float:
        """The most FLOP/s of a float32 matrix product with the process's threads."""


class Unavailable(Exception):  # noqa: N818 - says what is the case, not that something went wrong
    """The implementation does not exist here; one line says why."""


def limit_threads(threads: int) -> None:
    """Keeps this process, and those that it will start, to so many cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def prepare_process(implementation: Implementation, threads: int) -> None:
    """Sets this process up; to be called before JAX or PyTorch is imported.

    XLA sizes its thread pool by the cores that the process may use, OpenMP by its variable.
    """
    limit_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["KTG_CPU_CONVOLUTION"] = implementation.convolution
    os.environ["JAX_NUM_CPU_DEVICES"] = str(threads if implementation.spread else 1)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # as the baseline
    # What was compiled by an earlier process would hide what compilation costs.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"


def best_matmul(product_of: Callable[[int], Callable[[], Any]]) -> float:
    """The most FLOP/s of a square matrix product.

    Args:
        product_of: `product_of(size)` returns a function that makes a product and waits for it.
    """
    best = 0.0
    for size in (1024, 2048):
        product = product_of(size)
        product()
        for _ in range(5):
            begin = time.perf_counter()
            product()
            best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best
