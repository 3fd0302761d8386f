"""What every training is asked: the data, the optimiser and the schedule; and their checks."""

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ktg_jax.checks import check_not_negative, check_positive
from ktg_jax.data.streamed import Streaming
from ktg_jax.errors import InputError, in_a_line

MOST = 2**31 - 1
"""The largest number of whatever is counted: steps are 32-bit integers."""

MOST_SEED = 2**32 - 1
"""The largest seed: JAX takes the last 32 bits of a larger one, which would be another seed."""

MOST_SEEDS = 1000
"""The most seeds of one command."""

MOST_WORKERS = 256
"""The most processes that read images."""

MOST_IMAGE_SIZE = 4096
MOST_RATE = 1e30
"""The largest rate of learning and decay, which are float32."""
MOST_ALPHA = 1e6
"""The largest alpha of a Beta distribution, which is half and half then."""
DATA_AND_TRAINING = {"data": "data", "training": "epochs"}
"""The groups of the options of `Training`, by their first fields."""


@dataclass(frozen=True)
class Training:
    """The data, and how networks are trained on it."""

    data: Annotated[str, "NAME"] = "digits"
    """digits | cifar10 | cifar100 | tiny_imagenet | tfds:NAME | npz:FILE | folder:DIR."""
    data_dir: str | None = None
    """Where cifar10, cifar100, tiny_imagenet or tfds:NAME are; else tensorflow-datasets' own
    folder."""
    train_limit: int | None = None
    """Use only so many training images (stratified), validation images included; else all."""
    val_fraction: float = 0.1
    """Share of the training images held out for validation (stratified); 0: none. Not used where
    the data has validation images of its own."""
    split_seed: int = 0
    """Seed of the limit and of the validation split; independent of --seed."""
    image_size: int | None = None
    """Resize images to so many pixels a side on load; else they stay as they are."""

    epochs: int = 15
    """Passes over the training images."""
    batch_size: int = 64
    """Images a step, over all devices; a last partial batch is dropped."""
    learning_rate: float = 0.1
    """Peak learning rate of SGD with Nesterov momentum 0.9."""
    schedule: Literal["step", "cosine"] = "step"
    """step: times 0.1 after 30, 60 and 90 per cent of the training; cosine: down to 0."""
    weight_decay: float = 5e-4
    """Coupled weight decay, on all parameters."""
    warmup_epochs: int = 0
    """Epochs in which the learning rate rises linearly."""
    seed: int = 0
    """Seed of initial weights, data order and augmentation."""
    augment: bool = True
    """Random crops of the image padded by an eighth of its size, and random mirroring."""
    mirror: bool = True
    """Mirroring as part of --augment (never done with digits)."""
    mixup: Annotated[float, "ALPHA"] = 0.0
    """Lay each image over another one, in shares drawn from Beta(ALPHA, ALPHA); 0: off."""
    cutmix: Annotated[float, "ALPHA"] = 0.0
    """Put a box of another image into each, of a size drawn likewise; 0: off. Beside --mixup, each
    batch is mixed in one of the two ways."""
    mixed_precision: bool = False
    """Compute in bfloat16; parameters, statistics and losses stay float32."""


@dataclass(frozen=True)
class StreamOptions:
    """Whether images stay in their files, and how they are read from there."""

    stream: bool = False
    """Leave images in their files, and read them batch by batch: for data larger than memory. Of
    cifar10, cifar100, tiny_imagenet, tfds:NAME and folder:DIR. The same training as from memory."""
    crop: Literal["shift", "resized"] = "shift"
    """shift: what --augment says; resized: a random part of 8 to 100 per cent of each image,
    resized to --image-size, as with ImageNet; evaluation sees the middle. Needs --stream."""
    stream_workers: int = 0
    """Processes that read and decode; 0: threads of this one, enough for few cores."""

    @property
    def streaming(self) -> Streaming | None:
        """As `load_dataset` takes it."""
        return Streaming(self.crop == "resized", self.stream_workers) if self.stream else None


def check_streaming(options: StreamOptions) -> None:
    """Raises InputError for what is said of streams where there is none, or is out of range."""
    at_least(options, 0, "stream_workers", most=MOST_WORKERS)
    if not options.stream:
        for field, usual in (("crop", "shift"), ("stream_workers", 0)):
            if getattr(options, field) != usual:
                raise InputError(field, getattr(options, field), f"{usual} without --stream")


def check_training(training: Training) -> None:
    """Raises InputError for the first value that is out of range, before anything is loaded."""
    at_least(training, 1, "epochs", "batch_size")
    at_least(training, 0, "warmup_epochs")
    at_least(training, 0, "seed", most=MOST_SEED)
    at_least(training, 0, "split_seed", most=2**63 - 1)
    at_least(training, 1, "train_limit")
    at_least(training, 1, "image_size", most=MOST_IMAGE_SIZE)
    check_positive("learning_rate", training.learning_rate)
    check_not_negative("weight_decay", training.weight_decay)
    at_least(training, 0, "learning_rate", "weight_decay", most=MOST_RATE)
    if not 0 <= training.val_fraction < 1:
        raise InputError("val_fraction", training.val_fraction, "at least 0 and below 1")
    for field in ("mixup", "cutmix"):
        check_not_negative(field, getattr(training, field))
        at_least(training, 0, field, most=MOST_ALPHA)
    if training.warmup_epochs >= training.epochs and training.warmup_epochs > 0:
        allowed = f"below epochs ({training.epochs})"
        raise InputError("warmup_epochs", training.warmup_epochs, allowed)


def training_fields(training: Training) -> dict[str, Any]:
    """The fields of `Training` alone, of whatever was made of it."""
    return {field.name: getattr(training, field.name) for field in dataclasses.fields(Training)}


def without_unused(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a training that determine it: mixing that is off is no part of it."""
    return {k: v for k, v in fields.items() if v or k not in ("mixup", "cutmix")}


def at_least(options: Any, minimum: float, *fields: str, most: float = MOST) -> None:
    """Raises InputError for the first of these fields that is less, or more than `most`.

    A field that is None is left alone.
    """
    for field in fields:
        value = getattr(options, field)
        if value is not None and value < minimum:
            raise InputError(field, value, f"at least {minimum}")
        if value is not None and value > most:
            raise InputError(field, value, f"at most {most:,}")


def check_seeds(first: int, number: int) -> None:
    """Raises InputError unless so many seeds from the first on are seeds."""
    if first + number - 1 > MOST_SEED:
        allowed = f"at most {MOST_SEED:,}, the {number} seeds from it on included"
        raise InputError("seed", first, allowed)


def hash_of(fields: Mapping[str, Any], length: int = 8) -> str:
    """So many hexadecimal digits that are the same for the same JSON fields."""
    text = json.dumps(fields, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's fields as they were before JSON made lists of tuples."""
    return {k: tuple(value) if isinstance(value, list) else value for k, value in fields.items()}


def import_modules(names: tuple[str, ...]) -> None:
    """Imports the user's modules, which may register models.

    Raises:
        InputError: a module that is not there, or that raises anything.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            allowed = f"a module that can be imported ({in_a_line(error)})"
            raise InputError("imports", name, allowed) from error
