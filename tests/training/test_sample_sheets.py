"""Tests of `sample_sheets`: its size, what stands in which cell, and grids that the scales do not divide."""

import numpy as np
import pytest
import torch
from helpers import images, random_core
from PIL import Image

from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.training import sample_sheets
from hieratok_hf.training.sample_sheets import images_for_sheet, label_sheet, sample_grid
from hieratok_hf.utils.images import ImageError

GAP = 2


def levels(images):
    """8-bit images `(B, H, W, 3)` of values in [-1, 1] and beyond."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def grid(sheet, rows, columns, height, width):
    """The images of a sheet, without the text above them and on their left."""
    return np.asarray(sheet)[GAP - rows * (height + GAP) :, GAP - columns * (width + GAP) :]


def cell(sheet, row, column, height, width):
    top, left = row * (height + GAP), column * (width + GAP)
    return sheet[top : top + height, left : left + width]


@pytest.mark.parametrize("size", [(32, 32), (28, 20), (4, 12)])
@pytest.mark.parametrize("factors", [(8, 4, 2, 1), (5, 3, 1), (1,)])
@torch.no_grad()
def test_a_sheet_shows_the_image_every_scale_and_the_reconstruction(size, factors):
    core, batch = random_core(scale_factors=factors), images(3, 3, *size)
    whole = sample_grid(core, batch, 7)
    (height, width), columns = size, len(factors) + 1
    sheet = grid(whole, 3, columns, height, width)
    assert (sheet[height : height + GAP] == 255).all()
    assert (sheet[:, width : width + GAP] == 255).all()
    assert whole.mode == "RGB"
    assert sheet.shape == (3 * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3)
    latents = core.encode(batch).mode()
    originals = levels(batch)
    for row in range(3):
        assert (cell(sheet, row, 0, *size) == originals[row]).all()
    for column, (image, factor) in enumerate(zip(core.decode_scales(latents), factors), start=1):
        enlarged = levels(image).repeat(factor, 1).repeat(factor, 2)[:, :height, :width]
        for row in range(3):
            assert (cell(sheet, row, column, *size) == enlarged[row]).all()
    assert (np.abs(cell(sheet, 1, columns - 1, *size).astype(int) - levels(core.decode(latents))[1]) <= 1).all()


def test_low_precision_gives_about_the_same_sheet():
    core, batch = random_core(), images(2, 3, 16, 16)
    whole = np.asarray(sample_grid(core, batch, 1)).astype(int)
    low = np.asarray(sample_grid(core.bfloat16(), batch.bfloat16(), 1)).astype(int)
    assert low.shape == whole.shape and np.abs(low - whole).mean() < 4


def test_text_tells_the_step_the_scales_and_the_psnr(monkeypatch):
    told = []
    monkeypatch.setattr(sample_sheets, "label_sheet", lambda sheet, *given: told.append(given))
    core, batch = random_core(scale_factors=(4, 1)), images(2, 3, 16, 16)
    sample_grid(core, batch, 1200)
    ((title, rows, columns),) = told
    with torch.no_grad():
        image = ((core.decode(core.encode(batch).mode()).clamp(-1, 1) + 1) * 127.5).round()
    error = (image - ((batch.clamp(-1, 1) + 1) * 127.5).round()).square().mean((1, 2, 3))
    decibels = (10 * torch.log10(255**2 / error)).tolist()
    assert "1200" in title and f"{sum(decibels) / 2:.2f} dB" in title
    assert rows == [f"{number:.1f} dB" for number in decibels] and columns == ["image", "1/4", "1/1"]


def test_text_stands_around_the_sheet_and_not_on_it():
    sheet = Image.new("RGB", (2 * 32 + GAP, 3 * 32 + 2 * GAP), "red")
    labelled = np.asarray(label_sheet(sheet, "a long title of the sheet " * 3, ["a", "b", "c"], ["left", "right"]))
    height, width = sheet.height, sheet.width
    assert (labelled[-height:, -width:] == (255, 0, 0)).all()
    above, beside = labelled[:-height], labelled[-height:, :-width]
    columns = above[len(above) // 2 :, -width:].min((0, 2))
    assert above[: len(above) // 2].min() < 128 and columns[:32].min() < 128 and columns[34:].min() < 128
    for row in range(3):
        assert beside[row * 34 : row * 34 + 32].min() < 128


def test_images_from_all_over_the_data_are_centre_cropped_and_broken_ones_left_out(tmp_path):
    for row in range(5):
        levels = np.full((20, 30, 3), 255, dtype=np.uint8)
        levels[:, 5:25] = 50 * row
        Image.fromarray(levels).save(tmp_path / f"{row}.png")
    (tmp_path / "2.png").write_bytes(b"broken")
    found = images_for_sheet(load_images(str(tmp_path)), 8, count=3)
    torch.testing.assert_close(found[:, 0, 4, 4], torch.tensor([0.0, 200.0]) / 127.5 - 1)
    assert found.shape == (2, 3, 8, 8)
    streamed = images_for_sheet(load_images(str(tmp_path), streaming=True), 8, count=3)
    torch.testing.assert_close(streamed[:, 0, 4, 4], torch.tensor([0.0, 50.0]) / 127.5 - 1)
    for row in range(5):
        (tmp_path / f"{row}.png").write_bytes(b"broken")
    with pytest.raises(ImageError, match="no image"):
        images_for_sheet(load_images(str(tmp_path)), 8)
