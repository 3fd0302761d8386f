"""What is set once for the whole process, before JAX computes anything."""

import os

import jax

from ktg_jax.cpu.memory import keep_freed_memory
from ktg_jax.errors import InputError
from ktg_jax.files import cache_folder


def prepare(compile_cache: bool = True, cpu_devices: int | None = None) -> None:
    """Prepares this process for training or evaluating.

    Args:
        compile_cache: keep compiled programs in `cache_folder()`, or where the environment's
            `JAX_COMPILATION_CACHE_DIR` says.
        cpu_devices: divide the CPU into so many devices.

    Raises:
        InputError: JAX has computed already, and the number of devices is another.
    """
    keep_freed_memory()
    if cpu_devices is not None:
        try:
            jax.config.update("jax_num_cpu_devices", cpu_devices)
        except RuntimeError as error:
            raise InputError(
                "cpu_devices", cpu_devices, f"set before JAX starts ({error})"
            ) from None
    jax.config.update("jax_enable_compilation_cache", compile_cache)
    if compile_cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        # Small programs are many: together they take as long as the large ones.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
