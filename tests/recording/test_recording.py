"""Recordings on disk: what comes back, what is resumed, and what damage does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktg_jax import InputError
from ktg_jax.errors import RunError
from ktg_jax.recording import Header, Recording, RecordingWriter
from ktg_jax.recording import header as header_module
from ktg_jax.recording.code import decoded, encoded

RNG = np.random.default_rng(0)
OF = {"images": 20, "image_shape": [8, 8, 1], "train_crc32": 7, "batch_size": 4}


def header(**changes: Any) -> Header:
    fields: dict[str, Any] = {"kind": "batches", "of": OF, "rows": 10, "classes": 5}
    return Header(**fields | {"dtype": "float32"} | changes)


def logits_of(rows: int) -> np.ndarray:
    return RNG.standard_normal((rows, 4, 5)).astype(np.float32)


def write(folder: Path, logits: np.ndarray, told: Header) -> Recording:
    with RecordingWriter(folder, told) as writer:
        for row in logits:
            writer.add(row)
    return Recording(folder)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows a file."""
    monkeypatch.setattr(header_module, "_SHARD_BYTES", 3 * 4 * 5 * 4)


# --- what comes back


@pytest.mark.usefixtures("small_shards")
def test_rows_come_back_over_the_borders_of_files(tmp_path: Path) -> None:
    logits = logits_of(10)
    recording = write(tmp_path / "new", logits, header())
    assert len(list((tmp_path / "new").glob("shard-*"))) == 4
    for first, count in ((0, 10), (2, 3), (9, 1)):
        np.testing.assert_array_equal(recording.rows(first, count), logits[first : first + count])


def test_float16_is_the_nearest_number(tmp_path: Path) -> None:
    logits = logits_of(2)
    recording = write(tmp_path / "new", logits, header(rows=2, dtype="float16"))
    assert recording.rows(0, 2).dtype == np.float32
    np.testing.assert_allclose(recording.rows(0, 2), logits, rtol=2.0**-11)


def test_of_the_largest_the_probabilities_are_kept_and_the_rest_share_theirs() -> None:
    told = header(top=2, rows=1)
    logits = np.log(np.array([[0.1, 0.4, 0.05, 0.25, 0.2]], np.float32)) + 3
    found = np.exp(decoded(told, encoded(told, logits)))
    np.testing.assert_allclose(found, [[0.35 / 3, 0.4, 0.35 / 3, 0.25, 0.35 / 3]], rtol=1e-6)


def test_excluded_classes_stay_excluded() -> None:
    logits = np.array([[0.0, -np.inf, 1.0, -np.inf, -np.inf]], np.float32)
    for told in (header(), header(dtype="float16")):
        np.testing.assert_array_equal(decoded(told, encoded(told, logits)), logits)
    told = header(top=3)
    assert np.exp(decoded(told, encoded(told, logits)))[0, [1, 3, 4]].tolist() == [0, 0, 0]


def test_bytes_are_those_on_disk(tmp_path: Path) -> None:
    for told in (header(rows=400), header(rows=400, dtype="float16", top=2)):
        folder = tmp_path / told.dtype
        write(folder, logits_of(400), told)
        on_disk = sum(path.stat().st_size for path in folder.glob("shard-*"))
        assert told.bytes <= on_disk <= told.bytes + 1000


def test_of_images_some_are_added_at_a_time(tmp_path: Path) -> None:
    logits = logits_of(5)[:, 0]
    told = header(kind="images", rows=5, of={"images": 5})
    with RecordingWriter(tmp_path / "new", told) as writer:
        writer.add(logits[:3])
        writer.add(logits[3:])
    recording = Recording(tmp_path / "new")
    assert recording.is_static
    np.testing.assert_array_equal(recording.rows(0, 5), logits)


# --- resumed


@pytest.mark.usefixtures("small_shards")
def test_an_interrupted_recording_goes_on_after_its_last_whole_file(tmp_path: Path) -> None:
    logits, folder = logits_of(10), tmp_path / "new"

    def interrupted() -> None:
        with RecordingWriter(folder, header()) as writer:
            for row in logits[:8]:
                writer.add(row)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(InputError, match=r"outputs: .*complete recording"):
        Recording(folder)
    truncated = folder / "shard-00001.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-4])
    writer = RecordingWriter(folder, header())
    assert (writer.rows, writer.is_complete) == (3, False)
    for row in logits[3:]:
        writer.add(row)
    writer.close()
    np.testing.assert_array_equal(Recording(folder).rows(0, 10), logits)
    assert RecordingWriter(folder, header()).is_complete


