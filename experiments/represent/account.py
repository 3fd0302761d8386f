"""What came of a prior: a picture and a table of its stages, and the student alone beside it."""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import ktg_jax as ktg
from ktg_jax.data.dataset import Dataset
from ktg_jax.io.trees import by_path
from ktg_jax.priors import (
    Prior,
    about_prior,
    check_prior,
    load_prior,
    match_prior,
    stage_convolutions,
)
from ktg_jax.priors.stages import last_of_stage
from ktg_jax.training.state import node_rng
from ktg_jax.training.warm_start import load_weights

from ..runs.console import Table
from ..runs.texts import per_cent
from ..runs.workdir import Workdir
from .config import STUDENT, RepresentConfig
from .folder import StudentFolder
from .measures import prior_gradients, share_kept
from .teacher import Teacher, network

Kernels = list[np.ndarray]


@dataclass(frozen=True)
class Account:
    """A prior and the kernels around it, of each stage the last one.

    Attributes:
        prior: matched to the student.
        index: where in the whole prior these kernels are.
        left: what the fit left of each stage, as its metrics say; empty where nothing was fitted.
        teacher: the last convolution of each of the teacher's stages; None: not known.
        before: the student's kernels as they are drawn from the seed, without the prior.
        quantile: the quantile of the sparse recoding penalty on the distances of filters; None: the
            prior has another loss.
    """

    prior: Prior
    index: list[int]
    left: list[float]
    teacher: Kernels | None
    before: Kernels
    quantile: float | None

    def draw(self, folder: Path, after: Kernels | None = None) -> None:
        """Draws a picture of each stage, `stage<g>-before.png` or `-after.png`, unless it is there.

        Args:
            folder: the folder of the pictures.
            after: the student's kernels when it is trained; None: it is not yet.
        """
        moment = "before" if after is None else "after"
        paths = [folder / f"stage{g + 1}-{moment}.png" for g in range(len(self.prior.paths))]
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
                f"Stage {g + 1}: {self.prior.paths[g]}",
                {name: of_stages[g] for name, of_stages in kernels.items()},
                {name: of_stages[g] for name, of_stages in gradients.items()},
                self.quantile,
            )

    def table(self, workdir: Workdir) -> Table:
        """The stages: what the fit left, distance in the first and the last epoch, share kept."""
        table = Table("stage", "kernel", box=None)
        for title in ("left", "distance", "at the end", "gradient kept"):
            table.add_column(title, justify="right", no_wrap=True)
        records = workdir.records()
        gradients = prior_gradients(trained_kernels(workdir, self.prior), self.prior)
        first, last = (records[i]["nodes"][0]["prior_distance"] for i in (0, -1))
        for g, (path, i) in enumerate(zip(self.prior.paths, self.index, strict=True)):
            left = f"{self.left[g]:.3f}" if g < len(self.left) else "-"
            share = None if self.quantile is None else share_kept(gradients[g], self.quantile)
            kept = per_cent(share, " %", digits=1)
            row = [left, f"{first[i]:.3f}", f"{last[i]:.3f}", kept]
            table.add_row(str(g + 1), path, *row)
        return table


def account_of(config: RepresentConfig, dataset: Dataset, teacher: Teacher | None) -> Account:
    """Puts together what is known before the student is trained.

    Raises:
        InputError: a prior of another student.
    """
    prior = load_prior(config.prior_path)
    init_key, _ = jax.random.split(jax.random.key(config.seed))  # as `assemble` does
    fns = network(config.student, None, dataset)
    params, _ = fns.init(node_rng(init_key, STUDENT), jnp.zeros((1, *dataset.image_shape)))
    check_prior(params, prior)
    kernels = dict(zip(prior.paths, prior.kernels, strict=True))
    paths = [last_of_stage(stage) for stage in stage_convolutions(kernels, fns.stage_paths)]
    _, matched = match_prior(
        params, Prior(tuple(kernels[path] for path in paths), tuple(paths)), config.prior_matching
    )
    leaves = by_path(params)
    return Account(
        matched,
        [prior.paths.index(path) for path in paths],
        json.loads(about_prior(config.prior_path).get("stages", "[]")),
        None if teacher is None else _last_kernels(teacher, len(paths)),
        [np.asarray(leaves[path]) for path in paths],
        config.prior_quantile if config.prior_kind == "filters" else None,
    )


def trained_kernels(workdir: Workdir, prior: Prior) -> Kernels:
    """The student's kernels after its last epoch."""
    params = load_weights(str(workdir.path)).params
    return [params[path] for path in prior.paths]


def beside_alone(folder: StudentFolder) -> Table:
    """The student with its prior and the same student alone, each with what it cost."""
    result = folder.result
    assert result is not None
    table = Table("student", box=None)
    for title in ("steps", "val.", "test"):
        table.add_column(title, justify="right", no_wrap=True)
    fit_steps = result["fit_steps"]
    fitted = f"{fit_steps} + {result['steps']}" if fit_steps else str(result["steps"])
    rows = {"with the prior": (fitted, result["target"])}
    rows["alone"] = (str(result["alone"]["steps"]), result["alone"])
    for name, (steps, numbers) in rows.items():
        shares = [per_cent(numbers[f"{kind}_accuracy"], " %") for kind in ("val", "test")]
        table.add_row(name, steps, *shares)
    return table


def draw_beside_alone(path: Path, folder: StudentFolder, fit_steps: int) -> None:
    """Draws the validation accuracies of both by their steps, unless it is done."""
    records, alone = folder.records(), folder.alone.records()
    if path.is_file() or records[0]["nodes"][0]["val_accuracy"] is None:
        return
    from .pictures import draw_accuracies

    curves = {
        name: [(at + record["step"], record["nodes"][0]["val_accuracy"]) for record in of_run]
        for name, of_run, at in (("with the prior", records, fit_steps), ("alone", alone, 0))
    }
    draw_accuracies(path, curves, fit_steps)


def _last_kernels(teacher: Teacher, number: int) -> Kernels | None:
    """The last convolution of each of so many stages; None: it has no such stages."""
    try:
        stages = stage_convolutions(teacher.variables[0], teacher.fns.stage_paths)
    except ktg.InputError:
        return None
    if len(stages) != number:
        return None
    return [np.asarray(stage[last_of_stage(stage)]) for stage in stages]
