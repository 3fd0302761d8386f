"""PyTorch's training steps on a GPU or a CPU, in variants: a process of its own.

In one process with JAX it could not capture a CUDA graph while JAX works on the device. It reads
lines of JSON and answers each with one: `{"prepare": VARIANT, "task": TASK}` with `losses` and
`figures`, `{"turn": VARIANT, "calls": K}` with `seconds` a step; or with `error`. The task's
weights are those of its folder.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.task import LEARNING_RATE, Ready, Task, Variant, turn
from benchmarks.torch_baseline import Trainer, build, to_nchw, torch

_WARM_UP = 3
"""Steps before a CUDA graph is captured."""


def make_ready(task: Task, variant: Variant, device: str) -> Ready:
    """Makes a variant of PyTorch ready.

    Args:
        task: models, batch, shapes, and the folder of the weights, `0.npz` and so on.
        variant: one of PyTorch's.
        device: `cuda` or `cpu`.
    """
    _set_precision(variant)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    networks = [
        build(model, dict(np.load(Path(str(task.weights)) / f"{i}.npz"))).to(device)
        for i, model in enumerate(task.models)
    ]
    images, labels = task.batch()
    batch = to_nchw(images).to(device), torch.tensor(labels, dtype=torch.int64).to(device)
    through = [[True] * len(networks)] * len(networks)
    trainer = Trainer(
        networks,
        through,
        LEARNING_RATE,
        compiled="compile" in variant.engine,
        autocast=device if variant.precision == "bfloat16" else None,
    )
    losses = trainer.step(*batch).tolist()

    def step() -> None:
        _set_precision(variant)
        trainer.step(*batch)

    call = _captured(step) if variant.engine.endswith("graph") else step
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    memory = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
    figures = {"ready_s": time.perf_counter() - begin, "memory_bytes": memory}
    return Ready(variant, call, wait, losses, figures)


def _set_precision(variant: Variant) -> None:
    """Sets what is global in PyTorch."""
    tf32 = variant.precision != "float32"
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph, which works on the same memory again and again."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(step: Callable[[], None] = step) -> None:  # its memory is kept with it
        graph.replay()

    return replay


def main() -> None:
    """Serves until its input ends."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ready: dict[Variant, Ready] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = _answer(asked, ready, device)
        except Exception as error:  # whatever PyTorch and its compiler could not do
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), flush=True)


def _answer(asked: Any, ready: dict[Variant, Ready], device: str) -> dict[str, Any]:
    if "prepare" in asked:
        variant = Variant(*asked["prepare"])
        made = ready[variant] = make_ready(Task(**asked["task"]), variant, device)
        return {"losses": made.losses, "figures": made.figures}
    return {"seconds": turn(ready[Variant(*asked["turn"])], asked["calls"])}


if __name__ == "__main__":
    main()