def test_another_recording_or_anything_else_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "new", logits_of(10), header())
    before = {path: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    with pytest.raises(InputError, match=r"out: .*differing: rows: 10, now 11"):
        RecordingWriter(tmp_path / "new", header(rows=11))
    assert {path: path.read_bytes() for path in (tmp_path / "new").iterdir()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(InputError, match=r"out: .*a new folder, or an empty one"):
        RecordingWriter(tmp_path / "other", header())
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["mine.txt"]


def test_missing_rows_are_no_recording(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has 9 of 10 rows"):
        write(tmp_path / "new", logits_of(9), header())


# --- bad input


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"kind": "videos"}, "kind"),
        ({"rows": 0}, "rows"),
        ({"classes": 1.5}, "classes"),
        ({"dtype": "float64"}, "dtype"),
        ({"top": 5}, "top"),
        ({"top": 0}, "top"),
        ({"of": {}}, "batch_size"),
    ],
)
def test_a_bad_header_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=rf"^{field}: "):
        header(**changes)


@pytest.mark.parametrize(
    ("logits", "told", "message"),
    [
        (np.zeros((4, 6)), header(), "logits: .*rows of shape"),
        (np.zeros((3, 5)), header(), "logits: .*rows of shape"),
        (np.full((4, 5), np.nan), header(), "logits: .*below infinity"),
        (np.full((4, 5), np.inf), header(), "logits: .*below infinity"),
        (np.full((4, 5), 1e6), header(dtype="float16"), "dtype: .*float32: .*1e.06"),
    ],
)
def test_logits_that_cannot_be_stored_are_refused(
    tmp_path: Path, logits: np.ndarray, told: Header, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        RecordingWriter(tmp_path / "new", told).add(logits)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)


@pytest.mark.usefixtures("small_shards")
def test_damage_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    write(folder, logits_of(10), header())
    last = folder / "shard-00003.safetensors"
    whole = last.read_bytes()
    flip_a_bit(last)
    recording = Recording(folder)
    recording.rows(0, 9)
    with pytest.raises(InputError, match=r"shard-00003.safetensors is damaged"):
        recording.rows(9, 1)
    last.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="outputs: "):
        Recording(folder).rows(9, 1)
    last.unlink()
    with pytest.raises(InputError, match=r"shard-00003.safetensors is missing"):
        Recording(folder)
    (folder / "recording.json").write_text('{"version": 1, "kind": "batches"}')
    with pytest.raises(InputError, match=r"recording.json is damaged"):
        Recording(folder)
    (folder / "recording.json").write_text('{"version": 2}')
    with pytest.raises(InputError, match="of version 1, not 2"):
        Recording(folder)
    with pytest.raises(InputError, match=r"outputs: .*no recording.json there"):
        Recording(tmp_path)


@pytest.mark.parametrize(
    ("of", "classes", "steps", "differing"),
    [
        (OF | {"batch_size": 8}, 5, 10, "batch_size: 4, now 8"),
        (OF | {"train_crc32": 8}, 5, 10, "train_crc32: 7, now 8"),
        (OF, 10, 10, "classes: 5, now 10"),
        (OF, 5, 11, "steps: 10, now 11"),
    ],
)
def test_what_does_not_fit_a_training_is_named(
    tmp_path: Path, of: dict[str, Any], classes: int, steps: int, differing: str
) -> None:
    recording = write(tmp_path / "new", logits_of(10), header())
    recording.check(OF, classes=5, steps=9)  # the first steps of a longer one are the same
    with pytest.raises(InputError, match=rf"differing: {differing}\)"):
        recording.check(of, classes=classes, steps=steps)


def test_a_static_one_fits_any_augmentation(tmp_path: Path) -> None:
    told = header(kind="images", rows=20, of={k: v for k, v in OF.items() if k != "batch_size"})
    with RecordingWriter(tmp_path / "new", told) as writer:
        writer.add(logits_of(20)[:, 0])
    recording = Recording(tmp_path / "new")
    recording.check(OF | {"batch_size": 8, "flip": True}, classes=5, steps=10**6)
    with pytest.raises(InputError, match="images: 20, now 21"):
        recording.check(OF | {"images": 21}, classes=5, steps=1)


def test_rows_that_are_not_there_are_refused(tmp_path: Path) -> None:
    recording = write(tmp_path / "new", logits_of(10), header())
    with pytest.raises(InputError, match=r"rows: got \(9, 10\); allowed: rows 0 to 9"):
        recording.rows(9, 2)
    with pytest.raises(InputError, match="rows: "):
        recording.rows(3, 0)
