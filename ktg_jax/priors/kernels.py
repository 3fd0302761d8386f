"""Priors without fitting: a teacher's own kernels, reduced to a student's shape.

Ours, to compare with `aggregate_prior`. Stage by stage: all kernels of a stage that have the shape
of its last one make a bank of filters; the bank's input channels, then its filters, are reduced to
the student's number by truncated SVD or by clustering. Layer by layer: each of the student's
convolutions has one of the teacher's for itself, reduced by SVD; what KR says accumulates residuals
with depth, and aggregation avoids.
"""

from collections.abc import Callable, Iterable, Iterator

import jax.numpy as jnp
import numpy as np

from ktg_jax.errors import InputError
from ktg_jax.models.network import PyTree, stage_number
from ktg_jax.priors.prior import Prior
from ktg_jax.priors.stages import (
    KernelShapes,
    last_of_stage,
    layers_of,
    stage_convolutions,
)

Reduction = Callable[[np.ndarray, int], np.ndarray]


def svd_prior(teacher_params: PyTree, student_kernels: KernelShapes) -> Prior:
    """A prior of principal filters: a truncated SVD in each of two modes, channels in and out.

    The student's input channel j is the teacher's channels' j-th principal combination, and its
    filter i the i-th principal direction of all the stage's filters, as long as its singular value.
    What a narrower teacher has no further directions for is filled with zeros. On the host.

    Args:
        teacher_params: with stages that are named as for `stage_kernels`.
        student_kernels: from `stage_kernels(student's params)`, one for each stage of the teacher.

    Raises:
        InputError: the numbers of stages differ, or a stage's kernels in height and width.

    >>> kernel = np.zeros((1, 1, 2, 2))
    >>> kernel[0, 0] = [[3.0, 0.0], [0.0, 1.0]]
    >>> prior = svd_prior({"stage1": kernel}, {"stage1_conv.kernel": (1, 1, 2, 1)})
    >>> prior.kernels[0].ravel().tolist()
    [3.0, 0.0]
    """
    banks = _banks(teacher_params, student_kernels)
    return _reduced_prior(banks, student_kernels, _principal_rows)


def cluster_prior(teacher_params: PyTree, student_kernels: KernelShapes, seed: int = 0) -> Prior:
    """A prior of typical filters: k-means in each of two modes, channels in and out.

    The student's input channels are means of clusters of the teacher's channels, its filters means
    of clusters of all the stage's filters. Arguments and errors as for `svd_prior`.

    >>> kernel = np.array([[[[1.0, 3.0, -8.0]]]])
    >>> prior = cluster_prior({"stage1": kernel}, {"stage1_conv.kernel": (1, 1, 1, 2)})
    >>> sorted(prior.kernels[0].ravel().tolist())
    [-8.0, 2.0]
    """

    def centres(rows: np.ndarray, number: int) -> np.ndarray:
        from sklearn.cluster import KMeans  # takes a second: only where needed

        number = min(number, len(np.unique(rows, axis=0)))
        return KMeans(number, n_init=1, random_state=seed).fit(rows).cluster_centers_

    return _reduced_prior(_banks(teacher_params, student_kernels), student_kernels, centres)


def layer_prior(teacher_params: PyTree, student_kernels: KernelShapes) -> Prior:
    """A prior without aggregation: each of the student's layers resembles one of the teacher's.

    Of a stage with m layers in the student and n in the teacher, layer j speaks to layer
    ceil(j n / m), counted from 1: the one at the same depth. Its input channels, then its filters,
    are reduced by truncated SVD, as by `svd_prior`. On the host.

    Args:
        teacher_params: with stages that are named as for `stage_kernels`.
        student_kernels: from `layer_kernels(student's params)`.

    Raises:
        InputError: a layer outside of the teacher's stages, or kernels that differ in height and
            width.

    >>> teacher = {f"stage1_block{j}": np.full((3, 3, 1, 1), float(j)) for j in (1, 2, 3)}
    >>> prior = layer_prior(teacher, {"stage1_a": (3, 3, 1, 1), "stage1_b": (3, 3, 1, 1)})
    >>> [round(float(kernel[0, 0, 0, 0]), 3) for kernel in prior.kernels]
    [2.0, 3.0]
    """
    stages = {stage_number(next(iter(s)).split(".")): s for s in stage_convolutions(teacher_params)}
    of_stage: dict[int | None, list[str]] = {}
    for path in student_kernels:
        of_stage.setdefault(stage_number(path.split(".")), []).append(path)
    banks: dict[str, np.ndarray] = {}
    for number, paths in of_stage.items():
        if number not in stages:
            allowed = f"a layer in one of the teacher's {len(stages)} stages"
            raise InputError("student_kernels", paths[0], allowed)
        layers = layers_of(stages[number])
        for j, path in enumerate(paths, start=1):
            kernel = stages[number][layers[-(-j * len(layers) // len(paths)) - 1]]
            _check_size(path, student_kernels[path], kernel.shape)
            banks[path] = np.asarray(kernel, np.float64)
    in_order = [banks[path] for path in student_kernels]
    return _reduced_prior(in_order, student_kernels, _principal_rows)


def _reduced_prior(
    banks: Iterable[np.ndarray], student_kernels: KernelShapes, reduction: Reduction
) -> Prior:
    kernels = []
    for bank, shape in zip(banks, student_kernels.values(), strict=True):
        reduced = _reduce_axis(_reduce_axis(bank, 2, shape[2], reduction), 3, shape[3], reduction)
        kernels.append(jnp.asarray(reduced, jnp.float32))
    return Prior(tuple(kernels), tuple(student_kernels))


def _banks(teacher_params: PyTree, student_kernels: KernelShapes) -> Iterator[np.ndarray]:
    """Each stage's filters, float64 `[h, w, in, all out]`."""
    stages = stage_convolutions(teacher_params)
    if len(stages) != len(student_kernels):
        allowed = f"{len(stages)}, as many as the teacher has stages"
        raise InputError("student_kernels", len(student_kernels), allowed)
    for stage, (path, shape) in zip(stages, student_kernels.items(), strict=True):
        last = stage[last_of_stage(stage)]
        _check_size(path, shape, last.shape)
        alike = [np.asarray(k, np.float64) for k in stage.values() if k.shape == last.shape]
        yield np.concatenate(alike, axis=-1)


def _check_size(path: str, shape: tuple[int, ...], teacher_shape: tuple[int, ...]) -> None:
    if teacher_shape[:2] != shape[:2]:
        allowed = f"height and width of the teacher's, {teacher_shape[:2]}"
        raise InputError(f"student_kernels {path}", shape, allowed)


def _reduce_axis(array: np.ndarray, axis: int, number: int, reduction: Reduction) -> np.ndarray:
    """Reduces an axis to `number` entries, the array taken as a matrix with a row for each."""
    first = np.moveaxis(array, axis, 0)
    reduced = reduction(first.reshape(len(first), -1), number)
    filled = np.zeros((number, reduced.shape[1]))
    filled[: len(reduced)] = reduced
    return np.moveaxis(filled.reshape(number, *first.shape[1:]), 0, axis)


def _principal_rows(rows: np.ndarray, number: int) -> np.ndarray:
    """The first rows of S V^T of the SVD U S V^T, signed so that U's columns have positive sums."""
    left, values, right = np.linalg.svd(rows, full_matrices=False)
    signs = np.where(left.sum(axis=0) < 0, -1.0, 1.0)
    values = np.where(values > 1e-12 * values[0], values, 0)  # rounding has directions, too
    return (signs * values)[:number, None] * right[:number]
