"""Files of `numpy.savez`: which arrays are read, what labels mean, and how large they may be."""

import io
import logging
import os
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import assert_input_error, random_images

from ktg_jax.data import archive, memory
from ktg_jax.data.sources import has_test_images, has_val_images, load_dataset, load_npz
from ktg_jax.errors import InputError

IMAGES, VAL, TEST = (random_images(12, 8, 8, 1, seed=seed) for seed in range(3))
LABELS = np.arange(12) % 3
GOOD = {"images": IMAGES, "labels": LABELS}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def save_arrays(**arrays: np.ndarray) -> Path:
        np.savez_compressed(tmp_path / "a.npz", allow_pickle=True, **arrays)
        return tmp_path / "a.npz"

    return save_arrays


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


# --- splits


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("prefix", ["val", "valid", "validation", "dev"])
def test_validation_images_of_a_file_take_the_place_of_the_fraction(
    prefix: str, fraction: float, save: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = save(**GOOD, **{f"{prefix}_images": VAL, f"{prefix}_labels": LABELS[::-1]})
    dataset = load_dataset(f"npz:{path}", val_fraction=fraction)
    assert dataset.val is not None
    np.testing.assert_array_equal(dataset.val.images, VAL)
    np.testing.assert_array_equal(dataset.val.labels, LABELS[::-1])
    np.testing.assert_array_equal(dataset.train.images, IMAGES)
    assert (dataset.test, dataset.own_val) == (None, True)
    assert has_val_images(f"npz:{path}")
    assert not has_test_images(f"npz:{path}")
    assert warnings_of(caplog) == []


def test_the_limit_is_of_the_training_images_alone(save: Callable[..., Path]) -> None:
    path = save(**GOOD, val_images=VAL, val_labels=LABELS)
    dataset = load_dataset(f"npz:{path}", train_limit=6, image_size=4)
    assert dataset.val is not None
    assert (len(dataset.train), len(dataset.val), dataset.own_val) == (6, 12, True)
    assert dataset.val.images.shape == (12, 4, 4, 1)


def test_other_names_of_the_splits_are_read(save: Callable[..., Path]) -> None:
    path = save(
        train_images=IMAGES, train_labels=LABELS, testing_images=TEST, testing_labels=LABELS
    )
    dataset = load_npz(path)
    assert dataset.test is not None
    np.testing.assert_array_equal(dataset.train.images, IMAGES)
    np.testing.assert_array_equal(dataset.test.images, TEST)
    assert (dataset.val, dataset.own_val) == (None, False)
    assert has_test_images(f"npz:{path}")
    assert not has_val_images(f"npz:{path}")
    assert load_npz(path, with_test=False).test is None


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({"x_train": IMAGES, "y_train": LABELS}, ["['x_train', 'y_train']", "images, labels"]),
        ({"arr_0": IMAGES, "arr_1": LABELS}, ["np.savez(FILE, images=..., labels=..."]),
        (GOOD | {"train_images": IMAGES}, ["['images', 'train_images']", "one of them"]),
        (GOOD | {"val_images": VAL}, ["both val_images and val_labels"]),
        (GOOD | {"test_labels": LABELS}, ["both test_images and test_labels"]),
    ],
)
def test_arrays_of_other_names_are_answered_with_the_right_ones(
    arrays: dict[str, np.ndarray], parts: list[str], save: Callable[..., Path]
) -> None:
    with pytest.raises(InputError) as caught:
        load_npz(save(**arrays))
    assert_input_error(caught.value, "npz arrays", *parts)


def test_two_arrays_of_one_meaning_are_refused(save: Callable[..., Path]) -> None:
    path = save(**GOOD, val_images=VAL, dev_images=VAL, val_labels=LABELS)
    with pytest.raises(InputError) as caught:
        load_npz(path)
    assert_input_error(caught.value, "npz images", "dev and val", "the val split")


