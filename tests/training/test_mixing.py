"""Mixup, CutMix and smoothed labels: pixels and labels by hand, hosts and devices, and runs."""

import json
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import How, fused, per_node, trained
from runs import assert_same_end, in_process, options, small
from tiny_models import Tiny

import ktg_jax as ktg
from experiments import record, train
from experiments.runs.config import TrainConfig
from experiments.runs.graphs import build_graph
from ktg_jax import GraphState, InputError, Mixed, Parallel
from ktg_jax.training.batches import Arrays, Batches, BatchPlan, data_key, labels_of, take_batch
from ktg_jax.training.mixing import Mix, blended, own_share, plan_mix
from ktg_jax.training.task import Task

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (16, 8, 6, 1), np.uint8)
LABELS = np.asarray(np.arange(16) % 5, np.int32)
STILL = jnp.zeros((2, 2), jnp.int32), jnp.zeros(2, bool)


def mix(weight: float, side: float, centre: tuple[float, float] = (0.5, 0.5)) -> Mix:
    weights, sides = (jnp.full(2, value, jnp.float32) for value in (weight, side))
    centres = jnp.broadcast_to(jnp.array(centre, jnp.float32), (2, 2))
    return Mix(jnp.array([1, 0]), *STILL, weights, sides, centres)


# --- by hand


def test_mixup_lays_two_images_over_each_other() -> None:
    plan = BatchPlan(jnp.array([0, 1]), *STILL, mix(0.75, 0.0))
    batch, labels = take_batch(jnp.asarray(IMAGES), jnp.asarray(LABELS), plan)
    first, second = IMAGES[:2] / 255
    np.testing.assert_allclose(batch[0], 0.75 * first + 0.25 * second, atol=1e-6)
    np.testing.assert_allclose(batch[1], 0.75 * second + 0.25 * first, atol=1e-6)
    same, mixed = labels_of(jnp.asarray(IMAGES), jnp.asarray(LABELS), plan)
    assert mixed is not None
    assert labels.tolist() == same.tolist() == [0, 1]
    assert (mixed.labels.tolist(), mixed.share.tolist()) == ([1, 0], [0.75, 0.75])


def test_the_label_is_that_of_what_has_more_of_the_image() -> None:
    plan = BatchPlan(jnp.array([0, 1]), *STILL, mix(0.25, 0.0))
    labels, mixed = labels_of(jnp.asarray(IMAGES), jnp.asarray(LABELS), plan)
    assert mixed is not None
    assert (labels.tolist(), mixed.labels.tolist()) == ([1, 0], [0, 1])
    np.testing.assert_allclose(mixed.share, 0.75)


def test_cutmix_puts_a_box_of_one_image_into_the_other() -> None:
    # Half the side: rows 2 to 5 of 8 and, the box being 2 x (3 // 2) wide, columns 2 and 3 of 6.
    plan = BatchPlan(jnp.array([0, 1]), *STILL, mix(1.0, 0.5))
    batch, _ = take_batch(jnp.asarray(IMAGES), jnp.asarray(LABELS), plan)
    expected = IMAGES[0].copy()
    expected[2:6, 2:4] = IMAGES[1, 2:6, 2:4]
    np.testing.assert_allclose(batch[0], expected / 255, atol=1e-7)
    np.testing.assert_allclose(own_share(plan.mix, (8, 6)), 1 - 8 / 48, rtol=1e-6)  # type: ignore[arg-type]


def test_a_box_ends_at_the_border_and_counts_what_is_inside() -> None:
    cut = mix(1.0, 0.5, (0.0, 0.99))
    ones, zeros = jnp.ones((2, 8, 6, 1)), jnp.zeros((2, 8, 6, 1))
    found = blended(zeros, ones, cut)
    assert found[0, :2, 4:, 0].tolist() == [[1, 1], [1, 1]]
    assert float(found[0].sum()) == 4
    np.testing.assert_allclose(own_share(cut, (8, 6)), 1 - 4 / 48, rtol=1e-6)


