"""Pytrees as flat dicts of host arrays."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ktg_jax.errors import InputError
from ktg_jax.io.trees import digest, flatten, unflatten


def tree() -> Any:
    """Dicts, a tuple, a list, a named tuple, None, a scalar and integers."""
    params = {"conv": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}}
    return {
        "params": params,
        "opt": optax.sgd(0.1, momentum=0.9).init(params),
        "rest": (None, [jnp.int32(7), jnp.array([True, False])]),
    }


def test_names_are_paths_with_dots() -> None:
    assert list(flatten(tree())) == [
        "opt.0.trace.conv.bias",
        "opt.0.trace.conv.kernel",
        "params.conv.bias",
        "params.conv.kernel",
        "rest.1.0",
        "rest.1.1",
    ]


def test_a_flattened_tree_comes_back() -> None:
    there = tree()
    back = unflatten(there, flatten(there), "weights")
    chex.assert_trees_all_equal_structs(back, there)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, there)
    chex.assert_trees_all_equal(back, there)


def test_shapes_alone_are_template_enough() -> None:
    there = tree()
    back = unflatten(jax.eval_shape(lambda: there), flatten(there), "weights")
    chex.assert_trees_all_equal(back, there)


def test_an_empty_tree_comes_back() -> None:
    assert flatten({}) == {}
    assert unflatten({}, {}, "weights") == {}


def test_flattened_arrays_are_copies() -> None:
    host = {"a": np.zeros(3)}
    flat = flatten(host)
    host["a"][:] = 1
    assert flat["a"].tolist() == [0, 0, 0]

    device = {"a": jnp.zeros(1000)}
    flat = flatten(device)
    consume = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    jax.block_until_ready(consume(device))
    assert device["a"].is_deleted()
    assert not flat["a"].any()


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_random_keys_come_back_as_the_same_streams(implementation: str) -> None:
    there = {"key": jax.random.split(jax.random.key(3, impl=implementation), 2)}
    flat = flatten(there)
    assert flat["key"].dtype == np.uint32
    back = unflatten(there, flat, "checkpoint")["key"]
    assert back.dtype == there["key"].dtype
    for ours, theirs in zip(back, there["key"], strict=True):
        np.testing.assert_array_equal(jax.random.bits(ours, (5,)), jax.random.bits(theirs, (5,)))


def test_a_missing_array_is_named() -> None:
    there = {"a": {"x": jnp.zeros(2), "y": jnp.zeros(2)}, "b": jnp.zeros(2)}
    flat = flatten(there)
    del flat["a.y"], flat["b"]
    with pytest.raises(InputError, match=r"^weights of c: got 'no a\.y, b'; allowed: "):
        unflatten(there, flat, "weights of c")


def test_an_array_too_many_is_named() -> None:
    flat = flatten({"a": jnp.zeros(2), "b": jnp.zeros(2), "c": jnp.zeros(2)})
    with pytest.raises(InputError, match=r"^weights: got 'b, c'; allowed: "):
        unflatten({"a": jnp.zeros(2)}, flat, "weights")


@pytest.mark.parametrize("found", [(3, 2), (2, 3, 1), (6,), ()])
def test_an_array_of_another_shape_is_named_with_both_shapes(found: tuple[int, ...]) -> None:
    there = {"a": jnp.zeros(2), "kernel": jnp.zeros((2, 3)), "z": jnp.zeros(4)}
    flat = flatten(there) | {"kernel": np.zeros(found), "z": np.zeros(1)}
    with pytest.raises(InputError) as error:
        unflatten(there, flat, "weights")
    others = "others that differ: z"
    assert str(error.value) == f"weights kernel: got {found}; allowed: shape (2, 3); {others}"


def test_the_template_decides_the_dtype() -> None:
    back = unflatten({"a": jnp.zeros(2, jnp.float32)}, {"a": np.ones(2, np.float64)}, "weights")
    assert back["a"].dtype == jnp.float32


def test_the_digest_does_not_depend_on_the_order_of_names() -> None:
    a, b = np.arange(3.0), np.arange(4)
    assert digest({"a": a, "b": b}) == digest({"b": b, "a": a})
    assert digest({"a": a, "b": b}) == digest({"a": a.copy(), "b": np.asfortranarray(b)})


def test_the_digest_notices_any_flipped_bit() -> None:
    flat = flatten(tree())
    whole = digest(flat)
    for name, array in flat.items():
        for bit in range(8 * array.nbytes):
            content = bytearray(array.tobytes())
            content[bit // 8] ^= 1 << (bit % 8)
            damaged = np.frombuffer(bytes(content), np.uint8)
            assert digest(flat | {name: damaged}) != whole, (name, bit)


def test_the_digest_notices_other_names() -> None:
    a, b = np.arange(3.0), np.ones(3)
    assert digest({"a": a, "b": b}) != digest({"a": b, "b": a})
    assert digest({"a": a}) != digest({"b": a})
    assert digest({"a": a}) != digest({"a": a, "b": np.zeros(0)})


def test_up_to_ten_differences_are_named() -> None:
    zero = np.zeros(1, np.float32)
    wanted, other = ({f"{kind}{i:02}": zero for i in range(12)} for kind in "ab")
    with pytest.raises(InputError) as caught:
        unflatten(wanted, {}, "weights")
    assert caught.value.value == f"no {', '.join(sorted(wanted)[:10])} and 2 more"
    with pytest.raises(InputError) as caught:
        unflatten(wanted, other, "weights")
    assert caught.value.value == "no a00, a01, a02, a03, a04 and 7 more"
    assert caught.value.allowed.endswith("(left over: b00, b01, b02, b03, b04 and 7 more)")
    with pytest.raises(InputError) as caught:
        unflatten({}, other, "weights")
    assert caught.value.value == f"{', '.join(sorted(other)[:10])} and 2 more"
    larger = {name: np.zeros(2, np.float32) for name in wanted}
    with pytest.raises(InputError) as caught:
        unflatten(wanted, larger, "weights")
    assert caught.value.field == "weights a00"
    assert caught.value.allowed.startswith("shape (1,); others that differ: a01, a02, ")
    assert caught.value.allowed.endswith("a09 and 2 more")
