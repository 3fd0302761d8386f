"""What a search is asked to do: the command line's fields, and their checks."""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import quote

import ktg_jax as ktg
from ktg_jax.data.sources import has_val_images
from ktg_jax.errors import InputError
from ktg_jax.graph.node_checks import node_from_json
from ktg_jax.io.json_input import decoded

from ..runs.command_line import Command
from ..runs.config import TrainConfig
from ..runs.identity import data_kind, identity, without_facts
from ..runs.options import (
    DATA_AND_TRAINING,
    MOST_SEEDS,
    Training,
    at_least,
    check_seeds,
    check_training,
    hash_of,
    training_fields,
    with_tuples,
    without_unused,
)
from ..runs.places import place_of

MOST_WORKERS = 1000
Pruner = Literal["asha", "patient", "hyperband", "none"]
Sampler = Literal["effects", "random", "tpe"]


@dataclass(frozen=True)
class _SpaceOptions:
    nodes: int = 3
    """Nodes of a graph, 1 to 100, the target included; the papers' have 2 to 7."""
    target: Annotated[str, "MODEL"] = "cnn"
    """Model of the target, node 0."""
    candidates: Annotated[tuple[str, ...], "MODEL"] = ("cnn", "resnet8")
    """Models that each other node is chosen from."""
    gates: Annotated[tuple[str, ...], "GATE"] = ktg.GATES[:4]
    """Gates that each edge is chosen from."""
    temperatures: tuple[float, ...] = (1.0,)
    """Temperatures that a graph's transfer edges are chosen from."""
    losses: Annotated[tuple[str, ...], "LOSS"] = ("kl",)
    """Losses that each transfer edge carries one of: kl, reverse_kl, attention, features, ...;
    several together as JSON, with their weights: '{"kl": 1, "features": 0.1}'."""
    loss_weights: tuple[float, ...] = (1.0,)
    """Weights that the loss of each transfer edge is multiplied by one of."""
    edge_temperatures: Annotated[tuple[float, ...], "X"] = ()
    """Temperatures that each transfer edge has one of, in place of --temperatures; else one a
    graph."""
    teachers: Annotated[tuple[str, ...], "FILE"] = ()
    """Networks that are trained already, any of which a node may be instead: folders of runs (DIR
    or DIR:NODE), .safetensors files, folders of recordings, or nodes as JSON."""
    teacher_models: Annotated[tuple[str, ...], "MODEL"] = ()
    """The teachers' models, one each; none: the file says it, or shows it."""
    teacher_inputs: Annotated[tuple[str, ...], "INPUT"] = ()
    """How the teachers want their images, one for all or one each: as --inputs of
    experiments.train; none: as the file says, or 0 to 1."""
    imports: Annotated[tuple[str, ...], "MODULE"] = ()
    """Python modules to import first, such as those that call ktg_jax.register_model."""

    trials: int = 50
    """Trainings in all: the baselines, pruned and equivalent trials and the race included."""
    timeout: float | None = None
    """Seconds after which no further trial begins; else there is no end to them."""
    workers: int = 2
    """Processes that train, each on its share of the cores, or on one accelerator."""
    sampler: Sampler = "effects"
    """How graphs are chosen: by the effects of their parts in the trials so far (Thompson sampling
    on a linear model), at random, or by a tree-structured Parzen estimator."""
    draw: Literal["roles", "uniform"] = "roles"
    """How new graphs are drawn: first what each node is (absent, learning, frozen), then gates; or
    each gate uniformly, as in the papers."""
    trial_seeds: int = 3
    """Trials take turns in so many seeds of initial weights, --seed and those after it."""
    race: int = 4
    """So many of the best graphs race at the end of the trials: they get further seeds, and the
    better half goes on until one is left. 0: none."""
    pruner: Pruner = "none"
    """How trials are stopped early: asha (rungs at epochs 1, 2, 4, ...), patient (the same from
    --patience of the training on), hyperband, or none."""
    min_epochs: int = 1
    """No trial is pruned before this epoch."""
    patience: float = 0.5
    """Share of the training after which the first rung of the pruner patient comes."""
    duplicates: Literal["reuse", "retrain"] = "reuse"
    """Equivalent graphs: use the earlier trial's values, or train again with another seed."""
    baselines: bool = True
    """Begin with the designed graphs: independent, mutual and every distillation."""


GROUPS = {
    "graph": "nodes",
    "search": "trials",
    **DATA_AND_TRAINING,
    "ending": "retrain_top",
    "folder": "workdir",
    "speed": "compile_cache",
}

EXAMPLES = r"""Examples:
  python -m experiments.search
  python -m experiments.search --target resnet8 --candidates resnet8 resnet20 \
      --data cifar10 --train-limit 5000 --image-size 16 --epochs 8 --trials 60
  python -m experiments.search --target resnet32 \
      --candidates resnet32 resnet110 wrn28_2 --data cifar100 --epochs 200 \
      --trials 1500 --pruner patient --workers 8 --study cifar100 \
      --storage postgresql+psycopg://me@db.example.org/studies"""


