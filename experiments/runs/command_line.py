"""From the fields of a dataclass to a command line whose help can be read."""

import dataclasses
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import cleandoc
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

import docstring_parser
import tyro

_WIDTH = 78
_NUMBERS = {int: "N", float: "X"}
_IN_CHECKOUT = "python -m experiments."


@dataclass(frozen=True)
class Command:
    """A command, as its options' class names it in `command`.

    Attributes:
        module: that is run in a checkout, as `experiments.train`.
        groups: the first field of each group of options, by the group's title.
        examples: for the end of the help, as they are called in a checkout; taken as they are.
    """

    module: str
    groups: Mapping[str, str] = field(default_factory=dict)
    examples: str = ""


class Options(Protocol):
    """The options of a command: a dataclass.

    A text below a field says what it is, and where None is its default what happens then; a text
    in its `Annotated` is what stands for its value in the help, in place of N for a whole number,
    X for another, and the last word of the field's name.
    """

    command: ClassVar[Command]


T = TypeVar("T", bound=Options)


def as_called(text: str) -> str:
    """The text, with commands called as one calls them here: `ktg train` where it is installed."""
    is_installed = str(__package__).startswith("ktg_jax.")
    return text.replace(_IN_CHECKOUT, "ktg ") if is_installed else text


def parse(kind: type[T], arguments: Sequence[str] | None = None) -> T:
    """The options of a command line; `--help`, and what is none of them, end the process.

    Args:
        kind: their class.
        arguments: the words of the command line (default: this process's).
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    command = kind.command
    words = _with_values(words, kind)
    try:
        parsed: Any = tyro.cli(
            _grouped(kind, command.groups),
            prog=as_called(f"python -m {command.module}"),
            description=_description(kind),
            args=words,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except SystemExit as ended:
        if not ended.code and {"-h", "--help"} & set(words):
            print(f"\n{as_called(command.examples)}")
        raise
    return kind(**dict(_values(parsed)))


def _with_values(words: Sequence[str], kind: type) -> list[str]:
    """The words, with the value behind each flag that may be left open, as tyro wants it.

    `--augment` and `--no-augment` say it, and where neither is there it is None.
    """
    hints = typing.get_type_hints(kind)
    flags = {
        f"--{'' if value else 'no-'}{each.name.replace('_', '-')}": (each.name, value)
        for each in dataclasses.fields(kind)
        if hints[each.name] == bool | None
        for value in (True, False)
    }
    found: list[str] = []
    for word in words:
        if word in flags:
            name, value = flags[word]
            found += [f"--{name.replace('_', '-')}", str(value)]
        else:
            found.append(word)
    return found


def _grouped(kind: type, groups: Mapping[str, str]) -> type:
    """A dataclass that has one for each group of fields, and the fields before the first group."""
    hints, texts = typing.get_type_hints(kind, include_extras=True), texts_of(kind)
    titles = {first: title for title, first in groups.items()}
    outer: list[Any] = []
    inner: dict[str, list[Any]] = {}
    fields = outer
    for each in dataclasses.fields(kind):
        if each.name in titles:
            fields = inner.setdefault(titles[each.name], [])
        option = _option(each.name, hints[each.name], texts.get(each.name, ""))
        fields.append((each.name, option, field(default=each.default)))
    for title, options in inner.items():
        group = dataclasses.make_dataclass(title, options)
        group.__doc__ = ""
        outer.append((title, group))
    return dataclasses.make_dataclass(kind.__name__, outer, kw_only=True)


def _option(name: str, hint: Any, text: str) -> Any:
    """A field's type with all that tyro is to say of it."""
    said = tyro.conf.arg(metavar=_metavar(name, hint), help=text, help_behavior_hint=_default)
    return Annotated[hint, said]


def _metavar(name: str, hint: Any) -> str | None:
    """What stands for the value in the help; None: its choices do, or there is none.

    >>> _metavar("data_dir", str | None), _metavar("steps", int), _metavar("as_is", bool)
    ('DIR', 'N', None)
    >>> _metavar("models", tuple[str, ...]), _metavar("models", Annotated[tuple[str, ...], "MODEL"])
    ('MODELS ...', 'MODEL ...')
    """
    given = [text for text in getattr(hint, "__metadata__", ()) if isinstance(text, str)]
    hint = hint.__origin__ if typing.get_origin(hint) is Annotated else hint
    if hint == bool | None:
        return ""  # a flag that may be left open
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint, *_ = typing.get_args(hint)
    several = typing.get_origin(hint) is tuple
    element = typing.get_args(hint)[0] if several else hint
    if element is bool or typing.get_origin(element) is Literal:
        return None
    metavar = given[0] if given else _NUMBERS.get(element, name.split("_")[-1].upper())
    return f"{metavar} ..." if several else metavar


def _default(value: str) -> str:
    """What is said of a default value; where there is none the field's text says what happens."""
    shown = {"None": "", "": "", "True": "yes", "False": "no"}.get(value, value)
    return f"(default: {shown})" if shown else ""


def texts_of(kind: type) -> dict[str, str]:
    """The text of each field, from the class nearest to this one that has it."""
    texts = {}
    for owner in reversed(kind.__mro__[:-1]):
        for each in docstring_parser.parse_from_object(owner).params:
            texts[each.arg_name] = " ".join((each.description or "").split())
    return texts


def _description(kind: type) -> str:
    """What the class says of itself, in lines that tyro leaves as they are: it prints them so."""
    text = " ".join(cleandoc(kind.__doc__ or "").split())
    return textwrap.fill(text, _WIDTH, initial_indent="  ", subsequent_indent="  ")


def _values(parsed: Any) -> Iterator[tuple[str, Any]]:
    """The fields of a dataclass, and of those in it."""
    for each in dataclasses.fields(parsed):
        value = getattr(parsed, each.name)
        if dataclasses.is_dataclass(value):
            yield from _values(value)
        else:
            yield each.name, value
