"""The losses of distillation, against other ways to write them, and at their limits."""

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import ktg_jax as ktg
from ktg_jax import Edge, Graph, InputError, Outputs
from ktg_jax.named_losses import checked_loss, named_loss

RNG = np.random.default_rng(0)
RECEIVER = RNG.standard_normal((6, 5)).astype(np.float32)
SENDER = (2 * RNG.standard_normal((6, 5))).astype(np.float32)
LABELS = np.array([0, 3, 4, 1, 2, 2], np.int32)
STAGES = [RNG.standard_normal((6, 4, 4, 3)), RNG.standard_normal((6, 2, 2, 8))]
OTHER_STAGES = [RNG.standard_normal((6, 4, 4, 5)), RNG.standard_normal((6, 2, 2, 8))]
T = 2.0


def softmax(z: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    e = np.exp(np.float64(z) / temperature)
    return np.asarray(e / e.sum(-1, keepdims=True))


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.asarray((p * np.log(p / q)).sum(-1))


def jensen_shannon(beta: float) -> np.ndarray:
    p, q = softmax(SENDER, T), softmax(RECEIVER, T)
    m = beta * p + (1 - beta) * q
    return T**2 * (beta * kl(p, m) + (1 - beta) * kl(q, m))


def decoupled(alpha: float, beta: float) -> np.ndarray:
    """By hand for each sample, classes left out one by one."""
    found = []
    for s, r, y in zip(softmax(SENDER, T), softmax(RECEIVER, T), LABELS, strict=True):
        others = [c for c in range(5) if c != y]
        target = kl(np.array([s[y], 1 - s[y]]), np.array([r[y], 1 - r[y]]))
        rest = kl(s[others] / s[others].sum(), r[others] / r[others].sum())
        found.append(alpha * target + beta * rest)
    return T**2 * np.array(found)


def standardised() -> np.ndarray:
    ends = [(z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True) for z in (SENDER, RECEIVER)]
    p, q = (softmax(z, T) for z in ends)
    return T**2 * kl(p, q)


def cosine() -> np.ndarray:
    p, q = softmax(SENDER, T), softmax(RECEIVER, T)
    return np.array(
        [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(p, q, strict=True)]
    )


def dist(beta: float, gamma: float) -> float:
    p, q = softmax(SENDER, T), softmax(RECEIVER, T)
    inter = np.mean([1 - np.corrcoef(p[i], q[i])[0, 1] for i in range(6)])
    intra = np.mean([1 - np.corrcoef(p[:, c], q[:, c])[0, 1] for c in range(5)])
    return T**2 * (beta * inter + gamma * intra)


PER_SAMPLE: dict[str, tuple[Callable[..., Any], np.ndarray]] = {
    "jensen_shannon": (ktg.jensen_shannon_divergence, jensen_shannon(0.5)),
    "decoupled_kl": (
        lambda r, s, t, **how: ktg.decoupled_kl_divergence(r, s, LABELS, t, **how),
        decoupled(1, 8),
    ),
    "standardised_kl": (ktg.standardised_kl_divergence, standardised()),
    "mse": (
        lambda r, s, t, **how: ktg.logit_distance(r, s, **how),
        np.mean((np.float64(RECEIVER) - SENDER) ** 2, axis=1),
    ),
    "minus_probability": (ktg.probability_cosine, cosine()),
}


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_values_and_gradients_are_those_of_another_formulation(name: str) -> None:
    loss, expected = PER_SAMPLE[name]
    np.testing.assert_allclose(loss(RECEIVER, SENDER, T), expected, rtol=2e-5)
    how: dict[str, Any] = {"order": 1, "modes": "rev", "eps": 1e-2, "rtol": 2e-2, "atol": 2e-2}
    check_grads(lambda z: jnp.mean(loss(z, SENDER, T)), (RECEIVER,), **how)
    to_sender = jax.grad(lambda z: loss(RECEIVER, z, T).sum())(SENDER)
    np.testing.assert_array_equal(to_sender, np.zeros_like(SENDER))
    attached = partial(loss, stop_sender_gradient=False)
    assert np.any(jax.grad(lambda z: attached(RECEIVER, z, T).sum())(SENDER) != 0)


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_nothing_is_lost_in_huge_logits_and_equal_ones(name: str) -> None:
    loss, _ = PER_SAMPLE[name]
    huge = np.where(RECEIVER > 0, 1e15, -1e15).astype(np.float32)
    flat = np.full((6, 5), 3.0, np.float32)
    for receiver, sender in ((RECEIVER, huge), (huge, SENDER), (flat, SENDER), (RECEIVER, flat)):
        value, gradient = jax.value_and_grad(lambda z, s: jnp.sum(loss(z, s, T)))(receiver, sender)
        assert np.isfinite(value), name
        assert np.isfinite(gradient).all(), name
    for equal in (flat, RECEIVER):
        if name != "minus_probability":
            np.testing.assert_allclose(loss(equal, equal, T), np.zeros(6), atol=1e-5)


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_excluded_classes_are_left_out(name: str) -> None:
    """As if the last class were not there; but for the mean of squares, which counts it."""
    loss, _ = PER_SAMPLE[name]
    keep = LABELS < 4
    receiver, sender = (np.where(np.arange(5) == 4, -np.inf, z)[keep] for z in (RECEIVER, SENDER))
    labels = LABELS[keep]
    given: Any = loss
    if name == "decoupled_kl":
        given = lambda r, s, t: ktg.decoupled_kl_divergence(r, s, labels, t)  # noqa: E731
    found, gradient = jax.value_and_grad(lambda z: jnp.sum(given(z, sender, T)))(receiver)
    expected = np.sum(given(receiver[:, :4], sender[:, :4], T)) * (4 / 5 if name == "mse" else 1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[:, 4], np.zeros(len(labels)))


def test_the_divergences_limits() -> None:
    plain = ktg.kl_divergence(RECEIVER, SENDER, T)
    nearly = ktg.jensen_shannon_divergence(RECEIVER, SENDER, T, beta=1e-3) / 1e-3
    np.testing.assert_allclose(nearly, plain, rtol=2e-2)
    swapped = ktg.jensen_shannon_divergence(SENDER, RECEIVER, T, beta=0.7)
    np.testing.assert_allclose(
        ktg.jensen_shannon_divergence(RECEIVER, SENDER, T, beta=0.3), swapped, rtol=1e-5
    )
    p_label = softmax(SENDER, T)[np.arange(6), LABELS]
    parts = [
        ktg.decoupled_kl_divergence(RECEIVER, SENDER, LABELS, T, alpha=a, beta=b)
        for a, b in ((1.0, 0.0), (0.0, 1.0))
    ]
    np.testing.assert_allclose(parts[0] + (1 - p_label) * parts[1], plain, rtol=1e-4)


def test_standardised_logits_may_be_of_any_size() -> None:
    scales = np.array([[1e-3], [1], [10], [1e6], [2], [5]], np.float32)
    found = ktg.standardised_kl_divergence(RECEIVER * scales + 7 * scales, SENDER * 100 - 3, T)
    np.testing.assert_allclose(found, standardised(), rtol=1e-3)


def test_smoothed_labels() -> None:
    p = softmax(RECEIVER)
    target = np.full((6, 5), 0.2 / 5) + 0.8 * np.eye(5)[LABELS]
    expected = -(target * np.log(p)).sum(1)
    loss = ktg.smoothed_cross_entropy
    np.testing.assert_allclose(loss(RECEIVER, LABELS, smoothing=0.2), expected, rtol=1e-5)
    gradient = jax.grad(lambda z: loss(z, LABELS, smoothing=0.2).sum())(RECEIVER)
    np.testing.assert_allclose(gradient, p - target, atol=1e-6)
    masked = np.array([[0.0, 1.0, -np.inf]], np.float32)
    unsmoothed = loss(masked, np.array([0]), smoothing=0.0)
    np.testing.assert_allclose(unsmoothed, ktg.cross_entropy(masked, np.array([0])))
    assert loss(masked, np.array([0])).tolist() == [np.inf]


@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1])
def test_labels_that_are_no_class_are_nan(bad: int) -> None:
    labels = np.array([0, bad], np.int32)
    for found in (
        ktg.smoothed_cross_entropy(RECEIVER[:2], labels),
        ktg.decoupled_kl_divergence(RECEIVER[:2], SENDER[:2], labels),
    ):
        assert np.isnan(found).tolist() == [False, True]


