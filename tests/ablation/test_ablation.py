"""The ablation: its arms' graphs, its runs, resumed and extended, and its tables."""

import dataclasses
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
from experiments.ablation import pictures
from experiments.ablation.arms import ARMS, Setting, chosen
from experiments.ablation.config import AblationConfig, check
from experiments.ablation.study import first_epoch
from experiments.ablation.tables import markdown
from experiments.runs.config import TrainConfig
from ktg_jax.errors import DivergedError, InputError, RunError
from ktg_jax.priors import load_prior

NAMES = ("plain", "plain-long", "prior", "distillation+prior")
SETTING = Setting(
    student="resnet8",
    teacher="runs/t",
    teacher_model="resnet20",
    input=None,
    weight=2.0,
    schedule="constant",
    temperature=4.0,
    attention_weight=10.0,
    hint_weight=3.0,
    graph=ktg.graphs.distillation(ktg.Node("cnn"), ktg.Node("cnn", "frozen", weights="x"), 2.0),
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
        "learning_rates": (0.02, 0.1),
        "rate_seeds": 1,
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
        assert len(list(folder.glob("arms/plain/rate-*/seed-1/result.json"))) == 1
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


@pytest.mark.slow
def test_what_diverges_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = ablation.train

    def diverging(config: TrainConfig, *args: Any) -> None:
        if "/prior/" in str(config.workdir) or "/plain/rate-0.1/" in str(config.workdir):
            raise DivergedError("step 3, node student: loss not finite (nan)")
        train(config, *args)

    monkeypatch.setattr(ablation, "train", diverging)
    options: dict[str, Any] = {"arms": ("plain", "prior"), "seeds": 1}
    said = ablate(tmp_path, **options)
    assert said.count("It diverged: step 3, node student: loss not finite (nan)") == 3
    results = results_in(tmp_path / "staged")
    (plain,) = results["entries"]
    assert (plain["name"], plain["learning_rate"]) == ("plain", 0.02)
    assert plain["val_accuracy_by_rate"]["0.1"] is None
    assert results["diverged"] == {"prior": [0]}
    text = (tmp_path / "staged" / "results.md").read_text()
    assert "Arms that diverged with their best rate and are left out: `prior` (seeds 0)." in text
    monkeypatch.setattr(ablation, "train", lambda *args: pytest.fail("it is done"))
    ablate(tmp_path, **options)
    assert results_in(tmp_path / "staged") == results
    with pytest.raises(RunError, match=r"every arm diverged; lower --learning-rates may help$"):
        ablate(tmp_path, arms=("prior",), seeds=1)


# --- graphs


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            [{"name": "target", "model": "cnn"}, {"name": "mean", "average": "target"}],
            "graph: nodes[1].average: got 'target'",
        ),
        (
            [{"name": "target", "model": "cnn"}, {"name": "student", "model": "cnn"}],
            "graph: nodes[1].name: got 'student'",
        ),
    ],
)
def test_a_graph_that_the_student_cannot_be_put_into(
    nodes: list[dict[str, str]], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "graph.json"
    gates = [["through", "through"], ["cutoff", "through" if "model" in nodes[1] else "cutoff"]]
    file.write_text(json.dumps({"nodes": nodes, "gates": gates}))
    with pytest.raises(InputError) as error:
        check(small(tmp_path, graph=str(file)))
    assert str(error.value).startswith(message)


def test_peers_of_a_given_graph_see_images_as_the_student_does() -> None:
    graph = ktg.graphs.mutual(["cnn", "cnn"])
    seen = ktg.Input((0.5,), (0.25,))
    setting = dataclasses.replace(SETTING, graph=graph, input=seen)
    assert [node.input for node in ARMS["graph"].graph(setting).nodes] == [seen, seen]


def node_of(name: str) -> ktg.Node:
    return ARMS[name].graph(SETTING).nodes[0]


def test_every_arm_is_a_graph_of_the_same_student() -> None:
    for name in ARMS:
        node = node_of(name)
        assert (node.name, node.model, node.weights) == ("student", "resnet8", None)
    for name in ("plain", "plain-long", "distillation-long", "mutual", "graph"):
        assert node_of(name).prior is None
    starts = {"select": "select", "regression": "regression", "chained": "chained"}
    for name, aggregation in {**starts, "kernels": "regression"}.items():
        node = node_of(name)
        assert (node.prior, node.prior_weight) == (f"prior/{aggregation}", 0)
        assert node.prior_matching == ("kernels" if name == "kernels" else "initialise")
    quantiles = {"prior": 0.7, "prior-0": 0.0, "prior-0.5": 0.5, "prior-0.9": 0.9, "l1": 0.1}
    for name, quantile in quantiles.items():
        node = node_of(name)
        assert (node.prior_quantile, node.prior_weight) == (quantile, 2.0)
        assert (node.prior_schedule, node.prior_matching) == ("constant", "initialise")
    assert (node_of("light").prior_weight, node_of("heavy").prior_weight) == (0.6, 6.0)
    assert (node_of("schedule").prior, node_of("schedule").prior_schedule) == (
        "prior/regression",
        "linear",
    )
    kinds = [node_of(name).prior_kind for name in ("prior", "l1", "task", "distribution")]
    assert kinds == ["filters", "l1", "task", "distribution"]
    assert node_of("recast+prior").prior == "prior/recast"


@pytest.mark.parametrize("kind", ["distillation", "attention", "hints", "mutual", "graph"])
def test_a_graph_with_a_prior_differs_in_the_prior_alone(kind: str) -> None:
    without, combined = (ARMS[name].graph(SETTING) for name in (kind, f"{kind}+prior"))
    temperatures = {"mutual": 1.0, "graph": 2.0}
    assert without.temperature == combined.temperature == temperatures.get(kind, 4.0)
    losses = {"attention": {"attention": 10.0}, "hints": {"features": 3.0}}
    assert without.edges == combined.edges
    assert combined.edges[0][1].losses == losses.get(kind, {"kl": 1.0})
    assert combined.edges[0][1].connector == ("conv" if kind == "hints" else None)
    assert without.nodes[1] == combined.nodes[1]
    assert without.nodes[0].prior is None
    assert combined.nodes[0] == node_of("prior")
    assert without.frozen == (() if kind == "mutual" else (1,))
    if kind == "graph":
        teacher = combined.nodes[1]
        assert (teacher.name, teacher.model, teacher.weights) == ("frozen", "resnet20", "runs/t")


def test_controls_are_arms_that_come_before() -> None:
    seen: list[str] = []
    for arm in ARMS.values():
        assert set(arm.controls) <= set(seen)
        seen.append(arm.name)
    assert [arm.name for arm in chosen((), with_graph=True)] == seen
    without = [name for name in seen if not name.startswith("graph")]
    assert [arm.name for arm in chosen((), with_graph=False)] == without


# --- runs


@pytest.mark.slow
def test_accuracies_are_those_of_the_runs(whole: Path) -> None:
    results = results_in(whole)
    assert results["seeds"] == [0, 1]
    assert [entry["name"] for entry in results["entries"]] == list(NAMES)
    for entry in results["entries"]:
        compared = {
            rate: result(whole / "arms" / entry["name"] / f"rate-{rate}" / "seed-0")["target"]
            for rate in ("0.02", "0.1")
        }
        by_rate = {rate: target["val_accuracy"] for rate, target in compared.items()}
        assert entry["val_accuracy_by_rate"] == pytest.approx(by_rate)
        best = f"{entry['learning_rate']:g}"
        assert by_rate[best] == max(by_rate.values())
        assert entry["epochs"] == (4 if entry["name"] == "plain-long" else 2)
        runs = [whole / "arms" / entry["name"] / f"rate-{best}" / f"seed-{s}" for s in (0, 1)]
        found = [result(run)["target"]["test_accuracy"] for run in runs]
        assert entry["accuracies"] == found
        nodes = [[line["nodes"][0] for line in metrics(run)] for run in runs]
        by_epoch = np.mean([[n["val_accuracy"] for n in of_run] for of_run in nodes], axis=0)
        np.testing.assert_allclose(entry["val_accuracy_by_epoch"], by_epoch)
        if entry["name"].startswith("plain"):
            assert entry["prior_distance_by_epoch"] is entry["fit_left"] is None
        else:
            distances = np.mean([[n["prior_distance"] for n in of_run] for of_run in nodes], axis=0)
            assert distances.shape == (2, 2)
            np.testing.assert_allclose(entry["prior_distance_by_epoch"], distances)
            assert len(entry["fit_left"]) == len(entry["fit_errors"]) == 2
    pairs = [(found["entry"], found["baseline"]) for found in results["comparisons"]]
    assert pairs == [
        ("plain-long", "plain"),
        ("prior", "plain"),
        ("prior", "plain-long"),
        ("distillation+prior", "prior"),
    ]
    accuracies = {entry["name"]: np.array(entry["accuracies"]) for entry in results["entries"]}
    for found in results["comparisons"]:
        difference = accuracies[found["entry"]] - accuracies[found["baseline"]]
        np.testing.assert_allclose(found["difference"], difference.mean(), atol=1e-12)


@pytest.mark.slow
def test_all_arms_can_be_run_with_several_students(tmp_path: Path) -> None:
    graph = tmp_path / "graph.json"
    assert SETTING.graph is not None
    SETTING.graph.save(graph)
    short: dict[str, Any] = {"seeds": 1, "epochs": 1, "fit_steps": 2, "arms": ()}
    short |= {"learning_rates": (0.02,), "graph": str(graph)}
    # The second is as wide as its teacher.
    said = ablate(tmp_path / "study", students=("staged", "staged_wide"), **short)
    for student, widths in (("staged", (4, 6)), ("staged_wide", (8, 12))):
        results = results_in(tmp_path / "study" / student)
        assert [entry["name"] for entry in results["entries"]] == list(ARMS)
        assert f"\n{student}:" in said
        run = tmp_path / "study" / student / "arms" / "attention+prior" / "rate-0.02" / "seed-0"
        (line,) = metrics(run)
        assert line["nodes"][0]["edge_losses"][1] > 0  # from the teacher, without its logits
        prior = load_prior(tmp_path / "study" / student / "priors" / "chained-0" / "prior")
        assert tuple(kernel.shape[-1] for kernel in prior.kernels) == widths


@pytest.mark.slow
def test_each_seed_has_its_prior_and_arms_share_it(whole: Path) -> None:
    folders = [whole / "priors" / f"regression-{seed}" / "prior" for seed in (0, 1)]
    priors = [load_prior(folder) for folder in folders]
    # The first stage is a part of the teacher, and stays it.
    assert not np.allclose(priors[0].kernels[1], priors[1].kernels[1])
    assert not (whole / "priors" / "select-0").exists()
    for arm in NAMES[2:]:
        (file,) = whole.glob(f"arms/{arm}/rate-*/seed-1/graph.json")
        assert ktg.Graph.load(file).nodes[0].prior == str(folders[1])


@pytest.mark.slow
def test_a_study_that_was_stopped_and_extended_has_the_runs_of_another(
    whole: Path, tmp_path: Path
) -> None:
    ablate(tmp_path / "study", seed=1, seeds=1, arms=("plain",))
    (path,) = (p.relative_to(whole) for p in whole.glob("arms/plain/rate-*/seed-1"))
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
    rate = f"{plain['learning_rate']:g}"
    assert f"| plain | the student alone | 2 | {rate} | {100 * mean:.2f} ±" in text


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
        "epochs": 3,
        "learning_rate": 0.05,
        "val_accuracy_by_rate": {"0.02": 0.25, "0.05": 0.5},
        "fit_left": [0.125, 0.5] if name == "b" else None,
        "fit_errors": None,
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
        "diverged": {},
    }
    text = markdown(results)
    for line in (
        "| arm | what | epochs | rate | mean | seed 3 | seed 4 |",
        "| a | about a | 3 | 0.05 | 55.00 ± 7.07 | 50.00 | 60.00 |",
        "| arm | 0.02 | 0.05 |",
        "| a | 25.00 | 50.00 |",
        "| b | 0.125, 0.500 | - |",
        "| b | a | +5.00 | +1.00 to +9.00 | < 0.001 | 0.020 |",
        "| arm | 50 % |",
        "| a | 2.0 (1) |",
        "| b | 2.5 |",
        "| b | 1.500 | 0.750 | 0.188 |",
    ):
        assert line in text.splitlines(), line


