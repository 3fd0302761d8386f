"""Readers: a teacher's stages seen through what was fitted to them, and their files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import ktg_jax as ktg
from ktg_jax.errors import InputError
from ktg_jax.priors import (
    READERS_FILE,
    Readers,
    aggregate_prior,
    fit_readers,
    load_readers,
    projected,
    readers_checksum,
    save_prior,
    save_readers,
)

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (32, 8, 8, 3), np.uint8)
LABELS = np.arange(32) % 4
KERNELS = {"stage1_conv.kernel": (3, 3, 2, 4), "stage2_conv.kernel": (1, 1, 3, 5)}

SEEING = ktg.NodeFns(
    init=lambda rng, images: ({}, {}),
    apply=lambda params, state, images, train: (images[:, 0, :4, 0], state),
    stages=lambda params, state, images, train: (
        (images[:, 0, :4, 0], (images, images[:, ::2, ::2])),
        state,
    ),
)
"""A teacher whose stages see the image, and every other row and column of it."""


def fit(function: Callable[..., Any], **changes: Any) -> Any:
    options: dict[str, Any] = {"rng": jax.random.key(1), "steps": 3, "batch_size": 16}
    return function(SEEING, {}, {}, KERNELS, IMAGES, LABELS, **options | changes)


@pytest.fixture(scope="module")
def readers() -> Readers:
    return fit(fit_readers)


def normalised(array: np.ndarray, variables: Any, name: str) -> np.ndarray:
    """Batch normalisation with stored statistics, and ReLU."""
    stored, learnt = variables["batch_stats"][name], variables["params"][name]
    whitened = (array - stored["mean"]) / np.sqrt(stored["var"] + 1e-5)
    return np.maximum(whitened * learnt["scale"] + learnt["bias"], 0)


@pytest.mark.slow
def test_a_projected_teacher_puts_out_what_its_readers_average(readers: Readers) -> None:
    images = jnp.asarray(RNG.random((2, 8, 8, 3)), jnp.float32)
    (logits, seen), _ = projected(SEEING, readers).stages({}, {}, images, False)  # type: ignore[misc]
    np.testing.assert_array_equal(logits, images[:, 0, :4, 0])
    assert [output.shape for output in seen] == [(2, 8, 8, 4), (2, 4, 4, 5)]
    module, variables = readers.modules[1], readers.variables[1]
    # Its downscaling kernel is 1x1: all by matrix products.
    names = ("reduction", "downscaling")
    first, second = (np.asarray(variables["params"][n]["kernel"])[0, 0] for n in names)
    reduced = normalised(np.asarray(images)[:, ::2, ::2] @ first, variables, "reduction_norm")
    expected = normalised(reduced @ second, variables, "downscaling_norm")
    np.testing.assert_allclose(seen[1], expected, atol=1e-5)
    head = variables["params"]["head"]
    by_head = np.asarray(seen[1]).mean((1, 2)) @ head["kernel"] + head["bias"]
    classified: Any = module.apply(variables, images[:, ::2, ::2], False)
    np.testing.assert_allclose(classified, by_head, rtol=1e-4, atol=1e-5)


def test_the_readers_kernels_are_the_prior(readers: Readers) -> None:
    chex.assert_trees_all_equal(readers.prior(tuple(KERNELS)), fit(aggregate_prior))


def test_readers_come_back_from_their_file(readers: Readers, tmp_path: Path) -> None:
    save_readers(tmp_path / READERS_FILE, readers)
    for path in (tmp_path, tmp_path / READERS_FILE):
        loaded = load_readers(path)
        assert loaded.modules == readers.modules
        chex.assert_trees_all_equal(loaded, readers)
    others = fit(fit_readers, rng=jax.random.key(2))
    save_readers(tmp_path / "others.safetensors", others)
    assert readers_checksum(tmp_path) != readers_checksum(tmp_path / "others.safetensors")


def test_files_without_whole_readers_are_refused(readers: Readers, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^projection: got .*a whole .safetensors file, or a folder"
    ):
        load_readers(tmp_path)
    prior = readers.prior(tuple(KERNELS))
    about: dict[str, Any] = {"student": "cnn", "num_classes": 4, "image_shape": (8, 8, 3)}
    save_prior(tmp_path / "prior.safetensors", prior, **about)
    with pytest.raises(InputError, match=r"an undamaged file that save_readers wrote"):
        load_readers(tmp_path / "prior.safetensors")
    save_readers(tmp_path / READERS_FILE, readers)
    content = bytearray((tmp_path / READERS_FILE).read_bytes())
    content[-1] ^= 1
    (tmp_path / READERS_FILE).write_bytes(content)
    with pytest.raises(InputError, match=r"an undamaged file that save_readers wrote"):
        load_readers(tmp_path)
    with pytest.raises(InputError, match=r"^readers: got .*a file that can be written"):
        save_readers(tmp_path / "gone" / READERS_FILE, readers)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("modules", "[[[3, 3"),
        ("modules", "7"),
        ("modules", "[[[1, 1, 3, 5], 4, 1, 9, 9, 9, 9]]"),
        ("modules", "[" * 100_000),
        ("accuracy", "9" * 5000),
        ("accuracy", None),
    ],
    ids=lambda text: str(text)[:12],
)
def test_files_whose_texts_say_nothing_are_refused(
    readers: Readers, tmp_path: Path, field: str, text: str | None
) -> None:
    path = tmp_path / READERS_FILE
    save_readers(path, readers)
    with safe_open(path, framework="numpy") as file:
        texts = {k: v for k, v in (file.metadata() | {field: text}).items() if v is not None}
    save_file(load_file(path), path, metadata=texts)
    with pytest.raises(InputError, match=r"^projection: got '.*a file that save_readers wrote \("):
        load_readers(path)


@pytest.mark.slow
def test_readers_of_another_teacher_are_refused(readers: Readers) -> None:
    mute = ktg.NodeFns(SEEING.init, SEEING.apply)
    with pytest.raises(InputError, match=r"^stages: got None"):
        projected(mute, readers)
    fns = projected(ktg.build_model("cnn", 4), readers)
    images = jnp.zeros((1, 8, 8, 3))
    with pytest.raises(InputError, match=r"^readers: got 2; allowed: 3, as many as the network"):
        fns.stages(*fns.init(jax.random.key(0), images), images, False)  # type: ignore[misc]
