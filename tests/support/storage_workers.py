"""What the processes of `test_storage.py` do; each function is one process."""

import time
from pathlib import Path
from typing import Any

from experiments.search.extra import optuna
from experiments.search.storage import Storage, Turn, open_storage

HEARTBEAT = 1.0


def study_of(url: str, storage: Storage | None = None) -> Any:
    """The study that all of them share."""
    storage = storage or open_storage(url)
    return optuna.create_study(storage=storage, study_name="shared", load_if_exists=True)


def objective(trial: Any) -> float:
    return trial.suggest_float("x", 0, 1) + trial.suggest_categorical("y", [0.0, 1.0, 2.0])


def open_at_once(url: str, all_there: Any) -> None:
    all_there.wait()
    study_of(url)


def train_forever(url: str, started: Any) -> None:
    def never_ends(trial: Any) -> float:
        objective(trial)
        started.set()
        while True:
            time.sleep(1)

    study_of(url).optimize(never_ends, n_trials=1)


def count(url: str, number: int, file: Path, all_there: Any) -> None:
    """Adds 1 to the number in a file, again and again, in its turn."""
    turn = Turn(url, "shared")
    all_there.wait()
    for _ in range(number):
        with turn:
            value = int(file.read_text())
            time.sleep(0.002)
            file.write_text(str(value + 1))


def hold(url: str, held: Any) -> None:
    with Turn(url, "shared"):
        held.set()
        time.sleep(600)
