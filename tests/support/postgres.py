"""A real PostgreSQL server for tests, on loopback, with its data in a temporary folder."""

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

USER = "ktg"
# Runs the server until it is told to stop. Where the tests are killed, their end of the pipe is
# closed: then it stops too, and removes the folder.
SUPERVISOR = """
folder=$1; shift
"$@" >>"$folder/log" 2>&1 &
read -r _ || gone=1
kill -INT $!
wait $!
[ -z "$gone" ] || rm -rf "$folder"
"""


class PostgresServer:
    """A server with a fresh data folder, which can be stopped and started again.

    Args:
        programs: folder of `initdb` and `postgres`.

    Attributes:
        port: on 127.0.0.1, the same after every start.
        password: of `USER`, who may do everything; nobody else can connect.
    """

    def __init__(self, programs: Path) -> None:
        self.programs = programs
        self.port = _free_port()
        self.password = secrets.token_urlsafe(16)
        # Root's own temporary folders are closed to others, and a socket's path must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="ktg_postgres_", dir="/tmp"))
        self._owner = _owner()
        if self._owner is not None:
            shutil.chown(self.folder, self._owner, pwd.getpwnam(self._owner).pw_gid)
        self._databases = 0
        self._supervisor: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the server and waits until it takes connections."""
        if not (self.folder / "data").exists():
            self._make_data()
        options = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": self.folder,
            "fsync": "off",
            "shared_buffers": "16MB",
        }
        command = [str(self.programs / "postgres"), "-D", "data"]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        self._supervisor = subprocess.Popen(
            ["/bin/sh", "-c", SUPERVISOR, "sh", str(self.folder), *command],
            stdin=subprocess.PIPE,
            start_new_session=True,  # so that Ctrl-C does not reach it
            cwd=self.folder,
            **self._identity(),
        )
        end = time.monotonic() + 60
        while not self._takes_connections():
            if time.monotonic() > end:
                raise TimeoutError((self.folder / "log").read_text())
            time.sleep(0.05)

    def stop(self) -> None:
        """Stops the server, if it runs; its connections break and its data stays."""
        if self._supervisor is not None:
            self._supervisor.communicate(b"stop\n", timeout=60)
            self._supervisor = None

    def remove(self) -> None:
        """Stops the server and removes its data."""
        self.stop()
        shutil.rmtree(self.folder)

    def url(self, database: str = "postgres") -> str:
        """The URL of one of its databases, as SQLAlchemy takes it."""
        return f"postgresql+psycopg://{USER}:{self.password}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """Makes an empty database and returns its URL."""
        self._databases += 1
        name = f"test{self._databases}"
        self._run("createdb", "--host=127.0.0.1", f"--port={self.port}", f"--username={USER}", name)
        return self.url(name)

    def _make_data(self) -> None:
        secret = self.folder / "password"
        secret.write_text(self.password)
        self._run(
            *("initdb", "--pgdata=data", f"--username={USER}", "--auth=scram-sha-256"),
            *("--pwfile=password", "--encoding=UTF8", "--locale=C", "--no-sync"),
        )
        secret.unlink()

    def _takes_connections(self) -> bool:
        ready = [str(self.programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(ready).returncode == 0

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self.programs / program), *arguments],
            cwd=self.folder,
            env={**os.environ, "PGPASSWORD": self.password, "LC_ALL": "C"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **self._identity(),
        )
        if done.returncode != 0:
            raise RuntimeError(f"{program}: {done.stdout}")

    def _identity(self) -> dict[str, Any]:
        if self._owner is None:
            return {}
        gid = pwd.getpwnam(self._owner).pw_gid
        return {"user": self._owner, "group": gid, "extra_groups": []}


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A server for all tests of this process; a test that stops it starts it again."""
    server = PostgresServer(_programs())
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> str:
    """The URL of an empty PostgreSQL database of the test's own."""
    return postgres_server.new_database()


def _programs() -> Path:
    """The folder of PostgreSQL's newest programs; skips the test where there are none."""
    folders = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda f: float(f.parent.name), reverse=True
    )
    on_path = shutil.which("initdb")
    if on_path:
        folders.insert(0, Path(on_path).parent)
    for folder in folders:
        if all((folder / name).is_file() for name in ("initdb", "postgres", "createdb")):
            return folder
    if os.environ.get("KTG_REQUIRE_POSTGRES") == "1":
        pytest.fail("no initdb and postgres on the path, nor in /usr/lib/postgresql/*/bin")
    pytest.skip("no PostgreSQL server is installed")


def _owner() -> str | None:
    """Who runs the server where the tests are root's, for whom it refuses to run."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
