"""Tests of `hieratok reconstruct`: sheets, figures, broken files, and ways to ask for the impossible."""

import json
import math

import numpy as np
import pytest
import torch
from image_files import noise, png
from PIL import Image
from scripts import error_of, load_script, with_defaults

from hieratok_hf import AutoencoderHieraTok, HieraTokImageProcessorPil
from hieratok_hf.evaluation.metrics import psnr, ssim
from hieratok_hf.models.losses import image_pyramid

pytest.importorskip("torchmetrics")

script = load_script("cli", "reconstruct")
PATCH = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "model"
    AutoencoderHieraTok.from_size("hieratok-tiny", encoder_num_layers=1, decoder_num_layers=1).save_pretrained(folder)
    return folder


@pytest.fixture
def run(model, tmp_path):
    """Call `main` with this module's model and an output folder of the test's own."""

    def call(*given):
        defaults = {"--model": model, "--output": tmp_path / "out", "--device": "cpu"}
        return script.main(with_defaults(list(given), defaults))

    return call


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def test_an_image_that_comes_back_exactly_does_not_make_the_mean_infinite(run, tmp_path, capsys, monkeypatch):
    flat, other = save(tmp_path / "flat.png", noise(64, 64)), save(tmp_path / "other.png", noise(64, 64, seed=1))
    plain, decibels = script.encode_and_decode, iter([math.inf, 20.0])

    def measured(*args):
        *made, figures = plain(*args)
        return *made, {**figures, "psnr_db": next(decibels)}

    monkeypatch.setattr(script, "encode_and_decode", measured)
    assert run(flat, other) == 0
    assert "PSNR 20.00 dB" in (told := capsys.readouterr().out) and "without 1 equal to the original" in told


def contains(sheet, pixels):
    """Whether the sheet has these pixels somewhere along its left margin."""
    sheet, height, width = np.asarray(sheet), *pixels.shape[:2]
    columns = sheet[:, script.MARGIN : script.MARGIN + width]
    return any(np.array_equal(columns[y : y + height], pixels) for y in range(len(columns) - height + 1))


def test_large_panels_shrink_unless_full_and_small_ones_grow_by_whole_factors(run, tmp_path):
    wide, slim = save(tmp_path / "wide.png", noise(64, 1032)), save(tmp_path / "slim.png", noise(64, 8))
    assert run(wide, slim) == 0
    assert 3 * 512 < Image.open(tmp_path / "out" / "wide_reconstruction.png").width < 3 * 512 + 100
    sheet = Image.open(tmp_path / "out" / "slim_reconstruction.png")
    assert contains(sheet, noise(64, 8).repeat(4, axis=0).repeat(4, axis=1))
    font = script.ImageFont.load_default(size=16)
    assert sheet.width > 3 * font.getlength("decoded: 10.00 dB")
    assert (np.asarray(sheet)[:, -script.MARGIN :] == 255).all()  # no text runs into the right margin
    assert run(wide, "--full", "--overwrite") == 0
    full = Image.open(tmp_path / "out" / "wide_reconstruction.png")
    assert contains(full, noise(64, 1032)) and full.width > 3 * 1032


def test_of_a_pipeline_its_vae_is_taken(run, tmp_path, capsys):
    paths = [save(tmp_path / "a.png", noise()), "--output", tmp_path / "out"]
    assert run(*paths, "--model", "hieratok-dit-tiny") == 0
    assert "a_reconstruction.png" in {path.name for path in (tmp_path / "out").iterdir()}
    assert capsys.readouterr().err == ""


def test_size_crops_at_most_that_much(run, tmp_path, capsys):
    array = noise(300, 280)
    paths = [save(tmp_path / "big.png", array), save(tmp_path / "small.png", noise(16, 24))]
    assert run(*paths, "--size", 270, "--dtype", "bfloat16") == 0
    assert contains(Image.open(tmp_path / "out" / "big_reconstruction.png"), array[18:282, 8:272])
    lines = capsys.readouterr().out.splitlines()
    assert "264 x 264" in lines[1] and "24 x 16" in lines[2]


