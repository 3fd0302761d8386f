"""The folder of a search: what it is a search of, where its trials are, and what came of it."""

import os
import shlex
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import ktg_jax as ktg
from ktg_jax.errors import InputError

from ..runs.command_line import as_called
from ..runs.folder import Folder
from ..runs.options import import_modules
from ..runs.shapes import Record
from ..runs.workdir import Workdir
from .records import StudyRecord


class SearchFolder(Folder):
    """A search's folder.

    `config.json` says what is searched, `search.json` where the trials are, `study.db` has them
    unless they are in another database; `best.json` and `graphs/` have the graphs (`GraphFiles`),
    `logs/` what the workers said; `retrained/` has the runs of the fair ending, and `results.json`
    and `results.md` what came of them.
    """

    holds = "a search"
    shapes: ClassVar = {
        "config.json": {
            "config": {"space": {}, "training": {"data": str}, "imports": [str]},
            "versions": {},
        },
        "search.json": {
            "study": str,
            "storage": (str, type(None)),
            "owner": str,
            "command": [str],
        },
        "results.json": {
            "seeds": [int],
            "entries": [{"name": str, "kind": str, "trial": (int, type(None)), "graph": {}}],
            "num_comparisons": int,
            "num_tests": int,
            "comparisons": [{"entry": str, "baseline": str, "baseline_kind": str}],
        },
    }

    mended = ("search.json", "results.json")

    @property
    def logs(self) -> Path:
        """Where workers write what they say."""
        return self.path / "logs"

    @property
    def recordings(self) -> Path:
        """Where workers keep what frozen networks put out, as long as the search runs."""
        return self.path / "recordings"

    def drop_recordings(self) -> None:
        """Takes them away; a search that goes on makes them again."""
        shutil.rmtree(self.recordings, ignore_errors=True)

    @property
    def retrained(self) -> Path:
        """Where the runs of the fair ending are."""
        return self.path / "retrained"

    @property
    def artifacts(self) -> Path:
        """Pictures for Optuna's dashboard."""
        return self.path / "artifacts"

    @property
    def study(self) -> str | None:
        """Name of the study; None: nothing is known of one."""
        known = self.whole("search.json")
        return None if known is None else known["study"]

    @property
    def owner(self) -> str:
        """What tells the workers of this folder from those of other machines."""
        return self.read("search.json")["owner"]

    @property
    def storage(self) -> str:
        """URL of the storage, without a password."""
        return self.read("search.json")["storage"] or self.own_storage

    @property
    def own_storage(self) -> str:
        """URL of the file in this folder, wherever the folder was moved to."""
        from .database import sqlite_url  # needs Optuna, unlike this module

        return sqlite_url(self.path / "study.db")

    @property
    def results(self) -> Record | None:
        """What came of the fair ending; None: it did not come yet.

        Raises:
            InputError: the file is damaged.
        """
        return self.read("results.json") if (self.path / "results.json").is_file() else None

    def tested(self) -> dict[int, dict[str, float]]:
        """What the fair ending knows of the nodes of found graphs: see `StudyRecord.tested`.

        A graph whose runs are not all there any more is left out.

        Raises:
            InputError: the result of a run cannot be read.
        """
        results = self.results or {"entries": [], "seeds": []}
        tested = {}
        for entry in results["entries"]:
            if entry["trial"] is None:  # a baseline
                continue
            # Without `runs`, which were not noted at first, they are as long as a trial.
            names = entry.get("runs") or [f"seed-{seed}" for seed in results["seeds"]]
            folders = [Workdir(self.retrained / entry["name"] / name) for name in names]
            runs = [folder.result for folder in folders if folder.result is not None]
            if len(runs) == len(names):
                tested[entry["trial"]] = _mean_accuracies(runs)
        return tested

    @contextmanager
    def begun_search(
        self,
        config: Mapping[str, Any],
        study: str,
        storage: str | None,
        data_dir: str | None,
        words: Sequence[str],
    ) -> Iterator[list[str]]:
        """Keeps the folder, and begins this search in it or notes how it goes on.

        The block gets the names of the files that the folder did not have before.

        Args:
            config: what determines the search.
            study: its name.
            storage: URL without a password; None: the file in the folder.
            data_dir: where the data is.
            words: the words of the command line, without a password.

        Raises:
            InputError: another search, study or storage; names what differs. Or the folder cannot
                be written, or another process works there.
        """
        about = {
            "study": study,
            "storage": storage,
            "owner": uuid.uuid4().hex,
            "command": [*as_called("python -m experiments.search").split(), *words],
        }
        with self.kept():
            if known := self.whole("search.json"):
                self._check_known(known, study, storage)
                about = known | {field: about[field] for field in ("storage", "command")}
            names = [n for n in ("config.json", "search.json") if not (self.path / n).exists()]
            self.begin(config, data_dir, {"search.json": about})
            if self.is_damaged("results.json"):
                (self.path / "results.json").unlink()
            yield names

    def _check_known(self, known: Record, study: str, storage: str | None) -> None:
        """Raises InputError for another study, or for a storage that is not the same one moved."""
        if known["study"] != study:
            raise InputError("study", study, f"{known['study']}, as in {self.path}")
        if known["storage"] != storage and not _was_moved(known["storage"], storage):
            raise InputError("storage", storage, f"{known['storage']}, as in {self.path}")


