"""Images that stay in their files: the same as from memory, read when they are wanted."""

import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import assert_input_error, random_images, save_image, save_split

from benchmarks.made_up_data import encoded, write_data_set
from ktg_jax.data.dataset import Dataset
from ktg_jax.data.sources import has_test_images, has_val_images, load_dataset
from ktg_jax.data.streamed import StreamedImages, Streaming
from ktg_jax.errors import InputError

STREAM = Streaming()


def assert_same_images(streamed: Dataset, loaded: Dataset) -> None:
    assert streamed.is_streamed
    assert not loaded.is_streamed
    for name in ("train", "val", "test"):
        ours, theirs = getattr(streamed, name), getattr(loaded, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.images.shape == theirs.images.shape
            np.testing.assert_array_equal(ours.labels, theirs.labels)
            found = ours.images.read(np.arange(len(ours)))
            np.testing.assert_array_equal(found, theirs.images)


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KTG_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of many sizes, one of them turned, in two classes and three splits."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 3), ("test", 4)):
        for name in "ab":
            for i in range(count):
                size = (*rng.integers(9, 40, 2), 3)
                pixels = rng.integers(0, 256, size, np.uint8)
                save_image(tmp_path / "pictures" / split / name / f"{i}.png", pixels)
    turned = tmp_path / "pictures" / "train" / "a" / "0.png"
    save_image(
        turned,
        random_images(1, 30, 12, 3)[0],
        exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0",
    )
    return tmp_path / "pictures"


def prepared(root: Path, name: str = "shapes", sizes: tuple[int, ...] = (8,), **more: Any) -> Path:
    """A data set of tensorflow-datasets, whose test labels were not published."""
    rng = np.random.default_rng(0)

    def examples(count: int, label: int | None = None) -> Any:
        for i in range(count):
            side = sizes[i % len(sizes)]
            pixels = rng.integers(0, 256, (side, side + 2, 3), np.uint8)
            yield encoded(pixels), i % 3 if label is None else label

    shape = (8, 10, 3) if len(sizes) == 1 else (None, None, 3)
    splits = {"train": examples(30), "validation": examples(9), "test": examples(6, -1)}
    write_data_set(root, name, splits | more, 3, shape)
    return root


@pytest.mark.parametrize(
    "how",
    [
        {"image_size": 16},
        {"image_size": 24, "train_limit": 30, "split_seed": 3},
        {"image_size": 16, "with_test": False},
    ],
)
def test_a_folder_is_the_same_as_in_memory(folder: Path, how: dict[str, Any]) -> None:
    data = f"folder:{folder}"
    assert_same_images(load_dataset(data, stream=STREAM, **how), load_dataset(data, **how))


def test_greyscale_folders_of_one_size_need_no_other(tmp_path: Path) -> None:
    for i, pixels in enumerate(random_images(24, 9, 8)):
        save_image(tmp_path / "train" / "ab"[i % 2] / f"{i}.png", pixels)
    data = f"folder:{tmp_path}"
    streamed = load_dataset(data, stream=STREAM, val_fraction=0.25)
    assert_same_images(streamed, load_dataset(data, val_fraction=0.25))
    assert streamed.image_shape == (9, 8, 1)


def test_a_colour_image_among_grey_ones_is_named(tmp_path: Path) -> None:
    for i, pixels in enumerate(random_images(1100, 4, 4)):
        save_image(tmp_path / "train" / "ab"[i % 2] / f"{i:04}.png", pixels)
    coloured = tmp_path / "train" / "b" / "0003.png"  # of which the first looked at are not
    save_image(coloured, random_images(1, 4, 4, 3)[0])
    images = load_dataset(f"folder:{tmp_path}", stream=STREAM).train.images
    assert images.shape == (1100, 4, 4, 1)
    with pytest.raises(InputError) as caught:
        images.read(np.arange(len(images)))
    assert_input_error(caught.value, "data", str(coloured), "a grey image")


def test_what_is_prepared_is_the_same_as_in_memory(tmp_path: Path, cache_dir: Path) -> None:
    root = prepared(tmp_path / "tfds")
    several: list[dict[str, Any]] = [{}, {"image_size": 6}, {"train_limit": 12}]
    for how in several:
        streamed = load_dataset("tfds:shapes", root, stream=STREAM, **how)
        loaded = load_dataset("tfds:shapes", root, **how)
        assert_same_images(streamed, loaded)
        assert streamed.own_val
        assert streamed.test is None  # without labels
        assert streamed.name == loaded.name == "tfds:shapes"
        assert streamed.class_names == ("class 0", "class 1", "class 2")
    assert has_val_images("tfds:shapes", root)
    assert has_test_images("tfds:shapes", root)


def test_that_labels_were_not_published_is_said(
    tmp_path: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load_dataset("tfds:shapes", prepared(tmp_path), stream=STREAM)
    assert "shapes: the labels of test were not published: left out" in caplog.text


def test_no_image_is_read_before_it_is_wanted_and_labels_once(
    tmp_path: Path, cache_dir: Path
) -> None:
    root = prepared(tmp_path)
    first = load_dataset("tfds:shapes", root, stream=STREAM)
    file = root / "shapes" / "1.0.0" / "shapes-train.array_record-00000-of-00001"
    file.write_bytes(file.read_bytes())  # a new entry of the cache
    before = len([*cache_dir.iterdir()])
    load_dataset("tfds:shapes", root, stream=STREAM)
    assert len([*cache_dir.iterdir()]) == before + 1
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(InputError) as caught:
        first.train.images.read(np.arange(30))
    assert_input_error(caught.value, "data_dir", str(file), "complete, undamaged")


def test_images_that_differ_in_size_are_streamed_with_a_size(
    tmp_path: Path, cache_dir: Path
) -> None:
    root = prepared(tmp_path, sizes=(8, 20))
    assert load_dataset("tfds:shapes", root, image_size=12, stream=STREAM).image_shape[0] == 12
    with pytest.raises(InputError) as caught:
        load_dataset("tfds:shapes", root, stream=STREAM)
    assert_input_error(caught.value, "image_size", "pixels: the images of shapes differ in size")
    with pytest.raises(InputError) as caught:
        load_dataset("tfds:shapes", root, image_size=12)
    assert_input_error(caught.value, "stream", "true: the images of shapes differ in size")


def test_parts_of_images_need_a_size(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_dataset(f"folder:{folder}", stream=Streaming(centre=True))
    assert_input_error(caught.value, "image_size", "got None; allowed: pixels, where parts")


@pytest.mark.parametrize("data", ["digits", "npz:images.npz"])
def test_what_is_read_whole_is_not_streamed(data: str) -> None:
    with pytest.raises(InputError) as caught:
        load_dataset(data, stream=STREAM)
    assert_input_error(caught.value, "stream", "cifar10, cifar100, tiny_imagenet, tfds:NAME")


def test_the_middle_of_an_image_and_random_parts(folder: Path) -> None:
    centre = Streaming(centre=True)
    images = load_dataset(f"folder:{folder}", image_size=8, stream=centre).train.images
    whole = load_dataset(f"folder:{folder}", image_size=8, stream=STREAM).train.images
    found = images.read(np.arange(10))
    assert found.shape == (10, 8, 8, 3)
    assert (found != whole.read(np.arange(10))).any()
    parts = images.read(np.arange(10), np.random.default_rng(0).random((10, 10, 4)))
    assert parts.shape == found.shape
    assert (parts != found).any()
    again = images.read(np.arange(10), np.random.default_rng(0).random((10, 10, 4)))
    np.testing.assert_array_equal(parts, again)


def test_a_picture_that_cannot_be_read_or_is_of_another_size_is_named(tmp_path: Path) -> None:
    save_split(tmp_path / "train", per_class=3)
    images = load_dataset(f"folder:{tmp_path}", stream=STREAM).train.images
    save_image(tmp_path / "train" / "b" / "2.png", random_images(1, 9, 8, 3)[0])
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"\x89PNG")
    np.testing.assert_array_equal(images.read(np.array([0, 3])).shape, (2, 8, 8, 3))
    for index, named in ((1, "a/1.png'; allowed: a complete"), (5, "b/2.png: 8x9'; allowed: 8x8")):
        with pytest.raises(InputError) as caught:
            images.read(np.array([index]))
        assert_input_error(caught.value, "data", named)
        copy = pickle.loads(pickle.dumps(caught.value))
        assert (str(copy), copy.field) == (str(caught.value), "data")


def test_a_checksum_tells_names_and_sizes_and_which_images(tmp_path: Path) -> None:
    save_split(tmp_path / "train", per_class=4)

    def images(**how: Any) -> StreamedImages:
        found = load_dataset(f"folder:{tmp_path}", stream=STREAM, **how).train.images
        assert isinstance(found, StreamedImages)
        return found

    before = images()
    assert images().checksum == before.checksum
    assert images(train_limit=4).checksum != before.checksum
    assert pickle.loads(pickle.dumps(before)).checksum == before.checksum
    (tmp_path / "train" / "a" / "0.png").rename(tmp_path / "train" / "a" / "00.png")
    renamed = images()
    assert renamed.checksum != before.checksum
    save_image(tmp_path / "train" / "a" / "00.png", np.zeros((8, 8, 3), np.uint8))
    assert images().checksum != renamed.checksum


def test_paths_that_are_not_there_any_more_are_named(folder: Path) -> None:
    images = load_dataset(f"folder:{folder}", image_size=8, stream=STREAM).train.images
    path = folder / "train" / "a" / "3.png"
    position = [name.decode() for name in images.source.names].index("train/a/3.png")
    path.unlink()
    with pytest.raises(InputError, match=r"a/3\.png"):
        images.read(np.array([position]))
