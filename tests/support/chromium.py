"""A page opened in headless Chromium, over its DevTools protocol on pipes: no port, no driver."""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Chromium reads commands from file descriptor 3 and writes messages to 4.
_LAUNCH = 'exec "$@" 3<&0 4>&1 </dev/null >&2'
_OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--remote-debugging-pipe", "--no-first-run", "--disable-background-networking"),
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1100,900"),
)
_MOST_SECONDS = 180
_PROBLEMS = (
    *("Runtime.consoleAPICalled", "Runtime.exceptionThrown"),
    *("Log.entryAdded", "Network.loadingFailed"),
)


def find_chromium() -> str:
    """Chromium's path; skips the test where there is none, unless the environment requires it."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    if os.environ.get("KTG_REQUIRE_CHROMIUM"):
        pytest.fail("no chromium, which KTG_REQUIRE_CHROMIUM requires")
    pytest.skip("no chromium")


class Page:
    """A tab.

    Attributes:
        problems: what the console said, exceptions, and failed loads.
        requests: addresses that were asked for.
    """

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._process, self._last_id, self._session = process, 0, ""
        self._loaded = False
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        attached = self._send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._send(f"{domain}.enable")

    def open(self, path: Path) -> None:
        """Loads a file, and returns when all of it is loaded and laid out."""
        self._loaded = False
        self._send("Page.navigate", url=path.as_uri())
        while not self._loaded:
            self._note(self._receive())
        self.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        options = {"returnByValue": True, "awaitPromise": True}
        answer = self._send("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        while (answer := self._receive()).get("id") != self._last_id:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        text = bytearray()
        while (byte := self._process.stdout.read(1)) != b"\0":
            if not byte:
                raise AssertionError("chromium has ended")
            text += byte
        return json.loads(text)

    def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method in _PROBLEMS:
            self.problems.append(json.dumps(parameters))


@contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """Starts Chromium with an empty profile in `folder`, and ends it."""
    command = [find_chromium(), *_OPTIONS, f"--user-data-dir={folder / 'profile'}"]
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            ["sh", "-c", _LAUNCH, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
        watchdog = threading.Timer(_MOST_SECONDS, process.kill)  # else a read could wait for ever
        watchdog.start()
        try:
            yield Page(process)
        finally:
            watchdog.cancel()
            process.terminate()
            process.communicate(timeout=30)
