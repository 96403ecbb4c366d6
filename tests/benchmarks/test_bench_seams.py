"""The benchmark of seams and of noise on latents: it measures what it prints, and its parts add up."""

import numpy as np
import pytest
import torch
from helpers import random_core
from image_files import crop
from scripts import report_in
from tiny_pipelines import tiny_pipeline

pytest.importorskip("datasets", reason="images are read through it")

from hieratok_hf import AutoencoderHieraTok
from hieratok_hf.evaluation.metrics import border_steps, psnr


def test_every_row_is_measured_and_parts_add_up(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "SIZE", 32)
    monkeypatch.setattr(bench, "REAL_IMAGES", "kodak")
    (tmp_path / "kodak").mkdir()
    for i in range(3):
        crop(i, 32).save(tmp_path / "kodak" / f"{i}.png")
    originals = torch.stack([torch.from_numpy(np.array(crop(i, 32))).permute(2, 0, 1) / 127.5 - 1 for i in range(3)])
    AutoencoderHieraTok.from_core(random_core()).save_pretrained(tmp_path / "tokenizer")
    given = ["--data", str(tmp_path), "--deviations", "0.5", "2", "--images", "3", "--json"]
    assert bench.main([*given, "--models", str(tmp_path / "tokenizer"), "--pipelines"]) == 0
    assert bench.main([*given, "--models", "--pipelines", tiny_pipeline(tmp_path / "generator")]) == 0
    report = report_in(tmp_path / "results")
    ((tokenizer,), (generator,)) = report["tokenizers"], report["generators"]
    assert tokenizer["images"] == generator["images"] == 3
    core = random_core()
    with torch.no_grad():
        made = core.decode(core.encode(originals).mode()).clamp(-1, 1)
    assert tokenizer["psnr"] == pytest.approx(psnr(made, originals).mean().item(), abs=1e-2)
    assert len({tokenizer["psnr"], *tokenizer["psnr_with_noise"].values()}) == 3
    steps = border_steps(originals, 4).mean(0)
    assert tokenizer["border_ratio_of_originals"] == pytest.approx((steps[0] / steps[1]).item(), abs=1e-3)
    assert tokenizer["border_ratio"] > 0 and generator["border_ratio_of_real_images"] > 0
    assert bench.tables(report) in capsys.readouterr().out


def test_data_that_is_not_there_is_named(bench, tmp_path, capsys):
    assert bench.main(["--data", str(tmp_path)]) == 2
    assert "lacks kodak" in capsys.readouterr().err
