"""Knowledge aggregation: what is fitted, and from what."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_variables import random_variables

import ktg_jax as ktg
from ktg_jax.errors import InputError, RunError
from ktg_jax.priors import aggregate_prior
from ktg_jax.priors.aggregate import Aggregator

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
KERNELS = {"stage1_conv.kernel": (3, 3, 2, 4), "stage2_conv.kernel": (3, 3, 3, 5)}


def labelled(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise, and a pattern that is the class: stripes along, across, both or none."""
    labels = np.arange(count) % 4
    images = RNG.integers(0, 60, (count, 8, 8, 1), np.uint8)
    images[labels % 2 == 1, ::2] += 90
    images[labels // 2 == 1, :, ::2] += 90
    return images, labels


IMAGES, LABELS = labelled(50)


def stages_of(factor: jax.Array, state: Any, images: jax.Array) -> Any:
    """For a teacher whose stages see the image, times its parameter, and its 2x2 cells."""
    cells = images.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 4, 4, 4)
    return images[:, 0, :4, 0], (factor * images, cells)


WATCHING = ktg.NodeFns(
    init=lambda rng, images: (jnp.ones(()), {}),
    apply=lambda factor, state, images, train: (stages_of(factor, state, images)[0], state),
    stages=lambda factor, state, images, train: (stages_of(factor, state, images), state),
)


def fitted(teacher: ktg.NodeFns = WATCHING, factor: float = 1.0, **changes: Any) -> ktg.Prior:
    options = {"rng": KEY, "steps": 2, "batch_size": 16, **changes}
    kernels = options.pop("kernels", KERNELS)
    data = options.pop("data", (IMAGES, LABELS))
    return aggregate_prior(teacher, jnp.asarray(factor), {}, kernels, *data, **options)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [("resnet8", "wrn10_2"), ("wrn10_2", "resnet8")])
def test_priors_of_built_in_pairs(pair: tuple[str, str]) -> None:
    teacher, student = (ktg.build_model(name, 4) for name in pair)
    params, model_state = random_variables(teacher, IMAGES[:1], seed=1)
    before = jax.tree.map(np.copy, (params, model_state))
    student_params, _ = jax.eval_shape(student.init, KEY, jnp.zeros((1, 8, 8, 1)))
    kernels = ktg.stage_kernels(student_params)
    progress: list[tuple[int, Any]] = []
    prior = aggregate_prior(
        teacher,
        params,
        model_state,
        kernels,
        IMAGES,
        LABELS,
        rng=KEY,
        steps=25,
        batch_size=25,
        on_step=lambda step, metrics: progress.append((step, metrics)),
    )
    assert prior.shapes == kernels
    chex.assert_type(list(prior.kernels), jnp.float32)
    assert prior.accuracy is not None
    assert prior.accuracy.shape == (3,)
    assert (prior.accuracy > 0.5).all()
    chex.assert_trees_all_equal((params, model_state), before)
    assert [step for step, _ in progress] == list(range(1, 26))
    first, last = progress[0][1], progress[-1][1]
    assert first["loss"].shape == first["accuracy"].shape == (3,)
    assert (last["loss"] < 0.7 * first["loss"]).all()


@pytest.mark.slow
def test_the_kernels_learn_to_tell_patterns_apart() -> None:
    prior, shorter = fitted(steps=150), fitted()
    assert prior.accuracy is not None
    assert prior.accuracy.tolist() == [1.0, 1.0]  # 50 images in batches of 16: none counts twice
    for kernel, less_fitted in zip(prior.kernels, shorter.kernels, strict=True):
        assert jnp.abs(kernel - less_fitted).max() > 0.01
    assert prior.paths == shorter.paths == tuple(KERNELS)


@pytest.mark.slow
def test_the_random_key_decides_everything() -> None:
    first, same, other = fitted(), fitted(), fitted(rng=jax.random.key(1))
    chex.assert_trees_all_equal(first, same)
    assert jnp.abs(first.kernels[0] - other.kernels[0]).max() > 0.01


