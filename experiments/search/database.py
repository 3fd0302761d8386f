"""Databases of studies: their URLs, which hide passwords, and what goes wrong with them."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ktg_jax.errors import InputError

from .extra import optuna  # first: where it is missing, so is SQLAlchemy

# isort: split
import sqlalchemy as sa
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

POSTGRESQL = "postgresql+psycopg"
ALLOWED = f"sqlite:///FILE or {POSTGRESQL}://USER[:PASSWORD]@HOST[:PORT]/DATABASE"

# Seconds. A server that is gone without a word is noticed after 30 + 3 * 10.
_SQLITE_OPTIONS = {"timeout": 60}
_POSTGRESQL_OPTIONS = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
}


def sqlite_url(path: str | os.PathLike[str]) -> str:
    """The URL of a SQLite file, whatever its name; a relative path stays relative.

    >>> sqlite_url("runs/search/study.db")
    'sqlite:///runs/search/study.db'
    """
    return URL.create("sqlite", database=os.fspath(path)).render_as_string()


def sqlite_file(url: str) -> Path | None:
    """The SQLite file of a storage; None: it is in another database.

    Raises:
        InputError: it is no URL of a storage.
    """
    parsed = url_parts(url)
    return Path(str(parsed.database)) if parsed.drivername == "sqlite" else None


def absolute(url: str) -> str:
    """The URL as it is in every folder: a SQLite file by its absolute path.

    Raises:
        InputError: it is no URL of a storage.
    """
    file = sqlite_file(url)
    if file is None:
        return url
    return url_parts(url).set(database=os.path.abspath(file)).render_as_string()


def hidden(url: str) -> str:
    """The URL as it may be shown: with `***` for its password.

    >>> hidden("postgresql+psycopg://me:secret@db:5432/studies")
    'postgresql+psycopg://me:***@db:5432/studies'
    """
    try:
        parsed = sa.make_url(url).difference_update_query(["password"])
    except (ArgumentError, ValueError):
        return re.sub("//.*@", "//***@", str(url))
    return parsed.render_as_string(hide_password=True)


def without_password(url: str) -> str:
    """The URL as it may be kept in a file; the password is then `PGPASSWORD`, or in `~/.pgpass`.

    >>> without_password("postgresql+psycopg://me:secret@db:5432/studies")
    'postgresql+psycopg://me@db:5432/studies'

    Raises:
        InputError: it is no URL of a storage.
    """
    parsed = url_parts(url).difference_update_query(["password"])
    return URL.create(
        parsed.drivername,
        parsed.username,
        host=parsed.host,
        port=parsed.port,
        database=parsed.database,
        query=parsed.query,
    ).render_as_string(hide_password=False)


def url_parts(url: str) -> URL:
    """The parts of a storage's URL.

    Raises:
        InputError: it is the URL of something else.
    """
    try:
        parsed = sa.make_url(url)
    except (ArgumentError, ValueError):
        raise InputError("storage", hidden(url), ALLOWED) from None
    database = parsed.database or ""
    in_file = database not in ("", ":memory:") and not database.startswith("file:")
    if not {"sqlite": in_file, POSTGRESQL: bool(database)}.get(parsed.drivername, False):
        raise InputError("storage", hidden(url), ALLOWED)
    if parsed.drivername == "sqlite":
        try:
            parsed.get_dialect()().create_connect_args(parsed)
        except (TypeError, ValueError) as error:  # PostgreSQL's driver says it when it connects
            allowed = f"{ALLOWED}, with options of SQLite ({_one_line(error)})"
            raise InputError("storage", hidden(url), allowed) from None
    return parsed


def reading_url(url: URL) -> str:
    """The URL by which a database is only read: a SQLite file without any journal or lock file."""
    if url.drivername != "sqlite":
        return url.render_as_string(hide_password=False)
    file = quote(os.path.abspath(str(url.database)))
    query = {**url.query, "mode": "ro", "uri": "true"}
    return URL.create("sqlite", database=f"file:{file}", query=query).render_as_string()


def driver_options(url: URL) -> dict[str, Any]:
    """What the database's driver is told, except what the URL says itself."""
    options = _SQLITE_OPTIONS if url.drivername == "sqlite" else _POSTGRESQL_OPTIONS
    return {name: value for name, value in options.items() if name not in url.query}


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turns what goes wrong with a database into one line that does not tell its password."""
    try:
        with explained_outage(url):
            yield
    except ImportError:
        raise InputError(
            "storage", hidden(url), 'with the extra: pip install "ktg_jax[postgresql]"'
        ) from None
    except OSError as error:
        raise _unusable(url, error) from None
    except RuntimeError as error:  # tables of another version
        allowed = f"a database of this Optuna ({_one_line(error)})"
        raise InputError("storage", hidden(url), allowed) from None


@contextmanager
def explained_outage(url: str) -> Iterator[None]:
    """The same for what goes wrong with a database that was opened; leaves other errors alone."""
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, SQLAlchemyError) else error
        raise _unusable(url, cause.orig if isinstance(cause, DBAPIError) else cause) from None


def _unusable(url: str, reason: object) -> InputError:
    allowed = f"a database that can be reached, read and written ({_one_line(reason)})"
    return InputError("storage", hidden(url), allowed)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
