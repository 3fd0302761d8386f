"""The losses that edges may carry, by name.

An option of a loss stands behind its name: `jensen_shannon(beta=0.1)`. A bare name has the
defaults.
"""

import functools
import math
import re
from collections.abc import Mapping

from ktg_jax.built_in_losses import BUILT_IN
from ktg_jax.edge_loss import EdgeLoss, NamedLoss, Option, per_sample
from ktg_jax.errors import InputError, did_you_mean

__all__ = [
    "EdgeLoss",
    "NamedLoss",
    "Option",
    "checked_loss",
    "loss_names",
    "named_loss",
    "per_sample",
    "register_loss",
]

_registered: dict[str, NamedLoss] = dict(BUILT_IN)
_NAME = r"[A-Za-z0-9_]+"
_TEXT = re.compile(rf"\s*({_NAME})\s*(?:\((.*)\))?\s*")


def register_loss(
    name: str,
    function: EdgeLoss,
    *,
    on_labels: bool = False,
    needs_stages: bool = False,
    uses_temperature: bool = True,
    options: Mapping[str, float] | None = None,
) -> None:
    """Makes a loss available by name, to graphs, to files and to the experiments.

    Args:
        name: letters, digits and `_`; not a built-in loss's. One that was registered before is
            replaced.
        function: `function(receiver, sender, labels, sample_weights, temperature)` -> scalar, as
            `ktg_jax.edge_loss` says; `per_sample` makes one of a loss for each sample. It may see a
            sender of zeros where the edge is cut, and what it returns there does not count.
        on_labels: label edges carry it, whose sender is the receiver itself, detached; else
            transfer edges do.
        needs_stages: it compares `Outputs.stages`, which are empty where no loss needs them.
        uses_temperature: whether graphs that differ in the temperature alone differ.
        options: the names of its options, numbers which the function is given by name, and their
            defaults.

    Raises:
        InputError: a malformed or a built-in name, no function, or an option that is no number.

    >>> register_loss("kl", per_sample(lambda *given: 0.0))
    Traceback (most recent call last):
    ktg_jax.errors.InputError: name: got 'kl'; allowed: a name that no built-in loss has

    Such as::

        def logit_distance(receiver, sender, labels, temperature):
            return jnp.mean((receiver.logits - sender.logits) ** 2, axis=-1)

        register_loss("logit_distance", per_sample(logit_distance), uses_temperature=False)
    """
    if not isinstance(name, str) or not re.fullmatch(_NAME, name):
        raise InputError("name", name, "letters, digits and '_'")
    if name in BUILT_IN:
        raise InputError("name", name, "a name that no built-in loss has")
    if not callable(function):
        raise InputError("function", function, "a function of five arguments")
    known = {}
    for option, default in (options or {}).items():
        if not isinstance(default, int | float) or not math.isfinite(default):
            raise InputError(f"options[{option!r}]", default, "a finite number, its default")
        known[option] = Option(float(default))
    _registered[name] = NamedLoss(function, on_labels, needs_stages, uses_temperature, known)


def loss_names(on_labels: bool | None = None) -> tuple[str, ...]:
    """The names that are known: of label edges, of transfer edges, or (None) all.

    >>> "kl" in loss_names(on_labels=False), loss_names(on_labels=True)[:1]
    (True, ('cross_entropy',))
    """
    return tuple(name for name, loss in _registered.items() if on_labels in (None, loss.on_labels))


def named_loss(text: str) -> NamedLoss:
    """The loss of a name, its options set as they are given.

    Raises:
        InputError: as `checked_loss`.
    """
    name, values = _parsed("loss", text, loss_names())
    loss = _registered[name]
    return loss._replace(function=functools.partial(loss.function, **values)) if values else loss


def checked_loss(field: str, text: str, on_labels: bool | None = None) -> str:
    """The one text that says a loss and its options; options that have their default are left out.

    Args:
        field: that an error is of.
        text: a name, or a name and options.
        on_labels: whether label edges are to carry it; None: either.

    Raises:
        InputError: no such loss, no such option, or a value that is not allowed.

    >>> checked_loss("loss", "decoupled_kl( beta = 2.0, alpha=1 )")
    'decoupled_kl(beta=2)'
    >>> checked_loss("loss", "jensen_shannon(beta=2)")
    Traceback (most recent call last):
    ktg_jax.errors.InputError: loss: got 'jensen_shannon(beta=2)'; allowed: beta above 0 and below 1
    """
    name, values = _parsed(field, text, loss_names(on_labels))
    options = _registered[name].options
    said = [f"{o}={_number(v)}" for o, v in values.items() if v != options[o].default]
    return f"{name}({','.join(said)})" if said else name


def _parsed(field: str, text: str, names: tuple[str, ...]) -> tuple[str, dict[str, float]]:
    """The name, and all options in their order where there are any."""
    match = _TEXT.fullmatch(text) if isinstance(text, str) else None
    name = match[1] if match else ""
    if match is None or name not in names:
        raise InputError(field, text, ", ".join(names) + did_you_mean(name or text, names))
    options = _registered[name].options
    given: dict[str, float] = {}
    for part in match[2].split(",") if (match[2] or "").strip() else ():
        option, equals, value = (word.strip() for word in part.partition("="))
        known = f"{name} with {', '.join(options)}" if options else f"{name}, which has no options"
        if option not in options or not equals or option in given:
            raise InputError(field, text, known + did_you_mean(option, options))
        try:
            given[option] = float(value)
        except ValueError:
            raise InputError(field, text, f"{option} {options[option].says}") from None
        if not math.isfinite(given[option]) or not options[option].allows(given[option]):
            raise InputError(field, text, f"{option} {options[option].says}")
    return name, {option: given.get(option, each.default) for option, each in options.items()}


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
