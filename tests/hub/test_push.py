"""Pushes to a Hub on localhost by huggingface_hub's own client, and models that come back from it."""

import json
import os
import signal
import tempfile
from functools import partial

import pytest
import torch
from helpers import images, random_core
from hub_server import CUT, HubServer
from huggingface_hub import HfApi, close_session, get_session
from test_remote_code import expected_results, in_a_clean_process
from tiny_pipelines import make_pipeline

from hieratok_hf import AutoencoderHieraTok, HieraTokDiTPipeline, HieraTokModel
from hieratok_hf.hub.push import HubError, push_folder

WEIGHTS = "diffusion_pytorch_model.safetensors"
UPLOAD = r"PUT "


def state(hub: HubServer, name: str = "org/name") -> tuple:
    return hub.files(name), [commit.oid for commit in hub.commits(name)]


@pytest.fixture
def untried(monkeypatch):
    """Pushes without the load test, which takes the longest."""
    monkeypatch.setattr("hieratok_hf.hub.folder._try", lambda stage: None)


@pytest.mark.parametrize("kind", [AutoencoderHieraTok, HieraTokModel])
def test_what_is_pushed_comes_back(kind, hub_here):
    model, sample = kind.from_core(random_core()), images(1, 3, 16, 24)
    told = model.push_to_hub("org/name", commit_message="Mine", private=True, tags=["mine"])
    assert told.startswith(hub_here.url) and hub_here.repo("org/name").private
    assert len(hub_here.commits("org/name")) == 2 and hub_here.commits("org/name")[0].title == "Mine"
    assert [name for name in hub_here.files("org/name") if name.endswith(".safetensors")] == [WEIGHTS]
    assert "- mine" in hub_here.files("org/name")["README.md"].decode()
    config = json.loads(hub_here.files("org/name")["config.json"])
    assert config["_class_name"] == "AutoencoderHieraTok" and config["architectures"] == ["HieraTokModel"]
    assert config["auto_map"]["AutoModel"] == "modeling_hieratok.HieraTokAutoModel"
    with torch.no_grad():
        expected = AutoencoderHieraTok.from_core(model.core)(sample).sample
        assert torch.equal(AutoencoderHieraTok.from_pretrained("org/name")(sample).sample, expected)
        assert torch.equal(HieraTokModel.from_pretrained("org/name")(sample).reconstruction, expected)


@pytest.mark.parametrize("remote_code", [True, False])
def test_a_pipeline_comes_back_by_its_class(hub_here, remote_code):
    pipe = make_pipeline()
    pipe.push_to_hub("org/name", remote_code=remote_code)
    assert any(name.endswith(".py") for name in hub_here.files("org/name")) == remote_code
    loaded = HieraTokDiTPipeline.from_pretrained("org/name")
    loaded.set_progress_bar_config(disable=True)

    def made(pipe):
        generator = torch.Generator().manual_seed(0)
        return pipe("church", num_inference_steps=2, generator=generator, output_type="pt").images

    assert torch.equal(made(loaded), made(pipe)) and type(loaded.vae) is AutoencoderHieraTok


def test_saving_can_push(hub_here, tmp_path):
    pipe = make_pipeline()
    for name, model in {"pipe": pipe, "vae": pipe.vae, "model": HieraTokModel.from_core(random_core())}.items():
        model.save_pretrained(tmp_path / name, push_to_hub=True, repo_id=f"org/{name}")
        assert {"modeling_hieratok.py", "pipeline_hieratok_dit.py"} & hub_here.files(f"org/{name}").keys()


def test_a_part_goes_into_a_subfolder(hub_here):
    pipe = make_pipeline()
    pipe.push_to_hub("org/name")
    before = hub_here.files("org/name")
    make_pipeline(seed=1).vae.push_to_hub("org/name", subfolder="vae")
    after = hub_here.files("org/name")
    changed = {name for name in after if after[name] != before.get(name)}
    assert f"vae/{WEIGHTS}" in changed and all(name.startswith("vae/") for name in changed)