def test_an_edge_that_does_not_carry_a_loss_does_not_see_its_labels() -> None:
    matrix = [["cutoff", Edge(loss="kl")], [Edge(loss="decoupled_kl"), "cutoff"]]
    edges = Graph(["cnn"] * 2, matrix).edge_arrays
    z, labels = jnp.stack([jnp.asarray(RECEIVER), jnp.asarray(SENDER)]), np.full(6, -1, np.int32)

    gradient = jax.grad(ktg.graph_loss)(z, labels, edges, 1.0)
    assert np.isfinite(gradient[0]).all()
    assert np.isnan(gradient[1]).all()


# --- relations within a batch


def test_correlations_are_numpys() -> None:
    found = ktg.correlation_loss(RECEIVER, SENDER, T, beta=2.0, gamma=3.0)
    np.testing.assert_allclose(found, dist(2, 3), rtol=1e-5)
    shifted = ktg.correlation_loss(RECEIVER + 5, SENDER, T)
    np.testing.assert_allclose(shifted, dist(1, 1), rtol=1e-4)
    loss = lambda z: ktg.correlation_loss(z, SENDER, T)  # noqa: E731
    check_grads(loss, (RECEIVER,), order=1, modes="rev", rtol=2e-2)


def gram(features: np.ndarray) -> np.ndarray:
    flat = features.reshape(len(features), -1)
    found = flat @ flat.T
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


