"""What a folder's contents are made of, wherever the files are that they were made from.

A user's own data, and the weights and priors of nodes, are told by checksums (fields that end in
`_facts`), not by their paths.
"""

from collections.abc import Callable, Mapping
from typing import Any

Fields = Mapping[str, Any]

OWN_DATA = ("npz", "folder")
"""Kinds of data that are the user's own, `KIND:PATH`."""

_FACTS = "_facts"
_OF_NODES = {
    "weights": "weights_facts",
    "prior": "prior_facts",
    "outputs": "outputs_facts",
}
"""The fields of a node that are paths, and the fields with their checksums by the node's name."""


def data_kind(data: str) -> str:
    """What data is, without where it is: of one's own its kind, of other data its name for files.

    >>> data_kind("npz:images.npz"), data_kind("cifar10"), data_kind("tfds:imagenette/320px")
    ('npz', 'cifar10', 'tfds-imagenette-320px')
    """
    kind = data.partition(":")[0]
    return kind if kind in OWN_DATA else data.replace(":", "-").replace("/", "-")


def is_own(data: str) -> bool:
    """Whether data is a file or a folder of the user's own."""
    return data_kind(data) in OWN_DATA


def differences(found: Fields, wanted: Fields) -> str:
    """The fields of `wanted` that `found` has otherwise, with both values; empty: none.

    A path is not compared where `found` has a checksum of what was there. Checksums are compared
    where both have them.

    >>> differences({"space": {"nodes": 3}, "more": 1}, {"space": {"nodes": 2}})
    'space.nodes: 3, now 2'
    >>> was = {"data": "npz:a.npz", "data_facts": {"train_crc32": 1}}
    >>> differences(was, {"data": "npz:b.npz"})
    ''
    >>> differences(was, {"data": "npz:b.npz", "data_facts": {"train_crc32": 2, "val_crc32": 3}})
    'data_facts.train_crc32: 1, now 2'
    """
    was, now = _without_places(found, found), _without_places(wanted, found)
    was = {key: value for key, value in was.items() if key in now}
    for key in [key for key in now if key.endswith(_FACTS)]:
        old, new = was.pop(key, {}), now.pop(key)
        if isinstance(old, Mapping):
            was[key] = {field: value for field, value in old.items() if field in new}
            now[key] = {field: value for field, value in new.items() if field in old}
    return "; ".join(f"{key}: {old!r}, now {new!r}" for key, old, new in _differing(was, now))


def identity(fields: Fields) -> dict[str, Any]:
    """The fields to make a folder's name of: checksums in the place of paths.

    >>> identity({"data": "npz:a.npz", "seed": 1, "data_facts": {"train_crc32": 7}})
    {'data': {'npz': {'train_crc32': 7}}, 'seed': 1}
    >>> identity({"data": "digits", "seed": 1, "data_facts": {"train_crc32": 7}})
    {'data': 'digits', 'seed': 1}
    """
    facts = fields.get("data_facts", {})
    made = _replaced(
        fields, fields, lambda data: {data_kind(data): facts}, lambda checksum: checksum
    )
    return without_facts(made)


def without_facts(fields: Fields) -> dict[str, Any]:
    """The fields but for checksums."""
    return {key: value for key, value in fields.items() if not key.endswith(_FACTS)}


def _without_places(fields: Fields, known: Fields) -> dict[str, Any]:
    """The fields without the paths of what `known` has checksums of."""
    return _replaced(fields, known, data_kind, lambda checksum: "some")


def _replaced(
    fields: Fields,
    known: Fields,
    of_data: Callable[[str], Any],
    of_node: Callable[[Any], Any],
) -> dict[str, Any]:
    """The fields with other values for the paths of what `known` has checksums of.

    Args:
        fields: the fields of a run, a search or a prior.
        known: fields with checksums.
        of_data: gives the value for a user's own data.
        of_node: gives, from the checksum, the value for a path of a graph's node.
    """
    made = dict(fields)
    data, graph, training = (made.get(field) for field in ("data", "graph", "training"))
    if isinstance(data, str) and is_own(data) and "data_facts" in known:
        made["data"] = of_data(data)
    if isinstance(training, Mapping):  # of a search
        made["training"] = _replaced(training, known, of_data, of_node)
    if isinstance(graph, Mapping) and isinstance(graph.get("nodes"), list):
        nodes = [_replaced_in_node(node, known, of_node) for node in graph["nodes"]]
        made["graph"] = {**graph, "nodes": nodes}
    return made


def _replaced_in_node(node: Any, known: Fields, of_node: Callable[[Any], Any]) -> Any:
    if not isinstance(node, Mapping):  # of a damaged file
        return node
    made = dict(node)
    for field, facts in _OF_NODES.items():
        checksums = known.get(facts, {})
        if made.get(field) is not None and node.get("name") in checksums:
            made[field] = of_node(checksums[node["name"]])
    return made


def _differing(old: Fields, new: Fields) -> list[tuple[str, Any, Any]]:
    """The fields in which two mappings differ, those of inner mappings one by one."""
    found = []
    for key in (*old, *(key for key in new if key not in old)):
        if old.get(key) == new.get(key):
            continue
        if isinstance(old.get(key), Mapping) and isinstance(new.get(key), Mapping):
            inner = _differing(old[key], new[key])
            found += [(f"{key}.{field}", was, now) for field, was, now in inner]
        else:
            found.append((key, old.get(key), new.get(key)))
    return found
