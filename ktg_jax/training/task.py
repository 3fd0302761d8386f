"""What is trained, and what every engine that trains it offers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
from jax.typing import ArrayLike

from ktg_jax.edge_arrays import EdgeArrays
from ktg_jax.graph.derived import PLAIN, Derived
from ktg_jax.models.network import NodeFns
from ktg_jax.training.accumulate import check_parts
from ktg_jax.training.batches import Arrays, Batches, steps_per_epoch
from ktg_jax.training.evaluation import Means
from ktg_jax.training.gradients import Metrics
from ktg_jax.training.node_terms import Priors
from ktg_jax.training.recorded import Recordings
from ktg_jax.training.state import GraphState
from ktg_jax.training.updates import Optimizers

ENGINES = ("fused", "batched", "per_node")

Step = Callable[[GraphState, int], tuple[GraphState, Metrics]]
"""`step(state, count)`: so many updates, with metrics stacked along a first axis where there are
several; consumes the state."""


@dataclass(frozen=True)
class Task:
    """What is trained: all that stays as it is while a run trains.

    Attributes:
        node_fns: one a node; equal ones share what is compiled.
        optimizer: as given to `init_state`: one for all, or one a node.
        batches: how they are made.
        image_shape: `(H, W, C)`.
        total_steps: k_end of the gates' progress.
        derived: `Graph.derived`, the nodes that are ensembles or averages of others.
        accumulate: as in `StepOptions`, the parts of each device's share of a batch.
        remat: as in `StepOptions`.

    Raises:
        InputError: a batch larger than the data, or in fewer than one part.
    """

    node_fns: Sequence[NodeFns]
    optimizer: Optimizers
    batches: Batches
    image_shape: Sequence[int]
    total_steps: int
    derived: Derived = PLAIN
    accumulate: int = 1
    remat: bool = False

    def __post_init__(self) -> None:
        size = self.batches.batch_size
        steps_per_epoch(self.batches.num_images, size)
        check_parts(size, self.accumulate)

    @property
    def options(self) -> dict[str, Any]:
        """The fields of `StepOptions` that stay as they are."""
        names = ("node_fns", "optimizer", "derived", "accumulate", "remat")
        return {name: getattr(self, name) for name in names}


class Engine(Protocol):
    """Runs a training.

    Attributes:
        name: one of `ENGINES`.
        summary: the devices, in a few words.
        wants_to_stop: asked before each call of a step whose devices are of several processes; its
            metric `stop` is whether it is true in any of them.
    """

    name: str
    summary: str
    wants_to_stop: Callable[[], bool]

    def place(self, state: GraphState) -> GraphState:
        """Puts a state, or a copy of it, where the engine wants it."""

    def gathered(self, state: GraphState) -> GraphState:
        """The whole state, of one that is spread over processes; all call it at the same time."""

    def load(self, arrays: Arrays) -> Any:
        """Puts images and labels where the engine wants them."""

    def make_step(
        self,
        data: Any,
        edges: ArrayLike | EdgeArrays,
        key: jax.Array,
        priors: Priors | None = None,
        recordings: Recordings | None = None,
    ) -> Step:
        """The step of a training.

        Args:
            data: what `load` returned.
            edges: `Graph.edge_arrays`, or gates as for `train_step`.
            key: a random key: what `plan_batch` draws batches by.
            priors: as for `train_step`.
            recordings: what the recorded nodes put out, by their indices.
        """

    def evaluate(self, state: GraphState, data: Any) -> Means:
        """Every node's and the ensemble's means over data of `load`."""


def named(devices: Sequence[jax.Device]) -> str:
    """How many devices of which kind."""
    return f"{len(devices)} x {devices[0].device_kind}"