def test_similarities_are_those_of_all_pairs() -> None:
    expected = np.square(gram(STAGES[-1]) - gram(OTHER_STAGES[-1])).sum() / 36
    np.testing.assert_allclose(ktg.similarity_loss(STAGES, OTHER_STAGES), expected, rtol=1e-5)
    huge = [1e15 * STAGES[-1]]
    np.testing.assert_allclose(ktg.similarity_loss(huge, OTHER_STAGES), expected, rtol=1e-5)
    loss = lambda x: ktg.similarity_loss([x], OTHER_STAGES)  # noqa: E731
    last = jnp.asarray(STAGES[-1], jnp.float32)
    check_grads(loss, (last,), order=1, modes="rev", rtol=2e-2)


def test_each_sample_is_to_find_its_own_sender() -> None:
    ends = [s[-1].mean((1, 2)) for s in (STAGES, OTHER_STAGES)]
    first, second = (e / np.linalg.norm(e, axis=1, keepdims=True) for e in ends)
    p = softmax(first @ second.T, 0.5)
    expected = -np.log(np.diag(p)).mean()
    found = ktg.contrastive_loss(STAGES, OTHER_STAGES, tau=0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    loss = lambda x: ktg.contrastive_loss([x], OTHER_STAGES)  # noqa: E731
    last = jnp.asarray(STAGES[-1], jnp.float32)
    check_grads(loss, (last,), order=1, modes="rev", rtol=2e-2)
    with pytest.raises(InputError, match=r"channels of a sender's last stage: got 8; allowed: 3"):
        ktg.contrastive_loss(STAGES[:1], OTHER_STAGES)


RELATIONAL: dict[str, Callable[..., jax.Array]] = {
    "dist": lambda w, pick: ktg.correlation_loss(RECEIVER[pick], SENDER[pick], T, w),
    "similarity": lambda w, pick: ktg.similarity_loss(
        [STAGES[-1][pick]], [OTHER_STAGES[-1][pick]], w
    ),
    "contrastive": lambda w, pick: ktg.contrastive_loss(
        [STAGES[-1][pick]], [OTHER_STAGES[-1][pick]], w
    ),
}


@pytest.mark.parametrize("name", RELATIONAL)
def test_samples_that_do_not_count_are_not_there(name: str) -> None:
    loss, everything = RELATIONAL[name], slice(None)
    weights = np.array([1.5, 1.5, 0, 1.5, 0, 1.5], np.float32)  # four of six: a mean over the four
    expected = loss(None, weights > 0)
    np.testing.assert_allclose(loss(weights, everything), expected, rtol=1e-5)
    half = loss(0.5 * np.ones(6, np.float32), everything)
    np.testing.assert_allclose(half, 0.5 * loss(None, everything), rtol=1e-5)
    assert float(loss(np.zeros(6, np.float32), everything)) == 0


@pytest.mark.parametrize("loss", [ktg.similarity_loss, ktg.contrastive_loss])
def test_features_of_zero_have_no_gradient_that_is_nan(loss: Callable[..., jax.Array]) -> None:
    nothing = jnp.zeros((6, 2, 2, 8))
    value, gradient = jax.value_and_grad(lambda x: loss([x], OTHER_STAGES))(nothing)
    assert np.isfinite(value)
    np.testing.assert_array_equal(gradient, np.zeros_like(nothing))
    with pytest.raises(InputError, match="at least one stage"):
        loss([], [])


def test_constant_probabilities_correlate_with_nothing() -> None:
    flat = jnp.zeros((6, 5))
    value, gradient = jax.value_and_grad(lambda z: ktg.correlation_loss(z, SENDER, 1.0))(flat)
    np.testing.assert_allclose(value, 2.0, rtol=1e-6)
    assert np.isfinite(gradient).all()


# --- as edges carry them

ON_LOGITS = (
    "jensen_shannon",
    "decoupled_kl",
    "standardised_kl",
    "dist",
    "mse",
    "minus_probability",
)
ON_STAGES = ("last_attention", "minus_attention", "similarity", "contrastive")


def outputs() -> list[Outputs]:
    return [Outputs(jnp.asarray(RECEIVER), tuple(map(jnp.asarray, STAGES))),
            Outputs(jnp.asarray(SENDER), tuple(map(jnp.asarray, OTHER_STAGES)))]  # fmt: skip


@pytest.mark.parametrize("name", [*ON_LOGITS, *ON_STAGES])
def test_an_edge_carries_it_to_its_receiver_alone(name: str) -> None:
    graph = Graph(["cnn", "cnn"], [["through", Edge(loss=name, temperature=T)], ["through"] * 2])
    direct = named_loss(name).function(
        *outputs(), LABELS, jnp.ones(6, jnp.float32), jnp.asarray(T, jnp.float32)
    )
    losses = ktg.edge_losses(outputs(), LABELS, graph.edge_arrays, 1.0)
    np.testing.assert_allclose(losses[0, 1], direct, rtol=1e-5)

    def row(nodes: list[Outputs]) -> jax.Array:
        return ktg.edge_losses(nodes, LABELS, graph.edge_arrays, 1.0)[0, 1]

    receiver, sender = jax.grad(row)(outputs())
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(receiver))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(sender))


