"""Tests of `recipes/`: the commands of the paper's pair at tiny sizes, in this process, and the hours that it says."""

import json
import os
import subprocess
import sys

import pytest
from local_data import write_shard
from scripts import ROOT, forget_processes, save_vision_model

from hieratok_hf.cli.main import main

SCRIPT = ROOT / "recipes" / "paper_pair.sh"
SIDES = ("encoder", "decoder")
TINY = {f"{side}_{name}": value for side in SIDES for name, value in (("num_layers", 1), ("hidden_size", 16))}
TINY |= {f"{side}_num_heads": 2 for side in SIDES} | {"sample_size": 32}
DIT = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}


def run(*given, **environment):
    surroundings = os.environ | environment
    return subprocess.run([SCRIPT, *given], env=surroundings, capture_output=True, text=True, check=True).stdout


def compact(config):
    return json.dumps(config, separators=(",", ":"))


def test_the_hours_are_steps_times_batch_over_the_rate():
    told = run("--hours", STEPS="3600", BATCH="100", RATE="100", GPUS="1", DIT_STEPS="3600", DIT_BATCH="100")
    assert told == "2 tokenizers of 1.0 hours and 2 DiTs of 0.5: 2.9 hours\n"


@pytest.mark.usefixtures("script_surroundings")
def test_the_papers_pair_at_tiny_sizes(tmp_path):
    data, output, log = tmp_path / "data", tmp_path / "out", tmp_path / "commands"
    data.mkdir()
    write_shard(data / "train-0.tar", range(6))
    write_shard(data / "val-0.tar", range(6, 12))
    # Each command is written down, and run below: a process for each would take half a minute.
    writer = tmp_path / "python"
    writer.write_text(
        f'#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]), file=open({str(log)!r}, "a"))\n'
    )
    writer.chmod(0o755)
    run(
        BIN=str(tmp_path), DATA=str(data), OUTPUT=str(output), COMPILE="", LAUNCH=f"{writer} -m hieratok_hf",
        STEPS="2", BATCH="2", DIT_STEPS="2", DIT_BATCH="2", SAMPLES="6", WORKERS="0", LOSSES="--pixel_loss mse",
        SIZE=f"--config {compact(TINY)} --crop_sizes 32 --linear_steps 0 --statistics_batches 1",
        DIT_SIZE=f"--config {compact(DIT)} --class_names a b c --sample_steps 1",
        FID=f"--fid_model {save_vision_model(tmp_path / 'vision')}",
    )  # fmt: skip
    commands = [json.loads(line) for line in log.read_text().splitlines()]
    assert [command[2] for command in commands] == [
        "train",
        "evaluate",
        "cache",
        "train-dit",
        "evaluate-generation",
    ] * 2
    # Started once more, it makes the figures anew.
    for module, name, *words in [*commands, *(commands[number] for number in (1, 4))]:
        assert (module, name) == ("-m", "hieratok_hf")
        forget_processes()
        assert main(words) == 0, words
    for folder, scales in (("scales-4", [8, 4, 2, 1]), ("scales-1", [1])):
        config = json.loads((output / folder / "tokenizer" / "config.json").read_text())
        assert config["scale_factors"] == scales
        for report in ("rfid", "gfid"):
            assert "FD-MobileNetV2" in (output / folder / f"{report}.json").read_text()
