"""The number of updates that a state has, known without waiting for the device."""

from typing import Any

import jax

from ktg_jax.training.state import GraphState


class Counter:
    """Knows the number of what the last call of a step returned: most often that is given next."""

    def __init__(self) -> None:
        self._last: tuple[Any, int] | None = None

    def number(self, state: GraphState) -> int:
        """The updates that were made; waits for the device where it does not know the state."""
        if self._last is None or self._last[0] is not state.step:
            self._last = state.step, int(jax.device_get(state.step))
        return self._last[1]

    def note(self, updated: GraphState, number: int) -> None:
        """Notes that a state, which may not be computed yet, has so many updates."""
        self._last = updated.step, number