# --- bad input

BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"arms": ("plain", "magic")}, "arms", "got 'magic'; allowed: plain, plain-long"),
    ({"arms": ("plain", "graph")}, "arms", "got 'graph'; allowed: an arm without a graph, or --g"),
    ({"graph": "gone.json"}, "graph", "got 'gone.json'; allowed: "),
    ({"learning_rates": ()}, "learning_rates", "got []; allowed: rates that differ in"),
    ({"learning_rates": (0.1, 0.1)}, "learning_rates", "allowed: rates that differ"),
    ({"learning_rates": (0.1, -1.0)}, "learning_rates[1]", "got -1.0; allowed: a finite number"),
    ({"rate_seeds": 0}, "rate_seeds", "got 0; allowed: at least 1"),
    ({"val_fraction": 0.0}, "val_fraction", "got 0.0; allowed: above 0: learning rates are comp"),
    ({"seeds": 0}, "seeds", "got 0; allowed: at least 1"),
    ({"seeds": 10**9}, "seeds", "got 1000000000; allowed: at most 1,000"),
    ({"seed": 2**32 - 1, "seeds": 2}, "seed", "allowed: at most 4,294,967,295, the 2 seeds from"),
    ({"temperature": 1e300}, "temperature", "got 1e+300; allowed: 1e-15 to 1e+15"),
    ({"hint_weight": 1e300}, "hint_weight", "got 1e+300; allowed: at most 1e+30"),
    ({"students": ("staged", "stagd")}, "students[1]", "got 'stagd'; allowed: cnn, resnet8"),
    ({"temperature": 0.0}, "temperature", "got 0.0; allowed: a finite number above 0"),
    ({"prior_weight": -1.0}, "prior_weight", "got -1.0; allowed: a finite number"),
    ({"teacher": "gone", "teacher_model": None}, "teacher", "got 'gone'; allowed: the folder"),
    ({"teacher_model": "cnn"}, "student", "got '2 stages'; allowed: the teacher's 3 stages"),
    ({"students": ()}, "students", "got []; allowed: different models, at least one"),
    ({"students": ("staged", "staged")}, "students", "allowed: different models"),
    ({"attention_weight": 0.0}, "attention_weight", "got 0.0; allowed: a finite number above 0"),
    ({"students": ("staged", "tiny")}, "stages", "got 'Tiny'; allowed: a module with submodules"),
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


def test_no_two_of_all_arms_look_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: drawn.append(figure))
    drawn: list[Any] = []
    arm = {"val_accuracy_by_epoch": [0.1, 0.2], "prior_kernels": None}
    pictures.draw_arms({"entries": [arm | {"name": name} for name in ARMS]}, [tmp_path / "a.svg"])
    lines = drawn[0].axes[0].get_lines()
    assert [line.get_label() for line in lines] == list(ARMS)
    assert len(ARMS) > 20  # more than there are colours
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(ARMS)
