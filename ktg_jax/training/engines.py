"""Engines: ways to run the same training, behind one interface (`ktg_jax.training.task.Engine`).

`FusedEngine` runs the single compiled step of `train_step`, in which nodes of one network may make
their passes together; `PerNodeEngine` composes the same pieces node by node, with one executable
for each model; `HostNodesEngine` does so with nodes on several processes. All give the same updates
to float rounding.
"""

from ktg_jax.errors import InputError
from ktg_jax.training.parallel import Parallel
from ktg_jax.training.placement import PLACEMENTS
from ktg_jax.training.task import ENGINES


def choose_engine(
    name: str, parallel: Parallel, steps_per_call: int = 1, placement: str | None = None
) -> str:
    """The engine that `auto` stands for; other names as they are.

    On CPUs it is `per_node`, where nothing is gained by compiling a graph whole; on accelerators
    `fused`, whose one program keeps a device busy. Nodes in places of their own need `per_node`.

    Args:
        name: `auto`, or one of `ENGINES`.
        parallel: devices and strategy.
        steps_per_call: updates in one call.
        placement: one of `PLACEMENTS`; None: whatever the engine does.

    Raises:
        InputError: no such engine or placement, or one that cannot do what is asked.
    """
    if placement is not None and placement not in PLACEMENTS:
        raise InputError("placement", placement, ", ".join(PLACEMENTS))
    apart = ("nodes", "nodes+data")
    if name == "auto" and placement in apart:
        name = "per_node"
    if name == "auto":
        on_cpu = parallel.devices[0].platform == "cpu"
        plain = parallel.strategy == "jit" and steps_per_call == 1
        plain &= not parallel.spans_processes
        return "per_node" if on_cpu and plain else "fused"
    if name not in ENGINES:
        raise InputError("engine", name, f"auto, {', '.join(ENGINES)}")
    if name != "per_node" and placement in apart:
        raise InputError("placement", placement, f"data with the engine {name}")
    if name == "per_node" and parallel.spans_processes and placement not in apart:
        allowed = f"{' or '.join(apart)}, with the engine per_node and several processes"
        raise InputError("placement", placement, allowed)
    if name == "per_node" and parallel.strategy != "jit":
        raise InputError("parallel", parallel.strategy, "jit with the engine per_node")
    if name == "per_node" and steps_per_call != 1:
        raise InputError("steps_per_call", steps_per_call, "1 with the engine per_node")
    return name
