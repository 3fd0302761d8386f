"""Networks from PyTorch: the same logits by every layout, and what does not fit is named."""

import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_variables import random_variables

from ktg_jax import InputError, build_model, load_state_dict, save_state_dict, state_dict_layout
from ktg_jax.data.sources import load_dataset
from ktg_jax.inputs import NAMED
from ktg_jax.io.tensors import read_tensors, write_tensors
from ktg_jax.io.trees import flatten
from ktg_jax.models.input import with_input
from ktg_jax.models.layouts import LAYOUTS, channel_orders

IMAGES = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
RESNET8 = (1, 1, 1), (16, 32, 64)


def logits_of(network: tuple[Any, Any], model: str, train: bool = False) -> np.ndarray:
    fns = build_model(model, 7)
    apply = jax.jit(lambda images: fns.apply(*network, images, train)[0])
    return np.asarray(apply(jnp.asarray(IMAGES)))


def written(path: Path, model: str = "resnet8", layout: str = "pytorch") -> tuple[Any, Any]:
    """A network of ours in a file."""
    network = random_variables(build_model(model, 7), IMAGES[:1], seed=1)
    save_state_dict(path, *network, model, layout)
    return network


def assert_same(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    ours, theirs = flatten(found), flatten(expected)
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, theirs[path], err_msg=path)


# --- theirs


def theirs(name: str) -> tuple[Any, str, str]:
    """A network of others, the name of ours, and that of the layout."""
    networks = pytest.importorskip("torch_networks")
    if name == "akamaster":
        made = networks.ResNet(*RESNET8, classifier="linear", shortcut="padded")
        return made, "resnet8", "akamaster"
    if name == "padded and fc":
        return networks.ResNet(*RESNET8, shortcut="padded"), "resnet8", "repdistiller"
    if name == "deeper":
        blocks = (2, 2, 2)
        made = networks.ResNet(blocks, RESNET8[1], classifier="linear", shortcut="padded")
        return made, "resnet14", "akamaster"
    if name == "pytorch-cifar-models":
        return networks.ResNet(*RESNET8), "resnet8x1", "repdistiller"
    if name == "repdistiller":
        made = networks.ResNet((1, 1, 1), (64, 128, 256), stem=32)
        return made, "resnet8x4", "repdistiller"
    if name == "kuangliu":
        how: dict[str, Any] = {"stem": 64, "classifier": "linear", "shortcut": "shortcut"}
        made = networks.ResNet((2, 2, 2, 2), (64, 128, 256, 512), **how)
        return made, "resnet18", "akamaster"
    if name == "bottleneck":
        made = networks.ResNet((3, 4, 6, 3), (256, 512, 1024, 2048), stem=64, bottleneck=True)
        return made, "resnet50", "repdistiller"
    from benchmarks.torch_baseline import Network

    renamed = {"ktg": "resnet14", "wrn": "wrn10_2"}[name]
    return Network(renamed, 7), renamed, name


def state_of(network: Any, layout: str) -> dict[str, Any]:
    """The state dict by the layout's keys; the baseline's are named as ours are."""
    state = network.state_dict()
    if layout not in ("ktg", "wrn"):
        return dict(state)
    leaves = {"weight": None, "bias": "bias", "running_mean": "mean", "running_var": "var"}
    named = {}
    for key, tensor in state.items():
        part, _, leaf = key.rpartition(".")
        ours = leaves.get(leaf, leaf) or ("scale" if "norm" in part else "kernel")
        if leaf != "num_batches_tracked":
            named[str(LAYOUTS[layout].key(f"{part}.{ours}"))] = tensor
    return named


