"""The fair ending as one runs it: with runs of one length, and the only one that reads the test."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models  # noqa: F401  (registers its models)
from data_files import random_images
from PIL import Image
from runs import Ended, end_of, in_process, options, start
from searches import small_search

import experiments.search.command
from experiments.search.config import SearchConfig
from experiments.search.folder import load_search

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("home"),
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]


def run(config: SearchConfig) -> Ended:
    folder = Path(str(config.workdir)).parent
    return end_of(start("experiments.search", *options(config), cwd=folder, devices=1))


def test_the_ending_never_mixes_runs_of_different_lengths(tmp_path: Path) -> None:
    workdir = tmp_path / "search"
    config = small_search(
        workdir, nodes=1, candidates=(), trials=2, epochs=2, pruner="none", workers=1
    )
    longer = SearchConfig(**vars(config) | {"retrain_seeds": 3, "retrain_epochs": 4})

    def lengths(config: SearchConfig) -> list[list[int]]:
        """The epochs of the runs that each accuracy of the results is of."""
        end = run(config)
        assert end.code == 0, end.err
        results, found = load_search(workdir).results, []
        assert results is not None
        for entry in results["entries"]:
            folders = [workdir / "retrained" / entry["name"] / name for name in entry["runs"]]
            runs = [json.loads((folder / "result.json").read_text()) for folder in folders]
            assert entry["accuracies"] == [r["target"]["test_accuracy"] for r in runs]
            found.append([r["epochs"] for r in runs])
        assert len(found) == 2
        return found

    def times() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in (workdir / "retrained").rglob("result.json")}

    assert lengths(config) == [[2, 2]] * 2
    before = times()
    assert lengths(longer) == [[4, 4, 4]] * 2
    after = times()
    assert before.items() <= after.items()
    assert lengths(config) == [[2, 2]] * 2
    assert times() == after  # nothing was trained again


def test_a_search_never_reads_the_test_images(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (120, 8, 8, 1), np.uint8)
    labels = np.arange(120) % 4
    path = tmp_path / "data.npz"
    test: dict[str, Any] = {"test_labels": labels[:4], "test_images": images[:4]}
    np.savez(path, images=images, labels=labels, **test)
    spoil(path, "test_images.npy")
    config = small_search(
        tmp_path / "search",
        data=f"npz:{path}",
        train_limit=None,
        trials=6,
        baselines=True,
        retrain_top=0,
    )
    end = run(config)
    assert end.code == 0, end.err
    trials = load_search(tmp_path / "search").trials
    assert [trial.state for trial in trials if trial.state not in ("complete", "pruned")] == []
    assert len(trials) == 6
    assert any(trial.baseline == "distillation tiny" for trial in trials)  # pre-trains
    shutil.rmtree(tmp_path / "search")
    end = run(SearchConfig(**vars(config) | {"retrain_top": 1}))
    assert end.code == 1  # for the workers of the fair ending do
    assert "data.npz" in end.err
    assert len(end.err.splitlines()) == 1


def spoil(path: Path, member: str) -> None:
    """Damages a file within an archive, so that who reads it fails."""
    content = bytearray(path.read_bytes())
    at = content.rindex(b"\x93NUMPY", 0, content.index(b"PK\x01\x02"))
    assert member.encode() in content[at - 200 : at]
    content[at : at + 6] = b"broken"
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_without_test_images_no_fair_ending_is_begun(kind: str, tmp_path: Path) -> None:
    images, labels = random_images(120, 8, 8, 1), np.arange(120) % 4
    np.savez(tmp_path / "npz", images=images, labels=labels)
    for i, label in enumerate(labels):
        path = tmp_path / "folder" / "train" / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i, :, :, 0]).save(path)
    data = f"{kind}:{tmp_path / kind}{'.npz' if kind == 'npz' else ''}"
    config = small_search(tmp_path / "search", data=data, train_limit=None)
    end = in_process(experiments.search.command.main, *options(config))
    assert end.code == 2
    assert end.err == "error: retrain_top: got 1; allowed: 0, for the data has no test images\n"
    assert not (tmp_path / "search").exists()
