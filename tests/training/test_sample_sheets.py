"""Tests of `sample_sheets`: its size, what stands in which cell, and grids that the scales do not divide."""

import numpy as np
import pytest
import torch
from helpers import images, random_core

from hieratok_hf.training.sample_sheets import sample_grid

GAP = 2


def levels(images):
    """8-bit images `(B, H, W, 3)` of values in [-1, 1] and beyond."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def cell(sheet, row, column, height, width):
    top, left = row * (height + GAP), column * (width + GAP)
    return np.asarray(sheet)[top : top + height, left : left + width]


@pytest.mark.parametrize("size", [(32, 32), (28, 20), (4, 12)])
@pytest.mark.parametrize("factors", [(8, 4, 2, 1), (5, 3, 1), (1,)])
@torch.no_grad()
def test_a_sheet_shows_the_image_every_scale_and_the_reconstruction(size, factors):
    core, batch = random_core(scale_factors=factors), images(3, 3, *size)
    sheet = sample_grid(core, batch)
    (height, width), columns = size, len(factors) + 1
    assert (np.asarray(sheet)[height : height + GAP] == 255).all()
    assert (np.asarray(sheet)[:, width : width + GAP] == 255).all()
    assert sheet.mode == "RGB"
    assert sheet.size == (columns * (width + GAP) - GAP, 3 * (height + GAP) - GAP)
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
    whole = np.asarray(sample_grid(core, batch)).astype(int)
    low = np.asarray(sample_grid(core.bfloat16(), batch.bfloat16())).astype(int)
    assert low.shape == whole.shape and np.abs(low - whole).mean() < 4
