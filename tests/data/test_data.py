"""Loading of data sets: splits, sources, the cache, and what is said about bad data."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import assert_input_error, random_images, save_image
from PIL import Image

from benchmarks.made_up_data import encoded, write_data_set
from ktg_jax.data import tfds
from ktg_jax.data.cache import in_chunks
from ktg_jax.data.dataset import Dataset, Split, hold_out, limit_split
from ktg_jax.data.images import resize_images
from ktg_jax.data.sources import load_dataset, load_npz
from ktg_jax.errors import InputError
from ktg_jax.io.files import cache_folder

REAL_DATA = os.environ.get("KTG_DATA_DIR")
needs_real_data = pytest.mark.skipif(
    not REAL_DATA, reason="KTG_DATA_DIR is not set to a folder with CIFAR-10 and Tiny-ImageNet"
)


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keeps every test out of the user's cache, by the environment variable."""
    monkeypatch.setenv("KTG_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def random_split(labels: Any, *shape: int) -> Split:
    labels = np.asarray(labels, np.int32)
    return Split(random_images(len(labels), *(shape or (2, 2, 1))), labels)


def assert_same_split(a: Split | None, b: Split | None) -> None:
    assert a is not None
    assert b is not None
    np.testing.assert_array_equal(a.images, b.images)
    np.testing.assert_array_equal(a.labels, b.labels)


def damage(path: Path) -> None:
    """Zeroes the second half of a file, but keeps its size and modification time."""
    status, content = path.stat(), path.read_bytes()
    half = len(content) // 2
    path.write_bytes(content[:half] + bytes(len(content) - half))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# --- Split and Dataset


@pytest.mark.parametrize(
    ("images", "labels", "field", "value"),
    [
        (np.zeros((2, 4, 4, 1)), np.zeros(2, np.int32), "images", "float64[2, 4, 4, 1]"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.int32), "images", "uint8[2, 4, 4]"),
        (np.zeros((0, 4, 4, 1), np.uint8), np.zeros(0, np.int32), "images", "uint8[0, 4, 4, 1]"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int64), "labels", "int64[2]"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, np.int32), "labels", "int32[3]"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros((2, 1), np.int32), "labels", "int32[2, 1]"),
    ],
)
def test_a_split_refuses_other_dtypes_ranks_and_lengths(
    images: np.ndarray, labels: np.ndarray, field: str, value: str
) -> None:
    with pytest.raises(InputError) as caught:
        Split(images, labels)
    assert_input_error(caught.value, field, value)


def test_a_data_set_knows_its_classes_and_image_shape() -> None:
    train = random_split([0, 1, 2], 4, 6, 3)
    dataset = Dataset("d", ("a", "b", "c", "d"), train, None, None, flip=True)
    assert (dataset.num_classes, dataset.image_shape, len(dataset.train)) == (4, (4, 6, 3), 3)


@pytest.mark.parametrize("label", [-1, 2])
def test_a_data_set_names_the_split_and_the_label_that_is_no_class(label: int) -> None:
    train, test = random_split([0, 1]), random_split([0, label])
    with pytest.raises(InputError) as caught:
        Dataset("d", ("a", "b"), train, None, test, flip=True)
    assert_input_error(caught.value, "test labels", f"got {label};", "0 to 1")


def test_a_data_set_refuses_splits_of_another_image_shape() -> None:
    with pytest.raises(InputError) as caught:
        Dataset("d", ("a",), random_split([0], 4, 4, 1), random_split([0], 4, 4, 3), None, True)
    assert_input_error(caught.value, "val images", "(4, 4, 3)", "(4, 4, 1)")


# --- limiting and holding out


def test_limit_and_hold_out_keep_the_class_proportions_exactly() -> None:
    split = random_split([0] * 40 + [1] * 20 + [2] * 20)
    limited = limit_split(split, 40, seed=3)
    assert np.bincount(limited.labels).tolist() == [20, 10, 10]
    rest, held_out = hold_out(limited, 0.2, seed=3)
    assert held_out is not None
    assert np.bincount(rest.labels).tolist() == [16, 8, 8]
    assert np.bincount(held_out.labels).tolist() == [4, 2, 2]


