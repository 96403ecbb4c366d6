"""
A Hugging Face Hub on localhost, for huggingface_hub's own client: repositories in memory, and faults on demand.

Xet is not spoken, and a client with hf_xet uses it without asking the server: it needs HF_HUB_DISABLE_XET, which
`environment` and `patch` see to.
"""

import base64
import hashlib
import itertools
import json
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

CUT = 0
"""A status that stands for a connection that is closed before an answer."""


@dataclass
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def json(value: Any, status: int = 200) -> "Answer":
        return Answer(json.dumps(value).encode(), status, {"Content-Type": "application/json; charset=utf-8"})


class Refusal(Exception):
    """An answer of at least 400; `code` is the `X-Error-Code` by which the client chooses its exception."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None):
        self.answer = Answer.json({"error": message}, status)
        self.answer.headers.update({"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})


@dataclass(frozen=True)
class Commit:
    files: Mapping[str, bytes]
    title: str
    oid: str = field(default_factory=partial(secrets.token_hex, 20))


@dataclass
class Repository:
    private: bool
    refs: dict[str, list[Commit]]
    objects: dict[str, bytes] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        """The last commit of a branch or a pull request's ref, or that of a whole commit id."""
        if revision in self.refs:
            return self.refs[revision][-1]
        for commit in itertools.chain(*self.refs.values()):
            if commit.oid == revision:
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Fault:
    match: str
    status: int
    times: float
    headers: Mapping[str, str]


