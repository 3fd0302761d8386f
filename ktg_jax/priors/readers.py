"""Readers: what was fitted to a teacher's stages, and the teacher seen through it.

Of a reader, the kernel of its downscaling convolution is the prior. The whole of it is a projection
on the teacher's side: through it a teacher's stage outputs have the shape of the student's, so that
features can be compared (`feature_transfer_loss`) where kernels are not. Ours, to compare.
"""

import json
import os
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from ktg_jax.errors import InputError
from ktg_jax.io.tensors import read_tensors, texts_of, write_tensors
from ktg_jax.io.trees import FlatTree, digest, flatten
from ktg_jax.models.layers import CLASSIFIER_INIT, CONV_INIT, BatchNormRelu, conv
from ktg_jax.models.network import NodeFns, PyTree
from ktg_jax.outputs import Outputs
from ktg_jax.priors.prior import Prior

READERS_FILE = "readers.safetensors"
"""The file's name, where a folder is given."""

_FORMAT = "ktg_jax readers 1"


class Aggregator(nn.Module):
    """What reads a stage of the teacher: 1x1 reduction, downscaling convolution, auxiliary head.

    Normalisation and ReLU stand on both sides of the downscaling convolution, as they do around
    the student's. Without them the stage would be read linearly, and since the head averages over
    positions, only the sum of a kernel over its positions would be fitted.

    Attributes:
        kernel_shape: (height, width, in, out) of the downscaling convolution.
        num_classes: number of logits.
        stride: the stride of the downscaling convolution.
    """

    kernel_shape: tuple[int, ...]
    num_classes: int
    stride: int = 1

    @nn.compact
    def __call__(self, output: jax.Array, train: bool, with_head: bool = True) -> jax.Array:
        """Maps a stage's output, float `[B, h, w, C]`, to logits, float32 `[B, num_classes]`.

        Without the head to what that averages, float32 `[B, h', w', out]`.
        """
        *size, width, features = self.kernel_shape
        x = conv(width, 1, dtype=jnp.float32, name="reduction")(output.astype(jnp.float32))
        x = BatchNormRelu(name="reduction_norm")(x, train)
        x = nn.Conv(
            features,
            size,
            (self.stride, self.stride),
            padding=[((side - 1) // 2, side // 2) for side in size],
            use_bias=False,
            kernel_init=CONV_INIT,
            name="downscaling",
        )(x)
        x = BatchNormRelu(name="downscaling_norm")(x, train)
        if not with_head:
            return x
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, kernel_init=CLASSIFIER_INIT, name="head")(x)


@flax.struct.dataclass
class Readers:
    """Fitted aggregators, one a stage of the teacher. A pytree.

    Attributes:
        modules: static.
        variables: each one's `params` and `batch_stats`.
        accuracy: float32 `[G]`, how well each classified.
    """

    modules: tuple[Aggregator, ...] = flax.struct.field(pytree_node=False)
    variables: tuple[PyTree, ...]
    accuracy: jax.Array

    def prior(self, paths: tuple[str, ...]) -> Prior:
        """Their kernels, as a prior of the student's parameters of these paths."""
        kernels = (stage["params"]["downscaling"]["kernel"] for stage in self.variables)
        return Prior(tuple(kernels), paths, self.accuracy)


def projected(teacher: NodeFns, readers: Readers) -> NodeFns:
    """A teacher whose stage outputs are what its readers' heads average: of the student's shapes.

    Args:
        teacher: the network that the readers were fitted to.
        readers: run with their stored statistics; the closure holds them.

    Returns:
        The same network but for `NodeFns.stages`.

    Raises:
        InputError: a network that does not name its stages; its functions, other stages.
    """
    if teacher.stages is None:
        raise InputError("stages", None, "a network that names its stages (NodeFns.stages)")
    whole_stages = teacher.stages

    def stages(
        params: PyTree, model_state: PyTree, images: jax.Array, train: bool
    ) -> tuple[Outputs, PyTree]:
        (logits, outputs), model_state = whole_stages(params, model_state, images, train)
        if len(outputs) != len(readers.modules):
            allowed = f"{len(outputs)}, as many as the network has stages"
            raise InputError("readers", len(readers.modules), allowed)
        seen = []
        for module, variables, output in zip(
            readers.modules, readers.variables, outputs, strict=True
        ):
            features: Any = module.apply(variables, output, False, False)
            seen.append(features)
        return Outputs(logits, tuple(seen)), model_state

    return NodeFns(teacher.init, teacher.apply, stages)


def save_readers(path: str | os.PathLike[str], readers: Readers) -> None:
    """Writes readers as a safetensors file: tensors and text, reading it executes nothing.

    Raises:
        InputError: a file that cannot be written.
    """
    tensors = {
        f"{stage}.{name}": array
        for stage, variables in enumerate(readers.variables)
        for name, array in flatten(variables).items()
    }
    modules = [[m.kernel_shape, m.num_classes, m.stride] for m in readers.modules]
    texts = {
        "format": _FORMAT,
        "modules": json.dumps(modules),
        "accuracy": json.dumps([float(a) for a in readers.accuracy]),
        "checksum": str(digest(tensors)),
    }
    write_tensors(path, "readers", tensors, texts)


def load_readers(path: str | os.PathLike[str]) -> Readers:
    """Reads what `save_readers` wrote.

    Args:
        path: the file, or a folder with a `readers.safetensors`.

    Raises:
        InputError: a file that cannot be read, is damaged, or holds no readers.
    """
    tensors, texts = _read(path)
    variables = unflatten_dict(
        {tuple(name.split(".")): jnp.asarray(array) for name, array in tensors.items()}
    )
    with texts_of("projection", path, "save_readers"):
        modules = [(tuple(shape), *rest) for shape, *rest in json.loads(texts["modules"])]
        return Readers(
            modules=tuple(Aggregator(*fields) for fields in modules),
            variables=tuple(variables[str(stage)] for stage in range(len(modules))),
            accuracy=jnp.asarray(json.loads(texts["accuracy"]), jnp.float32),
        )


def readers_checksum(path: str | os.PathLike[str]) -> str:
    """What tells one file of readers from another; arguments and errors as for `load_readers`."""
    return _read(path)[1]["checksum"]


def _read(path: str | os.PathLike[str]) -> tuple[FlatTree, dict[str, str]]:
    tensors, texts = read_tensors(path, "projection", READERS_FILE)
    if texts.get("format") != _FORMAT or texts.get("checksum") != str(digest(tensors)):
        raise InputError("projection", str(path), "an undamaged file that save_readers wrote")
    return tensors, texts
