"""What processes say to each other: arrays of known shapes, all at the same moment.

A message is one vector of floats, as long as the longest of all processes', so that a single
collective operation carries everybody's.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class Exchange:
    """Trades a message of each process for those of all.

    Args:
        shapes: by process, the message's tree of `jax.ShapeDtypeStruct` of floats.
    """

    def __init__(self, shapes: Sequence[Any]) -> None:
        self._shapes = shapes
        self._length = max(map(_size, shapes))

    @property
    def is_silent(self) -> bool:
        """Whether nobody has anything to say."""
        return self._length == 0

    def __call__(self, message: Any) -> list[Any]:
        """The messages of all processes, as arrays of the host.

        Args:
            message: this process's; its arrays are waited for.
        """
        if self.is_silent:
            return list(self._shapes)
        leaves = [np.asarray(leaf, np.float32).ravel() for leaf in jax.tree.leaves(message)]
        vector = np.zeros(self._length, np.float32)
        said = np.concatenate([np.zeros(0, np.float32), *leaves])
        vector[: len(said)] = said
        everybody = np.asarray(multihost_utils.process_allgather(vector)).reshape(-1, self._length)
        return [_taken_apart(row, of) for row, of in zip(everybody, self._shapes, strict=True)]


def _size(shapes: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _taken_apart(vector: np.ndarray, shapes: Any) -> Any:
    leaves, treedef = jax.tree.flatten(shapes)
    ends = np.cumsum([math.prod(leaf.shape) for leaf in leaves])
    parts = np.split(vector[: ends[-1] if len(ends) else 0], ends[:-1])
    arrays = [
        part.reshape(leaf.shape).astype(leaf.dtype)
        for part, leaf in zip(parts, leaves, strict=False)
    ]
    return jax.tree.unflatten(treedef, arrays)


class Mailbox:
    """Messages on their way: they are traded one after another, while the devices compute on.

    Args:
        exchange: trades a message for those of all.
        at_once: wait for the answers right away.
    """

    def __init__(self, exchange: Exchange, at_once: bool) -> None:
        self._exchange, self._at_once = exchange, at_once
        self._sender = ThreadPoolExecutor(1, "exchange")
        self._under_way: list[tuple[int, Future[list[Any]]]] = []

    def post(self, number: int, message: Any) -> "Future[list[Any]]":
        """Sends the message of an update; the answers are those of all processes."""
        answers: Future[list[Any]]
        if self._at_once:
            answers = Future()
            answers.set_result(self._exchange(message))
        else:
            answers = self._sender.submit(self._exchange, message)
        self._under_way.append((number, answers))
        return answers

    def wait(self) -> list[tuple[int, list[Any]]]:
        """Waits until nothing is on its way; the answers that were not taken yet, in order."""
        return [(number, answers.result()) for number, answers in self._under_way]

    def arrived(self, up_to: int) -> list[tuple[int, list[Any]]]:
        """Takes the answers of the updates up to a number, in order; they are waited for."""
        found = []
        while self._under_way and self._under_way[0][0] <= up_to:
            number, answers = self._under_way.pop(0)
            found.append((number, answers.result()))
        return found


class Later:
    """An array that is on its way.

    Args:
        answers: that it is taken from.
        take: of these.
    """

    def __init__(self, answers: "Future[list[Any]]", take: Callable[[list[Any]], Any]) -> None:
        self._answers, self._take = answers, take

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The array; it is waited for."""
        del copy
        return np.asarray(self._take(self._answers.result()), dtype)

    def block_until_ready(self) -> "Later":
        """Waits for it."""
        self._answers.result()
        return self
