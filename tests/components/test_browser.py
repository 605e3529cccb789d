"""A real browser: the tool with which reports are looked at."""

from __future__ import annotations

import html
import struct
from pathlib import Path

import pytest
from browser import Browser

from hpc_cifar.config.experiment import Experiment

pytestmark = pytest.mark.slow


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """The fields of an experiment as a table that a script fills in."""
    schema = Experiment.model_json_schema()
    rows = "".join(f"<tr><td>{html.escape(name)}</td></tr>" for name in schema["properties"])
    script = "document.title = document.querySelectorAll('td').length + ' fields'"
    path = tmp_path / "schema.html"
    path.write_text(f"<!doctype html><meta charset=utf-8><table>{rows}</table><script>{script}</script>")
    return path


def test_a_page_is_rendered_with_its_scripts(browser: Browser, page: Path) -> None:
    document = browser.dump_dom(page)
    assert f"<title>{len(Experiment.model_fields)} fields</title>" in document
    assert "<td>epochs</td>" in document


def test_a_screenshot_has_the_asked_width(browser: Browser, page: Path, tmp_path: Path) -> None:
    picture = browser.screenshot(page, tmp_path / "page.png", width=500).read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert struct.unpack(">I", picture[16:20])[0] == 500
