"""The training step of a graph, and the three pure pieces that it is made of.

`node_forward` (a node), `graph_gradients` (the whole graph, on what the nodes put out) and
`node_update` (a node) are all there is to a step. `train_step` composes them in one program; since
nodes meet only in what they put out, they can as well be compiled apart or placed on devices of
their own.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from ktg_jax.errors import InputError
from ktg_jax.gates import CUTOFF
from ktg_jax.losses import cross_entropy, edge_losses, is_correct
from ktg_jax.node_terms import Priors, checked_priors, distance_metrics
from ktg_jax.nodes import NodeFns, PyTree, StageOutputs
from ktg_jax.outputs import Shown, check_logits, check_pair, errors_of
from ktg_jax.pixels import check_floats
from ktg_jax.stage_losses import EdgeWeights, Stages, stage_edge_losses
from ktg_jax.state import GraphState
from ktg_jax.streams import batch_spread_over
from ktg_jax.updates import check_states, node_update

Metrics = dict[str, jax.Array]


KL_ALONE = EdgeWeights()
"""The paper's: transfer edges carry the divergence of logits, and nothing else."""


def node_forward(
    params: PyTree,
    model_state: PyTree,
    images: jax.Array,
    *,
    fns: NodeFns,
    frozen: bool = False,
    with_stages: bool = False,
) -> tuple[jax.Array | StageOutputs, PyTree]:
    """A node's forward pass in training.

    Args:
        params: the node's parameters.
        model_state: the node's model state.
        images: float `[B, H, W, C]`, as the network is to see them: the experiments divide uint8
            by 255.
        fns: the node's functions.
        frozen: run with the stored statistics and change nothing.
        with_stages: return the stages' outputs, too.

    Returns:
        The logits, float `[B, classes]`, and the new model state. With stages, in place of the
        logits a pair of them and a float `[B, h, w, C]` for each stage.

    Raises:
        InputError: images that are no floats, stages of a network that does not name them, or a
            network that does not return logits `[B, classes]` of a float dtype.

    >>> import ktg_jax as ktg
    >>> fns = ktg.build_model("cnn", num_classes=10)
    >>> params, model_state = fns.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    >>> logits, model_state = node_forward(params, model_state, jnp.ones((4, 8, 8, 1)), fns=fns)
    >>> logits.shape
    (4, 10)
    """
    check_floats(images)
    if with_stages and fns.stages is None:
        raise InputError("stages", None, "a network that names its stages (NodeFns.stages)")
    forward = fns.stages if with_stages and fns.stages is not None else fns.apply
    made = forward(params, model_state, images, not frozen)
    check_pair(made, "stages" if with_stages else "apply", "what it puts out and the model state")
    output, new_model_state = made
    if with_stages:
        check_pair(output, "stages", "logits and stage outputs")
        output = output[0], tuple(output[1])
    check_logits(output[0] if with_stages else output, len(images))
    return output, model_state if frozen else new_model_state


def graph_gradients(
    logits: Sequence[jax.Array],
    labels: ArrayLike,
    gates: ArrayLike,
    progress: ArrayLike,
    temperature: ArrayLike = 1.0,
    stages: Sequence[Stages] | None = None,
    edge_weights: EdgeWeights = KL_ALONE,
) -> tuple[tuple[Any, ...], Metrics]:
    """Each node's own loss and its gradient with respect to what that node puts out.

    Args:
        logits: N arrays, float `[B, C]`.
        labels: int `[B]`.
        gates: int `[N, N]`, as for `edge_losses`.
        progress: scalar in [0, 1], as for `edge_losses`.
        temperature: scalar T > 0.
        stages: the stage outputs of each node, where the edges carry losses on them.
        edge_weights: what transfer edges carry; Python numbers.

    Returns:
        N gradients in the shape and dtype of the logits, or with stages of the pairs that
        `node_forward` returns; and metrics: `loss` `[N]`, `accuracy` `[N]`, `edge_losses`
        `[N, N]`, all float32. Labels that are no class, and logits of -inf: as for `edge_losses`.

    Raises:
        InputError: stages that are needed and not given, or that do not fit each other; logits of
            different shapes.
        AssertionError: other ranks, shapes or dtypes, as for `edge_losses`.

    >>> logits = [jnp.zeros((1, 2)), jnp.zeros((1, 2))]
    >>> gradients, metrics = graph_gradients(logits, jnp.array([0]), jnp.zeros((2, 2), int), 1.0)
    >>> gradients[0].tolist(), metrics["accuracy"].tolist()
    ([[-0.5, 0.5]], [1.0, 1.0])
    """
    if edge_weights.needs_stages and stages is None:
        raise InputError("stages", None, "the stage outputs of each node")
    if len({z.shape for z in logits}) > 1:
        raise InputError("logits", list(map(Shown, logits)), "one shape, the same for all nodes")
    on_label = jnp.eye(len(logits), dtype=bool)
    # A divergence of weight 0 is cut off, not multiplied by 0: it may not be finite.
    kl_gates = gates if edge_weights.kl else jnp.where(on_label, gates, CUTOFF)

    def loss_of(
        logits: tuple[jax.Array, ...], stages: tuple[Any, ...]
    ) -> tuple[jax.Array, jax.Array]:
        losses = edge_losses(logits, labels, kl_gates, progress, temperature)
        losses *= jnp.where(on_label, 1.0, edge_weights.kl)
        if edge_weights.needs_stages:
            losses += stage_edge_losses(stages, logits, labels, gates, progress, edge_weights)
        return jnp.sum(losses), losses

    outputs = tuple(logits), tuple(map(tuple, stages or ()))
    gradients: tuple[Any, ...]
    (gradients, of_stages), losses = jax.grad(loss_of, (0, 1), has_aux=True)(*outputs)
    if stages is not None:
        gradients = tuple(zip(gradients, of_stages, strict=True))
    accuracy = jnp.stack([jnp.mean(is_correct(z, labels), dtype=jnp.float32) for z in logits])
    metrics = {"loss": jnp.sum(losses, axis=1), "accuracy": accuracy, "edge_losses": losses}
    return gradients, metrics


