"""Numbers from outside: what is one, and in which range."""

import sys
from numbers import Real
from typing import Any

from ktg_jax.errors import InputError


def is_number(value: Any) -> bool:
    """Whether it is a real number, of Python or of NumPy; a bool is none.

    >>> is_number(1.5), is_number(True), is_number("1")
    (True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: Any, least: int = 0) -> bool:
    """Whether it is an integer, no bool, of at least so much.

    >>> is_whole(1), is_whole(1.0), is_whole(0, least=1)
    (True, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_positive(field: str, value: Any) -> None:
    """Raises InputError unless it is a finite number above 0."""
    if not is_number(value) or not 0 < value <= sys.float_info.max:
        raise InputError(field, value, "a finite number above 0")


def check_not_negative(field: str, value: Any) -> None:
    """Raises InputError unless it is a finite number of at least 0."""
    if not is_number(value) or not 0 <= value <= sys.float_info.max:
        raise InputError(field, value, "a finite number of at least 0")


def check_share(field: str, value: Any) -> None:
    """Raises InputError unless it is a number from 0 to 1."""
    if not is_number(value) or not 0 <= float(value) <= 1:
        raise InputError(field, value, "a number from 0 to 1")
