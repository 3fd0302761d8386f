"""The folder of a student's run, and within it that of its prior."""

import os
from pathlib import Path

from experiments.folder import Folder
from experiments.workdir import Workdir
from ktg_jax.representing import PRIOR_FILE

PRIOR = "prior"
"""Name of the prior's folder."""


class PriorFolder(Folder):
    """A prior, what it was made of, and its pictures.

    `config.json` says what determines the prior; `prior.safetensors` is there when, and only when,
    the prior is finished.

    Args:
        path: of the folder; need not exist.
    """

    command = "experiments.represent"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.file = self.path / PRIOR_FILE

    @property
    def is_finished(self) -> bool:
        """Whether the prior is there."""
        return self.file.is_file()


class StudentFolder(Workdir):
    """The folder of a run of `experiments.train`, and what it is based on.

    `prior/` has the prior that was made for it, `stages/` a picture for each of its stages.
    """

    @property
    def prior(self) -> PriorFolder:
        """Of the prior that was made here."""
        return PriorFolder(self.path / PRIOR)

    @property
    def pictures(self) -> Path:
        """Where the pictures of the stages are."""
        return self.path / "stages"

    @property
    def exists(self) -> bool:
        """Whether something lives here, be it only the beginning of a prior."""
        return self.has_run or self.prior.exists

    def set_aside(self) -> Path | None:
        """As of any folder; raises InputError also where another process makes the prior."""
        if not self.prior.exists:
            return super().set_aside()
        with self.prior.locked():
            return super().set_aside()

    @property
    def has_run(self) -> bool:
        """Whether the training of the student began."""
        return super().exists