def _was_moved(former: str | None, storage: str | None) -> bool:
    """Whether a storage may be a SQLite file that was elsewhere; its study tells for sure."""
    if former is None or storage is None:
        return False
    from .database import sqlite_file  # needs Optuna, unlike this module

    files = sqlite_file(former), sqlite_file(storage)
    if None in files:
        return False
    was, now = (file is not None and file.exists() for file in files)
    return now and not was


def is_search(path: str | os.PathLike[str]) -> bool:
    """Whether a search lives in this folder."""
    return os.path.isfile(os.path.join(path, "search.json"))  # false for a name that is too long


def load_search(path: str | os.PathLike[str], storage: str | None = None) -> StudyRecord:
    """Reads a search and its trials, and writes nothing.

    Args:
        path: its folder.
        storage: URL of its storage, where it is another than before or needs a password.

    Raises:
        InputError: no search, a module that registers its models cannot be imported, or its
            storage cannot be read.
    """
    from .extra import optuna
    from .storage import open_to_read
    from .study import race_of, records

    folder = SearchFolder(path)
    if not is_search(path):
        raise InputError("study_dir", str(path), "the folder of a search")
    about, config = folder.read("search.json"), dict(folder.config)
    config["training"] = config["training"] | {"data": folder.data}
    url = storage or folder.storage
    opened = open_to_read(url)
    if about["study"] not in optuna.get_all_study_names(opened):
        raise InputError("study_dir", str(path), f"a search whose storage has {about['study']}")
    study = optuna.load_study(study_name=about["study"], storage=opened)
    import_modules(tuple(config["imports"]))  # which may register models of the space
    trials = records(study.get_trials(deepcopy=False))
    return StudyRecord(
        path=Path(path),
        name=about["study"],
        config=config | {"versions": folder.read("config.json")["versions"]},
        command=shlex.join(about["command"]),
        space=_space(folder),
        trials=trials,
        results=folder.results,
        tested=folder.tested(),
        data_dir=folder.data_dir,
        race=race_of(study, trials),
    )


def _space(folder: SearchFolder) -> ktg.SearchSpace:
    try:
        return ktg.SearchSpace(**folder.config["space"], allow_large=True)
    except TypeError as error:
        allowed = f"a search whose config.json is whole ({error})"
        raise InputError("study_dir", str(folder.path), allowed) from None


def _mean_accuracies(runs: Sequence[Record]) -> dict[str, float]:
    """The mean test accuracy of each node over runs of one graph."""
    nodes = runs[0]["nodes"]
    values = [[node["test_accuracy"] for node in run["nodes"]] for run in runs]
    means = np.mean(values, axis=0).tolist()
    return {node["name"]: mean for node, mean in zip(nodes, means, strict=True)}
