"""What tests of the native operations have in common."""

import os

import pytest

from ktg_jax.cpu import build, operations
from ktg_jax.cpu.build import BuildError


def require_onednn(register: bool = True) -> None:
    """Skips a test where native operations cannot be built, unless the environment forbids it.

    Without `register` it only looks for oneDNN and a compiler.
    """
    try:
        if register:
            operations.register()
        else:
            build.find_onednn()
            build.compiler_command()
    except BuildError as error:
        if os.environ.get("KTG_REQUIRE_ONEDNN") == "1":
            raise
        pytest.skip(f"no native operations: {error}")
