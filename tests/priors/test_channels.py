"""A student that starts as a part of its teacher: which channels, and what that computes."""

from collections.abc import Sequence
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_variables import random_variables

import ktg_jax as ktg
from ktg_jax.errors import InputError
from ktg_jax.priors.channels import (
    is_part_of,
    passed_on,
    place_shapes,
    select_channels,
    select_start,
)
from ktg_jax.priors.pair import Pair

IMAGES = jnp.asarray(np.random.default_rng(0).random((3, 8, 8, 3), np.float32))


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        ((4, 4, 8), (4, 4, 8), [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]]),
        # What shortcuts hand on keeps its place; the new half is chosen evenly.
        ((6, 6, 12), (4, 4, 6), [[0, 1, 3, 4], [0, 1, 3, 4], [0, 1, 3, 4, 6, 9]]),
        # A wide stage behind a narrow one, and one that becomes narrower.
        ((2, 8, 4), (2, 4, 2), [[0, 1], [0, 1, 2, 5], [0, 2]]),
        # More new ones than there are: chosen among all.
        ((8, 12), (2, 8), [[0, 4], [0, 1, 3, 4, 6, 7, 9, 10]]),
    ],
)
def test_chosen_channels(
    teacher: tuple[int, ...], student: tuple[int, ...], expected: list[list[int]]
) -> None:
    chosen = select_channels(teacher, student)
    assert [list(each) for each in chosen] == expected


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ((4, 4), r"^student: got '1 stages'; allowed: the teacher's 2 stages"),
        ((4, 4, 9), r"^student: got 9; allowed: at most the teacher's 8 channels behind stage 2"),
        ((5, 5, 8), r"^student: got 5; allowed: at most the teacher's 4 channels before stage 1"),
    ],
)
def test_a_student_that_is_no_part_is_refused(student: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        select_channels((4, 4, 8), student)


def part(teacher: str, student: str) -> tuple[Any, Any, Any, Any]:
    """Both networks' functions, random variables of the teacher, and the student's start."""
    networks = [ktg.build_model(name, 10) for name in (teacher, student)]
    theirs, own = (random_variables(fns, IMAGES, seed) for seed, fns in enumerate(networks))
    shapes = [
        place_shapes(fns, v, IMAGES.shape[1:])
        for fns, v in zip(networks, (theirs, own), strict=True)
    ]
    widths = [[shape[2] for shape in each] for each in shapes]
    channels = select_channels(*widths)
    mask = {c: np.isin(np.arange(c), sel) for c, sel in zip(widths[0], channels, strict=True)}

    def without_others(path: Any, leaf: Any) -> Any:
        """Nothing is put out by the channels that were not chosen."""
        is_dead = path[0].key != "classifier" and path[-1].key in ("kernel", "scale", "bias")
        return leaf * mask[leaf.shape[-1]] if is_dead else leaf

    theirs = jax.tree_util.tree_map_with_path(without_others, theirs[0]), theirs[1]
    start = select_start(theirs, own, channels, widths[0])
    return networks[0], networks[1], theirs, start


@pytest.mark.parametrize(
    ("teacher", "student"),
    [("resnet14", "resnet14_4"), ("wrn10_4", "wrn10_2"), ("resnet8x4", "resnet8x2")],
)
def test_where_the_others_say_nothing_the_part_computes_what_the_whole_does(
    teacher: str, student: str
) -> None:
    teacher_fns, student_fns, theirs, own = part(teacher, student)
    whole, _ = teacher_fns.apply(*theirs, IMAGES, False)
    chosen, _ = student_fns.apply(*own, IMAGES, False)
    bias = theirs[0]["classifier"]["bias"]
    kernels = [v[0]["classifier"]["kernel"] for v in (theirs, own)]
    factor = kernels[0].shape[0] / kernels[1].shape[0]
    np.testing.assert_allclose(chosen - bias, factor * (whole - bias), rtol=2e-3, atol=2e-3)


def test_a_shallower_student_has_the_first_blocks() -> None:
    _, student, theirs, own = part("resnet14", "resnet8")
    taken = {name: theirs[0][name] for name in own[0]}
    statistics = {name: theirs[1]["batch_stats"][name] for name in own[1]["batch_stats"]}
    chex.assert_trees_all_equal(own, (taken, {"batch_stats": statistics}))
    assert not any(name.endswith("block2") for name in own[0])
    assert student.apply(*own, IMAGES, False)[0].shape == (3, 10)


def test_which_students_are_parts() -> None:
    def variables(model: str) -> Any:
        return jax.eval_shape(ktg.build_model(model, 10).init, jax.random.key(0), IMAGES)

    found = {
        pair: is_part_of(*map(variables, pair))
        for pair in [
            ("resnet14", "resnet8_4"),
            ("resnet8", "resnet14"),
            ("resnet14", "wrn10_1"),
            ("wrn10_1", "resnet8"),
            ("cnn", "cnn"),
            ("wrn16_4", "wrn10_2"),
            ("wrn16_4", "wrn16_1"),  # whose first blocks have no shortcuts of their own
        ]
    }
    assert list(found.values()) == [True, False, False, False, True, True, False]


class Stage(nn.Module):
    """A layer within one that is called twice."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(self.width, (3, 3), name="first")(x))
        return nn.relu(nn.Conv(self.width, (3, 3), name="last")(x))


class Staged(nn.Module):
    """Three stages of these names."""

    names: tuple[str, ...]
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.widths[0], (3, 3), name="stem")(x)
        for name, width in zip(self.names, self.widths, strict=True):
            x = Stage(width, name=name)(x)
        return nn.Dense(10, name="classifier")(x.mean((1, 2)))


def test_a_part_is_the_same_whatever_its_stages_are_called() -> None:
    named, called = ("stage1", "stage2", "stage3"), ("a", "b", "c")
    other_names = dict(zip(named, called, strict=True))
    networks = [
        (Staged(named, widths), Staged(called, widths)) for widths in ((8, 16, 32), (4, 6, 8))
    ]
    theirs, own = (
        random_variables(ktg.from_linen(network), IMAGES, seed)
        for seed, (network, _) in enumerate(networks)
    )

    def start(of: int, stages: Sequence[str] | None, *variables: Any) -> Any:
        fns = [ktg.from_linen(network[of], stages=stages) for network in networks]
        pair = Pair.of(fns[0], variables[0], fns[1], variables[1], IMAGES.shape[1:])
        assert pair.channels is not None
        return pair.start(*variables)[0]

    def renamed(params: Any) -> Any:
        return {other_names.get(name, name): leaf for name, leaf in params.items()}

    expected = start(0, None, theirs, own)
    found = start(1, called, *((renamed(params), state) for params, state in (theirs, own)))
    chex.assert_trees_all_equal(found, renamed(expected))
    kernels = theirs[0]["stage2"]["last"]["kernel"], found["b"]["last"]["kernel"]
    chosen = select_channels((8, 8, 16, 32), (4, 4, 6, 8))[2]
    np.testing.assert_array_equal(kernels[1], kernels[0][:, :, chosen][..., chosen])


def test_another_family_cannot_be_a_part() -> None:
    theirs, own = (
        random_variables(ktg.build_model(name, 10), IMAGES, seed=0) for name in ("cnn", "resnet8")
    )
    message = r"^student: got 'stage1_block1.conv1.kernel'; allowed: a student of the teacher's fam"
    with pytest.raises(InputError, match=message):
        select_start(theirs, own, select_channels((16,) * 4, (16,) * 4), (16,) * 4)


def test_random_streams_stay_the_students_own() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, images: jax.Array, train: bool) -> jax.Array:
            x = nn.Dense(4, name="stage1")(images)
            x = nn.Dropout(0.5, deterministic=not train)(x).mean((1, 2))
            return nn.Dense(10, name="classifier")(x)

    fns = ktg.from_linen(Net())
    theirs, own = (fns.init(jax.random.key(seed), IMAGES) for seed in (0, 1))
    assert place_shapes(fns, theirs, (8, 8, 3)) == ((8, 8, 3), (8, 8, 4))
    start = select_start(theirs, own, select_channels((3, 4), (3, 4)), (3, 4))
    chex.assert_trees_all_equal(start[0], theirs[0])
    keys = [jax.random.key_data(v[1]["random_stream"]["key"]) for v in (start, own)]
    assert (keys[0] == keys[1]).all()


def test_a_network_that_cannot_be_fed_is_refused() -> None:
    fns = ktg.NodeFns(lambda rng, x: ({}, {}), lambda p, s, x, t: (x.mean((1, 2)), s))
    with pytest.raises(InputError, match=r"^fed_stages: got None; allowed: a network that can be"):
        place_shapes(fns, ({}, {}), (8, 8, 3))
    with pytest.raises(InputError, match=r"^fed_stages: got None"):
        passed_on(fns, ({}, {}), IMAGES)
