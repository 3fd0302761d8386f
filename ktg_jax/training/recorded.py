"""Gives each call of a step what recorded nodes put out for its batches."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ktg_jax.recording import Recording

Recordings = Mapping[int, Recording]
"""The recordings of a graph's recorded nodes, by the nodes' indices."""

Rows = dict[int, Any]
"""Logits by node: float32 `[B, C]`, or `[count, B, C]` where a call makes several updates."""


class Feed:
    """The outputs of recorded nodes, for the device.

    Args:
        recordings: of the batches of the training, or static.
        place: puts arrays where the step wants them.

    Attributes:
        tables: of static recordings the logits of all training images, float32 `[n, C]`.
    """

    def __init__(self, recordings: Recordings | None, place: Callable[[Any], Any]) -> None:
        given = recordings or {}
        self._place = place
        self._by_step = {i: each for i, each in given.items() if not each.is_static}
        self.tables: Rows = place(
            {
                i: jnp.asarray(each.rows(0, each.header.rows))
                for i, each in given.items()
                if each.is_static
            }
        )

    def rows(self, first: int, count: int) -> Rows:
        """The logits for so many updates, the first of this number."""
        if not self._by_step:
            return {}
        rows = {i: each.rows(first, count) for i, each in self._by_step.items()}
        return self._place({i: each[0] if count == 1 else each for i, each in rows.items()})


def taken(tables: Rows, image_index: jax.Array) -> Rows:
    """Of static recordings, the logits of the images of a batch."""
    return {i: table[image_index] for i, table in tables.items()}
