"""The training step of a graph, and the three pure pieces that it is made of.

`node_forward` (a node), `graph_gradients` (the whole graph, on logits alone) and `node_update` (a
node) are all there is to a step. `train_step` composes them in one program; since nodes meet only
in their logits, they can as well be compiled apart or placed on devices of their own.
"""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from ktg_jax.errors import InputError
from ktg_jax.losses import cross_entropy, edge_losses
from ktg_jax.nodes import NodeFns, PyTree
from ktg_jax.state import GraphState

Metrics = dict[str, jax.Array]


class NodeTerm(Protocol):
    """What steers a node by its own parameters alone, such as `ktg_jax.NodePrior`. A pytree."""

    def add_to(
        self, gradients: PyTree, params: PyTree, progress: ArrayLike
    ) -> tuple[PyTree, jax.Array]:
        """Returns the gradients with its own added, and distances to report, float32 `[G]`."""


Priors = Sequence[NodeTerm | None]


def node_forward(
    params: PyTree, model_state: PyTree, images: jax.Array, *, fns: NodeFns, frozen: bool = False
) -> tuple[jax.Array, PyTree]:
    """A node's forward pass in training.

    Args:
        params: the node's parameters.
        model_state: the node's model state.
        images: float `[B, H, W, C]`.
        fns: the node's functions.
        frozen: run with the stored statistics and change nothing.

    Returns:
        The logits, float `[B, classes]`, and the new model state.

    >>> import ktg_jax as ktg
    >>> fns = ktg.build_model("cnn", num_classes=10)
    >>> params, model_state = fns.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    >>> logits, model_state = node_forward(params, model_state, jnp.ones((4, 8, 8, 1)), fns=fns)
    >>> logits.shape
    (4, 10)
    """
    return fns.apply(params, model_state, images, not frozen)


