from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ktg_jax import InputError, Parallel
from ktg_jax.training.batches import (
    BatchPlan,
    plan_batch,
    shuffled,
    steps_per_epoch,
    take_batch,
    to_float,
)

KEY = jax.random.key(0)
TAKE_BATCH = jax.jit(take_batch)


def order(key: jax.Array, size: int) -> np.ndarray:
    return np.asarray(jax.jit(shuffled, static_argnums=2)(key, jnp.arange(size), size))


# ------------------------------------------------------------------------------------- shuffled


@pytest.mark.slow
def test_a_shuffle_of_every_small_size_is_a_permutation() -> None:
    positions = jnp.arange(70)
    with jax.disable_jit():  # 70 sizes would be 70 compilations
        for size in range(1, 71):
            entries = np.asarray(shuffled(KEY, positions % size, size))[:size]
            np.testing.assert_array_equal(np.sort(entries), np.arange(size))


@pytest.mark.parametrize("size", [1, 3, 64, 1437, 50_000])
def test_a_compiled_shuffle_is_a_permutation(size: int) -> None:
    entries = order(KEY, size)
    assert entries.dtype == np.int32
    np.testing.assert_array_equal(np.sort(entries), np.arange(size))


def test_an_entry_does_not_depend_on_the_others_asked_for() -> None:
    positions = jnp.array([[1436, 0], [7, 7]])
    np.testing.assert_array_equal(shuffled(KEY, positions, 1437), order(KEY, 1437)[positions])


def test_shuffles_of_different_keys_have_little_in_common() -> None:
    first, other = order(KEY, 50_000), order(jax.random.key(1), 50_000)
    identity = np.arange(50_000)
    for a, b in ((first, identity), (first, other), (first[:-1], first[1:] - 1)):
        assert np.mean(a == b) < 1e-3  # about 2e-5 by chance
    assert abs(np.corrcoef(first, identity)[0, 1]) < 0.02
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.02


@pytest.mark.parametrize("size", [5, 16])
def test_every_entry_is_about_as_likely_at_every_position(size: int) -> None:
    keys = jax.random.split(KEY, 4000)
    orders = jax.jit(jax.vmap(lambda key: shuffled(key, jnp.arange(size), size)))(keys)
    for position in range(size):
        counts = np.bincount(np.asarray(orders[:, position]), minlength=size)
        expected = 4000 / size
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


# ----------------------------------------------------------------------------------- plan_batch


@partial(jax.jit, static_argnames=("num_images", "batch_size", "max_offset", "flip"))
def planned(key: jax.Array, step: Any, **options: Any) -> BatchPlan:
    return plan_batch(key, step, **options)


SMALL: dict[str, Any] = {"num_images": 23, "batch_size": 5, "max_offset": 3, "flip": True}


def test_an_epoch_visits_an_image_at_most_once_and_the_next_in_another_order() -> None:
    epochs = []
    for epoch in range(3):
        steps = range(4 * epoch, 4 * epoch + 4)
        visited = np.concatenate([planned(KEY, step, **SMALL).image_index for step in steps])
        assert len(set(visited)) == 20
        assert set(visited) <= set(range(23))
        epochs.append(visited)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.mean(epochs[one] == epochs[other]) < 0.5
    assert set(epochs[0]) | set(epochs[1]) | set(epochs[2]) == set(range(23))


def test_an_epoch_of_full_batches_visits_every_image() -> None:
    options = {"num_images": 20, "batch_size": 5}
    visited = np.concatenate([planned(KEY, step, **options).image_index for step in range(4, 8)])
    assert sorted(visited) == list(range(20))


def test_a_plan_depends_on_key_and_step_alone() -> None:
    plan = planned(KEY, 6, **SMALL)
    planned(KEY, 7, **SMALL)
    chex.assert_trees_all_equal(planned(KEY, 6, **SMALL), plan)
    chex.assert_trees_all_equal(planned(KEY, jnp.array(6), **SMALL), plan)
    for other in (planned(KEY, 7, **SMALL), planned(jax.random.key(1), 6, **SMALL)):
        for ours, theirs in zip(plan[:3], other[:3], strict=True):
            assert (ours != theirs).any()


def test_a_plan_has_these_types() -> None:
    plan = planned(KEY, 0, **SMALL)
    chex.assert_shape(list(plan[:3]), [(5,), (5, 2), (5,)])
    chex.assert_type(list(plan[:3]), [jnp.int32, jnp.int32, bool])
    assert plan.mix is None


def test_offsets_and_flips_are_drawn_evenly_and_apart() -> None:
    options = {"num_images": 4000, "batch_size": 4000, "max_offset": 2, "flip": True}
    plan = planned(KEY, 0, **options)
    for axis in (0, 1):
        values, counts = np.unique(plan.offset[:, axis], return_counts=True)
        np.testing.assert_array_equal(values, [-2, -1, 0, 1, 2])
        assert np.abs(counts - 800).max() < 5 * np.sqrt(800)
    assert abs(int(plan.flip.sum()) - 2000) < 5 * np.sqrt(1000)
    table = np.corrcoef(np.column_stack([plan.offset, plan.flip, plan.image_index]).T)
    assert np.abs(table - np.eye(4)).max() < 0.1


