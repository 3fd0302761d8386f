"""Priors in a graph: each acts on its own node, in the step that also carries every other edge.

That the penalised gradient of the prior is added to a node's own, and to no one else's, lets prior
and posterior knowledge combine with any gates and any number of nodes. Ours; so is the default of
a weight that falls linearly to 0.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ktg_jax.errors import InputError
from ktg_jax.graph.graph import Graph
from ktg_jax.graph.node import PRIOR_KINDS, SCHEDULES, Node
from ktg_jax.io.trees import by_path, replaced
from ktg_jax.models.network import PyTree
from ktg_jax.priors.distribution import distribution_distance
from ktg_jax.priors.files import load_prior
from ktg_jax.priors.matching import match_prior, started
from ktg_jax.priors.prior import Prior, check_prior, prior_distance, recoding_loss
from ktg_jax.priors.recoding import sparse_recoding
from ktg_jax.training.state import GraphState


@flax.struct.dataclass
class NodePrior:
    """A prior and how it acts on a node: what `train_step` takes as one of `priors`. A pytree.

    Attributes:
        prior: matched to the node.
        weight: float scalar `[]` of the prior's loss.
        quantile: the quantile of the sparse recoding penalty, in [0, 1]. Static.
        schedule: "linear": the weight times 1 - progress; "constant": the weight. Static.
        kind: what is added to a node's gradient, times the scheduled weight. "filters": the
            gradient of `prior_loss`, soft-thresholded kernel by kernel; "distribution": that of
            `distribution_distance`, likewise; "l1": that of `recoding_loss`, the quantile being its
            penalty. "task": nothing; the node's own gradient of each of the prior's kernels gives
            way to the soft-thresholded one, by a share of the scheduled weight, at most 1. Static.

    >>> prior = Prior((jnp.ones((3, 3, 1, 2)),), ("stage1_conv.kernel",))
    >>> NodePrior(prior, weight=0.5, quantile=0.9).schedule
    'linear'
    """

    prior: Prior
    weight: ArrayLike = 1.0
    quantile: float = flax.struct.field(pytree_node=False, default=0.7)
    schedule: str = flax.struct.field(pytree_node=False, default="linear")
    kind: str = flax.struct.field(pytree_node=False, default="filters")

    def add_to(
        self, gradients: PyTree, params: PyTree, progress: ArrayLike
    ) -> tuple[PyTree, jax.Array]:
        """Adds the prior's gradient, soft-thresholded and weighted, to the node's own.

        The penalty sees the prior's gradient alone, kernel by kernel; parameters of which the prior
        does not speak keep their gradients as they are. Other kinds: see above.

        Args:
            gradients: the gradients of the node's edges, in the structure of the parameters.
            params: the node's parameters.
            progress: scalar in [0, 1], k / k_end.

        Returns:
            The sum, and the `prior_distance` of each kernel, or its `distribution_distance`,
            float32 `[G]`.

        Raises:
            InputError: a prior of another student, or a bad option.

        >>> params = {"stage1_conv": {"kernel": jnp.array([[[[2.0], [0.0]]]])}}
        >>> prior = NodePrior(Prior((jnp.array([[[[0.0], [1.0]]]]),), ("stage1_conv.kernel",)),
        ...                   weight=3.0, quantile=0.0)
        >>> gradients, distance = prior.add_to(jax.tree.map(jnp.zeros_like, params), params, 0.5)
        >>> gradients["stage1_conv"]["kernel"].ravel().tolist(), distance.tolist()
        ([0.0, -1.5], [2.0])
        """
        for field, names in (("schedule", SCHEDULES), ("kind", PRIOR_KINDS)):
            if getattr(self, field) not in names:
                raise InputError(field, getattr(self, field), ", ".join(names))
        check_prior(params, self.prior)
        leaves, own = by_path(params), by_path(gradients)
        kernels = {path: leaves[path] for path in self.prior.paths}
        share = 1 - jnp.asarray(progress, jnp.float32) if self.schedule == "linear" else 1
        strength = jnp.asarray(self.weight, jnp.float32) * share
        if self.kind == "task":
            before = {path: own[path] for path in self.prior.paths}
            share, distance = jnp.minimum(strength, 1), prior_distance(kernels, self.prior)
            cut = self._penalised(before)
            changed = {path: cut[path] - before[path] for path in before}
        else:
            changed, distance = jax.grad(self._loss, has_aux=True)(kernels)
            share = strength
            if self.kind != "l1":
                changed = self._penalised(changed)
        sums = {
            path: own[path] + (share * gradient).astype(own[path].dtype)
            for path, gradient in changed.items()
        }
        return replaced(gradients, sums), distance

    def _penalised(self, gradients: dict[str, jax.Array]) -> dict[str, jax.Array]:
        penalty = sparse_recoding(self.quantile)
        return penalty.update(gradients, penalty.init(gradients))[0]

    def _loss(self, kernels: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """What the kernels are drawn by, and how far each is from the prior."""
        if self.kind == "distribution":
            distance = distribution_distance(kernels, self.prior)
            return jnp.mean(distance), distance
        distance = prior_distance(kernels, self.prior)
        if self.kind == "l1":
            return recoding_loss(kernels, self.prior, self.quantile), distance
        return jnp.mean(distance), distance


def with_priors(state: GraphState, graph: Graph) -> tuple[GraphState, tuple[NodePrior | None, ...]]:
    """Loads the priors of a graph's nodes and matches each to its node, before any training.

    The result depends on the files and the initial state alone: a resumed run makes the same
    priors from its initial state, not from where it stands.

    Args:
        state: initial, weights included; as `init_state` returns it.
        graph: whose nodes say what their priors are.

    Returns:
        The state, where nodes that are matched by "initialise" start from their priors, and for
        each node its prior, or None, as `train_step` takes them.

    Raises:
        InputError: a file that holds no prior, or one of another student; names the node.

    >>> import ktg_jax as ktg
    >>> graph = ktg.graphs.independent(["cnn", "cnn"])
    >>> node_fns = [ktg.build_model("cnn", num_classes=10)] * 2
    >>> images = jnp.zeros((1, 8, 8, 1))
    >>> state = ktg.init_state(graph, node_fns, ktg.sgd(), jax.random.key(0), images)
    >>> with_priors(state, graph)[1]
    (None, None)
    """
    initial = zip(graph.nodes, state.params, state.model_state, strict=True)
    matched = [
        _matched(f"nodes[{i}].prior", node, *variables)
        for i, (node, *variables) in enumerate(initial)
    ]
    params, model_state, priors = zip(*matched, strict=True)
    return dataclasses.replace(state, params=params, model_state=model_state), priors


def _matched(
    field: str, node: Node, params: PyTree, model_state: PyTree
) -> tuple[PyTree, PyTree, NodePrior | None]:
    """What the node starts from, and its prior."""
    if node.prior is None:
        return params, model_state, None
    try:
        prior = load_prior(node.prior)
    except InputError as error:
        raise InputError(field, node.prior, error.allowed) from None
    try:
        if node.prior_matching == "initialise" and prior.start is not None:
            params, model_state = started(params, model_state, prior)
        else:
            params, prior = match_prior(params, prior, node.prior_matching)
    except InputError as error:
        allowed = f"{error.allowed}; found {error.field} {error.value!r}"
        raise InputError(field, node.prior, allowed) from None
    prior = dataclasses.replace(prior, start=None)  # it has begun
    how = node.prior_weight, node.prior_quantile, node.prior_schedule, node.prior_kind
    return params, model_state, NodePrior(prior, *how)