@pytest.mark.parametrize("name", [*ON_LOGITS, *ON_STAGES])
def test_masked_samples_do_not_matter_to_an_edge(name: str) -> None:
    graph = Graph(["cnn", "cnn"], [["through", Edge(loss=name)], ["through"] * 2])
    where = np.array([True, True, False, True, False, True])
    odd = jax.tree.map(
        lambda x: jnp.where(where.reshape(-1, *(1,) * (x.ndim - 1)), x, 7 * x + 1), outputs()
    )
    few = jax.tree.map(lambda x: x[where], outputs())
    expected = ktg.edge_losses(few, LABELS[where], graph.edge_arrays, 1.0)
    for nodes in (outputs(), odd):
        found = ktg.edge_losses(nodes, LABELS, graph.edge_arrays, 1.0, where=where)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_minus_losses_are_least_where_nodes_differ_most() -> None:
    left = Outputs(jnp.array([[9.0, -9.0]]), (jnp.array([[[[1.0], [0.0]]]]),))
    right = Outputs(jnp.array([[-9.0, 9.0]]), (jnp.array([[[[0.0], [1.0]]]]),))
    ones, label = jnp.ones(1), jnp.array([0])
    for name in ("minus_probability", "minus_attention"):
        loss = named_loss(name).function
        assert float(loss(left, right, label, ones, ones[0])) < 1e-3
        np.testing.assert_allclose(loss(left, left, label, ones, ones[0]), 1.0, rtol=1e-4)


def test_tokens_have_losses_too() -> None:
    z = jnp.asarray(RNG.standard_normal((2, 3, 4, 5)), jnp.float32)  # two nodes, [B, T, C]
    labels = jnp.asarray(RNG.integers(0, 5, (3, 4)))
    for name in ON_LOGITS:
        edges = Graph(["cnn"] * 2, [["through", Edge(loss=name)], ["through"] * 2]).edge_arrays
        found = ktg.edge_losses(z, labels, edges, 1.0)
        flat = ktg.edge_losses(z.reshape(2, 12, 5), labels.reshape(12), edges, 1.0)
        np.testing.assert_allclose(found, flat, rtol=1e-5)


# --- options


def test_an_option_that_is_written_otherwise_is_the_same() -> None:
    texts = (
        "decoupled_kl(alpha=1,beta=2)",
        " decoupled_kl ( beta = 2.0 ) ",
        "decoupled_kl(beta=2)",
    )
    assert {checked_loss("loss", text) for text in texts} == {"decoupled_kl(beta=2)"}
    assert checked_loss("loss", "jensen_shannon(beta=0.5)") == "jensen_shannon"
    assert checked_loss("loss", "dist()") == "dist"
    graphs = [
        Graph(["cnn"] * 2, [["through", Edge(loss={text: 2.0})], ["through"] * 2]) for text in texts
    ]
    assert len(set(graphs)) == len({graph.canonical() for graph in graphs}) == 1
    assert graphs[0].edges[0][1].losses == {"decoupled_kl(beta=2)": 2.0}
    assert Graph.from_json(graphs[0].to_json()) == graphs[0]
    other = graphs[0].carrying("decoupled_kl(beta=3)")
    assert not other.equivalent(graphs[0])