@pytest.mark.parametrize(
    ("counts", "limit", "kept"),
    [((5, 3, 2), 4, (2, 1, 1)), ((5, 3, 2), 7, (4, 2, 1)), ((6, 6, 8), 10, (3, 3, 4))],
)
def test_what_rounding_leaves_goes_to_the_largest_remainders(
    counts: tuple[int, ...], limit: int, kept: tuple[int, ...]
) -> None:
    labels = np.repeat(np.arange(3), counts).astype(np.int32)
    split = Split(np.zeros((len(labels), 4, 4, 1), np.uint8), labels)
    for seed in range(5):
        found = np.bincount(limit_split(split, limit, seed).labels, minlength=3)
        # 5, 3 and 2 of 10, for 7: shares 3.5, 2.1 and 1.4
        assert tuple(found) == kept


def test_hold_out_divides_the_images_and_keeps_their_order_and_labels() -> None:
    labels = np.arange(60) % 3
    images = np.arange(60, dtype=np.uint8).reshape(60, 1, 1, 1)  # each image is its own index
    rest, held_out = hold_out(Split(images, labels.astype(np.int32)), 0.25, seed=0)
    assert held_out is not None
    kept, out = rest.images.ravel(), held_out.images.ravel()
    assert sorted([*kept, *out]) == list(range(60))
    for part, split in ((kept, rest), (out, held_out)):
        assert (np.diff(part.astype(int)) > 0).all()
        np.testing.assert_array_equal(labels[part], split.labels)


def test_the_seed_alone_fixes_what_is_held_out() -> None:
    split = random_split(np.arange(100) % 4)
    _, first = hold_out(split, 0.2, seed=1)
    np.random.seed(0)  # noqa: NPY002 - the global generator must not matter
    _, second = hold_out(split, 0.2, seed=1)
    _, other = hold_out(split, 0.2, seed=2)
    assert_same_split(first, second)
    assert first is not None
    assert other is not None
    assert (first.images != other.images).any()


def test_a_limit_of_all_images_and_a_fraction_of_0_change_nothing() -> None:
    split = random_split([0, 1, 1])  # class 0 could not be divided
    assert limit_split(split, 3, seed=0) is split
    assert hold_out(split, 0.0, seed=0) == (split, None)


@pytest.mark.parametrize(
    ("labels", "limit", "part"),
    [
        ([0, 0, 1, 1], 5, "1 to 4"),
        ([0, 0, 1, 1], 0, "1 to 4"),
        ([0, 0, 1, 1], 1, "2 to 2 of the 4"),
        ([0, 0, 1, 1], 3, "2 to 2 of the 4"),
        ([0, 0, 0, 1], 2, "class 1 has 1"),
    ],
)
def test_an_impossible_limit_is_explained(labels: list[int], limit: int, part: str) -> None:
    with pytest.raises(InputError) as caught:
        limit_split(random_split(labels), limit, seed=0)
    assert_input_error(caught.value, "train_limit", f"got {limit};", part)


@pytest.mark.parametrize(
    ("labels", "fraction", "part"),
    [
        (np.arange(20) % 4, 0.1, "4 to 16 of the 20 images (here 2)"),
        (np.arange(20) % 4, 0.9, "4 to 16 of the 20 images (here 18)"),
        ([0, 0, 0, 0, 2], 0.4, "class 2 has 1"),
    ],
)
def test_an_impossible_fraction_is_explained(labels: Any, fraction: float, part: str) -> None:
    with pytest.raises(InputError) as caught:
        hold_out(random_split(labels), fraction, seed=0)
    assert_input_error(caught.value, "val_fraction", f"got {fraction};", part)


# --- load_dataset with the real digits


def test_digits_are_the_real_ones() -> None:
    from sklearn.datasets import load_digits

    dataset = load_dataset("digits")
    assert dataset.image_shape == (8, 8, 1)
    assert (dataset.num_classes, dataset.flip, dataset.val) == (10, False, None)
    assert dataset.test is not None
    assert (len(dataset.train), len(dataset.test)) == (1438, 359)
    ours = np.concatenate([dataset.train.images, dataset.test.images])[..., 0]
    labels = np.concatenate([dataset.train.labels, dataset.test.labels])
    real = load_digits()
    # 0..16 -> 0..255 is one to one, so the originals can be compared as sets of pixels and label
    back = np.rint(ours * (16 / 255)).astype(int).reshape(len(ours), -1)
    assert sorted(map(tuple, np.column_stack([back, labels]))) == sorted(
        map(tuple, np.column_stack([real.data.astype(int), real.target]))
    )
    assert set(np.unique(ours)) == {round(v * 255 / 16) for v in range(17)}


