"""Optuna, the engine of the search (extra: search), or an error that says how to get it."""

from ktg_jax.errors import InputError

try:
    import optuna
except ImportError:
    allowed = 'the extra: pip install "ktg_jax[search]"'
    raise InputError("search", "no module optuna", allowed) from None

__all__ = ["optuna"]