@pytest.mark.slow
def test_stages_are_fitted_each_by_itself() -> None:
    prior, changed = fitted(), fitted(factor=0.01)
    np.testing.assert_allclose(changed.kernels[1], prior.kernels[1], rtol=1e-4, atol=1e-6)
    assert jnp.abs(changed.kernels[0] - prior.kernels[0]).max() > 1e-5


def everything(reader: Aggregator, output: jax.Array) -> Any:
    variables = reader.init(KEY, output, False)
    options: dict[str, Any] = {"capture_intermediates": True, "mutable": ["intermediates"]}
    return reader.apply(variables, output, False, **options), variables


def test_an_aggregator_reads_a_stage_as_it_says() -> None:
    output = jax.ShapeDtypeStruct((5, 7, 7, 6), jnp.float32)
    for stride, kernel_shape in ((1, (3, 3, 2, 4)), (2, (5, 2, 3, 4))):
        reader = Aggregator(kernel_shape, 10, stride)
        (_, captured), variables = jax.eval_shape(partial(everything, reader), output)
        assert variables["params"]["reduction"]["kernel"].shape == (1, 1, 6, kernel_shape[2])
        assert variables["params"]["downscaling"]["kernel"].shape == kernel_shape
        (mapped,) = captured["intermediates"]["downscaling"]["__call__"]
        assert mapped.shape == (5, -(-7 // stride), -(-7 // stride), 4)


@pytest.mark.slow
def test_augmented_data_are_other_data() -> None:
    assert jnp.abs(fitted(flip=True, max_offset=2).kernels[0] - fitted().kernels[0]).max() > 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernels": dict([*KERNELS.items()][:1])}, "student_kernels: got 1; allowed: 2, as many"),
        ({"kernels": {"a": (3, 3, 2), "b": (3, 3, 2, 4)}}, "student_kernels a: got (3, 3, 2); all"),
        ({"data": (IMAGES, LABELS[:-1])}, "labels: got (49,); allowed: int [50], one an image"),
        ({"data": (IMAGES, LABELS + 1)}, "labels: got '1 to 4'; allowed: the teacher's classes, 0"),
        ({"data": (IMAGES, LABELS - 1)}, "labels: got '-1 to 2'; allowed: the teacher's classes"),
        ({"data": (IMAGES, LABELS / 1)}, "labels: got (50,); allowed: int [50]"),
        ({"data": (IMAGES / 255, LABELS)}, "images: got (50, 8, 8, 1); allowed: uint8 [n, H, W,"),
        ({"data": (IMAGES[0], LABELS)}, "images: got (8, 8, 1); allowed: uint8 [n, H, W, C]"),
        ({"data": (IMAGES[:0], LABELS[:0])}, "batch_size: got 16; allowed: 1 to the 0 training"),
        ({"batch_size": 51}, "batch_size: got 51; allowed: 1 to the 50 training images"),
        ({"steps": 0}, "steps: got 0; allowed: a whole number above 0"),
        ({"steps": 1.5}, "steps: got 1.5; allowed: a whole number above 0"),
        ({"stride": True}, "stride: got True; allowed: a whole number above 0"),
        ({"max_offset": 8}, "max_offset: got 8; allowed: 0 to 7"),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as error:
        fitted(**changes)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_teacher_that_does_not_name_its_stages_is_refused() -> None:
    silent = ktg.NodeFns(WATCHING.init, WATCHING.apply)
    with pytest.raises(InputError, match=r"^stages: got None; allowed: a network that names"):
        fitted(silent)


def test_a_fit_that_diverges_is_an_error() -> None:
    with pytest.raises(RunError, match=r"^step 1, prior of stage 1: kernel not finite$"):
        fitted(steps=1, factor=float("nan"))
