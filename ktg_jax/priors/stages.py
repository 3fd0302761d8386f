"""A network's stages: what they put out, and their convolutions, found by name.

A parameter or submodule belongs to stage g if a name on its path is `stage<g>` or `stage<g>_...`,
as in the built-in models.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ktg_jax.errors import InputError
from ktg_jax.io.trees import by_path
from ktg_jax.models.network import NodeFns, PyTree, stage_number
from ktg_jax.models.pixels import check_floats
from ktg_jax.outputs import Outputs

KernelShapes = Mapping[str, tuple[int, ...]]
"""The (height, width, in, out) of a convolution of each stage, by the path of its parameter."""


def stage_outputs(fns: NodeFns, params: PyTree, model_state: PyTree, images: jax.Array) -> Outputs:
    """Runs a network with its stored statistics and keeps what its stages put out.

    Args:
        fns: the network; its `stages` must be there.
        params: its parameters.
        model_state: its model state, which stays as it is.
        images: float `[B, H, W, C]`.

    Returns:
        The logits, float `[B, classes]`, and a float `[B, h, w, C]` for each stage.

    Raises:
        InputError: images that are no floats, a network without `stages`, or with stage outputs of
            another rank.

    >>> import ktg_jax as ktg
    >>> fns, images = ktg.build_model("cnn", num_classes=10), jax.numpy.zeros((2, 8, 8, 1))
    >>> logits, outputs = stage_outputs(fns, *fns.init(jax.random.key(0), images), images)
    >>> [output.shape for output in outputs]
    [(2, 8, 8, 16), (2, 4, 4, 32), (2, 2, 2, 64)]
    """
    if fns.stages is None:
        raise InputError("stages", None, "a network that names its stages (NodeFns.stages)")
    check_floats(images)
    (logits, outputs), _ = fns.stages(params, model_state, images, False)
    for number, output in enumerate(outputs, start=1):
        if np.ndim(output) != 4:
            raise InputError(f"stage {number}", np.shape(output), "an output [B, h, w, C]")
    return Outputs(logits, tuple(outputs))


def stage_kernels(params: PyTree, paths: Sequence[str] | None = None) -> KernelShapes:
    """The convolution of each stage that a prior is to speak of, by default the last one.

    The last: by name, numbers within names counted as numbers; 1x1 convolutions (shortcuts) only
    where a stage has no others. In the built-in models it is `conv2` of the stage's last block, or
    `stage<g>_conv`.

    Args:
        params: arrays or their shapes (`jax.eval_shape`).
        paths: the kernel of each stage by its path, such as `stage1_block1.conv2.kernel`, where
            another one is wanted or the stages have other names.

    Returns:
        `{path: (height, width, in, out)}` in the order of the stages.

    Raises:
        InputError: no stages with convolutions, or a path that is no convolution's.

    >>> import ktg_jax as ktg
    >>> fns = ktg.build_model("cnn", num_classes=10)
    >>> params, _ = fns.init(jax.random.key(0), jax.numpy.zeros((1, 8, 8, 1)))
    >>> stage_kernels(params)["stage3_conv.kernel"]
    (3, 3, 32, 64)
    """
    convolutions = {path: leaf for path, leaf in by_path(params).items() if np.ndim(leaf) == 4}
    if paths is None:
        paths = [last_of_stage(stage) for stage in stage_convolutions(params)]
    for path in paths:
        if path not in convolutions:
            known = ", ".join(convolutions) or "none here"
            raise InputError("student layer", path, f"a convolution's kernel: {known}")
    return {path: tuple(convolutions[path].shape) for path in paths}


def stage_convolutions(
    params: PyTree, paths: Sequence[str] | None = None
) -> tuple[dict[str, Any], ...]:
    """All kernels `[h, w, in, out]` of each stage by path, in the order of their names.

    Args:
        params: arrays or their shapes.
        paths: `NodeFns.stage_paths`.

    Raises:
        InputError: no stages with convolutions.

    >>> kernel = np.zeros((3, 3, 2, 2))
    >>> stages = stage_convolutions({"stage1_block10": kernel, "stage1_block9": kernel})
    >>> [list(stage) for stage in stages]
    [['stage1_block9', 'stage1_block10']]
    """
    stages: dict[int, dict[str, Any]] = {}
    leaves = by_path(params)
    for path in sorted(leaves, key=_natural):
        stage = stage_number(path.split("."), paths)
        if stage is not None and np.ndim(leaves[path]) == 4:
            stages.setdefault(stage, {})[path] = leaves[path]
    if not stages:
        allowed = f"convolutions in {', '.join(paths or ('stage1_...', 'stage2_...'))}"
        raise InputError("params", sorted(leaves)[:3], allowed)
    return tuple(stages[stage] for stage in sorted(stages))


def last_of_stage(stage: Mapping[str, Any]) -> str:
    """The path of a stage's last convolution; of a shortcut (1x1) only if it has no others."""
    spatial = [path for path, kernel in stage.items() if kernel.shape[:2] != (1, 1)]
    return (spatial or list(stage))[-1]


def _natural(path: str) -> list[tuple[int, str]]:
    """Sorts names by the numbers in them: `block10` after `block9`."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", path)]
