"""A small Hugging Face hub on 127.0.0.1: real HTTP, real files, one branch a repository.

    python tests/loopback_hub.py 8123 folder      # then HF_ENDPOINT=http://127.0.0.1:8123

It speaks what ``huggingface_hub`` needs to make a repository, commit files to it (small ones within
the commit, others through LFS), and read them again. Whoever writes needs a token, any token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import reset_sessions
from transformers.utils import hub as hub_utils

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ANY = f"/api/(models|datasets)/{REPO}"  # they share their names here
# data sets that were once named without their owner
OWNERS = {"mnist": "ylecun", "svhn": "ufldl-stanford"}
UNOWNED = rf"(?P<start>(/api)?/datasets/)(?P<name>{'|'.join(OWNERS)})(?P<rest>/.*)?"
LFS_SUFFIXES = (".safetensors", ".onnx")


class Hub(ThreadingHTTPServer):
    """Repositories below a folder: ``<owner>/<name>/<commit>/<file>``, and the LFS store beside.

    A data set that is asked for without its owner is ``redirect``ed, as today, is not found
    (``404``), or is no name at all (``strict``, as huggingface_hub 1 has it).
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0, unowned: str = "redirect"):
        super().__init__(("127.0.0.1", port), Handler)
        self.folder, self.unowned = folder, unowned
        self.asked: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def head(self, repo: str) -> str:
        """The newest commit's id."""
        return (self.folder / repo / "HEAD").read_text()

    def files(self, repo: str, commit: str | None = None) -> dict[str, bytes]:
        root = self.folder / repo / (commit or self.head(repo))
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in _files(root)}

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        digests = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
        sha = hashlib.sha1(repr(sorted(digests.items())).encode()).hexdigest()
        for name, content in files.items():
            file = self.folder / repo / sha / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        (self.folder / repo / sha).mkdir(parents=True, exist_ok=True)
        (self.folder / repo / "HEAD").write_text(sha)
        return sha


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    ROUTES = (
        ("POST", "/api/repos/create", "create"),
        ("POST", "/api/validate-yaml", "validate"),
        ("POST", f"{ANY}/paths-info/(?P<revision>[^/]+)", "paths"),
        ("POST", f"/api/models/{REPO}/preupload/[^/]+", "preupload"),
        ("POST", f"/{REPO}\\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/(?P<oid>\w+)", "store"),
        ("POST", f"/api/models/{REPO}/commit/[^/]+", "take_commit"),
        ("GET", f"{ANY}(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", f"{ANY}/tree/(?P<revision>[^/]+)(/(?P<below>.+))?", "tree"),
        ("HEAD", f"(/datasets)?/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", "resolve"),
        ("GET", f"(/datasets)?/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", "resolve"),
    )

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        if found := re.fullmatch(UNOWNED, path):
            return self.without_owner(**found.groupdict())
        for method, pattern, name in self.ROUTES:
            found = re.fullmatch(pattern, path) if method == self.command else None
            if found is None:
                continue
            if (
                method in ("POST", "PUT")
                and name not in ("store", "paths")
                and not self.authorised()
            ):
                return self.send(401, {"error": "a token is needed"})
            repo = found.groupdict().get("repo")
            if repo and not (self.server.folder / repo / "HEAD").exists():
                return self.not_found()
            return getattr(self, name)(**found.groupdict())
        self.send(404, {"error": f"nothing at {path}"}, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def authorised(self) -> bool:
        return self.headers.get("Authorization", "").startswith("Bearer ")

    # -- writing -------------------------------------------------------------------------------

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}"
        there = (self.server.folder / repo / "HEAD").exists()
        if not there:
            self.server.commit(repo, {})
        url = f"{self.server.endpoint}/{repo}"
        self.send(409 if there else 200, {"url": url, "name": repo, "id": repo})

    def validate(self) -> None:
        self.send(200, {"errors": [], "warnings": []})

    def preupload(self, repo: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.send(200, {"files": files})

    def batch(self, repo: str) -> None:
        objects = [
            {
                "oid": o["oid"],
                "size": o["size"],
                "actions": {"upload": {"href": f"{self.server.endpoint}/lfs/{o['oid']}"}},
            }
            for o in json.loads(self.body)["objects"]
        ]
        self.send(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.send(400, {"error": "the content is not what its name says"})
        file = self.server.folder / "lfs" / oid
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(self.body)
        self.send(200, {})

    def take_commit(self, repo: str) -> None:
        files = self.server.files(repo)
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = (self.server.folder / "lfs" / value["oid"]).read_bytes()
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        sha = self.server.commit(repo, files)
        url = f"{self.server.endpoint}/{repo}/commit/{sha}"
        self.send(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def commit_of(self, repo: str, revision: str | None) -> str:
        return self.server.head(repo) if revision in (None, "main") else str(revision)

    # -- reading -------------------------------------------------------------------------------

    def not_found(self) -> None:
        self.send(404, {"error": "Repository Not Found"}, "RepoNotFound")

    def without_owner(self, start: str, name: str, rest: str | None) -> None:
        if self.server.unowned == "404":
            return self.not_found()
        if self.server.unowned == "strict":
            return self.send(400, {"error": "Repository id must be 'namespace/name'"})
        self.send_response(307)
        self.send_header("Location", f"{start}{OWNERS[name]}/{name}{rest or ''}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def paths(self, repo: str, revision: str) -> None:
        asked = parse_qs(self.body.decode())["paths"]
        entries = self.entries(repo, revision)
        self.send(200, [entry for entry in entries if entry["path"] in asked])

    def entries(self, repo: str, revision: str) -> list[dict[str, Any]]:
        files = self.server.files(repo, self.commit_of(repo, revision))
        return [
            {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
            for n, c in files.items()
        ]

    def info(self, repo: str, revision: str | None) -> None:
        sha = self.commit_of(repo, revision)
        siblings = [{"rfilename": name} for name in self.server.files(repo, sha)]
        self.send(200, {"id": repo, "modelId": repo, "sha": sha, "siblings": siblings})

    def tree(self, repo: str, revision: str, below: str | None) -> None:
        start = "" if below is None else f"{below}/"
        entries = self.entries(repo, revision)
        self.send(200, [entry for entry in entries if entry["path"].startswith(start)])

    def resolve(self, repo: str, revision: str, name: str) -> None:
        commit = self.commit_of(repo, revision)
        file = self.server.folder / repo / commit / name
        if not file.is_file():
            return self.send(404, {"error": "Entry not found"}, "EntryNotFound", commit)
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def send(
        self, status: int, value: Any, error: str | None = None, commit: str | None = None
    ) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if error is not None:
            self.send_header("X-Error-Code", error)
        if commit is not None:
            self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Quiet: ``Hub.asked`` has it."""


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


@contextmanager
def serve(folder: Path, unowned: str = "redirect") -> Iterator[Hub]:
    """A hub while the block runs."""
    hub = Hub(folder, unowned=unowned)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def address(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``HF_ENDPOINT`` and ``HF_HOME`` say to a process that starts, said to this one."""
    reset_sessions()  # the client remembers that another test was offline
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    # transformers 4 has copied it
    for module, name in ((constants, "HF_HUB_CACHE"), (hub_utils, "TRANSFORMERS_CACHE")):
        monkeypatch.setattr(module, name, str(home / "hub"), raising=False)


if __name__ == "__main__":
    Hub(Path(sys.argv[2]), int(sys.argv[1])).serve_forever()
