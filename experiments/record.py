"""Records what a network puts out for the batches of a training: `python -m experiments.record`.

A recorded teacher costs a training next to nothing, and one recording serves every training of the
same batches, whatever its other networks and their seed.
"""

import os
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import tyro
from rich.console import Console

from ktg_jax.data.dataset import Dataset
from ktg_jax.errors import InputError
from ktg_jax.models import check_model
from ktg_jax.models.pickles import refuse_pickle
from ktg_jax.recording import Header, RecordingWriter
from ktg_jax.training.batches import steps_per_epoch
from ktg_jax.training.host_batches import BatchStream
from ktg_jax.training.record import Network, record_batches, record_images

from .runs import cli
from .runs.assemble import load
from .runs.command_line import Command, parse
from .runs.console import make_console
from .runs.facts import data_facts, without_test
from .runs.options import MOST, MOST_SEED, Training, at_least, check_training, import_modules
from .runs.process import check_platform, prepare
from .runs.progress import counted
from .runs.recordings import batches_of, source_of
from .runs.trained import Trained, trained_file, trained_run
from .runs.workdir import Workdir

GROUPS = {
    "recording": "out",
    "batches": "epochs",
    "data": "data",
    "file": "model",
    "speed": "compile_cache",
}

EXAMPLES = r"""Examples:
  python -m experiments.record runs/teacher --epochs 60 --out recordings/teacher
  python -m experiments.record runs/dml:resnet32-1 --data-seed 1 \
      --out recordings/peer
  python -m experiments.record resnet56.safetensors --model resnet56 \
      --input imagenet --data cifar10 --epochs 60 --out recordings/resnet56
  python -m experiments.record runs/teacher --static --crops 8 \
      --out recordings/static"""


@dataclass(frozen=True)
class RecordConfig:
    """Record what a trained network puts out for the batches of a training, to be learned from.

    In a graph's file {"name": "teacher", "outputs": "DIR"} is then a node. The same command again
    goes on where it stopped. Of a run, data, batch size and augmentation are the run's, unless they
    are given.
    """

    command: ClassVar = Command("experiments.record", GROUPS, EXAMPLES)

    source: Annotated[str, tyro.conf.Positional, "RUN[:NODE]|FILE"]
    """Folder of a run (its target), one of its nodes; or a .safetensors file: one that evaluate
    exported, or a state dict of PyTorch."""

    out: str | None = None
    """Folder of the recording; it must be said."""
    static: bool = False
    """One output for each training image, for trainings with any augmentation and any seed; else
    one for each image of each augmented batch."""
    crops: int = 1
    """Of a static recording: the mean over so many augmented views of an image; 1: the image as it
    is."""
    dtype: Literal["float16", "float32"] = "float16"
    """How numbers are stored."""
    top: int | None = None
    """Store only so many classes of each output, the likeliest, and the mass of the rest; else
    all."""

    epochs: int | None = None
    """Epochs of the training that is to learn from it; else those of the run, or 15."""
    data_seed: int = 0
    """Seed of order and augmentation: the --data-seed of that training, or its --seed."""
    batch_size: int | None = None
    """Images a step; else the run's, or 64."""
    augment: bool | None = None
    """Random crops and mirroring, or --no-augment; else as in the run, or yes."""
    mirror: bool | None = None
    """Mirroring as part of --augment, or --no-mirror; else as in the run, or yes."""
    mixup: Annotated[float | None, "ALPHA"] = None
    """As train takes it; else the run's, or 0."""
    cutmix: Annotated[float | None, "ALPHA"] = None
    """As train takes it; else the run's, or 0."""

    data: Annotated[str | None, "NAME"] = None
    """As train takes it; else the run's."""
    data_dir: str | None = None
    """Where the data is; else where it was in the run."""
    train_limit: int | None = None
    """Use only so many training images; else as in the run, or all."""
    val_fraction: float | None = None
    """Share of the training images held out; else as in the run, or 0.1."""
    split_seed: int | None = None
    """Seed of the limit and of the validation split; else the run's, or 0."""
    image_size: int | None = None
    """Resize images to so many pixels a side on load; else as in the run."""

    model: str | None = None
    """Of a state dict, the name of its model, such as resnet56."""
    input: str | None = None
    """Of a state dict, how its network wants its images: imagenet, cifar10, cifar100, half (-1 to
    1), or an object as JSON with mean, std and size; else from 0 to 1."""
    imports: Annotated[tuple[str, ...], "MODULE"] = ()
    """Of a file, Python modules to import first, such as those that call
    ktg_jax.register_model."""

    compile_cache: bool = True
    """Keep compiled programs in the user's cache folder for the next start."""


_OF_FILES = ("model", "input", "imports")
_OF_TRAINING = (
    *("epochs", "batch_size", "augment", "mirror", "mixup", "cutmix", "data", "data_dir"),
    *("train_limit", "val_fraction", "split_seed", "image_size"),
)


def main() -> None:
    """Records what the command line describes."""
    config = parse(RecordConfig)
    check(config)
    prepare(config.compile_cache)
    record(config, make_console())


def check(config: RecordConfig) -> None:
    """Raises InputError for the first value that is out of range, before anything is loaded."""
    _folder_of(config)
    at_least(config, 1, "epochs", "crops", "top")
    at_least(config, 0, "data_seed", most=MOST_SEED)
    if config.crops > 1 and not config.static:
        raise InputError("crops", config.crops, "1, or more with --static")


