"""Optuna, which comes with the extra `search`; without it an error that says so."""

from ktg_jax.errors import InputError

try:
    import optuna
except ImportError:
    allowed = 'the extra: pip install "ktg_jax[search]"'
    raise InputError("search", "no module optuna", allowed) from None

__all__ = ["optuna"]
