"""Folders that can only be read, also by root."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Within it nothing can be written in the folder; skips the test where that cannot be had."""
    if os.geteuid() == 0:  # whom modes do not keep from writing
        with _mounted(folder):
            yield
        return
    modes = {path: path.stat().st_mode for path in (folder, *folder.rglob("*"))}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


@contextmanager
def _mounted(folder: Path) -> Iterator[None]:
    def mount(*arguments: str | Path) -> bool:
        return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0

    if not mount("--bind", folder, folder):
        pytest.skip("nothing can be mounted here")
    try:
        if not mount("-o", "remount,bind,ro", folder):
            pytest.skip("nothing can be mounted read-only here")
        yield
    finally:
        subprocess.run(["umount", folder], check=True)
