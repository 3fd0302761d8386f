"""Devices: the one place that decides sharding and donation.

The same pure step runs under `jax.jit` over a device mesh (the default), where the batch is split
over the devices and everything else, batch normalisation included, is as on one device; or under
`jax.shard_map` or `jax.pmap`, where each device runs the step on its share and the step itself
averages over the mapped axis.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ktg_jax.errors import InputError

AXIS = "data"
"""The axis of the mesh, and of shard_map and pmap, along which a batch is split."""

STRATEGIES = ("jit", "shard_map", "pmap")
STATISTICS = ("global", "device")


@dataclass(frozen=True)
class Parallel:
    """Runs a step on several devices.

    Attributes:
        strategy: `jit`, `shard_map` or `pmap`.
        devices: all of one kind; default: every device, those of other processes included.
        batch_stats: of which batch the normalisation takes its statistics: `global`, the whole one,
            as on one device; or `device`, each device of its share, without waiting for the others.
            The running statistics are then the mean over the devices.

    Raises:
        InputError: an unknown strategy, no device, or statistics of devices under `jit`, where
            there is one batch.

    >>> parallel = Parallel("jit", jax.local_devices()[:1])
    >>> double = parallel.compile(lambda state, x: (state, 2 * parallel.shard(x)))
    >>> double(parallel.replicate(jax.numpy.zeros(3)), jax.numpy.ones(2))[1].tolist()
    [2.0, 2.0]
    """

    strategy: str = "jit"
    devices: Sequence[jax.Device] = field(default_factory=lambda: tuple(jax.devices()))
    batch_stats: str = "global"

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise InputError("parallel", self.strategy, ", ".join(STRATEGIES))
        if self.batch_stats not in STATISTICS:
            raise InputError("batch_stats", self.batch_stats, ", ".join(STATISTICS))
        if self.batch_stats == "device" and self.strategy == "jit":
            raise InputError("batch_stats", "device", "global with jit; else shard_map or pmap")
        object.__setattr__(self, "devices", tuple(self.devices))
        if not self.devices:
            raise InputError("devices", self.devices, "at least one device")

    @property
    def axis_name(self) -> str | None:
        """What `train_step` must be given: the mapped axis under shard_map and pmap, else None."""
        return None if self.strategy == "jit" else AXIS

    @property
    def statistics_axis(self) -> str | None:
        """What models must be given: the axis over which they normalise, or None."""
        return self.axis_name if self.batch_stats == "global" else None

    @property
    def spreads_data(self) -> bool:
        """Whether each device holds its part of the data alone: under pmap each holds all."""
        return len(self.devices) > 1 and self.strategy != "pmap"

    @property
    def mesh(self) -> Mesh:
        """The devices in a row, partitioned automatically by the compiler."""
        return jax.make_mesh(
            (len(self.devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=self.devices
        )

    def check_batch_size(self, batch_size: int, parts: int = 1) -> None:
        """Raises InputError unless such a batch can be split evenly over the devices.

        Args:
            batch_size: of all devices together.
            parts: in which each device computes its share, one after another.
        """
        if batch_size % (len(self.devices) * parts):
            allowed = f"a multiple of {len(self.devices) * parts}, the number of devices"
            allowed += f" ({len(self.devices)}) times that of parts ({parts})" * (parts > 1)
            raise InputError("batch_size", batch_size, allowed)

    def replicate(self, tree: Any) -> Any:
        """A copy of every array of the tree on every device.

        With devices of other processes, all processes must call this with equal arrays.
        """
        sharding = NamedSharding(self.mesh, PartitionSpec())
        if sharding.is_fully_addressable:
            return jax.device_put(tree, sharding)
        return jax.tree.map(lambda leaf: _everywhere(leaf, sharding), tree)

    @property
    def spans_processes(self) -> bool:
        """Whether some of the devices are other processes'."""
        return any(device.process_index != jax.process_index() for device in self.devices)

    def one_each(self, value: Any) -> jax.Array:
        """An array `[number of devices]`, split over them: on each what its process says."""
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        own = np.asarray([value])
        return jax.make_array_from_callback((len(self.devices),), sharding, lambda _: own)

    def spread(self, table: Any) -> jax.Array:
        """Of an array `[n, ...]` a part on each device, where `spreads_data`; else all of it.

        Where n is no multiple of the number of devices, zeros follow its last row.
        """
        if not self.spreads_data:
            return self.replicate(jnp.asarray(table))
        table, number = np.asarray(table), len(self.devices)
        padding = [(0, -len(table) % number), *((0, 0) for _ in table.shape[1:])]
        rows = np.pad(table, padding) if padding[0][1] else table
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])

    def own_rows(self, size: int) -> np.ndarray:
        """Which rows of a batch of this size this process's devices compute: int `[b]`.

        Under pmap each device is given all.
        """
        if not self.spreads_data:
            return np.arange(size)
        share, me = size // len(self.devices), jax.process_index()
        of_mesh = self.mesh.devices.flat  # which may have them in another order
        mine = [i for i, device in enumerate(of_mesh) if device.process_index == me]
        return np.concatenate([np.arange(i * share, (i + 1) * share) for i in mine])

    def split_batch(self, own: np.ndarray, size: int) -> jax.Array:
        """A batch of this size as an array of `spread`, of which each process has its `own_rows`.

        Args:
            own: `[b, ...]`, those rows.
            size: a multiple of the number of devices.
        """
        if not self.spreads_data:
            return self.replicate(own)
        share, rows = size // len(self.devices), self.own_rows(size)
        start_of = {int(row): i for i, row in enumerate(rows)}

        def part(index: Any) -> np.ndarray:
            start = start_of[index[0].start or 0]
            return own[start : start + share]

        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return jax.make_array_from_callback((size, *own.shape[1:]), sharding, part)

    def rows(self, table: jax.Array, index: jax.Array) -> jax.Array:
        """Inside a compiled step: the rows of an array of `spread` that this device computes.

        Args:
            table: `[n, ...]`; under shard_map this device's part of it.
            index: int `[B]`, positions in the whole array, as `shard` returns them.

        Returns:
            `[B, ...]`, split as the index is.
        """
        if not self.spreads_data:
            return table[index]
        if self.strategy == "shard_map":
            return _rows(table, index)
        spread = PartitionSpec(AXIS)
        find = jax.shard_map(_rows, mesh=self.mesh, in_specs=(spread, spread), out_specs=spread)
        found: jax.Array = find(table, index)
        return found

    def shard(self, batch: Any) -> Any:
        """Inside a compiled step: of a whole batch (leading axis B), what this device computes.

        Under jit every device is given its share by the compiler, and shapes stay global; else the
        share is cut out, and shapes become local.
        """
        if self.strategy == "jit":
            sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
            return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding), batch)

        def share(x: jax.Array) -> jax.Array:
            size = x.shape[0] // len(self.devices)
            return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXIS) * size, size)

        return jax.tree.map(share, batch)

    def any_of(self, wishes: jax.Array) -> jax.Array:
        """Inside a compiled step: whether any element of an array of `one_each` is true."""
        found = jnp.any(wishes)
        if self.strategy != "shard_map":
            return found
        return jax.lax.pmax(found.astype(jnp.int32), AXIS) > 0

    def compile(
        self, step: Callable[..., Any], are_spread: Sequence[Any] = ()
    ) -> Callable[..., Any]:
        """Compiles `step(state, *inputs) -> (state, outputs)`; the state's memory is reused.

        The inputs reach every device whole (so give them whole, or through `replicate`), but for
        arrays of `spread`: the step takes its share of a batch with `shard`, and rows of such an
        array with `rows`. The state given is consumed.

        Args:
            step: pure.
            are_spread: which arrays are of `spread`: of each input True, False, or a tree of these;
                of those that are left out none is.
        """
        replicated, spread = PartitionSpec(), PartitionSpec(AXIS)
        if self.strategy == "jit":
            whole = NamedSharding(self.mesh, replicated)
            return jax.jit(step, donate_argnums=0, out_shardings=whole)
        if self.strategy == "shard_map":
            known = jax.tree.map(lambda is_spread: (replicated, spread)[is_spread], [*are_spread])

            def on_all(state: Any, *inputs: Any) -> Any:
                specs = (*known, *[replicated] * len(inputs))[: len(inputs)]
                # Values are as under pmap: of each device's own, until they are averaged.
                return jax.shard_map(
                    lambda state, inputs: step(state, *inputs),
                    mesh=self.mesh,
                    in_specs=(replicated, specs),
                    out_specs=replicated,
                    check_vma=False,
                )(state, inputs)

            return jax.jit(on_all, donate_argnums=0)
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


def _everywhere(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """An array on every device, those of other processes included."""
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key):
        data = _everywhere(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    value = np.asarray(leaf)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _rows(part: jax.Array, index: jax.Array) -> jax.Array:
    """On each device: rows of the whole table, of which each device has a part.

    Each looks up what it has of all devices' rows; what it does not have is 0 in the sum.
    """
    wanted = jax.lax.all_gather(index, AXIS, tiled=True)
    local = wanted - jax.lax.axis_index(AXIS) * len(part)
    is_here = (local >= 0) & (local < len(part))
    found = part[jnp.clip(local, 0, len(part) - 1)]
    mine = jnp.where(is_here.reshape(-1, *[1] * (found.ndim - 1)), found, 0)
    rows: jax.Array = jax.lax.psum_scatter(mine, AXIS, tiled=True)
    return rows