def test_the_validation_images_come_out_of_the_limited_training_images() -> None:
    options: dict[str, Any] = {"train_limit": 500, "split_seed": 5}
    limited = load_dataset("digits", **options)
    divided = load_dataset("digits", **options, val_fraction=0.2)
    assert divided.val is not None
    assert (len(limited.train), len(divided.train), len(divided.val)) == (500, 400, 100)
    together = np.concatenate([divided.train.images, divided.val.images])
    assert sorted(map(bytes, together)) == sorted(map(bytes, limited.train.images))
    assert_same_split(divided.test, load_dataset("digits").test)


def test_other_options_do_not_change_the_validation_split() -> None:
    first = load_dataset("digits", val_fraction=0.1)
    second = load_dataset("digits", val_fraction=0.1, with_test=False)
    other = load_dataset("digits", val_fraction=0.1, split_seed=1)
    assert_same_split(first.val, second.val)
    assert second.test is None
    assert first.val is not None
    assert other.val is not None
    assert first.val.images.tobytes() != other.val.images.tobytes()


def test_every_split_is_resized() -> None:
    dataset = load_dataset("digits", val_fraction=0.2, image_size=5, train_limit=200)
    assert dataset.val is not None
    assert dataset.test is not None
    for split in (dataset.train, dataset.val, dataset.test):
        assert split.images.shape[1:] == (5, 5, 1)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_resizing_averages_what_it_shrinks(channels: int) -> None:
    checkerboard = np.indices((16, 16)).sum(0) % 2 * np.uint8(255)
    images = np.broadcast_to(checkerboard[None, :, :, None], (2, 16, 16, channels))
    resized = resize_images(images.astype(np.uint8), 4)
    assert resized.shape == (2, 4, 4, channels)
    assert abs(resized.astype(int) - 127).max() <= 8  # without antialiasing: 0 or 255


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"data": "mnist"}, "data"),
        ({"data": "npz:"}, "data"),
        ({"data": "digits:x"}, "data"),
        ({"data": "digits", "image_size": 3}, "image_size"),
        ({"data": "digits", "val_fraction": 1.0}, "val_fraction"),
        ({"data": "digits", "val_fraction": -0.1}, "val_fraction"),
        ({"data": "digits", "val_fraction": float("nan")}, "val_fraction"),
        ({"data": "digits", "train_limit": 1439}, "train_limit"),
        ({"data": "tiny_imagenet"}, "data_dir"),
        ({"data": "tiny_imagenet", "data_dir": "/nowhere"}, "data_dir"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        load_dataset(**options)
    assert_input_error(caught.value, field)


def test_an_unknown_data_set_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        InputError, match=r"digits, cifar10, cifar100, tiny_imagenet, tfds:NAME, npz:FILE"
    ):
        load_dataset("mnist")


# --- npz


NPZ = {
    "images": random_images(6, 4, 5, 3),
    "labels": np.array([0, 1, 2, 0, 1, 2]),
    "test_images": random_images(2, 4, 5, 3, seed=1),
    "test_labels": np.array([0, 3]),
}


def save_npz(path: Path, **changes: np.ndarray | None) -> Path:
    arrays = {key: value for key, value in (NPZ | changes).items() if value is not None}
    np.savez(path, allow_pickle=True, **arrays)
    return path


def test_npz_gives_back_what_was_saved(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "a.npz")
    dataset = load_dataset(f"npz:{path}")
    np.testing.assert_array_equal(dataset.train.images, NPZ["images"])
    np.testing.assert_array_equal(dataset.train.labels, NPZ["labels"])
    assert dataset.test is not None
    np.testing.assert_array_equal(dataset.test.images, NPZ["test_images"])
    np.testing.assert_array_equal(dataset.test.labels, NPZ["test_labels"])
    assert dataset.class_names == ("0", "1", "2", "3")  # class 3 occurs in test only
    assert (dataset.flip, dataset.val) == (True, None)


def test_npz_classes_are_the_same_with_and_without_test(tmp_path: Path) -> None:
    dataset = load_npz(save_npz(tmp_path / "a.npz"), with_test=False)
    assert (dataset.num_classes, dataset.test) == (4, None)


def test_without_test_npz_test_images_are_not_read(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "a.npz")
    content = path.read_bytes()
    path.write_bytes(content.replace(NPZ["test_images"].tobytes(), bytes(NPZ["test_images"].size)))
    assert len(load_npz(path, with_test=False).train) == 6
    with pytest.raises(InputError):
        load_npz(path)


def test_npz_class_names_may_name_classes_that_do_not_occur(tmp_path: Path) -> None:
    names = np.array(["cat", "dog", "eel", "fox", "gnu"])
    path = save_npz(tmp_path / "a.npz", class_names=names, test_images=None, test_labels=None)
    dataset = load_npz(path)
    assert dataset.class_names == ("cat", "dog", "eel", "fox", "gnu")
    assert dataset.test is None


