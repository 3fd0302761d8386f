"""Folders of images: everything that is there is used, or refused with counts and names."""

import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import assert_input_error, png, random_images, save_image, save_split
from PIL import Image

from ktg_jax.data import images, memory
from ktg_jax.data.images import resize_images
from ktg_jax.data.sources import has_test_images, has_val_images, load_dataset
from ktg_jax.errors import InputError

PIXELS = random_images(1, 8, 8, 3, seed=9)[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, two images of each in train."""
    save_split(tmp_path / "own" / "train")
    return tmp_path / "own"


def assert_refused(folder: Path, *parts: str, **options: Any) -> None:
    with pytest.raises(InputError) as caught:
        load_dataset(f"folder:{folder}", **options)
    assert_input_error(caught.value, "data", *parts)


# --- splits


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "Val", "val_set"])
@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_every_name_of_the_validation_split_is_read(
    name: str, fraction: float, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_split(folder / name, per_class=1, seed=1)
    dataset = load_dataset(f"folder:{folder}", val_fraction=fraction)
    assert dataset.val is not None
    assert (len(dataset.train), len(dataset.val), dataset.own_val) == (4, 2, True)
    assert has_val_images(f"folder:{folder}")
    assert not has_test_images(f"folder:{folder}")
    assert caplog.records == []


@pytest.mark.parametrize(("train", "test"), [("training", "testing"), ("Train", "test-set")])
def test_the_other_splits_have_several_names_too(train: str, test: str, folder: Path) -> None:
    (folder / "train").rename(folder / train)
    save_split(folder / test, per_class=3, seed=1)
    dataset = load_dataset(f"folder:{folder}")
    assert dataset.test is not None
    assert (len(dataset.train), dataset.val, len(dataset.test)) == (4, None, 6)
    assert has_test_images(f"folder:{folder}")


@pytest.mark.parametrize("names", [("val", "valid"), ("test", "testing"), ("train", "training")])
def test_two_folders_of_one_split_are_refused(names: tuple[str, str], folder: Path) -> None:
    for name in names:
        save_split(folder / name)
    assert_refused(folder, f"{names[0]} and {names[1]}", f"both mean the {names[0]} split")
    with pytest.raises(InputError):
        has_test_images(f"folder:{folder}")


def test_images_in_no_split_are_told_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_split(folder / "unlabelled")
    save_image(folder / "sample.png", PIXELS)
    save_image(folder / ".cache" / "a" / "0.png", PIXELS)
    (folder / "notes").mkdir()
    (folder / "README.md").write_text("mine")
    assert len(load_dataset(f"folder:{folder}").train) == 4
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "own: 5 images are not used: in sample.png, unlabelled/; only train, val and test are"
    )


# --- which files are images


@pytest.mark.parametrize(
    "suffix", ["webp", "bmp", "gif", "tif", "TIFF", "ppm", "pgm", "JPG", "jfif", "tga", "pcx"]
)
def test_every_format_that_pillow_reads_is_used(
    suffix: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_image(folder / "train" / "a" / f"new.{suffix}", np.full((8, 8, 3), 144, np.uint8))
    dataset = load_dataset(f"folder:{folder}")
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert abs(dataset.train.images[2].astype(int) - 144).max() <= 3
    assert caplog.records == []


def test_images_in_deeper_folders_are_of_their_class(folder: Path, tmp_path: Path) -> None:
    save_image(folder / "train" / "a" / "more" / "deep" / "9.png", PIXELS)
    save_split(tmp_path / "elsewhere", classes="x", seed=3)
    (folder / "train" / "b" / "linked").symlink_to(tmp_path / "elsewhere" / "x")
    (folder / "train" / "a" / ".hidden").mkdir()
    save_image(folder / "train" / "a" / ".hidden" / "0.png", PIXELS)
    save_image(folder / "train" / "a" / "._0.png", PIXELS)
    dataset = load_dataset(f"folder:{folder}")
    assert dataset.class_names == ("a", "b")
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    np.testing.assert_array_equal(dataset.train.images[2], PIXELS)


def test_what_is_no_image_is_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    contents = {
        "Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        ".DS_Store": b"\0\0\0\1Bud1",
        "desktop.ini": b"[.ShellClassInfo]\r\n",
        "README": b"mine",
        "boxes.txt": b"0.png 1 2 3 4\n",
        "empty": b"",
    }
    for name, content in contents.items():
        (folder / "train" / "a" / name).write_bytes(content)
    (folder / "train" / "README.md").write_text("mine")
    (folder / "train" / "a" / "gone").symlink_to("nowhere")
    os.mkfifo(folder / "train" / "a" / "pipe")
    assert len(load_dataset(f"folder:{folder}").train) == 4
    assert caplog.records == []


def test_pictures_that_are_not_read_are_refused_with_counts_and_names(folder: Path) -> None:
    for i in range(3):
        (folder / "train" / "b" / f"{i}.heic").write_bytes(b"made by a telephone")
    shutil.copy(folder / "train" / "a" / "0.png", folder / "train" / "a" / "0.png~")
    assert_refused(folder, f"{folder / 'train'}: 4 files, a/0.png~, b/0.heic, b/1.heic, ...")


def test_a_class_of_nothing_else_is_refused_for_that(folder: Path) -> None:
    shutil.rmtree(folder / "train" / "b")
    (folder / "train" / "b").mkdir()
    shutil.copy(folder / "train" / "a" / "0.png", folder / "train" / "b" / "0")
    assert_refused(folder, "1 file, b/0", "a suffix such as .png")


def test_images_beside_the_classes_are_refused(folder: Path) -> None:
    save_image(folder / "train" / "loose.png", PIXELS)
    assert_refused(folder, "1 file, loose.png", "a folder of their class")


def test_classes_one_folder_too_deep_are_refused(folder: Path) -> None:
    (folder / "train").rename(folder / "inner")
    (folder / "train").mkdir()
    (folder / "inner").rename(folder / "train" / "train")
    assert_refused(folder, "one class, train, with the folders a, b")
    shutil.rmtree(folder / "train" / "train" / "b")
    assert load_dataset(f"folder:{folder}").class_names == ("train",)  # one within one


def test_a_picture_in_another_split_is_found_before_anything_is_decoded(folder: Path) -> None:
    save_split(folder / "test")
    (folder / "test" / "a" / "0.heic").write_bytes(b"")
    (folder / "train" / "a" / "0.png").write_bytes(b"damaged")
    assert_refused(folder, "a/0.heic")
    assert_refused(folder, "train/a/0.png", with_test=False)


# --- how images are decoded


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("image_size", [None, 8])
def test_images_are_turned_as_the_camera_was_held(
    suffix: str, image_size: int | None, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera's right side was down: what is at the left belongs to the top
    lying = np.zeros((8, 16, 3), np.uint8)
    lying[:, :8] = 200
    for name in "ab":
        path = tmp_path / "train" / name / f"0.{suffix}"
        save_image(path, lying, exif=exif, **({"quality": 100} if suffix == "jpg" else {}))
    save_image(tmp_path / "train" / "b" / "1.png", np.zeros((16, 8, 3), np.uint8))
    dataset = load_dataset(f"folder:{tmp_path}", image_size=image_size)
    height = image_size or 16
    assert dataset.image_shape == (height, 8, 3)
    upright = dataset.train.images[0, :, :, 0].astype(int)
    assert abs(upright[: height // 4] - 200).max() <= 3
    assert abs(upright[-height // 4 :]).max() <= 3


def test_exif_that_cannot_be_read_changes_nothing(folder: Path) -> None:
    pixels = np.full((8, 8, 3), 144, np.uint8)
    save_image(folder / "train" / "a" / "9.png", pixels, exif=b"Exif\0\0neither II nor MM")
    np.testing.assert_array_equal(load_dataset(f"folder:{folder}").train.images[2], pixels)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("grey.png", png(8, 8, depth=16, colour=0, pixels=bytes(8 * 17))),
        ("grey_and_alpha.png", png(8, 8, depth=16, colour=4, pixels=bytes(8 * 33))),
        ("colour.png", png(8, 8, depth=16, colour=2, pixels=bytes(8 * 49))),
        ("colour_and_alpha.png", png(8, 8, depth=16, colour=6, pixels=bytes(8 * 65))),
        ("colour.ppm", b"P6 8 8 65535\n" + bytes(8 * 8 * 6)),
        ("colour_of_12_bits.ppm", b"P6 8 8 4095\n" + bytes(8 * 8 * 6)),
        ("grey.pgm", b"P5 8 8 65535\n" + bytes(8 * 8 * 2)),
    ],
)
def test_images_of_more_than_8_bits_a_channel_are_refused(
    name: str, content: bytes, folder: Path
) -> None:
    (folder / "train" / "a" / name).write_bytes(content)
    assert_refused(folder, name, "images of 8 bits a channel")


def test_fewer_bits_are_read(folder: Path) -> None:
    (folder / "train" / "a" / "2.ppm").write_bytes(b"P6 8 8 15\n" + bytes([15] * 8 * 8 * 3))
    (folder / "train" / "a" / "3.png").write_bytes(
        png(8, 8, depth=1, colour=0, pixels=b"\0\xff" * 8)
    )
    images = load_dataset(f"folder:{folder}").train.images
    assert (images[2:4] == 255).all()


def test_the_first_frame_is_used_and_that_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (Image.fromarray(np.full((8, 8, 3), v, np.uint8)) for v in (255, 0))
    for name in ("5.gif", "6.webp", "7.tif", "8.png"):
        path = folder / "train" / "a" / name
        first.save(path, save_all=True, append_images=[second], lossless=True)
    first.save(folder / "train" / "a" / "9.jpg", format="MPO", save_all=True, append_images=[first])
    first.save(folder / "train" / "b" / "9.gif")
    dataset = load_dataset(f"folder:{folder}")
    assert (dataset.train.images[2:7] == 255).all()
    (record,) = caplog.records
    assert record.getMessage() == (
        f"4 images have several frames, of which the first is used: {folder}/train/a/5.gif, ..."
    )


# --- what would not end


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def itself(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [pipe, device, listening, itself, Path.mkdir])
@pytest.mark.parametrize("name", ["00.png", "zz.jpg"])  # the first and another
def test_what_is_no_file_is_no_image(make: Callable[[Path], None], name: str, folder: Path) -> None:
    make(folder / "train" / "a" / name)
    assert_refused(folder, f"train/a/{name}")


@pytest.mark.parametrize("to", [".", "..", "../..", "../../..", "/"])
def test_a_folder_within_itself_is_refused(to: str, folder: Path) -> None:
    (folder / "train" / "a" / "again").symlink_to(to)
    assert_refused(folder, f"{folder / 'train' / 'a' / 'again'}, a link to")


def test_links_that_multiply_are_refused(folder: Path) -> None:
    here = folder / "train" / "a"
    for depth in range(30):  # 2 to the power of 30 ways to the last
        (here / "x").mkdir()
        (here / "y").symlink_to("x")
        here = here / "x"
        save_image(here / f"{depth}.png", PIXELS)
    assert_refused(folder, "a link to")


def test_a_loop_beside_the_splits_is_no_matter(folder: Path) -> None:
    (folder / "again").symlink_to(".")
    assert len(load_dataset(f"folder:{folder}").train) == 4


@pytest.mark.parametrize("image_size", [None, 8])
def test_an_image_of_too_many_pixels_is_not_decoded(image_size: int | None, folder: Path) -> None:
    huge = png(50_000, 50_000, depth=8, colour=2, pixels=bytes(100))
    (folder / "train" / "a" / "00.png").write_bytes(huge)
    assert_refused(folder, "00.png", "178,956,970 pixels", image_size=image_size)


def test_images_that_do_not_fit_in_memory_are_not_decoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "machine_memory", lambda: 4 * 8 * 8 * 3)
    assert len(load_dataset(f"folder:{folder}").train) == 4
    monkeypatch.setattr(memory, "machine_memory", lambda: 4 * 8 * 8 * 3 - 1)
    assert_refused(folder, "4 images of 8x8 pixels", "fits in memory")


def test_a_size_that_does_not_fit_in_memory_is_refused(folder: Path) -> None:
    for data in (f"folder:{folder}", "digits"):
        with pytest.raises(InputError) as caught:
            load_dataset(data, image_size=10**6)
        assert_input_error(caught.value, "image_size", "got 1000000;", "fits in memory")
    with pytest.raises(InputError):
        resize_images(random_images(2, 4, 4, 1), 10**7)


def test_large_images_are_decoded_one_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once: list[int] = []
    decoding: list[str] = []

    def in_form(image: Image.Image, form: Any, name: str) -> np.ndarray:
        decoding.append(name)
        at_once.append(len(decoding))
        time.sleep(0.002)  # in which another thread would begin
        decoding.remove(name)
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(images, "_LARGE", 63)
    monkeypatch.setattr(images, "in_form", in_form)
    for i in range(2, 40):
        save_image(folder / "train" / "a" / f"{i}.png", PIXELS)
    load_dataset(f"folder:{folder}")
    assert at_once == [1] * 42