def test_a_later_push_takes_the_earlier_weights_along(hub_here, saved):
    vae = AutoencoderHieraTok.from_pretrained(saved)
    vae.push_to_hub("org/name", max_shard_size="40KB")
    vae.push_to_hub("org/name", variant="fp16")
    shards = {name for name in hub_here.files("org/name") if "-of-" in name}
    assert len(shards) > 2
    vae.push_to_hub("org/name")
    names = set(hub_here.files("org/name"))
    assert not shards & names and {WEIGHTS, "diffusion_pytorch_model.fp16.safetensors"} <= names
    assert AutoencoderHieraTok.from_pretrained("org/name").config.patch_size == 4


def test_branches_and_pull_requests_leave_main_alone(hub_here, saved):
    push_folder(saved, "org/name")
    before = state(hub_here)
    other = AutoencoderHieraTok.from_core(random_core(seed=1))
    other.push_to_hub("org/name", revision="next")
    told = other.push_to_hub("org/name", create_pr=True)
    assert told.pr_num == 1 and state(hub_here) == before
    for revision in ("next", "refs/pr/1"):
        assert hub_here.files("org/name", revision)[WEIGHTS] != before[0][WEIGHTS]
        loaded = AutoencoderHieraTok.from_pretrained("org/name", revision=revision)
        assert torch.equal(loaded.core.encoder.head.weight, other.core.encoder.head.weight)


def test_a_card_that_was_written_on_the_hub_stays(hub_here, saved):
    push_folder(saved, "org/name")
    hub_here.add_commit("org/name", {"README.md": b"---\nlicense: mit\n---\n\n# By hand\n"})
    push_folder(saved, "org/name")
    text = hub_here.files("org/name")["README.md"].decode()
    assert "# By hand" in text and "license: mit" in text and "library_name: diffusers" in text
    (saved / "README.md").write_text("# Mine\n")  # one of the folder goes before it
    push_folder(saved, "org/name", tags=["mine"])
    text = hub_here.files("org/name")["README.md"].decode()
    assert "# Mine" in text and "# By hand" not in text and "- mine" in text and "- hieratok" in text
    assert (saved / "README.md").read_text() == "# Mine\n"


def test_a_cut_upload_changes_nothing_and_goes_on(hub_here, saved):
    push_folder(saved, "org/name", card=None)
    other = AutoencoderHieraTok.from_core(random_core(seed=1))
    other.save_pretrained(saved, max_shard_size="60KB")
    before = state(hub_here)
    first = len(hub_here.sent(UPLOAD))
    hub_here.fail(UPLOAD, CUT, times=float("inf"))
    with pytest.raises(HubError, match=r"'org/name' was not pushed.*push again: files that have arrived"):
        push_folder(saved, "org/name", card=None)
    assert state(hub_here) == before and len(hub_here.sent(UPLOAD)) > first
    hub_here.recover()
    hub_here.fail(r"POST .*/commit/", 500, times=1)
    with pytest.raises(HubError, match="500"):
        push_folder(saved, "org/name", card=None)
    sent = len(hub_here.sent(UPLOAD))
    push_folder(saved, "org/name", card=None)
    assert len(hub_here.sent(UPLOAD)) == sent  # everything had arrived
    loaded = HieraTokModel.from_pretrained("org/name")
    assert torch.equal(loaded.core.encoder.head.weight, other.core.encoder.head.weight)


@pytest.mark.parametrize(
    ("status", "advice"), [(503, "push again"), (412, "somebody else pushed"), (404, "nothing was changed")]
)
def test_a_refusal_changes_nothing_and_says_what_to_do(hub_here, saved, monkeypatch, status, advice):
    push_folder(saved, "org/name", card=None)
    AutoencoderHieraTok.from_core(random_core(seed=1)).save_pretrained(saved)
    before = state(hub_here)
    hub_here.fail(r"POST .*/commit/", status, times=float("inf"), headers={"Retry-After": "0"})
    with pytest.raises(HubError, match=rf"{status}.*{advice}"):
        push_folder(saved, "org/name", card=None)
    assert state(hub_here) == before
    with monkeypatch.context() as offline, pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        push_folder(saved, "org/name", card=None)
    hub_here.recover()
    push_folder(saved, "org/name", card=None)
    assert hub_here.files("org/name")[WEIGHTS] == (saved / WEIGHTS).read_bytes()


def test_a_wrong_token_is_told(hub_here, saved):
    with pytest.raises(HubError, match="hf auth login"):
        push_folder(saved, "org/name", token="hf_wrong")
    push_folder(saved, "org/name")
    with pytest.raises(HubError, match="hf auth login"):
        push_folder(saved, "org/name", token="hf_wrong")
    assert len(hub_here.commits("org/name")) == 2