@pytest.mark.parametrize(
    ("changes", "field", "part"),
    [
        ({"images": NPZ["images"] / 255}, "npz images", "float64[6, 4, 5, 3]"),
        ({"images": NPZ["images"][..., 0]}, "npz images", "uint8[6, 4, 5]"),
        ({"images": NPZ["images"][:0], "labels": NPZ["labels"][:0]}, "npz images", "uint8[0,"),
        ({"images": NPZ["images"].astype(object)}, "data", "object arrays"),
        ({"images": None}, "npz arrays", "also images"),
        ({"labels": None}, "npz arrays", "also labels"),
        ({"labels": np.array([0, -1, 2, 0, 1, 2])}, "npz labels", "got -1;"),
        ({"labels": np.arange(6) + 2**40}, "npz labels", f"got {2**40};"),
        ({"labels": np.arange(6.0)}, "npz labels", "float64[6]"),
        ({"labels": np.arange(6)[:, None]}, "npz labels", "int64[6, 1]"),
        ({"labels": np.arange(5)}, "npz labels", "got 5; allowed: 6"),
        ({"test_images": None}, "npz arrays", "both"),
        ({"test_labels": None}, "npz arrays", "both"),
        ({"test_images": NPZ["test_images"] * 1.0}, "npz test_images", "float64"),
        ({"test_labels": np.arange(3)}, "npz test_labels", "got 3; allowed: 2"),
        ({"test_images": NPZ["test_images"][:, 1:]}, "test images", "(3, 5, 3)"),
        ({"class_names": np.array(["a", "b", "c"])}, "npz class_names", "[4 or more]"),
        ({"class_names": np.arange(4)}, "npz class_names", "int64[4]"),
    ],
)
def test_malformed_npz_arrays_are_named(
    tmp_path: Path, changes: dict[str, Any], field: str, part: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_npz(save_npz(tmp_path / "a.npz", **changes))
    assert_input_error(caught.value, field, part)


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "empty", "npy", "truncated", "flip"])
def test_an_unreadable_npz_file_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.npz"
    content = save_npz(tmp_path / "good.npz").read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind == "npy":
        with path.open("wb") as file:
            np.save(file, NPZ["images"])
    elif kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "flip":  # one byte of the pixels: only the checksum can tell
        place = content.index(NPZ["images"].tobytes()) + 100
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif kind != "missing":
        path.write_bytes(b"" if kind == "empty" else b"label,pixel\n1,2\n")
    with pytest.raises(InputError) as caught:
        load_npz(path)
    assert_input_error(caught.value, "data", str(path))


# --- folders of images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Train: 3 cats and 3 dogs, test: 1 dog; 6x5 RGB; image values tell the class and number."""
    root = tmp_path / "pets"
    for label, name in enumerate(["cat", "dog"]):
        for i, file in enumerate(["0.png", "1.PNG", "2.Png"]):
            pixels = np.full((6, 5, 3), 100 * label + i, np.uint8)
            save_image(root / "train" / name / file, pixels)
    save_image(root / "test" / "dog" / "a.jpeg", np.full((6, 5, 3), 180, np.uint8))
    (root / "train" / "dog" / "notes.txt").write_text("not an image")
    (root / "train" / ".cache").mkdir()
    return root


def test_what_is_decoded_is_told(folder: Path, tiny: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []

    def tell(what: str, done: int, total: int) -> None:
        told.append((what, done, total))

    load_dataset(f"folder:{folder}", on_progress=tell)
    assert sorted(told) == [("test", 1, 1), ("train", 6, 6)]
    told.clear()
    options: dict[str, Any] = {"cache_dir": tmp_path / "cache", "on_progress": tell}
    load_dataset("tiny_imagenet", tiny, **options)
    assert told == [("tiny_imagenet train", 3, 3), ("tiny_imagenet val", 2, 2)]
    load_dataset("tiny_imagenet", tiny, **options)  # from the cache
    assert len(told) == 2


def test_progress_is_told_by_the_chunk() -> None:
    ranges: list[range] = []
    told: list[tuple[str, int, int]] = []
    in_chunks(ranges.append, 600, "all", lambda *said: told.append(said))
    assert ranges == [range(250), range(250, 500), range(500, 600)]
    assert told == [("all", 250, 600), ("all", 500, 600), ("all", 600, 600)]


def test_a_folder_gives_sorted_classes_and_its_images(folder: Path) -> None:
    dataset = load_dataset(f"folder:{folder}")
    assert dataset.class_names == ("cat", "dog")
    assert dataset.image_shape == (6, 5, 3)
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 100, 101, 102]
    assert dataset.test is not None
    assert dataset.test.labels.tolist() == [1]
    assert abs(dataset.test.images.astype(int) - 180).max() <= 2  # JPEG
    assert (dataset.flip, dataset.val) == (True, None)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_a_folder_val_is_the_validation_split_whatever_the_fraction(
    folder: Path, fraction: float
) -> None:
    save_image(folder / "val" / "cat" / "v.jpg", np.full((6, 5, 3), 7, np.uint8))
    dataset = load_dataset(f"folder:{folder}", val_fraction=fraction)
    assert dataset.val is not None
    assert dataset.val.labels.tolist() == [0]
    assert (len(dataset.train), dataset.own_val) == (6, True)


