"""The form in which outputs are stored: all logits, or the largest and the rest's mass."""

from collections.abc import Mapping

import numpy as np

from ktg_jax.errors import InputError
from ktg_jax.recording.header import Header

Tensors = dict[str, np.ndarray]


def encoded(header: Header, logits: np.ndarray) -> Tensors:
    """The tensors that stand for logits, float `[..., C]`, in the header's form.

    Raises:
        InputError: another number of classes, NaN or +inf, or a number that float16 cannot hold.
    """
    logits = np.asarray(logits, np.float32)
    if logits.shape[-1:] != (header.classes,):
        raise InputError("logits", logits.shape, f"[..., {header.classes}], one a class")
    if not np.all(logits < np.inf):
        raise InputError("logits", float(np.max(logits)), "numbers below infinity")
    if header.top is None:
        return {"logits": _stored(header, logits)}
    order = np.argsort(-logits, axis=-1, kind="stable")
    kept = order[..., : header.top]
    log_probability = logits - _log_sum(logits)[..., None]
    rest = np.take_along_axis(log_probability, order[..., header.top :], axis=-1)
    index = np.uint16 if header.classes <= 2**16 else np.uint32
    return {
        "classes": kept.astype(index),
        "log_probabilities": _stored(header, np.take_along_axis(log_probability, kept, axis=-1)),
        "log_rest": _stored(header, _log_sum(rest)),
    }


def decoded(header: Header, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The logits that tensors stand for, float32 `[..., C]`.

    Of the largest alone they are logarithms of probabilities, the rest's mass in equal parts. A
    softmax at temperature 1 has the stored probabilities.
    """
    if header.top is None:
        return tensors["logits"].astype(np.float32)
    each = tensors["log_rest"].astype(np.float32) - np.log(header.classes - header.top)
    logits = np.repeat(each[..., None], header.classes, axis=-1).astype(np.float32)
    kept = tensors["log_probabilities"].astype(np.float32)
    np.put_along_axis(logits, tensors["classes"].astype(np.int64), kept, axis=-1)
    return logits


def _log_sum(values: np.ndarray) -> np.ndarray:
    """The logarithm of the sum of exponentials over the last axis."""
    largest = np.max(values, axis=-1, keepdims=True)
    safe = np.where(np.isfinite(largest), largest, 0.0)
    with np.errstate(divide="ignore"):  # of nothing it is -inf
        total = np.log(np.sum(np.exp(values - safe), axis=-1))
    return np.asarray(total + safe[..., 0], np.float32)


def _stored(header: Header, values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = values.astype(header.dtype)
    lost = np.isinf(stored) & np.isfinite(values)
    if lost.any():
        largest = float(np.max(np.abs(values[lost])))
        raise InputError("dtype", header.dtype, f"float32: there are logits of {largest:g}")
    return stored
