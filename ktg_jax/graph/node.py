"""The description of a node of a graph: its fields, their checks, and how they are written."""

import dataclasses
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

from ktg_jax.checks import check_not_negative, check_positive, check_share, is_number
from ktg_jax.errors import InputError
from ktg_jax.inputs import Input, checked_input

RECORDED, ENSEMBLE, AVERAGE = "recorded", "ensemble", "average"
"""What stands for its model in a node that is no network of its own."""

COMBINED = ("logits", "probabilities")
"""Of what an ensemble may be."""

MATCHINGS = ("initialise", "assignment", "none")
"""How a prior's filters meet a student's; see `ktg_jax.priors.match_prior`."""

SCHEDULES = ("linear", "constant")
"""How a prior's weight goes over the training."""

NO_PRIOR = "nothing: the node has no prior"

MOST_NODES = 100
"""The most nodes of a graph; the published ones have up to 7."""

MOST_WEIGHT = 1e30
"""The largest weight of a loss."""

TEMPERATURES = 1e-15, 1e15
"""The lowest and the highest."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_LONGEST_NAME = 255


@dataclass(frozen=True)
class Node:
    """A network of the graph, or what one put out when it was recorded.

    Attributes:
        model: name of a registered model, such as `resnet32`; of a recorded node it is `recorded`.
        name: unique within its graph: up to 255 letters, digits, `_`, `.` and `-`. A node's initial
            weights depend on its name and the seed alone. None: the graph names it
            `<model>-<index>`.
        weights: where its initial weights come from (a run's folder, or one node of it as
            `DIR:name`); None: random initialisation.
        prior: where a prior for its kernels is (a file of `save_prior`, or its folder); None: it
            has none, and the other fields of the prior say nothing.
        prior_weight: the weight of the prior's loss, beside the node's edges; finite, not negative.
            0: the prior only acts on how the node begins.
        prior_quantile: in [0, 1], of the sparse recoding penalty on the prior's gradient.
        prior_schedule: "linear": the weight falls to 0 over the training; "constant": it stays.
        prior_matching: "initialise": the node starts from the prior's kernels; "assignment": the
            prior's filters are assigned to the node's initial ones; "none": neither.
        projection: where the readers are through which others see its stage outputs (a file of
            `save_readers`, or its folder); None: they see them as they are. For frozen nodes.
        input: how the network wants its images, in place of 0..1 as the data has them: an `Input`,
            the name of one (`imagenet`, `cifar10`, ...), `data` for the statistics of the training
            images, or a mapping of an `Input`'s fields.
        outputs: the folder of a recording, in place of a network: the node puts out what another
            one put out for the same batches. It has no parameters and never learns.
        ensemble: the names of other nodes, in place of a network: the node puts out what they do
            together. It has no parameters and never learns, but may be the target.
        of: "logits": the ensemble's logits are the sum of theirs; "probabilities": the logarithm of
            their mean probabilities.
        average: the name of a node that learns, in place of a network: the weights are the
            exponential moving average of that node's (mean teacher). It is not taught.
        decay: how much of the average a step keeps, in [0, 1).

    >>> Node("resnet32", name="teacher", weights="runs/teacher").model
    'resnet32'
    >>> Node(outputs="recordings/teacher").model
    'recorded'
    """

    model: str = RECORDED
    name: str | None = None
    weights: str | None = None
    prior: str | None = None
    prior_weight: float = 1.0
    prior_quantile: float = 0.7
    prior_schedule: str = "linear"
    prior_matching: str = "initialise"
    projection: str | None = None
    input: "str | Input | Mapping[str, Any] | None" = None
    outputs: str | None = None
    ensemble: "Sequence[str] | None" = None
    of: str = "logits"
    average: str | None = None
    decay: float = 0.999

    @property
    def kind(self) -> str:
        """What it is: `network`, `recorded`, `ensemble` or `average`.

        >>> Node("cnn").kind, Node(ensemble=("a", "b")).kind
        ('network', 'ensemble')
        """
        given = {RECORDED: self.outputs, ENSEMBLE: self.ensemble, AVERAGE: self.average}
        return next((kind for kind, value in given.items() if value is not None), "network")

    @property
    def prior_options(self) -> dict[str, Any]:
        """What the node says of its prior, by field; empty where it has none.

        >>> Node("cnn").prior_options, Node("cnn", prior="runs/a").prior_options["prior_quantile"]
        ({}, 0.7)
        """
        if self.prior is None:
            return {}
        return {field: getattr(self, field) for field in ("prior", *PRIOR_DEFAULTS)}

    def to_dict(self) -> dict[str, Any]:
        """The fields for JSON; beside name, model and weights those that say something."""
        if self.outputs is not None:
            return {"name": self.name, "outputs": self.outputs}
        if self.ensemble is not None:
            return {"name": self.name, "ensemble": list(self.ensemble), "of": self.of}
        if self.average is not None:
            return {"name": self.name, "average": self.average, "decay": self.decay}
        fields: dict[str, Any] = {"name": self.name, "model": self.model, "weights": self.weights}
        fields |= self.prior_options
        if self.projection is not None:
            fields["projection"] = self.projection
        if self.input is not None:
            wanted = checked_input("input", self.input)
            fields["input"] = wanted if isinstance(wanted, str) else wanted.to_json()
        return fields


PRIOR_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(Node)
    if field.name.startswith("prior_")
}
"""The options that only a node with a prior may have."""


def checked_nodes(nodes: Iterable[Node | str]) -> tuple[Node, ...]:
    """Checks the nodes and names those that have no name.

    Raises:
        InputError: names the first node and field that is wrong.
    """
    if isinstance(nodes, str) or not isinstance(nodes, Iterable):
        raise InputError("nodes", nodes, "a sequence of nodes")
    if isinstance(nodes, Sized):
        check_number_of_nodes(len(nodes))
    nodes = list(itertools.islice(nodes, MOST_NODES + 1))
    check_number_of_nodes(len(nodes))
    named: dict[str, Node] = {}
    for i, given in enumerate(nodes):
        node = _with_checked_prior(f"nodes[{i}]", _checked_node(f"nodes[{i}]", given))
        name = f"{node.model}-{i}" if node.name is None else node.name
        if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
            allowed = f"letters, digits, '_', '.' and '-', at most {_LONGEST_NAME}"
            raise InputError(f"nodes[{i}].name", name, allowed)
        if name in named:
            raise InputError(f"nodes[{i}].name", name, "a name that no other node has")
        named[name] = dataclasses.replace(node, name=name)
    return tuple(named.values())


def check_number_of_nodes(number: int) -> None:
    """Raises InputError unless a graph can have so many nodes."""
    if number < 1:
        raise InputError("nodes", [], "at least one node")
    if number > MOST_NODES:
        raise InputError("nodes", number, f"at most {MOST_NODES} nodes")


def _checked_node(where: str, given: Any) -> Node:
    node = Node(given) if isinstance(given, str) else given
    if not isinstance(node, Node):
        raise InputError(where, given, "a Node or a model's name")
    if node.kind != "network":
        return _CHECKS[node.kind](where, node)
    _check_defaults(where, node, ("of", "decay"), "nothing but of ensembles and averages")
    if not isinstance(node.model, str) or node.model in ("", RECORDED, ENSEMBLE, AVERAGE):
        raise InputError(f"{where}.model", node.model, "a model's name")
    for field in ("weights", "prior", "projection"):
        value = getattr(node, field)
        if field == "weights" and value == "":
            continue  # another way to write that there are none
        if value is not None and not _is_path(value):
            raise InputError(f"{where}.{field}", value, "a path, or null")
    if node.input is None:
        return node
    return dataclasses.replace(node, input=checked_input(f"{where}.input", node.input))


def _checked_recorded(where: str, node: Node) -> Node:
    if not _is_path(node.outputs):
        raise InputError(f"{where}.outputs", node.outputs, "the folder of a recording, or null")
    _check_alone(where, node, "outputs", "outputs")
    return node


def _checked_ensemble(where: str, node: Node) -> Node:
    members = node.ensemble
    is_list = isinstance(members, Sequence) and not isinstance(members, str)
    if not is_list or not members or not all(isinstance(name, str) for name in members):
        raise InputError(f"{where}.ensemble", members, "names of other nodes, at least one")
    if len(set(members)) < len(members):
        raise InputError(f"{where}.ensemble", list(members), "each node once")
    if node.of not in COMBINED:
        raise InputError(f"{where}.of", node.of, ", ".join(COMBINED))
    _check_alone(where, node, "ensemble", "ensemble", "of")
    return dataclasses.replace(node, model=ENSEMBLE, ensemble=tuple(members))


def _checked_average(where: str, node: Node) -> Node:
    if not isinstance(node.average, str):
        raise InputError(f"{where}.average", node.average, "the name of a node that learns")
    if not is_number(node.decay) or not 0 <= node.decay < 1:
        raise InputError(f"{where}.decay", node.decay, "a number of at least 0, below 1")
    _check_alone(where, node, "average", "average", "decay")
    return dataclasses.replace(node, model=AVERAGE, decay=float(node.decay))


def _check_alone(where: str, node: Node, kind: str, *own: str) -> None:
    """Raises InputError where a node that is no network has other fields than its own."""
    others = (f.name for f in dataclasses.fields(Node) if f.name not in ("name", "model", *own))
    _check_defaults(where, node, tuple(others), f"nothing beside {kind}")
    if node.model not in (RECORDED, ENSEMBLE, AVERAGE):
        raise InputError(f"{where}.model", node.model, f"nothing beside {kind}")


def _check_defaults(where: str, node: Node, fields: Sequence[str], allowed: str) -> None:
    for field in fields:
        if getattr(node, field) != getattr(Node, field):
            raise InputError(f"{where}.{field}", getattr(node, field), allowed)


_CHECKS = {
    RECORDED: _checked_recorded,
    ENSEMBLE: _checked_ensemble,
    AVERAGE: _checked_average,
}


def _is_path(value: Any) -> bool:
    """Whether a file could have this name."""
    try:
        return isinstance(value, str) and 0 < len(os.fsencode(value)) <= 4096 and "\0" not in value
    except UnicodeEncodeError:
        return False


def _with_checked_prior(where: str, node: Node) -> Node:
    if node.prior is None:
        for field, default in PRIOR_DEFAULTS.items():
            if getattr(node, field) != default:
                raise InputError(f"{where}.{field}", getattr(node, field), NO_PRIOR)
        return node
    weight = checked_number(f"{where}.prior_weight", node.prior_weight)
    check_share(f"{where}.prior_quantile", node.prior_quantile)
    for field, names in (("prior_schedule", SCHEDULES), ("prior_matching", MATCHINGS)):
        if getattr(node, field) not in names:
            raise InputError(f"{where}.{field}", getattr(node, field), ", ".join(names))
    quantile = float(node.prior_quantile)
    return dataclasses.replace(node, prior_weight=weight, prior_quantile=quantile)


def checked_number(field: str, value: Any) -> float:
    """A weight: a finite number, not negative, and not so large that float32 cannot hold losses.

    Raises:
        InputError: it is something else.
    """
    check_not_negative(field, value)
    if value > MOST_WEIGHT:
        raise InputError(field, value, f"at most {MOST_WEIGHT:g}: float32 must hold the loss")
    return float(value)


def checked_temperature(field: str, value: Any) -> float:
    """A temperature: a number above 0 whose square, and what it divides, float32 can hold.

    Raises:
        InputError: it is something else.
    """
    check_positive(field, value)
    low, high = TEMPERATURES
    if not low <= value <= high:
        allowed = f"{low:g} to {high:g}: float32 must hold its square"
        raise InputError(field, value, allowed)
    return float(value)
