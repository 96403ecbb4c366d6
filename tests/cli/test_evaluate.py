"""Tests of `hieratok evaluate`: table and JSON, other autoencoders, a probe, two processes, bad input."""

import importlib.util
import json
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from helpers import tiny_vision_model
from image_files import crop
from latent_data import save_autoencoders, tiny_dc, tiny_kl
from processes import two_processes
from scripts import error_of, load_script, tables_in, usage_error, with_defaults
from stand_in_faces import StandInNetworks
from text_reader import template_reader
from transformers import ViTConfig, ViTForImageClassification

pytest.importorskip("datasets", reason="images are read through it")
pytest.importorskip("torchmetrics", reason="SSIM and Fréchet distances are its own")

from hieratok_hf import AutoencoderHieraTok
from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.evaluation.faces import FaceDistances
from hieratok_hf.evaluation.reconstruction import (
    EvaluationBatches,
    ReconstructionMetrics,
    evaluate,
    evaluate_perturbed,
)
from hieratok_hf.evaluation.text import TextReading
from hieratok_hf.models.autoencoder_adapter import load_codec
from hieratok_hf.utils.choices import QUANTIZER_FILE
from hieratok_hf.utils.images import to_uint8

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


def save_classifier(folder):
    """A real one whose weights are so large that its answers vary."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**sizes, image_size=16, patch_size=4, initializer_range=1.0, num_labels=5)
    ViTForImageClassification(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A folder with models, images, and a broken one among them."""
    folder = tmp_path_factory.mktemp("evaluation")
    save_autoencoders(folder)
    tiny_vision_model().save_pretrained(folder / "vision")
    broken = crops(folder / "images", 8) / "hat" / "01.png"
    broken.write_bytes(broken.read_bytes()[:300])
    crops(folder / "train", 24)
    save_classifier(folder / "classifier")
    (folder / "empty").mkdir()
    np.savez(folder / "bad.npz", arr_0=np.zeros((2, 8, 8)))
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
    options = ["--fid_model", space / "vision", "--batch_size", 3, "--probe_data", space / "train", "--suite"]
    options += ["--classifier", space / "classifier", "--perturb", 0.5]
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


def test_the_suite_is_measured_beside_the_distance_and_again_by_the_protocol(space, tmp_path, capsys):
    files = {name: tmp_path / f"{name}.npz" for name in ("save_npz", "save_statistics")}
    more = ["--suite", "--fid_model", space / "vision", "--fid_size", 32, "--classifier", space / "classifier"]
    more += ["--max_images", 7, *(x for name, path in files.items() for x in (f"--{name}", path))]
    assert script.main(arguments(space, *more, "--compare", space / "kl", "--json", tmp_path / "a.json")) == 0
    report, (rows,) = json.loads((tmp_path / "a.json").read_text()), tables_in(capsys.readouterr().out)
    names = [f"{name}-MobileNetV2" for name in ("FD", "sFD", "precision", "recall")] + ["IS-ViT"]
    for row, figures in zip(rows, report["models"]):
        assert {name: row[name] for name in names} == {name: f"{figures[name]:.4f}" for name in names}
    protocol = report["protocol"]
    expected = {"crop": "the largest square in the middle", "size": 32, "images": 6, "seed": None}
    assert {name: protocol[name] for name in expected} == expected and "Pillow" in protocol["resize"]["images"]
    weights = {str(space / "hieratok"), str(space / "kl"), "frechet", "classifier"}
    assert protocol["weights"].keys() == weights and len(set(protocol["weights"].values())) == 4

    with np.load(files["save_npz"], allow_pickle=False) as file:
        assert file.files == ["arr_0"] and file["arr_0"].shape == (6, 32, 32, 3)
        codec = load_codec(space / "hieratok")
        (batch,) = EvaluationBatches(load_images(str(space / "images")), 32, limit=7)
        levels = to_uint8(codec.decode(codec.encode(batch["pixel_values"])))
        assert abs(levels.permute(0, 2, 3, 1).numpy().astype(int) - file["arr_0"]).max() <= 1
    given = ["--reference", files["save_statistics"], "--json", tmp_path / "b.json"]
    assert script.main(arguments(space, *more[:7], *given)) == 0
    (figures,) = json.loads((tmp_path / "b.json").read_text())["models"]
    assert json.loads((tmp_path / "b.json").read_text())["protocol"]["reference_statistics"]
    for name in names[:2]:  # of the same targets, by their statistics alone
        assert figures[name] == pytest.approx(report["models"][0][name], rel=1e-9)
    assert not {"precision-MobileNetV2", "recall-MobileNetV2"} & figures.keys()

    capsys.readouterr()
    assert script.main(["--protocol", str(tmp_path / "a.json"), "--json", str(tmp_path / "c.json")]) == 0
    assert "note: all figures are those of --protocol, to the last digit" in capsys.readouterr().out
    again = json.loads((tmp_path / "c.json").read_text())
    for figures in [*report["models"], *again["models"]]:
        assert figures.pop("images_per_second")
    assert all(again[name] == report[name] for name in ("models", "protocol", "machine", "images", "skipped"))

    assert script.main(["--protocol", str(tmp_path / "a.json"), "--no_ssim", "--model", str(space / "tiny")]) == 0
    output = capsys.readouterr().out
    assert re.search(r"note: models\.0\.ssim was [0-9.]+ in --protocol, is not there", output)


