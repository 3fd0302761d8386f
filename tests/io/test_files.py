"""Files that are either whole or not there."""

from pathlib import Path

import pytest

from ktg_jax.io.files import atomic_path, write_text


def test_a_file_appears_when_the_block_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_file_is_beside_the_other_and_keeps_its_suffix(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "picture.png") as temporary:
        temporary.touch()
    assert temporary.parent == tmp_path
    assert temporary.suffix == ".png"
    assert temporary.name != "picture.png"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_block_leaves_the_former_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("former")

    def write_half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("hal")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    path.write_text("former")
    with pytest.raises(FileNotFoundError), atomic_path(path):
        pass
    assert path.read_text() == "former"


def test_text_is_replaced_as_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    write_text(path, "long former text")
    write_text(str(path), "Zürich\n")
    assert path.read_bytes() == b"Z\xc3\xbcrich\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "missing" / "words.txt", "words")
    assert list(tmp_path.iterdir()) == []
