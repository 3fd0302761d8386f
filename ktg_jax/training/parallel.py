"""Devices: the one place that decides sharding and donation.

The same pure step runs under `jax.jit` over a device mesh (the default), where the batch is split
over the devices and everything else, batch normalisation included, is as on one device; or under
`jax.pmap`, where each device runs the step on its share and the step itself averages over the
mapped axis.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ktg_jax.errors import InputError

AXIS = "data"
"""The axis of the mesh, and of pmap, along which a batch is split."""

STRATEGIES = ("jit", "pmap")


@dataclass(frozen=True)
class Parallel:
    """Runs a step on several devices.

    Attributes:
        strategy: `jit` or `pmap`.
        devices: all of one kind; default: every local device.

    >>> parallel = Parallel("jit", jax.local_devices()[:1])
    >>> double = parallel.compile(lambda state, x: (state, 2 * parallel.shard(x)))
    >>> double(parallel.replicate(jax.numpy.zeros(3)), jax.numpy.ones(2))[1].tolist()
    [2.0, 2.0]
    """

    strategy: str = "jit"
    devices: Sequence[jax.Device] = field(default_factory=lambda: tuple(jax.local_devices()))

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise InputError("parallel", self.strategy, ", ".join(STRATEGIES))
        object.__setattr__(self, "devices", tuple(self.devices))
        if not self.devices:
            raise InputError("devices", self.devices, "at least one device")

    @property
    def axis_name(self) -> str | None:
        """What `train_step` and models must be given: the mapped axis under pmap, else None."""
        return AXIS if self.strategy == "pmap" else None

    @property
    def mesh(self) -> Mesh:
        """The devices in a row, partitioned automatically by the compiler."""
        return jax.make_mesh(
            (len(self.devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=self.devices
        )

    def check_batch_size(self, batch_size: int) -> None:
        """Raises InputError if a batch of that size cannot be split evenly over the devices."""
        if batch_size % len(self.devices):
            allowed = f"a multiple of {len(self.devices)}, the number of devices"
            raise InputError("batch_size", batch_size, allowed)

    def replicate(self, tree: Any) -> Any:
        """A copy of every array of the tree on every device."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def shard(self, batch: Any) -> Any:
        """Inside a compiled step: of a whole batch (leading axis B), what this device computes.

        Under jit every device is given its share by the compiler, and shapes stay global; under
        pmap the share is cut out, and shapes become local.
        """
        if self.strategy == "jit":
            sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
            return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding), batch)

        def share(x: jax.Array) -> jax.Array:
            size = x.shape[0] // len(self.devices)
            return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXIS) * size, size)

        return jax.tree.map(share, batch)

    def compile(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles `step(state, *inputs) -> (state, outputs)`; the state's memory is reused.

        The inputs reach every device whole (so give them whole, or through `replicate`): the step
        takes its share of a batch with `shard`. The state given is consumed.
        """
        if self.strategy == "jit":
            replicated = NamedSharding(self.mesh, PartitionSpec())
            return jax.jit(step, donate_argnums=0, out_shardings=replicated)
        # pmap wants a mapped argument even where every input is the same on all devices.
        mapped = jax.pmap(
            lambda _, state, inputs: step(state, *inputs),
            axis_name=AXIS,
            in_axes=(0, None, None),
            out_axes=None,
            devices=self.devices,
            donate_argnums=1,
        )
        ranks = np.arange(len(self.devices))
        return lambda state, *inputs: mapped(ranks, state, inputs)
