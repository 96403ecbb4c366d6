"""Tests of `hieratok preview`: the sheet shows what the scales make of the images, and bad input is refused."""

import re

import numpy as np
import pytest
import torch
from archive_files import SIZES, write_images
from helpers import random_core
from PIL import Image
from scripts import error_of, usage_error

from hieratok_hf import AutoencoderHieraTok
from hieratok_hf.cli import preview as script
from hieratok_hf.data.latent_archive import LatentArchive, decode_record, write_archive
from hieratok_hf.models.autoencoder_adapter import Codec


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A folder with a model and an archive, and one of no image."""
    folder, core = tmp_path_factory.mktemp("preview"), random_core()
    AutoencoderHieraTok.from_core(core).save_pretrained(folder / "hieratok")
    records = write_images(folder / "in")
    write_archive(core, records, folder / "archive", model=str(folder / "hieratok"), dtype=torch.float32)
    (folder / "bad").mkdir()
    (folder / "bad" / "a.png").write_bytes(b"no image")
    write_archive(core, folder / "bad", folder / "nothing", model=str(folder / "hieratok"))
    return folder


@pytest.fixture
def run(space):
    def call(sheet, *given, archive="archive"):
        return script.main([str(x) for x in (space / archive, sheet, "--device", "cpu", *given)])

    return call


def test_a_square_a_image(run, space, tmp_path, capsys):
    codec, entries = Codec(random_core()), list(LatentArchive(space / "archive"))
    for given, scales in (([], 2), (["--num_scales", 4], 4)):
        sheet, side = tmp_path / "new" / "sheet.png", 64
        assert run(sheet, "--side", side, "--max_images", 5, "--columns", 3, "--overwrite", *given) == 0
        assert capsys.readouterr().out == f"5 of {len(SIZES)} images on {str(sheet)!r}\n"
        pixels = np.asarray(Image.open(sheet))
        width, height = side + script.MARGIN, side + script.LABEL + script.MARGIN
        assert pixels.shape == (2 * height + script.MARGIN, 3 * width + script.MARGIN, 3)
        for index, (record, latent) in enumerate(entries[:5]):
            left, top = script.MARGIN + index % 3 * width, script.MARGIN + index // 3 * height
            cell = pixels[top : top + side, left : left + side]
            image = decode_record(codec, record, latent, scales)
            factor = side / max(image.size)
            panel = image.resize([max(1, round(x * factor)) for x in image.size], Image.Resampling.BICUBIC)
            x, y = (side - panel.width) // 2, (side - panel.height) // 2
            assert np.array_equal(cell[y : y + panel.height, x : x + panel.width], np.asarray(panel)), record.name
            label = pixels[top + side : top + height - script.MARGIN, left : left + side]
            assert label.min() < 100, record.name
        assert (pixels[-height:, 2 * width + script.MARGIN :] == 255).all()  # a sixth is not shown
        assert (pixels[:, -script.MARGIN :] == 255).all()  # no name runs into the margin


def test_narrow_images_and_long_names_fit(tmp_path):
    sheet = script.make_sheet([("a" * 300 + "\n.png", Image.new("RGB", (1, 5000)))], 8, 16)
    assert sheet.size == (16 + 2 * script.MARGIN, 16 + 2 * script.MARGIN + script.LABEL)


def test_a_sheet_that_is_there_is_replaced_only_if_that_is_asked_for(run, tmp_path, capsys):
    path = tmp_path / "sheet.png"
    path.write_text("mine")
    assert run(path) == 2 and "add --overwrite" in error_of(capsys) and path.read_text() == "mine"
    assert run(path, "--overwrite") == 0 and Image.open(path).format == "PNG"


BAD = {
    "too many scales": ("sheet.png", ["--num_scales", 5], "archive", "--num_scales must be from 1 to 4, got 5"),
    "no archive": ("sheet.png", [], "in", r"ARCHIVE .*archive\.json"),
    "no images": ("sheet.png", [], "nothing", "ARCHIVE .*holds no images"),
}


@pytest.mark.parametrize(("sheet", "given", "archive", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_no_file(sheet, given, archive, message, run, tmp_path, capsys):
    assert run(tmp_path / sheet, *given, archive=archive) == 2
    assert re.match(f"error: {message}", error_of(capsys)) and not list(tmp_path.iterdir())


def test_other_suffixes_are_refused(tmp_path, capsys):
    text = usage_error(capsys, script.main, tmp_path / "archive", tmp_path / "sheet.pdf")
    assert "SHEET must end with one of .png" in text and not list(tmp_path.iterdir())
