"""A stand-in for the Hub: repositories in memory, behind the part of its HTTP API that `huggingface_hub` uses here."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_right"


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str | None] = field(default_factory=lambda: {"main": None})
    private: bool = False

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.branches.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


@dataclass
class Hub:
    address: str
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    broken: bool = False

    def header(self, name: str) -> dict[str, Any]:
        """The YAML at the beginning of a repository's page, as the Hub reads it."""
        files = self.repos[name].files("main")
        assert files is not None
        (text,) = re.findall(r"\A---\n(.*?)\n---\n", files[1]["README.md"].decode(), re.DOTALL)
        return yaml.safe_load(text)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, code: int, body: bytes | Any = b"", **headers: str) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def missing(self, what: str) -> None:
            self.answer(404, {"error": what}, X_Error_Code=what, X_Error_Message=what)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            if hub.broken:
                return self.answer(500, {"error": "the Hub is on fire"})
            parts = urlsplit(self.path)
            if parts.path == "/api/models":
                return self.answer(200, self.listed(parse_qs(parts.query)))
            match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", unquote(parts.path))
            if match is None:
                return self.missing("EntryNotFound")
            repo = hub.repos.get(match[1])
            if repo is None or (repo.private and self.headers["Authorization"] != f"Bearer {TOKEN}"):
                return self.missing("RepoNotFound")
            commit_files = repo.files(match[2])
            if commit_files is None:
                return self.missing("RevisionNotFound")
            commit, files = commit_files
            if match[3] not in files:
                return self.missing("EntryNotFound")
            data = files[match[3]]
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self.answer(200, data, X_Repo_Commit=commit, ETag=etag, Content_Type="application/octet-stream")

        def listed(self, query: dict[str, list[str]]) -> list[dict[str, Any]]:
            listing = []
            for name in hub.repos:
                header = hub.header(name)
                bases = header.get("base_model", [])
                bases = [bases] if isinstance(bases, str) else bases
                tags = [header["library_name"], *header["tags"], *(f"base_model:{base}" for base in bases)]
                tags += [f"license:{header['license']}"] if "license" in header else []
                wanted = query.get("filter", [])
                if name.startswith(f"{query['author'][0]}/") and set(wanted) <= set(tags):
                    listing.append({"id": name, "tags": tags, "lastModified": "2026-01-02T03:04:05.000Z"})
            return listing

        def do_POST(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = unquote(urlsplit(self.path).path)
            if path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                return self.answer(401, {"error": "Invalid username or password."})
            if path == "/api/repos/create":
                fields = json.loads(body)
                name = f"{fields.get('organization', 'me')}/{fields['name']}"
                if name in hub.repos:
                    return self.answer(409, {"error": "You already created this model repo", "url": name})
                hub.repos[name] = Repo(private=bool(fields.get("private")) or fields.get("visibility") == "private")
                return self.answer(200, {"url": f"{hub.address}/{name}", "name": name, "id": name})
            match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/(.+)", path)
            if match is None or match[1] not in hub.repos:
                return self.missing("RepoNotFound")
            repo = hub.repos[match[1]]
            if match[3] not in repo.branches:
                return self.missing("RevisionNotFound")
            if match[2] == "preupload":
                files = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
                return self.answer(200, {"files": modes})
            return self.commit(match[1], repo, match[3], body)

        def commit(self, name: str, repo: Repo, branch: str, body: bytes) -> None:
            before = repo.branches[branch]
            files = dict(repo.commits[before]) if before else {}
            for line in body.splitlines():
                said = json.loads(line)
                if said["key"] == "file":
                    files[said["value"]["path"]] = base64.b64decode(said["value"]["content"])
            commit = hashlib.sha1(repr((before, sorted(files.items()))).encode()).hexdigest()
            repo.commits[commit] = files
            repo.branches[branch] = commit
            done = {"success": True, "commitOid": commit, "commitUrl": f"{hub.address}/{name}/commit/{commit}"}
            self.answer(200, {**done, "hookOutput": ""})

    return Handler


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers on this machine until the context is left."""
    hub = Hub("")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