@pytest.mark.parametrize("whole", [[], ["--whole"]], ids=["tiles", "whole"])
def test_the_sheet_holds_every_scale_and_the_figures_are_those_of_the_pixels(run, model, tmp_path, capsys, whole):
    arrays = {"a.png": noise(256, 320), "b.png": noise(33, 64, seed=1) // 2}
    paths = [save(tmp_path / name, array) for name, array in arrays.items()]
    assert run(*paths, *whole, "--json", tmp_path / "new" / "figures.json") == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["figures.json"]
    report = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert report["failures"] == {} and report["device"] == "cpu" and report["dtype"] == "float32"

    vae = AutoencoderHieraTok.from_pretrained(model)
    if not whole:
        vae.enable_tiling()
    processor = HieraTokImageProcessorPil(size_divisor=PATCH)
    for path, array, figures in zip(paths, arrays.values(), report["images"]):
        pixel_values = processor(Image.fromarray(array), return_tensors="pt").pixel_values
        with torch.no_grad():
            scales = vae.decode(vae.encode(pixel_values).latent_dist.mode(), return_scales=True).scales
        height, width = pixel_values.shape[2:]
        output = tmp_path / "out" / f"{path.stem}_reconstruction.png"
        expected = {"image": str(path), "output": str(output), "width": width, "height": height, "compression": 12.0}
        expected["latent_shape"] = [16, height // PATCH, width // PATCH]
        assert expected.items() <= figures.items()
        assert figures["psnr_db"] == pytest.approx(psnr(scales[-1], pixel_values).item(), abs=1e-3)
        assert figures["ssim"] == pytest.approx(ssim(scales[-1], pixel_values).item(), abs=1e-4)
        assert figures["encode_seconds"] > 0 and figures["decode_seconds"] > 0
        if width < 256:  # its panels are enlarged
            continue
        sheet = Image.open(output)
        assert contains(sheet, array)
        for scale, original in zip(scales, image_pyramid(pixel_values, vae.core.config)):
            decoded, averaged = (np.asarray(processor.postprocess(x)[0]) for x in (scale, original))
            difference = np.minimum(4 * np.abs(decoded.astype(int) - averaged), 255).astype(np.uint8)
            for column, panel in enumerate((averaged, decoded, difference)):
                assert contains(sheet.crop((column * (script.MARGIN + width), 0, *sheet.size)), panel)
    for key in ("psnr_db", "ssim"):
        assert report["mean"][key] == pytest.approx(np.mean([x[key] for x in report["images"]]))

    head, first, second, mean, *notes = capsys.readouterr().out.splitlines()
    assert whole or "in tiles of 256x256 pixels" in notes[0]
    assert len(notes) == (not whole)
    assert head.split() == " ".join(script.HEADER).split() and len(head) == len(first) == len(second)
    assert f"{report['images'][0]['psnr_db']:.2f}" in first and "16 x 32 x 40" in first and "12.0x" in first
    assert f"{report['mean']['psnr_db']:.2f} dB" in mean and f"{report['mean']['ssim']:.4f}" in mean


def test_a_model_of_larger_images_encodes_them_whole(run, model, tmp_path):
    vae = AutoencoderHieraTok.from_pretrained(model)
    vae.register_to_config(sample_size=512)
    vae.save_pretrained(tmp_path / "large")
    image, psnrs = save(tmp_path / "a.png", noise(256, 320)), []
    for given in (["--model", tmp_path / "large"], ["--model", tmp_path / "large", "--whole"], []):
        assert run(image, *given, "--json", tmp_path / "f.json", "--overwrite") == 0
        psnrs.append(json.loads((tmp_path / "f.json").read_text())["mean"]["psnr_db"])
    assert psnrs[0] == psnrs[1] != psnrs[2]


def test_an_image_too_small_for_ssim_has_none(run, tmp_path, capsys):
    small, large = save(tmp_path / "small.png", noise(8, 8)), save(tmp_path / "large.png", noise(16, 16))
    assert run(small, large, "--json", tmp_path / "f.json") == 0
    report = json.loads((tmp_path / "f.json").read_text())
    assert report["images"][0]["ssim"] is None and report["mean"]["ssim"] == report["images"][1]["ssim"]
    assert run(small, "--overwrite") == 0
    assert "SSIM" not in capsys.readouterr().out.splitlines()[-1]


def test_bad_files_are_named_and_the_others_go_on(run, tmp_path, capsys):
    folder = tmp_path / "in"
    for name in ("good.png", "deep/er/GOOD.JPG", ".hidden.png", ".folder/hidden.png"):
        save(folder / name, noise())
    (folder / "text.jpg").write_text("no image")
    (folder / "huge.png").write_bytes(png(60_000, 60_000, 8, 2))
    (folder / "lost.png").symlink_to(folder / "nowhere.png")
    save(folder / "tiny.png", noise(7, 30))
    (folder / "notes.txt").write_text("not looked at")
    (folder / "folder.png").mkdir()

    assert run(folder, tmp_path / "missing.png", "--json", tmp_path / "f.json") == 1
    out, err = capsys.readouterr()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"GOOD_reconstruction.png", "good-2_reconstruction.png"} and "mean of 2" in out
    reasons = {
        folder / "text.jpg": "is no image",
        folder / "huge.png": "is too large",
        folder / "lost.png": "cannot be read",
        folder / "tiny.png": "as large as size_divisor=8, got 7 x 30 pixels",
        tmp_path / "missing.png": "cannot be read",
    }
    failures = json.loads((tmp_path / "f.json").read_text())["failures"]
    failed = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert failed == [f"failed: {path!r}: {reason}" for path, reason in failures.items()]
    assert failures.keys() == set(map(str, reasons))
    assert all(reason in failures[str(path)] for path, reason in reasons.items())


def test_equal_stems_get_names_of_their_own(run, tmp_path):
    paths = [save(tmp_path / name, noise(seed=i)) for i, name in enumerate(["x/a.png", "y/a.png", "a-2.png", "A.png"])]
    assert run(*paths, paths[0]) == 0  # a file given twice is done once
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"{stem}_reconstruction.png" for stem in ("a", "a-2", "a-2-2", "A-3")}


