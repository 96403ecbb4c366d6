"""A Hugging Face Hub on localhost, for huggingface_hub's own client: repositories in memory, and faults on demand.

Bytes of LFS files go to and come from a second port, as the Hub keeps them with another host, which must not see the
token. Xet is not spoken, and a client with hf_xet uses it without asking the server: it needs
HF_HUB_DISABLE_XET, which `environment` and `patch` see to.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import pytest
import yaml

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


class Refusal(Exception):
    """An answer of at least 400; `code` is the `X-Error-Code` by which the client chooses its exception."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None):
        self.answer = Answer.json({"error": message}, status)
        self.answer.headers.update({"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})


@dataclass
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def json(value: Any, status: int = 200) -> "Answer":
        return Answer(json.dumps(value).encode(), status, {"Content-Type": "application/json; charset=utf-8"})


@dataclass(frozen=True)
class Commit:
    oid: str
    files: Mapping[str, bytes]
    title: str
    parent: str | None
    date: str


@dataclass
class Repository:
    name: str
    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    history: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    pulls: int = 0

    def ref_of(self, revision: str) -> str | None:
        names = (revision, f"refs/heads/{revision}")
        return next((name for name in names if name in self.refs), None)

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a pull request's ref or a whole commit id."""
        ref = self.ref_of(revision)
        oid = self.refs[ref] if ref else revision
        if oid not in self.history:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.history[oid]

    def add_commit(self, ref: str, files: dict[str, bytes], title: str) -> Commit:
        parent = self.refs.get(ref)
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        oid = hashlib.sha1(f"{self.name} {len(self.history)} {parent} {now}".encode()).hexdigest()
        self.history[oid] = Commit(oid, dict(files), title, parent, now)
        self.refs[ref] = oid
        return self.history[oid]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Request(NamedTuple):
    """One line of the log; status 0 is a connection that was cut before an answer."""

    method: str
    path: str  # with its query
    status: int


@dataclass
class Fault:
    match: str
    times: float
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    after: int | None = None


@dataclass
class Call:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    signed_in: bool

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


def card_problems(text: str) -> list[str]:
    """What the Hub finds wrong with the metadata at the head of a card."""
    head = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    card = yaml.safe_load(head[1]) if head else {}
    kinds = {"license": str, "pipeline_tag": str, "tags": list, "model-index": list}
    return [
        f"{name} must be a {kind.__name__}"
        for name, kind in kinds.items()
        if not isinstance(card.get(name, kind()), kind)
    ]


def impatient(seconds, sleep=time.sleep, caller=sys._getframe):
    """Stands in for `time.sleep`: huggingface_hub's waits before another try, which no setting changes, are short."""
    ours = caller(1).f_globals.get("__name__", "").startswith("huggingface_hub")
    sleep(min(seconds, 0.01) if ours else seconds)


class HubServer:
    """A Hub of one user, whose `token` may write everywhere. `requests` logs each request as it is answered."""

    def __init__(self) -> None:
        self.token = f"hf_{secrets.token_hex(8)}"
        self.requests: list[Request] = []
        self.errors: list[BaseException] = []
        self._lock = threading.RLock()
        self._faults: list[Fault] = []
        self._repositories: dict[str, Repository] = {}
        self._signed: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._servers = [_Server(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        assert not self.errors, f"the server itself failed: {self.errors!r}"

    def add_commit(self, repo_id: str, files: Mapping[str, bytes], revision: str = "main") -> None:
        """Somebody else's commit of `files` to a branch, past HTTP."""
        with self._lock:
            repo = self.repo(repo_id)
            repo.add_commit(f"refs/heads/{revision}", {**repo.at(revision).files, **files}, "Add files")

    def repo(self, repo_id: str) -> Repository:
        return self._repositories[repo_id]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The bytes of each file at a revision, .gitattributes among them."""
        return dict(self.repo(repo_id).at(revision).files)

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commits of a revision, the newest first."""
        repo = self.repo(repo_id)
        line = [repo.at(revision)]
        while line[-1].parent:
            line.append(repo.history[line[-1].parent])
        return line

    def sent(self, match: str) -> list[Request]:
        """The requests so far whose "METHOD path" matches."""
        return [request for request in self.requests if re.search(match, f"{request.method} {request.path}")]

    def fail(self, match: str, status: int, times: float = 1, headers: Mapping[str, str] | None = None) -> None:
        """Answer the next requests whose "METHOD path?query" matches with `status`; `times` may be infinite."""
        self._faults.append(Fault(match, times, status=status, headers=dict(headers or {})))

    def cut(self, match: str, after: int = 0, times: float = 1) -> None:
        """Close the connection once `after` bytes of a request's body are read."""
        self._faults.append(Fault(match, times, after=after))

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
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_ETAG_TIMEOUT": "5",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers asks a Space for it, past the endpoint
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def patch(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        """Let huggingface_hub in this process know this Hub alone, and wait little; not for remote code."""
        import transformers.utils.hub
        from huggingface_hub import constants, hf_api

        hosts = constants.HF_URL_HOSTS | {"127.0.0.1"}
        cache = str(folder / "hf_home" / "hub")
        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_URL_HOSTS": hosts,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_CACHE": cache,
            "HF_ASSETS_CACHE": str(folder / "hf_home" / "assets"),
            "AGENT_HARNESSES_PATH": str(folder / "hf_home" / "agents.json"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)  # that of the functions at the top of the package
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        for name, text in {"HF_TOKEN": self.token, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}.items():
            monkeypatch.setenv(name, text)
        monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "1")
        monkeypatch.setattr(time, "sleep", impatient)

    def _fault(self, line: str) -> Fault | None:
        """The first fault for a request."""
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and re.search(fault.match, line):
                    fault.times -= 1
                    return fault
        return None

    def _answer(self, call: Call) -> Answer:
        try:
            if "Authorization" in call.headers and not call.signed_in:
                raise Refusal(401, "Invalid credentials in Authorization header")
            for method, pattern, function in ROUTES:
                if method == call.method and (match := pattern.fullmatch(call.path)):
                    groups = {name: x and unquote(x) for name, x in match.groupdict().items()}
                    with self._lock:
                        return function(self, call, **groups)
            raise Refusal(404, "Repository not found", "RepoNotFound")
        except Refusal as refusal:
            return refusal.answer

    def _open(self, call: Call, name: str, *, write: bool = False) -> Repository:
        """The repository, if the caller may see it or write to it."""
        repo = self._repositories.get(name)
        if repo is None or ((repo.private or write) and not call.signed_in):
            raise Refusal(404 if call.signed_in else 401, "Repository not found", "RepoNotFound")
        return repo

    def _sign(self, repo: Repository, oid: str, **what: Any) -> str:
        key = secrets.token_hex(8)
        self._signed[key] = {"repo": repo, "oid": oid, **what}
        return f"{self.storage_url}/lfs/{repo.name}/{oid}?{urlencode({'signature': key})}"

    @route("POST", r"/api/validate-yaml")
    def _validate(self, call: Call) -> Answer:
        errors = card_problems(call.json["content"])
        return Answer.json({"errors": [{"message": x} for x in errors], "warnings": []}, 400 if errors else 200)

    @route("POST", r"/api/repos/create")
    def _create(self, call: Call) -> Answer:
        asked = call.json
        name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        status = 409 if name in self._repositories else 200
        if status == 200:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            repo = self._repositories[name] = Repository(name, private)
            repo.add_commit("refs/heads/main", {".gitattributes": GITATTRIBUTES}, "initial commit")
        return Answer.json({"url": f"{self.url}/{name}", "name": name, "id": name}, status)

    @route("GET HEAD", REPO + r"(?:/revision/(?P<revision>[^/]+))?")
    def _info(self, call: Call, name: str, revision: str | None) -> Answer:
        commit = self._open(call, name).at(revision or "main")
        told = {"id": name, "sha": commit.oid, "tags": [], "lastModified": commit.date}
        return Answer.json({**told, "siblings": [{"rfilename": path} for path in sorted(commit.files)]})

    @route("GET", REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
    def _tree(self, call: Call, name: str, revision: str, folder: str | None) -> Answer:
        files = self._open(call, name).at(revision).files
        told = [
            {"type": "file", "oid": digest(data), "size": len(data), "path": path}
            for path, data in sorted(files.items())
            if path.startswith(f"{folder}/" if folder else "")
        ]
        if not told:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return Answer.json(told)

    @route("POST", REPO + r"/branch/(?P<branch>[^/]+)")
    def _branch(self, call: Call, name: str, branch: str) -> Answer:
        repo, ref = self._open(call, name, write=True), f"refs/heads/{branch}"
        if ref in repo.refs:
            raise Refusal(409, f"Reference already exists: {ref}")
        repo.refs[ref] = repo.at("main").oid
        return Answer()

    @route("POST", REPO + r"/preupload/(?P<revision>[^/]+)")
    def _preupload(self, call: Call, name: str, revision: str) -> Answer:
        oid = self._open(call, name, write=True).at(revision).oid
        told = []
        for path in (asked["path"] for asked in call.json["files"]):
            mode = "lfs" if path.endswith(".safetensors") else "regular"
            told.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
        return Answer.json({"files": told, "commitOid": oid})

    @route("POST", PAGE + r"\.git/info/lfs/objects/batch")
    def _batch(self, call: Call, name: str) -> Answer:
        repo = self._open(call, name, write=True)
        told: list[dict[str, Any]] = []
        for asked in call.json["objects"]:
            oid, size = asked["oid"], asked["size"]
            told.append({"oid": oid, "size": size, "authenticated": True})
            if oid not in repo.objects:
                verify = {"href": f"{self.url}/{name}.git/info/lfs/verify"}
                upload = {"href": self._sign(repo, oid, size=size), "header": {}}
                told[-1]["actions"] = {"upload": upload, "verify": verify}
        return Answer.json({"transfer": "basic", "objects": told})

    @route("POST", PAGE + r"\.git/info/lfs/verify")
    def _verify(self, call: Call, name: str) -> Answer:
        repo, asked = self._open(call, name, write=True), call.json
        assert len(repo.objects[asked["oid"]]) == asked["size"]
        return Answer()

    @route("PUT", r"/lfs/.+")
    def _upload(self, call: Call) -> Answer:
        grant = self._signed[call.query["signature"][0]]
        assert "Authorization" not in call.headers  # the other host must not see the token
        if len(call.body) != grant["size"] or digest(call.body) != grant["oid"]:
            raise Refusal(400, "What was uploaded is not what was announced")
        grant["repo"].objects[grant["oid"]] = call.body
        return Answer()

    @route("POST", REPO + r"/commit/(?P<revision>[^/]+)")
    def _commit(self, call: Call, name: str, revision: str) -> Answer:
        repo = self._open(call, name, write=True)
        base, ref = repo.at(revision), repo.ref_of(revision)
        lines = [json.loads(line) for line in call.body.splitlines()]
        files = dict(base.files)
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"], validate=True)
            elif key == "lfsFile":
                files[value["path"]] = repo.objects[value["oid"]]
            else:
                assert key == "deletedFile"
                del files[value["path"]]
        card = files.get("README.md")
        if card and (errors := card_problems(card.decode())):
            raise Refusal(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
        told = {"success": True, "hookOutput": ""}
        if call.query.get("create_pr") == ["1"]:
            repo.pulls += 1
            ref = f"refs/pr/{repo.pulls}"
            repo.refs[ref] = base.oid
            told |= {"pullRequestUrl": f"{self.url}/{name}/discussions/{repo.pulls}"}
        assert ref is not None
        commit = repo.add_commit(ref, files, lines[0]["value"]["summary"])
        return Answer.json({**told, "commitOid": commit.oid, "commitUrl": f"{self.url}/{name}/commit/{commit.oid}"})

    @route("GET HEAD", PAGE + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def _resolve(self, call: Call, name: str, revision: str, path: str) -> Answer:
        repo = self._open(call, name)
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        data = commit.files[path]
        headers |= {"X-Linked-Etag": f'"{digest(data)}"', "X-Linked-Size": str(len(data))}
        if digest(data) in repo.objects:
            return Answer(status=302, headers={**headers, "Location": self._sign(repo, digest(data))})
        location = f"/api/resolve-cache/models/{name}/{commit.oid}/{quote(path)}"
        return Answer(status=307, headers={**headers, "Location": location})

    @route("GET HEAD", REPO.replace("/api/", "/api/resolve-cache/") + r"/(?P<oid>[^/]+)/(?P<path>.+)")
    def _resolved(self, call: Call, name: str, oid: str, path: str) -> Answer:
        data = self._open(call, name).at(oid).files[path]
        return Answer(data, headers={"X-Repo-Commit": oid, "ETag": f'"{digest(data)}"'})

    @route("GET HEAD", r"/lfs/.+")
    def _download(self, call: Call) -> Answer:
        grant = self._signed[call.query["signature"][0]]
        return Answer(grant["repo"].objects[grant["oid"]], headers={"ETag": f'"{grant["oid"]}"'})


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # its threads wait for the client, which keeps its connections

    def handle_error(self, request: Any, address: Any) -> None:
        if not isinstance(error := sys.exc_info()[1], (ConnectionError, TimeoutError)):
            self.RequestHandlerClass.hub.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits for the client's delayed acknowledgement
    timeout = 60

    def log_message(self, *_: object) -> None:
        pass

    def _body(self) -> Iterator[bytes]:
        left = int(self.headers.get("Content-Length", 0))
        while left:
            if not (piece := self.rfile.read1(min(left, 1 << 16))):
                raise ConnectionResetError("the client left in the middle")
            left -= len(piece)
            yield piece

    def _serve(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        fault = self.hub._fault(f"{self.command} {self.path}")
        body = b""
        for piece in self._body():
            body += piece
            if fault and fault.after is not None and len(body) >= fault.after:
                self.close_connection = True
                self.hub.requests.append(Request(self.command, self.path, 0))
                return
        parts = urlsplit(self.path)
        query = parse_qs(parts.query, keep_blank_values=True)
        if fault and fault.status:
            message = f"The server was told to answer {fault.status}"
            answer = Refusal(fault.status, message, headers=fault.headers).answer
        else:
            signed_in = token == self.hub.token
            answer = self.hub._answer(Call(self.command, parts.path, query, self.headers, body, signed_in))
        self.hub.requests.append(Request(self.command, self.path, answer.status))
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve


@pytest.fixture
def hub_server() -> Iterator[HubServer]:
    """A Hub on localhost; see `environment` for processes that are to use it."""
    with HubServer() as hub:
        yield hub


@pytest.fixture
def hub_here(hub_server, monkeypatch, tmp_path) -> Iterator[HubServer]:
    """A Hub on localhost that huggingface_hub, transformers and diffusers of this process know alone."""
    from huggingface_hub import close_session

    hub_server.patch(monkeypatch, tmp_path)
    yield hub_server
    close_session()
