"""Tests of `examples/evaluate_tokenizer.py`: table and JSON, other autoencoders, a probe, two processes, bad input."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from helpers import random_core, tiny_vision_model
from huggingface_hub import constants
from PIL import Image
from scripts import two_processes
from transformers import ViTConfig, ViTModel

pytest.importorskip("datasets", reason="images are read through it")
pytest.importorskip("torchmetrics", reason="SSIM and Fréchet distances are its own")

import datasets

from hieratok_hf import AutoencoderHieraTok, open_image
from hieratok_hf.evaluation.metrics import psnr
from hieratok_hf.models.autoencoder_adapter import load_codec
from hieratok_hf.utils.images import centre_square

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "evaluate_tokenizer.py"
SPEC = importlib.util.spec_from_file_location("evaluate_tokenizer", SCRIPT)
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)


def crops(folder, count, sizes=(32, 40)):
    """Small images of two classes, cut out of photographs, the first half of the one and the others of the other."""
    photographs = [open_image(path) for path in sorted((ROOT / "examples" / "images").glob("*.webp"))]
    for i in range(count):
        width, height = sizes[i % 2], sizes[(i + 1) % 2]
        left, top = 16 * (i % 6) + 64, 24 * (i // 6) + 64
        path = folder / ("hat", "jacket")[2 * i // count] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photographs[2 * i // count].crop((left, top, left + width, top + height)).save(path)
    return folder


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A folder with models, images, and a broken one among them."""
    folder = tmp_path_factory.mktemp("evaluation")
    torch.manual_seed(0)
    AutoencoderHieraTok.from_core(random_core()).save_pretrained(folder / "hieratok")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, **blocks).save_pretrained(folder / "kl")
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    tiny = AutoencoderTiny(**channels, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    tiny.save_pretrained(folder / "tiny")
    tiny_vision_model().save_pretrained(folder / "vision")
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder / "vit")
    broken = crops(folder / "images", 8) / "hat" / "01.png"
    broken.write_bytes(broken.read_bytes()[:300])
    crops(folder / "train", 24)
    return folder


