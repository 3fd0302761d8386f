"""A run that is asked to stop saves within the epoch, and ends where it would have."""

from pathlib import Path
from typing import Any

import pytest
from runs import assert_same_end, finished, metrics, train

from experiments.runs import signals
from experiments.runs.workdir import INTERRUPTED
from ktg_jax.training.checkpoint_reading import checkpoint_epochs

pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {
    "models": ("tiny", "dropping"),
    "epochs": 3,
    "learning_rate": 1.0,
    "batch_size": 16,
    "prune": False,
}
UPDATES = 180 // 16
"""In an epoch."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped."""
    return finished(tmp_path_factory, "stopping", **OPTIONS)


def stop_after(updates: int, workdir: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> int:
    """Trains until it is asked to stop after so many updates; the update that it stops at."""
    asked = iter(range(10_000))
    with monkeypatch.context() as patch:
        patch.setattr(signals, "is_waiting", lambda: next(asked) >= updates)
        with pytest.raises(signals.StoppedElsewhere):
            train(workdir, **OPTIONS, **more)
    return max(checkpoint_epochs(workdir / INTERRUPTED))


@pytest.mark.parametrize("updates", [0, 5, UPDATES + 2, 2 * UPDATES + 4])
def test_it_goes_on_within_the_epoch_and_ends_bit_for_bit_where_it_would_have(
    updates: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = tmp_path / "run"
    at = stop_after(updates, workdir, monkeypatch)
    assert updates <= at <= updates + 4
    epoch, within = divmod(at, UPDATES)
    assert (len(metrics(workdir)) if epoch else 0) == epoch
    said = train(workdir, **OPTIONS)
    assert f"Resuming within epoch {epoch + 1} of 3, after {within} of its 11 updates" in said
    assert_same_end(workdir, whole)
    assert not (workdir / INTERRUPTED).exists()


def test_it_may_be_stopped_several_times_in_an_epoch(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = tmp_path / "run"
    stops = [stop_after(1, workdir, monkeypatch) for _ in range(3)]
    assert stops == sorted(set(stops))
    assert stops[-1] < UPDATES
    train(workdir, **OPTIONS)
    assert_same_end(workdir, whole)


def test_where_what_it_saved_is_damaged_it_goes_back_to_the_epoch_before(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = tmp_path / "run"
    at = stop_after(UPDATES + 3, workdir, monkeypatch)
    folder = workdir / INTERRUPTED / str(at) / "nodes" / "d"
    largest = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    said = train(workdir, **OPTIONS)
    assert f"checkpoint {at} is damaged" in said
    assert "Resuming after epoch 1 of 3" in said
    assert_same_end(workdir, whole)


def test_between_epochs_nothing_but_the_checkpoint_is_needed(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = tmp_path / "run"
    asked = iter(range(10_000))
    with monkeypatch.context() as patch:
        # Asked after each update but the last of an epoch; and once more after the epoch.
        patch.setattr(signals, "is_waiting", lambda: next(asked) >= UPDATES - 1)
        with pytest.raises(signals.StoppedElsewhere, match="between epochs"):
            train(workdir, **OPTIONS)
    assert not (workdir / INTERRUPTED).exists()
    assert "Resuming after epoch 1 of 3" in train(workdir, **OPTIONS)
    assert_same_end(workdir, whole)