FAST = ("akamaster", "padded and fc", "deeper", "pytorch-cifar-models", "ktg", "wrn")
SLOW = ("repdistiller", "kuangliu", "bottleneck")


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_the_same_weights_give_the_same_logits(name: str, tmp_path: Path) -> None:
    network, model, layout = theirs(name)
    support = pytest.importorskip("torch_networks")
    support.randomised(network)
    file = support.save(state_of(network, layout), tmp_path / "theirs.safetensors")
    if name == "padded and fc":  # as one that pads behind is called
        with pytest.raises(InputError, match=r"layout: got 'auto'; allowed: repdistiller .* or"):
            load_state_dict(file, model)
        found = load_state_dict(file, model, layout)
    else:
        assert state_dict_layout(file, model) == layout
        found = load_state_dict(file, model)
    with support.torch.no_grad():
        images = support.torch.tensor(IMAGES).permute(0, 3, 1, 2)
        stored = network.eval()(images).numpy()
        normalised = network.train()(images).numpy()
    scale = np.abs(stored).max()
    np.testing.assert_allclose(logits_of(found, model) / scale, stored / scale, atol=1e-4)
    scale = np.abs(normalised).max()
    found_in_training = logits_of(found, model, train=True)
    np.testing.assert_allclose(found_in_training / scale, normalised / scale, atol=1e-3)


def test_a_wrappers_prefix_and_what_is_only_counted_do_not_matter(tmp_path: Path) -> None:
    expected = written(tmp_path / "plain.safetensors", layout="akamaster")
    tensors, _ = read_tensors(tmp_path / "plain.safetensors", "weights")
    for prefix in ("module.", "_orig_mod.module."):
        wrapped = {f"{prefix}{key}": array for key, array in tensors.items()}
        wrapped[f"{prefix}bn1.num_batches_tracked"] = np.array(7)
        file = tmp_path / "wrapped.safetensors"
        write_tensors(file, "weights", wrapped, {})
        assert_same(load_state_dict(file, "resnet8"), expected)


def test_the_order_of_channels_is_that_of_the_padding() -> None:
    """By hand: 16 channels, then 8 zeros on either side of them, then 16."""
    first, second, third = channel_orders((16, 32, 64))
    assert first.tolist() == list(range(16))
    assert second.tolist() == [*range(8, 24), *range(8), *range(24, 32)]
    assert third.tolist() == [*(16 + second), *range(16), *range(48, 64)]


# --- ours


@pytest.mark.parametrize("model", ["resnet8", "resnet14_8", "resnet8x1", "wrn10_2", "resnet18"])
def test_what_is_written_comes_back_bit_for_bit(model: str, tmp_path: Path) -> None:
    layouts = {"wrn10_2": ["pytorch", "wrn"], "resnet8": ["pytorch", "akamaster", "ktg"]}
    for layout in layouts.get(model, ["pytorch", "akamaster", "repdistiller"]):
        file = tmp_path / f"{layout}.safetensors"
        expected = written(file, model, layout)
        assert_same(load_state_dict(file, model), expected)
        assert_same(load_state_dict(file, model, layout), expected)
        assert state_dict_layout(file, model) == layout


def test_a_layout_that_is_given_takes_the_channels_as_it_says(tmp_path: Path) -> None:
    file = tmp_path / "node.safetensors"
    expected = written(file, layout="pytorch")
    other = load_state_dict(file, "resnet8", "repdistiller")
    assert not np.array_equal(other[0]["classifier"]["kernel"], expected[0]["classifier"]["kernel"])