@pytest.fixture
def run(space, monkeypatch, capsys):
    """Call `main`; gives the exit status, what it printed, and its errors."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the variable is read once, at import
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", space / "cache")

    def call(*argv, model=space / "hieratok", data=space / "images"):
        status = script.main([*map(str, argv), "--model", str(model), "--data", str(data), "--device", "cpu"])
        return status, *capsys.readouterr()

    return call


def rows_of(output):
    """The table as dictionaries by model."""
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("model "))
    header, *rows = [re.split(r"\s{2,}", line.strip()) for line in lines[start:] if not re.match("note|skipped", line)]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_models_side_by_side_and_the_json_equals_the_table(run, space, tmp_path):
    others = [space / "kl", space / "tiny"]
    fid = ["--fid_model", space / "vision", "--fid_size", 16, "--perceptual_model", space / "vision"]
    path = tmp_path / "new" / "figures.json"
    status, output, _ = run("--compare", *others, *fid, "--probe_data", space / "train", "--json", path)
    assert status == 0
    report = json.loads(path.read_text())
    assert list(path.parent.iterdir()) == [path]
    models = {figures["model"]: figures for figures in report["models"]}
    assert list(models) == [str(space / name) for name in ("hieratok", "kl", "tiny")]
    rows = rows_of(output)
    names = {
        "PSNR, dB": ("psnr", 2),
        "SSIM": ("ssim", 4),
        "perceptual": ("perceptual", 4),
        "FD-MobileNetV2": ("FD-MobileNetV2", 4),
    }
    for model, figures in models.items():
        row = rows[model]
        for column, (name, digits) in names.items():
            assert row[column] == f"{figures[name]:.{digits}f}"
        assert row["latent"] == "x".join(map(str, figures["latent_shape"]))
        assert row["largest |mean|"] == f"{max(abs(x) for x in figures['latent_mean']):.3f}"
        assert row["std"] == f"{min(figures['latent_std']):.3f} ... {max(figures['latent_std']):.3f}"
        assert row["decode, images/s"] == f"{figures['images_per_second']['decode']:.1f}"
        assert len(figures["latent_std"]) == figures["latent_shape"][0] and figures["images"] == 7
        coarse = " ".join(f"{x:.2f}" for x in figures.get("scales_psnr", [])[:-1])
        assert row["coarser scales, dB"] == (coarse or "-")
        accuracy = figures.get("probe_accuracy")
        assert row["probe, %"] == ("-" if accuracy is None else f"{100 * accuracy:.2f}")
    assert "scales_psnr" in models[str(space / "hieratok")] and "scales_psnr" not in models[str(space / "kl")]
    assert 0 <= models[str(space / "hieratok")]["probe_accuracy"] <= 1

    # Independent of the script: the mean over the images that are whole.
    codec = load_codec(space / "tiny")
    values = []
    for image in sorted((space / "images").rglob("*.png")):
        if image.name != "01.png":
            square = torch.tensor(list(centre_square(Image.open(image), 32).tobytes())).view(1, 32, 32, 3)
            pixel_values = square.permute(0, 3, 1, 2) / 127.5 - 1
            values.append(psnr(codec.decode(codec.encode(pixel_values)), pixel_values).item())
    assert models[str(space / "tiny")]["psnr"] == pytest.approx(sum(values) / 7, abs=1e-3)

    assert report["settings"]["size"] == 32 and report["settings"]["fid_size"] == 16
    assert report["machine"]["torch"] == torch.__version__ and report["machine"]["processes"] == 1
    (name,) = report["skipped"]
    assert name.endswith("01.png") and f"skipped: {report['skipped'][name]}" in output
    assert "note: images that could not be decoded and were skipped: 1" in output
    assert "note: FD-MobileNetV2 is taken of images resized to 16 x 16 pixels" in output


def test_two_processes_give_the_figures_of_one(run, space, tmp_path):
    options = ["--fid_model", space / "vision", "--batch_size", 3, "--probe_data", space / "train"]
    assert run(*options, "--json", tmp_path / "one.json")[0] == 0
    options += ["--model", space / "hieratok", "--data", space / "images", "--json", tmp_path / "two.json"]
    output, silent = two_processes(SCRIPT, [*options, "--device", "cpu"], space / "cache")
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


def test_what_is_not_asked_for_is_left_out(run, tmp_path):
    status, output, _ = run("--no_ssim", "--no_fid", "--max_images", 3, "--json", tmp_path / "a.json")
    (row,) = rows_of(output).values()
    assert status == 0 and not {"SSIM", "FD-MobileNetV2", "rFID", "probe, %"} & set(row)
    assert json.loads((tmp_path / "a.json").read_text())["images"] == 2  # the second is broken


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity would be used")
def test_rfid_that_cannot_be_measured_becomes_a_note(run):
    status, output, _ = run("--no_ssim")
    assert status == 0 and "rFID" not in rows_of(output)
    assert re.search(r"note: rFID was left out: it needs torch-fidelity .*; --fid_model takes another", output)


def test_an_exact_reconstruction_is_infinite_in_the_table():
    figures = {"model": "m", "parameters": 1, "latent_shape": [1], "latent_mean": [0.0], "latent_std": [1.0]}
    figures |= {"psnr": float("inf"), "images_per_second": {}}
    assert "inf" in script.table([figures])


BAD = {
    "a missing model": (
        ["--model", "missing/model"],
        r"--model 'missing/model' cannot be loaded: .*no folder or repo",
    ),
    "a missing second model": (["--compare", "missing/model"], "--compare 'missing/model' cannot be loaded"),
    "no data": (["--data", "missing/data/folder"], "No images found in 'missing/data/folder'"),
    "an empty folder": (["--data", "{space}/empty"], "No images found in "),
    "only broken images": (["--data", "{space}/broken"], "cannot be evaluated .*no images to measure"),
    "no labels": (["--probe_data", "{space}/train/hat"], "a probe needs labels, and --probe_data .* has none"),
    "other classes": (["--probe_data", "{space}/other"], "must have the same classes, got .*hat.* and .*b.*"),
    "a size that does not fit": (["--size", "30"], "--size 30 does not suit .*multiples of the patch size 4"),
    "no vision model": (["--fid_model", "{space}/kl"], "--fid_model .* cannot be loaded: "),
    "a size that a ViT does not take": (
        ["--fid_model", "{space}/vit", "--fid_size", "2"],
        "--fid_model .* at 2 pixels: ViT takes no images of 2 x 2 pixels",
    ),
    "a file for a folder": (["--json", "{space}/kl/config.json/x.json"], "--json .* cannot be written: "),
    "a folder for a file": (["--json", "{space}/kl"], "--json .* cannot be written: .*it is a folder"),
    "one image for a distance": (
        ["--fid_model", "{space}/vision", "--max_images", "1"],
        "Fréchet distance needs two images or more, got 1",
    ),
    "no device": (["--device", "cuda:99"], "--model .* cannot be loaded: "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_no_file(case, space, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", space / "cache")
    (space / "empty").mkdir(exist_ok=True)
    for name in ("broken/a.png", "other/a/a.png", "other/b/b.png"):
        (space / name).parent.mkdir(parents=True, exist_ok=True)
        (space / name).write_bytes(b"no image")
    argv, message = BAD[case]
    defaults = {"--model": space / "hieratok", "--data": space / "images", "--json": tmp_path / "figures.json"}
    given = [text.format(space=space) for text in argv]
    more = [str(x) for pair in defaults.items() if pair[0] not in given for x in pair]
    more += [] if "--device" in given else ["--device", "cpu"]
    assert script.main([*given, *more, "--no_ssim", *([] if "--fid_model" in given else ["--no_fid"])]) == 2
    error = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert re.match(f"error: .*{message}", error), error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "x", "--size", "0"], "--size: invalid positive value: '0'"),
        (
            ["--data", "x", "--device", "abacus"],
            "--device: must be a device of torch, such as cuda or cpu, got 'abacus'",
        ),
        (["--data", "x", "--fid_size", "64"], "--fid_size needs --fid_model"),
        (["--data", "x", "--no_fid", "--fid_model", "x"], "--no_fid and --fid_model contradict"),
        ([], "the following arguments are required: --data"),
    ],
)
def test_bad_arguments_are_refused_by_the_command_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
