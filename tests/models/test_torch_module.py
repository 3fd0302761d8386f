"""PyTorch modules as sources of recordings."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import ktg_jax as ktg
from ktg_jax import InputError
from ktg_jax.inputs import Input
from ktg_jax.models.input import as_wanted

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
LABELS = np.zeros(12, np.int32)
STREAM = ktg.BatchStream(IMAGES, LABELS, ktg.Batches(12, batch_size=4, max_offset=1), 0)


def test_a_module_sees_the_batches_as_it_wants_them_and_is_recorded(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason='needs: pip install "ktg_jax[reference]"')
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3), torch.nn.Dropout(0.5), torch.nn.Flatten(), torch.nn.LazyLinear(7)
    )
    module(torch.zeros(1, 3, 6, 6))
    wanted = Input((0.5,), (0.25,), size=6)
    recording = ktg.record_host(
        ktg.from_torch(module, wanted),
        STREAM,
        tmp_path / "new",
        steps=5,
        classes=7,
        dtype="float32",
    )
    assert not module.training
    for step, (images, _) in enumerate(STREAM.host(0, 5)):
        seen = np.array(as_wanted(jnp.asarray(images), wanted).transpose(0, 3, 1, 2))
        with torch.no_grad():
            expected = module(torch.from_numpy(seen)).numpy()
        np.testing.assert_allclose(recording.rows(step, 1)[0], expected, rtol=1e-5, atol=1e-6)


def test_what_is_recorded_is_not_computed_again(tmp_path: Path) -> None:
    calls = []

    def outputs(images: np.ndarray) -> np.ndarray:
        calls.append(len(images))
        return images.mean((1, 2))

    for _ in range(2):
        ktg.record_host(outputs, STREAM, tmp_path / "new", steps=3, classes=3)
    assert calls == [4, 4, 4]
    with pytest.raises(InputError, match=r"out: .*differing: rows: 3, now 4"):
        ktg.record_host(outputs, STREAM, tmp_path / "new", steps=4, classes=3)


def test_bad_modules_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason='needs: pip install "ktg_jax[reference]"')
    with pytest.raises(InputError, match=r"module: got 'function'; allowed: a torch.nn.Module"):
        ktg.from_torch(test_bad_modules_are_refused)
    with pytest.raises(InputError, match=r"input: got 'imagenets'"):
        ktg.from_torch(torch.nn.Identity(), "imagenets")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match="PyTorch, which is not installed"):
        ktg.from_torch(None)
