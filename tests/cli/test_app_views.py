"""Tests of what the page of `hieratok app` shows: figures, files of the same size, limits, its own images."""

import argparse
import io
import re

import numpy as np
import pytest
from image_files import noise, png, saved
from PIL import Image
from scripts import ROOT

import hieratok_hf
from hieratok_hf import example_image
from hieratok_hf.cli import app_views
from hieratok_hf.cli.reconstruct import encode_and_decode, reconstruct
from hieratok_hf.data.latent_archive import write_archive
from hieratok_hf.models.autoencoder_adapter import Codec

pytest.importorskip("torchmetrics", reason="it computes the SSIM")

IMAGES = ROOT / "src" / "hieratok_hf" / "page_images"


@pytest.fixture(scope="module")
def vae():
    return hieratok_hf.AutoencoderHieraTok.from_pretrained(hieratok_hf.pretrained("hieratok-tiny"))


def hat(folder, size, name):
    return saved(folder, Image.open(example_image("hat")).resize(size), name)


def test_views_and_figures_are_those_of_the_script(vae, tmp_path):
    path = hat(tmp_path, (203, 91), "odd.png")
    images, choices, table = app_views.make_views(app_views.read_photo(str(path)), vae)
    _, figures = reconstruct(path, vae, argparse.Namespace(size=None, full=False))

    rows = dict(re.fullmatch(r"\| (.*) \| (.*) \|", line).groups() for line in table.splitlines())
    assert (figures["width"], figures["height"]) == (200, 88) and rows["`odd.png`"] == "203 x 91 pixels"
    assert rows["Likeness (PSNR)"].startswith(f"{figures['psnr_db']:.2f} dB")
    assert rows["Likeness (SSIM)"].startswith(f"{figures['ssim']:.4f}")
    assert rows["What is kept"] == "16 x 11 x 25 = 4,400 numbers"
    assert rows["What is given"] == "3 x 88 x 200 = 52,800 numbers"
    assert rows["Fewer numbers"] == f"{figures['compression']:.1f} times" == "12.0 times"

    views, captions = zip(*images)
    assert [index for _, index in choices] == list(range(1, len(views)))
    assert {view.size for view in views} == {(200, 88)}
    finest, *coarse = reversed(figures["scales_psnr_db"])
    assert f"{finest:.1f} dB" in captions[1] and captions[2].startswith("JPEG of ")
    sizes = [(-(-25 // f) * 8, -(-11 // f) * 8) for f in reversed(vae.config.scale_factors[:-1])]
    for scale, view, caption, size, decibels in zip((3, 2, 1), views[4:], captions[4:], sizes, coarse, strict=True):
        assert caption.startswith(f"scale {scale} of 4: {size[0]} x {size[1]} pixels, {decibels:.1f} dB")
        assert len(np.unique(np.asarray(view).reshape(-1, 3), axis=0)) <= np.prod(size)  # enlarged, not smoothed
    original, reconstruction, lost = (np.asarray(views[index]).astype(int) for index in (0, 1, 3))
    np.testing.assert_array_equal(lost, np.minimum(255, 4 * abs(original - reconstruction)))


def test_the_size_is_that_of_the_file_that_encode_writes(vae, tmp_path):
    (tmp_path / "images").mkdir()
    image = Image.open(hat(tmp_path / "images", (200, 88), "image.png"))
    *_, latents, _ = encode_and_decode(image, vae)
    for levels, bits, suffix, options in ((vae.quantizer, 8, "xz", " --bits 8"), (None, None, "safetensors", "")):
        folder = tmp_path / suffix
        write_archive(Codec(vae), tmp_path / "images", folder, model="x", bits=bits)
        (shard,) = folder.glob(f"*.{suffix}")
        assert app_views.count_stored_bytes(latents, image.size, levels) == (shard.stat().st_size, options)


def test_the_best_jpeg_within_a_number_of_bytes():
    image = Image.open(example_image("hat")).resize((96, 64))
    sizes = [len(app_views.save_as_jpeg(image, quality)) for quality in range(1, 96)]
    for most in (sizes[29], sizes[30] - 1, 10**9):
        content, quality = app_views.find_jpeg(image, most)
        assert len(content) <= most and Image.open(io.BytesIO(content)).format == "JPEG"
        assert quality == 95 or sizes[quality] > most  # the next one is larger
    content, quality = app_views.find_jpeg(image, 10)
    assert quality == 1 and len(content) == sizes[0] > 10


def test_a_jpeg_that_cannot_be_as_small_says_so(vae, monkeypatch, tmp_path):
    photo = app_views.read_photo(str(hat(tmp_path, (64, 64), "small.png")))
    monkeypatch.setattr(app_views, "count_stored_bytes", lambda *_: (100, ""))
    (_, caption) = app_views.make_views(photo, vae).images[2]
    assert "quality 1 of 100" in caption and "larger than 0.1 kB" in caption


def test_large_images_are_made_smaller_and_it_is_said(tmp_path):
    path = hat(tmp_path, (2 * app_views.MAX_SIDE, 512), "wide.png")
    photo = app_views.read_photo(str(path))
    assert photo.image.size == (app_views.MAX_SIDE, 256) and photo.name == "wide.png"
    assert photo.size == f"{2 * app_views.MAX_SIDE} x 512 pixels, made smaller: 768 x 256"


def test_files_that_cannot_be_used(vae, tmp_path):
    whole = saved(tmp_path, Image.fromarray(noise(64, 64)), "whole.png").read_bytes()
    files = {
        "text.jpg": (b"no image", ["is no image"]),
        "cut.png": (whole[:2000], ["cannot be decoded"]),
        "huge.png": (png(8000, 6250, 8, 2), ["32 megapixels", "8000 x 6250"]),
        "heavy.png": (whole + bytes(21 * 2**20), ["20 MB", "21.0 MB"]),
        "slim.png": (saved(tmp_path, Image.fromarray(noise(7, 30)), "slim.png").read_bytes(), ["got 7 x 30"]),
    }
    for name, (content, expected) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(app_views.Refused) as refusal:
            app_views.make_views(app_views.read_photo(str(tmp_path / name)), vae)
        message = str(refusal.value)
        assert message.startswith(f"{name!r}: ") and all(part in message for part in expected)
        assert str(tmp_path) not in message and "\n" not in message
    with pytest.raises(app_views.Refused):
        app_views.read_photo(None)


def test_the_page_s_own_images_are_small_and_have_a_source():
    told = (IMAGES / "README.md").read_text()
    paths = sorted(IMAGES.glob("*.webp"))
    assert len(paths) == 4 and all(f"| `{path.name}` (" in told for path in paths)
    for path in paths:
        size = app_views.read_photo(str(path)).image.size
        assert f"`{path.name}` ({size[0]}x{size[1]})" in told and 512 <= max(size) <= app_views.MAX_SIDE
    assert sum(path.stat().st_size for path in paths) < 300_000
