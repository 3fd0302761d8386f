"""The errors that a user of the library or the experiments can meet on purpose."""

import difflib
import math
import re
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_MOST_CHARACTERS = 1000
"""The most characters of a value that a message shows."""

_MOST_OF_OTHERS = 400
"""The most characters of an error that others raised which a message shows."""


class InputError(ValueError):
    """Bad input. One line that names the field, the value and what is allowed.

    A large value is shown in part.

    >>> str(InputError("temperature", 0.0, "a finite number above 0"))
    'temperature: got 0.0; allowed: a finite number above 0'
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{field}: got {shown(value)}; allowed: {allowed}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes it is the same error."""
        return type(self), (self.field, self.value, self.allowed)


class RunError(RuntimeError):
    """A run with good input that could not go on. One line: what, where, and what was kept.

    >>> raise RunError("step 3, node resnet8-0: loss not finite (nan)")
    Traceback (most recent call last):
    ktg_jax.errors.RunError: step 3, node resnet8-0: loss not finite (nan)
    """


class DivergedError(RunError):
    """A run whose loss or parameters are no longer finite."""


@contextmanager
def part_of(field: str) -> Iterator[None]:
    """An InputError that is raised within it says which field of the whole it is about.

    >>> with part_of("nodes[1].model"):
    ...     raise InputError("model", "resnet9", "resnet8")
    Traceback (most recent call last):
    ktg_jax.errors.InputError: nodes[1].model: got 'resnet9'; allowed: resnet8
    """
    try:
        yield
    except InputError as error:
        is_that = field.rpartition(".")[2] == error.field
        name = field if is_that else f"{field}: {error.field}"
        raise InputError(name, error.value, error.allowed) from None


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the known one that is nearest, if any is near.

    >>> did_you_mean("gate", ["gates", "nodes"]), did_you_mean("x", ["gates", "nodes"])
    ("; did you mean 'gates'?", '')
    """
    if not isinstance(word, str) or len(word) > _MOST_CHARACTERS:
        return ""
    nearest = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


class _Shown(reprlib.Repr):
    """`repr`, but of long values only a part, and of integers of thousands of digits their size."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 20
        self.maxstring = self.maxother = 500

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write out integers of more than 4,300 digits."""
        digits = round(x.bit_length() * math.log10(2))
        return repr(x) if digits <= self.maxother else f"an integer of about {digits:,} digits"


def shown(value: object) -> str:
    """A value for a message: in one line, and in one piece if it is short.

    >>> shown([1, "two"]), shown(-(10**5000))
    ("[1, 'two']", 'an integer of about 5,000 digits')
    """
    text = re.sub(r"\s*\n\s*", " ", _Shown().repr(value))  # strings' own are escaped
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:half]}...{text[-half:]}"


def in_a_line(error: BaseException) -> str:
    """What others raised, in a line: its type, and the first line of its text.

    >>> in_a_line(TypeError("no such argument"))
    'TypeError: no such argument'
    """
    text = next(iter(str(error).strip().splitlines()), "")[:_MOST_OF_OTHERS]
    return text if isinstance(error, InputError | RunError) else f"{type(error).__name__}: {text}"
