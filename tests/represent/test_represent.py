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
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from PIL import Image
from rich.console import Console
from runs import (
    assert_same_end,
    compiled_once,
    end_of,
    in_process,
    metrics,
    options,
    result,
    start,
    train,
)

import ktg_jax as ktg
from experiments.represent import aggregation
from experiments.represent import command as command
from experiments.represent.account import Account
from experiments.represent.config import RepresentConfig
from experiments.represent.folder import StudentFolder
from experiments.represent.measures import prior_gradients, share_kept, singular_values
from ktg_jax.errors import InputError
from ktg_jax.inputs import Input
from ktg_jax.io.trees import flatten
from ktg_jax.models.weights import save_node
from ktg_jax.priors import about_prior, load_prior, select_channels, select_start
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
    assert prior.start is not None
    assert "classifier.kernel" in prior.start[0]
    assert (about["student"], about["teacher"]) == ("staged", str(teacher))
    assert (about["data"], about["aggregation"]) == ("digits", "regression")
    assert (about["fit_steps"], about["input"]) == ("12", "null")
    (node,) = ktg.Graph.load(folder / "graph.json").nodes
    assert node.prior == str(folder / "prior")
    assert (node.name, node.model, node.prior_quantile) == ("student", "staged", 0.7)
    assert json.loads((folder / "config.json").read_text())["config"]["learning_rate"] == 0.02
    distances = [record["nodes"][0]["prior_distance"] for record in metrics(folder)]
    assert np.shape(distances) == (2, 2)
    assert json.loads((folder / "result.json").read_text())["epochs"] == 2
    left = json.loads(about["stages"])
    assert len(left) == len(json.loads(about["whole"])) == 2
    for path, share, first, last in zip(PATHS, left, *distances, strict=True):
        (line,) = (line.split() for line in said.splitlines() if f" {path} " in line)
        assert line[2:5] == [f"{share:.3f}", f"{first:.3f}", f"{last:.3f}"]


def test_the_same_student_is_trained_alone_for_as_many_steps(whole: tuple[Path, str]) -> None:
    folder, said = whole
    own, alone = result(folder), result(folder / "alone")
    assert (own["fit_steps"], own["steps"]) == (12, 10)
    assert own["alone"] == {
        "val_accuracy": alone["target"]["val_accuracy"],
        "test_accuracy": alone["target"]["test_accuracy"],
        "epochs": 5,  # of 5 steps each: the fit's 12 are three epochs
        "steps": 25,
    }
    (node,) = ktg.Graph.load(folder / "alone" / "graph.json").nodes
    assert (node.name, node.model, node.prior) == ("student", "staged", None)
    config = json.loads((folder / "alone" / "config.json").read_text())["config"]
    assert config["learning_rate"] == 0.1
    lines = [line.split() for line in said.splitlines()[-2:]]
    numbers = (
        f"{100 * own['target']['test_accuracy']:.2f}",
        f"{100 * own['alone']['test_accuracy']:.2f}",
    )
    assert [line[-2] for line in lines] == list(numbers)
    assert " 12 + 10 " in said.splitlines()[-2]
    with Image.open(folder / "beside-alone.png") as picture:
        assert np.ptp(np.asarray(picture.convert("L"))) > 200


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
        assert re.search(
            r"/12, left of the stages \d\.\d\d \d\.\d\d; time left \d:\d\d:\d\d$", line
        )
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
    assert said.splitlines()[-3:] == whole[1].splitlines()[-3:]  # the student and it alone
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert after == before


def test_a_node_is_the_teacher_where_it_is_named(teacher: Path, tmp_path: Path) -> None:
    source = f"{teacher}:staged_wide-1"
    said = represent(tmp_path / "run", teacher=source, aggregation="select", epochs=1)
    assert "a part of it (select)" in said
    found = load_prior(tmp_path / "run" / "prior")
    assert about_prior(tmp_path / "run" / "prior")["fit_steps"] == "0"
    images = jnp.zeros((1, 8, 8, 1))
    own = ktg.build_model("staged", 10).init(jax.random.key(0), images)
    channels = select_channels((1, 8, 12), (1, 4, 6))
    weights = load_weights(source)
    theirs = (nested(weights.params), nested(weights.model_state))
    expected = select_start(theirs, own, channels, (1, 8, 12))
    assert found.start is not None
    chex.assert_trees_all_equal(found.start, tuple(map(flatten, expected)))
    assert result(tmp_path / "run")["alone"]["epochs"] == 1


