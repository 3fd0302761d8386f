"""Which of our networks a state dict of PyTorch is of, where nobody says it."""

import os
import re
from collections.abc import Iterator

from ktg_jax.errors import InputError
from ktg_jax.io.tensors import read_tensors, read_texts
from ktg_jax.models.foreign import load_state_dict
from ktg_jax.models.pickles import refuse_pickle

_BLOCK = re.compile(r"(?:layer|stage|block)s?_?1\.(?:layer\.)?(\d+)\.")
_OTHERS = ("resnet18", "resnet34", "resnet50", "vgg8", "vgg13", "mobilenet_v2", "shufflenet_v2")


def model_of_state_dict(path: str | os.PathLike[str]) -> str:
    """The name of the first of our networks whose parts and shapes are the file's.

    Args:
        path: a `.safetensors` file of a state dict, in one of `LAYOUTS`.

    Raises:
        InputError: no safetensors file, or one of none of the networks that were tried: the file's
            own word (`model_name`), ResNets and WRNs by their number of blocks, and a few others.

    >>> import tempfile, jax, jax.numpy as jnp
    >>> from ktg_jax.models.foreign import save_state_dict
    >>> from ktg_jax.models.registry import build_model
    >>> network = build_model("resnet14", 10).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_state_dict(f"{folder}/a.safetensors", *network, "resnet14", "akamaster")
    ...     model_of_state_dict(f"{folder}/a.safetensors")
    'resnet14'
    """
    refuse_pickle(path)
    tried = list(dict.fromkeys(_likely(path)))
    for model in tried:
        try:
            load_state_dict(path, model)
        except InputError:
            continue
        return model
    allowed = f"the name of the model that {path} is of; none of {', '.join(tried)}"
    raise InputError("model", None, allowed)


def _likely(path: str | os.PathLike[str]) -> Iterator[str]:
    """Names of networks, the likely ones first."""
    said = read_texts(path, "weights").get("model_name")
    if said:
        yield said
    tensors, _ = read_tensors(path, "weights")
    blocks = {int(match[1]) for key in tensors if (match := _BLOCK.search(key))}
    widths = sorted({array.shape[0] for array in tensors.values() if array.ndim == 4})
    n = len(blocks)
    if n:
        yield f"resnet{6 * n + 2}"
        yield f"resnet{6 * n + 2}x4"
        for width in widths:
            yield f"resnet{6 * n + 2}_{width}"
            if width % 16 == 0:
                yield f"wrn{6 * n + 4}_{width // 16}"
    yield from _OTHERS
