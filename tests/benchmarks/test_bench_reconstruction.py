"""The benchmark of reconstruction: its baselines are what they say, and every row is measured."""

import io

import numpy as np
import pytest
import torch
from helpers import random_core, tiny_vision_model
from image_files import crop, write_shard
from PIL import Image
from scripts import report_in

pytest.importorskip("datasets", reason="images are read through it")
pytest.importorskip("torchmetrics", reason="SSIM and Fréchet distances are its own")

from hieratok_hf import AutoencoderHieraTok
from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.evaluation.metrics import psnr, ssim
from hieratok_hf.models.autoencoder_adapter import load_codec


@pytest.fixture
def data(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "SETS", {"one": ("one", 32), "two": ("shards/val-*.tar", 48)})
    monkeypatch.setattr(bench, "FITTED_TO", "shards/train-*.tar")
    folder = tmp_path / "data"
    (folder / "one").mkdir(parents=True)
    (folder / "shards").mkdir()
    for i in range(3):
        crop(i, 32).save(folder / "one" / f"{i}.png")
    for name, count in (("train-0000", 12), ("val-0000", 5)):
        write_shard(folder / "shards" / f"{name}.tar", [crop(i, 48) for i in range(count)])
    tiny_vision_model().save_pretrained(folder / "mobilenet_v2_1.0_224")
    return folder


def test_components_are_the_best_linear_code_of_the_patches_that_they_are_fitted_to(bench, data):
    images = load_images(str(data / "shards" / "train-*.tar"))
    values = torch.stack([bench.as_values(crop(i, 48)) for i in range(12)])
    errors = [(bench.PrincipalComponents(images, 4, n)(values) - values).square().mean() for n in (1, 6, 24, 48)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-9
    patches = torch.nn.functional.unfold(values, 4, stride=4).transpose(1, 2).reshape(-1, 48).double()
    left_over = torch.linalg.svdvals(patches - patches.mean(0))[6:].square().sum() / patches.numel()
    assert errors[1].item() == pytest.approx(left_over.item(), rel=1e-4)


def test_jpeg_takes_the_bytes_that_there_are_and_no_more(bench):
    values = bench.as_values(crop(0, 48))[None]
    found = []
    for bytes_a_pixel in (0.0, 0.1, 0.25, 1.0):
        jpeg = bench.Jpeg(bytes_a_pixel)
        file = jpeg.best(crop(0, 48))
        decoded = (Image.open(io.BytesIO(jpeg._file(crop(0, 48), q))) for q in range(1, 96))
        quality = next(q for q, image in enumerate(decoded, start=1) if np.array_equal(image, file))
        room = bytes_a_pixel * 48 * 48
        assert quality == 1 or jpeg._scan(jpeg._file(crop(0, 48), quality)) <= room
        assert quality == 95 or jpeg._scan(jpeg._file(crop(0, 48), quality + 1)) > room
        found.append(psnr(jpeg(values), values).item())
    assert found == sorted(found) and found[0] < 25 < 35 < found[-1]


def test_every_row_is_measured_and_parts_add_up(bench, data, tmp_path, capsys):
    AutoencoderHieraTok.from_core(random_core()).save_pretrained(tokenizer := tmp_path / "tokenizer")
    given = ["--data", str(data), "--models", str(tokenizer), "--json", "--sets"]
    assert bench.main([*given, "one"]) == 0 and bench.main([*given, "two", "--max_images", "4"]) == 0
    report = report_in(tmp_path / "results")
    rows = {(row["data"], row["code"]): row for row in report["rows"]}
    codes = ("tokenizer", "its linear path alone", "principal components", "JPEG")
    assert list(rows) == [(name, code) for name in ("one", "two") for code in codes]
    assert [row["images"] for row in rows.values()] == [3] * 4 + [4] * 4
    assert [row["size"] for row in rows.values()] == [32] * 4 + [48] * 4
    assert bench.table(report).splitlines()[-1] in capsys.readouterr().out

    values = torch.stack([bench.as_values(crop(i, 32)) for i in range(3)])
    codec = load_codec(tokenizer)
    expected = {"tokenizer": codec.decode(codec.encode(values)).clamp(-1, 1)}
    expected |= {code: call(values) for code, call in bench.baselines(codec, data).items()}
    for code, made in expected.items():
        row = rows["one", code]
        assert row["psnr"] == pytest.approx(psnr(made, values).mean().item(), abs=1e-3)
        assert row["ssim"] == pytest.approx(ssim(made, values).mean().item(), abs=1e-3)
        assert row[report["distance"]] >= 0
    assert len(rows["one", "tokenizer"]["scales_psnr"]) == 4 and "latent_mean" not in rows["one", "tokenizer"]


def test_data_that_is_not_there_is_named(bench, data, capsys):
    (data / "one").rename(data / "gone")
    assert bench.main(["--data", str(data)]) == 2
    assert capsys.readouterr().err == f"error: --data {str(data)!r} lacks one\n"
