"""The download against a server on loopback that misbehaves in every way."""

from __future__ import annotations

import hashlib
import http.server
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from data import makers
from rich.console import Console

from hpc_cifar.data.download import Unreachable, download
from hpc_cifar.data.prepare import prepare
from hpc_cifar.errors import DataError

CONTENT = bytes(range(256)) * 8192  # 2 MiB
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    content = CONTENT
    ranges = True  # answer a range with that part
    drop_after: int | None = None  # bytes of an answer after which the connection breaks
    status: int | None = None
    asked: list[str | None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/cifar-10-python.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        if self.server.status:
            self.send_error(self.server.status)
            return
        content, start = self.server.content, 0
        match = re.fullmatch(r"bytes=(\d+)-", wanted or "")
        if match and self.server.ranges:
            start = int(match[1])
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.server.drop_after])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    with Server(("127.0.0.1", 0), Handler) as running:
        running.asked = []
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def test_a_whole_download(server: Server, tmp_path: Path, console: Console) -> None:
    path = download(tmp_path, console, url=server.url, md5=MD5)
    assert path.read_bytes() == CONTENT and [p.name for p in tmp_path.iterdir()] == ["cifar-10-python.tar.gz"]
    assert "2 of 2 MiB (100 %)" in console.file.getvalue()  # type: ignore[attr-defined]
    download(tmp_path, console, url=server.url, md5=MD5)
    assert server.asked == [None]  # it is there


def test_broken_connections_are_continued(server: Server, tmp_path: Path, console: Console) -> None:
    server.drop_after = 700_000
    assert download(tmp_path, console, url=server.url, md5=MD5).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=700000-", "bytes=1400000-"]


def test_a_part_of_last_time_is_continued(server: Server, tmp_path: Path, console: Console) -> None:
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(CONTENT[:1_000_000])
    assert download(tmp_path, console, url=server.url, md5=MD5).read_bytes() == CONTENT
    assert server.asked == ["bytes=1000000-"]


def test_a_server_that_ignores_ranges(server: Server, tmp_path: Path, console: Console) -> None:
    server.ranges = False
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(b"x" * 1_000_000)
    assert download(tmp_path, console, url=server.url, md5=MD5).read_bytes() == CONTENT


def test_a_part_of_another_file_is_dropped(server: Server, tmp_path: Path, console: Console) -> None:
    part = tmp_path / "cifar-10-python.tar.gz.part"
    part.write_bytes(b"x" * (len(CONTENT) + 5))
    assert download(tmp_path, console, url=server.url, md5=MD5).read_bytes() == CONTENT
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    part.write_bytes(b"x" * 1000)
    with pytest.raises(DataError, match=r"has md5 .*; it was removed"):
        download(tmp_path, console, url=server.url, md5=MD5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status,message", [(404, "answers 404"), (403, "answers 403"), (503, "failed 5 times in a row .*503")])
def test_a_refusal(server: Server, tmp_path: Path, console: Console, status: int, message: str) -> None:
    server.status = status
    with pytest.raises(DataError, match=message):
        download(tmp_path, console, url=server.url, md5=MD5)


def test_a_server_that_gives_up_is_no_endless_loop(server: Server, tmp_path: Path, console: Console) -> None:
    server.drop_after = 0
    with pytest.raises(Unreachable, match=r"failed 5 times in a row \(the connection was closed early\)"):
        download(tmp_path, console, url=server.url, md5=MD5)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a.tar.gz", "http://no-such-host.invalid/a.tar.gz"])
def test_no_network_is_told_at_once(tmp_path: Path, console: Console, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    begin = time.monotonic()
    with pytest.raises(Unreachable, match=r"cannot be re.*; give a copy by --archive PATH or HPC_CIFAR_ARCHIVE") as error:
        download(tmp_path, console, url=url, timeout_s=2)
    assert time.monotonic() - begin < 5 and "\n" not in str(error.value)


@pytest.mark.usefixtures("no_archive")
def test_prepare_downloads(server: Server, tmp_path: Path, console: Console) -> None:
    server.content = makers.write_tar(tmp_path / "a.tar.gz", makers.batch_files()).read_bytes()
    md5 = hashlib.md5(server.content).hexdigest()
    made = prepare("cifar10", archive=None, root=tmp_path / "root", console=console, url=server.url, md5=md5)
    assert made.manifest["train"]["images"] == 100
    prepare("cifar10", archive=None, root=tmp_path / "root", console=console, url=server.url, md5=md5)
    assert len(server.asked) == 1


@pytest.mark.usefixtures("no_archive")
def test_the_command_falls_back_to_digits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpc_cifar.cli.data import prepare as command

    monkeypatch.setenv("HPC_CIFAR_DATA", str(tmp_path))
    command("cifar10", download=False, fallback=True, print_dataset=True)
    out, err = capsys.readouterr()
    assert out == "digits\n" and "using scikit-learn's digits instead of cifar10" in err
    with pytest.raises(Unreachable):
        command("cifar10", download=False)
    with pytest.raises(DataError):  # what is given and bad is an error, never a fallback
        command("cifar10", archive=tmp_path / "none", fallback=True)
