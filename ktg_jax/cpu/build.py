"""Builds the native operations and loads them.

The sources in `src/` are compiled against JAX's headers and oneDNN 3, from wheels or the system,
into the user's cache: once for every combination of versions, compiler and processor.
"""

import ctypes
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jaxlib

from ktg_jax.io.files import atomic_path, cache_folder

SOURCES = Path(__file__).parent / "src"
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")


class BuildError(Exception):
    """The native operations cannot be built or loaded; says why in a line."""


@dataclass(frozen=True)
class OneDnn:
    """An installed oneDNN.

    Attributes:
        prefix: where it is installed.
        version: "3.2", say.
        shared_object: the shared library.
    """

    prefix: Path
    version: str
    shared_object: Path


def find_onednn() -> OneDnn:
    """Finds oneDNN 3 in `$KTG_ONEDNN`, or else the Python environment, /usr/local or /usr.

    Raises:
        BuildError: there is none.
    """
    older = ""
    for prefix in _prefixes():
        header = prefix / "include" / "oneapi" / "dnnl" / "dnnl_version.h"
        libraries = sorted(
            library
            for folder in (prefix / "lib", prefix / "lib64")
            for pattern in ("libdnnl.so.3", "*-linux-gnu/libdnnl.so.3")
            for library in folder.glob(pattern)
        )
        if not header.is_file():
            continue
        # oneDNN 3.3 and later define the numbers in a header of their own.
        text = "".join(path.read_text() for path in header.parent.glob("dnnl_version*.h"))
        numbers = dict(re.findall(r"define DNNL_VERSION_(MAJOR|MINOR)\s+(\d+)", text))
        version = f"{numbers.get('MAJOR', '?')}.{numbers.get('MINOR', '?')}"
        if numbers.get("MAJOR") == "3" and libraries:
            return OneDnn(prefix, version, libraries[0])
        older = f" (in {prefix} is {version})"
    raise BuildError(f'no oneDNN 3 found{older}: pip install "ktg_jax[cpu]"')


def library_path() -> Path:
    """The built library, which is built first where it is not in the cache.

    Raises:
        BuildError: no oneDNN, no compiler, or a compilation that failed.
    """
    if sys.platform != "linux":
        raise BuildError(f"native operations are built on Linux only, not on {sys.platform}")
    onednn = find_onednn()
    compiler = compiler_command()
    include = jax.ffi.include_dir()
    command = [*compiler, *_FLAGS, f"-isystem{include}", f"-isystem{onednn.prefix / 'include'}"]
    command += [str(source) for source in sorted(SOURCES.glob("*.cc"))]
    command += [str(onednn.shared_object), f"-Wl,-rpath,{onednn.shared_object.parent}"]
    try:
        key = key_of(compiler, command, onednn)
    except OSError as error:
        raise BuildError(f"{compiler[0]} cannot be run: {error}") from None
    path = cache_folder() / "native" / f"ktg-{key}.so"
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            done = subprocess.run(
                [*command, "-o", str(temporary)], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                first = next((x for x in done.stderr.splitlines() if "error" in x), "no message")
                raise BuildError(f"{compiler[0]} failed: {first.strip()}")
    except OSError as error:
        raise BuildError(f"{path} cannot be built: {error}") from None
    return path


@functools.cache
def load() -> ctypes.CDLL:
    """The native library, found or built once a process.

    Raises:
        BuildError: as `library_path`, or a library that cannot be loaded.
    """
    path = library_path()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from None


def _prefixes() -> tuple[Path, ...]:
    chosen = os.environ.get("KTG_ONEDNN")
    return tuple(map(Path, [chosen] if chosen else [sys.prefix, "/usr/local", "/usr"]))


def compiler_command() -> list[str]:
    """The compiler's command: a program, and arguments that `$CXX` may have.

    Raises:
        BuildError: there is none.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    for name, *arguments in [chosen] if chosen else [["g++"], ["c++"], ["clang++"]]:
        if path := shutil.which(name):
            return [path, *arguments]
    raise BuildError(f"no C++ compiler found ({' '.join(chosen) or 'g++, c++, clang++'})")


def key_of(compiler: list[str], command: list[str], onednn: OneDnn) -> str:
    """A digest of everything that the library depends on.

    Raises:
        OSError: the compiler cannot be run.
    """
    # What the compiler makes of -march=native says which instructions this processor has.
    macros = subprocess.run(
        [*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull],
        capture_output=True,
        check=False,
    )
    digest = hashlib.sha256(macros.stdout)
    for part in (*command, onednn.version, jaxlib.__version__):
        digest.update(part.encode() + b"\0")
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
