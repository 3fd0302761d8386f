"""Fits of a student to its teacher: what they minimise, and that they can be gone on with."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_variables import random_variables

import ktg_jax as ktg
from ktg_jax.errors import InputError, RunError
from ktg_jax.models.layers import BatchNormRelu
from ktg_jax.priors.channels import passed_on, select_channels, select_start
from ktg_jax.priors.fitting import FitPlan, FitState, with_own_statistics
from ktg_jax.priors.recast import recast_stages
from ktg_jax.priors.regression import regress_stages

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
IMAGES = RNG.integers(0, 256, (12, 8, 8, 3), np.uint8)
FLOATS = jnp.asarray(IMAGES) / 255.0
LABELS = np.arange(12) % 4


class Linear(nn.Module):
    """A stem and two stages without normalisation: all that it does can be said in numpy."""

    widths: tuple[int, ...]
    classes: int = 4

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(self.widths[0], (1, 1), use_bias=False, name="stem")(images)
        for stage, width in enumerate(self.widths[1:], start=1):
            x = nn.Conv(width, (1, 1), use_bias=False, name=f"stage{stage}")(x)
        return nn.Dense(self.classes, name="classifier")(x.mean((1, 2)))


class Normal(nn.Module):
    """The same with normalisation, and no stem."""

    widths: tuple[int, ...] = (4, 6)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = images
        for stage, width in enumerate(self.widths, start=1):
            x = nn.Conv(width, (3, 3), use_bias=False, name=f"stage{stage}_conv")(x)
            x = BatchNormRelu(name=f"stage{stage}_norm")(x, train)
        return nn.Dense(4, name="classifier")(x.mean((1, 2)))


def linear(*widths: int) -> ktg.NodeFns:
    return ktg.from_linen(Linear(widths), mode=lambda train: {}, rngs=())


TEACHER, STUDENT = linear(4, 4, 6), linear(2, 2, 3)


def both(teacher: ktg.NodeFns, student: ktg.NodeFns) -> tuple[Any, Any]:
    """Random variables of both."""
    return random_variables(teacher, FLOATS, 0), random_variables(student, FLOATS, 1)


THEIRS, OWN = both(TEACHER, STUDENT)


def kernels(variables: Any) -> list[np.ndarray]:
    params = variables[0]
    convolutions = [np.asarray(params[n]["kernel"])[0, 0] for n in ("stem", "stage1", "stage2")]
    return [*convolutions, *(np.asarray(params["classifier"][k]) for k in ("kernel", "bias"))]


def cross_entropy(features: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> float:
    logits = features.mean((1, 2)) @ kernel + bias
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(-logs[np.arange(len(LABELS)), LABELS].mean())


def one_step(fit: Any, *networks: Any, **options: Any) -> tuple[FitState, dict[str, Any], Any]:
    """The state after one step on all images, and what it said of the state before."""
    kept: list[Any] = []
    fitted = fit(
        *networks,
        IMAGES,
        LABELS,
        rng=KEY,
        steps=1,
        batch_size=12,
        on_step=lambda state, metrics: kept.append((state, metrics)),
        **options,
    )
    ((state, metrics),) = kept
    assert state.step == 1
    return state, metrics, fitted


def test_a_stages_residual_is_the_share_of_its_teachers_variance() -> None:
    _, metrics, _ = one_step(regress_stages, TEACHER, THEIRS, STUDENT, OWN, select=True)
    stem, first, second, _, _ = kernels(THEIRS)
    x = FLOATS
    t0 = np.asarray(x) @ stem
    t1 = t0 @ first
    t2 = t1 @ second
    sel = [[0, 2], [0, 2], [0, 2, 4]]  # the third keeps the two, and adds the first new one
    for made, target, metric in [
        (t0[..., sel[0]] @ first[np.ix_(sel[0], sel[1])], t1[..., sel[1]], metrics["stages"][0]),
        (t1[..., sel[1]] @ second[np.ix_(sel[1], sel[2])], t2[..., sel[2]], metrics["stages"][1]),
    ]:
        expected = np.square(made - target).mean() / target.var((0, 1, 2)).mean()
        np.testing.assert_allclose(metric, expected, rtol=1e-4)


def moved(state: FitState, before: Any) -> set[str]:
    changed = jax.tree.map(lambda a, b: bool(np.abs(a - b).max() > 0), state.params, before)
    return {name for name, part in changed.items() if any(jax.tree.leaves(part))}


def test_what_a_fit_moves() -> None:
    given = TEACHER, THEIRS, STUDENT, OWN
    state, _, fitted = one_step(regress_stages, *given, select=False, inputs="own")
    assert moved(state, OWN[0]) == {"stem", "stage1", "stage2", "classifier"}
    chex.assert_trees_all_equal(fitted.params, state.params)
    # A student that is a part of its teacher has the teacher's stem, exactly.
    widths = (4, 4, 6)
    start = select_start(THEIRS, OWN, select_channels(widths, (2, 2, 3)), widths)
    state, _, _ = one_step(regress_stages, *given)
    assert moved(state, start[0]) == {"stage1", "stage2", "classifier"}
    state, _, _ = one_step(recast_stages, *given)
    assert moved(state, start[0]) == {"stem", "stage1", "stage2", "classifier"}
    assert set(state.projections) == {1, 2}


@pytest.mark.parametrize(("inputs", "hears"), [("teacher", False), ("own", True)])
def test_whether_a_stage_has_to_make_up_for_the_one_before(inputs: str, hears: bool) -> None:
    """The first stage fits its teacher's exactly, so only the second one's loss could move it."""
    start = jax.tree.map(np.array, OWN)
    stem, first, *_ = kernels(THEIRS)
    start[0]["stem"]["kernel"][0, 0] = stem[:, [0, 2]]
    teacher = jax.tree.map(np.array, THEIRS)
    teacher[0]["stage1"]["kernel"][0, 0, [1, 3]] = 0  # so that the chosen channels suffice
    start[0]["stage1"]["kernel"][0, 0] = first[np.ix_([0, 2], [0, 2])]
    given = TEACHER, teacher, STUDENT, start
    state, metrics, _ = one_step(regress_stages, *given, select=False, inputs=inputs)
    np.testing.assert_allclose(metrics["stages"][0], 0, atol=1e-10)
    change = np.abs(state.params["stage1"]["kernel"] - start[0]["stage1"]["kernel"]).max()
    # Adam's first step is as large as its rate wherever there is any gradient but rounding.
    gradient = np.abs(state.opt_state[0].mu[0]["stage1"]["kernel"]).max()
    assert (gradient > 1e-4) == hears, change


def test_the_rest_of_the_teacher_goes_on_from_a_students_stage() -> None:
    """A student that is the teacher is judged as the teacher is, by way of each stage."""
    _, metrics, _ = one_step(recast_stages, TEACHER, THEIRS, TEACHER, OWN_OF_TEACHER)
    stem, first, second, kernel, bias = kernels(THEIRS)
    expected = cross_entropy(np.asarray(FLOATS) @ stem @ first @ second, kernel, bias)
    np.testing.assert_allclose(metrics["stages"], [expected] * 2, rtol=1e-4)


OWN_OF_TEACHER = random_variables(TEACHER, FLOATS, 5)


FITS = {"regression": regress_stages, "recast": recast_stages}


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("widths", [(2, 3), (6, 8)], ids=["narrower", "wider"])
def test_a_fit_goes_on_where_it_stood(fit: str, widths: tuple[int, int]) -> None:
    teacher, student = (ktg.from_linen(Normal(w), rngs=()) for w in ((4, 6), widths))
    theirs, own = both(teacher, student)
    before = jax.tree.map(np.copy, theirs)
    options: dict[str, Any] = {
        "rng": KEY,
        "batch_size": 4,
        "max_offset": 1,
        "flip": True,
        "steps": 12,
    }
    given = teacher, theirs, student, own, IMAGES, LABELS
    states: dict[int, FitState] = {}
    losses: list[float] = []

    def keep(state: FitState, metrics: Any) -> None:
        states[int(state.step)] = state
        losses.append(float(metrics["stages"].sum()))

    whole = FITS[fit](*given, on_step=keep, **options)
    again = FITS[fit](*given, state=states[5], **options)
    chex.assert_trees_all_equal(again[:2], whole[:2])
    chex.assert_trees_all_equal(theirs, before)
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    chex.assert_trees_all_equal_shapes(whole[:2], own)
    done = FITS[fit](*given, state=states[12], **options)
    chex.assert_trees_all_equal(done[:2], whole[:2])


def test_statistics_of_its_own_are_those_of_what_the_student_sees() -> None:
    student = ktg.from_linen(Normal(), rngs=())
    variables = random_variables(student, FLOATS, 0)
    plan = FitPlan(batch_size=12)
    params, model_state = with_own_statistics(student, variables, IMAGES, plan, rng=KEY)
    chex.assert_trees_all_equal(params, variables[0])
    seen, _ = passed_on(student, variables, FLOATS, train=True)
    before = FLOATS, seen.stages[1]
    for g, x in enumerate(before, start=1):
        conv = nn.Conv(Normal.widths[g - 1], (3, 3), use_bias=False)
        y = np.asarray(conv.apply({"params": params[f"stage{g}_conv"]}, x))
        stored = model_state["batch_stats"][f"stage{g}_norm"]
        np.testing.assert_allclose(stored["mean"], y.mean((0, 1, 2)), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(stored["var"], y.var((0, 1, 2), ddof=1), rtol=1e-3)


@pytest.mark.parametrize(("steps", "said"), [(3, 3), (500, 50)])
def test_a_fit_that_diverges_says_so(steps: int, said: int) -> None:
    seen: list[int] = []
    with pytest.raises(RunError, match=rf"^step {said} of the fit: a parameter of the student"):
        regress_stages(
            TEACHER,
            THEIRS,
            STUDENT,
            OWN,
            IMAGES,
            LABELS,
            rng=KEY,
            steps=steps,
            batch_size=4,
            learning_rate=1e38,
            on_step=lambda state, metrics: seen.append(int(state.step)),
        )
    assert seen[-1] == said - 1  # nobody keeps what is not finite


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
def test_statistics_taken_anew_do_not_depend_on_the_former_ones(momentum: float) -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            x = nn.Conv(4, (3, 3), name="stage1_conv")(x)
            norm = nn.BatchNorm(not train, momentum=momentum, name="stage1_norm")
            return nn.Dense(4)(norm(x).mean((1, 2)))

    fns = ktg.from_linen(Net())
    params, state = fns.init(KEY, FLOATS)
    images, plan = np.asarray(IMAGES), FitPlan(batch_size=len(IMAGES))
    far = jax.tree.map(lambda leaf: 7 * leaf + 3, state)
    ends = [
        with_own_statistics(fns, (params, start), images, plan, rng=KEY, number=20)[1]
        for start in (state, far)
    ]
    chex.assert_trees_all_close(*ends, rtol=2e-3, atol=2e-3)
    made = fns.apply(params, state, FLOATS, True)[1]["batch_stats"]["stage1_norm"]["mean"]
    before = state["batch_stats"]["stage1_norm"]["mean"]
    mean = (made - momentum * before) / (1 - momentum)
    found = ends[0]["batch_stats"]["stage1_norm"]["mean"]
    np.testing.assert_allclose(found, mean, rtol=5e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("vgg8", r"^student: got '5 stages'; allowed: the teacher's 3 stages"),
        ("shufflenet_v2", r"^student stage 1: got \(4, 4\); allowed: the teacher's size, \(8, 8\)"),
    ],
)
@pytest.mark.parametrize("fit", FITS)
def test_stages_that_do_not_match_are_refused(fit: str, student: str, message: str) -> None:
    teacher, other = (ktg.build_model(name, 4) for name in ("cnn", student))
    theirs, own = both(teacher, other)
    with pytest.raises(InputError, match=message):
        FITS[fit](teacher, theirs, other, own, IMAGES, LABELS, rng=KEY, batch_size=4)


@pytest.mark.parametrize("fit", FITS)
def test_other_classes_are_refused(fit: str) -> None:
    ten = ktg.from_linen(Linear((4, 4, 6), classes=10), mode=lambda train: {}, rngs=())
    theirs = random_variables(ten, FLOATS, 0)
    message = r"^student: got '4 classes'; allowed: the teacher's 10 classes"
    with pytest.raises(InputError, match=message):
        FITS[fit](ten, theirs, STUDENT, OWN, IMAGES, LABELS, rng=KEY, batch_size=4)
    message = r"^labels: got '0 to 4'; allowed: the teacher's classes, 0 to 3"
    with pytest.raises(InputError, match=message):
        FITS[fit](TEACHER, THEIRS, STUDENT, OWN, IMAGES, np.arange(12) % 5, rng=KEY, batch_size=4)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES[..., 0], LABELS, r"^images: got \(12, 8, 8\); allowed: uint8 \[n, H, W, C\]"),
        (IMAGES / 255, LABELS, r"^images: got \(12, 8, 8, 3\); allowed: uint8 \[n, H, W, C\]"),
        (IMAGES, LABELS[:5], r"^labels: got \(5,\); allowed: int \[12\], one an image"),
    ],
)
def test_data_that_are_no_images_and_classes_are_refused(
    images: Any, labels: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        regress_stages(TEACHER, THEIRS, STUDENT, OWN, images, labels, rng=KEY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"^steps: got 0; allowed: a whole number above 0"),
        ({"learning_rate": 0.0}, r"^learning_rate: got 0.0; allowed: a finite number above 0"),
        ({"batch_size": 13}, r"^batch_size: got 13; allowed: 1 to the 12 training images"),
        ({"inputs": "both"}, r"^inputs: got 'both'; allowed: teacher, own"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        regress_stages(TEACHER, THEIRS, STUDENT, OWN, IMAGES, LABELS, rng=KEY, **options)


@pytest.mark.slow
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("teacher", "student"), [("resnet8", "wrn10_1"), ("wrn10_2", "resnet8"), ("cnn", "resnet8")]
)
def test_families_of_built_in_networks(fit: str, teacher: str, student: str) -> None:
    networks = ktg.build_model(teacher, 4), ktg.build_model(student, 4)
    theirs, own = both(*networks)
    seen: list[Any] = []
    fitted = FITS[fit](
        networks[0],
        theirs,
        networks[1],
        own,
        IMAGES,
        LABELS,
        rng=KEY,
        batch_size=12,
        steps=20,
        on_step=lambda state, metrics: seen.append(metrics["stages"]),
    )
    chex.assert_trees_all_equal_shapes(fitted[:2], own)
    assert (seen[-1] < seen[0]).all()
