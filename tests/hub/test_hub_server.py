"""The Hub on localhost, as huggingface_hub's own client, transformers and diffusers see it."""

import hashlib
import random
import subprocess
import sys
import urllib.request
import warnings
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import tiny
from hub_server import GITATTRIBUTES, HubServer, impatient
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hieratok_hf import AutoencoderHieraTok, HieraTokModel

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own

CARD = b"---\nlicense: apache-2.0\nlibrary_name: hieratok\ntags: [vae]\n---\n# A model\n"
WEIGHTS = random.Random(0).randbytes(100_000)
FILES = {
    "README.md": CARD,
    "config.json": b"{}\n",
    "empty.txt": b"",
    "model.safetensors": WEIGHTS,
    "vae/a name + more.txt": b"text",
    "vae/image": b"\x89PNG\0\0",
}


@pytest.fixture
def api(hub_here):
    return HfApi(endpoint=hub_here.url, token=hub_here.token)


@pytest.fixture
def stranger(hub_here):
    return HfApi(endpoint=hub_here.url, token=hub_here.stranger_token)


def written(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def downloaded(api, tmp_path, revision):
    folder = tmp_path / hashlib.sha1(revision.encode()).hexdigest()
    return read(Path(api.snapshot_download("org/name", revision=revision, cache_dir=folder)))


def test_a_folder_comes_back_bit_for_bit(api, hub_here, tmp_path):
    assert api.create_repo("org/name").repo_id == "org/name"
    info = api.upload_folder(
        repo_id="org/name", folder_path=written(tmp_path / "up", FILES), commit_message="All of it"
    )
    whole = {**FILES, ".gitattributes": GITATTRIBUTES}
    assert hub_here.files("org/name") == whole
    api.create_tag("org/name", tag="v1.0")
    api.upload_file(repo_id="org/name", path_in_repo="config.json", path_or_fileobj=b"{ }\n")
    later = {**whole, "config.json": b"{ }\n"}
    assert [x.title for x in api.list_repo_commits("org/name")] == [
        "Upload config.json with huggingface_hub",
        "All of it",
        "initial commit",
    ]
    for revision, files in ({"main": later, "v1.0": whole, info.oid: whole}).items():
        assert downloaded(api, tmp_path, revision) == files
    assert {x.token for x in hub_here.sent(" /lfs/")} == {None}  # the other host is not shown the token
    assert len(hub_here.sent("^PUT /lfs/")) == 2  # by its ending, and because it is not text


def test_what_is_told_of_a_repository(api, hub_here):
    oid = hub_here.add_repo("org/name", FILES, private=True)
    info = api.model_info("org/name", files_metadata=True)
    assert (info.sha, info.private, info.gated, info.author) == (oid, True, False, "org")
    assert (info.library_name, info.tags, info.card_data.license) == ("hieratok", ["vae"], "apache-2.0")
    told = {x.rfilename: x for x in info.siblings}
    assert {name: x.size for name, x in told.items()} == {k: len(v) for k, v in hub_here.files("org/name").items()}
    assert told["model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert told["config.json"].blob_id == hashlib.sha1(b"blob 3\0{}\n").hexdigest() and told["config.json"].lfs is None
    assert api.whoami()["name"] == hub_here.user and api.repo_exists("org/name")
    assert api.get_hf_file_metadata(url=f"{hub_here.url}/org/name/resolve/main/model.safetensors").size == len(WEIGHTS)


def test_a_tree_in_pages(api, hub_here):
    hub_here.add_repo("org/name", FILES)
    second = hub_here.add_commit("org/name", {"vae/later.txt": b"later"})
    hub_here.page_size = 3
    names = {*FILES, ".gitattributes", "vae/later.txt"}
    assert [x.path for x in api.list_repo_tree("org/name", recursive=True)] == sorted({*names, "vae"})
    assert len(hub_here.sent("^GET .*/tree/")) == 3
    top = {x.path for x in api.list_repo_tree("org/name")}
    assert top == {"vae"} | {name for name in names if "/" not in name}
    vae = {x.path: x for x in api.list_repo_tree("org/name", "vae", expand=True)}
    assert set(vae) == {name for name in names if name.startswith("vae/")}
    assert vae["vae/later.txt"].last_commit.oid == second != vae["vae/image"].last_commit.oid
    told = api.get_paths_info("org/name", ["vae", "model.safetensors", "missing"], expand=True)
    assert [x.path for x in told] == ["vae", "model.safetensors"] and told[0].last_commit.oid == second
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("org/name", "missing"))


def test_known_bytes_are_not_sent_again(api, hub_here):
    hub_here.add_repo("org/name")
    send = partial(api.upload_file, repo_id="org/name", path_or_fileobj=WEIGHTS)
    first = send(path_in_repo="a.safetensors")
    assert [x.received for x in hub_here.sent("^PUT ")] == [len(WEIGHTS)]
    second = send(path_in_repo="b.safetensors")
    assert len(hub_here.sent("^PUT ")) == 1 and second.oid != first.oid
    assert hub_here.files("org/name")["b.safetensors"] == WEIGHTS
    assert send(path_in_repo="b.safetensors").oid == second.oid  # and nothing new is no commit
    assert len(hub_here.commits("org/name")) == 3


def test_large_files_go_in_parts(api, hub_here, monkeypatch):
    hub_here.add_repo("org/name")
    hub_here.part_size = 40_000
    hub_here.fail(r"^PUT .*part=2", 500)
    api.upload_file(repo_id="org/name", path_in_repo="a.safetensors", path_or_fileobj=WEIGHTS)
    assert hub_here.files("org/name")["a.safetensors"] == WEIGHTS
    sent = [(x.status, x.received) for x in hub_here.sent("^PUT ")]
    assert sent == [(200, 40_000), (500, 40_000), (200, 40_000), (200, 20_000)]
    monkeypatch.setattr("huggingface_hub.lfs._get_completion_payload", lambda _, oid: {"oid": oid, "parts": []})
    with pytest.raises(RuntimeError) as error:
        api.upload_file(repo_id="org/name", path_in_repo="b.safetensors", path_or_fileobj=WEIGHTS[::-1])
    assert isinstance(error.value.__cause__, BadRequestError)
    assert "b.safetensors" not in hub_here.files("org/name")


def test_text_above_the_limit_goes_over_lfs(api, hub_here):
    hub_here.add_repo("org/name")
    hub_here.lfs_limit = 10
    for name, text in {"short.txt": b"0123456789", "long.txt": b"0123456789A"}.items():
        api.upload_file(repo_id="org/name", path_in_repo=name, path_or_fileobj=text)
    told = {x.path: x.lfs is not None for x in api.list_repo_tree("org/name")}
    assert told == {".gitattributes": False, "short.txt": False, "long.txt": True}


def test_a_cut_download_goes_on_where_it_broke(api, hub_here, monkeypatch, tmp_path):
    hub_here.add_repo("org/name", FILES)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub_here.cut("^GET /lfs/", after=35_000)
    path = api.hf_hub_download("org/name", "model.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == WEIGHTS
    assert [x.status for x in hub_here.sent("^GET /lfs/")] == [200, 206]


@pytest.mark.parametrize(
    "header, there", [("bytes=10-19", (10, 20)), ("bytes=99990-", (99_990, 100_000)), ("bytes=-5", (99_995, 100_000))]
)
def test_a_range_is_those_bytes(hub_here, header, there):
    hub_here.add_repo("org/name", FILES)
    url = f"{hub_here.url}/org/name/resolve/main/model.safetensors"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": header})) as answer:
        assert (answer.status, answer.read()) == (206, WEIGHTS[slice(*there)])
        assert answer.headers["Content-Range"] == f"bytes {there[0]}-{there[1] - 1}/100000"


@pytest.mark.parametrize("at", ["^POST .*/preupload/", r"^POST .*/batch", "^PUT /lfs/", r"^POST .*/verify"])
@pytest.mark.parametrize("status, headers", [(429, {"Retry-After": "1"}), (500, {}), (503, {})])
def test_the_client_tries_again(api, hub_here, at, status, headers):
    hub_here.add_repo("org/name")
    hub_here.fail(at, status, times=2, headers=headers)
    api.upload_file(repo_id="org/name", path_in_repo="a.safetensors", path_or_fileobj=WEIGHTS)
    assert hub_here.files("org/name")["a.safetensors"] == WEIGHTS
    assert [x.status for x in hub_here.sent(at)] == [status, status, 200]
    assert len(hub_here.commits("org/name")) == 2


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_commit_that_is_refused_changes_nothing(api, hub_here, status):
    before = hub_here.add_repo("org/name")
    hub_here.fail("^POST .*/commit/", status)
    with pytest.raises(HfHubHTTPError) as error:
        api.upload_file(repo_id="org/name", path_in_repo="config.json", path_or_fileobj=b"{}")
    assert error.value.response.status_code == status
    assert hub_here.commits("org/name")[0].oid == before


@pytest.mark.parametrize(
    "at, after", [("^PUT /lfs/", 1000), ("^PUT /lfs/", 99_999), ("^POST .*/commit/", 0), ("^POST .*/batch", 0)]
)
def test_a_cut_upload_leaves_main_as_it_was(api, hub_here, tmp_path, at, after):
    before = hub_here.add_repo("org/name", {"model.safetensors": b"old"})
    folder = written(tmp_path / "up", FILES)
    hub_here.cut(at, after=after, times=6)  # the client's first try and all others
    with pytest.raises((RuntimeError, OSError, huggingface_hub.utils._http.httpx2.TransportError)):
        api.upload_folder(repo_id="org/name", folder_path=folder)
    assert hub_here.commits("org/name")[0].oid == before
    assert hub_here.files("org/name") == {".gitattributes": GITATTRIBUTES, "model.safetensors": b"old"}
    assert 0 < sum(x.status == 0 for x in hub_here.sent(at)) <= 6
    hub_here.recover()
    api.upload_folder(repo_id="org/name", folder_path=folder)
    assert hub_here.files("org/name") == {**FILES, ".gitattributes": GITATTRIBUTES}


def test_a_commit_whose_answer_is_lost_is_there(api, hub_here):
    hub_here.add_repo("org/name")
    hub_here.cut("^POST .*/commit/", answer=True)
    send = partial(api.upload_file, repo_id="org/name", path_in_repo="config.json", path_or_fileobj=b"{}")
    with pytest.raises(huggingface_hub.utils._http.httpx2.RemoteProtocolError):
        send()
    assert hub_here.files("org/name")["config.json"] == b"{}"
    assert send().oid == hub_here.commits("org/name")[0].oid and len(hub_here.commits("org/name")) == 2


def test_a_parent_that_is_no_longer_the_head(api, hub_here):
    first = hub_here.add_repo("org/name")
    second = hub_here.add_commit("org/name", {"config.json": b"theirs"})
    mine = {"repo_id": "org/name", "path_in_repo": "config.json", "path_or_fileobj": b"mine"}
    with pytest.raises(HfHubHTTPError) as error:
        api.upload_file(**mine, parent_commit=first)
    assert error.value.response.status_code == 412
    assert hub_here.commits("org/name")[0].oid == second
    third = api.upload_file(**mine, parent_commit=second[:7])
    assert [x.oid for x in hub_here.commits("org/name")[:2]] == [third.oid, second]


def test_a_pull_request(api, stranger, hub_here, tmp_path):
    before = hub_here.add_repo("org/name", {"a.txt": b"a"})
    operations = [CommitOperationAdd("b.txt", b"b"), CommitOperationAdd("b.safetensors", WEIGHTS)]
    for number, who in enumerate((api, stranger), start=1):
        adds = [CommitOperationAdd(x.path_in_repo, x.path_or_fileobj) for x in operations]
        made = who.create_commit("org/name", adds, commit_message="More", create_pr=True)
        assert (made.pr_num, made.pr_revision) == (number, f"refs/pr/{number}")
    assert hub_here.commits("org/name")[0].oid == before
    whole = {".gitattributes": GITATTRIBUTES, "a.txt": b"a", "b.txt": b"b", "b.safetensors": WEIGHTS}
    assert downloaded(api, tmp_path, "refs/pr/1") == whole
    api.upload_file(repo_id="org/name", path_in_repo="c.txt", path_or_fileobj=b"c", revision="refs/pr/1")
    assert hub_here.files("org/name", "refs/pr/1") == {**whole, "c.txt": b"c"}
    assert [x.ref for x in api.list_repo_refs("org/name", include_pull_requests=True).pull_requests] == [
        "refs/pr/1",
        "refs/pr/2",
    ]
    assert [(x.num, x.author) for x in api.get_repo_discussions("org/name")] == [(1, "tester"), (2, "stranger")]


def test_branches_and_tags(api, hub_here):
    first = hub_here.add_repo("org/name", {"a.txt": b"a"})
    api.create_branch("org/name", branch="next/one")
    api.upload_file(repo_id="org/name", path_in_repo="a.txt", path_or_fileobj=b"next", revision="next/one")
    second = hub_here.add_commit("org/name", {"a.txt": b"b"})
    api.create_tag("org/name", tag="v1", revision=first)
    assert [hub_here.files("org/name", x)["a.txt"] for x in ("main", "next/one", "v1")] == [b"b", b"next", b"a"]
    refs = api.list_repo_refs("org/name")
    assert {x.name: x.target_commit for x in refs.tags} == {"v1": first}
    assert {x.name for x in refs.branches} == {"main", "next/one"} and refs.pull_requests is None
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("org/name", tag="v1")
    api.create_tag("org/name", tag="v1", exist_ok=True)
    api.create_branch("org/name", branch="next/one", exist_ok=True)
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(repo_id="org/name", path_in_repo="a.txt", path_or_fileobj=b"x", revision="v1")
    resolved = [api.resolve_revision("org/name", revision=x).resolved for x in ("main", "v1", "next/one")]
    assert resolved[:2] == [second, first] and resolved[2] == hub_here.commits("org/name", "next/one")[0].oid
    api.delete_tag("org/name", tag="v1")
    api.delete_branch("org/name", branch="next/one")
    assert hub_here.repo("org/name").refs == {"refs/heads/main": second}


def test_deletions(api, hub_here, tmp_path):
    files = {**FILES, "vae.txt": b"not of the folder"}
    hub_here.add_repo("org/name", files)
    api.delete_file("config.json", "org/name")
    api.delete_folder("vae", "org/name")
    left = {k: v for k, v in files.items() if k != "config.json" and not k.startswith("vae/")}
    assert hub_here.files("org/name") == {**left, ".gitattributes": GITATTRIBUTES}
    with pytest.raises(EntryNotFoundError):
        api.create_commit("org/name", [CommitOperationDelete("config.json")], commit_message="Again")
    folder = written(tmp_path / "up", {"new.txt": b"new"})
    api.upload_folder(repo_id="org/name", folder_path=folder, delete_patterns="*")
    assert hub_here.files("org/name") == {".gitattributes": GITATTRIBUTES, "new.txt": b"new"}


def test_what_a_repository_is_made_with(api, stranger, hub_here):
    assert api.create_repo("mine", private=True).repo_id == "tester/mine"
    assert api.create_repo("tester/mine", exist_ok=True).repo_id == "tester/mine"
    assert hub_here.repo("tester/mine").private
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("tester/mine")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("others/name")
    with pytest.raises(RepositoryNotFoundError):
        stranger.model_info("tester/mine")
    api.update_repo_settings("tester/mine", visibility="public")
    assert stranger.model_info("tester/mine").private is False
    with pytest.raises(HfHubHTTPError, match="403"):
        stranger.delete_repo("tester/mine")
    api.delete_repo("tester/mine")
    assert not api.repo_exists("tester/mine")


def test_data_sets_and_models_of_one_name(api, hub_here, tmp_path):
    hub_here.add_repo("org/name")
    api.create_repo("org/name", repo_type="dataset")
    folder = written(tmp_path / "up", {"a.bin": b"data"})
    made = api.upload_folder(repo_id="org/name", folder_path=folder, repo_type="dataset")
    assert made.repo_url.repo_type == "dataset" and hub_here.files("org/name", repo_type="dataset")["a.bin"] == b"data"
    assert Path(api.hf_hub_download("org/name", "a.bin", repo_type="dataset")).read_bytes() == b"data"
    assert "a.bin" not in hub_here.files("org/name")


def test_who_may_do_what(api, stranger, hub_here):
    before = hub_here.add_repo("org/name", FILES)
    hub_here.add_repo("org/private", FILES, private=True)
    hub_here.add_repo("org/gated", FILES, gated=True)
    nobody, wrong = (HfApi(endpoint=hub_here.url, token=token) for token in (False, "hf_wrong"))
    add = {"path_in_repo": "config.json", "path_or_fileobj": b"{ }"}
    refused = [
        (nobody, RepositoryNotFoundError, 401),
        (wrong, HfHubHTTPError, 401),
        (stranger, HfHubHTTPError, 403),
    ]
    for who, kind, status in refused:
        with pytest.raises(kind) as error:
            who.upload_file(repo_id="org/name", **add)
        assert error.value.response.status_code == status
    with pytest.raises(HfHubHTTPError, match="401"):
        wrong.model_info("org/name")  # though all may read it
    for who, kind, status in (*refused[:2], (stranger, RepositoryNotFoundError, 404)):
        for read_it in (who.model_info, lambda name, who=who: who.hf_hub_download(name, "config.json")):
            with pytest.raises(kind) as error:
                read_it("org/private")
            assert error.value.response.status_code == status
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        wrong.whoami()
    assert nobody.model_info("org/name").sha == before
    assert Path(nobody.hf_hub_download("org/name", "model.safetensors")).read_bytes() == WEIGHTS
    for who in (nobody, stranger):
        assert who.model_info("org/gated").gated == "auto"
        with pytest.raises(GatedRepoError):
            who.hf_hub_download("org/gated", "config.json")
    assert api.hf_hub_download("org/gated", "config.json") and api.hf_hub_download("org/private", "config.json")
    assert hub_here.commits("org/name")[0].oid == before


def test_what_is_not_there(api, hub_here, tmp_path):
    oid = hub_here.add_repo("org/name", FILES)
    with pytest.raises(RepositoryNotFoundError):
        api.hf_hub_download("org/none", "config.json")
    with pytest.raises(RepositoryNotFoundError):
        api.upload_file(repo_id="org/none", path_in_repo="a", path_or_fileobj=b"a")
    for revision in ("none", "f" * 40, "refs/pr/1"):
        with pytest.raises(RevisionNotFoundError):
            api.hf_hub_download("org/name", "config.json", revision=revision)
        assert not api.revision_exists("org/name", revision)
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("org/name", "none", cache_dir=tmp_path)
    assert list(tmp_path.rglob(f".no_exist/{oid}/none"))  # the client learned at which commit
    assert api.file_exists("org/name", "config.json") and not api.file_exists("org/name", "none")


@pytest.mark.parametrize("head", ["license: [a", "- a list", "license: 3", "tags: vae"])
def test_a_bad_card_is_refused_before_any_upload(api, hub_here, tmp_path, head):
    before = hub_here.add_repo("org/name")
    folder = written(tmp_path / "up", {**FILES, "README.md": f"---\n{head}\n---\n".encode()})
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_folder(repo_id="org/name", folder_path=folder)
    assert hub_here.commits("org/name")[0].oid == before and not hub_here.sent("^PUT ")


def test_cards_are_validated(api, hub_here):
    ModelCard(CARD.decode()).validate()
    hub_here.add_repo("org/name")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(repo_id="org/name", path_in_repo="README.md", path_or_fileobj=b"# No head\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        api.upload_file(repo_id="org/name", path_in_repo="README.md", path_or_fileobj=CARD)


def test_bytes_that_are_not_what_was_announced(api, hub_here):
    before = hub_here.add_repo("org/name")
    operation = CommitOperationAdd("a.safetensors", WEIGHTS)
    operation.upload_info.sha256 = hashlib.sha256(b"other").digest()
    with pytest.raises(RuntimeError) as error:
        api.create_commit("org/name", [operation], commit_message="Wrong")
    assert isinstance(error.value.__cause__, BadRequestError)
    operation._upload_mode, operation._is_uploaded = "lfs", True
    with pytest.raises(BadRequestError, match="does not exist"):
        api.create_commit("org/name", [operation], commit_message="Never sent")
    assert hub_here.commits("org/name")[0].oid == before


def test_a_slow_answer(api, hub_here):
    hub_here.add_repo("org/name")
    hub_here.delay("^GET /api/models/", 0.3)
    with pytest.raises(huggingface_hub.utils._http.httpx2.TimeoutException):
        api.model_info("org/name", timeout=0.05)
    assert api.model_info("org/name", timeout=5).sha == hub_here.commits("org/name")[0].oid


def test_a_hub_that_is_down(api, hub_here):
    hub_here.add_repo("org/name", FILES)
    path = api.hf_hub_download("org/name", "config.json")
    hub_here.fail(".", 503, times=float("inf"))
    assert api.hf_hub_download("org/name", "config.json") == path  # from the cache
    with pytest.raises(LocalEntryNotFoundError):
        api.hf_hub_download("org/name", "model.safetensors")
    with pytest.raises(HfHubHTTPError):
        api.model_info("org/name")


def test_transformers_and_diffusers_find_their_model(hub_here):
    torch.manual_seed(0)
    model = HieraTokModel(tiny())
    model.push_to_hub("org/name")
    oid = hub_here.commits("org/name")[0].oid
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    hub_here.add_commit("org/name", {"config.json": b"not JSON"})
    for kind in (HieraTokModel, AutoencoderHieraTok):
        loaded = kind.from_pretrained("org/name", revision=oid).state_dict()
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(x, weights[name]) for name, x in loaded.items())
        with pytest.raises((OSError, ValueError)):
            kind.from_pretrained("org/name")
    assert hub_here.sent("^GET /api/models/org/name$|^GET /api/models/org/name/revision/main")


def test_another_process_knows_this_hub_alone(hub_server, tmp_path, monkeypatch):
    hub_server.add_repo("org/name", FILES, private=True)
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    hub_server.fail("^POST .*/preupload/", 503, times=3)
    code = """
import huggingface_hub, time
start = time.perf_counter()
huggingface_hub.upload_file(repo_id="org/name", path_in_repo="b.safetensors", path_or_fileobj=b"weights")
print(time.perf_counter() - start < 3)
print(huggingface_hub.snapshot_download("org/name"))
"""
    environment = hub_server.environment(tmp_path, impatiently=True)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    soon, folder = done.stdout.split()
    assert soon == "True" and folder.startswith(str(tmp_path))  # waiting as usual would take 7 seconds
    assert {name: Path(folder, name).read_bytes() for name in hub_server.files("org/name")} == {
        **FILES,
        ".gitattributes": GITATTRIBUTES,
        "b.safetensors": b"weights",
    }


def test_only_the_clients_waits_are_short():
    waited = []
    impatient(8, sleep=waited.append)
    exec(
        "impatient(8, sleep=sleep)",
        {"__name__": "huggingface_hub.lfs", "impatient": impatient, "sleep": waited.append},
    )
    assert waited == [8, 0.01]


def test_the_servers_own_failures_are_not_silent():
    hub = HubServer().__enter__()
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{hub.url}/api/validate-yaml", data=b"not JSON")
    with pytest.raises(AssertionError, match="JSONDecodeError"):
        hub.__exit__()
