"""Convolutions: every formulation against float64, and the choice between them."""

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from native import require_onednn

import ktg_jax as ktg
import ktg_jax.models
from ktg_jax import InputError, Parallel
from ktg_jax.cpu import chunked, convolution, operations
from ktg_jax.cpu.build import BuildError
from ktg_jax.cpu.convolution import FORMULATIONS, conv2d, conv_general_dilated, formulation

VARIABLE = "KTG_CPU_CONVOLUTION"


class Case(NamedTuple):
    """A convolution; height and width, and the kernel's sides, are the same."""

    size: int
    channels: int
    features: int
    side: int = 3
    stride: int = 1
    batch: int = 3


@pytest.fixture(params=FORMULATIONS)
def used(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each formulation in turn."""
    if request.param == "onednn":
        require_onednn()
    with formulation(request.param):
        yield request.param


def inputs_of(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, a kernel, and a gradient of the outputs."""
    rng = np.random.default_rng(case)
    out = (case.size + 2 * (case.side // 2) - case.side) // case.stride + 1
    shapes = (
        (case.batch, case.size, case.size, case.channels),
        (case.side, case.side, case.channels, case.features),
        (case.batch, out, out, case.features),
    )
    images, kernel, gradient = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return images, kernel, gradient


@functools.cache
def reference(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outputs and both gradients in float64, from the definition: a product for each position."""
    images, kernel, gradient = (x.astype(np.float64) for x in inputs_of(case))
    padding, reach = case.side // 2, case.stride * (gradient.shape[1] - 1) + 1
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    outputs, to_padded, to_kernel = (np.zeros_like(x) for x in (gradient, padded, kernel))
    for row, column in np.ndindex(case.side, case.side):
        seen = np.s_[:, row : row + reach : case.stride, column : column + reach : case.stride]
        outputs += padded[seen] @ kernel[row, column]
        to_padded[seen] += gradient @ kernel[row, column].T
        to_kernel[row, column] = np.tensordot(padded[seen], gradient, ((0, 1, 2), (0, 1, 2)))
    inside = slice(padding, padding + case.size)
    return outputs, to_padded[:, inside, inside], to_kernel


def with_gradients(stride: int, padding: int) -> Callable[..., tuple[jax.Array, ...]]:
    """A new function of images, kernel and gradient: outputs and both gradients."""

    def compute(images: jax.Array, kernel: jax.Array, gradient: jax.Array) -> Any:
        outputs, pullback = jax.vjp(lambda x, w: conv2d(x, w, stride, padding), images, kernel)
        return outputs, *pullback(gradient)

    return compute


def of_case(case: Case) -> Callable[..., tuple[jax.Array, ...]]:
    return with_gradients(case.stride, case.side // 2)


def assert_close(ours: Any, theirs: Any, where: object = "") -> None:
    """The largest difference is within 1e-5 of the largest value, array by array."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error <= 1e-5, f"{where}: array {i} is off by {error}"


# --- values and gradients


@functools.cache
def convolutions_of(model: str, size: int) -> frozenset[Case]:
    """The convolutions that a network makes of images of that size."""
    found = set()

    def note(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(conv := context.module, nn.Conv):
            _, height, width, channels = args[0].shape
            assert height == width
            kernel_size, strides = conv.kernel_size, conv.strides
            assert isinstance(kernel_size, tuple)
            assert isinstance(strides, tuple)
            case = Case(height, channels, conv.features, kernel_size[0], strides[0])
            # A wide one is large enough with a single image.
            found.add(case._replace(batch=1 if channels > 128 else 3))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        init = ktg.build_model(model, 10).init
        jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    return frozenset(found)


BUILT_IN = ("cnn", "resnet8", "wrn10_2", "wrn28_10")


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 8])
@pytest.mark.parametrize("model", BUILT_IN)
def test_the_networks_convolutions_are_those_of_float64(model: str, size: int, used: str) -> None:
    cases = sorted(convolutions_of(model, size))
    assert len(cases) >= 3
    for case in cases:
        assert_close(jax.jit(of_case(case))(*inputs_of(case)), reference(case), case)


@pytest.mark.parametrize("size", [32, 8])
def test_the_other_networks_make_no_other_convolutions(size: int) -> None:
    tested = frozenset[Case]().union(*(convolutions_of(model, size) for model in BUILT_IN))
    for model in ("resnet20", "resnet110", "wrn16_2", "wrn28_2"):
        assert model in ktg_jax.models.model_names()
        assert convolutions_of(model, size) <= tested


UNUSUAL = [
    *(Case(size, 16, 16, batch=2) for size in (1, 2, 3, 5, 7, 9)),
    *(Case(size, 16, 32, stride=2, batch=2) for size in (1, 5, 7, 9)),
    *(Case(7, 16, 8, side=1, stride=stride) for stride in (1, 2)),
    *(Case(6, channels, 16) for channels in (1, 3, 5, 8, 24)),
    *(Case(6, 16, features) for features in (1, 3, 5, 8, 24)),
    Case(8, 5, 3, stride=3),
    Case(9, 16, 16, side=5),
    Case(32, 16, 16, batch=5),  # several blocks of tiles, the last one smaller
]


@pytest.mark.parametrize("case", UNUSUAL, ids=str)
def test_unusual_convolutions_are_those_of_float64(case: Case, used: str) -> None:
    assert_close(jax.jit(of_case(case))(*inputs_of(case)), reference(case))


@pytest.mark.parametrize(
    ("stride", "expected", "to_image", "to_kernel"),
    [
        (1, [[1000, 2100, 200], [3010, 4321, 402], [30, 43, 4]], [[1111] * 2] * 2, [[10] * 2] * 2),
        (2, [[1000, 200], [30, 4]], [[1000, 100], [10, 1]], [[4, 3], [2, 1]]),
    ],
)
def test_a_small_convolution_by_hand(
    stride: int, expected: Any, to_image: Any, to_kernel: Any, used: str
) -> None:
    image = jnp.array([[1.0, 2.0], [3.0, 4.0]])[None, :, :, None]
    kernel = jnp.array([[1.0, 10.0], [100.0, 1000.0]])[:, :, None, None]
    ones = jnp.ones((1, len(expected), len(expected), 1))
    found = jax.jit(with_gradients(stride, padding=1))(image, kernel, ones)
    for array, numbers in zip(found, (expected, to_image, to_kernel), strict=True):
        np.testing.assert_allclose(array.squeeze(), numbers, rtol=1e-6)


def test_a_kernels_gradient_adds_up_over_chunks_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_CHUNK_VALUES", 1)  # the smallest chunks are of 8 images
    case = Case(5, 4, 6, stride=2, batch=19)
    with formulation("chunked"):
        assert_close(jax.jit(of_case(case))(*inputs_of(case)), reference(case))


@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize("case", [Case(8, 16, 16, batch=5), Case(7, 3, 5, stride=2, batch=5)])
def test_native_operations_may_be_split_into_any_number_of_parts(
    case: Case, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_onednn()
    monkeypatch.setattr(operations, "parts", lambda: parts)
    with formulation("onednn"):
        assert_close(jax.jit(of_case(case))(*inputs_of(case)), reference(case))


@pytest.mark.parametrize("parts", [1, 3])
def test_native_operations_give_the_same_bits_on_every_run(
    parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_onednn()
    monkeypatch.setattr(operations, "parts", lambda: parts)
    cases = [Case(16, 16, 16, batch=12), Case(16, 16, 32, stride=2, batch=12)]

    def runs(case: Case) -> list[tuple[jax.Array, ...]]:
        with formulation("onednn"):
            compute = jax.jit(of_case(case))
            return [compute(*inputs_of(case)) for _ in range(3)]

    found = {case: runs(case) for case in cases}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        for case in cases:
            found[case] += runs(case)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    for case in cases:
        first, *others = found[case]
        assert len(others) == 5
        for other in others:
            for a, b in zip(first, other, strict=True):
                np.testing.assert_array_equal(a, b)


# --- under JAX's transformations


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("batched", ["images", "kernels", "both"])
def test_a_mapped_convolution_is_a_loop(
    batched: str, devices: int, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With one CPU device the operations are called in another way.
    monkeypatch.setattr(jax, "local_device_count", lambda *_: devices)
    case = Case(6, 16, 16, batch=2)
    rng = np.random.default_rng(0)
    images, kernel, gradient = (
        rng.standard_normal((3, *x.shape), np.float32) for x in inputs_of(case)
    )
    over_images, over_kernels = batched != "kernels", batched != "images"
    images, kernel = images[slice(3) if over_images else 0], kernel[slice(3) if over_kernels else 0]
    axes = (0 if over_images else None, 0 if over_kernels else None, 0)
    found = jax.jit(jax.vmap(of_case(case), in_axes=axes))(images, kernel, gradient)
    one = jax.jit(of_case(case))
    for i in range(3):
        x, w = images[i] if over_images else images, kernel[i] if over_kernels else kernel
        assert_close([each[i] for each in found], one(x, w, gradient[i]))


@pytest.mark.parametrize(
    "case", [Case(8, 16, 16, batch=4), Case(7, 3, 5, stride=2, batch=4)], ids=str
)
def test_a_batch_may_be_spread_over_devices(case: Case, used: str) -> None:
    parallel = Parallel("jit", jax.local_devices()[:2])
    images, kernel, gradient = inputs_of(case)
    split = NamedSharding(parallel.mesh, PartitionSpec("data"))
    found = jax.jit(of_case(case))(
        jax.device_put(images, split), parallel.replicate(kernel), jax.device_put(gradient, split)
    )
    assert_close(found, reference(case))
    outputs, to_images, to_kernel = found
    for spread in (outputs, to_images):
        assert spread.sharding.shard_shape(spread.shape)[0] == 2
    for copy in to_kernel.addressable_shards:
        assert_close([copy.data], reference(case)[2:])


def test_a_step_may_spread_its_batch_over_devices(used: str) -> None:
    parallel, case = Parallel("jit", jax.local_devices()[:2]), Case(8, 16, 16, batch=4)
    compute = of_case(case)

    def step(state: jax.Array, images: Any, kernel: Any, gradient: Any) -> Any:
        images, gradient = parallel.shard((images, gradient))
        return state + 1, compute(images, kernel, gradient)

    inputs = parallel.replicate((jnp.zeros(()), *inputs_of(case)))
    _, found = parallel.compile(step)(*inputs)
    assert_close(found, reference(case))


def test_an_evaluation_needs_no_compiled_step(used: str) -> None:
    case = Case(6, 16, 8, batch=2)
    images, kernel, _ = map(jnp.asarray, inputs_of(case))
    assert_close([conv2d(images, kernel, padding=1)], reference(case)[:1])


# --- what flax's layers call


def program(function: Callable[..., Any], *arguments: Any) -> str:
    return str(jax.make_jaxpr(lambda *args: function(*args))(*arguments))


@pytest.mark.parametrize("name", ["onednn", "chunked"])
def test_mixed_precision_goes_to_xla(name: str) -> None:
    if name == "onednn":
        require_onednn()
    images, kernel = jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3, 16))
    with formulation(name):
        assert "custom_vjp" in program(conv2d, images, kernel)
        for x in (images, images.astype(jnp.bfloat16)):
            halved = program(conv2d, x, kernel.astype(x.dtype))
            assert ("custom_vjp" in halved) == (x.dtype == jnp.float32)
        low = conv2d(images.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), padding=1)
    assert low.dtype == jnp.bfloat16
    assert low[0, 1, 1, 0] == 27


@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), [(1, 1), (1, 1)], ([1, 1], [1, 1])])
def test_flax_layers_use_the_formulation(padding: Any, used: str) -> None:
    case = Case(6, 4, 4, stride=2)
    images, kernel, _ = map(jnp.asarray, inputs_of(case))

    def layer(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return conv_general_dilated(
            images,
            kernel,
            (2, 2),
            padding,
            lhs_dilation=(1, 1),
            rhs_dilation=(1, 1),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=1,
        )

    assert ("custom_vjp" in program(layer, images, kernel)) == (used != "xla")
    assert_close([layer(images, kernel)], reference(case)[:1])


@pytest.mark.parametrize(
    "options",
    [
        {"rhs_dilation": (2, 2)},
        {"lhs_dilation": (2, 2)},
        {"feature_group_count": 2},
        {"window_strides": (1, 2)},
        {"padding": "SAME"},
        {"padding": ((1, 0), (1, 0))},
        {"padding": ((1, 1), (0, 0))},
        {"padding": ((3, 3), (3, 3))},
        {"padding": ((-1, -1), (-1, -1))},
    ],
    ids=str,
)
def test_what_no_formulation_can_do_goes_to_xla(options: dict[str, Any], used: str) -> None:
    groups = options.get("feature_group_count", 1)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((2, 6, 6, 4), np.float32))
    kernel = jnp.asarray(rng.standard_normal((3, 3, 4 // groups, 4), np.float32))
    fixed = {"window_strides": (1, 1), "padding": ((1, 1), (1, 1))} | options
    strides, padding = fixed.pop("window_strides"), fixed.pop("padding")
    fixed["dimension_numbers"] = ("NHWC", "HWIO", "NHWC")

    def ours(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return conv_general_dilated(images, kernel, strides, padding, **fixed)

    assert "custom_vjp" not in program(ours, images, kernel)
    expected = jax.lax.conv_general_dilated(images, kernel, strides, padding, **fixed)
    np.testing.assert_allclose(ours(images, kernel), expected, atol=1e-5)


# --- the choice


@pytest.fixture
def forgotten() -> Iterator[None]:
    """No choice was made before, and none is remembered."""
    convolution._choose.cache_clear()
    yield
    convolution._choose.cache_clear()


@pytest.fixture
def impossible(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which native operations cannot be built."""

    def register() -> None:
        raise BuildError("no C++ compiler found (g++)")

    monkeypatch.setattr(operations, "register", register)


@pytest.mark.parametrize("name", ["chunked", "xla"])
def test_the_environment_chooses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, name)
    chosen = ktg.cpu_convolution()
    assert (chosen.name, chosen.reason) == (name, "chosen by KTG_CPU_CONVOLUTION")
    assert str(chosen) == f"{name} (chosen by KTG_CPU_CONVOLUTION)"
    traced = program(conv2d, jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)))
    assert ("custom_vjp" in traced) == (name == "chunked")


def test_onednn_is_used_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    require_onednn()
    monkeypatch.delenv(VARIABLE, raising=False)
    assert str(ktg.cpu_convolution()) == "onednn (oneDNN was found)"
    monkeypatch.setenv(VARIABLE, "onednn")
    assert str(ktg.cpu_convolution()) == "onednn (chosen by KTG_CPU_CONVOLUTION)"


def test_where_onednn_cannot_be_had_there_is_another(
    impossible: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert str(ktg.cpu_convolution()) == "chunked (no C++ compiler found (g++))"


def test_onednn_that_is_asked_for_and_cannot_be_had_is_an_error(
    impossible: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "onednn")
    message = (
        "KTG_CPU_CONVOLUTION: got 'onednn'; allowed: chunked or xla here: "
        "no C++ compiler found (g++)"
    )
    for _ in range(2):
        with pytest.raises(InputError) as error:
            ktg.cpu_convolution()
        assert str(error.value) == message
    with pytest.raises(InputError), formulation("onednn"):
        pytest.fail("never reached")


@pytest.mark.parametrize("name", ["fast", "XLA", " "])
def test_a_formulation_that_does_not_exist_is_an_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, name)
    with pytest.raises(InputError) as error:
        ktg.cpu_convolution()
    assert str(error.value) == f"{VARIABLE}: got {name!r}; allowed: onednn, chunked, xla"
    with pytest.raises(InputError, match=r"allowed: onednn, chunked, xla$"):
        conv2d(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)))


def test_a_formulation_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "chunked")
    with formulation("xla"):
        assert ktg.cpu_convolution().name == "xla"
        with formulation("chunked"):
            assert ktg.cpu_convolution().name == "chunked"
        assert ktg.cpu_convolution().name == "xla"
    assert ktg.cpu_convolution().name == "chunked"


def test_other_backends_have_their_own_convolutions(
    forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert str(ktg.cpu_convolution()) == "xla (JAX computes on gpu)"