@dataclass
class Call:
    method: str
    path: str
    query: dict[str, list[str]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = []
REPO = r"/api/models/(?P<name>[^/]+/[^/]+)"
PAGE = r"/(?P<name>[^/]+/[^/]+)"


def route(methods: str, pattern: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """The decorated method of HubServer gets the call and the pattern's groups, unquoted."""

    def keep(function: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.extend((method, re.compile(pattern), function) for method in methods.split())
        return function

    return keep


def impatient(seconds, sleep=time.sleep, caller=sys._getframe):
    """Stands in for `time.sleep`: huggingface_hub's waits before another try, which no setting changes, are short."""
    ours = caller(1).f_globals.get("__name__", "").startswith("huggingface_hub")
    sleep(min(seconds, 0.01) if ours else seconds)


class HubServer:
    """A Hub of one user, whose `token` may do everything. `requests` logs each "METHOD path?query"."""

    def __init__(self) -> None:
        self.token = f"hf_{secrets.token_hex(8)}"
        self.requests: list[str] = []
        self._lock = threading.RLock()
        self._faults: list[Fault] = []
        self._repositories: dict[str, Repository] = {}

    def __enter__(self) -> "HubServer":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.block_on_close = False  # its threads wait for the client, which keeps its connections
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_commit(self, repo_id: str, files: Mapping[str, bytes]) -> None:
        """Somebody else's commit of `files` to the main branch, past HTTP."""
        self.repo(repo_id).refs["main"].append(Commit({**self.files(repo_id), **files}, "Add files"))

    def repo(self, repo_id: str) -> Repository:
        if repo_id not in self._repositories:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self._repositories[repo_id]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The bytes of each file at a revision, .gitattributes among them."""
        return dict(self.repo(repo_id).at(revision).files)

    def commits(self, repo_id: str) -> list[Commit]:
        """The commits of the main branch, the newest first."""
        return self.repo(repo_id).refs["main"][::-1]

    def sent(self, match: str) -> list[str]:
        """The requests so far that match."""
        return [request for request in self.requests if re.search(match, request)]

    def fail(self, match: str, status: int, times: float = 1, headers: Mapping[str, str] | None = None) -> None:
        """Answer the next requests that match with `status`; `times` may be infinite."""
        self._faults.append(Fault(match, status, times, headers or {}))

    def recover(self) -> None:
        """Forget the faults that are still to come."""
        self._faults.clear()

    def environment(self, folder: Path) -> dict[str, str]:
        """The variables of a process that is to know this Hub alone, signed in, with its caches in `folder`."""
        drop = ("HF_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_")
        kept = {name: x for name, x in os.environ.items() if not name.startswith(drop)}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(folder / "hf_home"),
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers asks a Space for it, past the endpoint
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def patch(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        """Let huggingface_hub in this process know this Hub alone, and wait little; not for remote code."""
        import transformers.utils.hub
        from huggingface_hub import constants, hf_api

        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_CACHE": str(folder / "hf_home" / "hub"),
            "HF_ASSETS_CACHE": str(folder / "hf_home" / "assets"),
            "AGENT_HARNESSES_PATH": str(folder / "hf_home" / "agents.json"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)  # that of the functions at the top of the package
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        for name in ("HF_TOKEN", "NO_PROXY", "no_proxy", "DISABLE_SAFETENSORS_CONVERSION"):
            monkeypatch.setenv(name, self.environment(folder)[name])
        monkeypatch.setattr(time, "sleep", impatient)

    def log(self, request: str) -> Fault | None:
        """Keep a request, and find the first fault for it."""
        with self._lock:
            self.requests.append(request)
            for fault in self._faults:
                if fault.times > 0 and re.search(fault.match, request):
                    fault.times -= 1
                    return fault
        return None

    def answer(self, call: Call, token: str) -> Answer:
        try:
            if token not in ("", self.token):
                raise Refusal(401, "Invalid credentials in Authorization header")
            for method, pattern, function in ROUTES:
                if method == call.method and (match := pattern.fullmatch(call.path)):
                    groups = {name: x and unquote(x) for name, x in match.groupdict().items()}
                    with self._lock:
                        return function(self, call, **groups)
            raise Refusal(404, "Repository not found", "RepoNotFound")
        except Refusal as refusal:
            return refusal.answer

    @route("POST", r"/api/validate-yaml")
    def _validate(self, call: Call) -> Answer:
        return Answer.json({"errors": [], "warnings": []})

    @route("POST", r"/api/repos/create")
    def _create(self, call: Call) -> Answer:
        asked = call.json
        name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        status = 409 if name in self._repositories else 200
        if status == 200:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            first = Commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
            self._repositories[name] = Repository(private, {"main": [first]})
        return Answer.json({"url": f"{self.url}/{name}", "name": name, "id": name}, status)

    @route("GET", REPO + r"(?:/revision/(?P<revision>[^/]+))?")
    def _info(self, call: Call, name: str, revision: str | None) -> Answer:
        commit = self.repo(name).at(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return Answer.json({"id": name, "sha": commit.oid, "tags": [], "siblings": siblings})

    @route("GET", REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
    def _tree(self, call: Call, name: str, revision: str, folder: str | None) -> Answer:
        told = [
            {"type": "file", "oid": digest(data), "size": len(data), "path": path}
            for path, data in sorted(self.files(name, revision).items())
            if path.startswith(f"{folder}/" if folder else "")
        ]
        if not told:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return Answer.json(told)

    @route("POST", REPO + r"/branch/(?P<branch>[^/]+)")
    def _branch(self, call: Call, name: str, branch: str) -> Answer:
        refs = self.repo(name).refs
        refs[branch] = list(refs["main"])
        return Answer()

    @route("POST", REPO + r"/preupload/(?P<revision>[^/]+)")
    def _preupload(self, call: Call, name: str, revision: str) -> Answer:
        told = []
        for path in (asked["path"] for asked in call.json["files"]):
            mode = "lfs" if path.endswith(".safetensors") else "regular"
            told.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
        return Answer.json({"files": told, "commitOid": self.repo(name).at(revision).oid})

    @route("POST", PAGE + r"\.git/info/lfs/objects/batch")
    def _batch(self, call: Call, name: str) -> Answer:
        told: list[dict[str, Any]] = []
        for asked in call.json["objects"]:
            told.append({**asked, "authenticated": True})
            if asked["oid"] not in self.repo(name).objects:
                told[-1]["actions"] = {"upload": {"href": f"{self.url}/lfs/{name}", "header": {}}}
        return Answer.json({"transfer": "basic", "objects": told})

    @route("PUT", "/lfs" + PAGE)
    def _upload(self, call: Call, name: str) -> Answer:
        self.repo(name).objects[digest(call.body)] = call.body
        return Answer()

    @route("POST", REPO + r"/commit/(?P<revision>[^/]+)")
    def _commit(self, call: Call, name: str, revision: str) -> Answer:
        repo = self.repo(name)
        head, *lines = [json.loads(line) for line in call.body.splitlines()]
        files = self.files(name, revision)
        if head["value"].get("parentCommit", repo.at(revision).oid) != repo.at(revision).oid:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        for line in lines:
            path = line["value"]["path"]
            if line["key"] == "file":
                files[path] = base64.b64decode(line["value"]["content"], validate=True)
            elif line["key"] == "lfsFile":
                files[path] = repo.objects[line["value"]["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[path]
        told = {"success": True, "hookOutput": ""}
        if call.query.get("create_pr") == ["1"]:
            repo.refs["refs/pr/1"] = list(repo.refs[revision])
            told |= {"pullRequestUrl": f"{self.url}/{name}/discussions/1"}
            revision = "refs/pr/1"
        commit = Commit(files, head["value"]["summary"])
        repo.refs[revision].append(commit)
        return Answer.json({**told, "commitOid": commit.oid, "commitUrl": f"{self.url}/{name}/commit/{commit.oid}"})

    @route("GET HEAD", PAGE + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def _resolve(self, call: Call, name: str, revision: str, path: str) -> Answer:
        commit = self.repo(name).at(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        data = commit.files[path]
        return Answer(data, headers={**headers, "ETag": f'"{digest(data)}"'})


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits for the client's delayed acknowledgement
    timeout = 60

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        fault = self.hub.log(f"{self.command} {self.path}")
        if fault and fault.status == CUT:
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        parts = urlsplit(self.path)
        if fault:
            message = f"The server was told to answer {fault.status}"
            answer = Refusal(fault.status, message, headers=fault.headers).answer
        else:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            answer = self.hub.answer(Call(self.command, parts.path, parse_qs(parts.query), body), token)
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = _serve


@pytest.fixture
def hub_here(monkeypatch, tmp_path) -> Iterator[HubServer]:
    """A Hub on localhost that huggingface_hub, transformers and diffusers of this process know alone."""
    from huggingface_hub import close_session

    with HubServer() as hub:
        hub.patch(monkeypatch, tmp_path)
        yield hub
        close_session()
