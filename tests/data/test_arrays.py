"""What is said of arrays that are no images or labels, and that what is proposed does mend them."""

import logging
from typing import Any

import numpy as np
import pytest
from data_files import assert_input_error, random_images

from ktg_jax.data.arrays import channels_first, check_images, check_labels, check_values
from ktg_jax.data.dataset import Split
from ktg_jax.errors import InputError

IMAGES = random_images(12, 28, 28, 1)
COLOUR = random_images(12, 32, 32, 3)
COLOUR[0, 0, 0] = 0, 255, 7  # the extremes are there
LABELS = np.arange(12) % 3


def proposed(error: InputError, **arrays: np.ndarray) -> Any:
    """What the expression after `here` or the last colon makes of the arrays."""
    text = error.allowed.rpartition("here ")[2].removeprefix("times 255: ")
    return eval(text.removeprefix("channels last: "), {"np": np, **arrays})


@pytest.mark.parametrize(
    ("spoilt", "images", "parts"),
    [
        (COLOUR / 255, COLOUR, ["float64[12, 32, 32, 3], values 0 to 1", "times 255"]),
        ((COLOUR / 255).astype(np.float32), COLOUR, ["float32[", "times 255"]),
        (COLOUR.astype(np.float64), COLOUR, ["values 0 to 255", "round"]),
        (COLOUR / 127.5 - 1, COLOUR, ["values -1 to 1"]),
        (COLOUR.astype(np.int64), COLOUR, ["int64[", "values 0 to 255"]),
        (COLOUR.astype(np.uint16), COLOUR, ["uint16["]),
        (COLOUR > 127, (COLOUR > 127) * np.uint8(255), ["bool[", "times 255"]),
        ((COLOUR > 127).astype(int), (COLOUR > 127) * np.uint8(255), ["values 0 to 1"]),
        (IMAGES[..., 0], IMAGES, ["uint8[12, 28, 28]", "images[..., None]"]),
        (IMAGES.reshape(12, -1), IMAGES, ["uint8[12, 784]", "images.reshape(-1, 28, 28, 1)"]),
        (COLOUR.transpose(0, 3, 1, 2), COLOUR, ["uint8[12, 3, 32, 32]", "transpose(0, 2, 3, 1)"]),
        (IMAGES.transpose(0, 3, 1, 2), IMAGES, ["uint8[12, 1, 28, 28]", "transpose(0, 2, 3, 1)"]),
        (COLOUR.transpose(0, 3, 1, 2).reshape(12, -1), COLOUR, ["uint8[12, 3072]"]),
        (COLOUR.transpose(0, 3, 1, 2) / 255, COLOUR, ["float64[12, 3, 32, 32]", "times 255"]),
        (COLOUR[..., 0] / 255, COLOUR[..., :1], ["float64[12, 32, 32]", "times 255"]),
    ],
)
def test_the_expression_that_is_proposed_makes_images(
    spoilt: np.ndarray, images: np.ndarray, parts: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        check_images(spoilt, "npz images")
    assert_input_error(caught.value, "npz images", *parts)
    mended = proposed(caught.value, images=spoilt)
    assert mended.dtype == np.uint8
    np.testing.assert_array_equal(mended, images)
    with pytest.raises(InputError):
        Split(spoilt, LABELS.astype(np.int32))


@pytest.mark.parametrize(
    ("images", "part"),
    [
        ((COLOUR - 127.0) / 40, "values of 0 to 255"),
        (COLOUR.astype(np.uint16) * 257, "values 0 to 65535"),
        (COLOUR * np.nan, "nan"),
        (COLOUR.astype(str), "<U3[12, 32, 32, 3]"),
        (COLOUR[None], "uint8[1, 12, 32, 32, 3]"),
        (IMAGES[:, :, 0, 0], "uint8[12, 28]"),
        (np.zeros((0, 4, 4, 1)), "float64[0, 4, 4, 1]"),
        (np.zeros(7, np.uint8), "uint8[7]"),
    ],
)
def test_where_it_cannot_be_told_nothing_is_proposed(images: np.ndarray, part: str) -> None:
    with pytest.raises(InputError) as caught:
        check_images(images, "images")
    assert_input_error(caught.value, "images", part, "uint8[n, h, w, c]")
    assert "here" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "sign"),
    [
        ((3, 32, 32), "certain"),
        ((1, 28, 28), "certain"),
        ((4, 64, 48), "certain"),
        ((3, 10, 7), "likely"),
        ((2, 28, 28), "likely"),
        ((13, 64, 64), "likely"),
        ((1, 128, 9), "likely"),  # a signal of nine channels
        ((32, 32, 3), None),
        ((3, 32, 3), None),
        ((1, 1, 1), None),
        ((4, 4, 16), None),  # a board of sixteen kinds of pieces
        ((8, 8, 13), None),
        ((32, 3, 3), None),
    ],
)
def test_channels_that_come_first_are_told_by_the_shape(
    shape: tuple[int, ...], sign: str | None
) -> None:
    assert channels_first((5, *shape)) == sign