def nested(flat: Any) -> Any:
    return unflatten_dict({tuple(name.split(".")): array for name, array in flat.items()})


def test_a_teacher_from_a_file_is_seen_with_its_input_and_so_is_the_student(
    tmp_path: Path,
) -> None:
    fns = ktg.build_model("staged_wide", 10)
    variables = fns.init(jax.random.key(1), jnp.zeros((1, 8, 8, 1)))
    file, seen = tmp_path / "teacher.safetensors", Input((0.5,), (0.25,))
    about: dict[str, Any] = {"num_classes": 10, "image_shape": (8, 8, 1)}
    save_node(file, *variables, model="staged_wide", input=seen, **about)
    represent(tmp_path / "run", teacher=str(file), epochs=1, alone=False)
    prior = about_prior(tmp_path / "run" / "prior")
    assert json.loads(prior["input"]) == {"mean": [0.5], "std": [0.25]}
    (node,) = ktg.Graph.load(tmp_path / "run" / "graph.json").nodes
    assert node.input == seen
    assert "alone" not in result(tmp_path / "run")
    # The prior says it to who takes it from here, too.
    given = str(tmp_path / "run" / "prior")
    represent(tmp_path / "other", prior=given, epochs=1)
    for folder in (tmp_path / "other", tmp_path / "other" / "alone"):
        (node,) = ktg.Graph.load(folder / "graph.json").nodes
        assert node.input == seen
    assert result(tmp_path / "other")["fit_steps"] == 12


@pytest.mark.parametrize("option", [{"aggregation": "recast"}, {"fit_start": "random"}])
def test_other_ways_to_fit(teacher: Path, tmp_path: Path, option: dict[str, str]) -> None:
    said = represent(tmp_path / "run", teacher=str(teacher), epochs=1, alone=False, **option)
    what = "cross-entropy" if "aggregation" in option else "left of the stages"
    assert f"/12, {what} " in said
    assert load_prior(tmp_path / "run" / "prior").start is not None


def test_without_a_teacher_one_is_trained_and_kept(tmp_path: Path) -> None:
    said = represent(tmp_path / "a", epochs=1, aggregation="select")
    assert "staged_wide, is trained first" in said
    again = represent(tmp_path / "b", epochs=1, aggregation="select", prior_weight=0.0)
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


def test_it_is_said_where_the_teacher_saw_other_images_or_is_not_done(
    whole: tuple[Path, str], teacher: Path, tmp_path: Path
) -> None:
    texts = "The teacher was trained on other images", "The teacher's training is not finished"
    assert not any(text in whole[1] for text in texts)
    unfinished = tmp_path / "teacher"
    shutil.copytree(teacher, unfinished)
    (unfinished / "result.json").unlink()
    said = represent(
        tmp_path / "run", teacher=str(unfinished), split_seed=1, epochs=1, aggregation="select"
    )
    assert all(text in said for text in texts)


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


def test_a_stopped_fit_goes_on_and_ends_alike(
    whole: tuple[Path, str], teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, on_step: Any, **kwargs: Any) -> None:
        def stopping(state: Any, metrics: Any) -> None:
            on_step(state, metrics)
            if state.step == 9:
                raise KeyboardInterrupt

        ktg.priors.regress_stages(*args, on_step=stopping, **kwargs)

    monkeypatch.setattr(aggregation, "CHECKED_EVERY", 4)
    prior = tmp_path / "run" / "prior"
    with monkeypatch.context() as patch:
        patch.setattr(ktg, "regress_stages", stop)
        with pytest.raises(KeyboardInterrupt):
            represent(tmp_path / "run", teacher=str(teacher))
    assert sorted(path.name for path in prior.glob("*.safetensors")) == ["fit.safetensors"]
    said = represent(tmp_path / "run", teacher=str(teacher))
    assert "Going on with the fit after step 8 of 12." in said
    assert sorted(path.name for path in prior.glob("*.safetensors")) == ["prior.safetensors"]
    ours, theirs = load_prior(prior), load_prior(whole[0] / "prior")
    chex.assert_trees_all_equal(ours, theirs)
    assert about_prior(prior) == about_prior(whole[0] / "prior")
    assert_same_end(tmp_path / "run", whole[0])


