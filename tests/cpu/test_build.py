"""The build of the native operations: what is found, what is said, and what is left behind."""

import ctypes
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from native import require_onednn
from runs import Ended, end_of, start

from ktg_jax.cpu import __main__ as command
from ktg_jax.cpu import build, memory, operations
from ktg_jax.cpu.build import BuildError, find_onednn, library_path

pytestmark = pytest.mark.slow

VARIABLES = ("KTG_ONEDNN", "CXX", "KTG_CPU_CONVOLUTION")


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and the oneDNN and compiler that are found without being named."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("KTG_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def install(
    prefix: Path, version: str, folder: str = "lib", header: str = "dnnl_version.h"
) -> Path:
    """What is looked at of an installed oneDNN; returns the library."""
    major, minor = version.split(".")
    text = f"#define DNNL_VERSION_MAJOR {major}\n#define DNNL_VERSION_MINOR  {minor}\n"
    headers = prefix / "include" / "oneapi" / "dnnl"
    headers.mkdir(parents=True)
    (headers / "dnnl_version.h").write_text('#include "oneapi/dnnl/dnnl_version_hash.h"\n')
    (headers / header).write_text(text)
    library = prefix / folder / f"libdnnl.so.{major}"
    library.parent.mkdir(parents=True)
    library.touch()
    return library


def script(path: Path, text: str) -> Path:
    """An executable script."""
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# --- oneDNN


@pytest.mark.parametrize("header", ["dnnl_version.h", "dnnl_version_generated.h"])
@pytest.mark.parametrize("folder", ["lib", "lib64", "lib/x86_64-linux-gnu"])
def test_the_environments_onednn_is_taken_first(
    folder: str, header: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = install(tmp_path / "mine", "3.11", folder, header)
    install(tmp_path / "python", "3.2")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "python"))
    assert find_onednn().version == "3.2"
    monkeypatch.setenv("KTG_ONEDNN", str(tmp_path / "mine"))
    found = find_onednn()
    assert (found.prefix, found.version, found.shared_object) == (
        tmp_path / "mine",
        "3.11",
        library,
    )


def test_without_onednn_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_prefixes", lambda: iter([tmp_path / "none"]))
    with pytest.raises(BuildError) as error:
        find_onednn()
    assert str(error.value) == 'no oneDNN 3 found: pip install "ktg_jax[cpu]"'


def test_an_older_onednn_is_not_taken_but_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "old", "2.7")
    monkeypatch.setattr(build, "_prefixes", lambda: iter([tmp_path / "old"]))
    with pytest.raises(BuildError, match=rf"^no oneDNN 3 found \(in {tmp_path}/old is 2\.7\): pip"):
        find_onednn()
    install(tmp_path / "new", "3.0")
    monkeypatch.setattr(build, "_prefixes", lambda: iter([tmp_path / "old", tmp_path / "new"]))
    assert find_onednn().version == "3.0"


# --- what can go wrong


def assert_nothing_left(cache_dir: Path) -> None:
    assert [path for path in cache_dir.rglob("*") if path.is_file()] == []


def test_without_a_compiler_there_is_no_library(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "onednn", "3.2")
    monkeypatch.setenv("KTG_ONEDNN", str(tmp_path / "onednn"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"^no C\+\+ compiler found \(no-such-compiler\)$"):
        library_path()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"^no C\+\+ compiler found \(g\+\+, c\+\+, clang\+\+\)$"):
        library_path()
    assert_nothing_left(cache_dir)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#!/no/such/shell\n", r"/c\+\+ cannot be run: .*No such file"),
        ("#!/bin/sh\nexit 3\n", r"/c\+\+ failed: no message$"),
    ],
)
def test_a_compiler_that_does_not_work_is_named(
    text: str, message: str, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "onednn", "3.2")
    monkeypatch.setenv("KTG_ONEDNN", str(tmp_path / "onednn"))
    monkeypatch.setenv("CXX", str(script(tmp_path / "c++", text)))
    with pytest.raises(BuildError, match=message):
        library_path()
    assert_nothing_left(cache_dir)


def test_the_compilers_variable_may_have_arguments(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "onednn", "3.2")
    monkeypatch.setenv("KTG_ONEDNN", str(tmp_path / "onednn"))
    compiler = script(tmp_path / "c++", '#!/bin/sh\necho "error: given $1" >&2\nexit 1\n')
    monkeypatch.setenv("CXX", f"{compiler} --first")
    with pytest.raises(BuildError, match=r"failed: error: given --first$"):
        library_path()


