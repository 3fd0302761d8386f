"""The training loop: epochs of compiled steps, and a record of each."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ktg_jax.errors import DivergedError
from ktg_jax.training.evaluation import Means
from ktg_jax.training.gradients import Metrics
from ktg_jax.training.state import GraphState

Record = dict[str, Any]


class Interrupted(Exception):  # noqa: N818 - it is no error
    """A training was asked to stop, within an epoch.

    Attributes:
        state: after the last update.
        so_far: what `train_epochs` needs of the epoch to go on, as JSON.
    """

    def __init__(self, state: GraphState, so_far: Record) -> None:
        super().__init__(f"after update {int(state.step)}")
        self.state, self.so_far = state, so_far


def train_epochs(
    state: GraphState,
    step: Callable[[GraphState, int], tuple[GraphState, Metrics]],
    names: Sequence[str],
    *,
    epochs: int,
    steps_per_epoch: int,
    batch_size: int,
    steps_per_call: int = 1,
    validate: Callable[[GraphState], Means] | None = None,
    on_step: Callable[[int, Metrics], None] | None = None,
    so_far: Record | None = None,
    should_stop: Callable[[Metrics], bool] | None = None,
) -> Iterator[tuple[Record, GraphState]]:
    """Trains from where the state stands to the last epoch.

    The metrics of a call are read after the next one was dispatched, so that the host never keeps
    the devices waiting.

    Args:
        state: consumed.
        step: `step(state, count) -> (state, metrics)`, compiled: so many updates, with metrics
            stacked along a first axis where there are several.
        names: the nodes' names.
        epochs: k_end / steps_per_epoch.
        steps_per_epoch: updates an epoch.
        batch_size: for the images per second.
        steps_per_call: the largest count; the last call of an epoch may make fewer.
        validate: evaluates a state on the validation images.
        on_step: called with the number of each update (from 1) and its metrics, on the host.
        so_far: of a state that stands within an epoch, what `Interrupted` had of it.
        should_stop: asked after each call, with the metrics of its last update on the host.

    Yields:
        After each epoch a record (`epoch`, `step`, `seconds` from its beginning to its last update,
        `images_per_second` of this time, in the first one that is trained without its first call,
        which compiles, if there are others; and for each of
        `nodes`: `name`, means over the epoch `train_loss`, `train_accuracy` (None: it has other
        classes than the data) and `edge_losses` (one a sender), `val_loss` and `val_accuracy` or
        None, and of nodes with a prior `prior_distance`, one a kernel of it), and the state, which
        must be copied or saved before the next is asked for.

    Raises:
        DivergedError: a loss or a parameter that is not finite; names the step and the node.
        Interrupted: it was to stop; all updates that were begun are made and counted.
    """
    done = int(state.step)
    epoch_of_first = done // steps_per_epoch + 1
    for epoch in range(epoch_of_first, epochs + 1):
        end = epoch * steps_per_epoch
        clock = _Clock()
        means = _Means()
        if epoch == epoch_of_first and done % steps_per_epoch:
            clock, means = _Clock(so_far), _Means(so_far)
        pending: tuple[range, Metrics] | None = None

        def read(
            numbers: range, metrics: Metrics, means: "_Means" = means, clock: "_Clock" = clock
        ) -> bool:
            """Reads the metrics of a call; whether it is time to stop."""
            host = jax.device_get(metrics)
            one: Any = {}
            for i, number in enumerate(numbers):
                one = host if len(numbers) == 1 else {key: host[key][i] for key in host}
                _check_finite(one["loss"], names, f"step {number}", "loss")
                means.add(one)
                if on_step is not None:
                    on_step(number, one)
            clock.steps_done(len(numbers))
            return should_stop is not None and should_stop(one)

        for numbers in _calls(max(done, end - steps_per_epoch) + 1, end, steps_per_call):
            state, metrics = step(state, len(numbers))
            if pending is not None:
                if read(*pending) and numbers[-1] < end:
                    read(numbers, metrics)
                    raise Interrupted(state, {**means.so_far, **clock.so_far})
            elif epoch == epoch_of_first:
                jax.block_until_ready(metrics)
                clock.compiled(len(numbers))
            pending = numbers, metrics
        assert pending is not None
        read(*pending)

        largest = jax.device_get([_largest(params) for params in state.params])
        _check_finite(largest, names, f"step {int(state.step)}", "parameters")
        validation = None if validate is None else validate(state)
        record = {
            "epoch": epoch,
            "step": int(state.step),
            "seconds": round(clock.seconds, 3),
            "images_per_second": round(clock.rate * batch_size, 1),
            "nodes": _node_records(names, means.result(), validation),
        }
        yield record, state


def _node_records(
    names: Sequence[str], means: dict[str, np.ndarray], validation: dict[str, np.ndarray] | None
) -> list[Record]:
    def known(found: dict[str, np.ndarray] | None, key: str, i: int) -> float | None:
        # A recorded node is not validated, and one of other classes is never right.
        return float(found[key][i]) if found and found["accuracy"][i] >= 0 else None

    records: list[Record] = [
        {
            "name": name,
            "train_loss": float(means["loss"][i]),
            "train_accuracy": known(means, "accuracy", i),
            "val_loss": known(validation, "loss", i),
            "val_accuracy": known(validation, "accuracy", i),
            "edge_losses": means["edge_losses"][i].tolist(),
        }
        for i, name in enumerate(names)
    ]
    for record, distances in zip(records, means.get("prior_distance", ()), strict=False):
        if there := distances[distances >= 0].tolist():  # NaN or -1: not there
            record["prior_distance"] = there
    return records


def _calls(first: int, last: int, steps_per_call: int) -> Iterator[range]:
    """The numbers of the updates from `first` to `last`, call by call."""
    for start in range(first, last + 1, steps_per_call):
        yield range(start, min(start + steps_per_call, last + 1))


@jax.jit
def _largest(params: Any) -> jax.Array:
    """The largest magnitude among a node's parameters; not finite if any of them is not."""
    largest = [jnp.max(jnp.abs(leaf)).astype(float) for leaf in jax.tree.leaves(params)]
    return jnp.max(jnp.stack([jnp.zeros(()), *largest]))


