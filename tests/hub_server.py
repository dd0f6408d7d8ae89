"""A Hub on 127.0.0.1, as much of its public API as pushing and loading a model needs.

Written against what huggingface_hub's client sends and reads, and the documented rules of model cards; everything is in
memory. Tokens are `hf_<user>`; the Hub of `{"alice"}` knows `hf_alice` alone. `break_on` makes the next requests of a
kind fail.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from .hub_store import LARGE, Files, Repository, metadata_errors, oid_of

TOKEN = "hf_alice"


class Hub(ThreadingHTTPServer):
    """The server: `url`, what was pushed, and what was asked."""

    daemon_threads = True

    def __init__(self, users: set[str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.users = users
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken: list[tuple[str, int]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo_id: str, revision: str = "main") -> Files:
        repository = self.repositories[repo_id]
        return repository.commits[repository.find(revision)]

    def break_on(self, kind: str, status: int = 0, times: int = 1) -> None:
        """The next requests whose `METHOD path` contains `kind` get this status; 0: the connection is dropped."""
        self.broken += [(kind, status)] * times


class Refusal(Exception):  # noqa: N818
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        line = f"{self.command} {path}"
        with self.server.lock:
            self.server.requests.append(line)
            broken = next((fault for fault in self.server.broken if fault[0] in line), None)
            if broken:
                self.server.broken.remove(broken)
        if broken and broken[1] == 0:
            self.close_connection = True
            self.connection.shutdown(2)
            return
        try:
            if broken:
                raise Refusal(broken[1], "made to fail")
            with self.server.lock:
                for pattern, name in ROUTES:
                    if match := re.fullmatch(pattern, line):
                        getattr(self, name)(body, *match.groups())
                        return
            raise Refusal(404, f"no such endpoint: {line}")
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            self.send(refusal.status, {"error": refusal.message}, {**headers, "X-Error-Message": refusal.message})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = respond  # noqa: N815

    def send(self, status: int, content: object = None, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Who may do what

    def user(self) -> str | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not given:
            return None
        name = given.removeprefix("hf_")
        if name not in self.server.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return name

    def writer(self, repo_id: str) -> None:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if repo_id.partition("/")[0] != user:
            raise Refusal(403, f"You don't have the rights to write to the namespace of {repo_id}")

    def readable(self, repo_id: str) -> Repository:
        found = self.server.repositories.get(repo_id)
        if found is None or (found.private and repo_id.partition("/")[0] != self.user()):
            raise Refusal(404 if self.user() else 401, "Repository not found", "RepoNotFound")
        return found

    def at(self, repo_id: str, revision: str) -> tuple[str, Files]:
        repository = self.readable(repo_id)
        oid = repository.find(revision)
        if oid is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repository.commits[oid]

    # Accounts, repositories, branches, tags

    def whoami(self, body: bytes) -> None:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        self.send(200, {"type": "user", "name": user, "orgs": [], "auth": {}})

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or self.user()}/{wanted['name']}"
        self.writer(repo_id)
        answer = {"url": f"{self.server.url}/{repo_id}", "name": repo_id}
        if repo_id in self.server.repositories:
            self.send(409, {**answer, "error": "You already created this model repo"})
            return
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.server.repositories[repo_id] = Repository(private)
        self.server.repositories[repo_id].commit("main", {".gitattributes": b""}, "initial commit")
        self.send(200, answer)

    def branch(self, body: bytes, repo_id: str, name: str) -> None:
        self.writer(repo_id)
        repository = self.readable(repo_id)
        if name in repository.branches:
            raise Refusal(409, "Reference already exists")
        repository.branches[name] = self.at(repo_id, json.loads(body or b"{}").get("startingPoint", "main"))[0]
        self.send(201)

    def tag(self, body: bytes, repo_id: str, revision: str) -> None:
        self.writer(repo_id)
        name = json.loads(body)["tag"]
        if name in self.readable(repo_id).tags:
            raise Refusal(409, "Tag reference exists already")
        self.readable(repo_id).tags[name] = self.at(repo_id, revision)[0]
        self.send(201)

    def refs(self, body: bytes, repo_id: str) -> None:
        repository = self.readable(repo_id)

        def rows(kind: str, found: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid} for n, oid in found.items()]

        self.send(200, {"branches": rows("heads", repository.branches), "tags": rows("tags", repository.tags),
                        "converts": []})  # fmt: skip

    # Uploading

    def validate(self, body: bytes) -> None:
        errors = metadata_errors(json.loads(body)["content"])
        self.send(400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []})

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        self.writer(repo_id)
        _, files = self.at(repo_id, revision)
        self.send(200, {"files": [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                **({"oid": oid_of(file["path"], files[file["path"]])} if file["path"] in files else {}),
            }
            for file in json.loads(body)["files"]
        ]})  # fmt: skip

    def lfs_batch(self, body: bytes, repo_id: str) -> None:
        self.writer(repo_id)
        objects = []
        for wanted in json.loads(body)["objects"]:
            href = f"{self.server.url}/lfs/{wanted['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            known = wanted["oid"] in self.server.blobs
            objects.append({**wanted, "authenticated": True, **({} if known else {"actions": actions})})
        self.send(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(422, "content does not have this hash")
        self.server.blobs[oid] = body
        self.send(200)

    def lfs_verify(self, body: bytes, oid: str) -> None:
        if oid not in self.server.blobs:
            raise Refusal(404, "no such object")
        self.send(200)

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        self.writer(repo_id)
        repository = self.readable(repo_id)
        if revision not in repository.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files, summary = dict(self.at(repo_id, revision)[1]), ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                summary = value["summary"]
                if value.get("parentCommit") not in (None, repository.branches[revision]):
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    raise Refusal(422, f"{value['path']} has not been uploaded")
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        if "README.md" in files and (errors := metadata_errors(files["README.md"].decode())):
            raise Refusal(400, "; ".join(errors))
        oid = repository.commit(revision, files, summary)
        self.send(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}"})

    # Reading

    def info(self, body: bytes, repo_id: str, revision: str | None = None) -> None:
        oid, files = self.at(repo_id, revision or "main")
        siblings = [{"rfilename": name} for name in sorted(files)]
        self.send(200, {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": oid, "siblings": siblings, "tags": [],
                        "private": self.readable(repo_id).private, "downloads": 0, "likes": 0})  # fmt: skip

    def tree(self, body: bytes, repo_id: str, revision: str) -> None:
        _, files = self.at(repo_id, revision)
        self.send(200, [
            {"type": "file", "path": name, "size": len(data), "oid": oid_of(name, data)}
            for name, data in sorted(files.items())
        ])  # fmt: skip

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        oid, files = self.at(repo_id, revision)
        if path not in files:
            raise Refusal(404, f"Entry not found: {path}", "EntryNotFound")
        etag = f'"{oid_of(path, files[path])}"'
        self.send(200, files[path], {"ETag": etag, "X-Repo-Commit": oid, "X-Linked-Size": str(len(files[path])),
                                     "X-Linked-ETag": etag, "Content-Type": "application/octet-stream"})  # fmt: skip


ID = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate"),
    (rf"POST /api/models/{ID}/branch/(.+)", "branch"),
    (rf"POST /api/models/{ID}/tag/(.+)", "tag"),
    (rf"POST /api/models/{ID}/preupload/(.+)", "preupload"),
    (rf"POST /api/models/{ID}/commit/(.+)", "commit"),
    (rf"POST /{ID}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /lfs/(\w+)", "lfs_put"),
    (r"POST /lfs/(\w+)/verify", "lfs_verify"),
    (rf"GET /api/models/{ID}/refs", "refs"),
    (rf"GET /api/models/{ID}", "info"),
    (rf"GET /api/models/{ID}/revision/(.+)", "info"),
    (rf"GET /api/models/{ID}/tree/([^/]+)", "tree"),
    (rf"(?:GET|HEAD) /{ID}/resolve/([^/]+)/(.+)", "resolve"),
)


@contextlib.contextmanager
def running(users: set[str] | None = None) -> Iterator[Hub]:
    """A Hub for as long as the block lasts."""
    hub = Hub(users or {"alice", "bob"})
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
