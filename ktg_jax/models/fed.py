"""What a network passes from stage to stage, seen and replaced as it runs.

Of a network with G stages that are called one after the other there are G + 1 places: place 0 is
what goes into the first stage, place g what comes out of stage g.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ktg_jax.errors import InputError
from ktg_jax.models.network import PyTree, check_found

Keep = Callable[[int, jax.Array], Any]


class Passages:
    """Watches the calls of a network's stages; with `inputs` it replaces what they pass on.

    Args:
        name: the network's.
        calls: the stage of each call of a stage's submodule, in their order: what `watched` of a
            run without inputs is.
        inputs: for each place what is passed on there, float `[B, h, w, C]`, in place of what the
            network made; None: that.
    """

    def __init__(
        self, name: str, calls: Sequence[int] = (), inputs: Sequence[jax.Array | None] = ()
    ) -> None:
        self.watched: list[int] = []
        self._name, self._inputs = name, tuple(inputs)
        self._is_inside = False
        stages = sorted(set(calls))
        self._ends = {_last(calls, stage): place for place, stage in enumerate(stages, start=1)}
        self._begin = calls.index(stages[0]) if stages else None
        if calls and inputs and len(inputs) != len(stages) + 1:
            allowed = f"{len(stages) + 1} entries, one more than {name} has stages, or none"
            raise InputError("inputs", len(inputs), allowed)

    def call(self, stage: int | None, keep: Keep, call: Callable[..., Any], *args: Any) -> Any:
        """Calls a submodule.

        Args:
            stage: that it is of; None: of none.
            keep: is told a place and what the network itself passes on there.
            call: what to call.
            *args: with these.
        """
        if stage is None or self._is_inside:
            return call(*args)
        index = len(self.watched)
        self.watched.append(stage)
        if index == self._begin:
            if not args:
                raise InputError("stages", self._name, "a module that calls its stages as stage(x)")
            args = (self._passed(0, args[0], keep), *args[1:])
        self._is_inside = True
        try:
            made = call(*args)
        finally:
            self._is_inside = False
        return self._passed(self._ends[index], made, keep) if index in self._ends else made

    def _passed(self, place: int, made: jax.Array, keep: Keep) -> jax.Array:
        """What is passed on at a place."""
        keep(place, made)
        given = self._inputs[place] if self._inputs else None
        if given is None:
            return made
        if np.shape(given) != np.shape(made):
            raise InputError(f"inputs[{place}]", np.shape(given), f"shape {np.shape(made)}")
        return given.astype(made.dtype)


def fed(
    name: str,
    variables: tuple[PyTree, PyTree],
    inputs: Sequence[jax.Array | None],
    run: Callable[[Passages, PyTree, PyTree], Any],
    paths: Sequence[str] | None = None,
) -> Any:
    """Runs a network with its stages fed from outside, after it was seen which are called.

    Args:
        name: the network's.
        variables: its parameters and model state.
        inputs: as of `Passages`.
        run: runs it, its stages called by way of the passages.
        paths: of its stages, stage 0 the first; None: they are known by their names.

    Returns:
        What `run` returns.

    Raises:
        InputError: a network that calls no stages, or not those of all paths; inputs that do not
            fit.
    """
    watching = Passages(name)
    jax.eval_shape(lambda *of: run(watching, *of), *variables)
    calls = watching.watched
    if paths is not None:
        check_found(name, paths, [paths[stage] for stage in set(calls)])
    if not calls:
        raise without_stages(name)
    return run(Passages(name, calls, inputs), *variables)


def without_stages(name: str) -> InputError:
    """What is raised of a network of this name that has no stages."""
    return InputError("stages", name, "a module with submodules stage1_..., stage2_...")


def _last(calls: Sequence[int], stage: int) -> int:
    return len(calls) - 1 - list(reversed(calls)).index(stage)
