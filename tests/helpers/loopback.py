"""A Hub on 127.0.0.1 that speaks what the real `huggingface_hub` client says, and fails on demand.

Uploads go by git LFS: the tests set HF_HUB_DISABLE_XET=1, for a loopback of the Xet protocol would
be a storage service.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import socket
import struct
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from helpers.loopback_faults import CARRIED_OUT, Fault, Faults
from helpers.loopback_store import Blob, Repository

# The client's first try again, after a second, finds nobody either.
REFUSED_S = 1.3
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".png")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    stage: str
    authorized: bool
    time: float


@dataclass(frozen=True)
class User:
    name: str
    write: bool
    orgs: tuple[str, ...] = ()


class Answer(Exception):
    """Status, headers and body of an answer; raised where a request goes wrong."""

    def __init__(self, status: int, body: Any = None, *, code: str = "", message: str = "", **more):
        super().__init__(status)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in more.items()}
        if code:
            self.headers["X-Error-Code"] = code
        if message:
            self.headers["X-Error-Message"] = message
            body = {"error": message}
        if isinstance(body, bytes):
            self.body = body
        else:
            self.body = json.dumps(body).encode()
            self.headers.setdefault("Content-Type", "application/json")


class LoopbackHub:
    """Start it, point HF_ENDPOINT at `url`, look into `repos` and `requests`."""

    def __init__(self) -> None:
        self.users: dict[str, User] = {}
        self.repos: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults = Faults()
        self.delay = 0.0
        self.stall = 30.0
        self.lock = threading.RLock()
        self.woken = threading.Event()
        self.connections: set[socket.socket] = set()
        self.server: ThreadingHTTPServer | None = None
        self.stopped = False
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add_user(self, name: str, token: str, write: bool = True, orgs: tuple = ()) -> None:
        self.users[token] = User(name, write, orgs)

    def up(self) -> None:
        hub = self

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

        class BoundHandler(Handler):
            pass

        BoundHandler.hub = hub
        self.woken.clear()
        self.server = Server(("127.0.0.1", self.port), BoundHandler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    start = up

    def down(self) -> None:
        """Refuse connections, and end those there are."""
        server, self.server = self.server, None
        self.woken.set()
        if server is not None:
            server.shutdown()
            server.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        self.stopped = True
        self.down()

    def refuse_for(self, seconds: float) -> None:
        """From another thread, for the one that serves is asked to stop."""

        def blink() -> None:
            self.down()
            time.sleep(seconds)
            if not self.stopped:
                self.up()

        threading.Thread(target=blink, daemon=True).start()

    def inject(self, stage: str, kind: str, times: int | None = 1) -> Fault:
        return self.faults.inject(stage, kind, times)

    def clear_faults(self) -> None:
        self.faults.clear()

    def count(self, stage: str) -> int:
        return sum(request.stage == stage for request in self.requests)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_: Any) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().handle()

    def serve(self) -> None:
        stage = get_stage(self.command, self.path)
        authorized = self.headers.get("Authorization") is not None
        request = Request(self.command, self.path, stage, authorized, time.time())
        self.hub.requests.append(request)
        fault = self.hub.faults.take(stage)
        length = int(self.headers.get("Content-Length") or 0)
        if fault and fault.kind == "reset" and length:
            self.rfile.read(length // 2)
            return self.reset()
        body = self.rfile.read(length)
        time.sleep(self.hub.delay)
        if (
            fault
            and fault.kind not in CARRIED_OUT
            and not (stage == "download" and fault.kind in ("reset", "malformed"))
        ):
            return self.fail(fault)
        try:
            with self.hub.lock:
                answer = route(self.hub, self, stage, body)
        except Answer as refusal:
            answer = refusal
        self.send(answer, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def fail(self, fault: Fault) -> None:
        if fault.kind.isdecimal():
            wait = {"Retry-After": "1"} if fault.kind == "429" else {}
            self.send(Answer(int(fault.kind), message=f"injected {fault.kind}", **wait), None)
        elif fault.kind == "malformed":
            self.send(Answer(200, b"<html>not json</html>"), None)
        elif fault.kind == "reset":
            self.reset()
        else:
            if fault.kind == "timeout":
                self.hub.woken.wait(self.hub.stall)
            elif fault.kind == "refused":
                self.hub.refuse_for(REFUSED_S)
            self.drop()

    def send(self, answer: Answer, fault: Fault | None) -> None:
        body = answer.body
        kind = fault.kind if fault else ""
        if kind == "lost_answer":
            return self.drop()
        if kind == "malformed":
            body = bytes(byte ^ 1 for byte in body)
        head = f"HTTP/1.1 {answer.status} X\r\n"
        for name, value in ({"Content-Length": str(len(body))} | answer.headers).items():
            head += f"{name}: {value}\r\n"
        payload = b"" if self.command == "HEAD" else body
        complete = head.encode() + b"\r\n" + payload
        if kind in ("truncated", "reset"):
            self.connection.sendall(complete[: len(complete) - max(1, len(payload) // 2)])
            return self.reset() if kind == "reset" else self.drop()
        if kind == "slow":
            for start in range(0, len(complete), max(1, len(complete) // 10)):
                self.connection.sendall(complete[start : start + max(1, len(complete) // 10)])
                time.sleep(0.03)
            return None
        self.connection.sendall(complete)
        return None

    def drop(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        self.close_connection = True
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()


def get_stage(method: str, path: str) -> str:
    """The part of an exchange that a request belongs to."""
    parts = urlsplit(path).path.strip("/").split("/")
    if parts[:2] == ["api", "whoami-v2"]:
        return "whoami"
    if parts[:2] == ["api", "validate-yaml"]:
        return "validate"
    if parts[:3] == ["api", "repos", "create"]:
        return "create"
    if parts[:2] == ["api", "models"] and len(parts) >= 4:
        kind = parts[4] if len(parts) > 4 else "info"
        return {"auth-check": "auth", "revision": "info"}.get(kind, kind)
    if parts[0] == "lfs":
        return "verify" if parts[1] == "verify" else "lfs_upload"
    if parts[-3:] == ["lfs", "objects", "batch"]:
        return "lfs_batch"
    if len(parts) > 3 and parts[2] == "resolve":
        return "head" if method == "HEAD" else "download"
    return "other"


def route(hub: LoopbackHub, request: Handler, stage: str, body: bytes) -> Answer:
    user = sign_in(hub, request)
    url = urlsplit(request.path)
    parts = [unquote(part) for part in url.path.strip("/").split("/")]
    if stage == "whoami":
        if user is None:
            raise Answer(401, message="Invalid username or password.")
        orgs = [{"name": org} for org in user.orgs]
        return Answer(200, {"type": "user", "name": user.name, "orgs": orgs, "auth": {}})
    if stage == "validate":
        return validate_card(json.loads(body)["content"])
    if stage == "create":
        return create(hub, user, json.loads(body))
    if stage in ("lfs_upload", "verify"):
        return store_lfs(hub, request, parts, stage, body)
    if stage == "other":
        raise Answer(404, message="Not found.")
    name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2]).removesuffix(".git")
    repo = find(hub, user, name)
    writes = request.command in ("POST", "DELETE", "PUT") or parts[-1] == "write"
    if writes and (user is None or not user.write or not owns(user, name)):
        raise Answer(403, message="You don't have the rights to write to this repository.")
    action = ACTIONS[stage]
    return action(hub, repo, request.command, parts, parse_qs(url.query), body)


def sign_in(hub: LoopbackHub, request: Handler) -> User | None:
    header = request.headers.get("Authorization")
    if header is None:
        return None
    user = hub.users.get(header.removeprefix("Bearer "))
    if user is None:
        raise Answer(401, message="Invalid credentials in Authorization header")
    return user


def owns(user: User, name: str) -> bool:
    return name.split("/")[0] in (user.name, *user.orgs)


def find(hub: LoopbackHub, user: User | None, name: str) -> Repository:
    repo = hub.repos.get(name)
    if repo is None or (repo.private and not (user and owns(user, name))):
        raise Answer(404 if user else 401, code="RepoNotFound", message="Repository not found")
    return repo


def create(hub: LoopbackHub, user: User | None, wanted: dict) -> Answer:
    if user is None:
        raise Answer(401, message="Sign in first.")
    name = f"{wanted.get('organization') or user.name}/{wanted['name']}"
    if not user.write or not owns(user, name):
        raise Answer(
            403, message="You don't have the rights to create a model under this namespace"
        )
    url = f"{hub.url}/{name}"
    if name in hub.repos:
        raise Answer(409, {"url": url, "error": "You already created this model repo"})
    hub.repos[name] = Repository(name, wanted.get("visibility") == "private")
    return Answer(200, {"url": url})


def validate_card(content: str) -> Answer:
    errors = []
    try:
        parts = content.split("---")
        data = yaml.safe_load(parts[1]) if len(parts) > 2 else {}
    except yaml.YAMLError as error:
        data, errors = {}, [str(error)]
    if not isinstance(data, dict):
        data, errors = {}, ["metadata is no mapping"]
    for key, kinds in {"license": str, "tags": list, "datasets": list, "model-index": list}.items():
        if key in data and not isinstance(data[key], kinds):
            errors.append(f'"{key}" must be a {kinds.__name__}')
    messages = [{"message": error} for error in errors]
    return Answer(400 if errors else 200, {"errors": messages, "warnings": []})


def store_lfs(hub: LoopbackHub, request: Handler, parts: list[str], stage: str, body: bytes):
    if stage == "verify":
        repo, oid = hub.repos["/".join(parts[2:4])], json.loads(body)["oid"]
        if oid not in repo.lfs:
            raise Answer(404, message="There is no such object.")
        return Answer(200, {})
    if hashlib.sha256(body).hexdigest() != parts[3]:
        raise Answer(400, message="The object differs from its name.")
    hub.repos["/".join(parts[1:3])].lfs[parts[3]] = body
    return Answer(200, {})


def resolve(repo: Repository, revision: str) -> str:
    sha = repo.resolve(revision)
    if sha is None:
        raise Answer(404, code="RevisionNotFound", message=f"Invalid rev id: {revision}")
    return sha


def info(hub, repo, method, parts, query, body) -> Answer:
    sha = resolve(repo, parts[5] if len(parts) > 5 else "main")
    siblings = [{"rfilename": path} for path in repo.by_sha[sha].files]
    known = {"id": repo.name, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings}
    return Answer(200, known)


def auth_check(hub, repo, method, parts, query, body) -> Answer:
    return Answer(200, {})


def tree(hub, repo, method, parts, query, body) -> Answer:
    files = repo.by_sha[resolve(repo, parts[5])].files
    under = "/".join(parts[6:])
    prefix = under + "/" if under else ""
    found = [blob.entry(path) for path, blob in files.items() if path.startswith(prefix)]
    if under and not found:
        raise Answer(404, code="EntryNotFound", message=f"{under} does not exist")
    return Answer(200, found)


def refs(hub, repo, method, parts, query, body) -> Answer:
    def listed(kind: str, names: dict[str, str]) -> list[dict]:
        return [
            {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha}
            for name, sha in names.items()
        ]

    known = {"branches": listed("heads", repo.branches), "tags": listed("tags", repo.tags)}
    return Answer(200, known | {"converts": []})


def branch(hub, repo, method, parts, query, body) -> Answer:
    if parts[5] in repo.branches:
        raise Answer(409, message="Reference already exists")
    start = json.loads(body or b"{}").get("startingPoint", "main")
    repo.branches[parts[5]] = resolve(repo, start)
    return Answer(200, {})


def tag(hub, repo, method, parts, query, body) -> Answer:
    if method == "DELETE":
        if repo.tags.pop(parts[5], None) is None:
            raise Answer(404, code="RevisionNotFound", message="There is no such tag.")
        return Answer(200, {})
    name, sha = json.loads(body)["tag"], resolve(repo, parts[5])
    if name in repo.tags:
        raise Answer(409, message="Tag reference exists already")
    repo.tags[name] = sha
    return Answer(200, {})


def preupload(hub, repo, method, parts, query, body) -> Answer:
    there = repo.by_sha[resolve(repo, parts[5])].files
    files = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
            "shouldIgnore": False,
            "oid": there[file["path"]].oid if file["path"] in there else None,
        }
        for file in json.loads(body)["files"]
    ]
    return Answer(200, {"files": files})


def lfs_batch(hub, repo, method, parts, query, body) -> Answer:
    objects = []
    for wanted in json.loads(body)["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in repo.lfs:
            upload = {"href": f"{hub.url}/lfs/{repo.name}/{wanted['oid']}"}
            verify = {"href": f"{hub.url}/lfs/verify/{repo.name}"}
            answer["actions"] = {"upload": upload, "verify": verify}
        objects.append(answer)
    return Answer(200, {"transfer": "basic", "objects": objects})


def commit(hub, repo, method, parts, query, body) -> Answer:
    lines = [json.loads(line) for line in body.splitlines()]
    header, name = lines[0]["value"], parts[5]
    head = resolve(repo, name)
    if header.get("parentCommit") not in (None, head):
        raise Answer(412, message="A commit has happened since. Please refresh and try again.")
    files = dict(repo.by_sha[head].files)
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
        elif line["key"] == "lfsFile":
            if value["oid"] not in repo.lfs:
                raise Answer(400, message="LFS object is missing")
            files[value["path"]] = Blob(repo.lfs[value["oid"]], True)
        elif files.pop(value["path"], None) is None:
            raise Answer(404, code="EntryNotFound", message="A file with this name doesn't exist")
    made = repo.commit(name, header["summary"], files)
    url = f"{hub.url}/{repo.name}/commit/{made.sha}"
    known = {"success": True, "commitUrl": url, "commitOid": made.sha, "pullRequestUrl": None}
    return Answer(200, known)


def file(hub, repo, method, parts, query, body) -> Answer:
    sha, path = resolve(repo, parts[3]), "/".join(parts[4:])
    if path not in repo.by_sha[sha].files:
        headers = {"X-Repo-Commit": sha}
        raise Answer(404, code="EntryNotFound", message="Entry not found", **headers)
    blob = repo.by_sha[sha].files[path]
    headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.data))}
    return Answer(200, repo.read(sha, path), **headers)


ACTIONS = {
    "info": info,
    "auth": auth_check,
    "tree": tree,
    "refs": refs,
    "branch": branch,
    "tag": tag,
    "preupload": preupload,
    "lfs_batch": lfs_batch,
    "commit": commit,
    "head": file,
    "download": file,
}
