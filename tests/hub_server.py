"""A Hugging Face Hub on localhost, for huggingface_hub's own client: repositories in memory, and faults on demand.

Bytes of LFS files go to and come from a second port, as the Hub keeps them with another host, which must not see the
token. Xet is not spoken, and a client with hf_xet uses it without asking the server: it needs
HF_HUB_DISABLE_XET, which `environment` and `patch` see to.
"""

import base64
import binascii
import hashlib
import inspect
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
from fnmatch import fnmatch
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import pytest
import yaml

# The endings in the .gitattributes that the Hub gives a new repository.
LFS_NAMES = """7z arrow bin bz2 ckpt ftz gz h5 joblib lfs.* mlmodel model msgpack npy npz onnx ot parquet pb pickle pkl
    pt pth rar safetensors tar tar.* tflite tgz wasm xz zip zst"""
GITATTRIBUTES = "".join(f"*.{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LFS_NAMES.split()).encode()


class Refusal(Exception):
    """An answer of at least 400; `code` is the `X-Error-Code` by which the client chooses its exception."""

    def __init__(
        self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None, **more: Any
    ):
        named = {"X-Error-Code": code} if code else {}
        self.answer = Answer.json({"error": message, **more}, status)
        line = " ".join(message.encode("ascii", "replace").decode().split())  # what a header can hold
        self.answer.headers.update({**named, "X-Error-Message": line, **(headers or {})})


@dataclass
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def json(value: Any, status: int = 200) -> "Answer":
        return Answer(
            json.dumps(value, default=str).encode(), status, {"Content-Type": "application/json; charset=utf-8"}
        )


@dataclass(frozen=True)
class File:
    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {len(self.data)}")
        return "".join(f"{line}\n" for line in lines).encode()

    @cached_property
    def blob(self) -> str:
        """git's name of what git stores: the bytes, or the pointer to them."""
        stored = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob


@dataclass(frozen=True)
class Commit:
    oid: str
    files: Mapping[str, File]
    title: str
    message: str
    author: str
    parent: str | None
    date: str


@dataclass
class Repository:
    kind: str  # models, datasets or spaces
    name: str
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    history: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    pulls: list[dict[str, Any]] = field(default_factory=list)

    def ref_of(self, revision: str) -> str | None:
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a pull request's ref or a whole commit id."""
        ref = self.ref_of(revision)
        oid = self.refs[ref] if ref else revision
        if oid not in self.history:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.history[oid]

    def add_commit(self, ref: str, files: dict[str, File], title: str, message: str, author: str) -> Commit:
        parent = self.refs.get(ref)
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        oid = hashlib.sha1(f"{self.kind} {self.name} {len(self.history)} {parent} {now}".encode()).hexdigest()
        self.history[oid] = Commit(oid, dict(files), title, message, author, parent, now)
        self.refs[ref] = oid
        return self.history[oid]

    def is_lfs(self, commit: Commit, path: str, size: int, sample: bytes, limit: int) -> bool:
        """Whether the Hub takes a file over LFS: by .gitattributes, and what is large or not text."""
        lines = commit.files[".gitattributes"].data.decode().splitlines() if ".gitattributes" in commit.files else []
        named = [line.split()[0] for line in lines if "filter=lfs" in line]
        by_name = any(fnmatch(path, name) or fnmatch(path.rpartition("/")[2], name) for name in named)
        return by_name or size > limit or b"\0" in sample

    def entry(self, commit: Commit, path: str, expand: bool) -> dict[str, Any] | None:
        """What the Hub tells of a file or a folder; None where there is neither."""

        def under(commit: Commit) -> dict[str, File]:
            return {name: x for name, x in commit.files.items() if name == path or name.startswith(f"{path}/")}

        files = under(commit)
        if not files:
            return None
        if file := commit.files.get(path):
            told = {"type": "file", "oid": file.blob, "size": len(file.data), "path": path}
            if file.lfs:
                told["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
        else:
            tree = hashlib.sha1("".join(f"{name} {x.blob}\n" for name, x in files.items()).encode())
            told = {"type": "directory", "oid": tree.hexdigest(), "size": 0, "path": path}
        if expand:
            while commit.parent and under(self.history[commit.parent]) == files:
                commit = self.history[commit.parent]
            told["lastCommit"] = {"id": commit.oid, "title": commit.title, "date": commit.date}
            told["securityFileStatus"] = {"status": "safe", "avScan": None, "pickleImportScan": None}
        return told


class Request(NamedTuple):
    """One line of the log; status 0 is a connection that was cut before an answer."""

    method: str
    path: str  # with its query
    status: int
    received: int  # bytes of the request's body
    token: str | None


@dataclass
class Fault:
    match: str
    times: float
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    after: int | None = None
    answer: bool = False
    seconds: float = 0.0


@dataclass
class Call:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    user: str | None

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("true", "1")


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = []
REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
PAGE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<name>[^/]+/[^/]+)"


def route(methods: str, pattern: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """The decorated method of HubServer gets the call and the pattern's groups, unquoted."""

    def keep(function: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.extend((method, re.compile(pattern), function) for method in methods.split())
        return function

    return keep


def card_problems(text: str) -> tuple[dict[str, Any], list[str], list[str]]:
    """The metadata at the head of a card, what is wrong with them, and what the Hub only warns of."""
    head = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    try:
        card = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError as error:
        return {}, [f"not YAML: {error}"], []
    if card is None:
        return {}, [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(card, dict):
        return {}, ["the metadata is not a mapping"], []
    wrong = [
        f'"{name}" must be a string' for name in ("license", "pipeline_tag") if not isinstance(card.get(name, ""), str)
    ]
    tags = card.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        wrong.append('"tags" must be a list of strings')
    if not isinstance(card.get("model-index", []), list):
        wrong.append('"model-index" must be a list')
    return card, wrong, []


def impatient(seconds, sleep=time.sleep, caller=sys._getframe):
    """Stands in for `time.sleep`: huggingface_hub's waits before another try, which no setting changes, are short."""
    ours = caller(1).f_globals.get("__name__", "").startswith("huggingface_hub")
    sleep(min(seconds, 0.01) if ours else seconds)


class HubServer:
    """A Hub of two users: `token` may write to the namespaces of `user` and `organizations`, `stranger_token` nowhere.

    `lfs_limit` is the size in bytes above which a text file goes over LFS, `part_size` that above which an upload is
    made in parts of it, `page_size` the entries of a page of a tree. `requests` logs each request as it is answered.
    """

    def __init__(self, user: str = "tester", organizations: tuple[str, ...] = ("org",)):
        self.user, self.namespaces = user, (user, *organizations)
        self.token, self.stranger_token = (f"hf_{secrets.token_hex(8)}" for _ in range(2))
        self.lfs_limit, self.part_size, self.page_size = 10_000_000, 5_000_000_000, 1000
        self.requests: list[Request] = []
        self.errors: list[BaseException] = []
        self._lock = threading.RLock()
        self._faults: list[Fault] = []
        self._repositories: dict[tuple[str, str], Repository] = {}
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

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | None = None,
        *,
        private: bool = False,
        gated: bool = False,
        repo_type: str = "model",
    ) -> str:
        """A repository with the Hub's own first commit and one of `files`, if any; the id of the last commit."""
        repo = self._repositories[f"{repo_type}s", repo_id] = Repository(f"{repo_type}s", repo_id, private, gated)
        first = {".gitattributes": File(GITATTRIBUTES, False)}
        repo.add_commit("refs/heads/main", first, "initial commit", "", self.user)
        return self.add_commit(repo_id, files, repo_type=repo_type) if files else repo.refs["refs/heads/main"]

    def add_commit(
        self, repo_id: str, files: Mapping[str, bytes], revision: str = "main", *, repo_type: str = "model"
    ) -> str:
        """Somebody else's commit of `files` to a branch, past HTTP; its id."""
        with self._lock:
            repo = self._repositories[f"{repo_type}s", repo_id]
            head = repo.at(revision)
            lfs = {path: repo.is_lfs(head, path, len(x), x[:512], self.lfs_limit) for path, x in files.items()}
            repo.objects.update({hashlib.sha256(x).hexdigest(): x for path, x in files.items() if lfs[path]})
            changed = {path: File(data, lfs[path]) for path, data in files.items()}
            ref = repo.ref_of(revision) or revision
            return repo.add_commit(ref, {**head.files, **changed}, "Add files", "", "somebody").oid

    def repo(self, repo_id: str, *, repo_type: str = "model") -> Repository:
        return self._repositories[f"{repo_type}s", repo_id]

    def files(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> dict[str, bytes]:
        """The bytes of each file at a revision, .gitattributes among them."""
        return {path: file.data for path, file in self.repo(repo_id, repo_type=repo_type).at(revision).files.items()}

    def commits(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> list[Commit]:
        """The commits of a revision, the newest first."""
        repo = self.repo(repo_id, repo_type=repo_type)
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

    def cut(self, match: str, after: int = 0, times: float = 1, *, answer: bool = False) -> None:
        """Close the connection once `after` bytes of a request's body are read, or of the answer where it has none.

        With `answer` a request with a body is carried out too, and its answer cut. After 0 bytes of an answer, not
        even its head is sent. What is too short to be cut does not count among the `times`.
        """
        self._faults.append(Fault(match, times, after=after, answer=answer))

    def recover(self) -> None:
        """Forget the faults that are still to come."""
        self._faults.clear()

    def delay(self, match: str, seconds: float, times: float = 1) -> None:
        """Let matching requests wait before they are read."""
        self._faults.append(Fault(match, times, seconds=seconds))

    def environment(self, folder: Path, *, impatiently: bool = False) -> dict[str, str]:
        """The variables of a process that is to know this Hub alone, signed in, with its caches in `folder`.

        `impatiently` makes the client's waits between tries short.
        """
        drop = ("HF_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_")
        kept = {name: x for name, x in os.environ.items() if not name.startswith(drop)}
        settings = {
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
        if impatiently:
            start = folder / "impatient"
            start.mkdir(parents=True, exist_ok=True)
            code = f"import sys\nimport time\n\n\n{inspect.getsource(impatient)}\n\ntime.sleep = impatient\n"
            (start / "sitecustomize.py").write_text(code)
            settings["PYTHONPATH"] = os.pathsep.join(filter(None, [str(start), kept.get("PYTHONPATH")]))
        return {**kept, **settings}

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
        """The first fault for a request, with its delays served."""
        wait = 0.0
        found = None
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and re.search(fault.match, line) and (fault.seconds or not found):
                    fault.times -= 1
                    wait += fault.seconds
                    found = found if fault.seconds else fault
        time.sleep(wait)
        return found

    def _answer(self, call: Call) -> Answer:
        try:
            token = call.headers.get("Authorization", "").removeprefix("Bearer ") or None
            if token and call.user is None:
                raise Refusal(401, "Invalid credentials in Authorization header")
            for method, pattern, function in ROUTES:
                if method == call.method and (match := pattern.fullmatch(call.path)):
                    groups = {name: x and unquote(x) for name, x in match.groupdict().items()}
                    if "kind" in groups:
                        groups["kind"] = groups["kind"] or "models"
                    with self._lock:
                        return function(self, call, **groups)
            if re.search(r"^/api/(models|datasets|spaces)/|/resolve/", call.path):
                raise Refusal(404 if call.user else 401, "Repository not found", "RepoNotFound")
            raise Refusal(404, "Sorry, we can't find the page you are looking for.")
        except Refusal as refusal:
            return refusal.answer

    def _open(self, call: Call, kind: str, name: str, *, write: bool = False, content: bool = False) -> Repository:
        """The repository, if the caller may see it, write to it, or read its files."""
        repo = self._repositories.get((kind, name))
        owner = call.user == self.user and name.split("/")[0] in self.namespaces
        if repo is None or (repo.private and not owner) or (write and not call.user):
            # The client takes a bare 401 for this as well, but only from https.
            raise Refusal(404 if call.user else 401, "Repository not found", "RepoNotFound")
        if write and not owner:
            raise Refusal(403, f"You don't have the required permissions to write to {name}")
        if content and repo.gated and not owner:
            raise Refusal(403 if call.user else 401, f"Access to {name} is restricted", "GatedRepo")
        return repo

    def _page_of(self, repo: Repository) -> str:
        return f"{self.url}/{'' if repo.kind == 'models' else repo.kind + '/'}{repo.name}"

    def _sign(self, repo: Repository, oid: str, **what: Any) -> str:
        key = secrets.token_hex(8)
        self._signed[key] = {"repo": repo, "oid": oid, **what}
        return f"{self.storage_url}/lfs/{repo.name}/{oid}?{urlencode({'signature': key})}"

    @route("GET HEAD", r"/api/agent-harnesses")
    def _harnesses(self, call: Call) -> Answer:
        return Answer.json({"standardEnvVars": [], "harnesses": {}})

    @route("GET HEAD POST", r"/api/telemetry/.*")
    def _telemetry(self, call: Call) -> Answer:
        return Answer()

    @route("GET", r"/api/whoami-v2")
    def _whoami(self, call: Call) -> Answer:
        if not call.user:
            raise Refusal(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": name} for name in self.namespaces[1:] if call.user == self.user]
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return Answer.json({"type": "user", "name": call.user, "fullname": call.user, "orgs": orgs, "auth": access})

    @route("POST", r"/api/validate-yaml")
    def _validate(self, call: Call) -> Answer:
        _, errors, warnings = card_problems(call.json["content"])
        told = {"errors": [{"message": x} for x in errors], "warnings": [{"message": x} for x in warnings]}
        return Answer.json(told, 400 if errors else 200)

    @route("POST", r"/api/repos/create")
    def _create(self, call: Call) -> Answer:
        asked = call.json
        kind, owner = f"{asked.get('type') or 'model'}s", asked.get("organization") or call.user
        name = f"{owner}/{asked['name']}"
        if not call.user:
            raise Refusal(401, "Invalid username or password.")
        if call.user != self.user or owner not in self.namespaces:
            raise Refusal(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{owner}"')
        if not re.fullmatch(r"[\w.-]{1,96}", asked["name"]):
            raise Refusal(400, f"Invalid repo name: {name}")
        if repo := self._repositories.get((kind, name)):
            raise Refusal(409, f"You already created this {kind[:-1]} repo", url=self._page_of(repo))
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.add_repo(name, private=private, repo_type=kind[:-1])
        repo = self._repositories[kind, name]
        return Answer.json({"url": self._page_of(repo), "name": name, "id": name})

    @route("DELETE", r"/api/repos/delete")
    def _delete(self, call: Call) -> Answer:
        asked = call.json
        kind, name = f"{asked.get('type') or 'model'}s", f"{asked.get('organization') or call.user}/{asked['name']}"
        self._open(call, kind, name, write=True)
        del self._repositories[kind, name]
        return Answer()

    @route("PUT", REPO + r"/settings")
    def _settings(self, call: Call, kind: str, name: str) -> Answer:
        repo, asked = self._open(call, kind, name, write=True), call.json
        if "visibility" in asked:
            repo.private = asked["visibility"] == "private"
        repo.gated = bool(asked.get("gated", repo.gated))
        return Answer.json({"private": repo.private, "gated": repo.gated})

    @route("GET", REPO + r"/auth-check(?P<write>/write)?")
    def _auth_check(self, call: Call, kind: str, name: str, write: str | None) -> Answer:
        self._open(call, kind, name, write=bool(write), content=True)
        return Answer()

    @route("GET", REPO + r"/xet-(?:read|write)-token/.*")
    def _xet(self, call: Call, kind: str, name: str) -> Answer:
        raise Refusal(404, "Xet is not offered here: set HF_HUB_DISABLE_XET=1")

    @route("GET HEAD", REPO + r"(?:/revision/(?P<revision>[^/]+))?")
    def _info(self, call: Call, kind: str, name: str, revision: str | None) -> Answer:
        repo = self._open(call, kind, name)
        commit = repo.at(revision or "main")
        siblings = []
        for path, file in sorted(commit.files.items()):
            siblings.append({"rfilename": path})
            if call.flag("blobs"):
                siblings[-1] |= {"size": len(file.data), "blobId": file.blob}
                if file.lfs:
                    lfs = {"sha256": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
                    siblings[-1] |= {"lfs": lfs}
        readme = commit.files.get("README.md")
        card = card_problems(readme.data.decode(errors="replace"))[0] if readme else {}
        shown = {key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card}
        first = next(iter(repo.history.values()))
        told = {"id": name, "modelId": name, "author": name.split("/")[0], "sha": commit.oid, "private": repo.private}
        told |= {"gated": "auto" if repo.gated else False, "disabled": False, "downloads": 0, "likes": 0}
        told |= {"tags": card.get("tags", []), "cardData": card, **shown, "siblings": siblings}
        return Answer.json({**told, "lastModified": commit.date, "createdAt": first.date})

    @route("GET", REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
    def _tree(self, call: Call, kind: str, name: str, revision: str, folder: str | None) -> Answer:
        repo = self._open(call, kind, name)
        commit = repo.at(revision)
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        paths = set()
        for path in commit.files:
            parts = path.removeprefix(prefix).split("/") if path.startswith(prefix) else []
            depths = range(1, len(parts) + 1) if call.flag("recursive") else range(1, 2 if parts else 1)
            paths |= {prefix + "/".join(parts[:depth]) for depth in depths}
        if folder and not paths:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        start = int(call.query.get("cursor", ["0"])[0])
        page = sorted(paths)[start : start + self.page_size]
        answer = Answer.json([repo.entry(commit, path, call.flag("expand")) for path in page])
        if start + self.page_size < len(paths):
            query = {**{key: x[0] for key, x in call.query.items()}, "cursor": start + self.page_size}
            answer.headers["Link"] = f'<{self.url}{call.path}?{urlencode(query)}>; rel="next"'
        return answer

    @route("POST", REPO + r"/paths-info/(?P<revision>[^/]+)")
    def _paths_info(self, call: Call, kind: str, name: str, revision: str) -> Answer:
        repo = self._open(call, kind, name)
        asked = parse_qs(call.body.decode())
        expand = asked.get("expand", [""])[0].lower() == "true"
        told = [repo.entry(repo.at(revision), path.rstrip("/"), expand) for path in asked.get("paths", [])]
        return Answer.json([entry for entry in told if entry])

    @route("GET", REPO + r"/commits/(?P<revision>[^/]+)")
    def _commits(self, call: Call, kind: str, name: str, revision: str) -> Answer:
        self._open(call, kind, name).at(revision)
        line = self.commits(name, revision, repo_type=kind[:-1])
        told = [
            {"id": x.oid, "title": x.title, "message": x.message, "date": x.date, "author": x.author} for x in line
        ]
        return Answer.json([{**x, "authors": [{"user": x.pop("author")}]} for x in told])

    @route("GET", REPO + r"/refs")
    def _refs(self, call: Call, kind: str, name: str) -> Answer:
        repo = self._open(call, kind, name)
        told: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        groups = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
        for ref, oid in repo.refs.items():
            start = next(start for start in groups if ref.startswith(start))
            told[groups[start]].append({"name": ref.removeprefix(start), "ref": ref, "targetCommit": oid})
        if not call.flag("include_prs"):
            del told["pullRequests"]
        return Answer.json(told)

    @route("POST DELETE", REPO + r"/branch/(?P<branch>[^/]+)")
    def _branch(self, call: Call, kind: str, name: str, branch: str) -> Answer:
        repo = self._open(call, kind, name, write=True)
        start = (call.method == "POST" and call.json.get("startingPoint")) or "main"
        return self._move_ref(call, repo, f"refs/heads/{branch}", start)

    @route("POST DELETE", REPO + r"/tag/(?P<revision>[^/]+)")
    def _tag(self, call: Call, kind: str, name: str, revision: str) -> Answer:
        tag = call.json["tag"] if call.method == "POST" else revision
        return self._move_ref(call, self._open(call, kind, name, write=True), f"refs/tags/{tag}", revision)

    def _move_ref(self, call: Call, repo: Repository, ref: str, start: str) -> Answer:
        if call.method == "POST":
            if ref in repo.refs:
                raise Refusal(409, f"Reference already exists: {ref}")
            repo.refs[ref] = repo.at(start).oid
        elif ref == "refs/heads/main":
            raise Refusal(403, "The main branch cannot be deleted")
        elif repo.refs.pop(ref, None) is None:
            raise Refusal(404, f"Reference doesn't exist: {ref}", "RevisionNotFound")
        return Answer()

    @route("GET", REPO + r"/discussions")
    def _discussions(self, call: Call, kind: str, name: str) -> Answer:
        pulls = self._open(call, kind, name).pulls
        return Answer.json({"discussions": pulls, "count": len(pulls), "start": 0})

    @route("POST", REPO + r"/preupload/(?P<revision>[^/]+)")
    def _preupload(self, call: Call, kind: str, name: str, revision: str) -> Answer:
        repo = self._open(call, kind, name, write=not (call.user and call.flag("create_pr")))
        commit, told = repo.at(revision), []
        for asked in call.json["files"]:
            path, sample = asked["path"], base64.b64decode(asked["sample"])
            lfs = repo.is_lfs(commit, path, asked["size"], sample, self.lfs_limit)
            entry = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            here = commit.files.get(path)
            told.append({**entry, **({"oid": here.etag} if here else {})})
        return Answer.json({"files": told, "commitOid": commit.oid})

    @route("POST", PAGE + r"\.git/info/lfs/objects/batch")
    def _batch(self, call: Call, kind: str, name: str) -> Answer:
        # The client leaves the ref out for a pull request, which whoever may read may open.
        repo = self._open(call, kind, name, write=not call.user or "ref" in call.json)
        told: list[dict[str, Any]] = []
        for asked in call.json["objects"]:
            oid, size = asked["oid"], asked["size"]
            told.append({"oid": oid, "size": size, "authenticated": True})
            if oid in repo.objects:
                continue
            href, header = self._sign(repo, oid, size=size), {}
            if size > self.part_size:
                key = href.rpartition("=")[2]
                urls = {f"{i + 1:05d}": f"{href}&part={i + 1}" for i in range(ceil(size / self.part_size))}
                header = {"chunk_size": str(self.part_size), **urls}
                self._signed[key]["parts"] = {}
                href = f"{self.url}/api/complete_multipart?{urlencode({'signature': key})}"
            verify = {"href": f"{self._page_of(repo)}.git/info/lfs/verify"}
            told[-1]["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
        multipart = any("chunk_size" in x["actions"]["upload"]["header"] for x in told if "actions" in x)
        return Answer.json({"transfer": "multipart" if multipart else "basic", "objects": told})

    @route("POST", PAGE + r"\.git/info/lfs/verify")
    def _verify(self, call: Call, kind: str, name: str) -> Answer:
        repo, asked = self._open(call, kind, name, write=not call.user), call.json
        if len(repo.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, f"No object {asked['oid']} of {asked['size']} bytes")
        return Answer()

    def _grant(self, call: Call) -> dict[str, Any]:
        grant = self._signed.get(call.query.get("signature", [""])[0])
        if grant is None:
            raise Refusal(403, "The signature does not match")
        return grant

    def _store(self, grant: dict[str, Any], data: bytes) -> None:
        if len(data) != grant["size"] or hashlib.sha256(data).hexdigest() != grant["oid"]:
            raise Refusal(400, "What was uploaded is not what was announced")
        grant["repo"].objects[grant["oid"]] = data

    @route("PUT", r"/lfs/.+")
    def _upload(self, call: Call) -> Answer:
        grant = self._grant(call)
        if "parts" in grant:
            grant["parts"][int(call.query["part"][0])] = call.body
        else:
            self._store(grant, call.body)
        return Answer(headers={"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})

    @route("POST", r"/api/complete_multipart")
    def _complete(self, call: Call) -> Answer:
        grant = self._grant(call)
        parts = dict(sorted(grant["parts"].items()))
        etags = [{"partNumber": i, "etag": f'"{hashlib.md5(x).hexdigest()}"'} for i, x in parts.items()]
        if call.json != {"oid": grant["oid"], "parts": etags}:
            raise Refusal(400, "The parts are not those that were uploaded")
        self._store(grant, b"".join(parts.values()))
        return Answer.json({"success": True})

    @route("POST", REPO + r"/commit/(?P<revision>[^/]+)")
    def _commit(self, call: Call, kind: str, name: str, revision: str) -> Answer:
        pull = call.flag("create_pr")
        repo = self._open(call, kind, name, write=not (call.user and pull))
        base, ref = repo.at(revision), repo.ref_of(revision)
        if not pull and not (ref or "").startswith(("refs/heads/", "refs/pr/")):
            raise Refusal(404, f"No branch {revision} to commit to", "RevisionNotFound")
        lines = [json.loads(line) for line in call.body.splitlines()]
        header = lines[0]["value"]
        if not header.get("summary"):
            raise Refusal(400, "A commit needs a summary")
        if not base.oid.startswith(header.get("parentCommit", "")):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(base.files)
        for key, value in ((line["key"], line["value"]) for line in lines[1:]):
            self._change(repo, files, key, value)
        card = files.get("README.md")
        if card and card != base.files.get("README.md") and (errors := card_problems(card.data.decode())[1]):
            raise Refusal(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
        told = {"success": True, "hookOutput": ""}
        if pull:
            number = len(repo.pulls) + 1
            ref = f"refs/pr/{number}"
            repo.refs[ref] = base.oid
            told |= {"pullRequestUrl": f"{self._page_of(repo)}/discussions/{number}"}
        commit = repo.add_commit(ref, files, header["summary"], header.get("description", ""), call.user)
        if pull:
            opened = {"num": number, "title": commit.title, "author": {"name": call.user}, "createdAt": commit.date}
            about = {"name": repo.name, "type": repo.kind[:-1]}
            repo.pulls.append({**opened, "status": "open", "isPullRequest": True, "repo": about})
        return Answer.json(
            {**told, "commitOid": commit.oid, "commitUrl": f"{self._page_of(repo)}/commit/{commit.oid}"}
        )

    def _change(self, repo: Repository, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
        """Carry out one line of a commit."""
        path = value["path"]
        if key == "file":
            try:
                data = base64.b64decode(value["content"], validate=True)
            except binascii.Error as error:
                raise Refusal(400, f"The content of {path} is not base64: {error}") from error
            files[path] = File(data, lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in repo.objects:
                raise Refusal(400, f"{path}: an LFS pointer points to a file that does not exist: {value['oid']}")
            files[path] = File(repo.objects[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            folder = f"{path.rstrip('/')}/"
            gone = [x for x in files if (x == path if key == "deletedFile" else x.startswith(folder))]
            if not gone:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for x in gone:
                del files[x]
        else:
            raise Refusal(400, f"What is {key}?")

    @route("GET HEAD", PAGE + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def _resolve(self, call: Call, kind: str, name: str, revision: str, path: str) -> Answer:
        repo = self._open(call, kind, name, content=True)
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        file = commit.files[path]
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data)), "Accept-Ranges": "bytes"}
        if file.lfs:
            return Answer(status=302, headers={**headers, "Location": self._sign(repo, file.sha256)})
        location = f"/api/resolve-cache/{kind}/{name}/{commit.oid}/{quote(path)}"
        return Answer(status=307, headers={**headers, "Location": location})

    @route("GET HEAD", REPO.replace("/api/", "/api/resolve-cache/") + r"/(?P<oid>[^/]+)/(?P<path>.+)")
    def _resolved(self, call: Call, kind: str, name: str, oid: str, path: str) -> Answer:
        file = self._open(call, kind, name, content=True).at(oid).files[path]
        return self._ranged(call, file.data, {"X-Repo-Commit": oid, "ETag": f'"{file.etag}"'})

    @route("GET HEAD", r"/lfs/.+")
    def _download(self, call: Call) -> Answer:
        grant = self._grant(call)
        return self._ranged(call, grant["repo"].objects[grant["oid"]], {"ETag": f'"{grant["oid"]}"'})

    def _ranged(self, call: Call, data: bytes, headers: dict[str, str]) -> Answer:
        headers = {**headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        match = re.fullmatch(r"bytes=(?=.*\d)(\d*)-(\d*)", call.headers.get("Range", ""))
        if match is None:
            return Answer(data, headers=headers)
        start = int(match[1]) if match[1] else max(len(data) - int(match[2]), 0)
        end = min(int(match[2]) + 1, len(data)) if match[1] and match[2] else len(data)
        if start >= end:
            raise Refusal(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        return Answer(data[start:end], 206, headers)


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
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        left = int(self.headers.get("Content-Length", 0))
        while left:
            if not (piece := self.rfile.read1(min(left, 1 << 16))):
                raise ConnectionResetError("the client left in the middle")
            left -= len(piece)
            yield piece

    def _serve(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        fault = self.hub._fault(f"{self.command} {self.path}")
        cut_upload = cut_answer = None
        if fault:
            uploads = self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers
            cut_upload, cut_answer = (fault.after, None) if uploads and not fault.answer else (None, fault.after)
        body = b""
        for piece in self._body():
            body += piece
            if cut_upload is not None and len(body) >= cut_upload:
                self.close_connection = True
                self.hub.requests.append(Request(self.command, self.path, 0, len(body), token))
                return
        parts = urlsplit(self.path)
        users = {self.hub.token: self.hub.user, self.hub.stranger_token: "stranger"}
        query = parse_qs(parts.query, keep_blank_values=True)
        call = Call(self.command, parts.path, query, self.headers, body, users.get(token))
        if fault and fault.status:
            message = f"The server was told to answer {fault.status}"
            answer = Refusal(fault.status, message, headers=fault.headers).answer
        else:
            answer = self.hub._answer(call)
        lost = cut_answer == 0
        self.hub.requests.append(Request(self.command, self.path, 0 if lost else answer.status, len(body), token))
        self.close_connection |= cut_answer is not None
        if fault and (cut_upload is not None or len(answer.body) < (cut_answer or 0)):
            fault.times += 1  # it was too short to be cut
        if lost:
            return
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:cut_answer])

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