def test_arrays_that_are_not_used_are_named(
    save: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = save(**GOOD, x_test=TEST, mean=np.zeros(3))
    assert len(load_npz(path).train) == 12
    assert warnings_of(caplog) == [f"npz:{path}: arrays that are not used: mean, x_test"]


@pytest.mark.parametrize(
    ("arrays", "field", "part"),
    [
        ({"val_images": VAL / 255}, "npz val_images", "(val_images * 255)"),
        ({"test_images": TEST / 255}, "npz test_images", "(test_images * 255)"),
        ({"test_images": TEST.reshape(12, 1, 8, 8)}, "npz test_images", "transpose(0, 2, 3, 1)"),
        ({"test_images": TEST[:, :4]}, "test images", "(8, 8, 1)"),
        ({"val_labels": LABELS[:, None]}, "npz val_labels", "val_labels[:, 0]"),
        ({"val_labels": LABELS[:9]}, "npz val_labels", "got 9; allowed: 12"),
        ({"images": IMAGES.transpose(1, 2, 3, 0)}, "npz labels", "transpose(3, 0, 1, 2)"),
        ({"val_images": VAL // 128}, "val images", "times 255"),
    ],
)
def test_each_split_is_checked(
    arrays: dict[str, Any], field: str, part: str, save: Callable[..., Path]
) -> None:
    splits = {"val_images": VAL, "val_labels": LABELS, "test_images": TEST, "test_labels": LABELS}
    with pytest.raises(InputError) as caught:
        load_dataset(f"npz:{save(**GOOD | splits | arrays)}")
    assert_input_error(caught.value, field, part)


def test_what_may_be_channels_first_is_warned_of(
    save: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    assert load_npz(save(images=random_images(12, 2, 9, 9), labels=LABELS)).image_shape == (2, 9, 9)
    (warning,) = warnings_of(caplog)
    assert "height 2, width 9, 9 channels" in warning
    assert "transpose(0, 2, 3, 1)" in warning


# --- labels


def test_labels_from_1_on_make_no_class_0(save: Callable[..., Path]) -> None:
    with pytest.raises(InputError) as caught:
        load_npz(save(images=IMAGES, labels=LABELS + 1))
    assert_input_error(caught.value, "npz labels", "'1 to 3'", "labels - 1")
    names = {"class_names": np.array(["cat", "dog", "eel"])}
    with pytest.raises(InputError) as caught:
        load_npz(save(images=IMAGES, labels=LABELS + 1, **names))
    assert_input_error(caught.value, "npz class_names", "4 or more", "labels - 1")


@pytest.mark.parametrize(
    ("labels", "parts"),
    [
        (np.where(np.arange(12) == 5, 255, LABELS), ["4 of the 256 classes", "3, 4, 5, 6, 7, ..."]),
        (LABELS * 2, ["3 of the 5 classes 0 to 4", "none of 1, 3;"]),
        (LABELS * 2 + 1, ["3 of the 6 classes", "none of 0, 2, 4;"]),
    ],
)
def test_labels_with_gaps_are_warned_of(
    labels: np.ndarray,
    parts: list[str],
    save: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert load_npz(save(images=IMAGES, labels=labels)).num_classes == labels.max() + 1
    (warning,) = warnings_of(caplog)
    for part in (*parts, "return_inverse=True"):
        assert part in warning


def test_a_class_of_the_test_alone_is_warned_of(
    save: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = save(**GOOD, test_images=TEST, test_labels=LABELS + 1)
    assert load_npz(path).num_classes == 4
    assert "3 of the 4 classes 0 to 3 alone, none of 3;" in caplog.text


@pytest.mark.parametrize("first", [0, 1])
def test_class_names_say_that_gaps_are_meant(
    first: int, save: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    names = np.array(["nothing", "cat", "dog", "eel", "fox"])
    dataset = load_npz(save(images=IMAGES, labels=LABELS + first, class_names=names))
    assert dataset.num_classes == 5
    assert warnings_of(caplog) == []


# --- sizes


def zipped(path: Path, header: bytes, zeros: int, labels: int) -> Path:
    """An npz of images that are zeros, compressed as well as zeros are."""
    column = io.BytesIO()
    np.save(column, np.zeros(labels, np.int64))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as members:
        members.writestr("labels.npy", column.getvalue())
        with members.open("images.npy", "w", force_zip64=True) as file:
            file.write(header)
            for _ in range(zeros >> 20):
                file.write(bytes(2**20))
    return path


def npy_header(*shape: int) -> bytes:
    text = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def test_a_file_that_would_fill_the_memory_is_refused_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert archive._SMALL == 2**30
    monkeypatch.setattr(archive, "_SMALL", 2**26)
    shape = (3 * 2**16, 32, 32, 1)  # 192 MiB
    path = zipped(tmp_path / "a.npz", npy_header(*shape), 3 * 2**26, shape[0])
    assert path.stat().st_size < 2**18
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as caught:
        load_npz(path)
    assert_input_error(caught.value, "data", str(path), "193.5 MiB in 0.2 MiB", "100 times")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB
    assert not has_test_images(f"npz:{path}")


def test_what_is_small_may_be_compressed_well(save: Callable[..., Path]) -> None:
    images = np.zeros((3000, 32, 32, 1), np.uint8)
    path = save(images=images, labels=np.arange(3000) % 3)
    assert path.stat().st_size * 100 < images.size
    assert len(load_npz(path).train) == 3000


def test_what_does_not_fit_in_memory_is_refused(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(**GOOD)
    monkeypatch.setattr(memory, "machine_memory", lambda: IMAGES.nbytes + LABELS.nbytes)
    assert len(load_npz(path).train) == 12
    monkeypatch.setattr(memory, "machine_memory", lambda: IMAGES.nbytes + LABELS.nbytes - 1)
    with pytest.raises(InputError) as caught:
        load_npz(path)
    assert_input_error(caught.value, "data", str(path), "fits in memory")


@pytest.mark.parametrize(
    "header",
    [
        npy_header(10**12, 32, 32, 3),
        npy_header(-1, 8, 8, 1),
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31),
        b"\x93NUMPY\x03\x00",
        b"no header",
    ],
    ids=["too large", "negative", "endless", "other version", "none"],
)
def test_a_header_that_lies_is_damage(header: bytes, tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.npz", header, 2**20, 12)
    with pytest.raises(InputError) as caught:
        load_npz(path)
    assert_input_error(caught.value, "data", str(path), "undamaged")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(InputError) as caught:
        load_npz(tmp_path / "a.npz")
    assert_input_error(caught.value, "data", "a.npz", "a file that exists")


def test_the_memory_is_that_of_the_machine_or_of_its_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CONTAINER_LIMITS", ())
    whole = memory.machine_memory()
    assert whole is not None
    assert whole > 2**28
    (tmp_path / "less").write_text(f"{2**27}\n")
    (tmp_path / "more").write_text(f"{2**62}\n")
    (tmp_path / "none").write_text("max\n")
    expected = {"less": 2**27, "more": whole, "none": whole, "missing": whole}
    for name, size in expected.items():
        monkeypatch.setattr(memory, "_CONTAINER_LIMITS", (tmp_path / name,))
        assert memory.machine_memory() == size
