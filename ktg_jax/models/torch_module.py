"""PyTorch modules on the host, as sources of recordings (PyTorch is imported where it is used)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ktg_jax.errors import InputError
from ktg_jax.inputs import Input, checked_input, resolved_input
from ktg_jax.models.input import as_wanted


def from_torch(
    module: Any, input: "str | Input | dict[str, Any] | None" = None
) -> Callable[[np.ndarray], np.ndarray]:
    """A module of PyTorch as a function of images, which `record_host` can record.

    The module runs in PyTorch, in evaluation mode and without gradients, where its parameters are.
    It cannot be a node that runs beside others in JAX: torchax, which would translate it, does not
    go with current releases of PyTorch (0.0.13 with 2.13 and 2.14).

    Args:
        module: a `torch.nn.Module` of images float32 `[B, C, H, W]`; it is set to evaluate.
        input: how it wants its images, as of a node; None: from 0 to 1.

    Returns:
        A function of images float32 `[B, H, W, C]` in 0..1 that returns logits float32 `[B, C]`.

    Raises:
        InputError: no module, or an input that does not exist.

    >>> network = timm.create_model("resnet18", num_classes=10)  # doctest: +SKIP
    >>> outputs = from_torch(network, "imagenet")  # doctest: +SKIP
    >>> ktg.record_host(outputs, stream, "recordings/resnet18", steps=1000,
    ...                 classes=10)  # doctest: +SKIP
    """
    try:
        import torch  # it is optional, and takes a second
    except ModuleNotFoundError:
        allowed = 'a module of PyTorch, which is not installed: pip install "ktg_jax[torch]"'
        raise InputError("module", type(module).__name__, allowed) from None
    if not isinstance(module, torch.nn.Module):
        raise InputError("module", type(module).__name__, "a torch.nn.Module")
    wanted = Input() if input is None else resolved_input(checked_input("input", input))
    parameters = next(iter(module.parameters()), None)
    where = "cpu" if parameters is None else parameters.device
    see = jax.jit(lambda images: as_wanted(images, wanted))
    module.eval()

    def outputs(images: np.ndarray) -> np.ndarray:
        seen = np.array(see(jnp.asarray(images, jnp.float32)).transpose(0, 3, 1, 2))
        with torch.no_grad():
            logits = module(torch.from_numpy(seen).to(where))
        return np.asarray(logits.float().cpu().numpy())

    return outputs