def test_options_reach_the_loss() -> None:
    gates = [["through", Edge(loss="jensen_shannon(beta=0.2)", temperature=T)], ["through"] * 2]
    edges = Graph(["cnn"] * 2, gates).edge_arrays
    found = ktg.edge_losses(np.stack([RECEIVER, SENDER]), LABELS, edges, 1.0)
    np.testing.assert_allclose(found[0, 1], jensen_shannon(0.2).mean(), rtol=1e-5)
    smoothed = Edge(loss="smoothed_cross_entropy(smoothing=0.3)")
    edges = Graph(["cnn"], [[smoothed]]).edge_arrays
    expected = ktg.smoothed_cross_entropy(RECEIVER, LABELS, smoothing=0.3).mean()
    np.testing.assert_allclose(ktg.edge_losses([RECEIVER], LABELS, edges, 1.0)[0, 0], expected)


def test_a_users_loss_has_options_of_its_own() -> None:
    def scaled(receiver: Outputs, sender: Outputs, labels: Any, t: Any, *, by: float) -> Any:
        return by * (receiver.logits - sender.logits)[..., 0]

    ktg.register_loss("scaled", ktg.per_sample(scaled), options={"by": 2})
    edges = Graph(["cnn"] * 2, [["through", Edge(loss="scaled(by=3)")], ["through"] * 2])
    found = ktg.edge_losses(np.stack([RECEIVER, SENDER]), LABELS, edges.edge_arrays, 1.0)
    np.testing.assert_allclose(found[0, 1], 3 * (RECEIVER - SENDER)[:, 0].mean(), rtol=1e-5)
    assert checked_loss("loss", "scaled(by=2)") == "scaled"
    with pytest.raises(InputError, match=r"options\['by'\]: got nan"):
        ktg.register_loss("scaled", ktg.per_sample(scaled), options={"by": float("nan")})


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("decoupled_kd", "did you mean 'decoupled_kl'"),
        ("decoupled_kl(gamma=1)", "decoupled_kl with alpha, beta"),
        ("decoupled_kl(beta)", "decoupled_kl with alpha, beta"),
        ("decoupled_kl(beta=1,beta=1)", "decoupled_kl with alpha, beta"),
        ("decoupled_kl(beta=-1)", "beta at least 0"),
        ("decoupled_kl(beta=nan)", "beta at least 0"),
        ("decoupled_kl(beta=x)", "beta at least 0"),
        ("jensen_shannon(beta=1)", "beta above 0 and below 1"),
        ("contrastive(tau=0)", "tau above 0"),
        ("kl(beta=1)", "kl, which has no options"),
        ("kl(", "did you mean 'kl'"),
        ("smoothed_cross_entropy", "kl, "),
        (3, "kl, "),
    ],
)
def test_a_bad_loss_is_refused(text: Any, allowed: str) -> None:
    with pytest.raises(InputError) as caught:
        Graph(["cnn"] * 2, [["through", {"loss": text}], ["through"] * 2])
    assert caught.value.field == "gates[0][1].loss"
    assert allowed in caught.value.allowed


def test_a_loss_twice_and_bad_smoothing_are_refused() -> None:
    twice = {"dist": 1, "dist(beta=1)": 1}
    with pytest.raises(InputError, match=r"gates\[0\]\[1\].loss: .*each loss once \(dist\)"):
        Graph(["cnn"] * 2, [["through", {"loss": twice}], ["through"] * 2])
    with pytest.raises(InputError, match=r"smoothing at least 0 and below 1"):
        Graph(["cnn"], [[{"loss": "smoothed_cross_entropy(smoothing=1)"}]])


def test_shapes_must_agree() -> None:
    for loss, _ in PER_SAMPLE.values():
        with pytest.raises(AssertionError):
            loss(RECEIVER, SENDER[:, :4], T)
    with pytest.raises(AssertionError):
        ktg.correlation_loss(RECEIVER, SENDER[:5])
    chex.assert_shape(ktg.correlation_loss(RECEIVER, SENDER), ())
