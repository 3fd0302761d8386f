"""The arms of the ablation: what is trained in each, and what each is compared with."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ktg_jax as ktg
from ktg_jax.errors import InputError
from ktg_jax.inputs import Input
from ktg_jax.priors import SCHEDULES

PLAIN, LONG = "plain", "-long"
"""The student alone: the control of other arms; and the end of the names of longer arms."""

STUDENT = "student"


@dataclass(frozen=True)
class Setting:
    """What the graphs of all arms share, with one seed.

    Attributes:
        student: its model.
        teacher: source of the teacher's weights.
        teacher_model: its model.
        input: how both see their images; None: in 0..1.
        weight: the weight of priors.
        schedule: the schedule of that weight.
        temperature: the temperature of the distillation.
        attention_weight: the weight of attention transfer.
        hint_weight: the weight of hints.
        graph: that the arms `graph` and `graph+prior` put the student into; None: none is given.
        prior_of: the folder of the prior, by aggregation.
    """

    student: str
    teacher: str
    teacher_model: str
    input: Input | None
    weight: float
    schedule: str
    temperature: float
    attention_weight: float
    hint_weight: float
    graph: ktg.Graph | None
    prior_of: Callable[[str], str]

    @property
    def bare(self) -> ktg.Node:
        """The student without a prior."""
        return ktg.Node(self.student, STUDENT, input=self.input)

    def node(
        self,
        aggregation: str = "regression",
        factor: float = 1.0,
        quantile: float = 0.7,
        schedule: str | None = None,
        **options: Any,
    ) -> ktg.Node:
        """The student with its prior, the weight of it times a factor."""
        return dataclasses.replace(
            self.bare,
            prior=self.prior_of(aggregation),
            prior_weight=factor * self.weight,
            prior_quantile=quantile,
            prior_schedule=schedule or self.schedule,
            **{f"prior_{field}": value for field, value in options.items()},
        )

    @property
    def other_schedule(self) -> str:
        """The schedule that is not this one."""
        return next(schedule for schedule in SCHEDULES if schedule != self.schedule)

    def distillation(self, student: ktg.Node) -> ktg.Graph:
        """From the frozen teacher to the student."""
        return ktg.graphs.distillation(student, self._teacher, self.temperature)

    def attention(self, student: ktg.Node) -> ktg.Graph:
        """Attention transfer from the frozen teacher to the student, without its logits."""
        return self.distillation(student).carrying({"attention": self.attention_weight})

    def hints(self, student: ktg.Node) -> ktg.Graph:
        """The student's stages, each through a 1x1 convolution, are to be the teacher's."""
        hint = ktg.Edge(loss="features", weight=self.hint_weight, connector="conv")
        graph = self.distillation(student)
        (label, _), of_teacher = graph.edges
        return dataclasses.replace(graph, edges=((label, hint), of_teacher))

    def mutual(self, student: ktg.Node) -> ktg.Graph:
        """Two students, the target and a peer that has no prior."""
        peer = ktg.Node(self.student, "peer", input=self.input)
        return ktg.graphs.mutual([student, peer])

    def found(self, student: ktg.Node) -> ktg.Graph:
        """As `put_into`, with the graph that is given."""
        assert self.graph is not None
        return put_into(self.graph, student, self._teacher)

    @property
    def _teacher(self) -> ktg.Node:
        return ktg.Node(self.teacher_model, "teacher", weights=self.teacher, input=self.input)


def put_into(graph: ktg.Graph, student: ktg.Node, teacher: ktg.Node) -> ktg.Graph:
    """A graph whose target is the student and whose frozen networks are the teacher.

    Other networks see their images as the student does, where they do not say how.

    Raises:
        InputError: a graph that names its target, or the student, in another place.
    """
    nodes = [student, *graph.nodes[1:]]
    for i, node in enumerate(graph.nodes[1:], start=1):
        if node.kind == "network" and i in graph.frozen:
            nodes[i] = dataclasses.replace(teacher, name=node.name)
        elif node.kind == "network" and node.input is None:
            nodes[i] = dataclasses.replace(node, input=student.input)
    return dataclasses.replace(graph, nodes=tuple(nodes))


@dataclass(frozen=True)
class Arm:
    """A way to train the student.

    Attributes:
        name: fit for a folder.
        about: what it is, in a few words.
        graph: what is trained.
        controls: names of the arms that it is compared with; those that are not run are left out.
        aggregations: that its priors come from.
    """

    name: str
    about: str
    graph: Callable[[Setting], ktg.Graph]
    controls: tuple[str, ...] = (PLAIN,)
    aggregations: tuple[str, ...] = ()

    @property
    def is_long(self) -> bool:
        """Whether it is trained for as many steps more as a fit takes."""
        return self.name.endswith(LONG)

    @property
    def needs_graph(self) -> bool:
        """Whether it is of a graph that has to be given."""
        return self.name.startswith("graph")


def _alone(aggregation: str = "regression", **options: Any) -> Callable[[Setting], ktg.Graph]:
    """The graph of a student alone with its prior."""
    return lambda setting: ktg.graphs.independent([setting.node(aggregation, **options)])


def _without_prior() -> list[Arm]:
    """Without a prior: as long as the students with one, and for as many steps more as a fit."""
    ways: dict[str, tuple[str, Callable[[Setting], ktg.Graph]]] = {
        PLAIN: ("the student alone", lambda s: ktg.graphs.independent([s.bare])),
        "distillation": ("KL from the teacher", lambda s: s.distillation(s.bare)),
        "hints": ("the teacher's stages, through 1x1 convolutions", lambda s: s.hints(s.bare)),
        "attention": ("attention transfer from the teacher", lambda s: s.attention(s.bare)),
    }
    arms = []
    for name, (about, graph) in ways.items():
        arms.append(Arm(name, about, graph, () if name == PLAIN else (PLAIN,)))
        controls = (PLAIN,) if name == PLAIN else (PLAIN + LONG, name)
        longer = "the same, the fit's steps longer"
        arms.append(Arm(name + LONG, longer, graph, controls))
    return [
        *arms,
        Arm("mutual", "two students learn mutually", lambda s: s.mutual(s.bare)),
        Arm("graph", "in the graph that is given", lambda s: s.found(s.bare)),
    ]


FAIR = (PLAIN, PLAIN + LONG, "distillation" + LONG)
"""The controls of whatever takes a fit."""


def _starts() -> list[Arm]:
    """Students that only start from a prior."""
    ways: dict[str, tuple[str, str, tuple[str, ...]]] = {
        "select": ("select", "starts as a part of the teacher", (PLAIN,)),
        "regression": ("regression", "starts from stages fitted to the teacher's", FAIR),
        "chained": ("chained", "the same, the stages fitted as one chain", ("regression",)),
        "random": ("random", "as regression, fitted from random", ("regression",)),
        "chained-random": ("chained-random", "both", ("random",)),
        "fit-statistics": (
            "fit-statistics",
            "as regression, statistics of the fit",
            ("regression",),
        ),
        "recast": ("recast", "starts from stages that the rest of the teacher can use", FAIR),
    }
    arms = [
        Arm(
            name,
            about,
            _alone(aggregation, factor=0.0),
            controls,
            (aggregation,),
        )
        for name, (aggregation, about, controls) in ways.items()
    ]
    kernels = Arm(
        "kernels",
        "as regression, but its kernels alone",
        _alone(factor=0.0, matching="kernels"),
        (PLAIN, "regression"),
        ("regression",),
    )
    return [*arms, kernels]


def _losses() -> list[Arm]:
    """Students that start from the regression, with a loss of the prior."""
    ways: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
        "prior": ("its loss, recoded at the quantile 0.7", {}, (*FAIR, "regression")),
        "prior-0": ("the same without recoding", {"quantile": 0.0}, ("prior",)),
        "prior-0.5": ("recoded at 0.5", {"quantile": 0.5}, ("prior",)),
        "prior-0.9": ("recoded at 0.9", {"quantile": 0.9}, ("prior",)),
        "light": ("0.3 times the weight", {"factor": 0.3}, ("prior",)),
        "heavy": ("3 times the weight", {"factor": 3.0}, ("prior",)),
        "l1": ("filters recoded with L1", {"kind": "l1", "quantile": 0.1}, ("prior",)),
        "task": ("the task's gradient recoded, fading", {"kind": "task"}, ("regression", "prior")),
        "distribution": ("filters as a distribution", {"kind": "distribution"}, ("prior",)),
    }
    arms = [
        Arm(
            name,
            about,
            _alone(**options),
            controls,
            ("regression",),
        )
        for name, (about, options, controls) in ways.items()
    ]
    other = Arm(
        "schedule",
        "as prior, with the other schedule",
        lambda s: ktg.graphs.independent([s.node(schedule=s.other_schedule)]),
        ("prior",),
        ("regression",),
    )
    more = [
        Arm(
            f"{how}+prior",
            f"{how}, and the prior's loss",
            _alone(how),
            (how, "prior"),
            (how,),
        )
        for how in ("select", "recast")
    ]
    return [*arms, other, *more]


def _combined() -> list[Arm]:
    """The prior beside what comes from the teacher's outputs, or from peers."""
    ways: dict[str, tuple[Callable[[Setting], ktg.Graph], str]] = {
        "distillation": (lambda s: s.distillation(s.node()), "distillation" + LONG),
        "attention": (lambda s: s.attention(s.node()), "attention" + LONG),
        "hints": (lambda s: s.hints(s.node()), "hints" + LONG),
        "mutual": (lambda s: s.mutual(s.node()), "mutual"),
        "graph": (lambda s: s.found(s.node()), "graph"),
    }
    return [
        Arm(f"{name}+prior", f"{name} and prior", graph, (control, "prior"), ("regression",))
        for name, (graph, control) in ways.items()
    ]


ARMS = {arm.name: arm for arm in (*_without_prior(), *_starts(), *_losses(), *_combined())}
"""All arms by name, in the order in which they are run and shown."""


def chosen(names: Sequence[str], with_graph: bool) -> list[Arm]:
    """The arms of these names, in the order of `ARMS`; all, where there are none.

    Args:
        names: of arms.
        with_graph: whether a graph is given; those that need one are else left out of all.

    Raises:
        InputError: an unknown name, or one that needs a graph where none is given.

    >>> [arm.name for arm in chosen(["prior", "plain"], False)]
    ['plain', 'prior']
    """
    for name in names:
        if name not in ARMS:
            raise InputError("arms", name, ", ".join(ARMS))
        if ARMS[name].needs_graph and not with_graph:
            raise InputError("arms", name, "an arm without a graph, or --graph")
    listed = [arm for arm in ARMS.values() if with_graph or not arm.needs_graph]
    return [arm for arm in listed if not names or arm.name in names]
