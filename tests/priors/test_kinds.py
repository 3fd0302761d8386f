"""What a prior asks of a student in other forms: by hand, and as distances."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ktg_jax as ktg
from ktg_jax import InputError, NodePrior, Prior
from ktg_jax.priors import distribution_distance, prior_distance, recoding_loss

PATH = "stage1_conv.kernel"
RNG = np.random.default_rng(0)


def params_of(kernel: Any) -> dict[str, Any]:
    return {"stage1_conv": {"kernel": jnp.asarray(kernel, jnp.float32)}}


def prior_of(kernel: Any) -> Prior:
    return Prior((jnp.asarray(kernel, jnp.float32),), (PATH,))


OURS, THEIRS = (RNG.standard_normal((3, 3, 4, 6)) for _ in range(2))


def test_a_distribution_has_no_order() -> None:
    order = RNG.permutation(6)
    (apart,) = distribution_distance(params_of(THEIRS[..., order]), prior_of(THEIRS))
    np.testing.assert_allclose(apart, 0, atol=1e-9)
    (filters,) = prior_distance(params_of(THEIRS[..., order]), prior_of(THEIRS))
    assert filters > 0.5


def test_a_distribution_by_hand() -> None:
    """Filters of one number are 1 or -1; both directions of a line sort them alike."""
    kernel = np.array([5.0, -2.0, 1.0, -3.0]).reshape(1, 1, 1, 4)
    (apart,) = distribution_distance(params_of(kernel), prior_of(np.ones((1, 1, 1, 4))))
    np.testing.assert_allclose(apart, (0 + 4 + 0 + 4) / 4, rtol=1e-6)


def test_a_distribution_is_nearer_than_its_filters() -> None:
    (apart,) = distribution_distance(params_of(OURS), prior_of(THEIRS), directions=20_000)
    (filters,) = prior_distance(params_of(OURS), prior_of(THEIRS))
    assert 0 < apart < filters
    # Few directions are as many, but for chance.
    (few,) = distribution_distance(params_of(OURS), prior_of(THEIRS))
    np.testing.assert_allclose(few, apart, rtol=0.3)


def added(kind: str, quantile: float, progress: float, **changes: Any) -> tuple[Any, Any]:
    """What is added to a gradient of ones, and the distance."""
    prior = NodePrior(prior_of(THEIRS), 0.5, quantile, kind=kind, **changes)
    ones = jax.tree.map(jnp.ones_like, params_of(OURS))
    sums, distance = prior.add_to(ones, params_of(OURS), progress)
    return sums["stage1_conv"]["kernel"] - 1, distance


@pytest.mark.parametrize("kind", ["filters", "distribution", "l1"])
def test_losses_are_weighted_and_fade(kind: str) -> None:
    losses = {
        "filters": lambda p: jnp.mean(prior_distance(p, prior_of(THEIRS))),
        "distribution": lambda p: jnp.mean(distribution_distance(p, prior_of(THEIRS))),
        "l1": lambda p: recoding_loss(p, prior_of(THEIRS), 0.0),
    }
    gradient = jax.grad(losses[kind])(params_of(OURS))["stage1_conv"]["kernel"]
    np.testing.assert_allclose(added(kind, 0.0, 0.25)[0], 0.5 * 0.75 * gradient, atol=1e-6)
    constant = added(kind, 0.0, 0.25, schedule="constant")[0]
    np.testing.assert_allclose(constant, 0.5 * gradient, atol=1e-6)


def test_of_a_distribution_the_smallest_entries_are_cut_off() -> None:
    whole, cut = (np.abs(added("distribution", q, 0.0)[0]) for q in (0.0, 0.75))
    assert np.mean(cut > 1e-7) == pytest.approx(0.25, abs=0.01)
    assert (cut <= whole + 1e-6).all()


def test_l1_has_its_quantile_as_penalty() -> None:
    found = added("l1", 0.3, 0.0)[0]
    loss = jax.grad(lambda p: recoding_loss(p, prior_of(THEIRS), 0.3))(params_of(OURS))
    np.testing.assert_allclose(found, 0.5 * loss["stage1_conv"]["kernel"], atol=1e-6)


def test_the_tasks_gradient_is_cut_and_comes_back() -> None:
    own = jnp.asarray([4.0, -1.0, 2.0, -3.0]).reshape(1, 1, 1, 4)
    gradients = params_of(own) | {"head": jnp.ones(2)}
    params = params_of(np.ones((1, 1, 1, 4))) | {"head": jnp.ones(2)}
    prior = NodePrior(prior_of(np.ones((1, 1, 1, 4))), 1.0, 0.5, kind="task")
    for progress, expected in (
        (0.0, [2.0, 0.0, 0.0, -1.0]),  # soft-thresholded at the second smallest, 2
        (0.5, [3.0, -0.5, 1.0, -2.0]),
        (1.0, [4.0, -1.0, 2.0, -3.0]),
    ):
        sums, distance = prior.add_to(gradients, params, progress)
        np.testing.assert_allclose(sums["stage1_conv"]["kernel"].ravel(), expected, atol=1e-6)
        assert sums["head"].tolist() == [1.0, 1.0]
        assert distance.tolist() == [0.0]
    # A weight above 1 is no more than all of it.
    heavy = NodePrior(prior_of(np.ones((1, 1, 1, 4))), 9.0, 0.5, kind="task")
    sums, _ = heavy.add_to(gradients, params, 0.0)
    assert sums["stage1_conv"]["kernel"].ravel().tolist() == [2.0, 0.0, 0.0, -1.0]


def test_a_kind_of_another_name_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"^kind: got 'l3'; allowed: filters, distribution, l1, ta"
    ):
        added("l3", 0.0, 0.0)
    node = ktg.Node("cnn", prior="p", prior_kind="l3")
    with pytest.raises(InputError, match=r"^nodes\[0\].prior_kind: got 'l3'; allowed: filters, di"):
        ktg.graphs.independent([node])
    with pytest.raises(InputError, match=r"^nodes\[0\].prior_kind: got 'l1'; allowed: nothing"):
        ktg.graphs.independent([ktg.Node("cnn", prior_kind="l1")])


def test_graphs_say_a_kind_only_where_it_is_another() -> None:
    """So runs that were begun before there were others are the same runs."""
    texts = [
        ktg.graphs.independent([ktg.Node("cnn", prior="p", prior_kind=kind)]).to_json()
        for kind in ("filters", "task")
    ]
    assert ["prior_kind" in text for text in texts] == [False, True]
    assert ktg.Graph.from_json(texts[1]).nodes[0].prior_kind == "task"