def test_what_is_wrong_is_told_before_a_repository_is_made(hub_here, saved):
    for name in ("a/b/c", "org/na me"):
        with pytest.raises(ValueError, match=name):
            push_folder(saved, name)
    with pytest.raises(ValueError, match="`repo_id`"):
        push_folder(saved, None)
    with pytest.raises(ValueError, match="license"):
        push_folder(saved, "org/name", card={"license": "No Licence"})
    (saved / WEIGHTS).write_bytes(b"12345678")
    with pytest.raises(ValueError, match="does not pass its load test"):
        push_folder(saved, "org/name")
    assert not hub_here.requests


def test_the_cache_need_not_be_writable(hub_here, saved, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file"))
    for _ in range(2):  # the second reads the card that is there
        push_folder(saved, "org/name")
    assert WEIGHTS in hub_here.files("org/name")


def test_neither_adapters_nor_pickles_are_pushed(hub_here):
    peft = pytest.importorskip("peft", reason="adapters are peft's")
    vae = AutoencoderHieraTok.from_core(random_core())
    with pytest.raises(ValueError, match="safe_serialization"):
        vae.push_to_hub("org/name", safe_serialization=False)
    vae.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="adapters"):
        vae.push_to_hub("org/name")
    vae.delete_adapters("default")
    assert not hub_here.requests


def test_what_was_pushed_loads_without_the_package_and_then_offline(hub_here, saved, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "pipe")
    expected = expected_results(saved, tmp_path / "pipe")
    push_folder(saved, "org/name")
    push_folder(tmp_path / "pipe", "org/pipe")
    environment = hub_here.environment(tmp_path / "without")
    for offline in ({}, {"HF_HUB_OFFLINE": "1"}):
        before = len(hub_here.requests)
        found = in_a_clean_process(tmp_path, "org/name", "org/pipe", {**environment, **offline})
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert (len(hub_here.requests) == before) == bool(offline)


@pytest.mark.parametrize("kind", [HieraTokModel, AutoencoderHieraTok, HieraTokDiTPipeline])
def test_offline_without_a_cache_the_error_names_the_model_and_the_way_out(kind, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"org/not-cached.*HF_HUB_OFFLINE"):
        kind.from_pretrained("org/not-cached")


def test_a_commit_s_id_is_no_branch(hub_here, saved, untried):
    push_folder(saved, "org/name", card=None)
    (oid, *_), asked = [commit.oid for commit in hub_here.commits("org/name")], len(hub_here.requests)
    for more in ({}, {"create_pr": True}):
        with pytest.raises(ValueError, match=rf"revision.*{oid}"):
            push_folder(saved, "org/name", revision=oid, **more)
    assert len(hub_here.requests) == asked
    push_folder(saved, "org/name", create_pr=True)
    AutoencoderHieraTok.from_core(random_core(seed=1)).push_to_hub("org/name", revision="refs/pr/1")
    assert len(hub_here.repo("org/name").refs["refs/pr/1"]) == 4 and len(hub_here.commits("org/name")) == 2


def test_two_pushes_at_a_time_are_not_mixed(hub_here, saved, untried, monkeypatch):
    push_folder(saved, "org/name")
    plain = HfApi.create_commit

    def late(*args, **kwargs):
        hub_here.add_commit("org/name", {"diffusion_pytorch_model-00001-of-00002.safetensors": b"theirs"})
        return plain(*args, **kwargs)

    with monkeypatch.context() as meanwhile, pytest.raises(HubError, match="somebody else pushed"):
        meanwhile.setattr(HfApi, "create_commit", late)
        AutoencoderHieraTok.from_core(random_core(seed=1)).push_to_hub("org/name")
    assert hub_here.commits("org/name")[0].title == "Add files"
    AutoencoderHieraTok.from_core(random_core(seed=1)).push_to_hub("org/name")
    assert [name for name in hub_here.files("org/name") if name.endswith(".safetensors")] == [WEIGHTS]


