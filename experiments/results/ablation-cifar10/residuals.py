"""What fitted students get wrong of their teachers, stage by stage, by the teacher's depth.

`python experiments/results/ablation-cifar10/residuals.py TEACHER.safetensors ...`, in a checkout's
root with `data` there: PyTorch's ResNets of CIFAR-10, trained elsewhere. For each a `resnet8` is
fitted to it on all training images, each stage fed with the teacher's (`teacher`) or with the
student's own former stage (`own`), with three seeds. Writes `residuals.json` beside itself after
each fit, and prints a table; the same command goes on where it stopped.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ktg_jax as ktg
from experiments.represent.config import RepresentConfig
from experiments.represent.teacher import Teacher, load_teacher, network
from experiments.runs import cli
from experiments.runs.console import make_console
from experiments.runs.process import prepare
from experiments.runs.texts import markdown_table
from ktg_jax.data.sources import load_dataset
from ktg_jax.io.files import write_text
from ktg_jax.models.pixels import to_float
from ktg_jax.priors import FitPlan
from ktg_jax.priors.pair import Pair, stage_residuals

FILE = Path(__file__).with_name("residuals.json")
STUDENT, SEEDS, FED = "resnet8", range(3), ("teacher", "own")
IMAGES = 1000  # of the test split, to judge by


def main() -> None:
    """Fits what is not fitted yet, and prints the table."""
    prepare(compile_cache=True)
    console = make_console()
    dataset = load_dataset("cifar10", "data")
    found: dict[str, dict[str, Any]] = json.loads(FILE.read_text()) if FILE.exists() else {}
    for path in sys.argv[1:]:
        given = RepresentConfig(data="cifar10", teacher=path, teacher_input="imagenet")
        teacher = load_teacher(given, dataset)
        for fed in FED:
            for seed in SEEDS:
                key = f"{teacher.model} {fed} {seed}"
                if key not in found:
                    found[key] = fitted(teacher, dataset, fed, seed)
                    write_text(FILE, json.dumps(found, indent=1) + "\n")
                    cli.say(console, f"{key}: {found[key]}")
    print(table(found))


def fitted(teacher: Teacher, dataset: Any, fed: str, seed: int) -> dict[str, Any]:
    """The shares of variance that are left: of each stage in the fit, and of the whole student."""
    student = network(STUDENT, teacher.input, dataset)
    sample = jnp.zeros((1, *dataset.image_shape))
    own = student.init(jax.random.key(seed), sample)
    rng = jax.random.key(100 + seed)
    images, labels = dataset.train.images, dataset.train.labels
    plan: dict[str, Any] = {"steps": 500, "batch_size": 64, "max_offset": 4, "flip": True}
    pieces = teacher.fns, teacher.variables, student
    made = ktg.regress_stages(*pieces, own, images, labels, rng=rng, inputs=fed, **plan)
    how = FitPlan(**plan)
    variables = ktg.with_own_statistics(
        student, made[:2], images, how, rng=jax.random.fold_in(rng, 2)
    )
    pair = Pair.of(teacher.fns, teacher.variables, student, variables, dataset.image_shape)
    judged = to_float(jnp.asarray(dataset.test.images[:IMAGES]))
    parts = [stage_residuals(pair, *pieces, variables, part) for part in jnp.array_split(judged, 4)]
    whole = np.mean([part for part in parts if part is not None], axis=0)
    stages = [round(float(share), 4) for share in made.metrics["stages"]]
    return {"stages": stages, "whole": [round(float(share), 4) for share in whole]}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Means over the seeds, as Markdown."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, each in found.items():
        model, fed, _ = key.split()
        rows.setdefault((model, fed), []).append(each)
    cells = [
        [
            *names,
            str(len(each)),
            *(
                " ".join(f"{share:.3f}" for share in np.mean([e[kind] for e in each], axis=0))
                for kind in ("stages", "whole")
            ),
        ]
        for names, each in rows.items()
    ]
    titles = ["teacher", "stages fed with", "seeds", "each stage in the fit", "the whole student"]
    return markdown_table(titles, cells, titles[:2])


if __name__ == "__main__":
    cli.run(main)
