"""A node from a flax.nnx module."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ktg_jax.errors import InputError
from ktg_jax.models.fed import Keep, Passages, fed
from ktg_jax.models.modes import Call, known_flags, unknown_mode
from ktg_jax.models.network import NodeFns, PyTree, check_found, checked_stages, stage_number
from ktg_jax.models.streams import batch_is_spread, of_this_device
from ktg_jax.outputs import Outputs

if TYPE_CHECKING:
    from flax import nnx

_TELL_IT = "a module whose own train() and eval() tell it, and whose call takes images alone"


def from_nnx(
    create: "Callable[..., nnx.Module]",
    *args: Any,
    stages: Sequence[str] | None = None,
    **kwargs: Any,
) -> NodeFns:
    """A node from a flax.nnx module: `create(*args, rngs=rngs, **kwargs)` makes it.

    `create` is the module's class, or a function with an argument `rngs`. The module is called as
    `module(images)`, after `module.train()` or `module.eval()`; flags of other known names (see
    `from_linen`) that it or its submodules have are set, too, and those that its call takes are
    given. Its `nnx.Param` variables are the params; all others (batch statistics, random streams)
    are the model state. In mixed precision its layers compute in the dtype that `build_model` says,
    where they have a field `dtype` in which they were not told another.

    Args:
        create: see above.
        *args: for it.
        stages: paths of the submodules whose outputs are the stages', in their order: `blocks.3`.
            None: submodules named `stage1`, `stage2`, ... are the stages, if there are any.
        **kwargs: for it.

    Raises:
        InputError: `create` is a module, not what makes one: its weights could not depend on the
            node and the seed. Or the module's call needs other arguments, or there is no submodule
            of a path. `init` raises it where the call has flags, none of a known name, and training
            leaves batch statistics as they are, or dropout idle.

    >>> from flax import nnx
    >>> fns = from_nnx(nnx.Linear, 64, 10)
    >>> params, state = fns.init(jax.random.key(0), jax.numpy.zeros((1, 64)))
    >>> params["kernel"].shape
    (64, 10)
    """
    from flax import nnx  # a good part of flax's import, for those who use it

    if isinstance(create, nnx.Module):
        raise InputError("create", type(create).__name__, "a module's class or a function of rngs")
    return _NnxNode(partial(create, *args, **kwargs), checked_stages(stages), None).functions


def in_dtype(fns: NodeFns, dtype: Any) -> NodeFns | None:
    """The functions of `from_nnx`, computing in another dtype; None: they are not `from_nnx`'s.

    Parameters stay as they are.
    """
    node = getattr(fns.apply, "__self__", None)
    return node.in_dtype(dtype) if isinstance(node, _NnxNode) else None


class _NnxNode:
    """See `from_nnx`."""

    def __init__(
        self,
        create: "Callable[..., nnx.Module]",
        stages: tuple[str, ...] | None,
        dtype: Any,
    ) -> None:
        from flax import nnx

        self._create, self._given, self._dtype = create, stages, dtype
        # What does not depend on the random key: found once, without computing weights.
        abstract: Any = nnx.eval_shape(lambda: self._made(nnx.Rngs(0)))
        self._abstract, self._graphdef = abstract, nnx.graphdef(abstract)
        self._name = type(abstract).__name__
        self._call = Call(abstract.__call__ if callable(abstract) else lambda images: images)
        self._flags = known_flags(self._call.defaults)
        self._call.check(self._name, self._flags(True) if self._flags else {}, _TELL_IT)
        self._stages = self._found_stages()

    @property
    def functions(self) -> NodeFns:
        """The node's functions; equal for one node."""
        staged = (self.stages, self.fed_stages, self._given) if self._stages else ()
        return NodeFns(self.init, self.apply, *staged)

    def in_dtype(self, dtype: Any) -> NodeFns:
        """The same node, computing in another dtype."""
        return _NnxNode(self._create, self._given, dtype).functions

    def init(self, rng: jax.Array, images: jax.Array) -> tuple[PyTree, PyTree]:
        from flax import nnx

        module = self._made(nnx.Rngs(rng))  # which knows its shapes
        has_flags = any(isinstance(value, bool) for value in self._call.defaults.values())
        if self._flags is None and has_flags:
            jax.eval_shape(self._check_mode, *_split(self._abstract), images)
        return _split(module)

    def apply(
        self, params: PyTree, model_state: PyTree, images: jax.Array, train: bool
    ) -> tuple[jax.Array, PyTree]:
        def logits_of(module: Any) -> jax.Array:
            return self._run(module, images, train)

        return self._passed(params, model_state, train, logits_of)

    def stages(
        self, params: PyTree, model_state: PyTree, images: jax.Array, train: bool
    ) -> tuple[Outputs, PyTree]:
        from flax import nnx

        def outputs_of(module: Any) -> Outputs:
            kind = nnx.Intermediate
            run = nnx.capture(lambda m: self._run(m, images, train), kind, method_outputs=kind)
            logits, captured = run(module)
            calls = {
                ".".join(map(str, path[:-1])): values[-1]
                for path, values in _by_path(nnx.as_pure(captured)).items()
                if path[-1] == "__call__"
            }
            check_found(self._name, self._stages, tuple(calls))
            return Outputs(logits, tuple(calls[path] for path in self._stages))

        return self._passed(params, model_state, train, outputs_of)

    def fed_stages(
        self,
        params: PyTree,
        model_state: PyTree,
        images: jax.Array,
        inputs: Sequence[jax.Array | None],
        train: bool,
    ) -> tuple[Outputs, PyTree]:
        def run(passages: Passages, params: PyTree, model_state: PyTree) -> Any:
            def outputs_of(module: Any) -> Outputs:
                places: dict[int, jax.Array] = {}
                with _watched(module, self._stages, passages, places.__setitem__):
                    logits = self._run(module, images, train)
                return Outputs(logits, tuple(places[place] for place in sorted(places)))

            return self._passed(params, model_state, train, outputs_of)

        return fed(self._name, (params, model_state), inputs, run, self._stages)

    def _made(self, rngs: "nnx.Rngs") -> "nnx.Module":
        from flax import nnx

        module = self._create(rngs=rngs)
        for _, each in nnx.iter_modules(module) if self._dtype is not None else ():
            if getattr(each, "dtype", self) in (None, jnp.float32):
                each.dtype = self._dtype  # type: ignore[attr-defined]
        return module

    def _found_stages(self) -> tuple[str, ...]:
        """The paths of the stages that were given, or else of those so named; they are there."""
        from flax import nnx

        paths = [".".join(map(str, path)) for path, _ in nnx.iter_modules(self._abstract)]
        if self._given is not None:
            check_found(self._name, self._given, paths)
            return self._given
        named = {path: stage_number([path]) for path in paths if re.fullmatch(r"stage\d+", path)}
        return tuple(sorted(named, key=lambda path: named[path] or 0))

    def _passed(
        self,
        params: PyTree,
        model_state: PyTree,
        train: bool,
        output_of: Callable[[Any], Any],
    ) -> tuple[Any, PyTree]:
        """What a module of these variables puts out, and its state after that."""
        from flax import nnx

        module = nnx.merge(self._graphdef, params, model_state)
        if not train:
            return output_of(module), model_state
        with _own_numbers(module):
            output = output_of(module)
        return output, _split(module)[1]

    def _run(self, module: Any, images: jax.Array, train: bool) -> jax.Array:
        _set_mode(module, train)
        logits: jax.Array = module(images, **(self._flags(train) if self._flags else {}))
        return logits

    def _check_mode(self, params: PyTree, model_state: PyTree, images: jax.Array) -> None:
        from flax import nnx

        module = nnx.merge(self._graphdef, params, model_state)
        dropout = [m for _, m in nnx.iter_modules(module) if isinstance(m, nnx.Dropout) and m.rate]
        watched = {"batch statistics": nnx.BatchStat, "dropout": nnx.RngCount if dropout else ()}
        was = {kind: _leaves(module, variables) for kind, variables in watched.items()}
        self._run(module, images, True)
        for kind, variables in watched.items():
            now = _leaves(module, variables)
            if now and all(a is b for a, b in zip(was[kind], now, strict=True)):
                what = f"{kind} that training leaves as they are"
                raise unknown_mode(self._name, what, _TELL_IT)