def test_greyscale_folders_keep_one_channel_and_mixed_ones_become_rgb(tmp_path: Path) -> None:
    grey, colour = np.full((4, 4), 60, np.uint8), np.full((4, 4, 3), 90, np.uint8)
    save_image(tmp_path / "grey" / "train" / "a" / "0.png", grey)
    save_image(tmp_path / "grey" / "test" / "a" / "0.png", colour)  # train decides
    dataset = load_dataset(f"folder:{tmp_path / 'grey'}")
    assert dataset.image_shape == (4, 4, 1)
    assert dataset.test is not None
    assert (dataset.test.images == 90).all()

    save_image(tmp_path / "mixed" / "train" / "a" / "0.png", grey)
    save_image(tmp_path / "mixed" / "train" / "a" / "1.png", colour)
    mixed = load_dataset(f"folder:{tmp_path / 'mixed'}").train.images
    assert mixed.shape == (2, 4, 4, 3)
    assert mixed[:, 0, 0].tolist() == [[60, 60, 60], [90, 90, 90]]


def test_palettes_with_transparency_become_rgb(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((4, 4), np.uint8)).convert("P")
    image.putpalette([10, 20, 30] * 256)
    path = tmp_path / "train" / "a" / "0.png"
    path.parent.mkdir(parents=True)
    image.save(path, transparency=bytes([255, 0] * 128))
    dataset = load_dataset(f"folder:{tmp_path}")
    assert (dataset.train.images == [10, 20, 30]).all()


def test_differing_sizes_need_and_accept_an_image_size(folder: Path) -> None:
    save_image(folder / "train" / "dog" / "9.png", np.full((9, 8, 3), 33, np.uint8))
    with pytest.raises(InputError) as caught:
        load_dataset(f"folder:{folder}")
    assert_input_error(caught.value, "data", "9.png", "8x9", "5x6", "image_size resizes")
    dataset = load_dataset(f"folder:{folder}", image_size=4)
    assert dataset.image_shape == (4, 4, 3)
    assert (dataset.train.images[-1] == 33).all()


def without_classes(folder: Path) -> None:
    for name in ("cat", "dog"):
        shutil.rmtree(folder / "train" / name)


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda f: shutil.rmtree(f), "train"),
        (lambda f: (f / "train").replace(f / "learning"), "train"),
        (without_classes, "one folder of images per class"),
        (lambda f: (f / "train" / "eel").mkdir(), "eel"),
        (lambda f: (f / "test" / "dog").rename(f / "test" / "wolf"), "wolf"),
        (lambda f: (f / "train" / "cat" / "1.PNG").write_bytes(b"no image"), "1.PNG"),
        (lambda f: (f / "test" / "dog" / "a.jpeg").write_bytes(b""), "a.jpeg"),
        (lambda f: damage(f / "train" / "dog" / "2.Png"), "2.Png"),
    ],
)
def test_a_bad_folder_is_answered_with_the_path(
    folder: Path, spoil: Callable[[Path], object], part: str
) -> None:
    spoil(folder)
    with pytest.raises(InputError) as caught:
        load_dataset(f"folder:{folder}")
    assert_input_error(caught.value, "data", str(folder), part)


def test_images_of_16_bits_are_refused_rather_than_clipped(tmp_path: Path) -> None:
    save_image(tmp_path / "train" / "a" / "0.png", np.full((4, 4), 40000, np.uint16))
    with pytest.raises(InputError) as caught:
        load_dataset(f"folder:{tmp_path}")
    assert_input_error(caught.value, "data", "0.png", "8 bits")


