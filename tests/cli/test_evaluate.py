"""Tests of `hieratok evaluate`: table and JSON, other autoencoders, a probe, two processes, bad input."""

import importlib.util
import json
import re

import pytest
from helpers import random_core, tiny_vision_model
from image_files import crop
from latent_data import tiny_kl, tiny_without_posterior
from processes import two_processes
from scripts import error_of, load_script, tables_in, usage_error, with_defaults

pytest.importorskip("datasets", reason="images are read through it")
pytest.importorskip("torchmetrics", reason="SSIM and Fréchet distances are its own")

from hieratok_hf import AutoencoderHieraTok
from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.evaluation.reconstruction import EvaluationBatches, ReconstructionMetrics, evaluate
from hieratok_hf.models.autoencoder_adapter import load_codec

script = load_script("cli", "evaluate")
pytestmark = pytest.mark.usefixtures("script_surroundings")


def crops(folder, count):
    """Small images of two classes, one from each photograph, upright and lying in turn."""
    for i in range(count):
        size = (32, 40) if i % 2 else (40, 32)
        path = folder / ("hat", "jacket")[2 * i // count] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        crop(i, 40, 2 * i // count).crop((0, 0, *size)).save(path)
    return folder


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A folder with models, images, and a broken one among them."""
    folder = tmp_path_factory.mktemp("evaluation")
    AutoencoderHieraTok.from_core(random_core()).save_pretrained(folder / "hieratok")
    tiny_kl().save_pretrained(folder / "kl")
    tiny_without_posterior().save_pretrained(folder / "tiny")
    tiny_vision_model().save_pretrained(folder / "vision")
    broken = crops(folder / "images", 8) / "hat" / "01.png"
    broken.write_bytes(broken.read_bytes()[:300])
    crops(folder / "train", 24)
    (folder / "empty").mkdir()
    for name in ("broken/a.png", "other/a/a.png", "other/b/b.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no image")
    return folder


def arguments(space, *given):
    defaults = {"--model": space / "hieratok", "--data": space / "images", "--device": "cpu"}
    return with_defaults(list(given), defaults)


def test_models_side_by_side_and_the_json_equals_the_table(space, tmp_path, capsys):
    fid = ["--fid_model", space / "vision", "--fid_size", 16, "--perceptual_model", space / "vision"]
    path = tmp_path / "new" / "figures.json"
    more = ["--compare", space / "kl", space / "tiny", "--probe_data", space / "train", "--json", path]
    assert script.main(arguments(space, *fid, *more)) == 0
    report, output = json.loads(path.read_text()), capsys.readouterr().out
    models = {figures["model"]: figures for figures in report["models"]}
    assert list(models) == [str(space / name) for name in ("hieratok", "kl", "tiny")]
    (table,) = tables_in(output)
    rows = {row["model"]: row for row in table}
    names = {"PSNR, dB": ("psnr", 2), "SSIM": ("ssim", 4), "perceptual": ("perceptual", 4)}
    names["FD-MobileNetV2"] = ("FD-MobileNetV2", 4)
    for model, figures in models.items():
        row = rows[model]
        for column, (name, digits) in names.items():
            assert row[column] == f"{figures[name]:.{digits}f}"
        assert row["latent"] == "x".join(map(str, figures["latent_shape"]))
        assert row["largest |mean|"] == f"{max(abs(x) for x in figures['latent_mean']):.3f}"
        assert row["std"] == f"{min(figures['latent_std']):.3f} ... {max(figures['latent_std']):.3f}"
        assert row["decode, images/s"] == f"{figures['images_per_second']['decode']:.1f}"
        assert figures["images"] == 7
        coarse = " ".join(f"{x:.2f}" for x in figures.get("scales_psnr", [])[:-1])
        assert row["coarser scales, dB"] == (coarse or "-")
        accuracy = figures.get("probe_accuracy")
        assert row["probe, %"] == ("-" if accuracy is None else f"{100 * accuracy:.2f}")
    assert "scales_psnr" in models[str(space / "hieratok")] and "scales_psnr" not in models[str(space / "kl")]

    batches = EvaluationBatches(load_images(str(space / "images")), 32, 4)
    expected = evaluate(load_codec(space / "tiny"), batches, ReconstructionMetrics())
    assert models[str(space / "tiny")]["psnr"] == pytest.approx(expected["psnr"], abs=1e-3)
    assert report["settings"]["size"] == 32 and report["settings"]["fid_size"] == 16
    (name,) = report["skipped"]
    assert name.endswith("01.png") and f"skipped: {report['skipped'][name]}" in output
    assert "note: images that could not be decoded and were skipped: 1" in output
    assert "note: FD-MobileNetV2 is taken of images resized to 16 x 16 pixels" in output


def test_two_processes_give_the_figures_of_one(space, tmp_path):
    options = ["--fid_model", space / "vision", "--batch_size", 3, "--probe_data", space / "train"]
    assert script.main(arguments(space, *options, "--json", tmp_path / "one.json")) == 0
    given = arguments(space, *options, "--json", tmp_path / "two.json")
    output, silent = two_processes(script, given, tmp_path / "cache")
    assert "note: FD-MobileNetV2 is taken" in output and not silent
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["machine"]["processes"], two["machine"]["processes"]) == (1, 2)
    assert one["images"] == two["images"] == 7 and one["skipped"] == two["skipped"]
    (first,), (second,) = one["models"], two["models"]
    assert list(first) == list(second)
    for name, value in first.items():
        if name != "images_per_second":
            exact = isinstance(value, str | int) or name == "latent_shape"
            assert second[name] == (value if exact else pytest.approx(value, rel=1e-4, abs=1e-5)), name


def test_what_is_not_asked_for_is_left_out(space, tmp_path, capsys):
    more = ["--no_ssim", "--no_fid", "--max_images", 3, "--json", tmp_path / "a.json"]
    assert script.main(arguments(space, *more)) == 0
    ((row,),) = tables_in(capsys.readouterr().out)
    assert not {"SSIM", "FD-MobileNetV2", "rFID", "probe, %"} & set(row)
    assert json.loads((tmp_path / "a.json").read_text())["images"] == 2  # the second is broken


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity would be used")
def test_rfid_that_cannot_be_measured_becomes_a_note(space, capsys):
    assert script.main(arguments(space, "--no_ssim")) == 0
    output = capsys.readouterr().out
    assert "rFID" not in tables_in(output)[0][0] and "note: rFID was left out: it needs torch-fidelity" in output


BAD = {
    "a missing second model": (["--compare", "missing/model"], "--compare 'missing/model' cannot be loaded"),
    "an empty folder": (["--data", "{space}/empty"], "No images found in "),
    "only broken images": (["--data", "{space}/broken"], "cannot be evaluated .*no images to measure"),
    "no labels": (["--probe_data", "{space}/train/hat"], "a probe needs labels, and --probe_data .* has none"),
    "other classes": (["--probe_data", "{space}/other"], "must have the same classes, got .*hat.* and .*b.*"),
    "a size that does not fit": (["--size", "30"], "--size 30 does not suit .*multiples of the patch size 4"),
    "no vision model": (["--fid_model", "{space}/kl"], "--fid_model .* cannot be loaded: "),
    "a file for a folder": (["--json", "{space}/kl/config.json/x.json"], "--json .* cannot be written: "),
    "one image for a distance": (["--fid_model", "{space}/vision", "--max_images", "1"], "needs two images or more"),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_no_file(given, message, space, capsys, tmp_path):
    given = [text.format(space=space) for text in given]
    given += ["--no_ssim", *([] if "--fid_model" in given else ["--no_fid"])]
    given = with_defaults(given, {"--json": tmp_path / "figures.json"})
    assert script.main(arguments(space, *given)) == 2
    assert re.match(f"error: .*{message}", error_of(capsys))
    assert not list(tmp_path.iterdir())


def test_bad_arguments_are_refused_by_the_command_line(capsys):
    for argv, message in (
        (["--fid_size", "64"], "--fid_size needs --fid_model"),
        (["--no_fid", "--fid_model", "x"], "--no_fid and --fid_model contradict"),
    ):
        assert message in usage_error(capsys, script.main, "--data", "x", *argv)
