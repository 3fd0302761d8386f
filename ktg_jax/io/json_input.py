"""JSON from outside: decoded within bounds, and its fields checked."""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ktg_jax.errors import InputError, did_you_mean, shown

MOST_CHARACTERS = 10_000_000
"""The most characters of a text that is decoded."""

_LONGEST_KEY = 60


def read(field: str, path: str | os.PathLike[str]) -> str:
    """The text of a JSON file, UTF-8 with or without a byte order mark, to be decoded.

    Raises:
        InputError: no such file, no regular one, too large, or no text.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise OSError("not a regular file")
        with open(path, encoding="utf-8-sig") as file:
            return file.read(MOST_CHARACTERS + 1)
    except (OSError, ValueError) as error:  # a path or a content that is no text
        reason = getattr(error, "strerror", None) or error
        raise InputError(field, str(path), f"a readable JSON file ({reason})") from None


def decoded(field: str, text: str) -> Any:
    """What a JSON text says.

    Args:
        field: that an error is of.
        text: at most `MOST_CHARACTERS` long.

    Raises:
        InputError: a text that is too long or no JSON, too deeply nested, with an integer of
            thousands of digits, or with a key twice in one object.

    >>> decoded("graph", '{"nodes": []}')
    {'nodes': []}
    """
    if len(text) > MOST_CHARACTERS:
        raise InputError(field, text, f"JSON of at most {MOST_CHARACTERS:,} characters")

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise InputError(f"{field}.{_name(key)}", value, "each field once in an object")
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=fields)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # not JSON, or an integer that is too long
        start = text if len(text) <= 40 else text[:40] + "..."
        raise InputError(field, start, f"JSON ({str(error).partition(';')[0]})") from None


def check_fields(
    where: str, fields: Any, required: Collection[str], optional: Collection[str]
) -> None:
    """Checks that an object has the fields that it must have, and no unknown ones.

    Raises:
        InputError: no object, an unknown field, or, if there is none, one that is missing.

    >>> check_fields("graph", {"nodes": [], "gate": []}, {"nodes", "gates"}, ())
    Traceback (most recent call last):
    ktg_jax.errors.InputError: graph.gate: got []; allowed: an object with gates, nodes; \
did you mean 'gates'?
    """
    known = sorted({*required, *optional})
    beside = f" (and {', '.join(sorted(optional))})" if optional else ""
    allowed = f"an object with {', '.join(sorted(required))}{beside}"
    if not isinstance(fields, Mapping):
        raise InputError(where, fields, allowed)
    for field in fields:
        if field not in known:
            meant = did_you_mean(field, known)
            raise InputError(f"{where}.{_name(field)}", fields[field], allowed + meant)
    for field in sorted(required):
        if field not in fields:
            raise InputError(f"{where}.{field}", None, f"{allowed}; {field} is missing")


def _name(key: Any) -> str:
    """A key as part of a field's name."""
    is_plain = isinstance(key, str) and len(key) <= _LONGEST_KEY and key.isprintable()
    return key if is_plain else shown(key)[: 2 * _LONGEST_KEY]