def test_without_flips_and_offsets_images_are_only_shuffled() -> None:
    plan = planned(KEY, 3, num_images=23, batch_size=5)
    assert not plan.flip.any()
    assert not plan.offset.any()
    np.testing.assert_array_equal(plan.image_index, planned(KEY, 3, **SMALL).image_index)


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("strategy", ["jit", "pmap"])
def test_a_plan_does_not_depend_on_the_devices(strategy: str, num_devices: int) -> None:
    options = {**SMALL, "batch_size": 6}
    parallel = Parallel(strategy, jax.local_devices()[:num_devices])
    images = jnp.asarray(IMAGES)

    def step(state: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        plan = parallel.shard(plan_batch(key, state, **options))
        batch, labels = take_batch(images, jnp.arange(23), plan)
        if parallel.axis_name is not None:
            gather = partial(jax.lax.all_gather, axis_name=parallel.axis_name, tiled=True)
            batch, labels = gather(batch), gather(labels)
        return state + 1, (batch, labels)

    state, key = parallel.replicate((jnp.array(6), KEY))
    _, batch = parallel.compile(step)(state, key)
    expected = TAKE_BATCH(images, jnp.arange(23), planned(KEY, 6, **options))
    chex.assert_trees_all_equal(jax.device_get(batch), jax.device_get(expected))


# ----------------------------------------------------------------------------------- take_batch

IMAGES = np.random.default_rng(0).integers(256, size=(23, 7, 9, 3), dtype=np.uint8)
LABELS = np.arange(23) % 10


def cropped(image: np.ndarray, offset: np.ndarray, flip: bool, padding: int) -> np.ndarray:
    """Reflect padding, a crop of the original size, and a flip: the papers' augmentation."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
    top, left = padding + offset
    crop = padded[top : top + height, left : left + width]
    return crop[:, ::-1] if flip else crop


def test_batches_are_reflect_padded_crops_and_flips() -> None:
    rng = np.random.default_rng(1)
    index, offset = rng.integers(23, size=200), rng.integers(-6, 7, size=(200, 2))
    offset[:4] = [[-6, -6], [-6, 6], [6, -6], [6, 6]]
    flip = rng.random(200) < 0.5
    plan = BatchPlan(jnp.asarray(index), jnp.asarray(offset), jnp.asarray(flip))
    images, labels = TAKE_BATCH(jnp.asarray(IMAGES), jnp.asarray(LABELS), plan)
    expected = [cropped(IMAGES[i], o, f, 6) for i, o, f in zip(index, offset, flip, strict=True)]
    assert images.dtype == jnp.float32
    np.testing.assert_allclose(images, np.array(expected) / 255, atol=1e-7)
    np.testing.assert_array_equal(labels, LABELS[index])


def test_a_positive_offset_moves_the_crop_down_and_to_the_right() -> None:
    image = jnp.arange(12, dtype=jnp.uint8).reshape(1, 3, 4, 1)
    plan = BatchPlan(jnp.array([0]), jnp.array([[1, 2]]), jnp.array([False]))
    batch, _ = TAKE_BATCH(image, jnp.array([0]), plan)
    expected = np.array([[6, 7, 6, 5], [10, 11, 10, 9], [6, 7, 6, 5]])
    np.testing.assert_allclose(batch[0, :, :, 0] * 255, expected, rtol=1e-6)


def test_without_augmentation_images_are_the_originals_in_0_to_1() -> None:
    plan = planned(KEY, 2, num_images=23, batch_size=5)
    images, labels = TAKE_BATCH(jnp.asarray(IMAGES), jnp.asarray(LABELS), plan)
    np.testing.assert_allclose(images, IMAGES[plan.image_index] / 255, rtol=1e-6)
    assert images.max() <= 1
    np.testing.assert_array_equal(labels, LABELS[plan.image_index])


def test_to_float_maps_bytes_to_0_to_1() -> None:
    values = to_float(jnp.array([0, 51, 255], jnp.uint8))
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, [0.0, 0.2, 1.0])


# ------------------------------------------------------------------------------ steps_per_epoch


def test_the_last_partial_batch_is_dropped() -> None:
    assert [steps_per_epoch(23, size) for size in (1, 5, 11, 12, 23)] == [23, 4, 2, 1, 1]


@pytest.mark.parametrize("batch_size", [0, -1, 24])
def test_a_batch_that_the_data_cannot_fill_is_refused(batch_size: int) -> None:
    with pytest.raises(InputError, match=f"batch_size: got {batch_size}; allowed: 1 to the 23 tra"):
        steps_per_epoch(23, batch_size)