def test_without_test_a_folder_test_is_not_opened(folder: Path) -> None:
    expected = load_dataset(f"folder:{folder}")
    (folder / "test" / "dog" / "a.jpeg").write_bytes(b"broken")
    (folder / "test" / "wolf").mkdir()
    dataset = load_dataset(f"folder:{folder}", with_test=False)
    assert dataset.test is None
    assert_same_split(dataset.train, expected.train)


# --- Tiny-ImageNet


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The original layout with two classes, 2 + 1 training and 2 val images; one is greyscale."""
    root = tmp_path / "data" / "tiny-imagenet-200"
    root.mkdir(parents=True)
    (root / "wnids.txt").write_text("n2\nn1\n")
    (root / "words.txt").write_text("n0\tbee\nn1\tgoldfish, Carassius auratus\nn2\tlion\n")
    best: dict[str, Any] = {"quality": 100, "subsampling": 0}
    for wnid, i, pixels in [
        ("n1", 0, np.full((64, 64, 3), (200, 30, 30), np.uint8)),
        ("n1", 1, np.full((64, 64), 77, np.uint8)),
        ("n2", 0, np.full((64, 64, 3), (30, 30, 200), np.uint8)),
    ]:
        save_image(root / f"train/{wnid}/images/{wnid}_{i}.JPEG", pixels, **best)
        (root / f"train/{wnid}/{wnid}_boxes.txt").write_text("")
    for i in range(2):
        save_image(root / f"val/images/val_{i}.JPEG", np.full((64, 64, 3), 50 * i, np.uint8))
    (root / "val/val_annotations.txt").write_text(
        "val_1.JPEG\tn1\t0\t0\t9\t9\nval_0.JPEG\tn2\t0\t0\t9\t9\n"
    )
    return root


@pytest.mark.parametrize("above", [False, True])
def test_tiny_imagenet_is_read_from_its_folder_or_the_one_above(tiny: Path, above: bool) -> None:
    dataset = load_dataset("tiny_imagenet", tiny.parent if above else tiny)
    assert dataset.class_names == ("lion", "goldfish")  # in the order of wnids.txt
    assert dataset.image_shape == (64, 64, 3)
    assert dataset.train.labels.tolist() == [0, 1, 1]
    centre = dataset.train.images[:, 32, 32].astype(int)
    assert abs(centre - [[30, 30, 200], [200, 30, 30], [77, 77, 77]]).max() <= 3
    assert dataset.val is None
    assert dataset.test is not None
    assert dataset.test.labels.tolist() == [1, 0]
    assert dataset.test.images[:, 0, 0, 0].tolist() == [50, 0]


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda t: (t / "words.txt").unlink(), "words.txt"),
        (lambda t: (t / "wnids.txt").write_text("\n"), "wnids.txt"),
        (lambda t: shutil.rmtree(t / "train" / "n1"), "n1"),
        (lambda t: (t / "val" / "val_annotations.txt").unlink(), "val_annotations.txt"),
        (lambda t: (t / "val" / "val_annotations.txt").write_text("a.JPEG\tn9\n"), "n9"),
        (lambda t: (t / "val" / "images" / "val_0.JPEG").unlink(), "val_0.JPEG"),
    ],
)
def test_an_incomplete_tiny_imagenet_is_answered_with_the_path(
    tiny: Path, spoil: Callable[[Path], object], part: str
) -> None:
    spoil(tiny)
    with pytest.raises(InputError) as caught:
        load_dataset("tiny_imagenet", tiny)
    assert_input_error(caught.value, "data_dir", str(tiny), part)


def test_without_test_tiny_imagenet_val_is_not_opened(tiny: Path) -> None:
    shutil.rmtree(tiny / "val" / "images")
    (tiny / "val" / "val_annotations.txt").write_bytes(b"\xff\xfe")
    dataset = load_dataset("tiny_imagenet", tiny, with_test=False)
    assert (len(dataset.train), dataset.test) == (3, None)


def test_index_files_may_be_written_by_windows(tiny: Path) -> None:
    expected = load_dataset("tiny_imagenet", tiny)
    for name in ("wnids.txt", "words.txt", "val/val_annotations.txt"):
        lines = (tiny / name).read_text().splitlines()
        (tiny / name).write_bytes(b"\xef\xbb\xbf" + " \r\n".join(lines).encode())
    dataset = load_dataset("tiny_imagenet", tiny)
    assert dataset.class_names == ("lion", "goldfish")
    assert_same_split(dataset.train, expected.train)
    assert_same_split(dataset.test, expected.test)


def sparse(path: Path) -> None:
    os.truncate(path, 2**32)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("spoil", [sparse, pipe])
@pytest.mark.parametrize("name", ["wnids.txt", "words.txt", "val/val_annotations.txt"])
def test_index_files_that_would_not_end_are_refused(
    tiny: Path, name: str, spoil: Callable[[Path], None]
) -> None:
    spoil(tiny / name)
    with pytest.raises(InputError) as caught:
        load_dataset("tiny_imagenet", tiny)
    assert_input_error(caught.value, "data_dir", str(tiny))


def test_a_class_that_is_listed_twice_is_refused(tiny: Path) -> None:
    (tiny / "wnids.txt").write_text("n2\nn1\nn2\n")
    with pytest.raises(InputError) as caught:
        load_dataset("tiny_imagenet", tiny)
    assert_input_error(caught.value, "data_dir", "wnids.txt: n2 twice", "each class once")


def test_all_of_a_class_is_used_and_what_is_left_over_is_told(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = np.full((64, 64, 3), 9, np.uint8)
    save_image(tiny / "train/n1/images/more/1.webp", pixels)
    save_image(tiny / "val/images/new.png", pixels)
    dataset = load_dataset("tiny_imagenet", tiny)
    assert dataset.test is not None
    assert dataset.train.labels.tolist() == [0, 1, 1, 1]
    assert len(dataset.test) == 2
    (record,) = caplog.records
    assert record.getMessage().endswith("val_annotations.txt does not speak of 1 file, new.png")
    (tiny / "train/n2/images/0.heic").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        load_dataset("tiny_imagenet", tiny)
    assert_input_error(caught.value, "data_dir", "n2/images: 1 file, 0.heic")


# --- the cache, seen through Tiny-ImageNet


def test_a_second_load_does_not_decode_again(tiny: Path, cache_dir: Path) -> None:
    first = load_dataset("tiny_imagenet", tiny)
    damage(tiny / "train/n1/images/n1_0.JPEG")  # unnoticed, as the cache is read
    second = load_dataset("tiny_imagenet", tiny)
    assert_same_split(first.train, second.train)
    assert_same_split(first.test, second.test)
    shutil.rmtree(cache_dir)
    with pytest.raises(InputError, match=r"n1_0\.JPEG"):
        load_dataset("tiny_imagenet", tiny)


def test_a_changed_source_is_decoded_again(tiny: Path) -> None:
    first = load_dataset("tiny_imagenet", tiny)
    save_image(tiny / "train/n2/images/n2_0.JPEG", np.full((64, 64, 3), 9, np.uint8))
    second = load_dataset("tiny_imagenet", tiny)
    assert (first.train.images[0] != second.train.images[0]).any()
    (tiny / "val/val_annotations.txt").write_text("val_1.JPEG\tn2\nval_0.JPEG\tn1\n")
    third = load_dataset("tiny_imagenet", tiny)
    assert third.test is not None
    assert third.test.labels.tolist() == [0, 1]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [truncate, flip_bit])
def test_a_damaged_cache_is_rebuilt(
    tiny: Path, cache_dir: Path, spoil: Callable[[Path], None]
) -> None:
    first = load_dataset("tiny_imagenet", tiny)
    good = {path: path.read_bytes() for path in cache_dir.iterdir()}
    assert len(good) == 2
    for path in good:
        spoil(path)
    second = load_dataset("tiny_imagenet", tiny)
    assert_same_split(first.train, second.train)
    assert_same_split(first.test, second.test)
    for path in good:
        with np.load(path) as arrays:
            assert len(arrays["images"]) == len(arrays["labels"])
    assert set(cache_dir.iterdir()) == set(good)  # no temporary files


def test_a_cache_that_cannot_be_written_costs_only_the_caching(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    dataset = load_dataset("tiny_imagenet", tiny, cache_dir=tmp_path / "file" / "cache")
    assert len(dataset.train) == 3
    assert "cannot be written" in caplog.text


def test_the_cache_folder_is_the_argument_the_environment_or_the_users(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder(tmp_path) == tmp_path
    assert cache_folder() == cache_dir
    monkeypatch.delenv("KTG_CACHE_DIR")
    assert "ktg_jax" in cache_folder().parts


# --- tensorflow-datasets


CIFAR = {"train": random_images(300, 32, 32, 3), "test": random_images(20, 32, 32, 3, seed=1)}


@pytest.fixture(scope="module")
def prepared_cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CIFAR-10 of 300 + 20 random images; labels 0, 1, ... 9, 0, ..."""
    root = tmp_path_factory.mktemp("cifar")
    splits = {
        split: ((encoded(image), i % 10) for i, image in enumerate(images))
        for split, images in CIFAR.items()
    }
    write_data_set(root, "cifar10", splits, 10, (32, 32, 3), version="3.0.2")
    return root


