"""A small Hub on this machine: repositories in memory, tokens, private and gated ones, and failures on request.

It speaks what huggingface_hub 1.33 and 2.4 ask for when they push and load models without Xet. Beyond answering, it
keeps all bytes that were ever sent to it (`received`), refuses cards as the Hub does, and can fail at a chosen step of
the protocol (`fail`): with an HTTP status, with an answer that is cut, by closing the connection, or by not answering.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import _http

import hub.push

TOKEN = "hf_writer"
LFS = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".onnx", ".png")
LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "other")
# In the order in which a push takes them.
STEPS = ("create", "info", "validate-yaml", "preupload", "lfs-batch", "lfs-put", "lfs-verify", "commit")


@dataclass
class Repo:
    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()


class HubStub:
    """`with HubStub() as hub:` serves at `hub.url`; `writers` and `readers` are tokens, `members` whom writers may
    write for."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.received: list[bytes] = []
        self.steps: list[str] = []
        self.writers, self.readers, self.members = {TOKEN}, {"hf_reader"}, {"ann", "lab"}
        self.failing: dict[str, int | str] = {}
        self.healed = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubStub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.heal()
        self.server.shutdown()
        self.server.server_close()

    def fail(self, step: str, how: int | str) -> None:
        """At `step`: an HTTP status; "cut": half of the answer; "drop": no answer, closed; "hang": until `heal`."""
        self.healed.clear()
        self.failing = {step: how}

    def heal(self) -> None:
        self.failing = {}
        self.healed.set()

    def environment(self, home: str) -> dict[str, str]:
        """Of a process that is to use this Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": home,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
        }


class _Handler(BaseHTTPRequestHandler):
    hub: HubStub
    _how: int | str | None = None  # to fail at this request
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def _serve(self) -> None:
        path = unquote(urlparse(self.path).path)
        found = [(step, answer, match) for pattern, step, answer in _ROUTES if (match := re.fullmatch(pattern, path))]
        if not found:
            self._body()
            return self._answer(404, {"error": f"not stubbed: {self.command} {path}"})
        step, answer, match = found[0]
        self.hub.steps.append(step)
        self._how = how = self.hub.failing.get(step)
        if how == "drop":
            self.rfile.read(min(int(self.headers.get("Content-Length", 0)), 64))
            return self._hang_up()
        body = self._body()
        self.hub.received.append(body)
        if how == "hang":
            self.hub.healed.wait(60)
        if isinstance(how, int):
            return self._answer(how, {"error": f"told to answer {how}"})
        answer(self, match, body)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _serve  # noqa: N815

    # ---- wire ----

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._how == "cut":
            self.wfile.write(raw[: len(raw) // 2])
            return self._hang_up()
        self.wfile.write(raw)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    # ---- who may ----

    @property
    def _token(self) -> str | None:
        given = self.headers.get("Authorization", "")
        return given.removeprefix("Bearer ") or None

    def _refused(self, repo_id: str, write: bool = False) -> bool:
        """Answers and returns True if this token may not see, or write to, the repository."""
        hub, token = self.hub, self._token
        repo = hub.repos.get(repo_id)
        if token is not None and token not in hub.writers | hub.readers:
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
        elif write and (token not in hub.writers):
            self._answer(401 if token is None else 403, {"error": "you need the right to write"})
        elif write and repo_id.split("/")[0] not in hub.members:
            self._answer(403, {"error": "you are no member of this organization"})
        elif repo is None or (repo.private and token is None):
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif repo.gated and token is None:
            self._answer(401, {"error": "Access is restricted"}, {"X-Error-Code": "GatedRepo"})
        else:
            return False
        return True

    # ---- routes ----

    def _who(self, match: re.Match[str], body: bytes) -> None:
        known = self._token in self.hub.writers | self.hub.readers
        self._answer(200 if known else 401, {"type": "user", "name": "ann", "orgs": [{"name": "lab"}]})

    def _create(self, match: re.Match[str], body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or 'ann'}/{asked['name']}"
        if repo_id in self.hub.repos:
            if not self._refused(repo_id, write=True):
                self._answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"})
            return
        self.hub.repos[repo_id] = Repo({".gitattributes": b"*.safetensors filter=lfs\n"})
        if self._refused(repo_id, write=True):
            del self.hub.repos[repo_id]
            return
        # huggingface_hub 1.33 says private, 2.4 visibility
        self.hub.repos[repo_id].private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self._answer(200, {"url": f"{self.hub.url}/{repo_id}"})

    def _info(self, match: re.Match[str], body: bytes) -> None:
        repo_id = match[1]
        if self._refused(repo_id):
            return
        repo = self.hub.repos[repo_id]
        siblings = [{"rfilename": name, "size": len(content)} for name, content in repo.files.items()]
        facts = {"id": repo_id, "modelId": repo_id, "sha": repo.sha, "private": repo.private, "gated": repo.gated}
        self._answer(200, {**facts, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def _tree(self, match: re.Match[str], body: bytes) -> None:
        if self._refused(match[1]):
            return
        files = self.hub.repos[match[1]].files.items()
        self._answer(200, [{"type": "file", "path": n, "size": len(c), "oid": _git_oid(c)} for n, c in files])

    def _validate(self, match: re.Match[str], body: bytes) -> None:
        errors = _card_errors(json.loads(body)["content"])
        self._answer(400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []})

    def _preupload(self, match: re.Match[str], body: bytes) -> None:
        if self._refused(match[1], write=True):
            return
        there, answers = self.hub.repos[match[1]].files, []
        for file in json.loads(body)["files"]:
            name = file["path"]
            is_lfs = name.endswith(LFS)
            known = there.get(name)
            oid = None if known is None else hashlib.sha256(known).hexdigest() if is_lfs else _git_oid(known)
            mode = "lfs" if is_lfs else "regular"
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer(200, {"files": answers})

    def _lfs_batch(self, match: re.Match[str], body: bytes) -> None:
        if self._refused(match[1], write=True):
            return
        objects = []
        for wanted in json.loads(body)["objects"]:
            upload = {"href": f"{self.hub.url}/_lfs/{wanted['oid']}"}
            actions = {"upload": upload, "verify": {"href": f"{self.hub.url}/_lfs_verify"}}
            known = wanted["oid"] in self.hub.lfs
            objects.append({**wanted, "authenticated": True, **({} if known else {"actions": actions})})
        kind = {"Content-Type": "application/vnd.git-lfs+json"}
        self._answer(200, {"transfer": "basic", "objects": objects}, kind)

    def _lfs_put(self, match: re.Match[str], body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != match[1]:
            return self._answer(400, {"error": "the content is not what was announced"})
        self.hub.lfs[match[1]] = body
        self._answer(200, {})

    def _lfs_verify(self, match: re.Match[str], body: bytes) -> None:
        known = json.loads(body)["oid"] in self.hub.lfs
        self._answer(200 if known else 404, {})

    def _commit(self, match: re.Match[str], body: bytes) -> None:
        repo_id = match[1]
        if self._refused(repo_id, write=True):
            return
        operations = [json.loads(line) for line in body.decode().splitlines() if line.strip()]
        repo = self.hub.repos[repo_id]
        files, message = dict(repo.files), ""
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                self.hub.received.append(files[value["path"]])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        repo.files = files
        repo.commits.append(message)
        address = f"{self.hub.url}/{repo_id}/commit/{repo.sha}"
        self._answer(200, {"commitUrl": address, "commitOid": repo.sha, "success": True, "pullRequestUrl": None})

    def _resolve(self, match: re.Match[str], body: bytes) -> None:
        repo_id, name = match[1], match[2]
        if self._refused(repo_id):
            return
        repo = self.hub.repos[repo_id]
        if name not in repo.files:
            return self._answer(404, {"error": "x"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.sha})
        content = repo.files[name]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        size = {"X-Linked-Size": str(len(content)), "Content-Type": "application/octet-stream"}
        self._answer(200, content, {"ETag": etag, "X-Repo-Commit": repo.sha, **size})


_ID = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"/api/whoami-v2", "whoami", _Handler._who),
    (r"/api/repos/create", "create", _Handler._create),
    (r"/api/validate-yaml", "validate-yaml", _Handler._validate),
    (rf"/api/models/{_ID}(?:/revision/[^/]+)?", "info", _Handler._info),
    (rf"/api/models/{_ID}/tree/[^/]+.*", "tree", _Handler._tree),
    (rf"/api/models/{_ID}/preupload/[^/]+", "preupload", _Handler._preupload),
    (rf"/api/models/{_ID}/commit/[^/]+", "commit", _Handler._commit),
    (rf"/{_ID}\.git/info/lfs/objects/batch", "lfs-batch", _Handler._lfs_batch),
    (r"/_lfs/(\w+)", "lfs-put", _Handler._lfs_put),
    (r"/_lfs_verify", "lfs-verify", _Handler._lfs_verify),
    (rf"/{_ID}/resolve/[^/]+/(.+)", "resolve", _Handler._resolve),
]


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _card_errors(text: str) -> list[str]:
    """What the Hub checks, written down once more, so that `hub.card_rules` has somebody to agree with."""
    block = re.match(r"\s*---\n(.*?)\n---", text, re.DOTALL)
    try:
        data = yaml.safe_load(block[1]) if block else {}
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata is no mapping"]
    errors = [] if data.get("license", "mit") in LICENSES else [f'"license" must be one of {LICENSES}']
    if "tags" in data and not all(isinstance(tag, str) for tag in data["tags"]):
        errors.append('"tags" must be a list of strings')
    try:
        if "model-index" in data:
            model_index_to_eval_results(data["model-index"])
    except (KeyError, TypeError) as error:
        errors.append(f'"model-index": {error!r}')
    return errors


def connect(patch: pytest.MonkeyPatch, stub: HubStub, home: Path) -> None:
    """This process talks to that Hub, and waits for nothing between its attempts."""
    for name, value in {
        "ENDPOINT": stub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{stub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(home / "no token"),
    }.items():
        patch.setattr(constants, name, value)
    patch.setenv("HF_TOKEN", TOKEN)
    patch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
    patch.setattr(hub.push, "WAITS", ())


def wait_until(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