def test_names_of_ones_own_say_what_no_layout_does(tmp_path: Path) -> None:
    network = random_variables(build_model("cnn", 7), IMAGES[:1], seed=1)
    arrays = flatten(network[0]) | {
        path.removeprefix("batch_stats."): array for path, array in flatten(network[1]).items()
    }
    names = {f"net.{i}": path for i, path in enumerate(arrays)}
    tensors = {
        key: np.ascontiguousarray(
            np.moveaxis(arrays[path], (-1, -2), (0, 1)) if arrays[path].ndim > 1 else arrays[path]
        )
        for key, path in names.items()
    }
    file = tmp_path / "mine.safetensors"
    write_tensors(file, "weights", tensors, {})
    how: dict[str, Any] = {"num_classes": 7, "image_shape": (16, 16, 3)}
    assert_same(load_state_dict(file, "cnn", names=names, **how), network)
    bare = {key.removeprefix("net."): path for key, path in names.items()}
    assert_same(load_state_dict(file, "cnn", names=bare, **how), network)
    with pytest.raises(InputError, match=r"weights: .*a cnn in one of the layouts akamaster: "):
        load_state_dict(file, "cnn", **how)
    for wrong, message in (
        (names | {"net.0": "stem"}, r"names\['net.0'\]: got 'stem'; allowed: one of "),
        (names | {"net.0": names["net.1"]}, r"a path that 0 does not have"),
        (names | {"net.99": names["net.0"]}, r"names"),
        ({k: p for k, p in names.items() if k != "net.0"}, r"missing: nothing for .*left over: 0"),
    ):
        with pytest.raises(InputError, match=message):
            load_state_dict(file, "cnn", names=wrong, **how)


# --- bad input


