"""The networks of torchvision and timm, for small images and with our weights.

PyPI's torchvision does not go with a CPU build of PyTorch: `pip install torch torchvision timm`
into an environment of its own. As a program this prints the logits that tests know by heart.
"""

import importlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import pytest
from random_variables import random_variables

import ktg_jax as ktg
from ktg_jax.io.trees import flatten

CLASSES = 7
IMAGES = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
NAMES = ("vgg8", "vgg13", "mobilenet_v2", "shufflenet_v2", "vit_tiny", "resnet18", "resnet50")
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_SHUFFLE = {"side_conv1": "branch1.0", "side_norm1": "branch1.1"}
_SHUFFLE |= {"side_conv2": "branch1.2", "side_norm2": "branch1.3"}
_SHUFFLE |= {f"conv{i}": f"branch2.{(0, 3, 5)[i - 1]}" for i in (1, 2, 3)}
_SHUFFLE |= {f"norm{i}": f"branch2.{(1, 4, 6)[i - 1]}" for i in (1, 2, 3)}
_TRANSFORMER = {"qkv": "attn.qkv", "projection": "attn.proj", "dense1": "mlp.fc1"}
_TRANSFORMER |= {"dense2": "mlp.fc2", "norm1": "norm1", "norm2": "norm2"}
_RESNET = {f"norm{i}": f"bn{i}" for i in (1, 2, 3)} | {f"conv{i}": f"conv{i}" for i in (1, 2, 3)}
_RESNET |= {"shortcut": "downsample.0", "shortcut_norm": "downsample.1"}


def ours(name: str, images: np.ndarray = IMAGES, seed: int = 1) -> tuple[Any, Any, Any]:
    """Our network's functions, and random params and statistics."""
    fns = ktg.build_model(name, CLASSES)
    return fns, *random_variables(fns, images[:1], seed)


def logits(name: str) -> np.ndarray:
    """Our logits for the images."""
    fns, params, state = ours(name)
    return np.asarray(jax.jit(lambda x: fns.apply(params, state, x, False)[0])(IMAGES))


def theirs(name: str) -> np.ndarray:
    """Their network's logits with the same weights."""
    torch = pytest.importorskip("torch")
    _, params, state = ours(name)
    network = _network(name).eval()
    arrays = flatten(params) | {
        path.removeprefix("batch_stats."): array for path, array in flatten(state).items()
    }
    keys = dict(_keys(name, arrays))
    tensors = {keys[path]: _turned(torch, path, array) for path, array in arrays.items()}
    missing, left = network.load_state_dict(tensors, strict=False)
    assert not left
    assert all(key.endswith("num_batches_tracked") for key in missing)
    with torch.no_grad():
        return np.asarray(network(torch.tensor(IMAGES).permute(0, 3, 1, 2)).numpy())


def _turned(torch: Any, path: str, array: np.ndarray) -> Any:
    if path == "position":
        return torch.tensor(array.reshape(1, -1, array.shape[-1]))
    return torch.tensor(np.moveaxis(array, (-1, -2), (0, 1)) if array.ndim > 1 else array)


def _network(name: str) -> Any:
    if name.startswith("vgg"):
        return _vgg(name)
    library = pytest.importorskip("timm" if name == "vit_tiny" else "torchvision")
    if name == "vit_tiny":
        how = {"img_size": 16, "patch_size": 4, "class_token": False, "global_pool": "avg"}
        return library.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **how)
    called = {"shufflenet_v2": "shufflenet_v2_x1_0"}.get(name, name)
    network = getattr(library.models, called)(num_classes=CLASSES)
    nn = importlib.import_module("torch").nn
    if name == "mobilenet_v2":
        network.features[0][0].stride = network.features[2].conv[1][0].stride = (1, 1)
    elif name == "shufflenet_v2":
        network.conv1[0].stride, network.maxpool = (1, 1), nn.Identity()
    else:
        network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return network


def _vgg(name: str) -> Any:
    """Convolutions with bias, batch normalisation and relu; halved after the first three stages."""
    nn = pytest.importorskip("torch").nn
    layers: list[Any] = []
    inputs = 3
    for stage, outputs in enumerate((64, 128, 256, 512, 512)):
        for _ in range(1 if name == "vgg8" else 2):
            conv = nn.Conv2d(inputs, outputs, 3, padding=1)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        layers += [nn.MaxPool2d(2)] if stage < 3 else []
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES)]
    return nn.Sequential(*layers)


def _keys(name: str, arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, str]]:
    """Their key for each of our paths."""
    parts = dict.fromkeys(path.rpartition(".")[0] for path in arrays if "." in path)
    blocks = sorted(
        dict.fromkeys(part.split(".")[0] for part in parts if part.startswith("stage")),
        key=lambda block: [int(n) for n in re.findall(r"\d+", block)],
    )
    for path in arrays:
        part, _, leaf = path.rpartition(".")
        block, _, inner = part.partition(".")
        if path == "position":
            yield path, "pos_embed"
        elif block in blocks:
            stage, number = (int(n) for n in re.findall(r"\d+", block))
            where = stage, number, blocks.index(block)
            has_expansion = f"{block}.conv1" in parts
            yield path, f"{_inner(name, *where, inner, has_expansion)}.{_LEAVES.get(leaf, leaf)}"
        else:
            yield path, f"{_OUTER[name][part]}.{_LEAVES.get(leaf, leaf)}"


def _inner(name: str, stage: int, number: int, index: int, inner: str, has_expansion: bool) -> str:
    if name.startswith("vgg"):
        per_stage = 1 if name == "vgg8" else 2
        pools = min(stage - 1, 3)
        first = 3 * ((stage - 1) * per_stage + number - 1) + pools
        return str(first + (inner == "norm1"))
    if name == "mobilenet_v2":
        wide = {"conv1": "0.0", "norm1": "0.1", "conv2": "1.0", "norm2": "1.1"}
        wide |= {"conv3": "2", "norm3": "3"}
        plain = {"conv2": "0.0", "norm2": "0.1", "conv3": "1", "norm3": "2"}
        return f"features.{index + 1}.conv.{(wide if has_expansion else plain)[inner]}"
    if name == "shufflenet_v2":
        return f"stage{stage + 1}.{number - 1}.{_SHUFFLE[inner]}"
    if name == "vit_tiny":
        return f"blocks.{index}.{_TRANSFORMER[inner]}"
    return f"layer{stage}.{number - 1}.{_RESNET[inner]}"


_OUTER = {
    "vgg8": {"classifier": "20"},
    "vgg13": {"classifier": "35"},
    "mobilenet_v2": {
        **{"stem_conv": "features.0.0", "stem_norm": "features.0.1"},
        **{"final_conv": "features.18.0", "final_norm": "features.18.1"},
        "classifier": "classifier.1",
    },
    "shufflenet_v2": {
        **{"stem_conv": "conv1.0", "stem_norm": "conv1.1", "classifier": "fc"},
        **{"final_conv": "conv5.0", "final_norm": "conv5.1"},
    },
    "vit_tiny": {"stem_conv": "patch_embed.proj", "final_norm": "fc_norm", "classifier": "head"},
    "resnet18": {"stem_conv": "conv1", "stem_norm": "bn1", "classifier": "fc"},
    "resnet50": {"stem_conv": "conv1", "stem_norm": "bn1", "classifier": "fc"},
}

if __name__ == "__main__":
    for each in NAMES:
        print(f'    "{each}": {np.round(theirs(each)[1, :3].astype(float), 5).tolist()},')
