"""How modules are told whether they train."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ktg_jax import InputError, NodeFns, from_linen, from_nnx
from ktg_jax.models.modes import in_training

IMAGES = jnp.asarray(np.random.default_rng(0).random((8, 4, 4, 3), np.float32))
MEAN = jnp.mean(IMAGES, axis=(0, 1, 2))
KEY = jax.random.key(0)


class Normalised(nn.Module):
    """What the modules below have in common: batch statistics, where they are told to train."""

    def logits(self, images: jax.Array, train: bool) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(images)
        return nn.Dense(5, name="classifier")(x.reshape(len(x), -1))


class Train(Normalised):
    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        return self.logits(images, train)


class Training(Normalised):
    @nn.compact
    def __call__(self, images: jax.Array, training: bool = False) -> jax.Array:
        return self.logits(images, training)


class IsTraining(Normalised):
    @nn.compact
    def __call__(self, images: jax.Array, *, is_training: bool) -> jax.Array:
        return self.logits(images, is_training)


class TrainByDefault(Normalised):
    @nn.compact
    def __call__(self, images: jax.Array, train: bool = True) -> jax.Array:
        return self.logits(images, train)


class Deterministic(Normalised):
    @nn.compact
    def __call__(self, images: jax.Array, deterministic: bool = True) -> jax.Array:
        return self.logits(images, not deterministic)


class RunningAverage(Normalised):
    @nn.compact
    def __call__(self, images: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        return self.logits(images, not use_running_average)


class EvalMode(Normalised):
    @nn.compact
    def __call__(self, images: jax.Array, rate: float = 0.1, eval_mode: bool = True) -> jax.Array:
        return self.logits(images, not eval_mode)


class Both(Normalised):
    """Trains only where it is told so in both senses."""

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, deterministic: bool = True
    ) -> jax.Array:
        return self.logits(images, train and not deterministic)


class Field(Normalised):
    training: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        return self.logits(images, self.training)


class UnsetField(Normalised):
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        assert self.deterministic is not None
        return self.logits(images, not self.deterministic)


class Merged(Normalised):
    """An argument and a field of one name, of which flax wants one to be None."""

    train: bool | None = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool | None = None) -> jax.Array:
        return self.logits(images, nn.merge_param("train", self.train, train))


class Phase(Normalised):
    """A mode argument of an unknown name."""

    default: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, phase: bool | None = None) -> jax.Array:
        return self.logits(images, self.default if phase is None else phase)


class Needed(Normalised):
    @nn.compact
    def __call__(self, images: jax.Array, phase: str) -> jax.Array:
        return self.logits(images, phase == "fit")


class Anything(Normalised):
    @nn.compact
    def __call__(self, images: jax.Array, **options: bool) -> jax.Array:
        return self.logits(images, options.get("train", False))


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array, phase: bool = False) -> jax.Array:
        x = nn.Dropout(0.5, deterministic=not phase)(images.reshape(len(images), -1))
        return nn.Dense(5)(x)


class Lifted(Normalised):
    """Within a transformation, through which arrays do not come as they were."""

    @nn.compact
    def __call__(self, images: jax.Array, phase: bool = False) -> jax.Array:
        return nn.remat(Train, static_argnums=(2,))(name="train")(images, phase)


def running_mean(fns: NodeFns) -> jax.Array:
    """The mean that a training pass leaves; evaluation must work, too, and change nothing."""
    params, before = fns.init(KEY, IMAGES)
    _, after = fns.apply(params, before, IMAGES, True)
    _, still = fns.apply(params, after, IMAGES, False)
    assert still is after
    (mean,) = (
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(after)
        if "mean" in jax.tree_util.keystr(path)
    )
    return mean


@pytest.mark.parametrize(
    "module",
    [
        Train(),
        Training(),
        IsTraining(),
        TrainByDefault(),
        Deterministic(),
        RunningAverage(),
        EvalMode(),
        Both(),
        Field(),
        Field(training=True),
        UnsetField(),
        Merged(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_flag_of_a_known_name_is_set_in_its_sense(module: nn.Module) -> None:
    np.testing.assert_allclose(running_mean(from_linen(module)), 0.5 * MEAN, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "mode"),
    [
        (Phase(), "phase"),
        (Phase(default=True), "phase"),
        (Needed(), lambda train: {"phase": "fit" if train else "predict"}),
        (Anything(), "train"),
        (Phase(), "default"),
        (Lifted(), "phase"),
    ],
)
def test_a_flag_of_another_name_can_be_said(module: nn.Module, mode: Any) -> None:
    np.testing.assert_allclose(running_mean(from_linen(module, mode=mode)), 0.5 * MEAN, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (Phase(), "batch_stats that training leaves as they are"),
        (Phase(default=True), "a state that changes in evaluation"),
        (Anything(), "batch_stats that training leaves as they are"),
        (Dropping(), "dropout that is idle in training"),
        (Lifted(), "batch normalisation that is idle in training"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_module_that_trains_as_if_it_were_evaluated_is_refused(
    module: nn.Module, found: str
) -> None:
    fns = from_linen(module)
    with pytest.raises(InputError) as refused:
        fns.init(KEY, IMAGES)
    assert str(refused.value).startswith(f"mode of {type(module).__name__}: got '{found}'; allowed")
    assert "train, training, is_training, deterministic" in refused.value.allowed
    assert "mode='name'" in refused.value.allowed


def test_a_module_that_is_to_be_told_nothing_can_be_said_to_be_so() -> None:
    fns = from_linen(Phase(), mode=lambda train: {})
    np.testing.assert_array_equal(running_mean(fns), jnp.zeros(3))


def test_a_call_that_needs_another_argument_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="mode of Needed: got 'a call that needs phase'; allowed"):
        from_linen(Needed())


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("fase", "mode: got 'fase'; allowed: an argument of the call of Phase, or its field"),
        (3, "mode: got 3; allowed: a name, or a function of train that returns a dict"),
        (lambda train: train, "mode: got <function .*; allowed: a name, or a function of train"),
    ],
)
def test_a_mode_that_says_nothing_is_refused(mode: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_linen(Phase(), mode=mode)


class Buffered(nn.Module):
    """State that a training pass changes by itself, as where it is mutable."""

    @nn.compact
    def __call__(self, images: jax.Array, flip: bool = False) -> jax.Array:
        seen = self.variable("seen", "mean", jnp.zeros, 3)
        if self.is_mutable_collection("seen") and not self.is_initializing():
            seen.value = jnp.mean(images, axis=(0, 1, 2))
        return nn.Dense(5)(images.reshape(len(images), -1))


def test_state_that_training_changes_without_being_told_is_accepted() -> None:
    np.testing.assert_allclose(running_mean(from_linen(Buffered())), MEAN, atol=1e-6)


@pytest.mark.parametrize("name", ["train", "training", "is_training", "train_mode", "is_train"])
def test_names_of_training(name: str) -> None:
    assert in_training(name) is True


@pytest.mark.parametrize("name", ["deterministic", "use_running_average", "is_eval", "inference"])
def test_names_of_evaluation(name: str) -> None:
    assert in_training(name) is False


@pytest.mark.parametrize("name", ["phase", "mode", "rate", "mask", "is_", "strain"])
def test_other_names_say_nothing(name: str) -> None:
    assert in_training(name) is None


# --- flax.nnx


class NormalisedNNX(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
        self.classifier = nnx.Linear(48, 5, rngs=rngs)

    def logits(self, images: jax.Array, train: bool) -> jax.Array:
        x = self.norm(images, use_running_average=not train)
        return self.classifier(x.reshape(len(x), -1))


class TrainNNX(NormalisedNNX):
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        return self.logits(images, train)


class DeterministicNNX(NormalisedNNX):
    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        return self.logits(images, not deterministic)


class AttributeNNX(NormalisedNNX):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        super().__init__(rngs=rngs)
        self.training = False

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.logits(images, self.training)


class HidingNNX(NormalisedNNX):
    """An attribute of the name of a method of all modules."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        super().__init__(rngs=rngs)
        self.train: Any = False

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.logits(images, self.train)


