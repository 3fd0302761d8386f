"""A node from a flax.nnx module."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jax

from ktg_jax.errors import InputError
from ktg_jax.models.modes import Call, known_flags, unknown_mode
from ktg_jax.models.network import NodeFns, PyTree
from ktg_jax.models.streams import batch_is_spread, of_this_device

if TYPE_CHECKING:
    from flax import nnx

_TELL_IT = "a module whose own train() and eval() tell it, and whose call takes images alone"


def from_nnx(create: "Callable[..., nnx.Module]", *args: Any, **kwargs: Any) -> NodeFns:
    """A node from a flax.nnx module: `create(*args, rngs=rngs, **kwargs)` makes it.

    `create` is the module's class, or a function with an argument `rngs`. The module is called as
    `module(images)`, after `module.train()` or `module.eval()`; flags of other known names (see
    `from_linen`) that it or its submodules have are set, too, and those that its call takes are
    given. Its `nnx.Param` variables are the params; all others (batch statistics, random streams)
    are the model state.

    Raises:
        InputError: `create` is a module, not what makes one: its weights could not depend on the
            node and the seed. Or the module's call needs other arguments. `init` raises it where
            the call has flags, none of a known name, and training leaves batch statistics as they
            are, or dropout idle.

    >>> from flax import nnx
    >>> fns = from_nnx(nnx.Linear, 64, 10)
    >>> params, state = fns.init(jax.random.key(0), jax.numpy.zeros((1, 64)))
    >>> params["kernel"].shape
    (64, 10)
    """
    from flax import nnx  # a good part of flax's import, for those who use it

    if isinstance(create, nnx.Module):
        raise InputError("create", type(create).__name__, "a module's class or a function of rngs")

    def split(module: "nnx.Module") -> tuple[PyTree, PyTree]:
        # Plain arrays: an nnx.Variable remembers the trace it was made in, and may not leave it.
        params, model_state = nnx.state(module, nnx.Param), nnx.state(module, nnx.Not(nnx.Param))
        return nnx.as_pure(params), nnx.as_pure(model_state)

    # What does not depend on the random key: found once, without computing weights.
    abstract: Any = nnx.eval_shape(lambda: create(*args, rngs=nnx.Rngs(0), **kwargs))
    graphdef, name = nnx.graphdef(abstract), type(abstract).__name__
    call = Call(abstract.__call__ if callable(abstract) else lambda images: images)
    flags = known_flags(call.defaults)
    call.check(name, flags(True) if flags else {}, _TELL_IT)

    def run(module: Any, images: jax.Array, train: bool) -> jax.Array:
        _set_mode(module, train)
        return module(images, **(flags(train) if flags else {}))

    def init(rng: jax.Array, images: jax.Array) -> tuple[PyTree, PyTree]:
        module = create(*args, rngs=nnx.Rngs(rng), **kwargs)  # which knows its shapes
        if flags is None and any(isinstance(value, bool) for value in call.defaults.values()):
            jax.eval_shape(check_mode, *split(abstract), images)
        return split(module)

    def check_mode(params: PyTree, model_state: PyTree, images: jax.Array) -> None:
        module = nnx.merge(graphdef, params, model_state)
        dropout = [m for _, m in nnx.iter_modules(module) if isinstance(m, nnx.Dropout) and m.rate]
        watched = {"batch statistics": nnx.BatchStat, "dropout": nnx.RngCount if dropout else ()}
        was = {kind: _leaves(module, variables) for kind, variables in watched.items()}
        run(module, images, True)
        for kind, variables in watched.items():
            now = _leaves(module, variables)
            if now and all(a is b for a, b in zip(was[kind], now, strict=True)):
                raise unknown_mode(name, f"{kind} that training leaves as they are", _TELL_IT)

    def apply(
        params: PyTree, model_state: PyTree, images: jax.Array, train: bool
    ) -> tuple[jax.Array, PyTree]:
        module = nnx.merge(graphdef, params, model_state)
        if not train:
            return run(module, images, False), model_state
        with _own_numbers(module):
            logits = run(module, images, True)
        return logits, split(module)[1]

    return NodeFns(init, apply)


def _leaves(module: Any, variables: Any) -> list[Any]:
    """The values of a module's variables of a kind."""
    from flax import nnx

    return jax.tree.leaves(nnx.as_pure(nnx.state(module, variables)))


def _set_mode(module: Any, train: bool) -> None:
    """Tells a module and its submodules, by their own methods and by flags of known names."""
    from flax import nnx

    method = "train" if train else "eval"
    if callable(tell := getattr(module, method)):
        tell()
    else:  # a flag of that name hides it
        getattr(nnx.Module, method)(module)
    for _, each in nnx.iter_modules(module):
        flags = known_flags({k: v for k, v in vars(each).items() if isinstance(v, bool)})
        for flag, value in (flags(train) if flags else {}).items():
            setattr(each, flag, value)


@contextmanager
def _own_numbers(module: "nnx.Module") -> Iterator[None]:
    """Within it, the module draws this device's own random numbers; then it has its keys again."""
    from flax import nnx

    if not batch_is_spread():
        yield
        return
    keys = nnx.as_pure(nnx.state(module, nnx.RngKey))
    nnx.update(module, jax.tree.map(of_this_device, keys))
    yield
    nnx.update(module, keys)
