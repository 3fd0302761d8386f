"""The folder of a student's run, and within it that of its prior."""

import json
import os
from pathlib import Path

import ktg_jax as ktg
from ktg_jax.priors import PRIOR_FILE, READERS_FILE

from ..runs.folder import Folder
from ..runs.workdir import Workdir

PRIOR = "prior"
"""Name of the prior's folder."""


class PriorFolder(Folder):
    """A prior, what it was made of, and its pictures.

    `config.json` says what determines the prior; `prior.safetensors` is there when, and only when,
    the prior is finished.

    Args:
        path: the path of the folder; need not exist.
    """

    holds = "a prior"
    traces = (PRIOR_FILE, READERS_FILE)
    way_out = "represent --no-resume starts over; else take the folder away"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.file = self.path / PRIOR_FILE

    @property
    def is_finished(self) -> bool:
        """Whether the prior is there."""
        return self.file.is_file()


class StudentFolder(Workdir):
    """The folder of a run, and what it is based on.

    `prior/` has the prior that was made for it, `stages/` a picture for each of its stages.
    """

    @property
    def prior(self) -> PriorFolder:
        """The folder of the prior that was made here."""
        return PriorFolder(self.path / PRIOR)

    @property
    def pictures(self) -> Path:
        """Where the pictures of the stages are."""
        return self.path / "stages"

    @property
    def is_used(self) -> bool:
        """Whether something lives here, be it only the beginning of a prior."""
        return super().is_used or self.prior.is_used

    def set_aside(self) -> Path | None:
        """As of any folder; raises InputError also where another process makes the prior."""
        if not self.prior.is_used:
            return super().set_aside()
        with self.prior.locked():
            return super().set_aside()

    def note_graph(self, graph: ktg.Graph) -> None:
        """Writes `graph.json`, for `--graph` of the training, unless it says the same."""
        if self._content("graph.json") != json.loads(graph.to_json()):
            graph.save(self.path / "graph.json")
