"""Jinja, which comes with the extra `search`; without it an error that says so."""

from ktg_jax.errors import InputError

try:
    import jinja2
    from markupsafe import Markup
except ImportError:
    allowed = 'the extra: pip install "ktg_jax[search]"'
    raise InputError("search", "no module jinja2", allowed) from None

__all__ = ["Markup", "jinja2"]
