"""Tests of `examples/fine_tune.py`: the losses of `hieratok train`, and a model that both libraries load."""

import pytest
from scripts import ROOT, load_script, run_training

from hieratok_hf import AutoencoderHieraTok, HieraTokModel
from hieratok_hf.cli import train

pytestmark = pytest.mark.usefixtures("script_surroundings")


def test_it_gives_the_losses_of_the_command(saved, tmp_path):
    script = load_script("examples", "fine_tune")
    shared = ["--model", saved, "--data", ROOT / "src" / "hieratok_hf" / "example_images", "--steps", 4]
    shared += ["--batch_size", 4, "--lr", 1e-3, "--warmup_steps", 2, "--ema", 0.9, "--seed", 3]
    shared = [str(word) for word in shared]
    mine = script.main([*shared, "--crop_size", "32", "--output", str(tmp_path / "mine")])
    theirs = run_training(
        train,
        [
            *shared,
            "--crop_sizes",
            "32",
            "--log_every",
            "1",
            "--statistics_batches",
            "16",
            "--output",
            str(tmp_path / "theirs"),
        ],
    )
    for here, there in zip(mine, theirs, strict=True):
        assert {name: there[name] for name in here} == pytest.approx(here, rel=1e-5)
    weights = [AutoencoderHieraTok.from_pretrained(tmp_path / name).state_dict() for name in ("mine", "theirs")]
    assert all(((x - weights[1][name]).abs() < 1e-5).all() for name, x in weights[0].items())
    assert HieraTokModel.from_pretrained(tmp_path / "mine").config.patch_size == 4
    assert len((ROOT / "examples" / "fine_tune.py").read_text().splitlines()) <= 100