def test_a_second_run_leaves_its_own_sheets_alone(run, tmp_path, monkeypatch):
    save(tmp_path / "in" / "a.png", noise())
    monkeypatch.setattr(script, "BUNDLED", tmp_path / "in")
    for given in ([tmp_path / "in"], []):  # the bundled photographs unless others are named
        assert run(*given, "--output", tmp_path / "in", "--overwrite") == 0
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["a.png", "a_reconstruction.png"]


def test_files_that_are_there_are_replaced_only_if_that_is_asked_for(run, tmp_path, capsys):
    path = save(tmp_path / "a.png", noise())
    own = save(tmp_path / "out" / "a_reconstruction.png", noise(seed=1))
    (tmp_path / "f.json").write_text("mine")
    for given in ([path], [path, "--output", tmp_path / "b", "--json", tmp_path / "f.json"]):
        assert run(*given) == 2 and "add --overwrite" in error_of(capsys)
    assert np.array_equal(np.asarray(Image.open(own)), noise(seed=1)) and (tmp_path / "f.json").read_text() == "mine"
    assert run(path, "--json", tmp_path / "f.json", "--overwrite") == 0
    assert json.loads((tmp_path / "f.json").read_text())["failures"] == {} and Image.open(own).size != (48, 32)
    # Under no name, and not even so, is an input replaced.
    (tmp_path / "link.json").hardlink_to(path)
    for name in ("a.png", "link.json"):
        assert run(path, "--json", tmp_path / name, "--overwrite") == 2 and "it is an input" in error_of(capsys)
    sheet = save(tmp_path / "out" / "b_reconstruction.png", noise())
    (tmp_path / "b.png").hardlink_to(sheet)
    assert run(tmp_path / "b.png", "--overwrite") == 2 and "it is an input" in error_of(capsys)


def test_a_sheet_that_cannot_be_written_is_a_failure_and_leaves_nothing(run, tmp_path, capsys):
    paths = [save(tmp_path / name, noise()) for name in ("a.png", "b.png")]
    (tmp_path / "out" / "a_reconstruction.png").mkdir(parents=True)
    assert run(*paths) == 1
    assert "a.png" in capsys.readouterr().err
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a_reconstruction.png", "b_reconstruction.png"]


BAD = {
    "no folder": (["--model", "nobody/nothing"], "--model 'nobody/nothing' cannot be loaded: "),
    "a file for a model": (["--model", "{0}/a.png"], "cannot be loaded: it is a file"),
    "nothing in a folder": (["--model", "{0}/empty"], "config.json"),
    "no images": (["{0}/empty"], "no images found in "),
    "a file for a folder": (["--output", "{0}/a.png"], "--output '{0}/a.png' cannot be written: "),
    "a folder for a file": (["--json", "{0}/empty"], "--json '{0}/empty' cannot be written: it is a folder"),
    "less than a patch": (["--size", "7"], "--size must be at least the model's patch size 8, got 7"),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_no_file(given, message, run, tmp_path, capsys):
    save(tmp_path / "a.png", noise())
    (tmp_path / "empty").mkdir()
    given = [text.format(tmp_path) for text in given]
    assert run(*given, *([tmp_path / "a.png"] if given[0].startswith("--") else [])) == 2
    assert message.format(tmp_path) in error_of(capsys)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), noise())
    assert not list(tmp_path.rglob("*_reconstruction.png"))


def test_without_torchmetrics_all_but_ssim_is_told(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    assert run(save(tmp_path / "a.png", noise()), "--json", tmp_path / "figures.json") == 0
    (figures,) = json.loads((tmp_path / "figures.json").read_text())["images"]
    assert figures["ssim"] is None and figures["psnr_db"] > 0
    note = capsys.readouterr().out.splitlines()[-1]
    assert "SSIM" in note and "hieratok_hf[eval]" in note