def _check_finite(values: Sequence[Any], names: Sequence[str], where: str, what: str) -> None:
    for name, value in zip(names, values, strict=True):
        if not np.isfinite(value):
            raise DivergedError(
                f"{where}, node {name}: {what} not finite ({value}); a lower learning rate or a "
                "warm-up may help; the last good checkpoint is kept"
            )


class _Means:
    """Running means of the metrics, in float64 and in a fixed order: the same on every run."""

    def __init__(self, so_far: Record | None = None) -> None:
        known = so_far or {"sums": {}, "count": 0}
        self._sums: dict[str, Any] = {k: np.asarray(v) for k, v in known["sums"].items()}
        self._count = int(known["count"])

    @property
    def so_far(self) -> Record:
        return {"sums": {k: v.tolist() for k, v in self._sums.items()}, "count": self._count}

    def add(self, metrics: dict[str, Any]) -> None:
        for key, value in metrics.items():
            self._sums[key] = self._sums.get(key, 0.0) + np.asarray(value, np.float64)
        self._count += 1

    def result(self) -> dict[str, np.ndarray]:
        return {key: value / self._count for key, value in self._sums.items()}


class _Clock:
    """Seconds of an epoch, and its steps a second, without those of a call that compiled."""

    def __init__(self, so_far: Record | None = None) -> None:
        known = so_far or {"seconds": 0.0, "count": 0}
        self._last = time.perf_counter()
        self._start = self._last - known["seconds"]
        self._steps = int(known["count"])
        self._compiled = self._start, 0

    @property
    def so_far(self) -> Record:
        return {"seconds": self.seconds}

    def compiled(self, steps: int) -> None:
        """So many steps, which compiled, are computed."""
        self._compiled = time.perf_counter(), self._steps + steps

    def steps_done(self, count: int) -> None:
        self._last = time.perf_counter()
        self._steps += count

    @property
    def seconds(self) -> float:
        return self._last - self._start

    @property
    def rate(self) -> float:
        since, before = self._compiled
        if before == self._steps:
            return self._steps / self.seconds
        return (self._steps - before) / (self._last - since)
