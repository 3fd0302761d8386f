"""A node from a flax.linen module."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import errors
from flax.traverse_util import flatten_dict
from jax.ad_checkpoint import checkpoint_name

from ktg_jax.errors import InputError
from ktg_jax.models import streams
from ktg_jax.models.fed import Passages, fed, without_stages
from ktg_jax.models.modes import Call, Mode, known_flags, said_flags, unknown_mode
from ktg_jax.models.network import (
    BLOCK,
    NodeFns,
    PyTree,
    check_found,
    checked_stages,
    stage_number,
)
from ktg_jax.models.streams import STREAM
from ktg_jax.outputs import Outputs

_SAY_IT = (
    "say it to ktg.from_linen or ktg.register_model: mode='name', or mode=lambda train: {'name': "
    "value}, with {} where there is nothing to tell it"
)
_PLACE = "passed on at place "
"""What sown values of `fed_stages` are named, with the number of the place."""
_DEFAULT_STREAM = "params"
"""flax's name for the stream that serves where a module asks for one that it was not given."""


def from_linen(
    module: nn.Module,
    *,
    mode: Mode | None = None,
    rngs: Sequence[str] | None = None,
    axis_name: str | None = None,
    stages: Sequence[str] | None = None,
) -> NodeFns:
    """A node from a flax.linen module, called as `module(images)` -> logits, and told its mode.

    All collections other than `params` are the model state. A module that draws random numbers in
    training, as dropout does, has a stream of its own there, `random_stream`: a key, folded from
    `init`'s, and the number of training passes so far.

    Submodules named `stage<g>` or `stage<g>_...` make up stage g. Its output is that of the one
    among them that is called last (of each, the last call).

    Args:
        module: a flax.linen module.
        mode: how it is told whether it trains. None: by each flag of a known name that its call
            takes (`train`, `training`, `is_training`; or, False in training, `deterministic`,
            `use_running_average`, `eval`, `inference`, ...), else by its fields of such names. A
            name: that of the argument, or field, that is True in training. A function of `train`:
            it returns all arguments and fields to be set; `lambda train: {}` for a module that is
            to be told nothing.
        rngs: names of the streams that it draws from in training; `()`: none. None: found by
            tracing it; it is then given `dropout`, and a stream for each other name that it asks
            for without asking first whether it has it.
        axis_name: a mapped axis over which batches are spread, for those who call `apply`
            themselves: each device then draws other numbers. `train_step` says it by itself.
        stages: in place of those names, the paths of the submodules whose outputs are the stages',
            in their order: `encoder.block_3`. None: by their names.

    Raises:
        InputError: paths that are no texts, a call that needs other arguments, or a `mode` that
            names none of them. `init` raises it, too: of a module that is told no mode, some state
            of which a training pass leaves as it is, whose dropout does nothing in training, or
            which cannot be evaluated.

    >>> fns = from_linen(nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(10)]))
    >>> params, state = fns.init(jax.random.key(0), jax.numpy.zeros((1, 8, 8, 1)))
    >>> params["layers_1"]["kernel"].shape
    (64, 10)
    """
    paths = checked_stages(stages)
    node = _LinenNode(module, mode, rngs, axis_name, paths)
    return NodeFns(node.init, node.apply, node.stages, node.fed_stages, paths)


class _Told(NamedTuple):
    """A module, told a mode, and the arguments of its call that tell the rest."""

    module: nn.Module
    arguments: dict[str, Any]


