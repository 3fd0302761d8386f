"""Builds the native operations ahead of their first use, and says which convolutions are in use.

python -m ktg_jax.cpu
"""

import sys

from ktg_jax.cpu.build import BuildError, find_onednn, library_path
from ktg_jax.cpu.convolution import cpu_convolution


def main() -> int:
    """Builds; the exit code is 1 if that is not possible here."""
    try:
        onednn = find_onednn()
        path = library_path()
    except BuildError as error:
        print(f"not built: {error}", file=sys.stderr)
        return 1
    print(f"oneDNN {onednn.version} in {onednn.prefix}")
    print(f"library {path}")
    print(f"convolutions on CPU: {cpu_convolution()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