@pytest.fixture
def stand_in_ocr(monkeypatch):
    """What reads lines that look as they were drawn, of two heights with few pages."""
    monkeypatch.setattr(script, "TextReading", partial(TextReading, heights=(8, 12)))
    monkeypatch.setattr(script, "load_reader", lambda: template_reader(8, 12))


def test_text_is_read_of_any_autoencoder_and_again_by_the_protocol(stand_in_ocr, space, tmp_path, capsys):
    given = ["--no_ssim", "--no_fid", "--max_images", 1, "--text", "--batch_size", 3, "--json", tmp_path / "a.json"]
    tiny_dc().save_pretrained(tmp_path / "dc")
    tiny_kl(mid_block_add_attention=False).save_pretrained(tmp_path / "kl")  # attention over a page takes minutes
    more = ["--compare", tmp_path / "kl", space / "tiny", tmp_path / "dc"]
    assert script.main(arguments(space, *given, *more)) == 0
    report, (_, table) = json.loads((tmp_path / "a.json").read_text()), tables_in(capsys.readouterr().out)
    all_and_nothing = [dict.fromkeys(("characters", "lines"), share) for share in (1, 0)]
    assert report["text_of_originals"] == dict.fromkeys(("8", "12"), all_and_nothing[0])
    rows = [{"characters, lines right, %": "pages as drawn", "8 px": "100.0, 100.0", "12 px": "100.0, 100.0"}]
    for figures in report["models"]:
        assert figures["text"] == dict.fromkeys(("8", "12"), all_and_nothing[1])  # their weights are random
        rows.append({"characters, lines right, %": figures["model"], "8 px": "0.0, 0.0", "12 px": "0.0, 0.0"})
    assert table == rows and len(rows) == 5
    described = report["protocol"]["text"]
    assert described["page_size"] == 256 and len(described["pages"]) == 64 and report["protocol"]["options"]["text"]
    assert described["versions"].keys() >= {"rapidocr-onnxruntime"}

    assert script.main(["--protocol", str(tmp_path / "a.json")]) == 0
    assert "note: all figures are those of --protocol, to the last digit" in capsys.readouterr().out
    assert script.main(arguments(space, *given[:4], "--json", tmp_path / "b.json")) == 0
    plain = json.loads((tmp_path / "b.json").read_text())
    assert not [x for x in (plain, plain["protocol"], plain["models"][0]) for name in x if name.startswith("text")]


@pytest.fixture
def stand_in_networks(monkeypatch):
    """What takes a place that is the same in all images for a face, and two heights of it."""
    monkeypatch.setattr(script, "FaceDistances", partial(FaceDistances, heights=(12, 16, 20)))
    monkeypatch.setattr(script, "FaceNetworks", lambda: StandInNetworks((16, 18, 16)))


