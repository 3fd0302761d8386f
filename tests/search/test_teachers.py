"""Teachers of a search: found in files and folders, merged, and refused where they do not fit."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models  # noqa: F401  (registers its models)
from runs import in_process, options
from searches import small_search

import experiments.search.command
import ktg_jax as ktg
from experiments.runs.assemble import load
from experiments.search.baselines import baselines, check_baselines
from experiments.search.folder import load_search
from experiments.search.teachers import check_teachers, with_teachers
from ktg_jax import InputError
from ktg_jax.models.recognise import model_of_state_dict
from ktg_jax.recording import Header, RecordingWriter

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def saved(path: Path, model: str, classes: int = 10, seed: int = 0) -> str:
    """A file of a network with random weights."""
    network = ktg.build_model(model, classes).init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)))
    shape = (8, 8, 1)
    ktg.save_node(path, *network, model=model, num_classes=classes, image_shape=shape)
    return str(path)


def exported(path: Path, model: str, layout: str = "akamaster") -> str:
    """A state dict of PyTorch."""
    network = ktg.build_model(model, 10).init(jax.random.key(1), jnp.zeros((1, 32, 32, 3)))
    ktg.save_state_dict(path, *network, model, layout)
    return str(path)


def record(folder: Path) -> None:
    """A recording of two steps of four images."""
    with RecordingWriter(folder, Header("batches", {"batch_size": 4}, 2, 10)) as writer:
        for _ in range(2):
            writer.add(np.zeros((4, 10), np.float32))


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("resnet20", "akamaster"),
        ("resnet14_32", "akamaster"),
        ("resnet8x4", "repdistiller"),
        ("wrn10_2", "wrn"),
        ("vgg8", "ktg"),
    ],
)
def test_the_model_of_a_state_dict_is_recognised(model: str, layout: str, tmp_path: Path) -> None:
    path = exported(tmp_path / "a.safetensors", model, layout)
    assert model_of_state_dict(path) == model
    from safetensors.numpy import load_file, save_file

    save_file(load_file(path), tmp_path / "plain.safetensors")  # without what our file says
    if layout != "repdistiller":  # whose keys do not tell its layout
        assert model_of_state_dict(tmp_path / "plain.safetensors") == model


def test_a_state_dict_of_no_network_of_ours_names_what_was_tried(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(
        {"layer1.0.conv1.weight": np.zeros((7, 3, 3, 3), np.float32)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(InputError, match=r"model: got None; .* none of resnet8, resnet8x4, "):
        model_of_state_dict(tmp_path / "a.safetensors")


def nodes_of(*teachers: str, **more: Any) -> tuple[list[dict[str, Any]], list[str]]:
    config, said = with_teachers(small_search(teachers=teachers, **more))
    return [json.loads(text) for text in config.teachers], said


def test_teachers_are_nodes_by_the_names_of_their_files(tmp_path: Path) -> None:
    own, foreign = saved(tmp_path / "tiny.safetensors", "tiny"), tmp_path / "r8.pytorch.safetensors"
    given = '{"model": "tiny", "name": "third", "weights": "x.safetensors"}'
    found, said = nodes_of(own, exported(foreign, "resnet8"), teacher_inputs=("none", "imagenet"))
    # A candidate is called tiny.
    assert [(n["name"], n["model"]) for n in found] == [("tiny-teacher", "tiny"), ("r8", "resnet8")]
    assert found[1]["input"] == "imagenet"
    assert "input" not in found[0]
    assert said[1] == f"Teacher r8 is a resnet8 ({foreign})."
    with pytest.raises(InputError, match=r"teachers\[0\].*x.safetensors"):
        nodes_of(given)
    nameless = json.dumps({"model": "tiny", "weights": own})
    assert [n["name"] for n in nodes_of(nameless, candidates=("cnn",))[0]] == ["tiny"]
    with pytest.raises(InputError, match=r"teachers\[0\]: model: got 'tiny'; allowed: none: "):
        nodes_of(nameless, teacher_models=("tiny",))


def test_the_same_network_twice_is_said_and_merged(tmp_path: Path) -> None:
    first = saved(tmp_path / "a.safetensors", "tiny")
    second = saved(tmp_path / "b.safetensors", "tiny")
    found, said = nodes_of(first, second)
    assert [node["name"] for node in found] == ["a"]
    assert f"Teacher {second} is the network of {first}: they are one." in said
    # Seen through other eyes it is another network.
    found, _ = nodes_of(first, second, teacher_inputs=("none", '{"mean": [0.5], "std": [0.5]}'))
    assert [node["name"] for node in found] == ["a", "b"]


def test_a_recording_is_a_teacher(tmp_path: Path) -> None:
    record(tmp_path / "rec")
    found, _ = nodes_of(str(tmp_path / "rec"))
    assert found == [{"name": "rec", "outputs": str(tmp_path / "rec")}]


def check(teacher: str, **more: Any) -> None:
    config, _ = with_teachers(small_search(teachers=(teacher,), **more))
    check_teachers(
        config.training(), config.space(), load(config, with_test=False), config.retrain_top > 0
    )


def test_teachers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    check(saved(tmp_path / "fits.safetensors", "tiny"))
    with pytest.raises(InputError, match=r"teachers\[0\].*(classes|shape|kernel)"):
        check(saved(tmp_path / "a.safetensors", "tiny", classes=7))
    rgb = '{"mean": [0.5, 0.5, 0.5], "std": [1, 1, 1]}'
    with pytest.raises(InputError, match=r"teachers\[0\].input"):
        check(saved(tmp_path / "b.safetensors", "tiny"), teacher_inputs=(rgb,))


def test_a_recording_of_other_batches_is_refused(tmp_path: Path) -> None:
    record(tmp_path / "rec")
    with pytest.raises(InputError, match=r"teachers\[0\]: .*\(or --retrain-top 0\)"):
        check(str(tmp_path / "rec"))
    with pytest.raises(InputError, match=r"teachers\[0\].outputs"):
        check(str(tmp_path / "rec"), retrain_top=0)


def test_distillation_from_each_set_of_teachers_is_a_baseline(tmp_path: Path) -> None:
    teacher = saved(tmp_path / "big.safetensors", "tiny")
    config, _ = with_teachers(small_search(teachers=(teacher,), nodes=3, temperatures=(1.0, 4.0)))
    names = list(baselines(config.space()))
    assert names[:4] == ["independent", "control", "mutual, T 1", "mutual, T 4"]
    # tiny and big, alone and in pairs, at two temperatures, with three gates of the label.
    assert len(names) == 4 + (2 + 3) * 2 * 3
    assert "distillation tiny+big, T 4, label linear" in names
    graphs = [config.space().graph(p) for p in baselines(config.space()).values()]
    assert len({graph.canonical() for graph in graphs}) == len(graphs)
    pair = config.space().graph(baselines(config.space())["distillation big+big, T 4, label cut"])
    (twice,) = (edge for edge in pair.canonical().edges[0] if edge.carries)
    assert (twice.gate, twice.weight, pair.canonical().temperature) == ("through", 2.0, 4.0)


def test_only_what_nobody_designed_is_searched() -> None:
    alone = small_search(nodes=1, gates=("through", "linear", "correct"), baselines=True)
    with pytest.raises(InputError, match=r"gates: .* than the 2 designed ones"):
        check_baselines(alone, alone.space())
    check_baselines(small_search(nodes=1, gates=("through", "linear")), alone.space())


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_a_search_with_teachers_to_its_end(tmp_path: Path) -> None:
    teacher = saved(tmp_path / "big.safetensors", "staged")
    config = small_search(
        tmp_path / "search", teachers=(teacher,), nodes=3, trials=30, sampler="effects",
        draw="roles", pruner="none", baselines=True, race=2, trial_seeds=2,
    )  # fmt: skip
    end = in_process(experiments.search.command.main, *options(config))
    assert end.code == 0, end.err
    assert "Teacher big is a staged" in end.out
    assert "Race: 2 graphs with 3 seeds each" in end.out
    study = load_search(tmp_path / "search")
    assert study.space.teachers[0].weights == teacher
    results = study.results
    assert results is not None
    used = {trial.seed for trial in study.trials if trial.seed is not None}
    assert min(results["seeds"]) > max(used)
    kinds = {entry["kind"] for entry in results["entries"]}
    assert {"found", "independent", "control"} <= kinds
    assert study.best(1)[0].seeds >= 3
    best = ktg.Graph.load(tmp_path / "search" / "best.json")
    assert best.edges == study.best(1)[0].graph.pruned().edges
    # Another network in the same place: it is another search.
    saved(tmp_path / "big.safetensors", "staged", seed=3)
    end = in_process(experiments.search.command.main, *options(config))
    assert end.code == 2
    assert "weights_facts.big" in end.err
