"""A Hugging Face Hub on this machine: the endpoints that the real clients need to create, push, commit and download.

Everything is kept in memory. What a test wants to go wrong is set on the server: `meanwhile`, `cut_after`,
`broken_uploads`, `stalled`.
"""

import hashlib
import json
import re
import threading
import time
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {"hf_owner": "me", "hf_other": "you"}


@dataclass
class Repo:
    """A repository: its commits, each a whole tree, and its branches and pull requests."""

    owner: str
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, changes: dict[str, bytes], base: str | None = None) -> str:
        """Add files on top of a branch and return the commit's name."""
        tree = {**(self.commits[base] if base else {}), **changes}
        name = hashlib.sha1(f"{len(self.commits)}{sorted(tree)}".encode()).hexdigest()
        self.commits[name] = tree
        self.refs[ref] = name
        return name

    def resolve(self, revision: str) -> str | None:
        """Return the commit that a branch or a commit's name means."""
        return self.refs.get(revision, revision if revision in self.commits else None)


class HubServer(ThreadingHTTPServer):
    """The server; use it in a `with` block.

    `requests` lists what was asked, as "METHOD path". `meanwhile` is called once before the next commit is made.
    `cut_after` is a number of bytes after which the next download of a larger file breaks off. Of the next
    `broken_uploads` uploads the connection breaks off before they are stored. While `stalled`, uploads get no answer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.forget()

    def forget(self) -> None:
        """Begin anew, without repositories."""
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.meanwhile: Callable[[], None] | None = None
        self.cut_after: int | None = None
        self.broken_uploads = 0
        self.stalled = False

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a repository at a revision."""
        repo = self.repos[repo_id]
        return repo.commits[repo.refs[revision]]


class _Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = "refused") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args: Any) -> None:
        """Print nothing."""

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.path_only, self.query = unquote(parts.path), parse_qs(parts.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._read_chunks()
        self.server.requests.append(f"{self.command} {self.path_only}")
        try:
            for pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, f"{self.command} {self.path_only}")
                if match:
                    answer(self, *match.groups())
                    return
            raise _Refusal(404)
        except _Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)} if refusal.code else {}
            self._send(refusal.status, json.dumps({"error": str(refusal)}).encode(), headers)

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, content: bytes, headers: dict[str, str], stated: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if stated is None else stated))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise _Refusal(401, message="Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def _repo(self, repo_id: str, *, write: bool = False) -> Repo:
        user = self._user()
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and user != repo.owner):
            raise _Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user != repo.owner:
            raise _Refusal(403, message="You have no write access")
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        commit = repo.resolve(revision)
        if commit is None:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def create(self) -> None:
        user = self._user()
        if user is None:
            raise _Refusal(401, message="Invalid username or password.")
        asked = json.loads(self.body)
        repo_id = f"{asked['organization'] or user}/{asked['name']}"
        if repo_id in self.server.repos:
            self._send(409, json.dumps({"error": "exists", "url": f"{self.server.url}/{repo_id}"}).encode(), {})
            return
        if repo_id.split("/")[0] != user:
            raise _Refusal(403, message=f"You have no rights to create under {repo_id.split('/')[0]}")
        repo = self.server.repos[repo_id] = Repo(user, asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": b""})
        self._json({"url": f"{self.server.url}/{repo_id}", "id": repo_id})

    def info(self, repo_id: str, revision: str | None = None) -> None:
        repo = self._repo(repo_id)
        commit = self._commit(repo, revision or "main")
        siblings = [{"rfilename": path} for path in repo.commits[commit]]
        self._json({"id": repo_id, "sha": commit, "private": repo.private, "siblings": siblings})

    def tree(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id)
        files = repo.commits[self._commit(repo, revision)]
        self._json([_entry(path, content) for path, content in files.items()])

    def validate(self) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id)
        files = repo.commits[self._commit(repo, revision)]
        asked = json.loads(self.body)["files"]
        self._json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                        "shouldIgnore": False,
                        "oid": _oid(file["path"], files[file["path"]]) if file["path"] in files else None,
                    }
                    for file in asked
                ]
            }
        )

    def batch(self, repo_id: str) -> None:
        self._repo(repo_id, write=True)
        objects = []
        for item in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/blobs/{item['oid']}"}}
            objects.append(item if item["oid"] in self.server.blobs else {**item, "actions": upload})
        self._json({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        while self.server.stalled:
            time.sleep(0.05)
        if self.server.broken_uploads:
            self.server.broken_uploads -= 1
            self.close_connection = True
            return
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refusal(400, message="wrong sha256")
        self.server.blobs[oid] = self.body
        self._send(200, b"", {})

    def commit(self, repo_id: str, revision: str) -> None:
        meanwhile, self.server.meanwhile = self.server.meanwhile, None
        if meanwhile:
            meanwhile()
        pull_request = "create_pr" in self.query
        repo = self._repo(repo_id, write=not pull_request)
        header, *changes = (json.loads(line) for line in self.body.splitlines())
        base = self._commit(repo, revision)
        if header["value"].get("parentCommit", base) != base:
            raise _Refusal(412, message="A commit has happened since. Please refresh and try again.")
        files = {}
        for change in changes:
            value = change["value"]
            large = change["key"] == "lfsFile"
            files[value["path"]] = self.server.blobs[value["oid"]] if large else b64decode(value["content"])
        ref = f"refs/pr/{len(repo.refs)}" if pull_request else revision
        name = repo.commit(ref, files, base)
        answer = {"success": True, "commitOid": name, "commitUrl": f"{self.server.url}/{repo_id}/commit/{name}"}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.server.url}/{repo_id}/discussions/{ref.rsplit('/', 1)[1]}"
        self._json(answer)

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self._repo(repo_id)
        commit = self._commit(repo, revision)
        content = repo.commits[commit].get(path)
        if content is None:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        headers = {"ETag": f'"{_oid(path, content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]) if "Range" in self.headers else 0
        status = 206 if start else 200
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        rest = content[start:]
        cut = self.server.cut_after
        if self.command == "GET" and cut is not None and len(rest) > cut:
            self.server.cut_after = None
            self._send(status, rest[:cut], headers, stated=len(rest))
            self.close_connection = True
            return
        self._send(status, rest, headers)


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"GET /api/models/{_REPO}", _Handler.info),
    (rf"GET /api/models/{_REPO}/revision/(.+)", _Handler.info),
    (rf"GET /api/models/{_REPO}/tree/(.+)", _Handler.tree),
    (rf"POST /api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    (rf"POST /api/models/{_REPO}/commit/(.+)", _Handler.commit),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /blobs/(\w+)", _Handler.put),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/([^/]+|refs/pr/\d+)/(.+)", _Handler.resolve),
]


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _oid(path: str, content: bytes) -> str:
    """Return the name by which git, or its large file storage, knows a content."""
    if _is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _oid(path, content)}
    if _is_large(path):
        entry["lfs"] = {"oid": _oid(path, content), "size": len(content), "pointerSize": 134}
    return entry
