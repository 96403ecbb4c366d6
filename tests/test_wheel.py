"""Test of the wheel alone: every command does its work away from the repository, without a network."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
SIDES = [(40, 64), (65, 48), (64, 64), (96, 33), (50, 50)]
# The compiler takes seconds for each block of an exported program.
ONE_BLOCK = {"encoder_num_layers": 1, "decoder_num_layers": 1}
COMMANDS = """
reconstruct images --output sheets --json sheets/figures.json
evaluate --data images --size 32 --no_fid --no_ssim --json evaluation.json
latents --data images --size 32
info hieratok-tiny
info hieratok-tiny-16x
encode images archive
info archive
preview archive preview.png
decode archive back
generate church --rows 1 --steps 2 --output generated.png
evaluate-generation --samples 2 --steps 2
train --model hieratok-tiny --data images --output tuned --steps 20 --batch_size 2 --crop_sizes 32
cache --data images --output latents --size 32
train-dit --latents latents --size dit-tiny --output dit --steps 2 --batch_size 2 --sample_steps 1
convert checkpoint tuned/{state} converted --size hieratok-tiny
train --config {config} --data images --output small --steps 1 --batch_size 2 --crop_sizes 32 --linear_steps 0
export small programs --format torch --parts decoder
push tuned me/mine --license mit --dry_run
push dit me/mine --license mit --dry_run
"""
PROGRAM = """
import json, sys
from accelerate.state import AcceleratorState
import hieratok_hf
from hieratok_hf.cli.main import main
from transformers import AutoImageProcessor, AutoModel
folder = hieratok_hf.pretrained("hieratok-tiny")
print(hieratok_hf.__file__, type(AutoModel.from_pretrained(folder)), AutoImageProcessor.from_pretrained(folder))
for command in json.loads(sys.argv[1]):
    AcceleratorState._reset_state(reset_partial_state=True)
    status = main(command)
    assert status == 0, (command, status)
"""


def test_every_command_works_from_the_wheel_alone(tmp_path):
    pytest.importorskip("hatchling")
    pytest.importorskip("datasets")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {"hieratok_hf/py.typed", "hieratok_hf/hub/card_template.md"} <= {*archive.namelist()}
        archive.extractall(tmp_path / "site")
    work, rng = tmp_path / "work", np.random.default_rng(0)
    for index in range(20):
        folder = work / "images" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (*SIDES[index % 5], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.{['png', 'jpg'][index % 3 == 0]}")
    commands = [
        line.split()
        for line in COMMANDS.format(state="state-000000020.pt", config=json.dumps(ONE_BLOCK, separators=(",", ":")))
        .strip()
        .splitlines()
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tmp_path / "site")}
    environment |= {"HF_DATASETS_CACHE": str(tmp_path / "datasets"), "ACCELERATE_USE_CPU": "true"}
    given = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    ended = subprocess.run(given, cwd=work, env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.startswith(str(tmp_path / "site"))
    there = [(path.relative_to(work / "images"), Image.open(path).size) for path in sorted(work.glob("images/*/*"))]
    back = [(path.relative_to(work / "back"), Image.open(path).size) for path in sorted(work.glob("back/*/*"))]
    assert there == back and len(back) == 20
    assert {path.name for path in work.iterdir()} == {
        *("images", "sheets", "evaluation.json", "archive", "preview.png", "back", "generated.png"),
        *("tuned", "latents", "dit", "converted", "small", "programs"),
    }