def train_step(
    state: GraphState,
    images: jax.Array,
    labels: ArrayLike,
    gates: ArrayLike,
    progress: ArrayLike,
    *,
    node_fns: Sequence[NodeFns],
    optimizer: optax.GradientTransformation,
    temperature: ArrayLike = 1.0,
    axis_name: str | None = None,
    priors: Priors | None = None,
    edge_weights: EdgeWeights = KL_ALONE,
) -> tuple[GraphState, Metrics]:
    """One update of every node at once, from one forward and one backward pass. Pure.

    The models (`node_fns`) and the set of frozen nodes (the structure of `state`) are static; the
    gates are data, so one compiled program serves every graph over the same models.

    Args:
        state: from `init_state`.
        images: float `[B, H, W, C]`, as for `node_forward`.
        labels: int `[B]`.
        gates: int `[N, N]`, `Graph.gate_codes`. They gate losses; what freezes a node is the
            state alone.
        progress: scalar in (0, 1]; the k-th update of k_end has k / k_end.
        node_fns: one a node.
        optimizer: as given to `init_state`. One that asks for `value` is given the node's own
            loss, that of its edges in the whole batch.
        temperature: `Graph.temperature`.
        axis_name: the mapped axis over which the batch is spread under `jax.pmap`; the update is
            then that of the whole batch, of which each device's share has random numbers of its
            own.
        priors: one a node, or None where it has none, as `with_priors` returns them; they add to
            the gradients of their own nodes, and to nothing else. None: no node has one.
        edge_weights: `Graph.edge_weights`, what transfer edges carry; Python numbers. Losses on
            stage outputs need models that name their stages.

    Returns:
        The new state and the metrics of `graph_gradients`, in which the losses are those of the
        edges. With priors also `prior_distance`, float32 `[N, G]`: how far each stage of each node
        was from its prior before the update; NaN where there is none (-1 under
        `jax_debug_nans`). Nothing of a frozen node changes.

    Raises:
        InputError: images that are no floats; a prior of a frozen node or of another student, or
            not one entry a node; stages that are needed and not there, or do not fit each other; a
            network whose logits are not float `[B, classes]`, the same for all; an optimiser that
            asks for more than `value`, or whose state is None where the state, made by hand, has
            None for every node.

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
    check_states(state.opt_state, state.params, optimizer)
    outputs, pullbacks, model_state = [], [], []
    for i, fns in enumerate(node_fns):
        frozen = i in state.frozen
        forward = partial(
            node_forward,
            model_state=state.model_state[i],
            images=images,
            fns=fns,
            frozen=frozen,
            with_stages=edge_weights.needs_stages,
        )
        scope, where = jax.named_scope(f"node{i}_forward"), errors_of(f"node {i}")
        with scope, where, batch_spread_over(axis_name):
            if frozen:
                output, new_model_state = forward(state.params[i])
                pullback = None
            else:
                output, pullback, new_model_state = jax.vjp(forward, state.params[i], has_aux=True)
        outputs.append(output)
        pullbacks.append(pullback)
        model_state.append(new_model_state)

    logits, stages = split_outputs(outputs, edge_weights)
    output_gradients, metrics = graph_gradients(
        logits, labels, gates, progress, temperature, stages, edge_weights
    )

    if axis_name is not None:
        metrics = jax.lax.pmean(metrics, axis_name)

    params, opt_state = list(state.params), list(state.opt_state)
    distances: list[jax.Array | None] = [None] * len(priors)
    for i, (pullback, prior) in enumerate(zip(pullbacks, priors, strict=True)):
        if pullback is None:
            continue
        with jax.named_scope(f"node{i}_update"):
            (gradients,) = pullback(output_gradients[i])
            if axis_name is not None:
                gradients = jax.lax.pmean(gradients, axis_name)
            if prior is not None:
                gradients, distances[i] = prior.add_to(gradients, params[i], progress)
            params[i], opt_state[i] = node_update(
                params[i],
                opt_state[i],
                gradients,
                optimizer=optimizer,
                value=metrics["loss"][i],
            )
    metrics |= distance_metrics(distances)
    new_state = GraphState(tuple(params), tuple(model_state), tuple(opt_state), state.step + 1)
    return new_state, metrics


def split_outputs(
    outputs: Sequence[Any], edge_weights: EdgeWeights
) -> tuple[Sequence[jax.Array], Sequence[Stages] | None]:
    """The nodes' logits, and their stages where `node_forward` returned them."""
    if not edge_weights.needs_stages:
        return outputs, None
    return [logits for logits, _ in outputs], [stages for _, stages in outputs]


