"""Our training steps on a device, in variants, each compiled and ready to be timed."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ktg_jax as ktg
from benchmarks.agreement import precision_of
from benchmarks.task import LEARNING_RATE, PROGRESS, SEED, Ready, Task, Variant
from ktg_jax.training.per_node import per_node_step

CAPTURING: dict[str, str | bool] = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONVOLUTION"
}
"""Options of XLA: what it may put into CUDA graphs; by default no convolutions."""


def initial_state(task: Task) -> ktg.GraphState:
    """The state that every variant starts from, on the host."""
    graph = ktg.graphs.mutual(task.models)
    with jax.default_device(jax.devices("cpu")[0]):
        node_fns = [ktg.build_model(model, task.num_classes) for model in task.models]
        images = jnp.zeros((1, *task.image_shape))
        key = jax.random.key(SEED)
        return jax.device_get(ktg.init_state(graph, node_fns, ktg.sgd(LEARNING_RATE), key, images))


def make_ready(task: Task, variant: Variant, state: ktg.GraphState, device: jax.Device) -> Ready:
    """Compiles a variant of ours and makes its first steps.

    Args:
        task: models, batch and shapes; its implementation does not matter.
        variant: one of ours.
        state: from `initial_state`; is not consumed.
        device: where the steps are made.
    """
    dtype = jnp.bfloat16 if variant.precision == "bfloat16" else jnp.float32
    node_fns = [ktg.build_model(model, task.num_classes, dtype=dtype) for model in task.models]
    options = {"node_fns": tuple(node_fns), "optimizer": ktg.sgd(LEARNING_RATE)}
    images, labels = jax.device_put(task.batch(), device)
    gates = jax.device_put(ktg.graphs.mutual(task.models).edge_arrays, device)
    inputs = labels, gates, jax.device_put(np.float32(PROGRESS), device)
    state = jax.device_put(state, device)
    begin = time.perf_counter()
    with precision_of("float32" if variant.precision == "float32" else "default"):
        if variant.engine == "per_node":
            figures: dict[str, float | None] = {"memory_bytes": None, "bytes_accessed": None}
            step: Any = functools.partial(
                per_node_step, placement=(device,) * len(node_fns), **options
            )
            given: Any = {device: images}
        else:
            step, figures = _compiled(variant, state, images, inputs, options)
            given = images
        running = _Running(step, state, (given, *inputs))
        running.call()
        losses = np.asarray(running.metrics["loss"], np.float64).reshape(-1, len(node_fns))[0]
    figures["ready_s"] = time.perf_counter() - begin
    return Ready(variant, running.call, running.wait, losses.tolist(), figures)


class _Running:
    """A step and the state that it has come to."""

    def __init__(self, step: Callable[..., Any], state: ktg.GraphState, inputs: Sequence[Any]):
        self._step, self._state, self._inputs = step, state, inputs
        self.metrics: Mapping[str, jax.Array] = {}

    def call(self) -> None:
        self._state, self.metrics = self._step(self._state, *self._inputs)

    def wait(self) -> None:
        jax.block_until_ready((self._state, self.metrics))


def _compiled(
    variant: Variant,
    state: ktg.GraphState,
    images: jax.Array,
    inputs: Sequence[Any],
    options: Mapping[str, Any],
) -> tuple[Callable[..., Any], dict[str, float | None]]:
    """The compiled step, of one or more updates, and what the compiler says of it."""

    def step(state: ktg.GraphState, images: jax.Array, *inputs: Any) -> Any:
        return ktg.train_step(
            state, images, *inputs, batched=variant.engine.startswith("batched"), **options
        )

    def steps(state: ktg.GraphState, images: jax.Array, *inputs: Any) -> Any:
        return jax.lax.scan(
            lambda state, _: step(state, images, *inputs), state, length=variant.steps
        )

    begin = time.perf_counter()
    made = jax.jit(step if variant.steps == 1 else steps, donate_argnums=0)
    lowered = made.lower(state, images, *inputs)
    traced = time.perf_counter()
    is_captured = variant.engine.endswith("captured")
    compiled = lowered.compile(compiler_options=CAPTURING if is_captured else None)
    figures: dict[str, float | None] = {
        "trace_s": traced - begin,
        "compile_s": time.perf_counter() - traced,
        "memory_bytes": None,
        "bytes_accessed": None,
    }
    if (memory := compiled.memory_analysis()) is not None:
        figures["memory_bytes"] = float(
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )
    if variant.steps == 1 and (cost := compiled.cost_analysis()):
        figures["bytes_accessed"] = cost.get("bytes accessed")
    return compiled, figures
