"""Tests of `examples/cache_latents.py`: kills at any moment, several processes, what it prints, bad input."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import random_core
from huggingface_hub import constants
from latent_data import BROKEN, bytes_in, make_images, shards_in, tiny_kl, tiny_without_posterior

pytest.importorskip("datasets", reason="images are read through it")

import datasets

from hieratok_hf import AutoencoderHieraTok
from hieratok_hf.data.latent_cache import LatentCache

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "cache_latents.py"
SPEC = importlib.util.spec_from_file_location("cache_latents", SCRIPT)
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A folder with models and images, a broken one among them."""
    folder = tmp_path_factory.mktemp("caching")
    AutoencoderHieraTok.from_core(random_core()).save_pretrained(folder / "hieratok")
    tiny_kl().save_pretrained(folder / "kl")
    tiny_without_posterior().save_pretrained(folder / "tiny")
    make_images(folder / "images")
    return folder


@pytest.fixture
def run(space, monkeypatch, capsys):
    """Call `main`; gives the exit status, what it printed, and its last line of errors."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the variable is read once, at import
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", space / "cache")

    def call(output, *argv, model=space / "hieratok", data=space / "images"):
        given = ["--model", model, "--data", data, "--output", output, "--device", "cpu", *argv]
        status = script.main(list(map(str, given)))
        printed, errors = capsys.readouterr()
        return status, printed, (errors.replace("\r", "\n").strip().splitlines() or [""])[-1]

    return call


def test_killed_at_any_moment_every_row_is_there_once(space, tmp_path):
    images = make_images(tmp_path / "images", 120)
    more = ["--model", space / "hieratok", "--data", images, "--shard_size", 2, "--batch_size", 1]
    more += ["--kind", "sample", "--device", "cpu"]
    command = [sys.executable, ROOT / "tests" / "kill_and_cache.py", SCRIPT, tmp_path, *more]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, **environment}, timeout=200
    )
    logs = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert result.returncode == 0, result.stderr + logs
    told = json.loads(result.stdout.splitlines()[-1])
    assert all(told["ended"].values()) and told["cut"] and told["killed"] >= 3, (told, logs)
    assert 0 < told["counts"][0] < told["counts"][-1] <= 60, told
    whole = bytes_in(tmp_path / "whole")
    assert len(whole) == 61
    for name in told["ended"]:
        assert bytes_in(tmp_path / name) == whole, name
    assert LatentCache(tmp_path / "parts").rows.tolist() == [row for row in range(120) if row != BROKEN]


def test_what_it_prints_and_writes(run, tmp_path):
    options = ["--shard_size", 5, "--dtype", "bfloat16", "--no_flips", "--limit", 12, "--size", 16]
    status, printed, _ = run(tmp_path / "new" / "latents", *options)
    assert status == 0
    left_out, summary = printed.strip().splitlines()
    assert re.match(r"left out: '.*005\.png': cannot be decoded", left_out)
    assert re.fullmatch(r"11 images in 3 shards, 1 left out; 11 encoded now at \d+\.\d images/s", summary)
    shards = shards_in(tmp_path / "new" / "latents").values()
    assert {(x["moments"].dtype, tuple(x["moments"].shape[1:]), len(x)) for x in shards} == {
        (torch.bfloat16, (8, 4, 4), 3)
    }
    assert run(tmp_path / "new" / "latents", *options)[1].endswith("0 encoded now at 0.0 images/s\n")


def test_mixed_precision_is_recorded_and_close(run, space, tmp_path):
    for name, options in (("plain", []), ("mixed", ["--mixed_precision", "bf16"])):
        assert run(tmp_path / name, "--kind", "mode", *options, model=space / "kl")[0] == 0
    plain, mixed = (LatentCache(tmp_path / name) for name in ("plain", "mixed"))
    assert (plain.settings["precision"], mixed.settings["precision"]) == ("float32", "bfloat16")
    a, b = (cache.batch(range(13))[0] for cache in (plain, mixed))
    assert 0 < (a - b).norm() < 0.03 * a.norm()


BAD = {
    "a missing model": (["--model", "missing/model"], "--model 'missing/model' cannot be loaded: .*no folder or repo"),
    "no data": (["--data", "missing/data/folder"], "No images found in 'missing/data/folder'"),
    "a size that does not fit": (["--size", "30"], "cannot take images of 30 x 30 pixels: .*patch size 4"),
    "no posterior": (["--model", "{space}/tiny", "--size", "32"], "AutoencoderTiny has no posterior: `kind` must be"),
    "a file for a folder": (["--output", "{space}/kl/config.json"], "--output .*config.json' cannot be written: "),
    "shards without settings": (["--output", "{space}/strange"], r"holds shards, but no cache\.json"),
    "no device": (["--device", "cuda:99"], "--model .* cannot be loaded: "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_no_file(case, run, space, tmp_path):
    (space / "strange").mkdir(exist_ok=True)
    (space / "strange" / "shard-00000.safetensors").write_bytes(b"")
    argv, message = BAD[case]
    status, printed, error = run(tmp_path / "new", *[text.format(space=space) for text in argv])
    assert status == 2 and not printed and re.match(f"error: .*{message}", error), error
    assert not list(tmp_path.iterdir())


def test_another_cache_in_the_folder_is_refused(run, tmp_path):
    assert run(tmp_path, "--limit", 3)[0] == 0
    before = bytes_in(tmp_path)
    status, _, error = run(tmp_path, "--limit", 4)
    assert status == 2 and re.match("error: .*holds another cache: limit 3, not 4; rows 3, not 4", error), error
    assert bytes_in(tmp_path) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--size", "0"], "--size: invalid positive value: '0'"),
        (["--seed", "-1"], "--seed: invalid number value: '-1'"),
        (["--kind", "mean"], "--kind: invalid choice: 'mean'"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--device", "abacus"], "--device: must be a device of torch, such as cuda or cpu, got 'abacus'"),
    ],
)
def test_bad_arguments_are_refused_by_the_command_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--data", "x", "--output", "y", *argv])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