def test_a_source_that_does_not_compile_is_quoted(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_onednn(register=False)
    sources = tmp_path / "src"
    shutil.copytree(build.SOURCES, sources)
    broken = sources / "convolution.cc"
    broken.write_text(f"#error out of order\n#error again\n{broken.read_text()}")
    monkeypatch.setattr(build, "SOURCES", sources)
    with pytest.raises(BuildError) as error:
        library_path()
    assert str(error.value).endswith("error: #error out of order")
    assert "failed: " in str(error.value)
    assert "\n" not in str(error.value)
    assert_nothing_left(cache_dir)


def test_a_cache_that_cannot_be_written_is_named(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "onednn", "3.2")
    monkeypatch.setenv("KTG_ONEDNN", str(tmp_path / "onednn"))
    monkeypatch.setenv("CXX", str(script(tmp_path / "c++", "#!/bin/sh\nexit 0\n")))
    cache_dir.write_text("a file where the folder should be")
    with pytest.raises(BuildError, match=rf"^{cache_dir}/native/ktg-\w+\.so cannot be built: "):
        library_path()


def test_other_systems_have_no_native_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(BuildError, match="on Linux only, not on darwin"):
        library_path()


def test_a_library_that_cannot_be_loaded_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ktg.so"
    path.write_bytes(b"not a library")
    monkeypatch.setattr(build, "library_path", lambda: path)
    with pytest.raises(BuildError, match=rf"^{path} cannot be loaded: "):
        build.load.__wrapped__()


def test_a_library_belongs_to_its_sources_versions_and_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "src"
    sources.mkdir()
    monkeypatch.setattr(build, "SOURCES", sources)
    (sources / "a.cc").write_text("1")
    processor = tmp_path / "processor"
    processor.write_text("#define __AVX2__ 1")
    compiler = str(
        script(tmp_path / "c++", f'#!/bin/sh\nread -r line < "{processor}"; echo "$line"')
    )
    onednn = build.OneDnn(tmp_path, "3.2", tmp_path / "libdnnl.so.3")
    newer = build.OneDnn(tmp_path, "3.3", tmp_path / "libdnnl.so.3")

    keys = [
        build.key_of([compiler], ["c++", "-O3"], onednn),
        build.key_of([compiler], ["c++", "-O2"], onednn),
        build.key_of([compiler], ["c++", "-O3"], newer),
    ]
    assert build.key_of([compiler], ["c++", "-O3"], onednn) == keys[0]
    monkeypatch.setattr(build.jaxlib, "__version__", "99.0")
    keys.append(build.key_of([compiler], ["c++", "-O3"], onednn))
    (sources / "a.cc").write_text("2")
    keys.append(build.key_of([compiler], ["c++", "-O3"], onednn))
    processor.write_text("#define __AVX512F__ 1")
    keys.append(build.key_of([compiler], ["c++", "-O3"], onednn))
    assert len(set(keys)) == 6


# --- a real build


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """`python -m ktg_jax.cpu` with an empty cache folder."""
    require_onednn(register=False)
    cache = tmp_path_factory.mktemp("build")
    with pytest.MonkeyPatch.context() as patch:
        for variable in VARIABLES:
            patch.delenv(variable, raising=False)
        patch.setenv("KTG_CACHE_DIR", str(cache))
        ended = end_of(start("ktg_jax.cpu", cwd=cache, devices=1))
    return cache, ended


def test_the_command_builds_and_says_what_is_used(built: tuple[Path, Ended]) -> None:
    cache, ended = built
    assert (ended.code, ended.err) == (0, "")
    (library,) = (path for path in cache.rglob("*") if path.is_file())
    assert library.parent == cache / "native"
    onednn = find_onednn()
    assert ended.out.splitlines() == [
        f"oneDNN {onednn.version} in {onednn.prefix}",
        f"library {library}",
        "convolutions on CPU: onednn (oneDNN was found)",
    ]


def test_what_was_built_is_not_built_again(
    built: tuple[Path, Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, _ = built
    monkeypatch.setenv("KTG_CACHE_DIR", str(cache))
    run = subprocess.run

    def without_compiling(words: list[str], **options: Any) -> Any:
        assert "-o" not in words
        return run(words, **options)

    monkeypatch.setattr(subprocess, "run", without_compiling)
    (expected,) = (cache / "native").iterdir()
    assert library_path() == expected
    library = build.load.__wrapped__()
    assert isinstance(library, ctypes.CDLL)
    for operation in operations._TARGETS:
        assert hasattr(library, operation)
    monkeypatch.setenv("KTG_CACHE_DIR", str(cache / "other"))
    with pytest.raises(AssertionError):  # the test can fail
        library_path()


def test_where_nothing_can_be_built_the_command_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "_prefixes", lambda: iter([tmp_path]))
    assert command.main() == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == 'not built: no oneDNN 3 found: pip install "ktg_jax[cpu]"\n'


# --- memory


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has these settings")
@pytest.mark.parametrize("kept", [False, True])
def test_freed_memory_is_kept_if_asked_for(kept: bool, tmp_path: Path) -> None:
    program = f"""
import ctypes, os
from ktg_jax.cpu.memory import keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
if {kept}:
    assert keep_freed_memory()
before = resident()
block = c.malloc(64 * 2**20)
ctypes.memset(block, 1, 64 * 2**20)
assert resident() - before > 60 * 2**20
c.free(block)
print((resident() - before) // 2**20)
"""
    (tmp_path / "program.py").write_text(program)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        ended = end_of(start("program", cwd=tmp_path))
    assert ended.err == ""
    assert int(ended.out) > 60 if kept else int(ended.out) < 4


def test_other_systems_keep_their_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not memory.keep_freed_memory()


def test_parts_are_the_cores_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for cores in (1, 2, 5, 64):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        found.append(operations.parts())
    assert found == [1, 1, 2, 8]
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert operations.parts() == 3