@pytest.fixture
def cifar(prepared_cifar: Path, tmp_path: Path) -> Path:
    """A copy that a test can damage."""
    shutil.copytree(prepared_cifar, tmp_path / "tfds")
    return tmp_path / "tfds"


def cifar_file(root: Path, split: str) -> Path:
    return root / "cifar10" / "3.0.2" / f"cifar10-{split}.array_record-00000-of-00001"


def test_cifar_is_read_without_tensorflow(cifar: Path, cache_dir: Path) -> None:
    dataset = load_dataset("cifar10", cifar)
    np.testing.assert_array_equal(dataset.train.images, CIFAR["train"])
    assert dataset.train.labels.tolist() == [i % 10 for i in range(300)]
    assert dataset.test is not None
    np.testing.assert_array_equal(dataset.test.images, CIFAR["test"])
    assert dataset.class_names == tuple(f"class {i}" for i in range(10))
    assert dataset.flip

    damage(cifar_file(cifar, "train"))  # unnoticed, as the cache is read
    assert_same_split(load_dataset("cifar10", cifar).train, dataset.train)
    shutil.rmtree(cache_dir)
    with pytest.raises(InputError) as caught:
        load_dataset("cifar10", cifar)
    assert_input_error(caught.value, "data_dir", str(cifar_file(cifar, "train")), "undamaged")