class PhaseNNX(NormalisedNNX):
    def __call__(self, images: jax.Array, phase: bool = False) -> jax.Array:
        return self.logits(images, phase)


class DroppingNNX(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.classifier = nnx.Linear(48, 5, rngs=rngs)

    def __call__(self, images: jax.Array, phase: bool = False) -> jax.Array:
        x = self.dropout(images.reshape(len(images), -1), deterministic=not phase)
        return self.classifier(x)


class NeededNNX(NormalisedNNX):
    def __call__(self, images: jax.Array, phase: bool) -> jax.Array:
        return self.logits(images, phase)


@pytest.mark.parametrize("create", [TrainNNX, DeterministicNNX, AttributeNNX, HidingNNX])
def test_an_nnx_module_is_told_by_flags_of_known_names_too(create: Any) -> None:
    np.testing.assert_allclose(running_mean(from_nnx(create)), 0.5 * MEAN, atol=1e-6)


def test_an_nnx_module_that_trains_as_if_it_were_evaluated_is_refused() -> None:
    with pytest.raises(InputError, match="mode of PhaseNNX: got 'batch statistics that training"):
        from_nnx(PhaseNNX).init(KEY, IMAGES)
    with pytest.raises(InputError, match="mode of DroppingNNX: got 'dropout that training leaves"):
        from_nnx(DroppingNNX).init(KEY, IMAGES)
    with pytest.raises(InputError, match="mode of NeededNNX: got 'a call that needs phase'"):
        from_nnx(NeededNNX)
