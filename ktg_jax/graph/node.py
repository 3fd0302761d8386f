"""The description of a node of a graph: its fields, and how they are written."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ktg_jax.inputs import Input, checked_input

RECORDED, ENSEMBLE, AVERAGE = "recorded", "ensemble", "average"
"""What stands for its model in a node that is no network of its own."""

OPTIMIZERS = ("sgd", "adamw")
"""Those that a node may choose."""

LEARNING = ("optimizer", "learning_rate", "weight_decay", "clip", "trainable")
"""The fields of a node that say how it is updated; a frozen node has none of them."""

COMBINED = ("logits", "probabilities")
"""Of what an ensemble may be."""

MATCHINGS = ("initialise", "kernels", "assignment", "none")
"""How a prior meets a student; see `ktg_jax.priors.with_priors`."""

PRIOR_KINDS = ("filters", "distribution", "l1", "task")
"""What a prior asks of a student; see `ktg_jax.priors.NodePrior`."""

SCHEDULES = ("linear", "constant")
"""How a prior's weight goes over the training."""


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
        prior: where a prior for its parameters is (a file of `save_prior`, or its folder); None: it
            has none, and the other fields of the prior say nothing.
        prior_weight: the weight of the prior's loss, beside the node's edges; finite, not negative.
            0: the prior only acts on how the node begins.
        prior_quantile: in [0, 1], of the sparse recoding penalty on the prior's gradient.
        prior_schedule: "linear": the weight falls to 0 over the training; "constant": it stays.
        prior_matching: "initialise": the node starts from the prior, from all of it where it is of
            a whole student; "kernels": from its kernels alone; "assignment": the prior's filters
            are assigned to the node's initial ones; "none": none of that.
        prior_kind: "filters": filters are to resemble the prior's, one by one; "distribution": all
            filters of a kernel together; "l1": filters are recoded by the prior's, with an L1
            penalty of `prior_quantile` on the coefficients; "task": nothing is compared, but of
            each kernel's own gradient the smallest entries are cut off.
        input: how the network wants its images, in place of 0..1 as the data has them: an `Input`,
            the name of one (`imagenet`, `cifar10`, ...), `data` for the statistics of the training
            images, or a mapping of an `Input`'s fields.
        optimizer: `sgd` or `adamw`; None: the run's, as for the next three.
        learning_rate: the highest of its schedule.
        weight_decay: of `sgd` coupled, of `adamw` decoupled.
        clip: the largest norm of all its gradients together; larger ones are scaled down to it.
        trainable: patterns of paths of parameters, `*` standing for anything: those that match one
            are updated, the others stay as they begin (batch statistics move all the same). None:
            all are updated.
        classes: how many classes its logits have, where they are others than the data's: only
            connectors lead to such a node and from it, and no label does. None: the data's.
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
    prior_kind: str = "filters"
    input: "str | Input | Mapping[str, Any] | None" = None
    optimizer: str | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    clip: float | None = None
    trainable: "Sequence[str] | None" = None
    classes: int | None = None
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
        options = {field: getattr(self, field) for field in ("prior", *PRIOR_DEFAULTS)}
        if self.prior_kind == PRIOR_KINDS[0]:  # what runs had before there were others
            del options["prior_kind"]
        return options

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
        if self.input is not None:
            wanted = checked_input("input", self.input)
            fields["input"] = wanted if isinstance(wanted, str) else wanted.to_json()
        given = {field: getattr(self, field) for field in (*LEARNING, "classes")}
        given["trainable"] = None if self.trainable is None else list(self.trainable)
        return fields | {field: value for field, value in given.items() if value is not None}


PRIOR_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(Node)
    if field.name.startswith("prior_")
}
"""The options that only a node with a prior may have."""
