"""Training from streams is that from memory, whatever reads ahead, and wherever."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from data_files import random_images, save_image, save_split
from engines import How, fused
from tiny_models import Tiny

import ktg_jax as ktg
from ktg_jax import Edge, Graph, InputError, Node
from ktg_jax.data.dataset import Dataset
from ktg_jax.data.sources import load_dataset
from ktg_jax.data.streamed import Streaming
from ktg_jax.errors import RunError
from ktg_jax.training.batches import Arrays, Batches, data_key
from ktg_jax.training.per_node_engine import PerNodeEngine
from ktg_jax.training.streaming import EvaluationFeed, TrainingFeed, close_streams
from ktg_jax.training.task import Task

DEVICES = jax.local_devices()
STEPS = 6
LATE = Edge(delay=2)
GRAPH = Graph((Node("tiny", "a"), Node("tiny", "b")), (("through", LATE), ("linear", "through")))
OPTIMIZER = ktg.sgd(0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 images, no multiple of the number of devices, and 5 to evaluate on."""
    folder = tmp_path_factory.mktemp("pictures")
    save_split(folder / "train", per_class=7, classes="abc")
    save_split(folder / "val", per_class=5, classes="ab", seed=1)
    return folder


def data_of(folder: Path, stream: Streaming | None, image_size: int | None = None) -> Dataset:
    return load_dataset(f"folder:{folder}", stream=stream, image_size=image_size)


def trained(how: How, dataset: Dataset, axis_name: str | None = None, **more: Any) -> Any:
    """The state after some steps, their metrics, and the means over the validation images."""
    fns = ktg.from_linen(Tiny(3, axis_name=axis_name))
    batches = Batches(21, batch_size=8, max_offset=1, flip=True, mixup=0.5, cutmix=0.5)
    task = Task([fns] * 2, OPTIMIZER, batches, (8, 8, 3), STEPS, **more)
    images = jnp.zeros((8, 8, 8, 3))
    state = ktg.init_state(GRAPH, [fns] * 2, OPTIMIZER, jax.random.key(0), images[:1])
    state = ktg.with_delays(state, GRAPH.edge_arrays, [fns] * 2, images)
    engine, count = how(task, state)
    assert dataset.val is not None
    train, val = (engine.load(Arrays(s.images, s.labels)) for s in (dataset.train, dataset.val))
    state = engine.place(state)
    step = engine.make_step(train, GRAPH.edge_arrays, data_key(0))
    metrics, means = [], []
    for done in range(0, STEPS, count):
        state, made = step(state, count)
        metrics.append(jax.device_get(made))
        if done in (0, 2):
            means.append(engine.evaluate(state, val))
    close_streams()
    return jax.device_get(state), metrics, means


def per_node(placement: str) -> How:
    return lambda task, state: (PerNodeEngine(task, state, DEVICES[:2], placement), 1)


ARRANGEMENTS: dict[str, How] = {
    "jit": fused(devices=DEVICES[:1]),
    "jit, 2 devices": fused(devices=DEVICES[:2]),
    "jit, two a call": fused(2, devices=DEVICES[:2]),
    "shard_map": fused(strategy="shard_map", devices=DEVICES[:2]),
    "shard_map, two a call": fused(2, strategy="shard_map", devices=DEVICES[:2]),
    "pmap": fused(strategy="pmap", devices=DEVICES[:2]),
    **{f"per node, {each}": per_node(each) for each in ("data", "nodes", "nodes+data")},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_a_stream_trains_as_memory_does(name: str, folder: Path) -> None:
    axis_name = "data" if name.partition(",")[0] in ("shard_map", "pmap") else None
    how = ARRANGEMENTS[name]
    streamed, loaded = (
        trained(how, data_of(folder, stream), axis_name) for stream in (Streaming(), None)
    )
    # The same images: where they are mixed, programs that round otherwise.
    chex.assert_trees_all_close(streamed, loaded, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_workers_read_what_threads_do(folder: Path) -> None:
    how = ARRANGEMENTS["jit"]
    threads = trained(how, data_of(folder, Streaming()))
    workers = trained(how, data_of(folder, Streaming(workers=2)))
    chex.assert_trees_all_equal(workers[0], threads[0])
    assert not workers_of_this()


def read_on(feed: TrainingFeed) -> None:
    for number in range(1, 200):
        feed.views(number)


def feed_of(
    folder: Path, rows: np.ndarray | None = None, end: int = 1000, **more: Any
) -> TrainingFeed:
    how = {"workers": more.pop("workers", 0), "centre": more.pop("centre", False)}
    images = data_of(folder, Streaming(**how), 8 if how["centre"] else None).train.images
    delays = more.pop("delays", ())
    batches = Batches(21, **{"batch_size": 8, "max_offset": 1, "flip": True, **more})
    return TrainingFeed(images, batches, data_key(5), end, rows, delays)


def test_a_feed_goes_on_from_anywhere(folder: Path) -> None:
    feed = feed_of(folder)
    inorder = [feed.views(i)[0].images for i in range(5)]
    for number in (3, 4, 1, 2, 0):
        np.testing.assert_array_equal(feed.views(number)[0].images, inorder[number])
    both = feed.views(2, count=2)[0].images
    np.testing.assert_array_equal(both, np.stack(inorder[2:4], axis=1))
    assert feed.stream.waited > 0
    feed.stream.close()


def test_a_feed_goes_on_beyond_the_end_of_the_training(folder: Path) -> None:
    feed, wanted = feed_of(folder, end=2, mixup=1.0), feed_of(folder, mixup=1.0)
    for number in range(5):
        chex.assert_trees_all_equal(feed.views(number), wanted.views(number))
    close_streams()


def test_batches_ahead_are_those_that_come(folder: Path) -> None:
    feed, ahead = feed_of(folder), feed_of(folder, delays=(3,))
    for number in range(4):
        views = ahead.views(number)
        assert set(views) == {0, 3}
        for delay, found in views.items():
            wanted = feed.views(number + delay)[0].images
            np.testing.assert_array_equal(found.images, wanted)
    close_streams()


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [6, 7], [2, 3, 6, 7]])
def test_each_process_reads_its_rows_and_what_they_are_mixed_with(
    rows: list[int], folder: Path
) -> None:
    whole, part = (feed_of(folder, each, mixup=1.0) for each in (None, np.array(rows)))
    for number in (0, 1, 2):
        wanted, found = whole.views(number)[0], part.views(number)[0]
        np.testing.assert_array_equal(wanted.partners, np.roll(wanted.images, -1, axis=0))
        np.testing.assert_array_equal(found.images, wanted.images[rows])
        np.testing.assert_array_equal(found.partners, wanted.partners[rows])
    close_streams()


