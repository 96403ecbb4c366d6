"""The benchmark of integers: it measures what it prints, beside files of no more bytes, and what changes integers."""

import json

import numpy as np
import pytest
import torch
from helpers import images, random_core, tiny_vision_model
from image_files import crop

pytest.importorskip("datasets", reason="images are read through it")
pytest.importorskip("matplotlib", reason="the benchmark draws")

from hieratok_hf import AutoencoderHieraTok
from hieratok_hf.evaluation.metrics import psnr


def test_every_row_is_measured(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "SIZE", 32)
    (tmp_path / "kodak").mkdir()
    for i in range(2):
        crop(i, 32).save(tmp_path / "kodak" / f"{i}.png")
    originals = torch.stack([torch.from_numpy(np.array(crop(i, 32))).permute(2, 0, 1) / 127.5 - 1 for i in range(2)])
    tiny_vision_model().save_pretrained(tmp_path / bench.VISION_MODEL)
    model = AutoencoderHieraTok.from_core(random_core())
    model.fit_quantizer([images(2, 3, 32, 32)])
    model.save_pretrained(tmp_path / "tokenizer")
    plain = bench.tokens_of(str(tmp_path / "tokenizer"), [x[None] for x in originals], 6)
    monkeypatch.setattr(bench, "tokens_elsewhere", lambda *given: plain + np.eye(8, dtype=np.uint8))
    given = ["--data", str(tmp_path), "--models", str(tmp_path / "tokenizer"), "--bits", "2", "6", "--changes", "6"]
    assert bench.main([*given, "--json"]) == 0
    (path,) = (tmp_path / "results").glob("*.json")
    report = json.loads(path.read_text())
    rows = {(row["bits"], row["code"]): row for row in report["rows"]}
    codes = ("integers", "JPEG", "WebP")
    assert set(rows) == {(None, "latents"), *((bits, code) for bits in (2, 6) for code in codes)}
    with torch.no_grad():
        for bits in (2, 6):
            made = model.detokenize(model.tokenize(originals, bits), bits).sample.clamp(-1, 1)
            expected = psnr(made, originals).mean().item()
            assert rows[bits, "integers"]["psnr"] == pytest.approx(expected, abs=1e-3)
    assert rows[2, "integers"]["bytes"] < rows[6, "integers"]["bytes"]
    changes = {row["change"]: row for row in report["changes"]}
    assert changes["the same again"]["differing"] == changes["the same again"]["largest"] == 0
    assert changes["AVX2 in the place of AVX-512"]["differing"] == 2 * 4 * 8
    assert bench.tables(report) in capsys.readouterr().out
    assert (tmp_path / "results" / "tokens.png").stat().st_size > 1000


def test_other_processes_write_the_integers(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SIZE", 32)
    monkeypatch.setattr(bench, "VISION_MODEL", "kodak")
    (tmp_path / "kodak").mkdir()
    crop(0, 32).save(tmp_path / "kodak" / "0.png")
    model = AutoencoderHieraTok.from_core(random_core())
    model.fit_quantizer([images(2, 3, 32, 32)])
    model.save_pretrained(tmp_path / "tokenizer")
    given = ["--data", str(tmp_path), "--models", str(tmp_path / "tokenizer"), "--bits", "5"]
    assert bench.main([*given, "--write", str(tmp_path / "tokens.npy")]) == 0
    expected = model.tokenize(next(iter(bench.photographs(tmp_path, 1, None))), 5)
    assert np.array_equal(np.load(tmp_path / "tokens.npy"), expected.numpy())


@pytest.mark.parametrize("kind", ["JPEG", "WebP"])
def test_files_are_the_best_within_some_bytes(bench, kind):
    image = crop(0, 64)
    small, large = (len(bench.best_file(image, kind, most)) for most in (1500, 3000))
    assert small <= 1500 < large <= 3000


def test_data_that_is_not_there_is_named(bench, tmp_path, capsys):
    assert bench.main(["--data", str(tmp_path)]) == 2
    assert "lacks kodak" in capsys.readouterr().err
