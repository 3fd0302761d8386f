"""Our side of a comparison: a graph's training step under JAX."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ktg_jax as ktg
from benchmarks.task import (
    LEARNING_RATE,
    PROGRESS,
    SEED,
    Figures,
    Implementation,
    Task,
    Unavailable,
    best_matmul,
)
from ktg_jax.cpu.memory import keep_freed_memory
from ktg_jax.models.network import NodeFns
from ktg_jax.training.gradients import Metrics
from ktg_jax.training.per_node import per_node_step
from ktg_jax.training.placement import node_placement, place

Batch = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""Images, labels, gates and progress, as `train_step` takes them."""
Step = Callable[..., tuple[ktg.GraphState, Metrics]]


def initial_state(
    task: Task, node_fns: Sequence[NodeFns], optimizer: optax.GradientTransformation
) -> ktg.GraphState:
    """The state that every implementation starts from."""
    graph = ktg.graphs.mutual(task.models)
    sample = jnp.zeros((1, *task.image_shape))
    return ktg.init_state(graph, node_fns, optimizer, jax.random.key(SEED), sample)


class JaxSession:
    """Ours, as `benchmarks.task.Session` describes it."""

    def __init__(self, task: Task, implementation: Implementation) -> None:
        _check_convolution(implementation.convolution)
        keep_freed_memory()  # as the experiments do
        begin = time.perf_counter()
        node_fns = [ktg.build_model(model, task.num_classes) for model in task.models]
        optimizer = ktg.sgd(LEARNING_RATE)
        state = initial_state(task, node_fns, optimizer)
        images, labels = task.batch()
        gates = ktg.graphs.mutual(task.models).gate_codes
        inputs = (images, labels, gates, np.float32(PROGRESS))
        self._batch: Batch = jax.block_until_ready(jax.device_put(inputs))
        jax.block_until_ready(state)
        init_seconds = time.perf_counter() - begin
        make_step = _fused_step if implementation.engine == "fused" else _per_node_step
        self._step, self._state, figures = make_step(node_fns, optimizer, state, self._batch)
        begin = time.perf_counter()
        self.step()
        first_step_seconds = time.perf_counter() - begin
        self.figures = {"init_s": init_seconds, **figures, "first_step_s": first_step_seconds}

    @property
    def losses(self) -> list[float]:
        """The nodes' losses in the last step."""
        return np.asarray(self._metrics["loss"]).tolist()

    def step(self) -> float:
        """Makes a step and waits for it; returns the seconds in which this thread was busy.

        These are the host's overhead: the step itself runs in XLA's own threads, and waiting for it
        costs nothing.
        """
        begin = time.thread_time()
        self._state, self._metrics = self._step(self._state, *self._batch)
        host_seconds = time.thread_time() - begin
        jax.block_until_ready((self._state, self._metrics))
        return host_seconds

    def loop(self, steps: int) -> None:
        """Makes steps without waiting in between, then waits for the last."""
        for _ in range(steps):
            self._state, self._metrics = self._step(self._state, *self._batch)
        jax.block_until_ready((self._state, self._metrics))

    def matmul_peak(self) -> float:
        """The most FLOP/s of a float32 matrix product with the process's threads."""
        multiply = jax.jit(jnp.matmul)

        def product_of(size: int) -> Callable[[], jax.Array]:
            a = jnp.ones((size, size))
            return lambda: jax.block_until_ready(multiply(a, a))

        return best_matmul(product_of)


def _check_convolution(wanted: str) -> None:
    """Raises Unavailable unless that is what is in use: none is measured under another's name."""
    try:
        used = ktg.cpu_convolution()
    except ktg.InputError as error:
        raise Unavailable(str(error)) from None
    if used.name != wanted:
        raise Unavailable(f"convolutions are {used}, not {wanted}")


Made = tuple[Step, ktg.GraphState, Figures]
"""`step(state, *batch) -> (state, metrics)`, which consumes the state; the state where the step
wants it; and `trace_s`, `compile_s` and `flops`, None where they are not known."""


def _fused_step(
    node_fns: Sequence[NodeFns],
    optimizer: optax.GradientTransformation,
    state: ktg.GraphState,
    batch: Batch,
) -> Made:
    """The whole graph as one program."""
    step = jax.jit(
        partial(ktg.train_step, node_fns=tuple(node_fns), optimizer=optimizer), donate_argnums=0
    )
    begin = time.perf_counter()
    lowered = step.lower(state, *batch)
    traced = time.perf_counter()
    compiled = lowered.compile()
    figures = {"trace_s": traced - begin, "compile_s": time.perf_counter() - traced}
    return compiled, state, figures | {"flops": (compiled.cost_analysis() or {}).get("flops")}


def _per_node_step(
    node_fns: Sequence[NodeFns],
    optimizer: optax.GradientTransformation,
    state: ktg.GraphState,
    batch: Batch,
) -> Made:
    """Node by node, over all devices; what compiling takes is in the first step."""
    devices = jax.local_devices()
    placement = node_placement(node_fns, state, devices, batch[0].shape[1:], len(batch[0]))
    images = {to: jax.device_put(batch[0], to) for to in placement}

    def step(state: ktg.GraphState, _: jax.Array, *rest: jax.Array) -> Any:
        return per_node_step(
            state, images, *rest, node_fns=node_fns, optimizer=optimizer, placement=placement
        )

    return step, place(state, placement), {"trace_s": None, "compile_s": None, "flops": None}
