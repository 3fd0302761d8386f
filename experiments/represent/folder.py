"""The folder of a student's run, and within it that of its prior."""

import json
import os
from contextlib import ExitStack
from pathlib import Path

import ktg_jax as ktg
from ktg_jax.errors import InputError, RunError
from ktg_jax.io.tensors import read_tensors, write_tensors
from ktg_jax.io.trees import FlatTree, flatten
from ktg_jax.priors import PRIOR_FILE, FitState

from ..runs.folder import Folder
from ..runs.workdir import Workdir

PRIOR, ALONE = "prior", "alone"
"""Names of the folders of the prior, and of the run of the student alone."""

FIT_FILE = "fit.safetensors"
"""Where a fit stands, in the folder of its prior."""


class PriorFolder(Folder):
    """A prior, and what it was made of.

    `config.json` says what determines the prior; `prior.safetensors` is there when, and only when,
    the prior is finished; until then `fit.safetensors` has where its fit stands.

    Args:
        path: the path of the folder; need not exist.
    """

    holds = "a prior"
    traces = (PRIOR_FILE, FIT_FILE)
    way_out = "represent --no-resume starts over; else take the folder away"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.file = self.path / PRIOR_FILE

    @property
    def is_finished(self) -> bool:
        """Whether the prior is there."""
        return self.file.is_file()

    def keep_fit(self, state: FitState) -> None:
        """Keeps where a fit stands, in place of where it stood."""
        write_tensors(self.path / FIT_FILE, "prior", flatten(state), {})

    def fit(self) -> FlatTree | None:
        """Where an interrupted fit stood; None: there is none.

        A file that cannot be read is none: the fit then begins anew.
        """
        try:
            return read_tensors(self.path / FIT_FILE, "prior")[0]
        except InputError:
            return None

    def forget_fit(self) -> None:
        """Takes away what is kept of a fit that has come to its end."""
        (self.path / FIT_FILE).unlink(missing_ok=True)


class StudentFolder(Workdir):
    """The folder of a run, and what it is based on.

    `prior/` has the prior that was made for it, `alone/` the run of the same student without it,
    `stages/` a picture for each of its stages.
    """

    @property
    def prior(self) -> PriorFolder:
        """The folder of the prior that was made here."""
        return PriorFolder(self.path / PRIOR)

    @property
    def alone(self) -> "StudentFolder":
        """The folder of the run of the student alone."""
        return StudentFolder(self.path / ALONE)

    def note_alone(self, fit_steps: int) -> None:
        """Says in `result.json` what the student alone came to, unless it is said there.

        Raises:
            InputError: another process works in the folder.
            RunError: one of the results is not there.
        """
        beside, result = self.alone.result, self.result
        if beside is None or result is None:
            raise RunError(f"{self.path}: the student's result is gone")
        kept = ("val_accuracy", "test_accuracy")
        alone = {field: beside["target"][field] for field in kept}
        alone |= {"epochs": beside["epochs"], "steps": beside["steps"]}
        said = {"fit_steps": fit_steps, "alone": alone}
        if result | said != result:
            with self.locked():
                self.write("result.json", result | said)

    @property
    def pictures(self) -> Path:
        """Where the pictures of the stages are."""
        return self.path / "stages"

    @property
    def is_used(self) -> bool:
        """Whether something lives here, be it only the beginning of a prior."""
        return super().is_used or self.prior.is_used

    def set_aside(self) -> Path | None:
        """As of any folder; raises InputError also where another process works within it."""
        with ExitStack() as locks:
            for within in (self.prior, self.alone):
                if within.is_used:
                    locks.enter_context(within.locked())
            return super().set_aside()

    def note_graph(self, graph: ktg.Graph, name: str = "graph.json") -> None:
        """Writes a graph to a file, for `--graph` of a training, unless it says the same."""
        if self._content(name) != json.loads(graph.to_json()):
            graph.save(self.path / name)
