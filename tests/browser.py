"""A headless Chromium that opens local files and nothing else."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

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
    "--virtual-time-budget=2000",
)


def find() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """Chromium with a profile folder of its own."""

    def __init__(self, program: str, profile: Path) -> None:
        self.program = program
        self.profile = profile

    def _run(self, *arguments: str) -> str:
        command = [self.program, *QUIET, f"--user-data-dir={self.profile}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
        return done.stdout

    def dump_dom(self, page: Path) -> str:
        """The document after its scripts ran, as HTML."""
        return self._run("--dump-dom", page.absolute().as_uri())

    def screenshot(self, page: Path, output: Path, width: int, height: int = 1200) -> Path:
        """What a window of this width shows, as PNG."""
        self._run(f"--screenshot={output}", f"--window-size={width},{height}", page.absolute().as_uri())
        return output
