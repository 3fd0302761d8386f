"""Evaluation: every node and their ensemble on all images, in batches of sums.

`eval_step` is the reference; `make_evaluator` compiles it for a whole graph.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ktg_jax.data.streamed import StreamedImages
from ktg_jax.graph.derived import Ensemble
from ktg_jax.losses import checked_labels, cross_entropy, is_correct
from ktg_jax.models.network import NO_NETWORK, NodeFns
from ktg_jax.models.pixels import to_float
from ktg_jax.models.returned import check_for_labels, errors_of
from ktg_jax.training.batches import Arrays, FindRows, Views
from ktg_jax.training.derived import with_ensembles
from ktg_jax.training.forward import node_forward
from ktg_jax.training.gradients import Metrics
from ktg_jax.training.node_terms import absent
from ktg_jax.training.parallel import Parallel
from ktg_jax.training.state import GraphState
from ktg_jax.training.streaming import EvaluationFeed

Means = dict[str, np.ndarray]
"""Float64 on the host: `loss` `[N]`, `accuracy` `[N]`, and of the summed logits `ensemble_loss` and
`ensemble_accuracy`, `[]`."""

Evaluator = Callable[[GraphState, Arrays], Means]


def eval_step(
    state: GraphState,
    images: jax.Array,
    labels: ArrayLike,
    mask: jax.Array | None = None,
    *,
    node_fns: Sequence[NodeFns],
    ensembles: tuple[Ensemble, ...] = (),
) -> Metrics:
    """Evaluates every node and their ensemble on a batch, with stored statistics. Pure.

    Args:
        state: from `init_state` or `train_step`.
        images: float `[B, H, W, C]`, as for `node_forward`.
        labels: int `[B]`, of tokens `[B, T]`.
        mask: bool of the labels' shape, which samples count (a last batch is padded to the others'
            size); None: all.
        node_fns: one a node.
        ensembles: nodes that are ensembles, `Graph.derived.ensembles`.

    Returns:
        Sums over the samples that count, so that batches can be added up: `loss` (cross-entropy)
        `[N]`, `correct` `[N]`, `ensemble_loss` `[]` and `ensemble_correct` `[]` of the summed
        logits, and `count` `[]`; float32. What the others hold, labels too, does not matter. The
        losses are NaN where a label that counts is no class. A recorded node has nothing to be
        evaluated, nor has one of other classes than the first: its numbers are NaN (-1 under
        `jax_debug_nans`), the ensemble is the others'.

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
        if fns == NO_NETWORK:
            logits.append(None)
            continue
        with errors_of(f"node {i}"):
            output, _ = node_forward(params, model_state, images, fns=fns, frozen=True)
            check_for_labels(output, labels)
        logits.append(output)
    return eval_sums(logits, labels, mask, ensembles)


