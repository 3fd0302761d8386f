"""A student that starts as a part of its teacher: channels and blocks chosen, nothing fitted.

Ours, after weight selection (Xu et al., ICLR 2024): what decides is that the choice is the same
wherever a channel is written and read, so that the part is a network of its own. Place 0 is what
goes into the first stage, place g what comes out of stage g (`NodeFns.fed_stages`).
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ktg_jax.errors import InputError
from ktg_jax.io.trees import by_path, is_float, replaced
from ktg_jax.models.network import NodeFns, PyTree, stage_number
from ktg_jax.outputs import Outputs

Variables: TypeAlias = tuple[PyTree, PyTree]
"""The parameters of a network, and its model state."""

Channels: TypeAlias = tuple[np.ndarray, ...]
"""For each place int `[d_g]`: the teacher's channels that the student's stand for."""


def passed_on(
    fns: NodeFns,
    variables: Variables,
    images: jax.Array,
    inputs: Sequence[jax.Array | None] = (),
    train: bool = False,
) -> tuple[Outputs, PyTree]:
    """What a network passes on at each of its G + 1 places, beside its logits.

    Args:
        fns: the network.
        variables: its parameters and model state.
        images: float `[B, H, W, C]`.
        inputs: G + 1 arrays that are passed on in place of the network's own, or None, which is
            its own; or nothing.
        train: whether it is run as in training.

    Returns:
        The outputs, whose stages are what it made itself at each place, float `[B, h, w, C]`, and
        the new model state.

    Raises:
        InputError: a network that cannot be fed, or has no stages; inputs that do not fit.
    """
    if fns.fed_stages is None:
        allowed = "a network that can be fed between its stages (ktg.from_linen, ktg.from_nnx)"
        raise InputError("fed_stages", None, allowed)
    return fns.fed_stages(*variables, images, inputs, train)


def output_shapes(fns: NodeFns, variables: Variables, image_shape: Sequence[int]) -> Outputs:
    """The shapes of what `passed_on` gives for one image; arguments and errors as `place_shapes`.

    >>> import ktg_jax as ktg
    >>> fns = ktg.build_model("cnn", num_classes=10)
    >>> variables = jax.eval_shape(fns.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    >>> output_shapes(fns, variables, (8, 8, 1)).logits.shape
    (1, 10)
    """
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(lambda v, x: passed_on(fns, v, x)[0], variables, image)


def place_shapes(
    fns: NodeFns, variables: Variables, image_shape: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """The (height, width, channels) that a network passes on at each of its G + 1 places.

    Args:
        fns: a network with `NodeFns.fed_stages`.
        variables: its own; arrays or their shapes.
        image_shape: (height, width, channels).

    Raises:
        InputError: a network that cannot be fed, or has no stages.

    >>> import ktg_jax as ktg
    >>> fns = ktg.build_model("resnet8", num_classes=10)
    >>> variables = jax.eval_shape(fns.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> place_shapes(fns, variables, (32, 32, 3))
    ((32, 32, 16), (32, 32, 16), (16, 16, 32), (8, 8, 64))
    """
    places = output_shapes(fns, variables, image_shape).stages
    return tuple(tuple(place.shape[1:]) for place in places)


def select_channels(teacher: Sequence[int], student: Sequence[int]) -> Channels:
    """Chooses for each of a student's channels one of the teacher's, evenly, place by place.

    Where both grow from one place to the next, the channels of the former place are kept and the
    new ones chosen among the new: so shortcuts without parameters, which pad with zeros (option A),
    lead on what was chosen before.

    Args:
        teacher: the number of channels at each place, c_0 ... c_G.
        student: likewise, d_0 ... d_G.

    Raises:
        InputError: another number of stages, or a student that is wider at a place.

    >>> [chosen.tolist() for chosen in select_channels((4, 4, 8), (2, 2, 4))]
    [[0, 2], [0, 2], [0, 2, 4, 6]]
    """
    check_places(len(teacher), len(student))
    chosen: list[np.ndarray] = []
    for place, (c, d) in enumerate(zip(teacher, student, strict=True)):
        if d > c:
            where = f"at most the teacher's {c} channels behind stage {place}"
            allowed = where if place else f"at most the teacher's {c} channels before stage 1"
            raise InputError("student", d, allowed)
        more_c, more_d = (c - teacher[place - 1], d - student[place - 1]) if place else (c, d)
        if place and more_c == more_d == 0:
            chosen.append(chosen[-1])
        elif place and 0 <= more_d <= more_c:
            chosen.append(np.concatenate([chosen[-1], c - more_c + evenly(more_c, more_d)]))
        else:
            chosen.append(evenly(c, d))
    return tuple(chosen)


def check_places(teacher: int, student: int) -> None:
    """Raises InputError unless both have as many places."""
    if teacher != student:
        raise InputError("student", f"{student - 1} stages", f"the teacher's {teacher - 1} stages")


def evenly(number: int, chosen: int) -> np.ndarray:
    """`chosen` of `number` indices at even distances, int `[chosen]`: floor(i number / chosen).

    >>> evenly(16, 3).tolist()
    [0, 5, 10]
    """
    return np.arange(chosen) * number // max(chosen, 1)


def select_start(
    teacher: Variables,
    student: Variables,
    channels: Sequence[np.ndarray],
    widths: Sequence[int],
    stages: Sequence[str] | None = None,
) -> Variables:
    """What a student starts from: the part of its teacher that the channels, and its depth, leave.

    Each of the student's arrays is taken from the teacher's of the same path, so a shallower
    student has the first blocks of each stage. Statistics of normalisation are taken, too. A dense
    layer behind the last stage, which reads the mean of d of c channels, is c / d times as large.

    Args:
        teacher: its parameters and model state.
        student: initial ones.
        channels: from `select_channels`.
        widths: the teacher's number of channels at each place.
        stages: `NodeFns.stage_paths` of both.

    Returns:
        The student's, in its own dtypes. What holds no floats (random streams) stays as it was.

    Raises:
        InputError: a student of another family, or deeper than the teacher: an array that the
            teacher does not have, or has of another rank.

    >>> import ktg_jax as ktg
    >>> networks = [ktg.build_model(name, 10) for name in ("resnet14", "resnet8_4")]
    >>> images = jnp.zeros((1, 8, 8, 3))
    >>> teacher, student = (fns.init(jax.random.key(0), images) for fns in networks)
    >>> widths = (16, 16, 32, 64)
    >>> params, _ = select_start(teacher, student, select_channels(widths, (4, 4, 8, 16)), widths)
    >>> whole = teacher[0]["stage1_block1"]["conv1"]["kernel"]
    >>> bool((params["stage1_block1"]["conv1"]["kernel"] == whole[:, :, ::4, ::4]).all())
    True
    """
    params, model_state = (
        replaced(own, _taken(by_path(own), by_path(whole), channels, widths, stages))
        for own, whole in zip(student, teacher, strict=True)
    )
    return params, model_state


def is_part_of(teacher: Variables, student: Variables, stages: Sequence[str] | None = None) -> bool:
    """Whether a student is of its teacher's family.

    It has no array that its teacher has not, of the same rank, and all that its teacher has but for
    whole blocks of stages: not, say, a block without its shortcut.

    Args:
        teacher: its parameters and model state; arrays or their shapes.
        student: likewise.
        stages: `NodeFns.stage_paths` of both.
    """
    pairs = [(by_path(own), by_path(whole)) for own, whole in zip(student, teacher, strict=True)]
    has_none_of_its_own = all(
        not is_float(leaf) or (path in whole and np.ndim(whole[path]) == np.ndim(leaf))
        for own, whole in pairs
        for path, leaf in own.items()
    )
    modules = {name for own, _ in pairs for path in own for name in _modules(path)}
    return has_none_of_its_own and all(
        path in own or _is_of_block(path, modules, stages) for own, whole in pairs for path in whole
    )


def _modules(path: str) -> list[str]:
    """The modules that an array is in, the outermost first; that of all, "", left out."""
    names = path.split(".")
    return [".".join(names[:n]) for n in range(1, len(names))]


def _is_of_block(path: str, modules: Collection[str], stages: Sequence[str] | None) -> bool:
    """Whether an array is of a block of a stage, none of which is among the modules."""
    around = [module for module in _modules(path) if module in modules]
    if stage_number(path.split("."), stages) is None:
        return False
    is_inside = bool(around) and stage_number(around[-1].split("."), stages) is not None
    return not is_inside or _is_whole_stage(around[-1], stages)


def _is_whole_stage(module: str, stages: Sequence[str] | None) -> bool:
    if stages is not None:
        return module in stages
    return re.fullmatch(r"stage\d+", module.split(".")[-1]) is not None


def _taken(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    channels: Sequence[np.ndarray],
    widths: Sequence[int],
    stages: Sequence[str] | None,
) -> dict[str, jax.Array]:
    """The student's arrays of floats by path, taken from the teacher's."""
    found = {}
    for path, own in student.items():
        if not is_float(own):
            continue
        if path not in teacher or np.ndim(teacher[path]) != np.ndim(own):
            allowed = "a student of the teacher's family, no deeper than it"
            raise InputError("student", path, f"{allowed} (which has no such parameter)")
        whole, stage = np.asarray(teacher[path]), stage_number(path.split("."), stages)
        places = (len(widths) - 1, 0) if stage is None else (stage, stage - 1)
        known = {(widths[g], len(channels[g])): channels[g] for g in reversed(places)}
        for axis, (c, d) in enumerate(zip(whole.shape, own.shape, strict=True)):
            if d > c:
                raise InputError(
                    f"student {path}", own.shape, f"at most {whole.shape} in each axis"
                )
            whole = np.take(whole, known.get((c, d), evenly(c, d)), axis)
        if stage is None and whole.ndim == 2:
            whole = whole * (teacher[path].shape[0] / whole.shape[0])
        found[path] = jnp.asarray(whole, own.dtype)
    return found
