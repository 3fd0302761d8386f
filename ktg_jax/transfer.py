"""The gated losses of all edges of a graph (KTG, section 3).

Node t learns from L_t = sum over s of L[t, s]: what its label edge carries on the diagonal, what
its transfer edges carry elsewhere, each through its gate. Senders are detached, so one backward
pass of sum_t L_t gives every node exactly the gradient of its own loss.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ktg_jax.chunks import TokenBatch, mean_over_chunks, tokens_at_once
from ktg_jax.connectors import connected
from ktg_jax.edge_arrays import PAPER_LOSSES, EdgeArrays, edge_arrays
from ktg_jax.errors import InputError
from ktg_jax.gated_weights import gated_weights
from ktg_jax.gates import CUTOFF, is_cut
from ktg_jax.losses import checked_labels
from ktg_jax.means import shares_of
from ktg_jax.mixed import Mixed, checked_mixed
from ktg_jax.named_losses import NamedLoss, named_loss
from ktg_jax.outputs import Logits, Outputs, all_outputs, detached, filled


def edge_losses(
    logits: Logits,
    labels: ArrayLike,
    gates: ArrayLike | EdgeArrays,
    progress: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    losses: Sequence[str] = PAPER_LOSSES,
    weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
    axis_name: str | None = None,
    connectors: Sequence[Mapping[str, Any]] | None = None,
    mixed: Mixed | None = None,
) -> jax.Array:
    """The gated loss of every edge of a graph.

    Args:
        logits: float `[N, ..., C]`, or a sequence of N arrays `[..., C]`, or of N `Outputs`, whose
            stages losses on stages need; all nodes' outputs from one simultaneous forward pass.
            `...` is the batch's shape, usually `[B]`, of tokens `[B, T]`. A node with other classes
            than the first, whose the labels are, is never right, and is heard by connectors alone.
        labels: int `[...]`, classes in 0..C-1; any other label gives NaN.
        gates: int `[N, N]`, codes of `ktg_jax.gate_names`, or float `[N, N, 4]`, coefficients;
            row = receiver, column = sender, diagonal = label edge. May be traced. Or
            `Graph.edge_arrays`, which also has the temperature, the losses and their weights.
        progress: scalar in [0, 1], training progress k / k_end with the iteration k from 1.
        temperature: T > 0 of the transfer edges, a scalar or float `[N, N]`; label edges have none.
        losses: L names of registered losses. What a label edge carries is on the diagonal alone,
            what a transfer edge carries beside it alone.
        weights: float `[L, N, N]`, of each loss on each edge; None: 1 each. A loss of weight 0 is
            not there: it may not be finite.
        where: bool `[...]`, which samples count; None: all. What does not count may hold anything.
        axis_name: the mapped axis over which the batch is spread; the mean over it of what each
            device returns is then the mean over what counts on all of them.
        connectors: of each node the parameters of those behind it, by their names, where `gates`
            says which edges have one; None: there are none.
        mixed: what is mixed into each sample, of which label edges alone know: who is right, and
            what other losses see, goes by `labels`; None: nothing.

    Returns:
        float32 `[N, N]`; entry `[t, s]` is the mean of the weighted losses over *all* samples that
        count (also for `correct`: not over those alone whose sender is right). Only node t's
        outputs receive a gradient from row t. Samples that a gate weighs 0 add 0 where their loss
        is infinite, and a cut edge sees neither its sender nor its label. Of tokens, losses that
        are one number a token are computed chunk by chunk, so that memory does not grow with
        `N x N x B x T x C`.

    Raises:
        InputError: an unknown loss, logits of different shapes and no connector between them, or
            stages that are needed and not there or do not fit.
        AssertionError: other ranks, shapes or dtypes.

    >>> logits = jnp.zeros((2, 4, 10))  # two undecided nodes: they agree, and know nothing
    >>> gates = jnp.zeros((2, 2), int)  # all through
    >>> edge_losses(logits, jnp.arange(4), gates, progress=0.5).round(3).tolist() == [
    ...     [jnp.log(10.0).round(3), 0.0], [0.0, jnp.log(10.0).round(3)]]
    True
    """
    edges = edge_arrays(gates, temperature, losses, weights)
    outputs = _checked_outputs(logits, edges)
    labels = checked_labels(outputs[0].logits, labels)
    chex.assert_rank(labels, outputs[0].logits.ndim - 1)
    if where is not None:
        where = jnp.asarray(where, bool)
        chex.assert_equal_shape([where, labels])
        outputs = tuple(filled(~where, 0.0, output) for output in outputs)
        labels = jnp.where(where, labels, 0)
    if mixed is not None:
        mixed = checked_mixed(mixed, outputs[0].logits, labels, where)
    sample_weights = gated_weights(edges, outputs, labels, progress)
    if where is not None:
        sample_weights *= shares_of(where, axis_name)[None, None]
    batch = TokenBatch(
        tuple(output.logits for output in outputs),
        labels,
        jnp.moveaxis(sample_weights, (0, 1), (-2, -1)),
        mixed,
    )
    return _in_chunks(partial(_total, edges, connectors), edges, outputs, batch)


def _checked_outputs(logits: Logits, edges: EdgeArrays) -> tuple[Outputs, ...]:
    """One output a node; they are of one batch, and of one shape where nothing joins others."""
    outputs = all_outputs(logits)
    n, shapes = len(outputs), [output.logits.shape for output in outputs]
    if len({shape[:-1] for shape in shapes}) > 1:
        raise InputError("logits", shapes, "one batch, the same for all nodes")
    if len(set(shapes)) > 1 and not edges.connectors and isinstance(edges.gates, jax.core.Tracer):
        raise InputError("logits", shapes, "one shape, the same for all nodes without connectors")
    chex.assert_tree_shape_prefix([output.stages for output in outputs], shapes[0][:1])
    chex.assert_shape(edges.gates, (n, n, *jnp.shape(edges.gates)[2:]))
    return outputs


def _in_chunks(
    total_of: Callable[..., jax.Array],
    edges: EdgeArrays,
    outputs: Sequence[Outputs],
    batch: TokenBatch,
) -> jax.Array:
    """The total of all losses; of those that are one number a token, some tokens at a time."""
    everything = range(len(edges.losses))
    if batch.labels.ndim == 1:
        return total_of(everything, outputs, batch)
    size = tokens_at_once(len(outputs), max(z.shape for z in batch.logits))
    if size == batch.labels.shape[1]:
        return total_of(everything, outputs, batch)
    named = [named_loss(name) for name in edges.losses]
    of_tokens = [i for i in everything if named[i].is_per_sample and not named[i].needs_stages]

    def of_chunk(chunk: TokenBatch) -> jax.Array:
        return total_of(of_tokens, [Outputs(z) for z in chunk.logits], chunk)

    whole = total_of([i for i in everything if i not in of_tokens], outputs, batch)
    return whole + mean_over_chunks(of_chunk, batch, size)


def _total(
    edges: EdgeArrays,
    connectors: Sequence[Mapping[str, Any]] | None,
    which: Sequence[int],
    outputs: Sequence[Outputs],
    batch: TokenBatch,
) -> jax.Array:
    """What these of the losses add up to on each edge, `[N, N]`."""
    n, cut = len(outputs), is_cut(edges.gates)
    temperatures = jnp.asarray(edges.temperatures, jnp.float32)
    sample_weights = jnp.moveaxis(batch.sample_weights, (-2, -1), (0, 1))
    differ = len({output.logits.shape for output in outputs}) > 1
    by_pairs = differ or bool(edges.connectors)
    ends = _ends(edges, outputs, connectors) if by_pairs or edges.needs_stages else []
    total = jnp.zeros((n, n), jnp.float32)
    for i in which:
        loss, weight = named_loss(edges.losses[i]), jnp.asarray(edges.weights[i], jnp.float32)
        absent = cut | (weight == 0) | (jnp.eye(n, dtype=bool) != loss.on_labels)
        given = batch.labels, sample_weights, temperatures, absent
        if loss.on_labels:
            found = _on_labels(loss, outputs, *given, batch.mixed)
        elif by_pairs or loss.needs_stages:
            found = _by_pairs(loss, ends, *given, _known_absent(edges, i))
        else:
            found = _by_logits(loss, outputs, *given)
        total += jnp.where(absent, 0.0, weight * found)
    return total


def node_losses(
    logits: Logits,
    labels: ArrayLike,
    gates: ArrayLike | EdgeArrays,
    progress: ArrayLike,
    temperature: ArrayLike = 1.0,
    **options: Any,
) -> jax.Array:
    """The loss of every node, L_t = sum over s of L[t, s]; arguments as for `edge_losses`.

    Returns:
        float32 `[N]`.

    >>> cut = jnp.ones((2, 2), int)
    >>> node_losses(jnp.zeros((2, 4, 10)), jnp.arange(4), cut, progress=0.5).tolist()
    [0.0, 0.0]
    """
    return jnp.sum(edge_losses(logits, labels, gates, progress, temperature, **options), axis=1)


def graph_loss(
    logits: Logits,
    labels: ArrayLike,
    gates: ArrayLike | EdgeArrays,
    progress: ArrayLike,
    temperature: ArrayLike = 1.0,
    **options: Any,
) -> jax.Array:
    """The sum of all nodes' losses; arguments as for `edge_losses`.

    Since senders are detached, its gradient with respect to node t's logits is exactly that of
    node t's own loss.

    Returns:
        float32 scalar `[]`.

    >>> logits, labels, through = jnp.zeros((1, 1, 2)), jnp.array([1]), jnp.array([[0]])
    >>> jax.grad(graph_loss)(logits, labels, through, 1.0).tolist()  # softmax minus one-hot
    [[[0.5, -0.5]]]
    """
    return jnp.sum(node_losses(logits, labels, gates, progress, temperature, **options))


# A cut edge sees zeros in place of both its ends: 0 times the loss of a sender that has diverged
# would be NaN, and a cut edge must be as good as none.


def _on_labels(
    loss: NamedLoss,
    outputs: Sequence[Outputs],
    labels: jax.Array,
    sample_weights: jax.Array,
    temperatures: jax.Array,
    absent: jax.Array,
    mixed: Mixed | None,
) -> jax.Array:
    """The loss of each label edge, on the diagonal of `[N, N]`."""
    parts: list[tuple[jax.Array, Any]] = [(labels, 1.0)]
    if mixed is not None:
        parts = [(labels, mixed.share), (mixed.labels, 1 - mixed.share)]
    found = []
    for i, output in enumerate(outputs):
        receiver = filled(absent[i, i], 0.0, output)
        total = jnp.zeros((), jnp.float32)
        for of_part, share in parts:
            seen = jnp.where(absent[i, i], 0, of_part)
            weights = sample_weights[i, i] * share
            total += loss.function(receiver, detached(receiver), seen, weights, temperatures[i, i])
        found.append(total)
    return jnp.diag(jnp.stack(found))


def _by_logits(
    loss: NamedLoss,
    outputs: Sequence[Outputs],
    labels: jax.Array,
    sample_weights: jax.Array,
    temperatures: jax.Array,
    absent: jax.Array,
) -> jax.Array:
    """The loss of each transfer edge, `[N, N]`, all pairs of nodes at once."""

    def of_edge(receiver: Any, sender: Any, weights: Any, temperature: Any, is_absent: Any) -> Any:
        receiver, sender = (filled(is_absent, 0.0, Outputs(end)) for end in (receiver, sender))
        seen = jnp.where(is_absent, 0, labels)
        return loss.function(receiver, sender, seen, weights, temperature)

    logits = jnp.stack([output.logits for output in outputs])
    of_row = jax.vmap(of_edge, in_axes=(None, 0, 0, 0, 0))
    of_all = jax.vmap(of_row, in_axes=(0, None, 0, 0, 0))
    return of_all(logits, jax.lax.stop_gradient(logits), sample_weights, temperatures, absent)


def _ends(
    edges: EdgeArrays,
    outputs: Sequence[Outputs],
    connectors: Sequence[Mapping[str, Any]] | None,
) -> list[list[tuple[Outputs, Outputs]]]:
    """What the two ends of each edge put out, `[receiver][sender]`, behind connectors."""
    ends = [[(receiver, detached(sender)) for sender in outputs] for receiver in outputs]
    for each in edges.connectors:
        behind = connectors[each.receiver] if connectors else {}
        if each.name not in behind:
            allowed = f"the parameters of the one from {each.name} to node {each.receiver}"
            raise InputError("connectors", sorted(behind), allowed)
        receiver, sender = ends[each.receiver][each.sender]
        joined = connected(behind[each.name], receiver, sender)
        ends[each.receiver][each.sender] = joined, sender
    return ends


def _by_pairs(
    loss: NamedLoss,
    ends: Sequence[Sequence[tuple[Outputs, Outputs]]],
    labels: jax.Array,
    sample_weights: jax.Array,
    temperatures: jax.Array,
    absent: jax.Array,
    known_absent: np.ndarray | None,
) -> jax.Array:
    """The loss of each transfer edge, `[N, N]`, pair by pair: they may differ in shape."""

    def of_edge(t: int, s: int) -> jax.Array:
        receiver, sender = ends[t][s]
        if s == t or (known_absent is not None and known_absent[t, s]):
            return jnp.zeros((), jnp.float32)
        receiver, sender = (filled(absent[t, s], 0.0, end) for end in (receiver, sender))
        try:
            if not loss.needs_stages:
                _check_same_classes(receiver, sender)
            seen = jnp.where(absent[t, s], 0, labels)
            given = (receiver, sender, seen, sample_weights[t, s], temperatures[t, s])
            return loss.function(*given)
        except InputError as error:
            if known_absent is None:
                # It counts only where the edge carries the loss.
                return jnp.full((), jnp.nan, jnp.float32)
            where = f"node {s} as seen by node {t}: {error.field}"
            raise InputError(where, error.value, error.allowed) from None

    nodes = range(len(ends))
    return jnp.stack([jnp.stack([of_edge(t, s) for s in nodes]) for t in nodes])


def _check_same_classes(receiver: Outputs, sender: Outputs) -> None:
    ours, theirs = (end.logits.shape[-1] for end in (receiver, sender))
    if ours != theirs:
        allowed = f"{ours}, the receiver's, or an edge with a connector such as linear"
        raise InputError("classes", theirs, allowed)


def _known_absent(edges: EdgeArrays, loss: int) -> np.ndarray | None:
    """Which edges do not carry a loss, bool `[N, N]`; None: gates or weights are traced."""
    if isinstance(edges.gates, jax.core.Tracer) or isinstance(edges.weights, jax.core.Tracer):
        return None
    gates = np.asarray(edges.gates)
    cut = gates == CUTOFF if gates.ndim == 2 else (gates == 0).all(axis=-1)
    return cut | (np.asarray(edges.weights)[loss] == 0)
