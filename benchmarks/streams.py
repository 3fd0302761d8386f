"""Reading images that stay in their files: `python -m benchmarks.streams`.

Three parts, on made-up data. `loader`: images a second, read and decoded by threads or by worker
processes, of small pictures and of photographs' size. `waiting`: the share of a training that waits
for images, beside the same training from memory. `memory`: what a training holds at most, with ever
more images, in a process that may not have more than a limit.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ktg_jax as ktg
from benchmarks.made_up_data import encoded, write_data_set
from experiments.runs.console import Table, make_console
from ktg_jax.data.dataset import Dataset
from ktg_jax.data.memory import in_words
from ktg_jax.data.sources import load_dataset
from ktg_jax.data.streamed import Streaming
from ktg_jax.training.batches import Arrays, Batches, data_key
from ktg_jax.training.per_node_engine import PerNodeEngine
from ktg_jax.training.streaming import TrainingFeed, close_streams, seconds_waited
from ktg_jax.training.task import Task

PARTS = ("loader", "waiting", "memory")
BATCH, CLASSES = 64, 10
_DISTINCT = 256  # pictures that a data set repeats


@dataclass(frozen=True)
class Kind:
    """Pictures of one kind.

    Attributes:
        format: of their files.
        height: in pixels.
        width: likewise.
        image_size: that they are brought to.
        parts: whether random parts of them are.
    """

    format: str
    height: int
    width: int
    image_size: int
    parts: bool


KINDS = {
    "small": Kind("PNG", 32, 32, 32, parts=False),
    "photographs": Kind("JPEG", 375, 500, 224, parts=True),
    "many": Kind("PNG", 64, 64, 64, parts=False),
}


def main() -> None:
    """Measures what the command line asks for, and prints tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streams", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=60, help="that are timed")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument(
        "--images", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="for memory"
    )
    parser.add_argument("--limit-gib", type=float, default=4.0, help="of memory, for each process")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(_held(**json.loads(options.child))))
        return
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KTG_CACHE_DIR"] = folder
        for part in options.parts:
            found[part] = _PARTS[part](Path(folder), options)
            _show(part, found[part])
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def prepare(folder: Path, name: str, images: int) -> Path:
    """A data set of so many pictures of a kind, of which some are repeated."""
    kind, rng = KINDS[name], np.random.default_rng(0)
    coarse = rng.integers(0, 256, (_DISTINCT, kind.height // 8 + 1, kind.width // 8 + 1, 3))
    pictures = [  # as compressible as photographs are
        encoded(
            np.kron(each, np.ones((8, 8, 1)))[: kind.height, : kind.width].astype(np.uint8),
            kind.format,
        )
        for each in coarse
    ]

    def examples(count: int) -> Iterator[tuple[bytes, int]]:
        return ((pictures[i % _DISTINCT], i % CLASSES) for i in range(count))

    root = folder / f"{name}-{images}"
    if not root.exists():
        splits = {"train": examples(images), "validation": examples(BATCH)}
        write_data_set(root, name, splits, CLASSES, (kind.height, kind.width, 3))
    return root


def streamed(root: Path, name: str, workers: int) -> Dataset:
    """The data set, its images in their files."""
    kind = KINDS[name]
    how = Streaming(centre=kind.parts, workers=workers)
    return load_dataset(f"tfds:{name}", root, image_size=kind.image_size, stream=how)


def _batches(name: str, dataset: Dataset) -> Batches:
    parts = KINDS[name].parts
    return Batches(len(dataset.train), BATCH, 0 if parts else 4, flip=True, parts=parts)


# --- the parts


def loader(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Images a second, by kind of picture and number of workers."""
    rows = []
    for name in ("small", "photographs"):
        root = prepare(folder, name, 20 * BATCH)
        rates: dict[int, list[float]] = {workers: [] for workers in options.workers}
        for _ in range(options.rounds):
            for workers, so_far in rates.items():
                so_far.append(_rate(name, root, workers, options.batches))
        rows += [
            {"pictures": name, "workers": workers, "images_per_second": float(np.median(each))}
            for workers, each in rates.items()
        ]
    return rows


def _rate(name: str, root: Path, workers: int, batches: int) -> float:
    """Images a second, once it is under way."""
    dataset = streamed(root, name, workers)
    feed = TrainingFeed(dataset.train.images, _batches(name, dataset), data_key(0), 10**6)
    warm = 8 * max(workers, 1)  # what was read while nobody asked does not count
    for number in range(warm):
        feed.views(number)
    start = time.perf_counter()
    for number in range(warm, warm + batches):
        feed.views(number)
    seconds = time.perf_counter() - start
    feed.stream.close()
    return batches * BATCH / seconds


def waiting(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds a step, from memory and from streams, and the share that waits for images."""
    root, rows = prepare(folder, "small", 20 * BATCH), []
    ways: dict[str, Dataset] = {"memory": load_dataset("tfds:small", root)}
    ways |= {f"stream, {n} workers": streamed(root, "small", n) for n in options.workers}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, dataset in ways.items():
            times[name].append(_step_seconds(dataset, "resnet8", options.batches))
    for name, each in times.items():
        seconds, waited = np.median(each, axis=0)
        share = waited / seconds
        rows.append({"images": name, "step_ms": 1000 * seconds, "waiting": share})
    return rows


def _step_seconds(dataset: Dataset, model: str, steps: int) -> tuple[float, float]:
    """Seconds a step, and how many of them the step waits for images."""
    graph, optimizer = ktg.graphs.mutual([model, model]), ktg.sgd(0.1)
    fns, shape = [ktg.build_model(model, CLASSES)] * 2, dataset.image_shape
    task = Task(fns, optimizer, Batches(len(dataset.train), BATCH, 4, flip=True), shape, 1000)
    state = ktg.init_state(graph, fns, optimizer, jax.random.key(0), jnp.zeros((1, *shape)))
    engine = PerNodeEngine(task, state, jax.local_devices())
    data = engine.load(Arrays(dataset.train.images, dataset.train.labels))
    state, step = engine.place(state), engine.make_step(data, graph.edge_arrays, data_key(0))
    metrics: Any = None
    for _ in range(5):
        state, metrics = step(state, 1)
    jax.block_until_ready(metrics)
    before, start = seconds_waited(), time.perf_counter()
    for _ in range(steps):
        state, metrics = step(state, 1)
        jax.block_until_ready(metrics)
    seconds = time.perf_counter() - start
    waited = seconds_waited() - before
    close_streams()
    return seconds / steps, waited / steps


def memory(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What a training holds, by the number of images."""
    rows = []
    for images in options.images:
        root = prepare(folder, "many", images)
        given = json.dumps({"root": str(root), "limit": int(options.limit_gib * 2**30)})
        made = subprocess.run(
            [sys.executable, "-m", "benchmarks.streams", "--child", given],
            check=True,
            stdout=subprocess.PIPE,  # what goes wrong there is to be seen
            text=True,
        )
        rows.append({"images": images, **json.loads(made.stdout.splitlines()[-1])})
    return rows


def _held(root: str, limit: int) -> dict[str, Any]:
    """Trains a while at the beginning and at the end of an epoch; the most that was held."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    dataset = streamed(Path(root), "many", 0)
    kind, number = KINDS["many"], len(dataset.train)
    fns, graph, optimizer = (
        ktg.build_model("cnn", CLASSES),
        ktg.graphs.mutual(["cnn"]),
        ktg.sgd(0.1),
    )
    batches, steps = _batches("many", dataset), number // BATCH + 60
    task = Task([fns], optimizer, batches, dataset.image_shape, steps)
    sample = jnp.zeros((1, *dataset.image_shape))
    state = ktg.init_state(graph, [fns], optimizer, jax.random.key(0), sample)
    engine = PerNodeEngine(task, state, jax.local_devices())
    data = engine.load(Arrays(dataset.train.images, dataset.train.labels))
    step = engine.make_step(data, graph.edge_arrays, data_key(0))
    for first in (0, number // BATCH - 30):
        state = engine.place(replace(state, step=jnp.int32(first)))
        for _ in range(60):
            state, _ = step(state, 1)
        state = jax.device_get(state)
    pixels = number * kind.image_size**2 * 3
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"decoded": in_words(pixels), "limit": in_words(limit), "held": in_words(peak)}


def _show(part: str, rows: list[dict[str, Any]]) -> None:
    names = list(rows[0])
    table = Table(*(name.replace("_", " ") for name in names), box=None, title=part)
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    make_console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.3g}" if isinstance(value, float) and value < 1000 else f"{value:,.0f}"


_PARTS = {"loader": loader, "waiting": waiting, "memory": memory}

if __name__ == "__main__":
    main()
