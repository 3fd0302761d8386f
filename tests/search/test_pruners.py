"""Pruners: at which epochs trials are compared, who is stopped there, and who never is."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from ktg_jax import InputError

optuna = pytest.importorskip("optuna")

from experiments.search.pruners import PRUNERS, make_pruner  # noqa: E402


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(level)


def study_of(pruner: Any) -> Any:
    return optuna.create_study(pruner=pruner, direction="maximize", study_name="study")


def run(study: Any, values: Sequence[float]) -> int | None:
    """Runs a trial that reports these values, epoch by epoch; returns where it was pruned."""
    trial = study.ask()
    for epoch, value in enumerate(values, start=1):
        trial.report(value, epoch)
        if trial.should_prune():
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            return epoch
    study.tell(trial, values[-1])
    return None


def rungs(study: Any, epochs: int) -> list[int]:
    """The epochs after which a trial that is never pruned has passed another rung."""
    trial = study.ask()
    passed, found = 0, []
    for epoch in range(1, epochs + 1):
        trial.report(1.0, epoch)
        assert not trial.should_prune()
        attrs = study.trials[-1].system_attrs
        now = sum(name.startswith("completed_rung_") for name in attrs)
        if now > passed:
            passed = now
            found.append(epoch)
    return found


@pytest.mark.parametrize(
    ("name", "epochs", "options", "expected"),
    [
        ("asha", 200, {}, [1, 2, 4, 8, 16, 32, 64, 128]),
        ("asha", 10, {"min_epochs": 3}, [3, 6]),
        ("asha", 8, {}, [1, 2, 4]),  # not 8, the last
        ("asha", 1, {}, []),
        ("patient", 200, {}, [100]),
        ("patient", 200, {"patience": 0.1}, [20, 40, 80, 160]),
        ("patient", 8, {"patience": 0.0}, [1, 2, 4]),
        ("patient", 8, {"patience": 0.3}, [2, 4]),  # 2.4
        ("patient", 8, {"patience": 0.01, "min_epochs": 3}, [3, 6]),
        ("patient", 8, {"patience": 1}, []),
        ("none", 8, {}, []),
    ],
)
def test_rungs(name: str, epochs: int, options: dict[str, Any], expected: list[int]) -> None:
    assert rungs(study_of(make_pruner(name, epochs, **options)), epochs) == expected


def test_hyperband_has_several_first_rungs() -> None:
    study = study_of(make_pruner("hyperband", 16, min_epochs=2))
    found = {tuple(rungs(study, 16)) for _ in range(60)}
    assert found == {(2, 4, 8), (4, 8), (8,), ()}


def test_asha_keeps_the_better_half_at_each_rung() -> None:
    study = study_of(make_pruner("asha", 8))
    assert run(study, [0.5] * 8) is None
    assert run(study, [0.4] * 8) == 1  # the worse of two
    assert run(study, [0.6] * 8) is None
    # 0.6, 0.55, 0.5, 0.4 at the first rung; 0.6, 0.52, 0.5 at the second, of which one goes on.
    assert run(study, [0.55, 0.52, 0.52, 0.52]) == 2
    assert run(study, [float("nan")] * 8) == 1


def test_patience_lets_late_gates_act() -> None:
    late = [0.1, 0.1, 0.1, 0.6, 0.7, 0.8, 0.9, 0.9]
    for name, expected in (("asha", 1), ("patient", None)):
        study = study_of(make_pruner(name, 8))
        assert run(study, [0.5] * 8) is None
        assert run(study, late) == expected
    assert run(study, [0.4] * 8) == 4


@pytest.mark.parametrize("name", PRUNERS)
def test_a_finished_trial_is_never_pruned(name: str) -> None:
    study = study_of(make_pruner(name, 4, patience=1.0))
    for number in range(30):
        # Each is the best so far but for its last epoch, where it is the worst.
        assert run(study, [1.0 + number] * 3 + [-1.0 * number]) is None


def test_without_pruning_nobody_is_pruned() -> None:
    study = study_of(make_pruner("none", 4))
    assert [run(study, [1.0 - number] * 4) for number in range(5)] == [None] * 5


@pytest.mark.parametrize(
    ("name", "epochs", "options", "field", "allowed"),
    [
        ("median", 8, {}, "pruner", "asha, patient, hyperband, none"),
        (None, 8, {}, "pruner", "asha, patient, hyperband, none"),
        ("asha", 0, {}, "epochs", "an integer, 1 or above"),
        ("none", 2.0, {}, "epochs", "an integer, 1 or above"),
        ("asha", True, {}, "epochs", "an integer, 1 or above"),
        ("asha", 8, {"min_epochs": 0}, "min_epochs", "an integer, 1 to 8"),
        ("hyperband", 8, {"min_epochs": 9}, "min_epochs", "an integer, 1 to 8"),
        ("asha", 8, {"min_epochs": 1.5}, "min_epochs", "an integer, 1 to 8"),
        ("patient", 8, {"patience": -0.1}, "patience", "a share of the epochs, 0 to 1"),
        ("patient", 8, {"patience": 1.1}, "patience", "a share of the epochs, 0 to 1"),
        ("patient", 8, {"patience": float("nan")}, "patience", "a share of the epochs, 0 to 1"),
        ("patient", 8, {"patience": "0.5"}, "patience", "a share of the epochs, 0 to 1"),
    ],
)
def test_bad_input_is_refused(
    name: Any, epochs: Any, options: dict[str, Any], field: str, allowed: str
) -> None:
    with pytest.raises(InputError) as error:
        make_pruner(name, epochs, **options)
    assert error.value.field == field
    assert allowed in error.value.allowed
