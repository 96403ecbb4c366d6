"""Tests of `examples/reconstruct.py`: sheets, figures, broken files, and every way to ask for the impossible."""

import importlib.util
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

from hieratok_hf import AutoencoderHieraTok, HieraTokImageProcessorPil
from hieratok_hf.evaluation.metrics import psnr, ssim
from hieratok_hf.models.losses import image_pyramid

pytest.importorskip("torchmetrics")

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "reconstruct.py"
spec = importlib.util.spec_from_file_location("reconstruct_example", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

PATCH = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "model"
    vae = AutoencoderHieraTok.from_size("hieratok-tiny", encoder_num_layers=1, decoder_num_layers=1)
    vae.save_pretrained(folder)
    return folder


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """Call `main` with this module's model and an output folder of the test's own."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the variable is read once, at import

    def call(*argv, model=model, output=tmp_path / "out"):
        return script.main([*map(str, argv), "--model", str(model), "--output", str(output), "--device", "cpu"])

    return call


def levels(height=32, width=48, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def contains(sheet, pixels):
    """Whether the sheet has these pixels somewhere along its left margin."""
    sheet, height, width = np.asarray(sheet), *pixels.shape[:2]
    columns = sheet[:, script.MARGIN : script.MARGIN + width]
    return any(np.array_equal(columns[y : y + height], pixels) for y in range(len(columns) - height + 1))


def centre(array, height, width):
    top, left = (array.shape[0] - height) // 2, (array.shape[1] - width) // 2
    return array[top : top + height, left : left + width]


def announced_png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_the_sheet_holds_the_original_and_every_scale(run, model, tmp_path):
    array = levels(256, 320)
    assert run(save(tmp_path / "a.png", array)) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a_reconstruction.png"]
    sheet = Image.open(tmp_path / "out" / "a_reconstruction.png")
    assert contains(sheet, array)

    vae = AutoencoderHieraTok.from_pretrained(model)
    processor = HieraTokImageProcessorPil(size_divisor=PATCH)
    with torch.no_grad():
        pixel_values = processor(Image.fromarray(array), return_tensors="pt").pixel_values
        scales = vae.core.decode_scales(vae.encode(pixel_values).latent_dist.mode())
    shift = script.MARGIN + 320
    for scale, original in zip(scales, image_pyramid(pixel_values, vae.core.config)):
        decoded, averaged = (np.asarray(processor.postprocess(x)[0]) for x in (scale, original))
        difference = np.minimum(4 * np.abs(decoded.astype(int) - averaged), 255).astype(np.uint8)
        for column, panel in enumerate((averaged, decoded, difference)):
            assert contains(sheet.crop((column * shift, 0, *sheet.size)), panel)


def test_large_panels_shrink_unless_full(run, tmp_path):
    path = save(tmp_path / "wide.png", levels(64, 1032))
    assert run(path) == 0
    small = Image.open(tmp_path / "out" / "wide_reconstruction.png")
    assert 3 * 512 < small.width < 3 * 512 + 100
    assert run(path, "--full") == 0
    full = Image.open(tmp_path / "out" / "wide_reconstruction.png")
    assert contains(full, np.asarray(Image.open(path))) and full.width > 3 * 1032


def test_small_panels_grow_by_whole_factors_and_labels_fit(run, tmp_path):
    array = levels(64, 8)
    assert run(save(tmp_path / "slim.png", array)) == 0
    sheet = Image.open(tmp_path / "out" / "slim_reconstruction.png")
    assert contains(sheet, array.repeat(4, axis=0).repeat(4, axis=1))
    font = script.ImageFont.load_default(size=16)
    assert sheet.width > 3 * font.getlength("decoded: 10.00 dB")
    assert (np.asarray(sheet)[:, -script.MARGIN :] == 255).all()  # no text runs into the right margin


@pytest.mark.parametrize("orientation", [1, 6])
def test_odd_sizes_and_exif_orientation(run, tmp_path, orientation):
    array = levels(260, 331)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert run(save(tmp_path / "odd.png", array, exif=exif)) == 0
    upright = array if orientation == 1 else np.rot90(array, -1)
    height, width = (256, 328) if orientation == 1 else (328, 256)
    assert contains(Image.open(tmp_path / "out" / "odd_reconstruction.png"), centre(upright, height, width))


def test_size_crops_at_most_that_much(run, tmp_path, capsys):
    array = levels(300, 280)
    paths = [save(tmp_path / "big.png", array), save(tmp_path / "small.png", levels(16, 24))]
    assert run(*paths, "--size", 270) == 0
    assert contains(Image.open(tmp_path / "out" / "big_reconstruction.png"), centre(array, 264, 264))
    lines = capsys.readouterr().out.splitlines()
    assert "264 x 264" in lines[1] and "24 x 16" in lines[2]


def test_grey_and_transparent_images(run, tmp_path):
    grey = levels(256, 256, channels=1)
    clear = levels(256, 256, channels=4)
    clear[..., 3] = 0
    assert run(save(tmp_path / "grey.png", grey), save(tmp_path / "clear.png", clear)) == 0
    assert contains(Image.open(tmp_path / "out" / "grey_reconstruction.png"), grey[..., None].repeat(3, axis=2))
    assert contains(Image.open(tmp_path / "out" / "clear_reconstruction.png"), np.full((256, 256, 3), 255, np.uint8))


def test_figures_equal_the_recomputed_ones(run, model, tmp_path, capsys):
    arrays = {"a.png": levels(48, 40), "b.png": levels(33, 64, seed=1) // 2}
    paths = [save(tmp_path / name, array) for name, array in arrays.items()]
    assert run(*paths, "--json", tmp_path / "new" / "figures.json") == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["figures.json"]
    report = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert report["failures"] == {} and report["device"] == "cpu" and report["dtype"] == "float32"

    vae = AutoencoderHieraTok.from_pretrained(model)
    processor = HieraTokImageProcessorPil(size_divisor=PATCH)
    for path, array, figures in zip(paths, arrays.values(), report["images"]):
        height, width = (side // PATCH * PATCH for side in array.shape[:2])
        pixel_values = processor(Image.fromarray(array), return_tensors="pt").pixel_values
        with torch.no_grad():
            sample = vae(pixel_values).sample
        assert figures["image"] == str(path)
        assert figures["output"] == str(tmp_path / "out" / f"{path.stem}_reconstruction.png")
        assert (figures["width"], figures["height"]) == (width, height)
        assert figures["latent_shape"] == [16, height // PATCH, width // PATCH]
        assert figures["compression"] == 12.0
        assert figures["psnr_db"] == pytest.approx(psnr(sample, pixel_values).item(), abs=1e-3)
        assert figures["ssim"] == pytest.approx(ssim(sample, pixel_values).item(), abs=1e-4)
        assert figures["encode_seconds"] > 0 and figures["decode_seconds"] > 0
    for key in ("psnr_db", "ssim"):
        assert report["mean"][key] == pytest.approx(np.mean([x[key] for x in report["images"]]))

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == " ".join(script.HEADER).split() and "compression (numbers)" in lines[0]
    assert len({len(line) for line in lines[:3]}) == 1
    assert f"{report['images'][0]['psnr_db']:.2f}" in lines[1] and "16 x 6 x 5" in lines[1] and "12.0x" in lines[1]
    assert f"{report['mean']['psnr_db']:.2f} dB" in lines[3] and f"{report['mean']['ssim']:.4f}" in lines[3]


def test_an_image_too_small_for_ssim_has_none(run, tmp_path, capsys):
    small, large = save(tmp_path / "small.png", levels(8, 8)), save(tmp_path / "large.png", levels(16, 16))
    assert run(small, large, "--json", tmp_path / "f.json") == 0
    report = json.loads((tmp_path / "f.json").read_text())
    assert report["images"][0]["ssim"] is None and report["mean"]["ssim"] == report["images"][1]["ssim"]
    assert run(small) == 0
    assert "SSIM" not in capsys.readouterr().out.splitlines()[-1]


def test_json_knows_no_infinity(tmp_path):
    args, infinity = script.parse_args(["--device", "cpu"]), float("inf")
    figures = {"psnr_db": infinity, "scales_psnr_db": [40.0, infinity], "ssim": 1.0}
    script.write_report(tmp_path / "f.json", script.as_report(args, [figures], {"psnr_db": infinity}, {}))
    assert json.loads((tmp_path / "f.json").read_text())["images"] == [
        {"psnr_db": None, "scales_psnr_db": [40.0, None], "ssim": 1.0}
    ]


def test_bad_files_are_named_and_the_others_go_on(run, tmp_path, capsys):
    folder = tmp_path / "in"
    save(folder / "good.png", levels())
    save(folder / "deep" / "er" / "GOOD.JPG", levels())
    buffer = io.BytesIO()
    Image.fromarray(levels(64, 64)).save(buffer, format="PNG")
    (folder / "broken.png").write_bytes(buffer.getvalue()[:2000])
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no image")
    (folder / "huge.png").write_bytes(announced_png(60_000, 60_000))
    (folder / "lost.png").symlink_to(folder / "nowhere.png")
    save(folder / "tiny.png", levels(7, 30))
    save(folder / ".hidden.png", levels())
    save(folder / ".folder" / "hidden.png", levels())
    (folder / "notes.txt").write_text("not looked at")
    (folder / "folder.png").mkdir()

    assert run(folder, tmp_path / "missing.png", "--json", tmp_path / "f.json") == 1
    out, err = capsys.readouterr()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"GOOD_reconstruction.png", "good-2_reconstruction.png"}
    assert "good.png" in out and "GOOD.JPG" in out and "mean of 2" in out
    reasons = {
        folder / "broken.png": "cannot be decoded",
        folder / "empty.png": "is empty (0 bytes)",
        folder / "text.jpg": "is no image",
        folder / "huge.png": "is too large",
        folder / "lost.png": "cannot be read",
        folder / "tiny.png": "at least size_divisor=8 pixels on each side, got 7 x 30",
        tmp_path / "missing.png": "cannot be read",
    }
    failed = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == len(reasons)
    for path, reason in reasons.items():
        assert sum(f"{str(path)!r}: " in line and reason in line for line in failed) == 1
        assert str(path) not in out
    failures = json.loads((tmp_path / "f.json").read_text())["failures"]
    assert failures.keys() == set(map(str, reasons))
    assert "hidden" not in out + err and "notes" not in out + err


def test_nothing_but_bad_files(run, tmp_path, capsys):
    (tmp_path / "empty.png").touch()
    assert run(tmp_path / "empty.png") == 1
    out, err = capsys.readouterr()
    assert out == "" and "empty.png" in err and list((tmp_path / "out").iterdir()) == []


def test_equal_stems_get_names_of_their_own(run, tmp_path):
    paths = [
        save(tmp_path / name, levels(seed=i)) for i, name in enumerate(["x/a.png", "y/a.png", "a-2.png", "A.png"])
    ]
    assert run(*paths, paths[0]) == 0  # a file given twice is done once
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"{stem}_reconstruction.png" for stem in ("a", "a-2", "a-2-2", "A-3")}


def test_a_second_run_leaves_its_own_sheets_alone(run, tmp_path):
    save(tmp_path / "in" / "a.png", levels())
    for _ in range(2):
        assert run(tmp_path / "in", output=tmp_path / "in") == 0
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["a.png", "a_reconstruction.png"]


def test_a_single_scale_model(run, tmp_path):
    vae = AutoencoderHieraTok.from_size(
        "hieratok-tiny", encoder_num_layers=1, decoder_num_layers=1, scale_factors=(1,)
    )
    vae.save_pretrained(tmp_path / "single")
    assert run(save(tmp_path / "a.png", levels()), model=tmp_path / "single") == 0
    assert (tmp_path / "out" / "a_reconstruction.png").is_file()


def test_low_precision(run, tmp_path):
    assert run(save(tmp_path / "a.png", levels()), "--dtype", "bfloat16") == 0


def error_of(capsys):
    """The one line that an exit with status 2 prints."""
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and len(lines) == 1 and "Traceback" not in err
    return lines[0]


def test_unknown_and_broken_models(run, model, tmp_path, capsys):
    image = save(tmp_path / "a.png", levels())
    (tmp_path / "hollow").mkdir()
    partial = tmp_path / "partial"
    vae = AutoencoderHieraTok.from_pretrained(model)
    vae.save_pretrained(partial)
    (weights,) = partial.glob("*.safetensors")
    state = load_file(weights)
    state.popitem()
    save_file(state, weights, {"format": "pt"})
    capsys.readouterr()
    for name, reason in [
        ("nobody/nothing", "nobody/nothing"),
        ("hieratok-huge", "hieratok-huge"),
        (tmp_path / "hollow", "config.json"),
        (image, "is a file"),
        (partial, "lack 1 of the tensors"),
    ]:
        assert run(image, model=name) == 2
        line = error_of(capsys)
        assert f"--model {str(name)!r} cannot be loaded" in line and reason in line


def test_models_are_looked_for_as_folder_then_shipped_name(model, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("hieratok_hf.shipped.pretrained", lambda name: seen.append(name) or str(model))
    monkeypatch.chdir(tmp_path)
    script.load_model("hieratok-tiny", "cpu", "float32")
    assert seen == ["hieratok-tiny"]
    AutoencoderHieraTok.from_pretrained(model).save_pretrained("hieratok-tiny")
    script.load_model("hieratok-tiny", "cpu", "float32")
    assert seen == ["hieratok-tiny"]


def test_no_images_found(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty") == 2
    assert "no images found in" in error_of(capsys)


def test_without_arguments_the_bundled_images_are_used(run, tmp_path, monkeypatch):
    save(tmp_path / "bundled" / "photograph.png", levels())
    monkeypatch.setattr(script, "BUNDLED", tmp_path / "bundled")
    assert run() == 0
    assert (tmp_path / "out" / "photograph_reconstruction.png").is_file()


def test_outputs_that_cannot_be_written(run, tmp_path, capsys):
    image = save(tmp_path / "a.png", levels())
    for output in (image, image / "below"):
        assert run(image, output=output) == 2
        assert f"--output {str(output)!r}" in error_of(capsys)
    for report in (tmp_path, image / "below.json"):
        assert run(image, "--json", report) == 2
        assert f"--json {str(report)!r}" in error_of(capsys)
    assert np.array_equal(np.asarray(Image.open(image)), levels())


def test_a_sheet_that_cannot_be_written_is_a_failure_and_leaves_nothing(run, tmp_path, capsys):
    paths = [save(tmp_path / name, levels()) for name in ("a.png", "b.png")]
    (tmp_path / "out" / "a_reconstruction.png").mkdir(parents=True)
    assert run(*paths) == 1
    assert "a.png" in capsys.readouterr().err
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a_reconstruction.png", "b_reconstruction.png"]


def test_sizes_that_make_no_sense(run, tmp_path, capsys):
    image = save(tmp_path / "a.png", levels())
    assert run(image, "--size", PATCH - 1) == 2
    assert "at least the model's patch size 8, got 7" in error_of(capsys)
    for size in ("0", "-8", "large"):
        with pytest.raises(SystemExit) as stop:
            run(image, f"--size={size}")
        assert stop.value.code == 2
    assert "--size" in capsys.readouterr().err


def test_an_unknown_device(model, tmp_path, capsys):
    image = save(tmp_path / "a.png", levels())
    argv = [str(image), "--model", str(model), "--output", str(tmp_path / "out"), "--device", "abacus"]
    assert script.main(argv) == 2
    assert "'abacus'" in error_of(capsys)


def test_torchmetrics_missing(run, tmp_path, monkeypatch, capsys):
    def missing(*_):
        raise ImportError('`ssim` needs torchmetrics: pip install "hieratok_hf[eval]"')

    monkeypatch.setattr(script, "ssim", missing)
    assert run(save(tmp_path / "a.png", levels())) == 2
    assert "hieratok_hf[eval]" in error_of(capsys)
