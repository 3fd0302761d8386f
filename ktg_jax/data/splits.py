"""What the splits of a data set are called in users' folders and files."""

from collections.abc import Iterable

from ktg_jax.errors import InputError

_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


def split_of(name: str) -> str | None:
    """`train`, `val` or `test`, whichever a name means; None: none of them.

    >>> [split_of(name) for name in ("Validation", "test_set", "testimony")]
    ['val', 'test', None]
    """
    plain = name.casefold().removesuffix("set").rstrip("-_ ")
    return next((split for split, names in _NAMES.items() if plain in names), None)


def by_split(names: Iterable[str], field: str) -> dict[str, str]:
    """The names that mean a split, by that split.

    Raises:
        InputError: two of them mean the same.
    """
    found: dict[str, str] = {}
    for name in sorted(names):
        split = split_of(name)
        if split is None:
            continue
        if split in found:
            allowed = f"one of them: both mean the {split} split"
            raise InputError(field, f"{found[split]} and {name}", allowed)
        found[split] = name
    return found
