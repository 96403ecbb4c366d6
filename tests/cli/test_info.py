"""Tests of `hieratok info`: lines for a reader, JSON for a program, one line for an error."""

import json

import pytest
from helpers import random_core

from hieratok_hf import AutoencoderHieraTok
from hieratok_hf.cli.info import main
from hieratok_hf.hub.describe import describe

pytestmark = pytest.mark.usefixtures("script_surroundings")


@pytest.fixture
def told(capsys):
    def run(*argv, status=0):
        assert main([*map(str, argv)]) == status
        return capsys.readouterr().out if status == 0 else capsys.readouterr().err

    return run


def test_a_tokenizer_in_lines_and_in_json(told, tmp_path):
    printed = told("hieratok-tiny", "--size", 64, "--json", tmp_path / "facts.json")
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts == describe("hieratok-tiny", 64)
    lines = [line.split() for line in printed.splitlines()]
    assert ["encode", "64x64", "64", f"{facts['image']['encode_flops'] / 1e9:.2f}"] in lines
    assert ["decode", "1", "of", "4", "scales", "8x8", "1", "0.00"] in lines and ["latent", "16x8x8"] in [
        x[:2] for x in lines
    ]
    assert ["model", "card", "lacks", "README.md"] in lines
    assert ["levels", "16", "channels,", "for", "1", "to", "8", "bits"] in lines
    assert f"{facts['parameters']['total'] / 1e6:.1f} M: encoder" in printed and "float32, 5.9 MB" in printed
    assert "there already" in told("hieratok-tiny", "--json", tmp_path / "facts.json", status=2)
    told("hieratok-tiny", "--json", tmp_path / "facts.json", "--overwrite")


def test_a_pipeline_shows_its_tokenizer_and_a_size_how_to_make_weights(told):
    printed = told("hieratok-dit-tiny")
    assert "DiTTransformer2DModel" in printed and "\nvae:\n" in printed and "10 classes: tench, " in printed
    assert "`hieratok convert detok hieratok-b`" in told("hieratok-l")


def test_weights_of_a_model_that_decodes_all_scales_at_once_and_a_pickle(told, tmp_path):
    vae = AutoencoderHieraTok.from_core(random_core(scale_causal=False))
    vae.save_pretrained(tmp_path, safe_serialization=False)
    printed = told(tmp_path, "--size", 16)
    assert "diffusion_pytorch_model.bin  a pickle, which is not opened" in printed
    assert [line.split()[-1] for line in printed.splitlines() if line.startswith("decode")][:-1] == ["-"] * 3


@pytest.mark.parametrize("name", ["cache.json", "export.json"])
def test_manifests_and_trainings_are_a_line_an_entry(told, tmp_path, name):
    programs = [{"files": ["encoder.onnx"], "largest_difference": 1e-7}, {"files": ["decoder.pt2"]}]
    (tmp_path / name).write_text(json.dumps({"dtype": "float16", "programs": programs, "shard_size": 2, "rows": None}))
    (tmp_path / "losses.jsonl").write_text('{"step": 7, "loss": 0.123456789}\n')
    lines = [" ".join(line.split()) for line in told(tmp_path).splitlines()]
    assert {
        "dtype float16",
        "programs files encoder.onnx, largest_difference 1e-07",
        "programs files decoder.pt2",
    } <= {*lines}
    assert "shards 0 of ?, 0.0 MB: unfinished" in lines and "last losses step 7, loss 0.12346" in lines


@pytest.mark.parametrize("given", [["nowhere"], ["hieratok-tiny", "--size", "100"], ["."]])
def test_what_cannot_be_described_is_one_line(told, tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    error = told(*given, "--json", "facts.json", status=2)
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
