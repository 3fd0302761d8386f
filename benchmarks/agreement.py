"""Whether a device computes what the CPU does: gates, losses, gradients, training and resuming."""

import functools
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ktg_jax as ktg
from benchmarks.task import LEARNING_RATE, SEED
from ktg_jax.cpu.convolution import formulation
from ktg_jax.gates import gate_names
from ktg_jax.named_losses import loss_names
from ktg_jax.outputs import Outputs
from ktg_jax.training.checkpoint import Checkpoints
from ktg_jax.training.per_node import per_node_step

MODELS = ("resnet8", "resnet8", "wrn10_1")
PRECISIONS = ("float32", "default", "bfloat16")
"""float32 with the highest precision of products; what the device does by default (on newer GPUs
TF32); networks in bfloat16, all else as by default."""

ALLOWED = {
    "losses": {"float32": 1e-5, "default": 1e-2},
    "gradients of losses": {"float32": 1e-4, "default": 1e-2},
    "update of four steps": {"float32": 1e-2, "default": 0.1, "bfloat16": 0.5},
}
"""The largest error, |found - expected| / |expected| over all entries, by what and by precision."""

_STEPS = 4
_CLASSES = 10


class Check(NamedTuple):
    """One comparison with the CPU.

    Attributes:
        what: what was compared.
        precision: one of `PRECISIONS`.
        error: |found - expected| / |expected|, norms over all entries.
        allowed: the largest error.
    """

    what: str
    precision: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether it agrees; NaN does not."""
        return self.error <= self.allowed


def checks(device: jax.Device, compilers: int = 1) -> Iterator[Check]:
    """Compares a device with the CPU, each result as soon as it is there.

    The CPU computes with plain `lax.conv`, in float32 with the highest precision.

    Args:
        device: what is compared.
        compilers: how many programs are compiled, and run, at once.
    """
    start, batch = _start()

    def trained(engine: str, precision: str) -> ktg.GraphState:
        with _formulation_of(device):
            return _trained(device, start, batch, engine, precision)

    def reference() -> ktg.GraphState:
        with formulation("xla"):
            return _trained(_cpu(), start, batch, "fused", "float32")

    with ThreadPoolExecutor(compilers) as pool:
        losses = _loss_checks(device, pool)
        expected = pool.submit(reference)
        updates = {
            case: pool.submit(trained, *case)
            for case in (
                *(("fused", precision) for precision in PRECISIONS),
                ("per_node", "float32"),
                ("batched", "float32"),
            )
        }
        yield from losses
        for (engine, precision), found in updates.items():
            error = _update_error(start, found.result(), expected.result())
            allowed = ALLOWED["update of four steps"][precision]
            yield Check(f"update of four steps, {engine}", precision, error, allowed)
    with _formulation_of(device):
        yield from _resume_checks(device, start, batch)


def relative_error(found: Any, expected: Any) -> float:
    """|found - expected| / |expected|, the norms over all entries of all arrays of the trees.

    >>> relative_error([np.array([3.0, 5.0])], [np.array([3.0, 4.0])])
    0.2
    """

    def vector(tree: Any) -> np.ndarray:
        leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
        return np.concatenate(leaves)

    reference = vector(expected)
    return float(np.linalg.norm(vector(found) - reference) / np.linalg.norm(reference))


def precision_of(name: str) -> AbstractContextManager[Any]:
    """What is traced inside computes its products in that precision, one of `PRECISIONS`."""
    return jax.default_matmul_precision("highest") if name == "float32" else nullcontext()


def _cpu() -> jax.Device:
    return jax.devices("cpu")[0]


def _formulation_of(device: jax.Device) -> AbstractContextManager[Any]:
    """On a CPU convolutions as by default there; else what `formulation` decides by itself."""
    return formulation("xla") if device.platform != "cpu" else nullcontext()


def _loss_checks(device: jax.Device, pool: Executor) -> Iterator[Check]:
    """Every gate with the papers' loss, and every loss through a gate, on random outputs.

    What they need is submitted at once.
    """
    rng = np.random.default_rng(SEED)
    outputs = [
        Outputs(
            2 * rng.standard_normal((32, _CLASSES), np.float32),
            tuple(rng.standard_normal((32, s, s, c), np.float32) for s, c in ((8, 8), (4, 16))),
        )
        for _ in range(2)
    ]
    labels = rng.integers(_CLASSES, size=32)
    pair = (ktg.Node("resnet8", "receiver"), ktg.Node("resnet8", "sender"))
    graphs = {
        f"gate {gate}": ktg.Graph(pair, ((ktg.Edge("through"), ktg.Edge(gate)),) * 2)
        for gate in gate_names()
    } | {
        f"loss {loss}": ktg.Graph(
            pair, ((ktg.Edge(), ktg.Edge(loss=loss)), (ktg.Edge(), ktg.Edge()))
        )
        for loss in loss_names(on_labels=False)
    }

    def losses(outputs: Any, labels: Any) -> Any:
        found = {}
        for name, graph in graphs.items():
            gradients, metrics = ktg.graph_gradients(outputs, labels, graph.edge_arrays, 0.25)
            found[name] = metrics["edge_losses"], gradients
        return found

    def computed(to: jax.Device, precision: str) -> Any:
        with precision_of(precision):
            given = jax.device_put((outputs, labels), to)
            return jax.device_get(jax.jit(losses)(*given))

    expected = pool.submit(computed, _cpu(), "float32")
    found = {p: pool.submit(computed, device, p) for p in ("float32", "default")}
    return itertools.chain.from_iterable(
        _worst(expected.result(), future.result(), precision) for precision, future in found.items()
    )


def _worst(expected: Any, found: Any, precision: str) -> Iterator[Check]:
    """Of losses and gradients, by the names of what they are of, those that are furthest off."""
    for i, what in enumerate(("losses", "gradients of losses")):
        errors = {name: relative_error(found[name][i], expected[name][i]) for name in expected}
        worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
        said = f"{what} ({len(errors)}; the largest error: {worst})"
        yield Check(said, precision, errors[worst], ALLOWED[what][precision])


def _graph() -> ktg.Graph:
    nodes = tuple(ktg.Node(model) for model in MODELS)
    gates = (
        ("through", "linear", "correct"),
        ("negative_linear", "through", "through"),
        ("through", "cutoff", "through"),
    )
    return ktg.Graph(nodes, gates)


def _functions(precision: str) -> list[ktg.NodeFns]:
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    return [ktg.build_model(model, _CLASSES, dtype=dtype) for model in MODELS]


def _start() -> tuple[ktg.GraphState, tuple[np.ndarray, np.ndarray]]:
    """The state that all begin with, on the host, and a batch."""
    rng = np.random.default_rng(SEED)
    images = rng.random((32, 16, 16, 3), np.float32)
    with jax.default_device(_cpu()):
        node_fns, key = _functions("float32"), jax.random.key(SEED)
        sample = jnp.asarray(images[:1])
        state = ktg.init_state(_graph(), node_fns, ktg.sgd(LEARNING_RATE), key, sample)
    return jax.device_get(state), (images, rng.integers(_CLASSES, size=32))


def _trained(
    device: jax.Device,
    state: ktg.GraphState,
    batch: tuple[np.ndarray, np.ndarray],
    engine: str,
    precision: str,
    steps: Sequence[int] = range(_STEPS),
) -> ktg.GraphState:
    """The state after some steps on a device, back on the host."""
    images, labels = jax.device_put(batch, device)
    given = {device: images} if engine == "per_node" else images
    state = jax.device_put(state, device)
    edges = jax.device_put(_graph().edge_arrays, device)
    step = _step(device, engine, precision, ktg.cpu_convolution().name)
    with precision_of(precision):
        for k in steps:
            state, _ = step(state, given, labels, edges, np.float32((k + 1) / _STEPS))
    return jax.device_get(state)


@functools.cache
def _step(device: jax.Device, engine: str, precision: str, convolution: str) -> Any:
    """The step, compiled once: a second compilation may choose other algorithms."""
    del convolution  # of which each has a program of its own
    node_fns, optimizer = _functions(precision), ktg.sgd(LEARNING_RATE)
    if engine == "per_node":
        return functools.partial(
            per_node_step,
            placement=(device,) * len(MODELS),
            node_fns=node_fns,
            optimizer=optimizer,
        )
    batched = engine == "batched"
    return jax.jit(
        functools.partial(ktg.train_step, node_fns=node_fns, optimizer=optimizer, batched=batched)
    )


def _update_error(start: ktg.GraphState, found: ktg.GraphState, expected: ktg.GraphState) -> float:
    """The error of what changed: that of parameters or that of statistics, whichever is larger."""

    def changes(state: ktg.GraphState, part: str) -> Any:
        return jax.tree.map(lambda a, b: a - b, getattr(state, part), getattr(start, part))

    return max(
        relative_error(changes(found, part), changes(expected, part))
        for part in ("params", "model_state")
    )


def _resume_checks(
    device: jax.Device, start: ktg.GraphState, batch: tuple[np.ndarray, np.ndarray]
) -> Iterator[Check]:
    """Two steps, a checkpoint on disk, two more: beside four, and beside four once more."""
    whole = _trained(device, start, batch, "fused", "default")
    again = _trained(device, start, batch, "fused", "default")
    half = _trained(device, start, batch, "fused", "default", range(2))
    names = [f"node{i}" for i in range(len(MODELS))]
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        checkpoints.save(1, jax.device_put(half, device), names, None)
        _, read, _ = checkpoints.restore_latest(jax.device_put(half, device), names)
    resumed = _trained(device, read, batch, "fused", "default", range(2, _STEPS))
    # The same program may add in another order each time, and TF32 rounds on from there.
    allowed = ALLOWED["update of four steps"]["default"]
    yield Check("checkpoint read back", "default", relative_error(read, half), 0.0)
    for what, found in (("the same once more", again), ("resumed after two steps", resumed)):
        error = _update_error(start, found, whole)
        yield Check(f"update of four steps, {what}", "default", error, allowed)