@pytest.mark.parametrize(
    ("spoilt", "part"),
    [
        (np.eye(3)[LABELS], "labels.argmax(axis=1)"),
        (np.eye(3, dtype=bool)[LABELS], "labels.argmax(axis=1)"),
        (np.full((12, 3), 0.1) + 0.7 * np.eye(3)[LABELS], "labels.argmax(axis=1)"),
        (LABELS[:, None], "labels[:, 0]"),
        (LABELS[None], "labels[0]"),
        (LABELS[:, None] * 1.0, "labels[:, 0].astype(int)"),
        (LABELS * 1.0, "labels.astype(int)"),
        (LABELS * 2 - 1, None),
        (LABELS + 0.5, None),
        (np.ones((12, 3), int), None),  # several classes an image
        (np.zeros((12, 3, 1)), None),
    ],
)
def test_the_expression_that_is_proposed_makes_labels(spoilt: np.ndarray, part: str | None) -> None:
    with pytest.raises(InputError) as caught:
        check_labels(spoilt, "npz labels", "labels", 10)
    assert_input_error(caught.value, "npz labels")
    assert ("here" in str(caught.value)) == (part is not None)
    if part is not None:
        assert part in str(caught.value)
        assert proposed(caught.value, labels=spoilt).tolist() == LABELS.tolist()


def test_labels_of_minus_one_and_one_are_understood() -> None:
    labels = np.array([1, -1, 1])
    with pytest.raises(InputError) as caught:
        check_labels(labels, "labels", "labels", 10)
    assert_input_error(caught.value, "labels", "got -1;", "0 to 9")
    assert proposed(caught.value, labels=labels).tolist() == [1, 0, 1]
    with pytest.raises(InputError) as caught:
        check_labels(np.array([1, -1, 0]), "labels", "labels", 10)
    assert_input_error(caught.value, "labels", "got -1;", "images of no class")


def test_names_in_place_of_labels_are_understood() -> None:
    with pytest.raises(InputError) as caught:
        check_labels(np.array(["dog", "cat"]), "labels", "labels", 10)
    parts = ("np.unique(labels, return_inverse=True)[1]", "class_names=np.unique(labels)")
    assert_input_error(caught.value, "labels", "<U3[2]", *parts)


# --- values


def test_images_of_0_and_1_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError) as caught:
        check_values(COLOUR // 128, "train images")
    assert_input_error(caught.value, "train images", "times 255")
    check_values(COLOUR // 128 * 255, "train images")
    assert caplog.records == []


@pytest.mark.parametrize(
    ("images", "part"),
    [
        (np.full_like(COLOUR, 9), "all pixels of all images are 9"),
        (COLOUR // 16, "no value is above 15, which is nearly black"),
    ],
)
def test_images_that_show_nothing_are_warned_of(
    images: np.ndarray, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    check_values(images, "test images")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("test images: ")
    assert part in record.getMessage()


def test_a_single_bright_pixel_is_enough(caplog: pytest.LogCaptureFixture) -> None:
    images = COLOUR // 128
    images[3, 4, 5, 0] = 200
    check_values(images, "train images")
    assert caplog.records == []