@dataclass(frozen=True)
class SearchConfig(Training, _SpaceOptions):  # the fields of the last come first
    """Search for the knowledge transfer graph that makes its target best.

    The best graphs are then trained again on all training images, next to independent training,
    mutual learning of the same nodes and distillation, and only then is the test set read.
    Running the same command again goes on where it stopped; with more --trials it goes on, too.
    """

    command: ClassVar = Command("experiments.search", GROUPS, EXAMPLES)

    val_fraction: float = 0.2
    """Share of the training images held out, by which graphs are compared (stratified). Not used
    where the data has validation images of its own."""

    retrain_top: int = 2
    """How many of the best graphs are trained again in the end; 0: none, and no test set."""
    retrain_seeds: int = 3
    """With how many seeds, the first ones after those of the trials; graphs are paired by seed."""
    retrain_epochs: int | None = None
    """Epochs of that training; else --epochs."""
    retrain_order: Literal["each", "one"] = "each"
    """Whether each seed has an order of the images of its own, or all have one: then frozen
    networks are recorded once for all seeds."""

    workdir: str | None = None
    """Folder of the search; else runs/search-DATA-HASH, the same for the same options, or
    runs/search-DATA-HASH-STUDY with --study."""
    storage: Annotated[str | None, "URL"] = None
    """Where the trials are: sqlite:///FILE, or postgresql+psycopg://USER@HOST/DATABASE for workers
    on many machines; else study.db in the workdir."""
    study: Annotated[str | None, "NAME"] = None
    """Name of the study in the storage; else search-DATA-HASH."""
    compile_cache: bool = True
    """Keep compiled programs in the user's cache folder, for the other workers and searches."""

    def space(self) -> ktg.SearchSpace:
        """The graphs that are searched."""
        return ktg.SearchSpace(
            self.nodes,
            self.target,
            self.candidates if self.nodes > 1 else (),
            gates=self.gates,
            temperatures=self.temperatures,
            losses=tuple(map(_loss, self.losses)),
            weights=self.loss_weights,
            edge_temperatures=self.edge_temperatures,
            teachers=tuple(map(teacher_node, self.teachers)),
            allow_large=True,
        )

    def training(self, **changes: Any) -> TrainConfig:
        """The training of one graph, node by node: what was compiled serves every graph."""
        fields = training_fields(self) | {"imports": self.imports, "engine": "per_node"} | changes
        return TrainConfig(**fields)


def check(config: SearchConfig) -> ktg.SearchSpace:
    """Raises InputError for the first value that is out of range; returns the space."""
    check_training(config)
    at_least(config, 1, "trials", "min_epochs", "retrain_epochs")
    at_least(config, 1, "workers", most=MOST_WORKERS)
    at_least(config, 1, "trial_seeds", most=MOST_SEEDS)
    at_least(config, 0, "race", "retrain_top")
    if config.race == 1:
        raise InputError("race", 1, "0, or at least 2 graphs")
    if config.retrain_top:
        at_least(config, 1, "retrain_seeds", most=MOST_SEEDS)
    check_seeds(config.seed, config.trials + config.trial_seeds + config.retrain_seeds)
    if config.min_epochs > config.epochs:
        raise InputError("min_epochs", config.min_epochs, f"1 to epochs ({config.epochs})")
    if not 0 <= config.patience <= 1:
        raise InputError("patience", config.patience, "a share of the epochs, 0 to 1")
    if config.val_fraction == 0 and not has_val_images(config.data, config.data_dir):
        allowed = "above 0: graphs are compared on validation images"
        raise InputError("val_fraction", config.val_fraction, allowed)
    if config.timeout is not None and not config.timeout > 0:
        raise InputError("timeout", config.timeout, "a number of seconds above 0")
    try:
        return config.space()
    except InputError as error:
        field, dot, rest = re.match(r"(\w+)(\[?)(.*)", error.field).groups()  # type: ignore[union-attr]
        known = {"num_nodes": "nodes", "weights": "loss_weights"}.get(field, field)
        raise InputError(f"{known}{dot}{rest}", error.value, error.allowed) from None


def teacher_node(text: str) -> ktg.Node:
    """A node as JSON, which the teachers are once their files were read."""
    return node_from_json("teachers", decoded("teachers", text))


def _loss(text: str) -> str | Mapping[str, float]:
    """A loss of the options: its name, or several as JSON."""
    return decoded("losses", text) if text.lstrip().startswith("{") else text


def resolved(config: SearchConfig, space: ktg.SearchSpace) -> dict[str, Any]:
    """What determines the trials, as JSON; searches that agree in it are the same search."""
    training = without_unused(training_fields(config))
    del training["data_dir"]
    how = ("imports", "sampler", "pruner", "min_epochs", "patience", "duplicates", "baselines")
    fields = {"space": space.describe(), "training": training}
    fields |= {name: getattr(config, name) for name in how}
    # What came later is left out where it says what all searches were before.
    later = {"draw": "uniform", "trial_seeds": 1, "race": 0}
    found = {name: getattr(config, name) for name in later}
    fields |= {name: value for name, value in found.items() if value != later[name]}
    return json.loads(json.dumps(fields))


def default_name(config: SearchConfig, fields: Mapping[str, Any]) -> str:
    """A study's name from what determines the search."""
    return f"search-{data_kind(config.data)}-{hash_of(identity(fields))}"


def default_workdir(config: SearchConfig, fields: Mapping[str, Any]) -> Path:
    """A folder's name from the same, and from the study's where one is given.

    Args:
        config: the configuration of the search.
        fields: `resolved`; for a user's own data, with its checksums.

    >>> default_workdir(SearchConfig(study="a/b"), {}).name
    'search-digits-44136fa3-a%2Fb'
    """
    study = f"-{quote(config.study, safe='')}" if config.study else ""
    keys = [f"{hash_of(k)}{study}" for k in (identity(fields), without_facts(fields))]
    return place_of("runs", f"search-{data_kind(config.data)}", fields, keys)


def to_json(config: SearchConfig) -> str:
    """The configuration for a worker."""
    return json.dumps(dataclasses.asdict(config))


def from_json(text: str) -> SearchConfig:
    """The inverse of `to_json`."""
    return SearchConfig(**with_tuples(json.loads(text)))
