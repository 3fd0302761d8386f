"""What came of a prior: its pictures, and a table of its stages, before and after the training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ktg_jax as ktg
from ktg_jax.data.dataset import Dataset
from ktg_jax.io.trees import by_path
from ktg_jax.models.network import PyTree
from ktg_jax.priors import Prior, load_prior, match_prior, stage_convolutions
from ktg_jax.priors.stages import last_of_stage
from ktg_jax.training.state import node_rng
from ktg_jax.training.warm_start import load_weights

from ..runs.console import Table
from ..runs.texts import per_cent
from ..runs.workdir import Workdir
from .config import STUDENT, RepresentConfig
from .measures import prior_gradients, share_kept
from .teacher import num_stages

Kernels = list[np.ndarray]


@dataclass(frozen=True)
class Account:
    """A prior and the kernels around it, an entry a stage, or a layer where it has all of them.

    Attributes:
        prior: matched to the student.
        teacher: the last convolution of each of the teacher's stages; None: not known.
        before: the student's kernels as they are drawn from the seed, without the prior.
        quantile: the quantile of the sparse recoding penalty.
    """

    prior: Prior
    teacher: Kernels | None
    before: Kernels
    quantile: float

    def draw(self, folder: Path, after: Kernels | None = None) -> None:
        """Draws a picture of each stage, `stage<g>-before.png` or `-after.png`, unless it is there.

        Of a prior of all layers they are `layer<g>-...`.

        Args:
            folder: the folder of the pictures.
            after: the student's kernels when it is trained; None: it is not yet.
        """
        moment = "before" if after is None else "after"
        names = [f"{self._unit}{g + 1}-{moment}.png" for g in range(len(self.prior.paths))]
        paths = [folder / name for name in names]
        if all(path.is_file() for path in paths):
            return
        from .pictures import draw_stage  # matplotlib takes a second

        folder.mkdir(parents=True, exist_ok=True)
        students = {"student before": self.before} | ({"student after": after} if after else {})
        gradients = {name: prior_gradients(ks, self.prior) for name, ks in students.items()}
        teacher = {} if self.teacher is None else {"teacher": self.teacher}
        kernels = teacher | {"prior": [np.asarray(k) for k in self.prior.kernels]} | students
        for g, path in enumerate(paths):
            draw_stage(
                path,
                self._title(g),
                {name: of_stages[g] for name, of_stages in kernels.items()},
                {name: of_stages[g] for name, of_stages in gradients.items()},
                self.quantile,
            )

    @property
    def _unit(self) -> str:
        """What the prior has a kernel for."""
        paths = self.prior.paths
        return "stage" if num_stages(paths) == len(paths) else "layer"

    def _title(self, stage: int) -> str:
        accuracy = self.prior.accuracy
        known = "" if accuracy is None else f"; its head: {_per_cent(float(accuracy[stage]))}"
        return f"{self._unit.capitalize()} {stage + 1}: {self.prior.paths[stage]}{known}"

    def table(self, workdir: Workdir) -> Table:
        """The stages: head's accuracy, distance in the first and the last epoch, share kept."""
        table = Table(self._unit, "kernel", box=None)
        for title in ("head", "distance", "at the end", "gradient kept"):
            table.add_column(title, justify="right", no_wrap=True)
        records = workdir.records()
        gradients = prior_gradients(trained_kernels(workdir, self.prior), self.prior)
        first, last = (records[i]["nodes"][0]["prior_distance"] for i in (0, -1))
        for g, path in enumerate(self.prior.paths):
            accuracy = None if self.prior.accuracy is None else float(self.prior.accuracy[g])
            kept = share_kept(gradients[g], self.quantile)
            row = [_per_cent(accuracy), f"{first[g]:.3f}", f"{last[g]:.3f}", _per_cent(kept)]
            table.add_row(str(g + 1), path, *row)
        return table


def account_of(config: RepresentConfig, dataset: Dataset, teacher_params: PyTree | None) -> Account:
    """Puts together what is known before the student is trained.

    Raises:
        InputError: a prior of another student.
    """
    fns = ktg.build_model(config.student, dataset.num_classes)
    init_key, _ = jax.random.split(jax.random.key(config.seed))  # as `assemble` does
    params, _ = fns.init(node_rng(init_key, STUDENT), jnp.zeros((1, *dataset.image_shape)))
    prior = load_prior(config.prior_path)
    _, matched = match_prior(params, prior, config.prior_matching)
    leaves = by_path(params)
    return Account(
        matched,
        _last_kernels(teacher_params, len(matched.paths)),
        [np.asarray(leaves[path]) for path in prior.paths],
        config.prior_quantile,
    )


def trained_kernels(workdir: Workdir, prior: Prior) -> Kernels:
    """The student's kernels after its last epoch."""
    params = load_weights(str(workdir.path)).params
    return [params[path] for path in prior.paths]


def _last_kernels(params: PyTree | None, number: int) -> Kernels | None:
    """The last convolution of each of so many stages; None: it has no such stages."""
    try:
        stages = () if params is None else stage_convolutions(params)
    except ktg.InputError:
        return None
    if len(stages) != number:
        return None
    kernels: list[Any] = [stage[last_of_stage(stage)] for stage in stages]
    return [np.asarray(kernel) for kernel in kernels]


def _per_cent(share: float | None) -> str:
    return per_cent(share, " %", digits=1)