class _LinenNode:
    """See `from_linen`."""

    def __init__(
        self,
        module: nn.Module,
        mode: Mode | None,
        rngs: Sequence[str] | None,
        axis_name: str | None,
        stages: tuple[str, ...] | None,
    ) -> None:
        self._stages = stages
        self._name = type(module).__name__
        self._told, self._is_told = _told_modes(module, mode)
        self._draws = None if rngs is None else bool(rngs)
        self._rngs = (_DEFAULT_STREAM, *(("dropout",) if rngs is None else rngs))
        self._axis_name = axis_name
        self._found: dict[Any, bool] = {}  # whether it draws, by the images' shape and dtype

    def init(self, rng: jax.Array, images: jax.Array) -> tuple[PyTree, PyTree]:
        # Lazily: layer by layer, without running the network. Compiled whole, the initialisation
        # of a deep one takes as long as its training step.
        shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
        module, arguments = self._told[False]
        variables = dict(module.lazy_init(rng, shape, **arguments))
        params = variables.pop("params", {})
        if self._draws_in_training(params, variables, shape):
            variables[STREAM] = streams.new_stream(rng)
        return params, variables

    def apply(
        self, params: PyTree, model_state: PyTree, images: jax.Array, train: bool
    ) -> tuple[jax.Array, PyTree]:
        return self._run(params, model_state, images, train)

    def stages(
        self, params: PyTree, model_state: PyTree, images: jax.Array, train: bool
    ) -> tuple[Outputs, PyTree]:
        paths = self._stages
        wanted = _is_stage if paths is None else functools.partial(_is_named, paths)
        capture = {"capture_intermediates": wanted}
        logits, captured = self._run(params, model_state, images, train, **capture)
        outputs: dict[int, jax.Array] = {}  # in the order of the calls: a stage's last one stays
        for path, calls in flatten_dict(captured.pop("intermediates", {})).items():
            if path[-1] == "__call__":
                stage = stage_number(path) if paths is None else paths.index(".".join(path[:-1]))
                outputs[stage or 0] = calls[-1]
        if paths is not None:
            check_found(self._name, paths, [paths[stage] for stage in outputs])
        if not outputs:
            raise without_stages(self._name)
        in_order = tuple(outputs[stage] for stage in sorted(outputs))
        return Outputs(logits, in_order), captured if train else model_state

    def fed_stages(
        self,
        params: PyTree,
        model_state: PyTree,
        images: jax.Array,
        inputs: Sequence[jax.Array | None],
        train: bool,
    ) -> tuple[Outputs, PyTree]:
        def run(passages: Passages, params: PyTree, model_state: PyTree) -> tuple[Any, PyTree]:
            def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
                stage = self._stage_of(context.module, context.method_name)

                def keep(place: int, made: jax.Array) -> None:
                    # Sown: it may lie within a lifted transformation, such as nn.remat's.
                    context.module.sow("intermediates", f"{_PLACE}{place}", made)

                return passages.call(stage, keep, functools.partial(call, **kwargs), *args)

            with nn.intercept_methods(intercept):
                capture = {"capture_intermediates": lambda *_: False}
                return self._run(params, model_state, images, train, **capture)

        logits, captured = fed(self._name, (params, model_state), inputs, run, self._stages)
        sown = flatten_dict(captured.pop("intermediates"))
        places = {path[-1]: calls[0] for path, calls in sown.items() if path[-1].startswith(_PLACE)}
        in_order = tuple(places[f"{_PLACE}{place}"] for place in range(len(places)))
        return Outputs(logits, in_order), captured if train else model_state

    def _stage_of(self, submodule: nn.Module, method: str) -> int | None:
        """The stage that a call is of; None: of none."""
        if self._stages is not None:
            is_one = _is_named(self._stages, submodule, method)
            return self._stages.index(".".join(submodule.path)) if is_one else None
        return stage_number(submodule.path[-1:]) if _is_stage(submodule, method) else None

    def _name_blocks(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Calls a module's method; what the submodules of stages put out is named `BLOCK`."""
        made = call(*args, **kwargs)
        if self._stage_of(context.module, context.method_name) is None:
            return made
        return jax.tree.map(lambda x: checkpoint_name(x, BLOCK), made)

    def _run(
        self, params: PyTree, model_state: PyTree, images: jax.Array, train: bool, **capture: Any
    ) -> tuple[Any, Any]:
        """What the module returns, and the model state after it, with what is captured."""
        module, arguments = self._told[bool(train)]
        collections = streams.without_stream(model_state)
        stream = model_state.get(STREAM) if train else None
        with nn.intercept_methods(self._name_blocks):
            output, mutated = module.apply(
                {"params": params, **collections},
                images,
                **arguments,
                **capture,
                mutable=[*(collections if train else ()), *(("intermediates",) if capture else ())],
                rngs=stream and streams.keys_of(stream, self._rngs, self._axis_name),
            )
        after = {STREAM: streams.advanced(stream)} if stream else {}
        return output, {**mutated, **after} if train or capture else model_state

    def _draws_in_training(
        self, params: PyTree, collections: dict[str, Any], images: jax.ShapeDtypeStruct
    ) -> bool:
        """Whether it draws random numbers; raises InputError where its mode must be said."""
        if self._is_told and self._draws is not None:
            return self._draws
        key = images.shape, images.dtype
        if key not in self._found:
            self._found[key] = self._traced(params, collections, images)
        return self._found[key] if self._draws is None else self._draws

    def _traced(
        self, params: PyTree, collections: dict[str, Any], images: jax.ShapeDtypeStruct
    ) -> bool:
        inputs, seen = (*_shapes((params, collections)), images), _Seen()
        try:
            draws = self._draws_with_streams_alone(inputs, seen)
        except Exception:
            return False  # a module that cannot be trained so says it when it is
        if not self._is_told:
            if found := seen.idle:
                raise unknown_mode(self._name, found, _SAY_IT)
            self._check_evaluation(inputs)
        return draws

    def _draws_with_streams_alone(self, inputs: tuple[Any, ...], seen: "_Seen") -> bool:
        """Whether a training pass draws numbers that it cannot draw without streams."""
        axis = self._axis_name or getattr(self._told[True].module, "axis_name", None)
        axes = [(axis, 1)] if isinstance(axis, str) else None

        def training(params: PyTree, collections: Any, images: jax.Array, rngs: Any) -> None:
            module, arguments = self._told[True]
            inputs = {"params": params, **collections}, images
            with nn.intercept_methods(seen.intercept):
                _, after = module.apply(*inputs, **arguments, mutable=list(collections), rngs=rngs)
            seen.compare(collections, after)

        def draws(rngs: Any) -> int:
            return _draws(jax.make_jaxpr(training, axis_env=axes)(*inputs, rngs).jaxpr)

        with_streams = draws(dict.fromkeys(self._rngs, jax.eval_shape(lambda: jax.random.key(0))))
        try:
            return with_streams > 0 and with_streams > draws(None)
        except errors.InvalidRngError:
            return True

    def _check_evaluation(self, inputs: tuple[Any, ...]) -> None:
        """Raises InputError of a module, told no mode, that evaluates as if it trained."""
        try:
            jax.eval_shape(lambda *v: self._run(v[0], v[1], v[2], False)[0], *inputs)
        except errors.InvalidRngError:
            raise unknown_mode(self._name, "random numbers in evaluation", _SAY_IT) from None
        except errors.ModifyScopeVariableError:
            raise unknown_mode(self._name, "a state that changes in evaluation", _SAY_IT) from None
        except Exception:
            return  # as above


class _Seen:
    """What is seen of a training pass as it is traced."""

    def __init__(self) -> None:
        self._unchanged: list[str] = []
        self._at_work: dict[str, list[bool]] = {}  # of each call of a layer, by its kind

    @property
    def idle(self) -> str | None:
        """What does not do in training what it is there for, in words; None: all does."""
        if self._unchanged:
            return f"{self._unchanged[0]} that training leaves as they are"
        idle = [kind for kind, calls in self._at_work.items() if not any(calls)]
        return f"{idle[0]} that is idle in training" if idle else None

    def intercept(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Calls a module's method."""
        made, layer = call(*args, **kwargs), context.module
        if isinstance(layer, nn.Dropout) and layer.rate > 0:
            at_work = made is not (args[0] if args else kwargs.get("inputs"))
            self._at_work.setdefault("dropout", []).append(at_work)
        if isinstance(layer, nn.BatchNorm):
            said = args[1] if len(args) > 1 else kwargs.get("use_running_average")
            stored = layer.use_running_average if said is None else said
            self._at_work.setdefault("batch normalisation", []).append(not stored)
        return made

    def compare(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Compares the collections of traced arrays."""
        for name in before:
            was, now = jax.tree.leaves(before[name]), jax.tree.leaves(after[name])
            if was and all(a is b for a, b in zip(was, now, strict=False)):
                self._unchanged.append(name)


def _told_modes(module: nn.Module, mode: Mode | None) -> tuple[dict[bool, _Told], bool]:
    """The module told that it trains (True) and that it does not; and whether it is told at all."""
    call, name = Call(module.__call__), type(module).__name__
    fields = {
        field.name: getattr(module, field.name)
        for field in dataclasses.fields(module)
        if field.name not in ("parent", "name")
    }
    flags = (
        said_flags(mode) if mode is not None else known_flags(call.defaults) or known_flags(fields)
    )
    told = {}
    for train in (True, False):
        arguments: dict[str, Any] = {}
        changed: dict[str, Any] = {}
        for flag, value in (flags(train) if flags else {}).items():
            if flag in call.defaults or (call.takes_any and flag not in fields):
                arguments[flag] = value
                # A field of the same name is another way to say it: flax refuses both at once.
                if call.defaults.get(flag) is None and fields.get(flag) is not None:
                    changed[flag] = None
            elif flag in fields:
                changed[flag] = value
            else:
                raise InputError("mode", flag, f"an argument of the call of {name}, or its field")
        call.check(name, arguments, _SAY_IT)
        told[train] = _Told(module.clone(**changed) if changed else module, arguments)
    return told, flags is not None


def _draws(jaxpr: Any) -> int:
    """How often a traced function draws random numbers, in functions within it, too."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name in ("random_bits", "random_unwrap")
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            count += _draws(inner) if hasattr(inner, "eqns") else 0
    return count


def _is_stage(submodule: nn.Module, method: str) -> bool:
    *outer, name = submodule.path or ("",)
    inside = stage_number(outer) is not None
    return method == "__call__" and stage_number([name]) is not None and not inside


def _is_named(paths: tuple[str, ...], submodule: nn.Module, method: str) -> bool:
    return method == "__call__" and ".".join(submodule.path) in paths


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