def test_faces_are_compared_by_any_autoencoder_and_again_by_the_protocol(stand_in_networks, space, tmp_path, capsys):
    given = ["--no_ssim", "--no_fid", "--max_images", 3, "--faces", "--batch_size", 2, "--json", tmp_path / "a.json"]
    tiny_kl(mid_block_add_attention=False).save_pretrained(tmp_path / "kl")
    assert script.main(arguments(space, *given, "--compare", tmp_path / "kl")) == 0
    report, (_, table) = json.loads((tmp_path / "a.json").read_text()), tables_in(capsys.readouterr().out)
    corner, (count, scaled, *rows) = "distance, same person, %", table
    assert count == {corner: "number of faces", "12 px": "2", "16 px": "2"}  # the second image is broken
    originals = report["faces_of_originals"]
    assert scaled == {corner: "faces as scaled"} | shown_faces(originals)
    assert originals.keys() == {"12", "16"} and originals["12"]["distance"] > originals["16"]["distance"]
    for figures, row in zip(report["models"], rows, strict=True):
        assert row == {corner: figures["model"]} | shown_faces(figures["faces"])
        assert all(face["faces"] == 2 and face["distance"] > 1 for face in figures["faces"].values())
    described = report["protocol"]["faces"]
    assert described["found"] == [{"row": i, "x": 16, "y": 18, "height": 16} for i in (0, 2)]
    assert len(described["networks"]["stand_in_faces"]) == 64 and described["versions"].keys() >= {"dlib-bin"}

    assert script.main(["--protocol", str(tmp_path / "a.json")]) == 0
    assert "note: all figures are those of --protocol, to the last digit" in capsys.readouterr().out
    assert script.main(arguments(space, *given[:4], "--json", tmp_path / "b.json")) == 0
    plain = json.loads((tmp_path / "b.json").read_text())
    assert not [x for x in (plain, plain["protocol"], plain["models"][0]) for name in x if name.startswith("faces")]


def shown_faces(figures):
    return {f"{size} px": f"{face['distance']:.3f}, {100 * face['same']:.0f}" for size, face in figures.items()}


@pytest.mark.parametrize("option", ["text", "faces"])
def test_text_and_faces_need_what_reads_them_and_a_model_that_takes_their_size(
    option, space, stand_in_ocr, stand_in_networks, tmp_path, monkeypatch, capsys
):
    sides = {f"{side}_block_out_channels": (2,) * 10 for side in ("encoder", "decoder")}
    blocks = {f"num_{side}_blocks": (1,) * 10 for side in ("encoder", "decoder")}
    AutoencoderTiny(**sides, **blocks).save_pretrained(tmp_path / "coarse")  # makes 512 pixels of a latent
    given = ["--no_ssim", "--no_fid", f"--{option}", "--json", tmp_path / "new" / "a.json"]
    assert script.main(arguments(space, *given, "--compare", tmp_path / "coarse")) == 2
    assert re.search(
        rf"--{option}.*: .*makes images of shape .3, 512, 512. of those of .3, 256, 256", error_of(capsys)
    )
    monkeypatch.undo()
    package, extra = {"text": ("rapidocr_onnxruntime", "ocr"), "faces": ("dlib", "faces")}[option]
    monkeypatch.setitem(sys.modules, package, None)
    assert script.main(arguments(space, *given)) == 2
    assert re.search(rf"--{option}.*: .*pip install 'hieratok_hf\[{extra}\]'", error_of(capsys))
    assert not list((tmp_path / "new").iterdir())


def test_images_without_faces_are_refused(stand_in_networks, space, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "FaceNetworks", lambda: StandInNetworks((16, 18, 4)))
    assert (
        script.main(arguments(space, "--no_ssim", "--no_fid", "--faces", "--json", tmp_path / "new" / "a.json")) == 2
    )
    assert re.search("--faces in .*images.*: no faces of 12 pixels", error_of(capsys))
    assert not list((tmp_path / "new").iterdir())


def test_wrong_latents_have_columns_and_come_again_by_the_protocol(space, tmp_path, capsys):
    AutoencoderHieraTok.from_pretrained(space / "hieratok").save_pretrained(tmp_path / "levels")
    (batch,) = EvaluationBatches(load_images(str(space / "images")), 32)
    codec = load_codec(tmp_path / "levels")
    codec.model.fit_quantizer([batch["pixel_values"]]).write(tmp_path / "levels" / QUANTIZER_FILE)
    given = ["--model", tmp_path / "levels", "--compare", space / "tiny", "--no_fid", "--no_ssim"]
    more = ["--perturb", 0.1, 1, "--json", tmp_path / "a.json"]
    assert script.main(arguments(space, *given, *more)) == 0
    rows, models = tables_in(capsys.readouterr().out)[0], json.loads((tmp_path / "a.json").read_text())["models"]
    for row, figures in zip(rows, models):
        for kind in ("noise", "replaced_levels"):
            decibels = figures.get(f"psnr_with_{kind}", {})
            for amount in ("0.1", "1.0"):
                cell = f"{decibels[amount]:.2f}" if decibels else "-"
                assert row[f"{kind.replace('_', ' ')} {amount}, dB"] == cell
    assert "psnr_with_replaced_levels" in models[0] and "psnr_with_replaced_levels" not in models[1]
    std = torch.tensor(models[1]["latent_std"])
    batches = EvaluationBatches(load_images(str(space / "images")), 32, 3)
    expected = evaluate_perturbed(load_codec(space / "tiny"), batches, [0.1, 1.0], std)
    assert models[1]["psnr_with_noise"] == pytest.approx(expected["psnr_with_noise"], rel=1e-4)
    assert script.main(["--protocol", str(tmp_path / "a.json")]) == 0
    assert "note: all figures are those of --protocol, to the last digit" in capsys.readouterr().out


