from math import cos, pi

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ktg_jax as ktg


def rates(schedule: optax.Schedule, steps: range) -> np.ndarray:
    return np.array([float(schedule(k)) for k in steps])


def test_the_step_schedule_falls_at_the_papers_epochs() -> None:
    schedule = ktg.step_schedule(0.1, 200)
    expected = [0.1] * 60 + [0.01] * 60 + [0.001] * 60 + [0.0001] * 20
    np.testing.assert_allclose(rates(schedule, range(200)), expected, rtol=1e-5)


def test_the_step_schedule_takes_other_milestones() -> None:
    schedule = ktg.step_schedule(1.0, 10, milestones=(0.5,))
    np.testing.assert_allclose(rates(schedule, range(10)), [1.0] * 5 + [0.1] * 5, rtol=1e-5)


def test_milestones_that_fall_on_one_step_all_count() -> None:
    # 0.3 and 0.6 of 2 steps are both step 1.
    schedule = ktg.step_schedule(1.0, 2)
    np.testing.assert_allclose(rates(schedule, range(3)), [1.0, 0.01, 0.001], rtol=1e-5)


def test_the_cosine_schedule_is_half_a_cosine() -> None:
    expected = [0.4 * (1 + cos(pi * k / 8)) / 2 for k in range(9)]
    schedule = ktg.cosine_schedule(0.4, 8)
    np.testing.assert_allclose(rates(schedule, range(9)), expected, rtol=1e-5, atol=1e-7)
    assert float(schedule(0)) == pytest.approx(0.4)
    assert float(schedule(8)) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("warmup", [1, 2, 4, 7])
def test_warmup_rises_to_the_full_rate_and_then_follows_the_schedule(warmup: int) -> None:
    steps = range(20)
    rising = [0.4 * (k + 1) / warmup for k in range(warmup)]
    for make in (ktg.step_schedule, ktg.cosine_schedule):
        warmed_up = rates(make(0.4, 20, warmup_steps=warmup), steps)
        np.testing.assert_allclose(warmed_up[:warmup], rising, rtol=1e-5)
        np.testing.assert_allclose(warmed_up[warmup:], rates(make(0.4, 20), steps)[warmup:])


def test_schedules_can_be_traced() -> None:
    for make in (ktg.step_schedule, ktg.cosine_schedule):
        schedule = make(0.4, 10, warmup_steps=3)
        traced = jax.jit(jax.vmap(schedule))(jnp.arange(10))
        np.testing.assert_allclose(traced, rates(schedule, range(10)), rtol=1e-5)


def test_sgd_is_nesterov_with_decay_in_the_gradient_by_hand() -> None:
    optimizer = ktg.sgd(0.1, weight_decay=0.5, momentum=0.9)
    param, velocity = 2.0, 0.0
    ours = jnp.array(2.0)
    state = optimizer.init(ours)
    for gradient in (1.0, -3.0, 0.5):
        decayed = gradient + 0.5 * param
        velocity = 0.9 * velocity + decayed
        param -= 0.1 * (decayed + 0.9 * velocity)
        updates, state = optimizer.update(jnp.array(gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
        assert float(ours) == pytest.approx(param, rel=1e-6)


def test_sgd_defaults_are_the_papers() -> None:
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    default, explicit = ktg.sgd(), ktg.sgd(0.1, weight_decay=5e-4, momentum=0.9)
    results = []
    for optimizer in (default, explicit):
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        results.append(updates)
    for ours, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(ours, expected)
        np.testing.assert_allclose(ours, -0.1 * 1.9 * 1.0005, rtol=1e-6)  # biases decay, too


def test_sgd_equals_torchs_along_a_schedule() -> None:
    reference = pytest.importorskip("torch_reference")
    torch = reference.torch
    rng = np.random.default_rng(0)
    target = rng.standard_normal((3, 4)).astype(np.float32)
    start = rng.standard_normal((3, 4)).astype(np.float32)
    schedule = ktg.step_schedule(0.2, 12, warmup_steps=3, milestones=(0.5, 0.75))

    theirs = torch.tensor(start, requires_grad=True)
    sgd = torch.optim.SGD([theirs], lr=0.2, momentum=0.9, weight_decay=0.01, nesterov=True)
    ours, optimizer = jnp.asarray(start), ktg.sgd(schedule, weight_decay=0.01)
    state = optimizer.init(ours)

    @jax.jit
    def step(ours: jax.Array, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        gradient = jax.grad(lambda p: jnp.sum(jnp.sin(p - target)))(ours)
        updates, state = optimizer.update(gradient, state, ours)
        return optax.apply_updates(ours, updates), state

    for k in range(12):
        sgd.param_groups[0]["lr"] = float(schedule(k))
        sgd.zero_grad()
        torch.sin(theirs - torch.tensor(target)).sum().backward()
        sgd.step()
        ours, state = step(ours, state)
        np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-5, atol=1e-5)
