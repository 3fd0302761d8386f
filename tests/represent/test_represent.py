"""The command that makes a prior and trains its student: its files, resumed, refused."""

import io
import json
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from runs import (
    assert_same_end,
    compiled_once,
    end_of,
    in_process,
    metrics,
    options,
    start,
    train,
)

import ktg_jax as ktg
from experiments.represent import aggregation
from experiments.represent import command as command
from experiments.represent.account import Account
from experiments.represent.config import RepresentConfig
from experiments.represent.measures import prior_gradients, share_kept, singular_values
from ktg_jax.priors import about_prior, fit_readers, layer_prior, load_prior, svd_prior
from ktg_jax.training.warm_start import load_weights

pytestmark = pytest.mark.slow

PATHS = ("stage1_conv.kernel", "stage2_conv.kernel")
SMALL: dict[str, Any] = {
    "student": "staged",
    "imports": ("tiny_models",),
    "train_limit": 200,
    "epochs": 2,
    "fit_steps": 12,
    "batch_size": 32,
}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTG_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "represent_cache"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two wide networks."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train(folder, models=("staged_wide", "staged_wide"), epochs=1)
    return folder


@pytest.fixture(scope="module")
def whole(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A student's folder, and what was said while it came about."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, represent(folder, teacher=str(teacher))


def small(workdir: Path, **changes: Any) -> RepresentConfig:
    own = {} if changes.keys() & {"teacher", "prior"} else {"teacher_model": "staged_wide"}
    return RepresentConfig(**SMALL | own | {"workdir": str(workdir)} | changes)


def represent(workdir: Path, **changes: Any) -> str:
    """Runs the command in this process; returns what it says."""
    text = io.StringIO()
    with compiled_once():
        command.represent(small(workdir, **changes), Console(file=text, width=200))
    return text.getvalue()


def test_the_student_is_trained_with_the_teachers_prior(
    whole: tuple[Path, str], teacher: Path
) -> None:
    folder, said = whole
    prior, about = load_prior(folder / "prior"), about_prior(folder / "prior")
    assert prior.shapes == {PATHS[0]: (3, 3, 1, 4), PATHS[1]: (1, 1, 4, 6)}
    assert prior.accuracy is not None
    assert prior.accuracy.shape == (2,)
    assert (about["student"], about["teacher"]) == ("staged", str(teacher))
    assert (about["data"], about["aggregation"]) == ("digits", "fit")
    (node,) = ktg.Graph.load(folder / "graph.json").nodes
    assert node.prior == str(folder / "prior")
    assert (node.name, node.model, node.prior_quantile) == ("student", "staged", 0.7)
    distances = [record["nodes"][0]["prior_distance"] for record in metrics(folder)]
    assert np.shape(distances) == (2, 2)
    assert json.loads((folder / "result.json").read_text())["epochs"] == 2
    for path, share, first, last in zip(PATHS, prior.accuracy.tolist(), *distances, strict=True):
        (line,) = (line.split() for line in said.splitlines() if f" {path} " in line)
        assert line[2:6] == [f"{100 * share:.1f}", "%", f"{first:.3f}", f"{last:.3f}"]


def test_a_picture_that_cannot_be_drawn_costs_a_line(
    whole: tuple[Path, str], teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(account: Account, folder: Path, after: Any = None) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Account, "draw", fails)
    said = represent(whole[0], teacher=str(teacher))
    assert f"{whole[0] / 'stages'} is not drawn: OSError: " in said
    assert "Pictures of the stages" not in said
    assert PATHS[0] in said  # the table is shown nevertheless


def test_a_fit_says_how_far_it_is(whole: tuple[Path, str]) -> None:
    lines = [line for line in whole[1].splitlines() if line.startswith("fitting the prior: step ")]
    steps = [line.removeprefix("fitting the prior: step ").partition("/")[0] for line in lines]
    assert steps == [str(step) for step in range(1, 13)]  # of 12 steps all
    assert lines[0].endswith("; time left -")
    for line in lines[1:]:
        assert re.search(r"/12, heads \d+ \d+ %; time left \d:\d\d:\d\d$", line)
    assert "epoch 2/2, student: train " in whole[1]


def test_each_stage_has_its_pictures(whole: tuple[Path, str]) -> None:
    folder = whole[0] / "stages"
    names = [f"stage{g}-{moment}.png" for g in (1, 2) for moment in ("after", "before")]
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        with Image.open(folder / name) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert np.ptp(np.asarray(picture.convert("L"))) > 200
    assert (folder / names[0]).read_bytes() != (folder / names[1]).read_bytes()


def test_a_finished_student_says_so_and_nothing_is_made_again(
    whole: tuple[Path, str], teacher: Path
) -> None:
    folder = whole[0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    said = represent(folder, teacher=str(teacher))
    assert f"{folder} is finished; nothing to do." in said
    assert said.splitlines()[-4:] == whole[1].splitlines()[-4:]  # the table of the stages
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert after == before


def test_a_node_is_the_teacher_where_it_is_named(teacher: Path, tmp_path: Path) -> None:
    source = f"{teacher}:staged_wide-1"
    represent(tmp_path / "run", teacher=source, aggregation="svd", epochs=1)
    found = load_prior(tmp_path / "run" / "prior")
    assert found.accuracy is None
    expected, other = (
        svd_prior({path: load_weights(node).params[path] for path in PATHS}, found.shapes)
        for node in (source, str(teacher))
    )
    for ours, theirs in zip(found.kernels, expected.kernels, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.allclose(found.kernels[0], other.kernels[0])


def test_a_prior_of_all_layers_has_no_aggregation(teacher: Path, tmp_path: Path) -> None:
    represent(tmp_path / "run", teacher=str(teacher), aggregation="layers", epochs=1)
    found = load_prior(tmp_path / "run" / "prior")
    params = load_weights(str(teacher)).params
    expected = layer_prior({path: params[path] for path in PATHS}, found.shapes)
    chex.assert_trees_all_close(found, expected)
    assert about_prior(tmp_path / "run" / "prior")["aggregation"] == "layers"


def test_pictures_of_layers_are_named_so(tmp_path: Path) -> None:
    kernels = [np.ones((3, 3, 2, 2)), np.eye(9 * 2)[:, :2].reshape(3, 3, 2, 2)]
    paths = ("stage1_a.kernel", "stage1_b.kernel")
    prior = ktg.Prior(tuple(map(jnp.asarray, kernels)), paths)
    Account(prior, teacher=None, before=kernels[::-1], quantile=0.5).draw(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"layer1-before.png", "layer2-before.png"}


def test_without_a_teacher_one_is_trained_and_kept(tmp_path: Path) -> None:
    said = represent(tmp_path / "a", epochs=1, aggregation="cluster")
    assert "staged_wide, is trained first" in said
    again = represent(tmp_path / "b", epochs=1, aggregation="svd")
    assert "is trained first" not in again
    sources = [about_prior(tmp_path / name / "prior")["teacher"] for name in "ab"]
    assert sources[0] == sources[1]
    assert "pretrained" in sources[0]


def test_a_prior_serves_other_students(whole: tuple[Path, str], tmp_path: Path) -> None:
    prior = whole[0] / "prior"
    said = represent(tmp_path / "run", prior=str(prior), prior_weight=0.0, seed=3)
    assert "fitted in" not in said
    assert not (tmp_path / "run" / "prior").exists()
    (node,) = ktg.Graph.load(tmp_path / "run" / "graph.json").nodes
    assert (node.prior, node.prior_weight) == (str(prior), 0.0)
    assert (tmp_path / "run" / "stages" / "stage2-after.png").is_file()
    # An initialisation by the prior is where the distance starts, and nothing holds it there.
    first, last = (metrics(tmp_path / "run")[i]["nodes"][0]["prior_distance"] for i in (0, -1))
    assert np.all(np.array(first) < np.array(last))


def test_it_is_said_where_the_teacher_saw_other_images(
    whole: tuple[Path, str], teacher: Path, tmp_path: Path
) -> None:
    text = "The teacher was trained on other images"
    assert text not in whole[1]
    said = represent(
        tmp_path / "run", teacher=str(teacher), split_seed=1, epochs=1, aggregation="svd"
    )
    assert text in said


# --- numbers of the pictures


def test_singular_values_are_those_of_the_filters() -> None:
    kernel = np.zeros((2, 1, 2, 3))
    kernel[0, 0, 0, 0], kernel[1, 0, 1, 1], kernel[0, 0, 1, 2] = 4.0, -2.0, 1.0
    np.testing.assert_allclose(singular_values(kernel), [1.0, 0.5, 0.25])
    assert singular_values(np.zeros((1, 1, 2, 2))).tolist() == [0.0, 0.0]


def test_what_the_penalty_keeps_of_the_priors_gradient() -> None:
    """At a unit filter w the gradient of ||w - a||^2 is -2 (a - <w, a> w)."""
    kernel = np.array([1.0, 0.0, 0.0]).reshape(3, 1, 1, 1)
    prior = ktg.Prior((jnp.array([0.0, 0.6, 0.8]).reshape(3, 1, 1, 1),), PATHS[:1])
    (gradient,) = prior_gradients([kernel], prior)
    np.testing.assert_allclose(gradient.ravel(), [0.0, -1.2, -1.6], atol=1e-6)
    assert share_kept(gradient, 0.0) == 1.0
    assert share_kept(gradient, 1.0) == 0.0
    assert share_kept(gradient, 2 / 3) == pytest.approx(0.4**2 / 4, rel=1e-4)
    assert share_kept(prior_gradients(list(prior.kernels), prior)[0], 0.5) is None


# --- interrupted


def test_a_stopped_fit_begins_anew_and_ends_alike(
    whole: tuple[Path, str], teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, on_step: Any, **kwargs: Any) -> None:
        def stopping(step: int, numbers: Any) -> None:
            on_step(step, numbers)
            if step == 3:
                raise KeyboardInterrupt

        fit_readers(*args, on_step=stopping, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(aggregation, "fit_readers", stop)
        with pytest.raises(KeyboardInterrupt):
            represent(tmp_path / "run", teacher=str(teacher))
    assert not (tmp_path / "run" / "prior" / "prior.safetensors").exists()
    assert "fitted in 12 steps" in represent(tmp_path / "run", teacher=str(teacher))
    ours, theirs = (load_prior(path / "prior") for path in (tmp_path / "run", whole[0]))
    for a, b in zip(ours.kernels, theirs.kernels, strict=True):
        np.testing.assert_array_equal(a, b)
    assert_same_end(tmp_path / "run", whole[0])


def test_a_killed_command_goes_on_where_it_was(
    whole: tuple[Path, str], teacher: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    config = small(folder, teacher=str(teacher))
    process = start(
        "experiments.represent", *options(config), cwd=tmp_path, cache=tmp_path / "cache"
    )
    until = time.monotonic() + 280
    while not (folder / "checkpoints" / "1").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert end_of(process).code == -signal.SIGKILL
    assert not (folder / "result.json").exists()
    fitted = (folder / "prior" / "prior.safetensors").stat().st_mtime_ns
    said = represent(folder, teacher=str(teacher))
    assert "Resuming after epoch" in said
    assert "fitted in" not in said
    assert (folder / "prior" / "prior.safetensors").stat().st_mtime_ns == fitted
    assert (folder / "stages" / "stage1-after.png").is_file()
    assert_same_end(folder, whole[0])


def test_to_start_over_keeps_the_former_run(
    whole: tuple[Path, str], teacher: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole[0] / "prior", folder / "prior")  # as if the fit alone had been done
    said = represent(folder, teacher=str(teacher), resume=False, epochs=1)
    assert f"The former run is kept in {folder}.old1." in said
    assert (tmp_path / "run.old1" / "prior" / "prior.safetensors").is_file()
    assert (folder / "prior" / "prior.safetensors").is_file()
    assert len(metrics(folder)) == 1


# --- bad input

BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"teacher": "gone"}, "teacher", "got 'gone'; allowed: the folder of a run"),
    ({"teacher": "gone:cnn-0"}, "teacher", "got 'gone:cnn-0'; allowed: the folder of"),
    ({"teacher": "{teacher}:x"}, "teacher", "allowed: one of the run's nodes: staged_wide-0, st"),
    ({"teacher": "{teacher}", "teacher_model": "cnn"}, "teacher_model", "got 'cnn'; allowed: no"),
    ({"teacher_model": "cnn"}, "teacher's model", "got 'cnn'; allowed: one with 2 stages"),
    ({"teacher_model": "cnn", "aggregation": "svd"}, "teacher's model", "got 'cnn'; allowed: one"),
    ({"teacher_model": "tiny"}, "stages", "allowed: a module with submodules stage1_"),
    ({"student": "tiny"}, "student", "got 'tiny'; allowed: a model with convolutions in stage1_"),
    ({"student": "no"}, "student", "got 'no'; allowed: cnn"),
    ({"teacher_model": "no"}, "teacher_model", "got 'no'; allowed: cnn"),
    ({"student": "resnet999999998"}, "student", "got 'resnet999999998'; allowed: cnn"),
    ({"prior_weight": 1e300}, "prior_weight", "got 1e+300; allowed: at most 1e+30"),
    ({"fit_steps": 10**30}, "fit_steps", "allowed: at most 2,147,483,647"),
    ({"fit_learning_rate": 1e300}, "fit_learning_rate", "got 1e+300; allowed: at most 1e+30"),
    ({"epochs": 2**31 - 1}, "epochs", "got 2147483647; allowed: at most "),
    ({"student_layers": ("stem.kernel",)}, "student_layers", "got 'stem.kernel'; allowed: a conv"),
    ({"prior_quantile": 1.5}, "prior_quantile", "got 1.5; allowed: a number from 0 to 1"),
    ({"prior_quantile": -0.1}, "prior_quantile", "got -0.1; allowed: a number from 0 to 1"),
    ({"prior_weight": -1.0}, "prior_weight", "got -1.0; allowed: a finite number"),
    ({"fit_steps": 0}, "fit_steps", "got 0; allowed: at least 1"),
    ({"fit_learning_rate": 0.0}, "fit_learning_rate", "got 0.0; allowed: a finite number"),
    ({"fit_weight_decay": -1.0}, "fit_weight_decay", "got -1.0; allowed: a finite number"),
    ({"batch_size": 500}, "batch_size", "got 500; allowed: "),
    ({"prior": "gone"}, "prior", "got 'gone'; allowed: a whole .safetensors file"),
    ({"prior": "gone", "student_layers": ("a",)}, "student_layers", "allowed: nothing, for a pri"),
    ({"prior": "{prior}", "student": "cnn"}, "prior", "a prior fitted for this student (student"),
    ({"prior": "{prior}", "data": "npz:{other}"}, "prior", "this student (num_classes: 10, now 4"),
]


def npz(path: Path, size: int, classes: int) -> str:
    images = np.random.default_rng(0).integers(0, 256, (80, size, size, 1), np.uint8)
    np.savez(path, images=images, labels=np.arange(80) % classes)
    return str(path)


@pytest.mark.parametrize(("changes", "field", "message"), BAD, ids=lambda x: str(x)[:50])
def test_bad_input_is_one_line_and_leaves_nothing(
    changes: dict[str, Any],
    field: str,
    message: str,
    whole: tuple[Path, str],
    teacher: Path,
    tmp_path: Path,
) -> None:
    paths = {"teacher": teacher, "prior": whole[0] / "prior", "other": tmp_path / "other.npz"}
    npz(paths["other"], 8, 4)
    given = {k: v.format(**paths) if isinstance(v, str) else v for k, v in changes.items()}
    if not given.keys() & {"teacher", "teacher_model", "prior"}:
        given["teacher"] = str(teacher)
    if "data" in given:
        given["train_limit"] = None
    config = small(tmp_path / "run", **given)
    ended = in_process(command.main, *options(config))
    assert ended.code == 2, ended
    assert ended.err.startswith(f"error: {field}: got ")
    assert message in ended.err
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert "trained first" not in ended.out


def test_a_teacher_of_other_data_is_refused(tmp_path: Path) -> None:
    """The name is compared, and where a file's content changed, classes and shape."""
    path, run = tmp_path / "data.npz", tmp_path / "teacher"
    name = f"npz:{npz(path, 8, 4)}"
    train(run, data=name, train_limit=None, models=("staged_wide",), epochs=1)
    for data, size, classes, message in (
        ("digits", 8, 4, f"(data: digits, not {name})"),
        (name, 8, 5, "(classes: 5, not 4)"),
        (name, 6, 4, "(image_shape: [6, 6, 1], not [8, 8, 1])"),
    ):
        npz(path, size, classes)
        config = small(tmp_path / "run", teacher=str(run), data=data, train_limit=None)
        ended = in_process(command.main, *options(config))
        assert ended.code == 2
        assert ended.err.startswith(f"error: teacher: got '{run}'; allowed: a run on the student's")
        assert message in ended.err
        assert ended.err.count("\n") == 1
        assert not (tmp_path / "run").exists()


def test_a_folder_of_another_prior_or_student_is_refused(
    whole: tuple[Path, str], teacher: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole[0] / "prior", tmp_path / "run" / "prior")
    for folder, changes, differing in (
        (tmp_path / "run", {"student": "staged_wide"}, "student: 'staged', now 'staged_wide'"),
        (tmp_path / "run", {"fit_steps": 3}, "fit_steps: 12, now 3"),
        (whole[0], {"epochs": 3}, "epochs: 2, now 3"),
    ):
        config = small(folder, teacher=str(teacher), **changes)
        ended = in_process(command.main, *options(config))
        assert ended.code == 2
        assert f"a folder without another run (differing: {differing}" in ended.err
        assert ended.err.count("\n") == 1


def test_help_has_examples() -> None:
    ended = in_process(command.main, "--help")
    assert ended.code == 0
    for words in ("Examples:", "--prior-quantile", "--fit-weight-decay", "--aggregation"):
        assert words in ended.out