@pytest.mark.parametrize(
    ("request_", "status", "headers", "advice"),
    [
        ("POST .*/create", 403, {}, "hf auth login"),  # the repository is there, and the token may write to it alone
        ("POST .*/branch/", 409, {}, None),  # it is there
        ("POST .*/branch/", 400, {}, "nothing was changed"),  # no name of a branch
        ("GET .*/README.md", 403, {"X-Error-Code": "GatedRepo"}, r"ask for access at http.*/org/name"),
        ("POST .*/commit/", 429, {"Retry-After": "0"}, "push again"),
        ("POST .*/commit/", 413, {}, "nothing was changed"),
        ("POST .*/preupload/", 403, {"X-Error-Message": "Private repository storage limit reached"}, "storage limit"),
    ],
)
def test_what_users_of_the_hub_complain_of_most_is_told_in_one_line(
    hub_here, saved, untried, request_, status, headers, advice
):
    push_folder(saved, "org/name")
    push_folder(saved, "org/name", revision="next")
    AutoencoderHieraTok.from_core(random_core(seed=1)).save_pretrained(saved)
    before = state(hub_here)
    hub_here.fail(request_, status, times=float("inf"), headers=headers)
    if advice is None or "create" in request_:
        assert push_folder(saved, "org/name", revision="next").oid
    else:
        with pytest.raises(HubError, match=rf"{status}.*{advice}") as caught:
            push_folder(saved, "org/name", revision="next")
        assert "\n" not in str(caught.value)
    assert state(hub_here) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes of this system do not fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_push_that_is_killed_at_any_request_changes_nothing_and_goes_on(
    hub_here, saved, untried, monkeypatch, tmp_path
):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    vae = AutoencoderHieraTok.from_pretrained(saved)
    vae.push_to_hub("org/name", max_shard_size="60KB")
    other = AutoencoderHieraTok.from_core(random_core(seed=1))
    before = state(hub_here)

    def push_and_die(last):
        """A process that dies when it has made so many requests; whether it did."""
        child = os.fork()
        if child == 0:
            try:
                left = iter(range(last))
                die = partial(os.kill, os.getpid(), signal.SIGKILL)
                torch.set_num_threads(1)
                close_session()
                session = get_session()
                session.event_hooks = {"request": [lambda _: next(left, None) is None and die()]}
                other.push_to_hub("org/name")
            finally:
                os._exit(1)
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])

    moments = 0
    while push_and_die(moments):
        assert state(hub_here) == before
        moments += 1
    assert moments > 5
    other.push_to_hub("org/name")
    assert not list(scratch.iterdir())
    loaded = AutoencoderHieraTok.from_pretrained("org/name")
    torch.testing.assert_close(loaded.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [HieraTokModel, AutoencoderHieraTok, HieraTokDiTPipeline])
@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (403, "GatedRepo", r"[Aa]sk for access at http.*/org/name"),
        (401, "RepoNotFound", "hf auth login"),
        (404, "RevisionNotFound", "revision"),
        (503, "", "Connect to the internet"),
    ],
)
def test_a_repository_that_cannot_be_had_is_named_with_the_way_out(hub_here, kind, status, code, advice):
    hub_here.fail(".*", status, times=float("inf"), headers={"X-Error-Code": code})
    with pytest.raises(OSError, match=rf"'org/name'.*{advice}"):
        kind.from_pretrained("org/name")


@pytest.mark.parametrize("kind", [HieraTokModel, AutoencoderHieraTok])
def test_what_was_downloaded_loads_while_the_hub_is_down(hub_here, untried, kind):
    vae = AutoencoderHieraTok.from_core(random_core())
    vae.push_to_hub("org/name")
    oid = hub_here.commits("org/name")[0].oid
    for revision in ("main", oid):
        kind.from_pretrained("org/name", revision=revision)
    hub_here.fail(".*", 503, times=float("inf"))
    for revision in ("main", oid):
        loaded = kind.from_pretrained("org/name", revision=revision)
        assert torch.equal(loaded.core.encoder.head.weight, vae.core.encoder.head.weight)


@pytest.mark.parametrize("kind", [HieraTokModel, AutoencoderHieraTok])
def test_shards_that_were_downloaded_load_offline(hub_here, untried, kind, monkeypatch):
    vae = AutoencoderHieraTok.from_core(random_core())
    vae.push_to_hub("org/name", max_shard_size="40KB")
    kind.from_pretrained("org/name")
    asked = len(hub_here.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded = kind.from_pretrained("org/name")
    assert torch.equal(loaded.core.encoder.head.weight, vae.core.encoder.head.weight)
    assert len(hub_here.requests) == asked