def test_images_of_a_file_are_evaluated_as_those_of_a_folder(space, tmp_path):
    (batch,) = EvaluationBatches(load_images(str(space / "images")), 32)
    levels = to_uint8(batch["pixel_values"]).permute(0, 2, 3, 1).contiguous().numpy()
    np.savez(tmp_path / "images.npz", levels, np.array(batch["labels"]))
    figures = []
    for data in (tmp_path / "images.npz", space / "images"):
        given = ["--data", data, "--fid_model", space / "vision", "--json", tmp_path / "a.json", "--overwrite"]
        assert script.main(arguments(space, *given)) == 0
        figures += json.loads((tmp_path / "a.json").read_text())["models"]
        assert figures[-1].pop("images_per_second")
    assert figures[0].pop("images") == figures[1].pop("images") == 7
    names = ("psnr", "ssim", "FD-MobileNetV2")
    assert [figures[0][x] for x in names] == pytest.approx([figures[1][x] for x in names], rel=1e-4)


def test_other_images_may_be_the_reference(space, tmp_path):
    common = ["--no_ssim", "--fid_model", space / "vision", "--json", tmp_path / "a.json", "--overwrite"]
    found = []
    for reference in ([], ["--reference", space / "images"], ["--reference", space / "train"]):
        assert script.main(arguments(space, *common, *reference)) == 0
        found.append(json.loads((tmp_path / "a.json").read_text())["models"][0]["FD-MobileNetV2"])
    assert found[0] == pytest.approx(found[1], rel=1e-6) and abs(found[2] / found[0] - 1) > 1e-3


BAD = {
    "no images in a file": (["--data", "{space}/bad.npz"], "--data .*must hold images as `arr_0`"),
    "no network for statistics": (["--save_statistics", "{space}/new.npz"], "--save_statistics .*torch-fidelity"),
    "a missing second model": (["--compare", "missing/model"], "--compare 'missing/model' cannot be loaded"),
    "an empty folder": (["--data", "{space}/empty"], "No images found in "),
    "only broken images": (["--data", "{space}/broken"], "cannot be evaluated .*no images to measure"),
    "no labels": (["--probe_data", "{space}/train/hat"], "a probe needs labels, and --probe_data .* has none"),
    "other classes": (["--probe_data", "{space}/other"], "must have the same classes, got .*hat.* and .*b.*"),
    "a size that does not fit": (["--size", "30"], "--size 30 does not suit .*multiples of the patch size 4"),
    "no vision model": (["--fid_model", "{space}/kl"], "--fid_model .* cannot be loaded: "),
    "a file for a folder": (["--json", "{space}/kl/config.json/x.json"], "--json .* cannot be written: "),
    "one image for a distance": (
        ["--fid_model", "{space}/vision", "--max_images", "1"],
        "on --data .*two images or more",
    ),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_no_file(given, message, space, capsys, tmp_path):
    given = [text.format(space=space) for text in given]
    given += ["--no_ssim", *([] if {"--fid_model", "--save_statistics"} & {*given} else ["--no_fid"])]
    given = with_defaults(given, {"--json": tmp_path / "figures.json"})
    assert script.main(arguments(space, *given)) == 2
    assert re.match(f"error: .*{message}", error_of(capsys))
    assert not list(tmp_path.iterdir())


def test_bad_arguments_are_refused_by_the_command_line(capsys):
    for argv, message in (
        (["--fid_size", "64"], "--fid_size needs --fid_model"),
        (["--no_fid", "--fid_model", "x"], "--no_fid and --fid_model contradict"),
        (["--no_fid", "--suite"], "--no_fid and --suite contradict"),
        (["--save_npz", "a.npz", "--save_statistics", "a.npz"], "must be two files"),
        (["--reference_split", "test"], "--reference_split needs --reference"),
        (["--perturb", "1.5"], "--perturb: must be a finite number"),
        (["--protocol", "missing.json"], "--protocol must be a report by --json of `hieratok evaluate`"),
    ):
        assert message in usage_error(capsys, script.main, "--data", "x", *argv)