@pytest.mark.parametrize("kind", ["truncated", "empty", "missing"])
def test_incomplete_records_are_answered_with_the_file(cifar: Path, kind: str) -> None:
    file = cifar_file(cifar, "test")
    if kind == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 40_000 if kind == "truncated" else 0])
    with pytest.raises(InputError) as caught:
        load_dataset("cifar10", cifar)
    assert_input_error(caught.value, "data_dir", str(file))
    assert load_dataset("cifar10", cifar, with_test=False).test is None  # never opened


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("by", ["argument", "default"])
def test_data_that_is_not_prepared_is_answered_with_the_command(
    tmp_path: Path, name: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "default":
        import tensorflow_datasets.core.constants as tfds_constants

        monkeypatch.setattr(tfds_constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(InputError) as caught:
        load_dataset(name, tmp_path if by == "argument" else None)
    assert_input_error(
        caught.value,
        "data_dir",
        f"{name}/3.0.2",
        'pip install "ktg_jax[prepare]"',
        f"tfds.builder('{name}', data_dir='{tmp_path}', file_format='array_record')",
        "download_and_prepare()",
    )


def test_a_damaged_description_is_an_input_error(cifar: Path) -> None:
    (cifar / "cifar10" / "3.0.2" / "dataset_info.json").write_text("{")
    with pytest.raises(InputError) as caught:
        load_dataset("cifar10", cifar)
    assert_input_error(caught.value, "data_dir", str(cifar))


# --- the real data sets


@needs_real_data
def test_real_cifar10_has_the_known_labels_and_statistics() -> None:
    builder = tfds.open_builder("cifar10", REAL_DATA)
    first = tfds.decode_examples(builder, "train", range(5))
    assert first.labels[0] == 7
    sample = tfds.decode_examples(builder, "train", range(0, 50_000, 250))
    assert sample.images.shape == (200, 32, 32, 3)
    means = sample.images.mean((0, 1, 2)) / 255
    np.testing.assert_allclose(means, [0.49140, 0.48216, 0.44653], atol=0.03)
    deviations = sample.images.std((0, 1, 2)) / 255
    np.testing.assert_allclose(deviations, [0.24703, 0.24349, 0.26159], atol=0.02)
    assert set(sample.labels) == set(range(10))


@needs_real_data
def test_real_tiny_imagenet_is_read_completely() -> None:
    dataset = load_dataset("tiny_imagenet", REAL_DATA, val_fraction=0.1)
    assert dataset.image_shape == (64, 64, 3)
    assert {"goldfish", "koala", "pizza"} <= set(dataset.class_names)
    splits = (dataset.train, dataset.val, dataset.test)
    shares = [np.bincount(split.labels) / len(split) for split in splits if split is not None]
    np.testing.assert_allclose(shares, np.full((3, dataset.num_classes), 1 / dataset.num_classes))
    grey = (dataset.train.images.min(-1) == dataset.train.images.max(-1)).all((1, 2))
    assert grey.any()
    assert not grey.all()