def test_a_folder_in_which_the_student_alone_is_trained_is_not_set_aside(
    whole: tuple[Path, str], tmp_path: Path
) -> None:
    shutil.copytree(whole[0], tmp_path / "run")
    folder = StudentFolder(tmp_path / "run")
    for within in (folder.prior, folder.alone):
        with within.locked(), pytest.raises(InputError, match=r"no other process trains$"):
            folder.set_aside()
    assert folder.result == StudentFolder(whole[0]).result
    assert folder.set_aside() == tmp_path / "run.old1"


def test_a_damaged_fit_begins_anew(whole: tuple[Path, str], teacher: Path, tmp_path: Path) -> None:
    prior = tmp_path / "run" / "prior"
    shutil.copytree(whole[0] / "prior", prior)
    (prior / "prior.safetensors").unlink()
    (prior / "fit.safetensors").write_bytes(b"half")
    said = represent(tmp_path / "run", teacher=str(teacher), epochs=1, alone=False)
    assert "Going on" not in said
    assert "fitting the prior: step 1/12" in said
    assert not (prior / "fit.safetensors").exists()


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
    ({"teacher": "{teacher}", "teacher_input": "half"}, "teacher_input", "got 'half'; allowed: no"),
    ({"teacher": "{other}"}, "teacher", "allowed: a .safetensors file"),
    (
        {"teacher_input": "half", "teacher_model": "cnn"},
        "teacher_input",
        "got 'half'; allowed: nothing, for a teacher th",
    ),
    ({"teacher_model": "cnn"}, "student", "got '2 stages'; allowed: the teacher's 3 stages"),
    (
        {"teacher_model": "resnet8", "student": "shufflenet_v2"},
        "student stage 1",
        "got (4, 4); allowed: the teacher's size, (8, 8)",
    ),
    (
        {"teacher_model": "staged", "student": "staged_wide", "aggregation": "select"},
        "student",
        "got 'staged_wide'; allowed: a student of the family of staged, no wider or deeper",
    ),
    ({"teacher_model": "tiny"}, "stages", "allowed: a module with submodules stage1_"),
    ({"student": "tiny"}, "stages", "got 'Tiny'; allowed: a module with submodules stage1_"),
    ({"student": "no"}, "student", "got 'no'; allowed: cnn"),
    ({"teacher_model": "no"}, "teacher_model", "got 'no'; allowed: cnn"),
    ({"student": "resnet999999998"}, "student", "got 'resnet999999998'; allowed: cnn"),
    ({"prior_weight": 1e300}, "prior_weight", "got 1e+300; allowed: at most 1e+30"),
    ({"fit_steps": 10**30}, "fit_steps", "allowed: at most 2,147,483,647"),
    ({"fit_learning_rate": 1e300}, "fit_learning_rate", "got 1e+300; allowed: at most 1e+30"),
    ({"student_learning_rate": 0.0}, "student_learning_rate", "got 0.0; allowed: a finite numbe"),
    ({"epochs": 2**31 - 1}, "epochs", "got 2147483647; allowed: at most "),
    ({"prior_quantile": 1.5}, "prior_quantile", "got 1.5; allowed: a number from 0 to 1"),
    ({"prior_quantile": -0.1}, "prior_quantile", "got -0.1; allowed: a number from 0 to 1"),
    ({"prior_weight": -1.0}, "prior_weight", "got -1.0; allowed: a finite number"),
    ({"fit_steps": 0}, "fit_steps", "got 0; allowed: at least 1"),
    ({"fit_learning_rate": 0.0}, "fit_learning_rate", "got 0.0; allowed: a finite number"),
    ({"batch_size": 500}, "batch_size", "got 500; allowed: "),
    ({"prior": "gone"}, "prior", "got 'gone'; allowed: a whole .safetensors file"),
    ({"prior": "{prior}", "teacher_input": "half"}, "teacher_input", "allowed: nothing, for a pri"),
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
    for words in ("Examples:", "--prior-quantile", "--fit-inputs", "--aggregation"):
        assert words in ended.out
