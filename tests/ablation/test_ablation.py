"""The ablation: its arms' graphs, its runs, resumed and extended, and its tables."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from runs import assert_same_end, compiled_once, in_process, metrics, options, result

import ktg_jax as ktg
from experiments.ablation import command as ablation
from experiments.ablation.arms import ARMS, Setting, chosen
from experiments.ablation.config import AblationConfig
from experiments.ablation.study import first_epoch
from experiments.ablation.tables import markdown
from ktg_jax.priors import load_prior

NAMES = ("plain", "prior-0.7", "distillation+prior")
SETTING = Setting(
    student="resnet8",
    teacher="runs/t",
    teacher_model="resnet20",
    weight=2.0,
    schedule="constant",
    temperature=4.0,
    attention_weight=10.0,
    feature_weight=3.0,
    prior_of=lambda how: f"prior/{how}",
)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTG_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "ablation_cache"))


def small(workdir: Path, **changes: Any) -> AblationConfig:
    fields: dict[str, Any] = {
        "students": ("staged",),
        "teacher_model": "staged_wide",
        "imports": ("tiny_models",),
        "arms": NAMES,
        "train_limit": 200,
        "epochs": 2,
        "fit_steps": 6,
        "batch_size": 32,
        "seeds": 2,
    }
    return AblationConfig(**fields | {"workdir": str(workdir)} | changes)


def ablate(workdir: Path, **changes: Any) -> str:
    """Runs the command in this process; returns what it says."""
    text = io.StringIO()
    with compiled_once():
        ablation.ablate(small(workdir, **changes), Console(file=text, width=200))
    return text.getvalue()


def results_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def times(folder: Path) -> dict[Path, int]:
    """When each file of the runs and priors was written."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent != folder]
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a study has of its student; it was begun with one seed and stopped in its second."""
    study = tmp_path_factory.mktemp("ablation") / "study"
    folder = study / "staged"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KTG_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "ablation_cache"))
        ablate(study, seeds=1)
        assert results_in(folder)["seeds"] == [0]
        before, train, count = times(folder), ablation.train, 0

        def stop_at_second(*args: Any, **kwargs: Any) -> None:
            nonlocal count
            count += 1
            if count == 2:
                raise KeyboardInterrupt
            train(*args, **kwargs)

        with pytest.MonkeyPatch.context() as stopping:
            stopping.setattr(ablation, "train", stop_at_second)
            with pytest.raises(KeyboardInterrupt):
                ablate(study)
        assert (folder / "arms" / "plain" / "seed-1" / "result.json").is_file()
        assert results_in(folder)["seeds"] == [0]
        ablate(study)
    after = times(folder)
    assert {path: after[path] for path in before} == before
    return folder


@pytest.mark.slow
def test_a_picture_that_cannot_be_drawn_costs_no_results(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(results: Any, paths: Any) -> None:
        assert results_in(whole) == results  # they are there already
        raise ValueError("no font")

    before = (whole / "results.json").read_text()
    monkeypatch.setattr("experiments.ablation.pictures.draw_arms", fails)
    said = ablate(whole.parent)
    assert said.count(f"{whole / 'curves.svg'} is not drawn: ValueError: no font\n") == 2
    assert (whole / "results.json").read_text() == before


# --- graphs


def node_of(name: str) -> ktg.Node:
    return ARMS[name].graph(SETTING).nodes[0]


def test_every_arm_is_a_graph_of_the_same_student() -> None:
    for name in ARMS:
        node = node_of(name)
        assert (node.name, node.model, node.weights) == ("student", "resnet8", None)
    assert node_of("plain").prior is None
    assert (node_of("initialised").prior_weight, node_of("initialised").prior) == (0, "prior/fit")
    assert node_of("layers").prior == "prior/layers"
    assert (node_of("schedule").prior, node_of("schedule").prior_schedule) == (
        "prior/fit",
        "linear",
    )
    expected = {"prior": 0.0, "prior-0.5": 0.5, "prior-0.7": 0.7, "prior-0.9": 0.9, "svd": 0.7}
    for name, quantile in expected.items():
        node = node_of(name)
        assert (node.prior_quantile, node.prior_weight) == (quantile, 2.0)
        assert (node.prior_schedule, node.prior_matching) == ("constant", "initialise")
    assert node_of("svd").prior == "prior/svd"
    assert node_of("assigned").prior_matching == "assignment"


@pytest.mark.parametrize("kind", ["distillation", "attention", "mutual"])
def test_a_graph_with_a_prior_differs_in_the_prior_alone(kind: str) -> None:
    without, combined = (ARMS[name].graph(SETTING) for name in (kind, f"{kind}+prior"))
    assert without.gates == combined.gates
    assert without.temperature == combined.temperature == (1.0 if kind == "mutual" else 4.0)
    losses = {"attention": 10.0} if kind == "attention" else {"kl": 1.0}
    assert without.edges == combined.edges
    assert combined.edges[0][1].losses == losses
    assert without.nodes[1] == combined.nodes[1]
    assert without.nodes[0].prior is None
    assert combined.nodes[0] == node_of("prior-0.7")
    assert without.frozen == (() if kind == "mutual" else (1,))


def test_controls_are_arms_that_come_before() -> None:
    seen: list[str] = []
    for arm in ARMS.values():
        assert set(arm.controls) <= set(seen)
        seen.append(arm.name)
    assert [arm.name for arm in chosen(())] == seen


# --- runs


@pytest.mark.slow
def test_accuracies_are_those_of_the_runs(whole: Path) -> None:
    results = results_in(whole)
    assert results["seeds"] == [0, 1]
    assert [entry["name"] for entry in results["entries"]] == list(NAMES)
    for entry in results["entries"]:
        runs = [whole / "arms" / entry["name"] / f"seed-{seed}" for seed in (0, 1)]
        found = [result(run)["target"]["test_accuracy"] for run in runs]
        assert entry["accuracies"] == found
        nodes = [[line["nodes"][0] for line in metrics(run)] for run in runs]
        by_epoch = np.mean([[n["val_accuracy"] for n in of_run] for of_run in nodes], axis=0)
        np.testing.assert_allclose(entry["val_accuracy_by_epoch"], by_epoch)
        if entry["name"] == "plain":
            assert entry["prior_distance_by_epoch"] is None
        else:
            distances = np.mean([[n["prior_distance"] for n in of_run] for of_run in nodes], axis=0)
            assert distances.shape == (2, 2)
            np.testing.assert_allclose(entry["prior_distance_by_epoch"], distances)
    pairs = [(found["entry"], found["baseline"]) for found in results["comparisons"]]
    assert pairs == [
        ("prior-0.7", "plain"),
        ("distillation+prior", "plain"),
        ("distillation+prior", "prior-0.7"),
    ]
    accuracies = {entry["name"]: np.array(entry["accuracies"]) for entry in results["entries"]}
    for found in results["comparisons"]:
        difference = accuracies[found["entry"]] - accuracies[found["baseline"]]
        np.testing.assert_allclose(found["difference"], difference.mean(), atol=1e-12)


@pytest.mark.slow
def test_all_arms_can_be_run_with_several_students(tmp_path: Path) -> None:
    short = {"seeds": 1, "epochs": 1, "fit_steps": 2, "arms": ()}
    said = ablate(tmp_path / "study", students=("staged", "staged_wide"), **short)
    for student, widths in (("staged", (4, 6)), ("staged_wide", (8, 12))):
        results = results_in(tmp_path / "study" / student)
        entries = {entry["name"]: entry for entry in results["entries"]}
        assert list(entries) == list(ARMS)
        assert f"\n{student}:" in said
        run = tmp_path / "study" / student / "arms" / "attention+prior" / "seed-0"
        (line,) = metrics(run)
        assert line["nodes"][0]["edge_losses"][1] > 0  # from the teacher, without its logits
        assert entries["layers"]["prior_kernels"] == ["stage1_conv.kernel", "stage2_conv.kernel"]
        prior = load_prior(tmp_path / "study" / student / "priors" / "layers-0" / "prior")
        assert tuple(kernel.shape[-1] for kernel in prior.kernels) == widths


@pytest.mark.slow
def test_each_seed_has_its_prior_and_arms_share_it(whole: Path) -> None:
    priors = [load_prior(whole / "priors" / f"fit-{seed}" / "prior") for seed in (0, 1)]
    assert not np.allclose(priors[0].kernels[0], priors[1].kernels[0])
    assert not (whole / "priors" / "svd-0").exists()
    for arm in NAMES[1:]:
        node = ktg.Graph.load(whole / "arms" / arm / "seed-1" / "graph.json").nodes[0]
        assert node.prior == str(whole / "priors" / "fit-1" / "prior")


@pytest.mark.slow
def test_a_study_that_was_stopped_and_extended_has_the_runs_of_another(
    whole: Path, tmp_path: Path
) -> None:
    ablate(tmp_path / "study", seed=1, seeds=1, arms=("plain",))
    path = Path("arms") / "plain" / "seed-1"
    assert_same_end(tmp_path / "study" / "staged" / path, whole / path)


@pytest.mark.slow
def test_a_finished_study_trains_nothing(whole: Path) -> None:
    before = times(whole)
    said = ablate(whole.parent)
    assert "Training" not in said
    assert "distillation+prior" in said
    assert times(whole) == before


@pytest.mark.slow
def test_a_study_that_was_moved_has_its_priors_with_it(whole: Path, tmp_path: Path) -> None:
    study = tmp_path / "moved"
    shutil.copytree(whole.parent, study)
    for path in study.rglob("*.json"):
        path.write_text(path.read_text().replace(str(whole.parent), "/nowhere"))
    (study / "staged" / "results.json").unlink()
    assert "Training" not in ablate(study)
    for ours, theirs in zip(
        results_in(study / "staged")["entries"], results_in(whole)["entries"], strict=True
    ):
        assert ours["prior_kernels"] == theirs["prior_kernels"]
        assert ours["accuracies"] == theirs["accuracies"]


@pytest.mark.slow
def test_tables_and_curves_are_written(whole: Path) -> None:
    with Image.open(whole / "curves.png") as picture:
        picture.load()
        assert picture.format == "PNG"
    assert (whole / "curves.svg").read_text().startswith("<?xml")
    text = (whole / "results.md").read_text()
    assert text == markdown(results_in(whole))
    (plain, *_) = results_in(whole)["entries"]
    mean = np.mean(plain["accuracies"])
    assert f"| plain | the student alone | {100 * mean:.2f} ±" in text


# --- tables


def test_the_first_epoch_of_an_accuracy() -> None:
    assert first_epoch([0.2, 0.5, 0.4, 0.6], 0.5) == 2
    assert first_epoch([0.2, 0.5], 0.6) is None
    assert first_epoch([None, None], 0.1) is None


def entry(name: str, accuracies: list[float], epochs: list[int | None]) -> dict[str, Any]:
    return {
        "name": name,
        "about": f"about {name}",
        "accuracies": accuracies,
        "mean": float(np.mean(accuracies)),
        "std": float(np.std(accuracies, ddof=1)),
        "epochs_to": {"0.1": [1, 1], "0.5": epochs, "0.95": [None, None]},
        "val_accuracy_by_epoch": None,
        "prior_kernels": ["x", "y"] if name == "b" else None,
        "prior_distance_by_epoch": [[1.0, 2.0], [0.5, 1.0], [0.25, 0.125]] if name == "b" else None,
    }


def test_tables_say_what_the_results_are() -> None:
    comparison = {"entry": "b", "baseline": "a", "difference": 0.05, "low": 0.01, "high": 0.09}
    results = {
        "seeds": [3, 4],
        "num_tests": 1,
        "entries": [entry("a", [0.5, 0.6], [2, None]), entry("b", [0.55, 0.65], [1, 4])],
        "comparisons": [comparison | {"p": 0.0001, "p_holm": 0.02}],
    }
    text = markdown(results)
    for line in (
        "| arm | what | mean | seed 3 | seed 4 |",
        "| a | about a | 55.00 ± 7.07 | 50.00 | 60.00 |",
        "| b | a | +5.00 | +1.00 to +9.00 | < 0.001 | 0.020 |",
        "| arm | 50 % |",
        "| a | 2.0 (1) |",
        "| b | 2.5 |",
        "| b | 1.000, 2.000 | 0.500, 1.000 | 0.250, 0.125 |",
    ):
        assert line in text.splitlines(), line


# --- bad input

BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"arms": ("plain", "magic")}, "arms", "got 'magic'; allowed: plain, initialised"),
    ({"seeds": 0}, "seeds", "got 0; allowed: at least 1"),
    ({"seeds": 10**9}, "seeds", "got 1000000000; allowed: at most 1,000"),
    ({"seed": 2**32 - 1, "seeds": 2}, "seed", "allowed: at most 4,294,967,295, the 2 seeds from"),
    ({"temperature": 1e300}, "temperature", "got 1e+300; allowed: 1e-15 to 1e+15"),
    ({"feature_weight": 1e300}, "feature_weight", "got 1e+300; allowed: at most 1e+30"),
    ({"students": ("staged", "stagd")}, "students[1]", "got 'stagd'; allowed: cnn, resnet8"),
    ({"temperature": 0.0}, "temperature", "got 0.0; allowed: a finite number above 0"),
    ({"prior_weight": -1.0}, "prior_weight", "got -1.0; allowed: a finite number"),
    (
        {"teacher": "gone", "teacher_model": "resnet14"},
        "teacher",
        "got 'gone'; allowed: the folder",
    ),
    ({"teacher_model": "cnn"}, "teacher's model", "got 'cnn'; allowed: one with 2 stages"),
    ({"students": ()}, "students", "got []; allowed: different models, at least one"),
    ({"students": ("staged", "staged")}, "students", "allowed: different models"),
    ({"attention_weight": 0.0}, "attention_weight", "got 0.0; allowed: a finite number above 0"),
    ({"students": ("staged", "tiny")}, "student", "got 'tiny'; allowed: a model with convolutions"),
]


@pytest.mark.parametrize(("changes", "field", "message"), BAD, ids=lambda x: str(x)[:40])
def test_bad_input_is_one_line_and_leaves_nothing(
    changes: dict[str, Any], field: str, message: str, tmp_path: Path
) -> None:
    ended = in_process(ablation.main, *options(small(tmp_path / "study", **changes)))
    assert ended.code == 2, ended
    assert ended.err.startswith(f"error: {field}: ")
    assert message in ended.err
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_a_folder_of_another_study_is_refused(whole: Path) -> None:
    ended = in_process(ablation.main, *options(small(whole.parent, prior_weight=3.0)))
    assert ended.code == 2
    assert "(differing: prior_weight: 1.0, now 3.0)" in ended.err