def _split(module: "nnx.Module") -> tuple[PyTree, PyTree]:
    from flax import nnx

    # Plain arrays: an nnx.Variable remembers the trace it was made in, and may not leave it.
    params, model_state = nnx.state(module, nnx.Param), nnx.state(module, nnx.Not(nnx.Param))
    return nnx.as_pure(params), nnx.as_pure(model_state)


def _by_path(tree: Any) -> dict[tuple[Any, ...], Any]:
    """The leaves of nested mappings, tuples among them, by their keys."""
    if not isinstance(tree, Mapping):
        return {(): tree}
    return {
        (key, *path): leaf for key, inner in tree.items() for path, leaf in _by_path(inner).items()
    }


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
def _watched(
    module: "nnx.Module", paths: Sequence[str], passages: Passages, keep: Keep
) -> Iterator[None]:
    """Within it, the submodules of these paths, a stage each, are called by way of `passages`."""
    from flax import nnx

    found = {".".join(map(str, path)): each for path, each in nnx.iter_modules(module)}
    classes = [type(found[path]) for path in paths]
    for stage, (path, own) in enumerate(zip(paths, classes, strict=True)):
        found[path].__class__ = _called_by(own, partial(passages.call, stage, keep))
    yield
    for path, own in zip(paths, classes, strict=True):
        found[path].__class__ = own


def _called_by(own: Any, caller: Callable[..., Any]) -> Any:
    """A class like a module's own, whose calls `caller` makes."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return caller(partial(own.__call__, self, **kwargs), *args)

    return type(own)(own.__name__, (own,), {"__call__": call})


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
