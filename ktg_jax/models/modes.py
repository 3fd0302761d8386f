"""How a module is told whether it trains: by a flag of its call, or of its own, known by its name.

Some names say that it trains (`train`), others that it does not (`deterministic`); `is_` before and
`_mode` behind them change nothing.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from ktg_jax.errors import InputError

TRAINING = ("train", "training", "enable_dropout", "update_stats")
EVALUATION = (
    *("deterministic", "use_running_average"),
    *("eval", "evaluate", "evaluation", "inference", "test", "testing"),
)

Flags: TypeAlias = Callable[[bool], Mapping[str, Any]]
"""All flags and their values, in training (True) and in evaluation (False)."""

Mode: TypeAlias = str | Flags
"""How a user says it: the name of a flag that is True in training, or all flags."""


def in_training(name: str) -> bool | None:
    """What a flag of that name is in training; None: the name is not known.

    >>> in_training("is_training"), in_training("eval_mode"), in_training("rate")
    (True, False, None)
    """
    name = name.removeprefix("is_").removesuffix("_mode")
    return True if name in TRAINING else False if name in EVALUATION else None


def known_flags(values: Mapping[str, Any]) -> Flags | None:
    """The flags among these names, which have these values so far; None: there are none.

    >>> flags = known_flags({"rate": 0.5, "training": False, "deterministic": None})
    >>> flags(True)
    {'training': True, 'deterministic': False}
    """
    senses = {name: in_training(name) for name, value in values.items() if is_flag(value)}
    known = {name: sense for name, sense in senses.items() if sense is not None}
    return (lambda train: {k: v == train for k, v in known.items()}) if known else None


def is_flag(value: Any) -> bool:
    """Whether a value is one that a flag has, or is yet to be given."""
    return isinstance(value, bool) or value is None or value is inspect.Parameter.empty


def said_flags(mode: Mode) -> Flags:
    """The flags as a user says them; raises InputError unless they are said so."""
    if isinstance(mode, str):
        return lambda train: {mode: train}
    if not callable(mode) or not all(isinstance(mode(train), Mapping) for train in (True, False)):
        raise InputError("mode", mode, "a name, or a function of train that returns a dict")
    return mode


class Call:
    """What a module's call takes beside the images, its first argument.

    Args:
        call: the module's `__call__`, bound.

    Attributes:
        defaults: the defaults of the arguments that have a name, `inspect.Parameter.empty` where
            there is none.
        takes_any: whether arguments of any name are taken.

    >>> call = Call(lambda images, train, rate=0.5: images)
    >>> list(call.defaults), call.takes_any
    (['train', 'rate'], False)
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._parameters = list(inspect.signature(call).parameters.values())
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self.defaults = {p.name: p.default for p in self._parameters[1:] if p.kind in named}
        self.takes_any = any(p.kind is p.VAR_KEYWORD for p in self._parameters)

    def check(self, module: str, given: Mapping[str, Any], allowed: str) -> None:
        """Raises InputError where the call asks for more than the images and what is given.

        Args:
            module: its name.
            given: the arguments that it is called with.
            allowed: as in `unknown_mode`.
        """
        for p in self._parameters[1:]:
            needed = p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            if needed and p.name not in given:
                raise unknown_mode(module, f"a call that needs {p.name}", allowed)


def unknown_mode(module: str, found: str, allowed: str) -> InputError:
    """The error about a module of which it is not known how it is told its mode.

    Args:
        module: its name.
        found: that shows it, in words.
        allowed: what else a module of its kind may do.
    """
    known = (
        "an argument of its call, or a field, of a known name (train, training, is_training, "
        "deterministic, use_running_average, ...)"
    )
    return InputError(f"mode of {module}", found, f"{known}; or {allowed}")
