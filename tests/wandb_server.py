"""A W&B server on loopback, as far as its real client asks one: what tests look at is what arrived here.

It keeps runs in memory, by id. What it does wrong can be chosen request by request, see :attr:`Server.trouble`.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import wandb_artifacts
import wandb_queries
import wandb_sweeps

ENTITY = "somebody"
KEY = "c0ffee01" * 5  # not as one word, since a run keeps what differs from the commit, and tests look for it
HANG, GONE = 0, -1  # instead of a status: no answer; no server, until it listens again
ENDLESS, HEADERS, REDIRECT, HTML = -2, -3, -4, -5  # an answer without end, of 100 MB of headers, in circles; a page
HEADERS_MB = 100
PAGE = b"<html><title>\x1b]0;owned\x07\x1b[2JNot W&B</title></html>"


class Listener(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that was killed
            super().handle_error(request, client_address)


@dataclass
class Kept:
    """One run."""

    id: str
    project: str
    entity: str = ""
    name: str = ""
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)
    notes: str | None = None
    sweep: str | None = None
    origin: dict[str, Any] = field(default_factory=dict)  # commit, program, host of whoever opened it first
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)  # file -> offset -> line
    files: dict[str, bytes] = field(default_factory=dict)
    ended: list[int] = field(default_factory=list)  # exit codes of its segments
    preempting: int = 0
    alerts: list[str] = field(default_factory=list)
    levels: list[str] = field(default_factory=list)  # of the alerts

    def stream(self, name: str) -> list[dict[str, Any]]:
        rows = self.lines.get(name, {})
        return [json.loads(rows[offset]) for offset in sorted(rows)]

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.stream("wandb-history.jsonl")

    @property
    def events(self) -> list[dict[str, Any]]:
        """System metrics."""
        return self.stream("wandb-events.jsonl")

    def values(self) -> dict[str, Any]:
        """The config as a user gave it."""
        return {key: entry["value"] for key, entry in self.config.items() if not key.startswith("_")}


class Server:
    """Listens on a free port of 127.0.0.1.

    Attributes:
        trouble: called with (operation or path, number of requests so far); a status to refuse with, HANG, GONE, or None.
        requests: operations and paths, in order.
        reports: the reports that were made, ``spec`` parsed.
    """

    def __init__(self) -> None:
        self.runs: dict[str, Kept] = {}
        self.reports: list[dict[str, Any]] = []  # what was asked for each, its spec parsed
        self.artifacts: dict[str, wandb_artifacts.Artifact] = {}
        self.sweeps: dict[str, wandb_sweeps.Sweep] = {}
        self.elsewhere: list[str] = []  # runs that were asked for where they are not, as a second copy would be
        self.unknown: list[str] = []
        self.requests: list[str] = []
        self.trouble: Callable[[str, int], int | None] = lambda what, number: None
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._http: ThreadingHTTPServer | None = None
        self._port = 0
        self.listen()
        self.url = f"http://127.0.0.1:{self._port}"

    def listen(self) -> None:
        """Be there, at the same port as ever."""
        if self._http is None:
            self.closing = threading.Event()
            self._http = Listener(("127.0.0.1", self._port), self._handler())
            self._port = self._http.server_port
            threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """For a client of this server, which sends its rows every second."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"}

    def close(self) -> None:
        """Gone: connections are refused from now on, and those that there are, end."""
        with self._lock:
            http, self._http = self._http, None
        self.closing.set()
        if http is not None:
            http.shutdown()
            http.server_close()

    # -- what comes in

    def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b""
                    while size := int(self.rfile.readline().strip() or b"0", 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

            def _reply(self, value: Any, status: int = 200) -> None:
                body = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _serve(self) -> None:
                body = self._body()
                asked = json.loads(body) if self.path == "/graphql" else {}
                named = re.search(r"(?:query|mutation)\s+(\w+)", asked.get("query", ""))
                what = named[1] if named else self.path
                if b'"complete":true' in body.replace(b" ", b""):  # the last request of a client that finishes
                    what = f"complete {what}"
                server.requests.append(what)
                closing = server.closing
                status = server.trouble(what, len(server.requests))
                if status == GONE:
                    server.close()
                elif status == HANG:
                    closing.wait(300)
                if status in (GONE, HANG) or closing.is_set():
                    self.close_connection = True
                    return
                if status in (ENDLESS, HEADERS, REDIRECT, HTML):
                    self._attack(status, closing)
                    return
                if status is not None:
                    self._reply({"error": f"trouble {status}", "errors": [{"message": f"trouble {status}"}]}, status)
                    return
                with server._lock:
                    if self.path == "/graphql":
                        self._reply({"data": server._answer(what, asked.get("variables") or {})})
                    elif self.command == "GET":
                        self._reply(server._stored(unquote(self.path)))
                    else:
                        server._take(unquote(self.path), body)
                        self._reply({"exitcode": None, "limits": {}})

            def _attack(self, kind: int, closing: threading.Event) -> None:
                """Answer as no server should; until the client has had enough."""
                if kind == REDIRECT:
                    self.send_response(307)
                    self.send_header("Location", f"{server.url}{self.path}")
                elif kind == HEADERS:
                    self.send_response(200)
                    self.flush_headers()
                    for _ in range(HEADERS_MB):
                        self.wfile.write(b"X-Much: " + b"x" * 2**20 + b"\r\n")
                else:
                    self.send_response(200)
                    self.send_header("Content-Type", "text/html" if kind == HTML else "application/json")
                if kind != ENDLESS:
                    self.send_header("Content-Length", str(len(PAGE)) if kind == HTML else "0")
                self.send_header("Connection", "close")
                self.end_headers()
                if kind == HTML:
                    self.wfile.write(PAGE)
                elif kind == ENDLESS:
                    self.wfile.write(b'{"data": "')
                    while not closing.is_set():
                        self.wfile.write(b"x" * 2**20)

            do_GET = do_POST = do_PUT = _serve

        return Handler

    def _take(self, path: str, body: bytes) -> None:
        parts = path.strip("/").split("/")
        if parts[0] == "files" and parts[-1] == "file_stream":
            run = self.runs[parts[3]]
            told = json.loads(body)
            for name, chunk in (told.get("files") or {}).items():
                kept = run.lines.setdefault(name, {})
                for number, line in enumerate(chunk["content"]):
                    kept[chunk["offset"] + number] = line
                if name == "wandb-summary.json":
                    run.summary = json.loads(chunk["content"][-1])
            if told.get("complete"):
                run.ended.append(int(told.get("exitcode") or 0))
            if told.get("preempting"):
                run.preempting += 1
        elif parts[0] == "artifact":
            wandb_artifacts.take(self.artifacts, parts, body)
        elif parts[0] == "upload":
            self.runs[parts[1]].files["/".join(parts[2:])] = body
        else:
            self.unknown.append(path)

    def _stored(self, path: str) -> bytes:
        """A file that was uploaded, or the manifest of an artifact."""
        kind, of, name = path.strip("/").split("/", 2)
        return json.dumps(self.artifacts[of].manifest).encode() if kind == "artifact" else self.runs[of].files[name]

    def _answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        if (about := wandb_artifacts.answer(self.artifacts, self.url, operation, variables)) is not None:
            return about
        if (about := wandb_sweeps.answer(self.sweeps, ENTITY, operation, variables)) is not None:
            return about
        if (about := wandb_queries.answer(self.runs, self._public, self.url, operation, variables)) is not None:
            return about
        match operation:
            case "GetDefaultEntity":
                return {"viewer": {"id": "u", "entity": ENTITY}}
            case "Viewer":
                teams: dict[str, Any] = {"edges": []}
                return {
                    "viewer": {"id": "u", "entity": ENTITY, "username": ENTITY, "flags": "{}", "admin": False, "teams": teams}
                }
            case "GetViewer":  # of the public interface
                names = dict.fromkeys(("email", "deletedAt", "apiKeys", "teams"), None)
                known = {"id": "u", "name": ENTITY, "username": ENTITY, "entity": ENTITY, "flags": "{}", "admin": False}
                return {"viewer": {**names, **known}}
            case "ProbeRunInput":  # of the public interface of 0.21
                return {"RunType": {"fields": [{"name": "projectId"}]}}
            case "ProbeServerCapabilities":  # of 0.21, too, for an alert or a picture
                return {f"{kind}Type": {"fields": []} for kind in ("Query", "Mutation", "ServerInfo")}
            case "RunStoppedStatus":  # of 0.21, which asks now and then
                return {"project": {"run": {"stopped": False}}}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "OrganizationCoreWeaveOrganizationID":
                return {"entity": {"organization": {"coreWeaveOrganizationId": ""}}}
            case "RunResumeStatus":
                known = self.runs.get(variables["name"])
                return {
                    "model": {
                        **_project(variables["project"], variables.get("entity")),
                        "bucket": known and self._resumed(known),
                    }
                }
            case "UpsertBucket":
                return {"upsertBucket": self._upsert(variables)}
            case "CreateRunFiles":
                places = [
                    {"name": name, "uploadUrl": f"{self.url}/upload/{variables['run']}/{name}"} for name in variables["files"]
                ]
                return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": places}}
            case "NotifyScriptableRunAlert":
                alerted = self.runs[variables["runName"]]
                alerted.alerts.append(variables["title"])
                alerted.levels.append(variables["severity"])
                return {"notifyScriptableRunAlert": {"success": True}}
            case "Run" | "RunHistoryKeys":  # the public API's questions for a run
                known = self.runs.get(variables["name"])
                return {"project": {"run": known and self._public(known)}}
            case "GetProjects" | "Projects":  # the latter of 0.21
                names = sorted({run.project for run in self.runs.values()} | {"hpc-cifar"})
                about = {"entityName": ENTITY, "createdAt": "2026-01-01T00:00:00", "isBenchmark": False, "user": None}
                nodes = [{"node": {"id": name, "name": name, **about}} for name in names]
                return {"models": {"edges": nodes, "pageInfo": {"endCursor": None, "hasNextPage": False}}}
            case "ProjectInternalId":
                return {"project": {"id": "p", "internalId": "1"}}
            case "upsertView":
                self.reports.append(variables | {"spec": json.loads(variables["spec"])})
                view = {"id": f"report-{len(self.reports)}", "type": variables["type"], "updatedAt": "2026-01-01T00:00:00"}
                view |= {name: variables.get(name) for name in ("name", "displayName", "description", "spec")}
                view["project"] = {"id": "p", "name": variables["projectName"], "entityName": variables["entityName"]}
                return {"upsertView": {"view": view, "inserted": True}}
        self.unknown.append(operation)
        return {}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        inserted = name not in self.runs
        run = self.runs.setdefault(name, Kept(name, variables["project"], variables.get("entity") or ENTITY))
        if (run.entity, run.project) != (variables.get("entity") or run.entity, variables["project"]):
            self.elsewhere.append(f"{variables.get('entity')}/{variables['project']}/{name}")
        run.name = variables.get("displayName") or run.name
        run.group = variables.get("groupName") or run.group
        run.job_type = variables.get("jobType") or run.job_type
        run.tags = variables.get("tags") or run.tags
        run.notes = variables.get("notes") or run.notes
        run.sweep = variables.get("sweep") or run.sweep
        run.origin = run.origin or {key: variables.get(key) for key in ("commit", "program", "host") if variables.get(key)}
        if variables.get("config"):
            run.config |= json.loads(variables["config"])
        if variables.get("summaryMetrics"):
            run.summary |= json.loads(variables["summaryMetrics"])
        bucket = {"id": f"id-{name}", "name": name, "displayName": run.name, "description": None, "config": None}
        bucket |= {"sweepName": run.sweep, "project": _project(run.project, run.entity), "historyLineCount": len(run.history)}
        return {"bucket": bucket, "inserted": inserted}

    def _resumed(self, run: Kept) -> dict[str, Any]:
        return {
            "id": f"id-{run.id}",
            "name": run.id,
            "displayName": run.name,
            "summaryMetrics": json.dumps(run.summary),
            "logLineCount": len(run.lines.get("output.log", {})),
            "historyLineCount": len(run.history),
            "eventsLineCount": len(run.events),
            "historyTail": json.dumps([json.dumps(row) for row in run.history[-2:]]),
            "eventsTail": json.dumps([json.dumps(row) for row in run.events[-2:]]),
            "config": json.dumps(run.config),
            "tags": run.tags,
            "notes": None,
            "wandbConfig": json.dumps({"t": {"value": {}}}),
        }

    def _public(self, run: Kept) -> dict[str, Any]:
        return {
            "id": f"id-{run.id}",
            "projectId": "1",
            "name": run.id,
            "displayName": run.name,
            "state": "finished" if run.ended else "running",
            "sweepName": run.sweep,
            "config": json.dumps(run.config),
            "summaryMetrics": json.dumps(run.summary),
            "systemMetrics": "{}",
            "tags": run.tags,
            "historyKeys": {"lastStep": run.history[-1]["_step"] if run.history else -1, "keys": {}, "sets": []},
            "createdAt": "2026-01-01T00:00:00",
            "heartbeatAt": "2026-01-01T00:00:00",
            "user": {"id": "u", "name": ENTITY, "username": ENTITY},
        }


def _project(name: str, entity: str | None = None) -> dict[str, Any]:
    return {"id": "p", "name": name, "entity": {"id": "e", "name": entity or ENTITY}}


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server.close()


def until(condition: Callable[[], Any], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.05)
