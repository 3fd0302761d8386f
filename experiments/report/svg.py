"""From matplotlib's SVG files to pictures inside a page."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence

_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_NUMBER = re.compile(r"-?\d+\.\d+")
_DECIMALS = 2  # of lengths in points


def inline(
    svg: str, prefix: str, label: str, tooltips: Mapping[str, Sequence[str]] | None = None
) -> str:
    """Makes an SVG file of matplotlib's a part of an HTML page.

    XML's headers, namespaces, metadata and page-wide styles are left out. Numbers are rounded.

    Args:
        svg: content of the file.
        prefix: the prefix of every id, so that no two pictures of a page share one.
        label: what the picture shows, for those who cannot see it.
        tooltips: by the id of a group, the text for each of its paths, in order.

    Returns:
        An `<svg>` element.

    Raises:
        ValueError: a group has another number of paths than of tooltips.
    """
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for gid, texts in (tooltips or {}).items():
        _add_tooltips(root, gid, texts)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {
            _local(name): _rewritten(_local(name), value, prefix)
            for name, value in element.attrib.items()
        }
        element.attrib.clear()
        element.attrib.update(attributes)
        element.text, element.tail = _unindented(element.text), _unindented(element.tail)
    root.attrib |= {"role": "img", "aria-label": label}
    return ET.tostring(root, encoding="unicode")


def _add_tooltips(root: ET.Element, gid: str, texts: Sequence[str]) -> None:
    groups = [element for element in root.iter() if element.get("id") == gid]
    paths = [path for group in groups for path in group.iter() if _local(path.tag) == "path"]
    for path, text in zip(paths, texts, strict=True):
        ET.SubElement(path, "title").text = text


def _local(name: str) -> str:
    """A name without its namespace."""
    return name.rpartition("}")[2]


def _rewritten(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return f"{prefix}-{value}"
    if name == "href" and value.startswith("#"):
        return f"#{prefix}-{value[1:]}"
    if name == "d":
        value = _NUMBER.sub(lambda number: f"{float(number[0]):.{_DECIMALS}f}", value)
        return " ".join(value.split())
    return _REFERENCE.sub(rf"url(#{prefix}-\1)", value)


def _unindented(text: str | None) -> str | None:
    return text if text and text.strip() else None
