"""The folder of an ablation: its priors, the runs of its arms, and what came of them."""

from pathlib import Path
from typing import ClassVar

from ..runs.folder import Folder
from ..runs.workdir import Workdir


class AblationFolder(Folder):
    """A study's folder.

    `config.json` says what is studied; `priors/<aggregation>-<seed>/prior` have the priors,
    `arms/<arm>/rate-<rate>/seed-<seed>` the runs; `results.json`, `results.md` and `curves.*` what
    came of the seeds that all arms are done with.

    Args:
        path: the path of the folder; need not exist.
    """

    holds = "an ablation"
    shapes: ClassVar = {"config.json": {"config": {}}, "results.json": {"entries": list}}

    def run(self, arm: str, rate: float, seed: int) -> Workdir:
        """The run of an arm with a learning rate and a seed."""
        return Workdir(self.path / "arms" / arm / f"rate-{rate:g}" / f"seed-{seed}")

    def diverged(self, arm: str, rate: float, seed: int) -> Path:
        """The file that says why that run, or the fit of its prior, diverged, where it did."""
        return self.run(arm, rate, seed).path.with_suffix(".diverged")

    def graph_file(self, arm: str, rate: float, seed: int) -> Path:
        """The graph of that run, before the run begins."""
        return self.run(arm, rate, seed).path.with_suffix(".json")
