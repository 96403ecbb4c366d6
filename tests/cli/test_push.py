"""The script that pushes: its plan, its card, its errors, and what arrives on a Hub on localhost."""

import json
from pathlib import Path

import pytest
from tiny_pipelines import make_pipeline

from hieratok_hf.cli.main import parse
from hieratok_hf.cli.push import card_of
from hieratok_hf.hub.card import license_of

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
MIT = ["--license", "mit"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def push(load_conversion):
    return load_conversion("push").main


def test_a_dry_run_prints_the_plan_and_sends_nothing(hub_here, push, saved, capsys):
    (saved / "log.jsonl").write_text("{}")
    assert push([str(saved), "org/name", "--dry_run", *MIT]) == 0
    printed = capsys.readouterr().out
    size = (saved / WEIGHTS).stat().st_size
    assert printed.startswith("6 files, ") and "to org/name in one commit" in printed
    assert f"{size:,}  {WEIGHTS}" in printed and "left out: log.jsonl" in printed and "nothing was sent" in printed
    assert "  license: mit\n" in printed and "  # name\n" in printed  # the card
    assert not hub_here.requests


def test_options_reach_the_hub_and_the_card(hub_here, push, saved, tmp_path, capsys):
    training = tmp_path / "training.md"
    training.write_text("Three steps.\n")
    options = ["--private", "--commit_message=First", "--license=mit", "--datasets=org/data", "--tags=mine"]
    told = ["--training", str(training), "--hardware", "one lamp", "--base_model", "org/base"]
    assert push([str(saved), "org/name", *options, *told]) == 0
    assert "done: http" in capsys.readouterr().out
    assert hub_here.repo("org/name").private and hub_here.commits("org/name")[0].title == "First"
    card = hub_here.files("org/name")["README.md"].decode()
    for text in ("license: mit", "- org/data", "base_model: org/base", "- mine", "Three steps.", "one lamp"):
        assert text in card, text


def test_figures_of_the_evaluation_are_in_the_card(hub_here, push):
    report = RESULTS / "trade_off.json"
    assert push(["hieratok-tiny", "org/hieratok-tiny", "--results", str(report), *MIT]) == 0
    card = hub_here.files("org/hieratok-tiny")["README.md"].decode()
    assert "model-index" in card and "30.8471" in card and "PSNR" in card


@pytest.mark.parametrize(
    ("name", "text"), [("README.md", "---\nlicense: other\n---\n# Mine\n"), ("training.json", '{"license": "other"}')]
)
def test_a_licence_that_the_folder_names_need_not_be_given(name, text, push, saved):
    (saved / name).write_text(text)
    assert license_of(saved) == "other"
    assert card_of(parse("push", [str(saved), "org/name"]), saved)["license"] == "other"
    assert card_of(parse("push", [str(saved), "org/name", *MIT]), saved)["license"] == "mit"


def test_a_pipeline_goes_to_a_branch_or_a_pull_request(hub_here, push, tmp_path, capsys):
    make_pipeline().save_pretrained(tmp_path / "pipe")
    assert push([str(tmp_path / "pipe"), "org/pipe", "--revision", "next", *MIT]) == 0
    assert set(hub_here.files("org/pipe")) == {".gitattributes"}
    assert json.loads(hub_here.files("org/pipe", "next")["model_index.json"])["vae"][0] == "autoencoder_hieratok"
    assert push([str(tmp_path / "pipe"), "org/pipe", "--create_pr", "--no_code", "--no_card"]) == 0
    assert "discussions/1" in capsys.readouterr().out
    names = set(hub_here.files("org/pipe", "refs/pr/1"))
    assert "vae/config.json" in names and not [name for name in names if name.endswith((".py", ".md"))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{none}", "org/name"], "is not a folder"),
        (["{folder}", "org/na me", *MIT], "Repo id"),
        (["{folder}", "org/name", "--results", "{text}"], "--results"),
        (["{folder}", "org/name", "--results", "{other}", *MIT], "another"),
        (["{folder}", "org/name", "--training", "{none}"], "--training"),
        (["{folder}", "org/name", "--token", "hf_wrong", *MIT], "hf auth login"),
        (["{folder}", "org/name"], "--license"),
    ],
)
def test_problems_are_one_line_and_leave_the_hub_alone(options, message, hub_here, push, saved, tmp_path, capsys):
    (tmp_path / "text").write_text("no json")
    paths = {"none": tmp_path / "none", "text": tmp_path / "text", "folder": saved}
    paths["other"] = RESULTS / "trade_off.json"
    assert push([option.format(**paths) for option in options]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1
    if message != "hf auth login":
        assert not [r for r in hub_here.requests if "/commit/" in r]
