"""A run that is asked to stop saves within the epoch, and ends where it would have."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
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
    """Trains until it is asked to stop after so many updates; the update that it stops at.

    That is 0 at the end of an epoch, where nothing has to be kept beside the checkpoint.
    """
    asked = iter(range(10_000))
    with monkeypatch.context() as patch:
        patch.setattr(signals, "is_waiting", lambda: next(asked) >= updates)
        with pytest.raises(signals.StoppedElsewhere):
            train(workdir, **OPTIONS, **more)
    return max(checkpoint_epochs(workdir / INTERRUPTED), default=0)


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


def test_it_goes_on_in_other_placements_and_on_another_number_of_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part of the training is computed elsewhere; the end is the same, to rounding."""
    more: dict[str, Any] = {"data_seed": 3}
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    train(whole, **OPTIONS, **more)
    ways: list[dict[str, Any]] = [
        {"placement": "data", "engine": "fused"},
        {"placement": "nodes", "engine": "per_node"},
        {"placement": "nodes+data", "engine": "per_node"},
        {"engine": "batched", "steps_per_call": 2},
    ]
    for how in ways:
        stop_after(5, workdir, monkeypatch, **more, **how)
    one = tuple(jax.local_devices()[:1])
    monkeypatch.setattr(jax, "local_devices", lambda *args, **kwargs: list(one))
    monkeypatch.setattr(jax, "devices", lambda *args, **kwargs: list(one))
    said = train(workdir, **OPTIONS, **more, engine="fused")
    assert "on 1 x cpu" in said
    assert "Resuming" in said
    assert len(metrics(whole)) == len(metrics(workdir)) == 3
    for ours, theirs in zip(metrics(workdir), metrics(whole), strict=True):
        for a, b in zip(ours["nodes"], theirs["nodes"], strict=True):
            np.testing.assert_allclose(a["train_loss"], b["train_loss"], rtol=2e-3, atol=1e-4)
            np.testing.assert_allclose(a["val_loss"], b["val_loss"], rtol=5e-3, atol=1e-3)