def record(config: RecordConfig, console: Console) -> None:
    """Records, or goes on recording.

    Raises:
        InputError: no run or file there, a network that is not of this data, a folder that holds
            something else.
        RunError: no checkpoint that can be read, or a recording that cannot be written.
    """
    check(config)
    workdir, name = _split(config.source)
    trained, training, dataset = _of_file(config) if workdir is None else _of_run(config, workdir)
    index = trained.index(name)
    if said := trained.said(config.source):
        cli.say(console, said)
    network = Network(
        trained.node_fns[index], trained.state.params[index], trained.state.model_state[index]
    )
    batches = batches_of(training, dataset)
    stream = BatchStream(dataset.train.images, dataset.train.labels, batches, config.data_seed)
    source = source_of(trained.models[index], network, trained.inputs[index])
    header = _header(config, training, stream, dataset.num_classes, source)
    writer = RecordingWriter(_folder_of(config), header)
    if writer.is_complete:
        cli.say(console, f"{config.out} is complete; nothing to do.")
        return
    unit = "images" if config.static else "steps"
    cli.say(
        console,
        f"Recording {trained.models[index]} for {header.rows} {unit}: "
        f"{header.bytes / 2**20:.1f} MiB in {config.out}.",
    )
    if writer.rows:
        cli.say(console, f"Going on after {writer.rows} {unit}.")
    rows = (
        record_images(network, stream, config.crops, first=writer.rows)
        if config.static
        else record_batches(network, stream, range(writer.rows, header.rows))
    )
    with writer, counted(console, unit, header.rows, writer.rows) as advance:
        for logits in rows:
            writer.add(logits)
            advance(writer.rows)
    cli.say(
        console,
        f'Complete. In a graph: {{"name": "teacher", "outputs": "{config.out}"}}; the training '
        f"needs {_needs(config, training)}.",
    )


def _folder_of(config: RecordConfig) -> str:
    if not config.out:
        raise InputError("out", config.out, "a folder for the recording")
    return config.out


def _split(source: str) -> tuple[Workdir | None, str | None]:
    """The folder of a run, and the name of a node (None: its target); None: it is a file.

    Raises:
        InputError: neither is there.
    """
    if os.path.isfile(os.path.expanduser(source)):
        return None, None
    folder, _, name = source.rpartition(":")
    if folder and not Workdir(source).exists and Workdir(folder).exists:
        return Workdir(folder), name
    workdir = Workdir(source)
    if not workdir.exists:
        allowed = "the folder of a run, RUN:NODE, or a .safetensors file"
        raise InputError("source", source, allowed)
    return workdir, None


def _of_run(config: RecordConfig, workdir: Workdir) -> tuple[Trained, Training, Dataset]:
    """The networks of a run, the training that is recorded for, and its data."""
    for field in _OF_FILES:
        if getattr(config, field):
            allowed = "nothing: a run knows it; it is for files"
            raise InputError(field, getattr(config, field), allowed)
    run = workdir.config
    import_modules(tuple(run["imports"]))
    check_platform()
    trained = trained_run(workdir, "last")
    was = {field: run[field] for field in _OF_TRAINING if field in run}
    was |= {"data": workdir.data, "data_dir": workdir.data_dir}
    training = _training(config, was)
    dataset = load(training, with_test=False)
    facts, known = without_test(data_facts(dataset)), run["data_facts"]
    for field in ("classes", "image_shape", "class_names_crc32"):
        if field in known and known[field] != facts[field]:
            allowed = f"data like the run's ({field}: {known[field]}, not {facts[field]})"
            raise InputError("data", training.data, allowed)
    return trained, training, dataset


def _of_file(config: RecordConfig) -> tuple[Trained, Training, Dataset]:
    """The network of a file, the training that is recorded for, and its data."""
    refuse_pickle(config.source)
    if config.data is None:
        raise InputError("data", None, "the data of the training, such as cifar10: a file has none")
    import_modules(config.imports)
    check_platform()
    if config.model is not None:
        check_model(config.model)
    training = _training(config, {})
    dataset = load(training, with_test=False)
    trained = trained_file(
        config.source,
        config.model,
        config.input,
        num_classes=dataset.num_classes,
        image_shape=dataset.image_shape,
    )
    return trained, training, dataset


def _training(config: RecordConfig, was: dict[str, Any]) -> Training:
    """The training as far as its batches go; what is not given is as it was."""
    given = {field: getattr(config, field) for field in _OF_TRAINING}
    said = {field: value for field, value in given.items() if value is not None}
    if "data" in said:  # of other data the run's folder says nothing
        was = {field: value for field, value in was.items() if field != "data_dir"}
    training = Training(**{**was, **said})
    check_training(training)
    return training


def _header(
    config: RecordConfig,
    training: Training,
    stream: BatchStream,
    classes: int,
    source: dict[str, Any],
) -> Header:
    facts = stream.facts
    form: dict[str, Any] = {"classes": classes, "dtype": config.dtype, "top": config.top}
    if config.static:
        of = {field: facts[field] for field in ("images", "image_shape", "train_crc32")}
        if config.crops > 1:
            source = source | {"crops": config.crops, "data_seed": config.data_seed}
        return Header("images", of, rows=len(stream.images), source=source, **form)
    steps = training.epochs * steps_per_epoch(len(stream.images), training.batch_size)
    if steps > MOST:
        raise InputError("epochs", training.epochs, f"so many that there are at most {MOST} steps")
    return Header("batches", facts, rows=steps, source=source, **form)


def _needs(config: RecordConfig, training: Training) -> str:
    """What a training must be told to have these batches."""
    if config.static:
        return "the same training images, with any augmentation and seed"
    options = [] if training.augment else ["--no-augment"]
    options += [f"--{k} {a:g}" for k in ("mixup", "cutmix") if (a := getattr(training, k))]
    said = "".join(f"{option}, " for option in options)
    return (
        f"{said}--data-seed {config.data_seed}, --batch-size {training.batch_size} and at "
        f"most {training.epochs} epochs"
    )


if __name__ == "__main__":
    cli.run(main)
