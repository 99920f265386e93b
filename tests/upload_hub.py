"""A server that takes uploads as ModelScope and Hugging Face do. It answers the calls of their clients.

It stands for both hubs at once. Large files come to Hugging Face by Xet (chunks in xorbs), or by Git LFS where Xet is
switched off, and to ModelScope by Git LFS; the rest comes within commits.
"""

import base64
import hashlib
import http.server
import json
import re
import time
import urllib.parse
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow

TOKEN = "secret"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Pointer:
    """A file that was committed by its digest."""

    sha256: str
    size: int


@dataclass
class Repository:
    private: bool
    licence: str | None = None
    branches: dict[str, dict[str, bytes | Pointer]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


class UploadHub(http.server.ThreadingHTTPServer):
    """Repositories are in `modelscope` and `huggingface`, uploads in `blobs` and `chunks`.

    `calls` lists every request.
    """

    daemon_threads = True
    request_queue_size = 128  # the clients open many connections at once; the usual 5 may overflow on a busy machine

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.modelscope: dict[str, Repository] = {}
        self.huggingface: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.chunks: list[bytes] = []
        self.calls: list[str] = []
        self.writers = {"me", "my-org"}

    def holds(self, kept: bytes | Pointer, content: bytes) -> bool:
        """Whether a committed file is `content`, and every byte of it arrived."""
        if not isinstance(kept, Pointer):
            return kept == content
        if (kept.sha256, kept.size) != (hashlib.sha256(content).hexdigest(), len(content)):
            return False
        return self.blobs.get(kept.sha256) == content or self._tiled(content)

    def sent(self) -> list[str]:
        """The calls that carried files' bytes or changed a repository."""
        return [
            call for call in self.calls if re.search(r"^PUT |/xorbs/|/commit/|repos/create|POST /api/v1/models$", call)
        ]

    def _tiled(self, content: bytes) -> bool:
        position = 0
        while position < len(content):
            fitting = [chunk for chunk in self.chunks if content.startswith(chunk, position)]
            if not fitting:
                return False
            position += len(max(fitting, key=len))
        return True


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: UploadHub

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urllib.parse.urlsplit(self.path)
        path, query = url.path, dict(urllib.parse.parse_qsl(url.query))
        self.server.calls.append(f"{self.command} {path}")
        if path == "/" or path.endswith("/telemetry"):
            self._reply({})
        elif path.startswith("/blob/"):
            self._take_blob(path.removeprefix("/blob/"))
        elif path.startswith("/cas/"):
            self._xet(path)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._reply({"error": "Invalid credentials in Authorization header", "Message": "who are you?"}, 401)
        elif path.startswith(("/openapi/v1/", "/api/v1/")):
            self._modelscope(path, query)
        else:
            self._huggingface(path)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _json(self) -> Any:
        return json.loads(self.body)

    def _take_blob(self, digest: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != digest:
            self._reply({"Message": "not what was announced"}, 400)
        else:
            self.server.blobs[digest] = self.body
            self._reply({})

    # --- ModelScope ---------------------------------------------------------------------------------------------------

    def _modelscope(self, path: str, query: dict[str, str]) -> None:
        match = re.fullmatch(r"/(?:openapi|api)/v1/(?:repos/)?models/([^/]+/[^/]+)(?:/(.+))?", path)
        if path == "/openapi/v1/users/me":
            self._reply({"success": True, "data": {"username": "me"}})
        elif path == "/api/v1/models":
            asked = self._json()
            repo = f"{asked['Path']}/{asked['Name']}"
            if asked["Path"] not in self.server.writers:
                self._reply({"Code": 403, "Message": f"no right to create in {asked['Path']}"}, 403)
            elif repo in self.server.modelscope:
                self._reply({"Code": 10010101001, "Message": "exists"}, 400)
            else:
                self.server.modelscope[repo] = Repository(asked["Visibility"] == 1, asked["License"], {"master": {}})
                self._reply({"Code": 200, "Data": {"Name": asked["Name"], "Path": asked["Path"]}})
        elif match is None or match[1] not in self.server.modelscope:
            self._reply({"Code": 404, "Message": "no such thing"}, 404)
        else:
            self._modelscope_repository(match[1], match[2] or "", query)

    def _modelscope_repository(self, name: str, rest: str, query: dict[str, str]) -> None:
        repository = self.server.modelscope[name]
        if rest == "":
            self._reply({"success": True, "data": {"id": name, "private": repository.private}})
        elif rest == "repo/files":
            branch = repository.branches.get(query["Revision"])
            files = [
                {"Path": path, "Type": "blob", "Size": 1, "Sha256": _sha256(kept)}
                for path, kept in (branch or {}).items()
            ]
            self._reply({"Code": 200, "Data": {"Files": files}}, 404 if branch is None else 200)
        elif name.split("/")[0] not in self.server.writers:
            self._reply({"Code": 403, "Message": f"no right to write to {name}"}, 403)
        elif rest == "info/lfs/objects/batch":
            self._reply({"Code": 200, "Data": {"objects": self._wanted_blobs()}})
        elif rest.startswith("commit/"):
            branch = repository.branches[rest.removeprefix("commit/")]
            for action in self._json()["actions"]:
                if action["type"] == "lfs":
                    assert action["sha256"] in self.server.blobs
                    branch[action["path"]] = Pointer(action["sha256"], action["size"])
                else:
                    branch[action["path"]] = base64.b64decode(action["content"])
            repository.messages.append(self._json()["commit_message"])
            self._reply({"Code": 200, "Success": True, "Data": {}})

    def _wanted_blobs(self) -> list[dict]:
        return [
            {**one, "actions": {"upload": {"href": f"{self.server.url}/blob/{one['oid']}"}}}
            for one in self._json()["objects"]
            if one["oid"] not in self.server.blobs
        ]

    # --- Hugging Face -------------------------------------------------------------------------------------------------

    def _huggingface(self, path: str) -> None:
        match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?(?:/(.+))?", path)
        if path == "/api/whoami-v2":
            self._reply({"name": "me"})
        elif path == "/api/validate-yaml":
            self._reply({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = self._json()
            repo = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] not in self.server.writers:
                self._reply({"error": f"You don't have the rights to create in {asked['organization']}"}, 403)
            else:
                private = asked.get("private", asked.get("visibility") == "private")  # before huggingface_hub 2: a bool
                self.server.huggingface[repo] = Repository(private, None, {"main": {}})
                self._reply({"url": f"{self.server.url}/{repo}"})
        elif match is None or match[1] not in self.server.huggingface:
            self._reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        else:
            self._huggingface_repository(match[1], match[2] or "")

    def _huggingface_repository(self, name: str, rest: str) -> None:
        repository = self.server.huggingface[name]
        verb, _, revision = rest.partition("/")
        revision = urllib.parse.unquote(revision)
        branch = repository.branches.get(revision)
        if verb in ("", "revision"):
            self._reply({"id": name, "sha": COMMIT, "private": repository.private, "siblings": []})
        elif name.split("/")[0] not in self.server.writers:
            self._reply({"error": f"You don't have the rights to write to {name}"}, 403)
        elif verb == "branch":
            repository.branches.setdefault(revision, dict(repository.branches["main"]))
            self._reply({})
        elif rest == "info/lfs/objects/batch":
            wanted = {one["oid"]: one for one in self._wanted_blobs()}
            self._reply(
                {"transfer": "basic", "objects": [wanted.get(one["oid"], one) for one in self._json()["objects"]]}
            )
        elif branch is None:
            self._reply({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif verb == "tree":
            self._reply([_tree_entry(path, kept) for path, kept in branch.items()])
        elif verb == "preupload":
            self._reply({"files": [self._upload_mode(file, branch) for file in self._json()["files"]]})
        elif verb == "xet-write-token":
            access = {"accessToken": "x", "exp": int(time.time()) + 3600, "casUrl": f"{self.server.url}/cas"}
            headers = {"X-Xet-Access-Token": "x", "X-Xet-Token-Expiration": str(access["exp"])}
            self._reply(access, 200, headers | {"X-Xet-Cas-Url": str(access["casUrl"])})
        elif verb == "commit":
            self._huggingface_commit(name, branch)

    def _upload_mode(self, file: dict, branch: dict[str, bytes | Pointer]) -> dict:
        large = file["path"].endswith((".pt", ".safetensors"))
        kept = branch.get(file["path"])
        oid = kept.sha256 if isinstance(kept, Pointer) else None if kept is None else _git_oid(kept)
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def _huggingface_commit(self, name: str, branch: dict[str, bytes | Pointer]) -> None:
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.server.huggingface[name].messages.append(value["summary"])
            elif line["key"] == "file":
                branch[value["path"]] = base64.b64decode(value["content"])
            else:
                branch[value["path"]] = Pointer(value["oid"], value["size"])
        self._reply({"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def _xet(self, path: str) -> None:
        """Xet's storage. It takes whole xorbs. It answers 404 to newer calls, which upload by grants."""
        if "/v1/xorbs/" in path:
            self.server.chunks += _chunks(self.body)
            self._reply({"was_inserted": True})
        elif path == "/cas/v1/shards":
            self._reply({"result": 1})
        else:
            self._reply({}, 404)

    def _reply(self, answer: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def _sha256(kept: bytes | Pointer) -> str:
    return kept.sha256 if isinstance(kept, Pointer) else hashlib.sha256(kept).hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree_entry(path: str, kept: bytes | Pointer) -> dict:
    if isinstance(kept, Pointer):
        lfs = {"oid": kept.sha256, "size": kept.size, "pointerSize": 130}
        return {"type": "file", "path": path, "size": kept.size, "oid": "0" * 40, "lfs": lfs}
    return {"type": "file", "path": path, "size": len(kept), "oid": _git_oid(kept)}


def _chunks(xorb: bytes) -> list[bytes]:
    """The chunks of a xorb. Before each are 8 bytes: version, packed size, scheme and size.

    Scheme 0 means unpacked, and 1 means LZ4. With scheme 2, bytes 0, 4, 8, ... come first, then bytes 1, 5,
    9, ..., and so on. LZ4 packs the result.
    """
    chunks, position = [], 0
    while position < len(xorb):
        packed_size = int.from_bytes(xorb[position + 1 : position + 4], "little")
        scheme = xorb[position + 4]
        size = int.from_bytes(xorb[position + 5 : position + 8], "little")
        chunk = xorb[position + 8 : position + 8 + packed_size]
        if scheme:
            chunk = pyarrow.decompress(chunk, size, codec="lz4", asbytes=True)
        if scheme == 2:
            groups, start = np.empty(size, np.uint8), 0
            for group in range(4):
                length = len(range(group, size, 4))
                groups[group::4] = np.frombuffer(chunk, np.uint8, length, start)
                start += length
            chunk = groups.tobytes()
        chunks.append(chunk)
        position += 8 + packed_size
    return chunks
