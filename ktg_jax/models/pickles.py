"""Files that could run anything when they are read, and how to make others of them."""

import os
from pathlib import Path

from ktg_jax.errors import InputError
from ktg_jax.io.tensors import read_texts

_PICKLES = (".pth", ".pt", ".th", ".tar", ".bin", ".ckpt", ".pkl")
_PICKLE_STARTS = (b"PK", b"\x80")
_CONVERT = (
    "import torch, safetensors.torch; "
    "state = torch.load({path!r}, map_location='cpu', weights_only=True); "
    "safetensors.torch.save_file({{k: v.contiguous() for k, v in "
    "state.get('state_dict', state).items()}}, {target!r})"
)


def refuse_pickle(path: str | os.PathLike[str]) -> None:
    """Raises InputError, with the lines that convert it, where a file is or may be a pickle."""
    file = Path(os.path.expanduser(path))
    if file.suffix in _PICKLES or _starts_like_a_pickle(file):
        lines = _CONVERT.format(path=str(path), target=str(Path(path).with_suffix(".safetensors")))
        allowed = f"a .safetensors file, for reading a pickle can run anything; to convert: {lines}"
        raise InputError("weights", str(path), allowed)


def _starts_like_a_pickle(file: Path) -> bool:
    """Whether a file begins as pickles do, and is no safetensors file, which may do so, too."""
    if not file.is_file():  # from a pipe one would wait for ever
        return False
    try:
        with file.open("rb") as stream:
            if not stream.read(2).startswith(_PICKLE_STARTS):
                return False
        read_texts(file, "weights")
    except OSError:
        return False
    except InputError:
        return True
    return False