def graph_gradients(
    logits: Sequence[jax.Array],
    labels: jax.Array,
    gates: ArrayLike,
    progress: ArrayLike,
    temperature: ArrayLike = 1.0,
) -> tuple[tuple[jax.Array, ...], Metrics]:
    """Each node's own loss and its gradient with respect to that node's logits.

    Args:
        logits: N arrays, float `[B, C]`.
        labels: int `[B]`.
        gates: int `[N, N]`, as for `edge_losses`.
        progress: scalar in [0, 1], as for `edge_losses`.
        temperature: scalar T > 0.

    Returns:
        N gradients in the shape and dtype of the logits, and metrics: `loss` `[N]`, `accuracy`
        `[N]`, `edge_losses` `[N, N]`, all float32.

    >>> logits = [jnp.zeros((1, 2)), jnp.zeros((1, 2))]
    >>> gradients, metrics = graph_gradients(logits, jnp.array([0]), jnp.zeros((2, 2), int), 1.0)
    >>> gradients[0].tolist(), metrics["accuracy"].tolist()
    ([[-0.5, 0.5]], [1.0, 1.0])
    """

    def loss_of(logits: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        losses = edge_losses(logits, labels, gates, progress, temperature)
        return jnp.sum(losses), losses

    gradients, losses = jax.grad(loss_of, has_aux=True)(tuple(logits))
    accuracy = jnp.stack([jnp.mean(jnp.argmax(z, axis=-1) == labels) for z in logits])
    metrics = {"loss": jnp.sum(losses, axis=1), "accuracy": accuracy, "edge_losses": losses}
    return gradients, metrics


def node_update(
    params: PyTree,
    opt_state: optax.OptState,
    gradients: PyTree,
    *,
    optimizer: optax.GradientTransformation,
) -> tuple[PyTree, optax.OptState]:
    """A node's update by its own optimiser; returns the new params and optimiser state.

    >>> optimizer = optax.sgd(0.5)
    >>> params = jnp.array([1.0])
    >>> node_update(params, optimizer.init(params), jnp.array([1.0]), optimizer=optimizer)[0]
    Array([0.5], dtype=float32)
    """
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def train_step(
    state: GraphState,
    images: jax.Array,
    labels: jax.Array,
    gates: ArrayLike,
    progress: ArrayLike,
    *,
    node_fns: Sequence[NodeFns],
    optimizer: optax.GradientTransformation,
    temperature: ArrayLike = 1.0,
    axis_name: str | None = None,
    priors: Priors | None = None,
) -> tuple[GraphState, Metrics]:
    """One update of every node at once, from one forward and one backward pass. Pure.

    The models (`node_fns`) and the set of frozen nodes (the structure of `state`) are static; the
    gates are data, so one compiled program serves every graph over the same models.

    Args:
        state: from `init_state`.
        images: float `[B, H, W, C]`.
        labels: int `[B]`.
        gates: int `[N, N]`, `Graph.gate_codes`. They gate losses; what freezes a node is the
            state alone.
        progress: scalar in (0, 1]; the k-th update of k_end has k / k_end.
        node_fns: one a node.
        optimizer: as given to `init_state`.
        temperature: `Graph.temperature`.
        axis_name: the mapped axis over which the batch is spread under `jax.pmap`; the update is
            then that of the whole batch.
        priors: one a node, or None where it has none, as `with_priors` returns them; they add to
            the gradients of their own nodes, and to nothing else. None: no node has one.

    Returns:
        The new state and the metrics of `graph_gradients`, in which the losses are those of the
        edges. With priors also `prior_distance`, float32 `[N, G]`: how far each stage of each node
        was from its prior before the update; NaN where there is none. Nothing of a frozen node
        changes.

    Raises:
        InputError: a prior of a frozen node or of another student, or not one entry a node.

    >>> import ktg_jax as ktg
    >>> graph, optimizer = ktg.graphs.mutual(["cnn", "cnn"]), ktg.sgd(learning_rate=0.1)
    >>> node_fns = [ktg.build_model(node.model, num_classes=10) for node in graph.nodes]
    >>> images, labels = jnp.ones((4, 8, 8, 1)), jnp.arange(4)
    >>> state = ktg.init_state(graph, node_fns, optimizer, jax.random.key(0), images)
    >>> step = jax.jit(partial(train_step, node_fns=node_fns, optimizer=optimizer))
    >>> state, metrics = step(state, images, labels, graph.gate_codes, progress=0.1)
    >>> int(state.step), metrics["edge_losses"].shape
    (1, (2, 2))
    """
    priors = checked_priors(priors, state)
    logits, pullbacks, model_state = [], [], []
    for i, fns in enumerate(node_fns):
        frozen = i in state.frozen
        forward = partial(
            node_forward, model_state=state.model_state[i], images=images, fns=fns, frozen=frozen
        )
        with jax.named_scope(f"node{i}_forward"):
            if frozen:
                z, new_model_state = forward(state.params[i])
                pullback = None
            else:
                z, pullback, new_model_state = jax.vjp(forward, state.params[i], has_aux=True)
        logits.append(z)
        pullbacks.append(pullback)
        model_state.append(new_model_state)

    logit_gradients, metrics = graph_gradients(logits, labels, gates, progress, temperature)

    params, opt_state = list(state.params), list(state.opt_state)
    distances: list[jax.Array | None] = [None] * len(priors)
    for i, (pullback, prior) in enumerate(zip(pullbacks, priors, strict=True)):
        if pullback is None:
            continue
        with jax.named_scope(f"node{i}_update"):
            (gradients,) = pullback(logit_gradients[i])
            if axis_name is not None:
                gradients = jax.lax.pmean(gradients, axis_name)
            if prior is not None:
                gradients, distances[i] = prior.add_to(gradients, params[i], progress)
            params[i], opt_state[i] = node_update(
                params[i], opt_state[i], gradients, optimizer=optimizer
            )
    if axis_name is not None:
        metrics = jax.lax.pmean(metrics, axis_name)
    metrics |= distance_metrics(distances)
    new_state = GraphState(tuple(params), tuple(model_state), tuple(opt_state), state.step + 1)
    return new_state, metrics


def checked_priors(priors: Priors | None, state: GraphState) -> Priors:
    """The priors, one entry a node; raises InputError as `train_step` describes."""
    if priors is None:
        return (None,) * len(state.params)
    if len(priors) != len(state.params):
        raise InputError("priors", len(priors), f"{len(state.params)} entries, one a node")
    for i in state.frozen:
        if priors[i] is not None:
            raise InputError(f"priors[{i}]", type(priors[i]).__name__, "None: the node is frozen")
    return priors


def distance_metrics(distances: Sequence[jax.Array | None]) -> Metrics:
    """The metric `prior_distance` from each node's distances; none where no node has any.

    >>> distance_metrics([None, jnp.array([1.0, 2.0])])["prior_distance"].tolist()
    [[nan, nan], [1.0, 2.0]]
    """
    stages = max((len(distance) for distance in distances if distance is not None), default=0)
    if not stages:
        return {}
    rows = [jnp.full(stages, jnp.nan) if row is None else _padded(row, stages) for row in distances]
    return {"prior_distance": jnp.stack(rows)}


def _padded(row: jax.Array, length: int) -> jax.Array:
    return jnp.pad(row, (0, length - len(row)), constant_values=jnp.nan)


def eval_step(
    state: GraphState,
    images: jax.Array,
    labels: jax.Array,
    mask: jax.Array | None = None,
    *,
    node_fns: Sequence[NodeFns],
) -> Metrics:
    """Evaluates every node and their ensemble on a batch, with stored statistics. Pure.

    Args:
        state: from `init_state` or `train_step`.
        images: float `[B, H, W, C]`.
        labels: int `[B]`.
        mask: bool `[B]`, which samples count (a last batch is padded to the others' size); None:
            all.
        node_fns: one a node.

    Returns:
        Sums over the samples that count, so that batches can be added up: `loss` (cross-entropy)
        `[N]`, `correct` `[N]`, `ensemble_loss` `[]` and `ensemble_correct` `[]` of the summed
        logits, and `count` `[]`; float32.

    >>> import ktg_jax as ktg
    >>> graph, images = ktg.graphs.mutual(["cnn", "cnn"]), jnp.ones((4, 8, 8, 1))
    >>> node_fns = [ktg.build_model(node.model, num_classes=10) for node in graph.nodes]
    >>> state = ktg.init_state(graph, node_fns, ktg.sgd(), jax.random.key(0), images)
    >>> mask = jnp.array([True, True, True, False])
    >>> float(eval_step(state, images, jnp.arange(4), mask, node_fns=node_fns)["count"])
    3.0
    """
    logits = tuple(
        fns.apply(params, model_state, images, False)[0]
        for fns, params, model_state in zip(node_fns, state.params, state.model_state, strict=True)
    )
    return eval_sums(logits, labels, mask)


def eval_sums(
    logits: Sequence[jax.Array], labels: jax.Array, mask: jax.Array | None = None
) -> Metrics:
    """The sums that `eval_step` returns, from the logits of every node, N float `[B, C]`.

    >>> logits = [jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 1.0]])]
    >>> sums = eval_sums(logits, jnp.array([0]))
    >>> sums["correct"].tolist(), float(sums["ensemble_correct"])
    ([1.0, 0.0], 1.0)
    """
    counts = jnp.ones(labels.shape) if mask is None else jnp.asarray(mask, jnp.float32)
    stacked = jnp.stack([z.astype(jnp.float32) for z in logits])

    def sums(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss = jnp.where(counts > 0, cross_entropy(z, labels), 0.0)
        return jnp.sum(loss), jnp.sum((jnp.argmax(z, axis=-1) == labels) * counts)

    loss, correct = jax.vmap(sums)(stacked)
    ensemble_loss, ensemble_correct = sums(jnp.sum(stacked, axis=0))
    return {
        "loss": loss,
        "correct": correct,
        "ensemble_loss": ensemble_loss,
        "ensemble_correct": ensemble_correct,
        "count": jnp.sum(counts),
    }