def eval_sums(
    logits: ArrayLike | Sequence[ArrayLike | None],
    labels: ArrayLike,
    mask: ArrayLike | None = None,
    ensembles: tuple[Ensemble, ...] = (),
) -> Metrics:
    """The sums that `eval_step` returns, from the logits of every node, N float `[B, C]`.

    None in place of a node's logits stands for a recorded node, and for an ensemble; logits of
    other classes than the first node's are as none. The last two sums are of the logits of all
    networks, no ensembles among them.

    >>> logits = [jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 1.0]])]
    >>> sums = eval_sums(logits, jnp.array([0]))
    >>> sums["correct"].tolist(), float(sums["ensemble_correct"])
    ([1.0, 0.0], 1.0)
    """
    each = logits if isinstance(logits, list | tuple) else list(jnp.asarray(logits))
    networks = [i for i, z in enumerate(each) if z is not None]
    each = with_ensembles(each, ensembles)
    classes = next(jnp.shape(z)[-1] for z in each if z is not None)
    each = [None if z is None or jnp.shape(z)[-1] != classes else z for z in each]
    networks = [i for i in networks if each[i] is not None]
    there = [i for i, z in enumerate(each) if z is not None]
    stacked = jnp.stack([jnp.asarray(each[i], jnp.float32) for i in there])
    counts = jnp.ones(stacked.shape[1:-1], jnp.float32)
    if mask is not None:
        counts = jnp.asarray(mask, jnp.float32)
        chex.assert_shape(counts, stacked.shape[1:-1])
        labels = jnp.where(counts > 0, checked_labels(stacked, labels), 0)

    def sums(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss = jnp.where(counts > 0, cross_entropy(z, labels), 0.0)
        return jnp.sum(loss), jnp.sum(is_correct(z, labels).astype(jnp.float32) * counts)

    def of_all(found: jax.Array) -> jax.Array:
        if len(there) == len(each):
            return found
        return jnp.full(len(each), absent(), jnp.float32).at[jnp.array(there)].set(found)

    loss, correct = jax.vmap(sums)(stacked)
    of_networks = stacked[jnp.array([there.index(i) for i in networks])]
    ensemble_loss, ensemble_correct = sums(jnp.sum(of_networks, axis=0))
    return {
        "loss": of_all(loss),
        "correct": of_all(correct),
        "ensemble_loss": ensemble_loss,
        "ensemble_correct": ensemble_correct,
        "count": jnp.sum(counts),
    }


def evaluation_batch_size(image_shape: Sequence[int], platform: str) -> int:
    """Images `[H, W, C]` of an evaluation batch: many where memory allows, few in a CPU's caches.

    >>> evaluation_batch_size((32, 32, 3), "cpu"), evaluation_batch_size((32, 32, 3), "gpu")
    (512, 4096)
    """
    pixels = 2**19 if platform == "cpu" else 2**22
    return min(max(pixels // math.prod(image_shape[:2]), 16), 4096)


def make_evaluator(
    node_fns: Sequence[NodeFns],
    parallel: Parallel,
    batch_size: int = 500,
    ensembles: tuple[Ensemble, ...] = (),
) -> Evaluator:
    """Compiles `evaluate(state, data)`: every node and their ensemble on all images.

    Args:
        node_fns: one a node.
        parallel: whose devices are used; data are to be spread over them (`Arrays.spread_over`).
        batch_size: rounded up to a multiple of the number of devices.
        ensembles: those among the nodes.

    Returns:
        A function that returns the `Means`.
    """
    # Stored statistics need no averaging over devices: jit serves both strategies here.
    mesh = Parallel("jit", parallel.devices)
    batch_size = -(-batch_size // len(mesh.devices)) * len(mesh.devices)

    @jax.jit
    def evaluate_batch(state: GraphState, data: Arrays, start: jax.Array) -> Metrics:
        position = mesh.shard(start + jnp.arange(batch_size))
        batch = evaluation_batch(data, position, mesh.rows if parallel.spreads_data else None)
        return eval_step(state, *batch, node_fns=node_fns, ensembles=ensembles)

    rows = parallel.own_rows(batch_size)
    batches = evaluation_batches(batch_size, rows, lambda x: parallel.split_batch(x, batch_size))

    def evaluate(state: GraphState, data: Arrays) -> Means:
        return means_of([evaluate_batch(state, *batch) for batch in batches(data)])

    return evaluate


def evaluation_batches(
    size: int, rows: np.ndarray | None, place: Callable[[np.ndarray], Any]
) -> Callable[[Arrays], Iterator[tuple[Any, int]]]:
    """A function that gives the batches of an evaluation, of streamed images too.

    Args:
        size: of a batch.
        rows: as of `EvaluationFeed`.
        place: puts these rows of streamed images where they are evaluated.

    Returns:
        `batches(data)`, which yields for each batch the data to give to `evaluation_batch`, and
        where it starts.
    """
    feeds: dict[StreamedImages, EvaluationFeed] = {}

    def batches(data: Arrays) -> Iterator[tuple[Any, int]]:
        starts = range(0, len(data.labels), size)
        if not data.is_streamed:
            yield from ((data, start) for start in starts)
            return
        feed = feeds.setdefault(data.images, EvaluationFeed(data.images, size, rows))
        for start, views in zip(starts, feed, strict=True):
            yield data._replace(images=jax.tree.map(place, views)), start

    return batches


def evaluation_batch(
    data: Arrays, position: jax.Array, rows: FindRows | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Images as floats, labels and a mask for `eval_step`; positions beyond the data do not count.

    Args:
        data: images, and labels of these alone; in place of all images the `Views` of the batch.
        position: int `[B]`.
        rows: as for `take_batch`.

    >>> data = Arrays(jnp.zeros((3, 1, 1, 1), jnp.uint8), jnp.array([5, 6, 7]))
    >>> _, labels, mask = evaluation_batch(data, jnp.array([2, 3]))
    >>> labels.tolist(), mask.tolist()
    ([7, 7], [True, False])
    """
    index = jnp.minimum(position, len(data.labels) - 1)
    if isinstance(data.images, Views):
        images = data.images.images
    else:
        images = data.images[index] if rows is None else rows(data.images, index)
    return to_float(images), data.labels[index], position < len(data.labels)


def means_of(batches: Sequence[Metrics]) -> Means:
    """Means over all samples, float64 on the host, from each batch's sums by `eval_step`."""
    sums = jax.device_get(batches)
    total = {key: np.sum([batch[key] for batch in sums], 0, np.float64) for key in sums[0]}
    count = total.pop("count")
    return {key.replace("correct", "accuracy"): np.asarray(total[key] / count) for key in total}
