"""A headless Chromium that opens local files and nothing else, spoken to by its debugging protocol over a pipe."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--headless",
    "--no-sandbox",  # the tests run as root in containers
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # a page that asks the network for something gets nothing
)


def find() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """Chromium with a profile folder of its own; :meth:`open` starts it for one page."""

    def __init__(self, program: str, profile: Path) -> None:
        self.program = program
        self.profile = profile

    @contextlib.contextmanager
    def open(self, file: Path, width: int = 1440, height: int = 1000, dark: bool = False) -> Iterator[Page]:
        """The loaded page in a window of that many pixels; a phone's if it is narrow."""
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # Chromium reads commands from descriptor 3 and writes to 4
        shell = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        command = [
            "bash",
            "-c",
            shell,
            "bash",
            self.program,
            *QUIET,
            "--remote-debugging-pipe",
            f"--user-data-dir={self.profile}",
        ]
        process = subprocess.Popen(
            command, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )  # fmt: skip
        os.close(theirs_in), os.close(theirs_out)
        try:
            yield Page(ours_in, ours_out, file, width, height, dark)
        finally:
            os.close(ours_out)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(ours_in)


class Page:
    """One page. ``requests`` are the addresses that it asked for, ``complaints`` errors, warnings and violated policies."""

    def __init__(self, reads: int, writes: int, file: Path, width: int, height: int, dark: bool) -> None:
        self._reads, self._writes = reads, writes
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self._events: list[str] = []
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        phone = width < 600
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        began = time.monotonic()
        self("Page.navigate", url=file.absolute().as_uri())
        self.until(lambda: "Page.loadEventFired" in self._events, 30, "the page is loaded")
        self.load_seconds = time.monotonic() - began

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 60
        while True:
            for answer in self._read(deadline - time.monotonic()):
                if answer.get("id") == number:
                    assert "error" not in answer, f"{method}: {answer['error']}"
                    return dict(answer["result"])
            assert time.monotonic() < deadline, f"{method}: no answer from Chromium"

    def _read(self, seconds: float) -> list[dict[str, Any]]:
        ready, _, _ = select.select([self._reads], [], [], max(seconds, 0))
        if not ready:
            return []
        data = os.read(self._reads, 1 << 20)
        assert data, "Chromium has ended"
        *messages, self._rest = (self._rest + data).split(b"\0")
        found = [json.loads(message) for message in messages]
        for event in found:
            self._note(event.get("method", ""), event.get("params", {}))
        return found

    def _note(self, method: str, about: dict[str, Any]) -> None:
        self._events.append(method)
        if method == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif method == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.complaints.append(about["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(about["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(about["args"])[:500])

    def until(self, true: Any, seconds: float, what: str) -> None:
        """Listen until ``true()``; fails after that many seconds."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"waited {seconds} s for: {what}; {self.complaints}"
            self._read(0.05)

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page; a promise's, when it is there."""
        answer = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def mouse(self, x: float, y: float) -> None:
        self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, output: Path, whole: bool = False) -> Path:
        """What the window shows, or the whole page, as PNG."""
        answer = self("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        output.write_bytes(base64.b64decode(answer["data"]))
        return output
