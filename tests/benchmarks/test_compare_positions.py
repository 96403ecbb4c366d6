"""The comparison of positions: what each variant changes, the images of each size, and the table."""

import copy

import pytest
import torch
from helpers import images, random_core
from image_files import noise
from PIL import Image
from scripts import report_in, usage_error

from hieratok_hf import AutoencoderHieraTok


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        image = Image.fromarray(noise(48, 64, seed=i)).resize((768, 512) if i % 2 else (512, 768))
        image.save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("variant", ["fractions", "interpolated", "scaled_frequencies", "sharper_attention", "tiles"])
def test_a_variant_changes_images_beyond_the_trained_size_alone(bench, variant):
    original = AutoencoderHieraTok.from_core(random_core()).eval()
    for side, same in ((32, True), (64, False)):
        vae = copy.deepcopy(original)
        with torch.inference_mode():
            bench.VARIANTS[variant](vae, side // 4, 8)
            ours, plain = vae(images(1, 3, side, side)).sample, original(images(1, 3, side, side)).sample
        assert torch.allclose(ours, plain, atol=1e-5) == same


def test_sizes_are_centres_whole_images_and_four_beside_each_other(bench, folder):
    paths = sorted(folder.glob("*.png"))
    assert [tuple(x.shape) for x in bench.at_size(paths, "128")] == [(1, 3, 128, 128)] * 5
    assert {tuple(x.shape[2:]) for x in bench.at_size(paths, "768x512")} == {(512, 768), (768, 512)}
    (large,) = bench.at_size(paths, "1024")
    (crop, *_) = bench.at_size(paths, "512")
    assert large.shape == (1, 3, 1024, 1024) and torch.equal(large[..., :512, :512], crop)


def test_it_reports_what_it_measures(bench, folder, tmp_path, capsys):
    arguments = ["--kodak", str(folder), "--sizes", "128", "256", "--variants", "cells", "tiles"]
    arguments += ["--trained", "128", "--json"]
    assert bench.main(arguments) == 0
    report = report_in(tmp_path / "results")
    assert report["images"] == 5 and report["psnr_db"]["cells"]["128"] == report["psnr_db"]["tiles"]["128"]
    assert report["psnr_db"]["cells"]["256"] != report["psnr_db"]["tiles"]["256"]
    assert bench.table(report) in capsys.readouterr().out


def test_too_few_images_are_refused(bench, tmp_path, capsys):
    assert "four images or more, found 0" in usage_error(capsys, bench.main, "--kodak", tmp_path)
