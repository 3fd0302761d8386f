"""What is set once for the whole process, before JAX computes anything."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax
import jax.monitoring

from ktg_jax.cpu.memory import keep_freed_memory
from ktg_jax.errors import InputError, RunError
from ktg_jax.io.files import cache_folder
from ktg_jax.training import hosts

from .config import TrainConfig


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
    # On a full disk, or one that is only read, JAX would say so for each of many programs.
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")
    if compile_cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        # Small programs are many: together they take as long as the large ones.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def join_others(config: TrainConfig) -> bool:
    """Joins this process to those that train with it, before JAX computes anything.

    Returns:
        Whether there are others.

    Raises:
        InputError: options that do not go together, or the others cannot be reached.
    """
    given = {name: getattr(config, name) for name in ("coordinator", "num_processes", "process_id")}
    said = [name for name, value in given.items() if value is not None]
    if config.distributed and said:
        raise InputError(said[0], given[said[0]], "nothing with distributed: the launcher says it")
    if not (config.distributed or said):
        return False
    hosts.start(**given)
    return True


@contextmanager
def hosts_kept_together() -> Iterator[None]:
    """Where the other processes of a training are lost within it, that is a failed run."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        me = f"process {jax.process_index()} of {jax.process_count()}"
        reason = str(error).splitlines()[0]
        text = f"{me} lost the others ({reason}); the same commands go on from the last checkpoint"
        raise RunError(text) from None


def check_platform() -> None:
    """Starts JAX, which cannot be configured any further then.

    Raises:
        InputError: it cannot compute on the platform that the environment asks for.
    """
    try:
        jax.devices()
    # JAX merely asserts that there is a device where it is told to use CUDA alone.
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split()) or "no device found"
        allowed = f"a platform that JAX finds here, or none, for it to choose one ({reason})"
        asked = getattr(jax.config, "jax_platforms", None) or os.environ.get("JAX_PLATFORM_NAME")
        raise InputError("JAX_PLATFORMS", asked, allowed) from None


@dataclass
class Programs:
    """Counts the programs that this process asks JAX for, from when it is made.

    Attributes:
        requested: programs that were not there yet in this process.
        loaded: those of them that came from the compilation cache.
    """

    requested: int = 0
    loaded: int = 0

    def __post_init__(self) -> None:
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    @property
    def compiled(self) -> int:
        """Those that were compiled."""
        return self.requested - self.loaded

    def _on_duration(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.requested += event == "/jax/core/compile/backend_compile_duration"

    def _on_event(self, event: str, **kwargs: str | int) -> None:
        self.loaded += event == "/jax/compilation_cache/cache_hits"


def share_cores(index: int, count: int) -> None:
    """Confines this process to its share of the cores, before JAX starts its threads.

    Args:
        index: the index of the process among those that share the machine.
        count: the count of such processes; where they are more than the cores, some have one in
            common.
    """
    if not hasattr(os, "sched_setaffinity"):  # only Linux has it
        return
    cores = sorted(os.sched_getaffinity(0))
    mine = cores[index * len(cores) // count : (index + 1) * len(cores) // count]
    os.sched_setaffinity(0, mine or [cores[index % len(cores)]])
