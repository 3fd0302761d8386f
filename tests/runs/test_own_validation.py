"""Data with validation images of its own, all the way: trained, evaluated, searched and ended."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import random_images, save_image
from runs import end_of, in_process, metrics, options, own_cache, result, start, train
from searches import small_search

from experiments import evaluate
from experiments.runs.workdir import Workdir
from experiments.search.config import check
from experiments.search.folder import load_search
from ktg_jax.errors import InputError

SIZES = {"train": 64, "val": 24, "test": 12}
RUN: dict[str, Any] = {"train_limit": None, "epochs": 2}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same images as a folder and as a file, two classes, one after the other."""
    root = tmp_path_factory.mktemp("data")
    arrays: dict[str, np.ndarray] = {}
    for seed, (split, count) in enumerate(SIZES.items()):
        images = random_images(count, 8, 8, 1, seed=seed)
        labels = np.arange(count) * 2 // count
        images[labels == 1] //= 2  # there is something to learn
        prefix = "" if split == "train" else f"{split}_"
        arrays |= {f"{prefix}images": images, f"{prefix}labels": labels}
        for i, (pixels, label) in enumerate(zip(images[..., 0], labels, strict=True)):
            save_image(root / "own" / split / "ab"[label] / f"{i:02}.png", pixels)
    np.savez(root / "own.npz", allow_pickle=True, **arrays)
    return {"folder": f"folder:{root / 'own'}", "npz": f"npz:{root / 'own.npz'}"}


@pytest.fixture(scope="module")
def runs(data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that differ in where the images come from, and in the fraction."""
    root = tmp_path_factory.mktemp("runs")
    for name, fraction in (("folder", 0.1), ("npz", 0.5)):
        said = train(root / name, data=data[name], val_fraction=fraction, **RUN)
        assert "64 training, 24 validation (of its own), 12 test images" in said
    return {name: root / name for name in data}


def test_a_file_is_trained_as_a_folder_and_the_fraction_is_not_used(runs: dict[str, Path]) -> None:
    assert metrics(runs["folder"])[0]["nodes"][0]["val_accuracy"] is not None
    assert metrics(runs["npz"]) == metrics(runs["folder"])
    assert result(runs["npz"]) == result(runs["folder"])
    facts = Workdir(runs["folder"]).config["data_facts"]
    assert {split: facts[split] for split in SIZES} == SIZES


@pytest.mark.parametrize("name", ["folder", "npz"])
def test_the_validation_images_can_be_evaluated(name: str, runs: dict[str, Path]) -> None:
    ended = in_process(evaluate.main, runs[name], "--split", "val")
    assert (ended.code, ended.err) == (0, "")
    assert "24 val images" in ended.out
    accuracy = result(runs[name])["target"]["val_accuracy"]
    assert f"{100 * accuracy:.2f} %" in ended.out
    assert in_process(evaluate.main, runs[name], "--checkpoint", "best").code == 0


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_a_search_needs_no_fraction_of_such_data(kind: str, data: dict[str, str]) -> None:
    config = small_search(data=data[kind], train_limit=None, val_fraction=0.0)
    assert check(config).num_nodes == 2


def test_a_search_of_other_data_does(tmp_path: Path) -> None:
    images, labels = random_images(8, 8, 8, 1), np.arange(8) % 2
    np.savez(tmp_path / "own.npz", images=images, labels=labels)
    for kind in ("digits", f"npz:{tmp_path / 'own.npz'}", f"folder:{tmp_path}"):
        with pytest.raises(InputError, match=r"^val_fraction: got 0\.0; allowed: above 0"):
            check(small_search(data=kind, val_fraction=0.0))


@pytest.mark.slow
def test_it_is_searched_and_ended_with_the_default_options(
    data: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    workdir = tmp_path / "search"
    changes = {"epochs": 1, "trials": 6, "workers": 1, "retrain_seeds": 1, "baselines": True}
    config = small_search(workdir, data=data["folder"], train_limit=None, **changes)
    assert config.val_fraction > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KTG_CACHE_DIR", str(own_cache(tmp_path / "home")))
        end = end_of(start("experiments.search", *options(config), cwd=tmp_path, devices=1))
    assert end.code == 0, end.err
    assert "64 training and 24 validation images" in end.out
    study = load_search(workdir)
    assert {trial.state for trial in study.trials} <= {"complete", "pruned"}
    assert study.results is not None
    kinds = {entry["kind"] for entry in study.results["entries"]}
    assert {"found", "distillation"} <= kinds
    for entry in study.results["entries"]:
        (name,) = entry["runs"]
        run = json.loads((workdir / "retrained" / entry["name"] / name / "config.json").read_text())
        facts = run["config"]["data_facts"]  # all training images, and none of the validation
        assert {split: facts[split] for split in SIZES} == SIZES
    frozen = list((tmp_path / "home" / "pretrained").glob("tiny-*/config.json"))
    assert frozen
    for path in frozen:
        facts = json.loads(path.read_text())["config"]["data_facts"]
        assert (facts["train"], facts["val"], facts["test"]) == (64, 24, 0)
