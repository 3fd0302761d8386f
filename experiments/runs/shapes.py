"""JSON objects, and what is asked of the contents of a JSON file."""

from collections.abc import Mapping
from typing import Any

Record = dict[str, Any]
"""A JSON object."""

Shape = Any
"""A type, or a tuple of types; a mapping of fields that must be there; a list with the shape of
each entry."""

NUMBER = (int, float)
MAYBE_NUMBER = (int, float, type(None))


def misfit(content: Any, shape: Shape, name: str = "") -> str | None:
    """The name of the first field that is missing or of another type; None: it all fits.

    >>> shape = {"config": {"nodes": [{"model": str}]}}
    >>> misfit({"config": {"nodes": [{"model": "cnn"}], "more": 1}}, shape)
    >>> misfit({"config": {"nodes": [{"model": "cnn"}, 3]}}, shape)
    'config.nodes[1]'
    >>> misfit({"config": {}}, shape)
    'config.nodes'
    """
    if isinstance(shape, Mapping):
        if not isinstance(content, Mapping):
            return name
        for field, inner in shape.items():
            inner_name = f"{name}.{field}" if name else field
            if field not in content:
                return inner_name
            if (found := misfit(content[field], inner, inner_name)) is not None:
                return found
        return None
    if isinstance(shape, list):
        if not isinstance(content, list):
            return name
        misfits = (misfit(entry, shape[0], f"{name}[{i}]") for i, entry in enumerate(content))
        return next((found for found in misfits if found is not None), None)
    return None if isinstance(content, shape) else name
