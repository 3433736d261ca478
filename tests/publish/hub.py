"""A loopback server that speaks the Hub's protocol, as far as uploading and loading models need it,
and loading data sets.

Repositories with branches and commits, large files by digest (in one piece or in parts), private
repositories, and tokens that may read or write. It keeps a log of what came, so that a test can
tell what was sent twice, and can stop answering in the middle of an upload.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITES, READS = "hf_" + "w" * 34, "hf_" + "r" * 34  # tokens
LARGE = (".safetensors", ".bin", ".gguf")
NAME = r"([^/]+/[^/]+?)"
DATA = r"(datasets/[^/]+/[^/]+?)"  # how a data set's repository is called here


@dataclass
class Repository:
    """Branches of {path: bytes}, and what each commit was."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[dict[str, Any]] = field(default_factory=list)

    def head(self, branch: str) -> str:
        """The commit that a branch is at."""
        count = sum(c["branch"] == branch for c in self.commits)
        return hashlib.sha1(f"{branch} {count}".encode()).hexdigest()

    def branch(self, name: str) -> str:
        """The branch of this name, or the one that is at this commit."""
        return next((b for b in self.branches if name in (b, self.head(b))), "main")


@dataclass
class Hub:
    """The server's memory.

    Attributes:
        repositories: by user/name, and datasets/user/name.
        objects: large files by SHA-256.
        arrived: how often each large file came in whole.
        parts: of large files that come in parts of `part` bytes.
        requests: (method, path) of all.
        unknown: requests that this server has no answer for.
        breaks: `hang` or `drop`: what happens to further large files once `enough` are there; the
            server never answers, or closes the connection.
        broke: it has happened.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    arrived: Counter[str] = field(default_factory=Counter)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    part: int = 2**40
    breaks: str = ""
    enough: int = 2
    broke: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> None:
        """A repository that is there already."""
        self.repositories[name] = Repository(private, {"main": files})


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub at `hub.url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Nothing on the screen."""

    def _any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if (
            path.startswith("/lfs/")
            and self.hub.breaks
            and len(self.hub.objects) >= self.hub.enough
        ):
            self.hub.broke.set()
            if self.hub.breaks == "hang":
                threading.Event().wait()
            self.close_connection = True
            return None
        body = self._body()
        for pattern, answer in ROUTES:
            if found := re.fullmatch(pattern, path):
                with self.hub.lock:
                    return answer(self, body, *found.groups())
        self.hub.unknown.append(f"{self.command} {path}")
        return self._say(404, {"error": "no such address"})

    do_GET = do_HEAD = do_POST = do_PUT = _any

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        read = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            read += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return read

    def _say(self, status: int, content: Any = None, **headers: str) -> None:
        plain = isinstance(content, bytes)
        data = content if plain else json.dumps({} if content is None else content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if plain else "text/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _may_write(self) -> bool:
        if self._token() == WRITES:
            return True
        status = 403 if self._token() == READS else 401
        self._say(status, {"error": "You don't have the rights"})
        return False

    def _repository(self, name: str) -> Repository | None:
        """The repository, or None after saying that there is none that this token may see."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self._token() not in (WRITES, READS)):
            self._say(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return found

    # uploading

    def _create(self, body: bytes) -> None:
        if not self._may_write():
            return
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        known = name in self.hub.repositories
        if not known:
            # clients differ in how they say it
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.hub.repositories[name] = Repository(private)
        url = f"{self.hub.url}/{name}"
        self._say(409 if known else 200, {"url": url, "name": name, "id": name})

    def _branch(self, body: bytes, name: str, branch: str) -> None:
        repository = self._repository(name) if self._may_write() else None
        if repository is None:
            return
        known = branch in repository.branches
        if not known:
            repository.branches[branch] = dict(repository.branches["main"])
        self._say(409 if known else 200, {})

    def _preupload(self, body: bytes, name: str, branch: str) -> None:
        repository = self._repository(name) if self._may_write() else None
        if repository is None:
            return
        there = repository.branches[branch]
        answers = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            answers.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": _digest(path, there[path]) if path in there else None,
                }
            )
        self._say(200, {"files": answers})

    def _batch(self, body: bytes, name: str) -> None:
        if not self._may_write():
            return
        answers = []
        for asked in json.loads(body)["objects"]:
            digest, size = asked["oid"], asked["size"]
            answer = {"oid": digest, "size": size}
            if digest not in self.hub.objects:
                upload: dict[str, Any] = {"href": f"{self.hub.url}/lfs/{digest}"}
                if size > self.hub.part:
                    count = -(-size // self.hub.part)
                    upload = {
                        "href": f"{self.hub.url}/lfs-complete",
                        "header": {"chunk_size": str(self.hub.part)}
                        | {f"{i:05d}": f"{self.hub.url}/lfs/{digest}/{i}"
                           for i in range(1, count + 1)},
                    }  # fmt: skip
                verify = {"href": f"{self.hub.url}/lfs-verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            answers.append(answer)
        self._say(200, {"transfer": "basic", "objects": answers})

    def _put(self, body: bytes, digest: str) -> None:
        if not self._take(digest, body):
            return self._say(422, {"error": "the content has another digest"})
        return self._say(200)

    def _put_part(self, body: bytes, digest: str, number: str) -> None:
        self.hub.parts[digest, int(number)] = body
        self._say(200, ETag=f'"{hashlib.md5(body).hexdigest()}"')

    def _complete(self, body: bytes) -> None:
        asked = json.loads(body)
        digest, numbers = asked["oid"], sorted(p["partNumber"] for p in asked["parts"])
        whole = b"".join(self.hub.parts.pop((digest, n)) for n in numbers)
        self._say(200 if self._take(digest, whole) else 422)

    def _take(self, digest: str, content: bytes) -> bool:
        if hashlib.sha256(content).hexdigest() != digest:
            return False
        self.hub.objects[digest] = content
        self.hub.arrived[digest] += 1
        return True

    def _verify(self, body: bytes) -> None:
        self._say(200 if json.loads(body)["oid"] in self.hub.objects else 404)

    def _commit(self, body: bytes, name: str, branch: str) -> None:
        repository = self._repository(name) if self._may_write() else None
        if repository is None:
            return
        files = repository.branches[branch]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repository.commits.append({"branch": branch, **value})
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                self.hub.unknown.append(f"commit entry {entry['key']}")
        head = repository.head(branch)
        url = f"{self.hub.url}/{name}/commit/{head}"
        self._say(200, {"success": True, "commitUrl": url, "commitOid": head})

    # reading

    def _info(self, body: bytes, name: str, branch: str = "main") -> None:
        repository = self._repository(name)
        if repository is None:
            return
        branch = repository.branch(branch)
        names = [{"rfilename": f} for f in repository.branches[branch]]
        self._say(200, {"id": name, "sha": repository.head(branch), "siblings": names, "tags": []})

    def _tree(self, body: bytes, name: str, branch: str, folder: str = "") -> None:
        """The files in a folder, with what lies deeper where that is asked for."""
        repository = self._repository(name)
        if repository is None:
            return
        files = repository.branches[repository.branch(branch)]
        inside = {p: c for p, c in files.items() if not folder or p.startswith(folder + "/")}
        if folder and not inside:
            return self._say(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        deep = parse_qs(urlsplit(self.path).query).get("recursive") != ["false"]
        found = [_entry(p, c) for p, c in inside.items() if deep or "/" not in _below(p, folder)]
        if not deep:
            below = {_below(p, folder).split("/")[0] for p in inside if "/" in _below(p, folder)}
            found += [{"type": "directory", "path": f"{folder}/{d}".strip("/"), "size": 0, "oid": d}
                      for d in sorted(below)]  # fmt: skip
        return self._say(200, found)

    def _resolve(self, body: bytes, name: str, branch: str, path: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        branch = repository.branch(branch)
        files, head = repository.branches[branch], repository.head(branch)
        if path not in files:
            missing = {"X_Error_Code": "EntryNotFound", "X_Repo_Commit": head}
            return self._say(404, {"error": "Entry not found"}, **missing)
        content, tag = files[path], f'"{_digest(path, files[path])}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        headers = {"X_Repo_Commit": head, "ETag": tag, "Accept_Ranges": "bytes"}
        if asked is None:
            return self._say(200, content, **headers)
        first, last = int(asked[1]), int(asked[2] or len(content) - 1)
        headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
        return self._say(206, content[first : last + 1], **headers)

    def _card_is_valid(self, body: bytes) -> None:
        self._say(200, {"errors": [], "warnings": []})


def _below(path: str, folder: str) -> str:
    """A path from this folder on."""
    return path[len(folder) + 1 :] if folder else path


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """A file in a listing."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
    entry["oid"] = _digest(path, content)
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": entry["oid"], "size": len(content), "pointerSize": 134}
    return entry


def _digest(path: str, content: bytes) -> str:
    """As git has it for a small file, of the content for a large one."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"/api/repos/create", _Handler._create),
    (r"/api/validate-yaml", _Handler._card_is_valid),
    (rf"/api/models/{NAME}/branch/(.+)", _Handler._branch),
    (rf"/api/models/{NAME}/preupload/(.+)", _Handler._preupload),
    (rf"/api/models/{NAME}/commit/(.+)", _Handler._commit),
    (rf"/api/models/{NAME}/tree/([^/]+)", _Handler._tree),
    (rf"/api/models/{NAME}/revision/([^/]+)", _Handler._info),
    (rf"/api/models/{NAME}", _Handler._info),
    (rf"/{NAME}\.git/info/lfs/objects/batch", _Handler._batch),
    (r"/lfs/([0-9a-f]{64})", _Handler._put),
    (r"/lfs/([0-9a-f]{64})/(\d+)", _Handler._put_part),
    (r"/lfs-complete", _Handler._complete),
    (r"/lfs-verify", _Handler._verify),
    (rf"/{NAME}/resolve/([^/]+)/(.+)", _Handler._resolve),
    (rf"/api/{DATA}/tree/([^/]+)", _Handler._tree),
    (rf"/api/{DATA}/tree/([^/]+)/(.+)", _Handler._tree),
    (rf"/api/{DATA}/revision/([^/]+)", _Handler._info),
    (rf"/api/{DATA}", _Handler._info),
    (rf"/{DATA}/resolve/([^/]+)/(.+)", _Handler._resolve),
]