@pytest.mark.parametrize("name", ["net.pth", "net.pt", "net.tar", "zip.safetensors"])
def test_a_pickle_is_refused_with_the_lines_that_convert_it(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    file = tmp_path / name
    torch.save({"state_dict": {"conv1.weight": torch.ones(2, 2).T}}, file)
    with pytest.raises(InputError) as caught:
        load_state_dict(file, "resnet8")
    assert "\n" not in str(caught.value)
    lines = caught.value.allowed.partition("to convert: ")[2].split("; ")
    assert len(lines) == 3
    if file.suffix != ".safetensors":
        exec("\n".join(lines))
        tensors, _ = read_tensors(file.with_suffix(".safetensors"), "weights")
        assert list(tensors) == ["conv1.weight"]


def change(file: Path, **changed: np.ndarray | None) -> None:
    tensors, texts = read_tensors(file, "weights")
    for key, array in changed.items():
        if array is None:
            del tensors[key]
        else:
            tensors[key] = array
    write_tensors(file, "weights", tensors, texts)


@pytest.mark.parametrize(
    ("model", "changed", "message"),
    [
        ("resnet14", {}, r"the parts of a resnet14 \(missing: (\S+ for \S+, ){9}\S+ for \S+ and"),
        ("resnet8x1", {}, r"missing: layer2.0.downsample.0.weight for stage2_block1.shortcut"),
        ("wrn10_2", {}, r"the parts of a wrn10_2 \(missing: layer1.0.downsample"),
        ("resnet8_8", {}, r"the shapes of a resnet8_8 \(fc.weight gives \[64, 7\], not \[32"),
        ("resnet8", {"fc.bias": None}, r"\(missing: fc.bias for classifier.bias\)"),
        ("resnet8", {"extra": np.ones(2, np.float32)}, r"\(left over: extra\)"),
        ("resnet8", {"fc.bias": np.ones(6, np.float32)}, r"fc.bias gives \[6\], not \[7\]"),
        ("resnet8", {"fc.bias": np.ones(7, np.int32)}, r"floats alone \(fc.bias is int32\)"),
        ("resnet8", {"bn1.bias": np.full(16, np.nan, np.float32)}, r"finite numbers alone \(bn1"),
        ("resnet8", {"bn1.bias": np.full(16, 1e300)}, r"finite numbers alone \(bn1"),
        ("resnet8", {"bn1.running_var": -np.ones(16, np.float32)}, r"at least 0 \(bn1.running_var"),
        ("resnet9", {}, r"model: got 'resnet9'"),
        ("cnn", {}, r"weights: .*missing: "),
    ],
)
def test_what_does_not_fit_is_named(
    model: str, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "node.safetensors"
    written(file)
    change(file, **changed)
    with pytest.raises(InputError, match=message) as caught:
        load_state_dict(file, model)
    assert "\n" not in str(caught.value)
    assert len(re.findall(r"layer\d", str(caught.value))) <= 12


def test_projections_that_are_left_over_are_explained(tmp_path: Path) -> None:
    file = tmp_path / "node.safetensors"
    written(file, "resnet8x1")
    with pytest.raises(InputError, match=r"its shortcuts are projections, as in resnet<6n"):
        load_state_dict(file, "resnet8")


def test_other_bad_input_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "node.safetensors"
    network = written(file)
    with pytest.raises(InputError, match=r"layout: got 'other'; allowed: akamaster, "):
        load_state_dict(file, "resnet8", "other")
    with pytest.raises(InputError, match=r"layout: .*names every part of a resnet8"):
        save_state_dict(file, *network, "resnet8", "wrn")
    with pytest.raises(InputError, match=r"export: .*ends in .safetensors"):
        save_state_dict(tmp_path / "node.pth", *network, "resnet8")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"weights: .*a whole .safetensors file"):
        load_state_dict(file, "resnet8")
    with pytest.raises(InputError, match=r"weights: .*a whole .safetensors file"):
        load_state_dict(tmp_path / "no.safetensors", "resnet8")


def test_a_number_of_classes_names_and_parts_are_what_they_say(tmp_path: Path) -> None:
    file = tmp_path / "node.safetensors"
    params, state = written(file)
    with pytest.raises(InputError, match="num_classes: got 0"):
        load_state_dict(file, "resnet8", num_classes=0)
    with pytest.raises(InputError, match=r"names: .*None beside the layout ktg"):
        load_state_dict(file, "resnet8", "ktg", names={"fc.bias": "classifier.bias"})
    with pytest.raises(InputError, match=r"params: got 'stage1_block2\S+ missing'"):
        save_state_dict(tmp_path / "a.safetensors", params, state, "resnet14")
    with pytest.raises(InputError, match=r"params: got 'final_norm.bias missing'"):
        save_state_dict(tmp_path / "a.safetensors", params, state, "wrn10_1")
    assert not (tmp_path / "a.safetensors").exists()


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    file = tmp_path / "node.safetensors"
    written(file)
    tensors, texts = read_tensors(file, "weights")
    halves = {key: array.astype(np.float16) for key, array in tensors.items()}
    write_tensors(file, "weights", halves, texts)
    params, _ = load_state_dict(file, "resnet8")
    expected = halves["fc.bias"].astype(np.float32)
    np.testing.assert_array_equal(params["classifier"]["bias"], expected)


# --- real teachers

DATA_DIR = os.environ.get("KTG_DATA_DIR")
needs_teachers = pytest.mark.skipif(
    DATA_DIR is None or not Path(DATA_DIR, "teachers").is_dir(), reason="needs: KTG_DATA_DIR"
)


def accuracy(model: str, number: int) -> float:
    file = Path(str(DATA_DIR), "teachers", f"{model}-cifar10.pytorch.safetensors")
    test = load_dataset("cifar10", DATA_DIR, train_limit=100).test
    assert test is not None
    fns = with_input(build_model(model, 10), NAMED["imagenet"])
    params, state = load_state_dict(file, model)
    apply = jax.jit(lambda images: fns.apply(params, state, images, False)[0])
    right = 0
    for start in range(0, number, 1000):
        images = jnp.asarray(test.images[start : start + 1000] / np.float32(255))
        right += np.sum(np.argmax(apply(images), 1) == test.labels[start : start + 1000])
    return float(right / number)


@needs_teachers
def test_a_real_teacher_is_as_good_as_its_author_says() -> None:
    assert accuracy("resnet20", 1000) == pytest.approx(0.92, abs=0.002)


@pytest.mark.slow
@needs_teachers
@pytest.mark.parametrize(("model", "expected"), [("resnet32", 0.9263), ("resnet56", 0.9339)])
def test_real_teachers_are_as_good_on_all_test_images(model: str, expected: float) -> None:
    assert accuracy(model, 10_000) == pytest.approx(expected, abs=1e-4)
