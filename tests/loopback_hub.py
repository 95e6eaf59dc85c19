"""A loopback stand-in for the Hub, with the API for creating, pushing and loading models and for reading data sets.

As on the Hub, large files (`.safetensors`, `.png`) are uploaded through git LFS and the others in the commit.
Repositories are kept in memory, every commit with all its files. `faults` makes chosen requests fail.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_secretTokenOfThisTest0123456789"
USER = "someone"
LARGE = (".safetensors", ".png")


class LoopbackHub:
    """A running stand-in; `address` is for HF_ENDPOINT.

    Attributes:
        commits: repository id -> its commits, oldest first, each a dictionary of path -> content.
        heads: (repository id, branch) -> the number of its newest commit.
        private: ids of the private repositories.
        error_text: what the body of a failed answer says.
        faults: pattern of "METHOD /path" -> what happens to the next matching requests, one after another: an HTTP
            status, "cut" to break the connection in the middle of the body, or "stall" to never answer.
        refused: pattern of "METHOD /path" -> the HTTP status and error code of every answer to such requests.
        before_commit: called once, before the next commit is accepted.
        bodies: the bodies of all requests, in order.
    """

    def __init__(self):
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.heads: dict[tuple[str, str], int] = {}
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}  # sha256 -> content
        self.faults: dict[str, list[int | str]] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        self.error_text, self.token_role = "out of order", "write"
        self.before_commit: Callable[[], object] | None = None
        self.bodies: list[bytes] = []
        self.stopped = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo_id: str, *commits: dict[str, bytes]) -> list[str]:
        """Adds a repository, whose first commit is `main`; returns the ids of the commits."""
        self.commits[repo_id], self.heads[repo_id, "main"] = list(commits), 0
        return self._ids(repo_id)

    def commit_id(self, repo_id: str, revision: str = "main") -> str:
        """The newest commit of a branch; a commit itself."""
        if (repo_id, revision) in self.heads:
            return self._ids(repo_id)[self.heads[repo_id, revision]]
        return revision

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files at a branch or commit; KeyError if there is no such repository or revision."""
        commits = dict(zip(self._ids(repo_id), self.commits[repo_id], strict=True))
        return commits[self.commit_id(repo_id, revision)]

    def _ids(self, repo_id: str) -> list[str]:
        return [hashlib.sha1(f"{repo_id} {n}".encode()).hexdigest() for n in range(len(self.commits[repo_id]))]


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def handle_request(self) -> None:
        path = unquote(self.path.split("?")[0])
        faults = [left for key, left in self.hub.faults.items() if left and re.search(key, f"{self.command} {path}")]
        fault = faults[0].pop(0) if faults else None
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "cut":
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        if fault == "stall":
            self.hub.stopped.wait()
            self.close_connection = True
            return
        body = self.rfile.read(length)
        self.hub.bodies.append(body)
        if fault is not None:
            return self.answer(fault, {"error": self.hub.error_text})
        for pattern, (status, code) in self.hub.refused.items():
            if re.search(pattern, f"{self.command} {path}"):
                return self.answer(status, {"error": code}, {"X-Error-Code": code})
        is_write = path.startswith("/api/") and "/paths-info/" not in path
        is_write = is_write and (self.command == "POST" or path.endswith(("/write", "/whoami-v2")))
        if is_write and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        for pattern, respond in ROUTES.items():
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match:
                try:
                    return respond(self, *match.groups(), body=body)
                except KeyError:
                    code = "RevisionNotFound" if match[1] in self.hub.commits else "RepoNotFound"
                    return self.answer(404, {"error": "no such repository or revision"}, {"X-Error-Code": code})
        return self.answer(404, {"error": f"nothing at {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer(self, status: int, content: bytes | dict | list, headers: dict | None = None) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        with suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    def log_message(self, *_):
        pass

    # ---- What the Hub does

    def who_am_i(self, body: bytes) -> None:
        self.answer(200, {"name": USER, "orgs": [], "auth": {"accessToken": {"role": self.hub.token_role}}})

    def create(self, body: bytes) -> None:
        wish = json.loads(body)
        if (wish.get("organization") or USER) != USER:
            return self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        repo_id = f"{USER}/{wish['name']}"
        exists = repo_id in self.hub.commits
        if not exists:
            self.hub.commits[repo_id] = [{".gitattributes": b"*.safetensors filter=lfs\n"}]
            self.hub.heads[repo_id, "main"] = 0
            if wish.get("visibility") == "private" or wish.get("private"):
                self.hub.private.add(repo_id)
        self.answer(409 if exists else 200, {"url": f"{self.hub.address}/{repo_id}", "error": "exists"})

    def accept(self, *_, body: bytes) -> None:
        self.answer(200, {})

    def preupload(self, repo_id: str, revision: str, body: bytes) -> None:
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = {name: "lfs" if name.endswith(LARGE) else "regular" for name in names}
        self.answer(200, {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})

    def lfs_batch(self, repo_id: str, body: bytes) -> None:
        objects = []
        for wish in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.address}/lfs/{wish['oid']}"}}
            objects.append(wish if wish["oid"] in self.hub.large else wish | {"actions": upload})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str, body: bytes) -> None:
        self.hub.large[oid] = body
        self.answer(200, {})

    def commit(self, repo_id: str, revision: str, body: bytes) -> None:
        before, self.hub.before_commit = self.hub.before_commit, None
        if before is not None:
            before()
        files = dict(self.hub.files(repo_id, revision))
        parent = json.loads(body.splitlines()[0])["value"].get("parentCommit")
        if parent not in (None, self.hub.commit_id(repo_id, revision)):
            return self.answer(412, {"error": "there was a commit since"})
        for line in body.splitlines():
            kind, value = (item := json.loads(line))["key"], item["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        self.hub.heads[repo_id, revision] = len(self.hub.commits[repo_id])
        self.hub.commits[repo_id].append(files)
        oid = self.hub.commit_id(repo_id, revision)
        self.answer(200, {"commitUrl": f"{self.hub.address}/{repo_id}/commit/{oid}", "commitOid": oid})

    def tree(self, repo_id: str, revision: str, body: bytes) -> None:
        files = self.hub.files(repo_id, revision)
        self.answer(200, [_entry(path, content) for path, content in files.items()])

    def info(self, repo_id: str, revision: str | None, body: bytes) -> None:
        files, sha = self.hub.files(repo_id, revision or "main"), self.hub.commit_id(repo_id, revision or "main")
        self.answer(200, {"id": repo_id, "sha": sha, "siblings": [{"rfilename": path} for path in files]})

    def resolve(self, repo_id: str, revision: str, path: str, body: bytes) -> None:
        files = self.hub.files(repo_id, revision)
        if path not in files:
            return self.answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
        content, status, commit = files[path], 200, self.hub.commit_id(repo_id, revision)
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        if span := self.headers.get("Range"):
            first, last = (int(number or len(content)) for number in span.removeprefix("bytes=").split("-"))
            last, status = min(last, len(content) - 1), 206
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content = content[first : last + 1]
        self.answer(status, content, headers)

    def paths_info(self, repo_id: str, revision: str, body: bytes) -> None:
        files = self.hub.files(repo_id, revision)
        paths = json.loads(body)["paths"]
        self.answer(200, [_entry(path, files[path]) for path in paths if path in files])


def _entry(path: str, content: bytes) -> dict:
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": path, "size": len(content), "oid": oid}
    if path.endswith(LARGE):
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
    return entry


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    r"GET /api/whoami-v2": _Handler.who_am_i,
    r"POST /api/repos/create": _Handler.create,
    rf"GET /api/models/{REPO}/auth-check/write": _Handler.accept,
    r"POST /api/validate-yaml": _Handler.accept,
    rf"POST /api/models/{REPO}/preupload/(.+)": _Handler.preupload,
    rf"POST /{REPO}\.git/info/lfs/objects/batch": _Handler.lfs_batch,
    r"PUT /lfs/(\w+)": _Handler.lfs_upload,
    rf"POST /api/models/{REPO}/commit/(.+)": _Handler.commit,
    rf"GET /api/(?:models|datasets)/{REPO}/tree/([^/]+)(?:/.*)?": _Handler.tree,
    rf"GET /api/(?:models|datasets)/{REPO}(?:/revision/([^/]+))?": _Handler.info,
    rf"POST /api/datasets/{REPO}/paths-info/([^/]+)": _Handler.paths_info,
    rf"(?:GET|HEAD) /(?:datasets/)?{REPO}/resolve/([^/]+)/(.+)": _Handler.resolve,
}
