"""Shifted images, random parts of images and their middles."""

import math

import numpy as np
import pytest
from data_files import random_images
from PIL import Image

from ktg_jax.data.views import centre_part, random_part, resized, shifted
from ktg_jax.training.batches import BatchPlan, take_batch


def test_shifts_are_those_of_images_on_a_device() -> None:
    images = random_images(12, 8, 6, 3)
    rng = np.random.default_rng(0)
    offset, flip = rng.integers(-3, 4, (12, 2)).astype(np.int32), rng.random(12) < 0.5
    plan = BatchPlan(np.arange(12, dtype=np.int32), offset, flip)  # type: ignore[arg-type]
    found = [
        shifted(image, down, right, bool(mirrored))
        for image, (down, right), mirrored in zip(images, offset.tolist(), flip, strict=True)
    ]
    wanted, _ = take_batch(images, np.arange(12), plan)  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.array(found), np.rint(np.asarray(wanted) * 255))


def test_random_parts_have_the_areas_and_ratios_of_imagenet() -> None:
    numbers = np.random.default_rng(0).random((4000, 10, 4))
    areas, ratios = [], []
    for each in numbers:
        left, upper, right, lower = random_part(400, 300, each)
        assert 0 <= left < right <= 400
        assert 0 <= upper < lower <= 300
        areas.append((right - left) * (lower - upper) / (400 * 300))
        ratios.append((right - left) / (lower - upper))
    assert min(areas) > 0.078
    assert max(areas) <= 1
    assert 0.74 < min(ratios) < 0.77
    assert 1.3 < max(ratios) < 1.35
    # Uniform from 0.08 to 1, but that large ones seldom fit: what fits is a little smaller.
    assert 0.42 < np.mean(areas) < 0.54


def test_a_random_part_by_hand() -> None:
    # area (0.08 + 0.5 * 0.92) * 100 = 54, ratio 1: 7.35 a side; borders at 0.5 * (10 - 7 + 1) = 2
    assert random_part(10, 10, np.array([[0.5, 0.5, 0.5, 0.5]])) == (2, 2, 9, 9)
    # the first is 9.8 / sqrt(3/4) high, which does not fit; the second does
    assert random_part(10, 10, np.array([[0.96, 0.0, 0, 0], [0.0, 0.5, 0, 0]])) == (0, 0, 3, 3)


@pytest.mark.parametrize("size", [(100, 20), (20, 100)])
def test_where_no_part_fits_it_is_the_middle(size: tuple[int, int]) -> None:
    left, upper, right, lower = random_part(*size, np.full((10, 4), 0.999))
    assert math.isclose((left + right) / 2, size[0] / 2)
    assert math.isclose((upper + lower) / 2, size[1] / 2)
    assert min(right - left, lower - upper) == 20
    longer = {100: 27, 20: 20 / 0.75}[size[0]]  # 4:3, of whole pixels, and 3:4
    assert math.isclose(max(right - left, lower - upper), longer)


def test_the_middle_keeps_the_proportions() -> None:
    assert centre_part(256, 256, (224, 224)) == (16, 16, 240, 240)
    assert centre_part(512, 256, (224, 224)) == (144, 16, 368, 240)
    left, upper, right, lower = centre_part(90, 60, (8, 4))
    assert (right - left) * 2 == lower - upper
    picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    assert resized(picture, 4, 4, (2, 2, 6, 6))[..., 0].tolist() == [
        [18 + 8 * i + j for j in range(4)] for i in range(4)
    ]
