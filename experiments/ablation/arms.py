"""The arms of the ablation: what is trained in each, and what each is compared with."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ktg_jax as ktg
from ktg_jax.errors import InputError
from ktg_jax.priors import SCHEDULES

PLAIN = "plain"
"""The student alone: the control of every other arm."""

STUDENT = "student"


@dataclass(frozen=True)
class Setting:
    """What the graphs of all arms share, with one seed.

    Attributes:
        student: its model.
        teacher: source of the teacher's weights.
        teacher_model: its model.
        weight: the weight of priors.
        schedule: the schedule of that weight.
        temperature: the temperature of the distillation.
        attention_weight: the weight of attention transfer.
        feature_weight: the weight of feature transfer.
        prior_of: the folder of the prior, by aggregation.
    """

    student: str
    teacher: str
    teacher_model: str
    weight: float
    schedule: str
    temperature: float
    attention_weight: float
    feature_weight: float
    prior_of: Callable[[str], str]

    def node(
        self,
        quantile: float,
        weight: float | None = None,
        matching: str = "initialise",
        aggregation: str = "fit",
        schedule: str | None = None,
    ) -> ktg.Node:
        """The student with its prior."""
        return ktg.Node(
            self.student,
            STUDENT,
            prior=self.prior_of(aggregation),
            prior_weight=self.weight if weight is None else weight,
            prior_quantile=quantile,
            prior_schedule=schedule or self.schedule,
            prior_matching=matching,
        )

    @property
    def other_schedule(self) -> str:
        """The schedule that is not this one."""
        return next(schedule for schedule in SCHEDULES if schedule != self.schedule)

    def distillation(self, student: ktg.Node) -> ktg.Graph:
        """From the frozen teacher to the student."""
        teacher = ktg.Node(self.teacher_model, "teacher", weights=self.teacher)
        return ktg.graphs.distillation(student, teacher, self.temperature)

    def attention(self, student: ktg.Node) -> ktg.Graph:
        """Attention transfer from the frozen teacher to the student, without its logits."""
        return self.distillation(student).carrying({"attention": self.attention_weight})

    def features(self, student: ktg.Node) -> ktg.Graph:
        """Feature transfer from the frozen teacher, seen through the readers of the prior's fit."""
        graph = self.distillation(student)
        teacher = dataclasses.replace(graph.nodes[1], projection=self.prior_of("fit"))
        graph = dataclasses.replace(graph, nodes=(graph.nodes[0], teacher))
        return graph.carrying({"features": self.feature_weight})

    def mutual(self, student: ktg.Node) -> ktg.Graph:
        """Two students, the target and a peer that has no prior."""
        return ktg.graphs.mutual([student, ktg.Node(self.student, "peer")])


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
    aggregations: tuple[str, ...] = ("fit",)


def _alone(**options: float | str) -> Callable[[Setting], ktg.Graph]:
    """The graph of a student alone with its prior."""
    return lambda setting: ktg.graphs.independent([setting.node(**options)])  # type: ignore[arg-type]


def _bare(setting: Setting) -> ktg.Node:
    return ktg.Node(setting.student, STUDENT)


INITIALISED = "initialised"

ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(PLAIN, "the student alone", lambda s: ktg.graphs.independent([_bare(s)]), (), ()),
        Arm(INITIALISED, "starts from the prior, no loss", _alone(quantile=0.0, weight=0.0)),
        Arm("prior", "starts from it, its loss, no penalty", _alone(quantile=0.0)),
        *(
            Arm(
                f"prior-{quantile}",
                f"the same, recoded at the quantile {quantile}",
                _alone(quantile=quantile),
                (PLAIN, INITIALISED, "prior"),
            )
            for quantile in (0.5, 0.7, 0.9)
        ),
        Arm(
            "assigned",
            "random start, the prior's filters assigned, quantile 0.7",
            _alone(quantile=0.7, matching="assignment"),
        ),
        Arm(
            "undecayed",
            "as prior-0.7, fitted without weight decay",
            _alone(quantile=0.7, aggregation="undecayed"),
            (PLAIN, "prior-0.7"),
            ("undecayed",),
        ),
        Arm(
            "svd",
            "as prior-0.7, the prior by SVD",
            _alone(quantile=0.7, aggregation="svd"),
            (PLAIN, "prior-0.7"),
            ("svd",),
        ),
        Arm(
            "layers",
            "as svd, but each layer from one of the teacher's layers",
            _alone(quantile=0.7, aggregation="layers"),
            (PLAIN, "svd"),
            ("layers",),
        ),
        Arm(
            "schedule",
            "as prior-0.7, with the other schedule",
            lambda s: ktg.graphs.independent([s.node(0.7, schedule=s.other_schedule)]),
            (PLAIN, "prior-0.7"),
        ),
        Arm(
            "distillation", "KL from the teacher", lambda s: s.distillation(_bare(s)), (PLAIN,), ()
        ),
        Arm(
            "distillation+prior",
            "KL from the teacher, and prior-0.7",
            lambda s: s.distillation(s.node(0.7)),
            (PLAIN, "distillation", "prior-0.7"),
        ),
        Arm(
            "attention",
            "attention transfer from the teacher",
            lambda s: s.attention(_bare(s)),
            (PLAIN,),
            (),
        ),
        Arm(
            "attention+prior",
            "the same, and prior-0.7",
            lambda s: s.attention(s.node(0.7)),
            (PLAIN, "attention", "prior-0.7"),
        ),
        Arm(
            "features",
            "stage features from the teacher, projected on its side",
            lambda s: s.features(_bare(s)),
            (PLAIN, "prior-0.7"),
        ),
        Arm(
            "mutual",
            "two students learn mutually",
            lambda s: s.mutual(_bare(s)),
            aggregations=(),
        ),
        Arm(
            "mutual+prior",
            "the same, the target with prior-0.7",
            lambda s: s.mutual(s.node(0.7)),
            (PLAIN, "mutual", "prior-0.7"),
        ),
    )
}
"""All arms by name, in the order in which they are run and shown."""


def chosen(names: Sequence[str]) -> list[Arm]:
    """The arms of these names, in the order of `ARMS`; all, where there are none.

    Raises:
        InputError: an unknown name.

    >>> [arm.name for arm in chosen(["prior", "plain"])]
    ['plain', 'prior']
    """
    for name in names:
        if name not in ARMS:
            raise InputError("arms", name, ", ".join(ARMS))
    return [arm for arm in ARMS.values() if not names or arm.name in names]
