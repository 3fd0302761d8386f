"""The URLs of studies' databases: what is refused, what they hide, and which file they mean."""

from pathlib import Path

import pytest
import sqlalchemy as sa

from experiments.search.database import absolute, hidden, sqlite_url, without_password
from experiments.search.storage import Turn, open_storage
from ktg_jax import InputError


@pytest.mark.parametrize(
    "bad",
    [
        *("", "studies.db", "sqlite://", "sqlite:///:memory:", "sqlite:///file:a?uri=true"),
        *("mysql://me:secret@db/studies", "postgresql://me:secret@db/studies"),
        *("postgresql+psycopg2://me:secret@db/studies", "postgresql+psycopg://me:secret@db"),
        *("postgresql+psycopg://me:secret@db:port/studies", "redis://:secret@db"),
    ],
)
def test_other_storages_are_refused(bad: str) -> None:
    refused(bad)


def refused(url: str, reason: str = "") -> None:
    """Every use of the URL ends with one line, which tells no password."""
    for use in (
        lambda: open_storage(url),
        lambda: Turn(url, "s"),
        lambda: without_password(url),
    ):
        with pytest.raises(
            InputError, match=r"^storage: got .*; allowed: sqlite:///FILE or "
        ) as info:
            use()
        assert reason in str(info.value)
        assert "secret" not in str(info.value)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("timeout=abc", "could not convert string to float: 'abc'"),
        ("check_same_thread=maybe", "not true/false: 'maybe'"),
        ("timeout=1&timeout=2", "not 'tuple'"),
    ],
)
def test_bad_options_of_sqlite_are_refused(option: str, reason: str, tmp_path: Path) -> None:
    refused(f"sqlite:///{tmp_path}/studies.db?{option}", reason)
    assert list(tmp_path.iterdir()) == []


SPECIAL = sa.URL.create(
    "postgresql+psycopg",
    *("m@e:/", "se/cr@et:?#%", "db.example.org", 5433, "my studies"),
    {"sslmode": "require", "password": "other"},
)


def test_passwords_are_hidden_and_left_out() -> None:
    url = SPECIAL.render_as_string(hide_password=False)
    shown = sa.make_url(hidden(url))
    kept = sa.make_url(without_password(url))
    assert (shown.password, kept.password) == ("***", None)
    for found in (shown, kept):
        assert found.query == {"sslmode": "require"}
        assert found.username == "m@e:/"
        assert (found.host, found.port, found.database) == ("db.example.org", 5433, "my studies")
        assert not any(secret in str(found) for secret in ("cr", "et%3A", "other"))


def test_any_file_name_makes_a_url(tmp_path: Path) -> None:
    folder = tmp_path / "50%25 of {a}?b=c#d"
    folder.mkdir()
    url = sqlite_url(folder / "studies.db")
    assert hidden(url) == without_password(url) == url
    open_storage(url)
    assert {file.name for file in folder.iterdir()} == {"studies.db", "studies.db.lock"}


def test_a_file_is_the_same_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a%b").mkdir()
    monkeypatch.chdir(tmp_path / "a%b")
    url = absolute("sqlite:///../studies.db?timeout=5")
    monkeypatch.chdir("/")
    assert url == absolute(url) == f"sqlite:///{tmp_path}/studies.db?timeout=5"
    open_storage(url)
    assert (tmp_path / "studies.db").is_file()
    elsewhere = SPECIAL.render_as_string(hide_password=False)
    assert absolute(elsewhere) == elsewhere


def test_what_is_no_url_is_hidden_too() -> None:
    assert (
        hidden("postgresql+psycopg://me:se@cret@db:port/x") == "postgresql+psycopg://***@db:port/x"
    )