def test_a_label_edge_weighs_both_labels_and_no_other_edge_does() -> None:
    logits = jax.random.normal(jax.random.key(0), (2, 4, 5))
    own, other = jnp.array([0, 1, 2, 3]), jnp.array([1, 1, 4, 0])
    share, gates = jnp.array([0.5, 0.75, 1.0, 0.6]), jnp.array([[0, 3], [3, 0]])
    found = ktg.edge_losses(logits, own, gates, 0.5, mixed=Mixed(other, share))
    plain = ktg.edge_losses(logits, own, gates, 0.5)
    for i in (0, 1):
        first, second = (ktg.cross_entropy(logits[i], y) for y in (own, other))
        expected = jnp.mean(share * first + (1 - share) * second)
        np.testing.assert_allclose(found[i, i], expected, rtol=1e-5)
        np.testing.assert_array_equal(found[i, 1 - i], plain[i, 1 - i])


def test_masked_samples_may_be_mixed_with_anything() -> None:
    logits, where = jnp.zeros((1, 2, 5)), jnp.array([True, False])
    mixed = Mixed(jnp.array([1, 99]), jnp.array([0.5, jnp.nan]))
    found = ktg.edge_losses(
        logits, jnp.array([0, 3]), jnp.array([[0]]), 1.0, where=where, mixed=mixed
    )
    np.testing.assert_allclose(found, [[np.log(5)]], rtol=1e-6)
    wrong = Mixed(jnp.array([1, 99]), jnp.array([0.5, 0.5]))
    assert np.isnan(ktg.edge_losses(logits, jnp.array([0, 3]), jnp.array([[0]]), 1.0, mixed=wrong))


def test_shares_are_drawn_as_the_papers_do() -> None:
    views = jnp.arange(4), jnp.zeros((4, 2), jnp.int32), jnp.zeros(4, bool)

    def draws(mixup: float, cutmix: float) -> Mix:
        keys = jax.random.split(jax.random.key(0), 4000)
        return jax.vmap(lambda key: plan_mix(key, views, mixup, cutmix))(keys)

    both = draws(0.2, 1.0)
    assert both.image_index[0].tolist() == [1, 2, 3, 0]
    assert bool((both.weight == both.weight[:, :1]).all())
    cut = both.side[:, 0] > 0
    assert 0.47 < float(cut.mean()) < 0.53
    # The area of a box is 1 - lambda with lambda uniform; mixup's lambda has a variance of 1 / 5.6.
    assert abs(float((both.side[cut, 0] ** 2).mean()) - 0.5) < 0.03
    assert abs(float(both.weight[~cut, 0].var()) - 1 / 5.6) < 0.02
    assert float(draws(0.0, 1.0).weight.min()) == 1
    assert float(draws(1.0, 0.0).side.max()) == 0


# --- hosts, devices and engines


@pytest.mark.parametrize("kinds", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}])
def test_a_host_makes_the_batches_of_the_device(kinds: dict[str, Any]) -> None:
    batches = Batches(16, 4, max_offset=1, flip=True, **kinds)
    stream = ktg.BatchStream(IMAGES, LABELS, batches, data_seed=3)
    assert {key: stream.facts[key] for key in kinds} == kinds
    for step, (images, labels) in enumerate(stream.host(0, 4)):
        plan = batches.plan(data_key(3), step)
        expected = take_batch(jnp.asarray(IMAGES), jnp.asarray(LABELS), plan)
        np.testing.assert_allclose(images, expected[0], atol=1e-6)
        np.testing.assert_array_equal(labels, expected[1])
    plain = ktg.BatchStream(IMAGES, LABELS, Batches(16, 4), 3)
    assert not {"mixup", "cutmix"} & set(plain.facts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "axis_name"),
    [(per_node, None), (fused(2), None), (fused(strategy="pmap"), Parallel("pmap").axis_name)],
    ids=["per node", "two a call", "pmap"],
)
def test_all_engines_train_alike(how: How, axis_name: str | None) -> None:
    graph = ktg.graphs.mutual(["tiny", "tiny"])

    def updated(how: How, axis_name: str | None) -> GraphState:
        fns = (ktg.from_linen(Tiny(5, axis_name=axis_name)),) * 2
        task = Task(fns, ktg.sgd(0.1), Batches(16, 8, 1, True, 1.0, 1.0), (8, 6, 1), 4)
        state = ktg.init_state(graph, fns, ktg.sgd(0.1), jax.random.key(0), jnp.zeros((1, 8, 6, 1)))
        return trained(how, task, graph, state, Arrays(IMAGES, LABELS))[0]

    expected, found = updated(fused(), None), updated(how, axis_name)
    chex.assert_trees_all_close(found.params, expected.params, rtol=1e-4, atol=1e-5)