def eval_step(
    state: GraphState,
    images: jax.Array,
    labels: ArrayLike,
    mask: jax.Array | None = None,
    *,
    node_fns: Sequence[NodeFns],
) -> Metrics:
    """Evaluates every node and their ensemble on a batch, with stored statistics. Pure.

    Args:
        state: from `init_state` or `train_step`.
        images: float `[B, H, W, C]`, as for `node_forward`.
        labels: int `[B]`.
        mask: bool `[B]`, which samples count (a last batch is padded to the others' size); None:
            all.
        node_fns: one a node.

    Returns:
        Sums over the samples that count, so that batches can be added up: `loss` (cross-entropy)
        `[N]`, `correct` `[N]`, `ensemble_loss` `[]` and `ensemble_correct` `[]` of the summed
        logits, and `count` `[]`; float32. What the others hold, labels too, does not matter. The
        losses are NaN where a label that counts is no class.

    Raises:
        InputError: images that are no floats.

    >>> import ktg_jax as ktg
    >>> graph, images = ktg.graphs.mutual(["cnn", "cnn"]), jnp.ones((4, 8, 8, 1))
    >>> node_fns = [ktg.build_model(node.model, num_classes=10) for node in graph.nodes]
    >>> state = ktg.init_state(graph, node_fns, ktg.sgd(), jax.random.key(0), images)
    >>> mask = jnp.array([True, True, True, False])
    >>> float(eval_step(state, images, jnp.arange(4), mask, node_fns=node_fns)["count"])
    3.0
    """
    logits: list[Any] = []
    nodes = zip(node_fns, state.params, state.model_state, strict=True)
    for i, (fns, params, model_state) in enumerate(nodes):
        with errors_of(f"node {i}"):
            output, _ = node_forward(params, model_state, images, fns=fns, frozen=True)
        logits.append(output)
    return eval_sums(logits, labels, mask)


def eval_sums(
    logits: ArrayLike | Sequence[ArrayLike], labels: ArrayLike, mask: ArrayLike | None = None
) -> Metrics:
    """The sums that `eval_step` returns, from the logits of every node, N float `[B, C]`.

    >>> logits = [jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 1.0]])]
    >>> sums = eval_sums(logits, jnp.array([0]))
    >>> sums["correct"].tolist(), float(sums["ensemble_correct"])
    ([1.0, 0.0], 1.0)
    """
    each = logits if isinstance(logits, list | tuple) else jnp.asarray(logits)
    stacked = jnp.stack([jnp.asarray(z, jnp.float32) for z in each])
    counts = jnp.ones(stacked.shape[1], jnp.float32)
    if mask is not None:
        counts = jnp.asarray(mask, jnp.float32)
        chex.assert_shape(counts, stacked.shape[1:2])

    def sums(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss = jnp.where(counts > 0, cross_entropy(z, labels), 0.0)
        return jnp.sum(loss), jnp.sum(is_correct(z, labels).astype(jnp.float32) * counts)

    loss, correct = jax.vmap(sums)(stacked)
    ensemble_loss, ensemble_correct = sums(jnp.sum(stacked, axis=0))
    return {
        "loss": loss,
        "correct": correct,
        "ensemble_loss": ensemble_loss,
        "ensemble_correct": ensemble_correct,
        "count": jnp.sum(counts),
    }