def test_random_parts_are_drawn_anew_in_each_update(folder: Path) -> None:
    feed = feed_of(folder, batch_size=21, max_offset=0, flip=False, parts=True, centre=True)
    first, second = (feed.views(i)[0].images for i in range(2))
    assert first.shape == (21, 8, 8, 3)
    of_first = {image.tobytes() for image in first}
    assert sum(image.tobytes() in of_first for image in second) < 4
    np.testing.assert_array_equal(feed.views(0)[0].images, first)
    close_streams()


def test_an_evaluation_sees_each_image_once_and_again_the_next_time(folder: Path) -> None:
    images = data_of(folder, Streaming()).train.images
    feed, rows = EvaluationFeed(images, 8), EvaluationFeed(images, 8, np.array([1, 5]))
    for _ in range(2):
        found = np.concatenate([views.images for views in feed])
        np.testing.assert_array_equal(found[:21], images.read(np.arange(21)))
        assert (found[21:] == 0).all()
    assert [views.images.shape for views in rows] == [(2, 8, 8, 3)] * 3


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_image_that_cannot_be_read_is_named(workers: int, tmp_path: Path) -> None:
    save_split(tmp_path / "train", per_class=7, classes="abc")
    feed = feed_of(tmp_path, workers=workers, batch_size=21)
    (tmp_path / "train" / "b" / "3.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match=r"b/3\.png'; allowed: a complete, undamaged image"):
        feed.views(0)
    close_streams()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of which a batch does not fit into a pipe."""
    folder = tmp_path_factory.mktemp("large")
    for name in "ab":
        for i in range(12):
            save_image(folder / "train" / name / f"{i}.png", random_images(1, 96, 96, 3, seed=i)[0])
    return folder


def workers_of_this() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [each for each in children if "spawn_main" in str(each.cmdline())]


@pytest.mark.slow
def test_a_worker_that_is_killed_is_an_error_soon(large: Path) -> None:
    feed = feed_of(large, workers=2)
    feed.views(0)
    worker, _ = workers_of_this()
    for each in (signal.SIGTERM, signal.SIGINT):  # as of a terminal: not its affair
        worker.send_signal(each)
    time.sleep(0.2)
    assert worker.is_running()
    os.kill(worker.pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RunError, match="a process that reads images has ended"):
        read_on(feed)
    assert time.monotonic() - start < 10
    assert not workers_of_this()


@pytest.mark.slow
def test_workers_that_are_busy_are_ended_at_once(large: Path) -> None:
    feed = feed_of(large, workers=2)
    feed.views(0)
    start = time.monotonic()
    feed.stream.close()
    assert time.monotonic() - start < 5
    assert not workers_of_this()
    np.testing.assert_array_equal(feed.views(3)[0].images, feed_of(large).views(3)[0].images)
    close_streams()


@pytest.mark.slow
def test_workers_draw_what_this_process_draws(folder: Path) -> None:
    before = jax.config.values["jax_threefry_partitionable"]
    jax.config.update("jax_threefry_partitionable", not before)
    try:
        here, there = feed_of(folder).views(1)[0], feed_of(folder, workers=1).views(1)[0]
        np.testing.assert_array_equal(here.images, there.images)
    finally:
        jax.config.update("jax_threefry_partitionable", before)
        close_streams()


def test_keys_that_differ_between_devices_are_refused(folder: Path) -> None:
    images, batches = data_of(folder, Streaming()).train.images, Batches(21, 8)
    with pytest.raises(InputError, match="jax_default_prng_impl: got 'rbg'; allowed: threefry2x32"):
        TrainingFeed(images, batches, jax.random.key(0, impl="rbg"), 10)