# --- runs


def run(workdir: Path, **changes: Any) -> Any:
    return in_process(train.main, *options(small(workdir, epochs=2, **changes)))


@pytest.mark.slow
def test_a_run_is_resumed_bit_for_bit_and_learns_from_its_recording(tmp_path: Path) -> None:
    mixing = {"mixup": 0.5, "cutmix": 1.0}
    for name in ("whole", "again"):
        assert run(tmp_path / name, **mixing, label_smoothing=0.1).code == 0
    (tmp_path / "again" / "result.json").unlink()
    (tmp_path / "again" / "checkpoints" / "2").rename(tmp_path / "gone")
    assert run(tmp_path / "again", **mixing, label_smoothing=0.1).code == 0
    assert_same_end(tmp_path / "whole", tmp_path / "again")
    given = json.loads((tmp_path / "whole" / "graph.json").read_text())
    assert given["gates"][0][0]["loss"] == "smoothed_cross_entropy"
    made = in_process(record.main, tmp_path / "whole", "--out", tmp_path / "rec")
    assert made.code == 0, made.err
    assert "--mixup 0.5, --cutmix 1, --data-seed 0" in made.out.replace("\n", " ")
    file = tmp_path / "graph.json"
    nodes = [{"model": "tiny"}, {"outputs": str(tmp_path / "rec")}]
    file.write_text(json.dumps({"nodes": nodes, "gates": [["through"] * 2, ["cutoff"] * 2]}))
    how: dict[str, Any] = {"graph": str(file), "models": ()}
    assert run(tmp_path / "taught", **how, **mixing).code == 0
    refused = run(tmp_path / "plain", **how)
    assert refused.code == 2
    assert "mixup" in refused.err
    assert not (tmp_path / "plain").exists()
    static = in_process(record.main, tmp_path / "whole", "--static", "--out", tmp_path / "still")
    assert static.code == 0, static.err
    nodes[1]["outputs"] = str(tmp_path / "still")
    file.write_text(json.dumps({"nodes": nodes, "gates": [["through"] * 2, ["cutoff"] * 2]}))
    refused = run(tmp_path / "plain", **how, **mixing)
    assert refused.code == 2
    assert "nodes[1].outputs" in refused.err
    assert "has seen no mixed images" in refused.err


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("mixup", -1.0, "at least 0"),
        ("cutmix", float("nan"), "at least 0"),
        ("cutmix", 1e9, "1000000"),
        ("label_smoothing", 1.0, "at least 0 and below 1"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, field: str, value: float, allowed: str) -> None:
    ended = run(tmp_path / "run", **{field: value})
    assert (ended.code, ended.err.startswith(f"error: {field}: got")) == (2, True), ended.err
    assert allowed in ended.err.replace(",", "")
    assert not (tmp_path / "run").exists()


def test_labels_are_smoothed_where_they_are_the_papers() -> None:
    graph = build_graph(TrainConfig(models=("cnn", "cnn"), label_smoothing=0.2))
    for i in (0, 1):
        assert graph.edges[i][i].losses == {"smoothed_cross_entropy(smoothing=0.2)": 1.0}
        assert graph.edges[i][1 - i].losses == {"kl": 1.0}
    own = ktg.Graph(["cnn"], [[ktg.Edge(loss="smoothed_cross_entropy(smoothing=0.3)")]])
    assert own.smoothed(0.2) == own
    with pytest.raises(InputError, match="smoothing at least 0 and below 1"):
        ktg.graphs.mutual(["cnn", "cnn"]).smoothed(1.5)
