"""Two simulated CPU devices for every test; set before jax starts its backend. And fixtures."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

# What the helpers assert is explained, as in the tests themselves.
pytest.register_assert_rewrite("carried", "represents", "runs", "searches", "several_processes")

from postgres import postgres_server, postgres_url  # noqa: E402

__all__ = ["postgres_server", "postgres_url"]

jax.config.update("jax_num_cpu_devices", 2)

os.environ.setdefault("KTG_HEARTBEAT", "1")  # of searches: nobody waits long for a dead worker

if threading.current_thread() is threading.main_thread():
    # In the background of a shell Ctrl-C is ignored, and would be by the commands that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where all searches of a module keep what they compiled and pre-trained."""
    from runs import own_cache  # which imports the experiments

    home = own_cache(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KTG_CACHE_DIR", str(home))
        yield home
