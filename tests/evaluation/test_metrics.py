"""Tests of `metrics`: known values, other libraries' values, independence of the batch, 8 bits, and refusals."""

import importlib
import math
import sys

import numpy as np
import pytest
import torch
from helpers import noise

from hieratok_hf import evaluation
from hieratok_hf.evaluation import metrics
from hieratok_hf.evaluation.metrics import SSIM_WINDOW, border_steps, psnr, ssim


def from_levels(levels):
    """Images in [-1, 1] of levels in 0 ... 255."""
    return torch.as_tensor(levels, dtype=torch.float32) / 127.5 - 1


def random_levels(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


def noisy(levels, amount):
    return (levels + amount * noise(*levels.shape, seed=1)).round().clamp(0, 255)


def ssim_by_hand(first, second):
    """SSIM of Wang et al. in float64 numpy, `(3, H, W)` levels, edges reflected."""
    gaussian_filter = pytest.importorskip("scipy.ndimage").gaussian_filter

    def blur(x):
        return gaussian_filter(x, sigma=1.5, radius=SSIM_WINDOW // 2, mode="mirror", axes=(1, 2))

    a, b = (np.asarray(x, dtype=np.float64) for x in (first, second))
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return (top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean()


def test_seams_are_steps_across_borders_alone():
    patches = random_levels(1, 3, 4, 4).float().repeat_interleave(8, 2).repeat_interleave(8, 3)
    across, inside = border_steps(from_levels(patches), 8)[0]
    assert across > 10 and inside == 0
    for patch_size in (1, 32):
        with pytest.raises(ValueError, match="`patch_size`"):
            border_steps(from_levels(patches), patch_size)


def test_psnr_of_a_known_error():
    targets = torch.full((2, 3, 4, 5), 100)
    images = targets.clone()
    images[0] += 5  # mean squared error 25
    images[1, 0, 0, 0] += 30  # 900 / 60 = 15
    values = psnr(from_levels(images), from_levels(targets))
    assert values.dtype == torch.float32
    expected = [10 * math.log10(255**2 / 25), 10 * math.log10(255**2 / 15)]
    assert values.tolist() == pytest.approx(expected, abs=1e-4)
    black, white = -torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    assert psnr(black, white).tolist() == [0.0] and psnr(white, white).tolist() == [math.inf]


def test_both_sides_are_clamped_and_rounded_to_8_bits():
    levels = random_levels(1, 3, 16, 16)
    images = from_levels(levels)
    assert psnr(images + 0.4 / 127.5, images).item() == math.inf
    assert psnr(images, images - 0.4 / 127.5).item() == math.inf
    assert psnr(torch.full((1, 3, 2, 2), 1.7), torch.ones(1, 3, 2, 2)).item() == math.inf
    assert psnr(images + 0.6 / 127.5, images).item() < 60


def test_psnr_takes_low_precision_and_gradients():
    images = from_levels(random_levels(1, 3, 16, 16)).requires_grad_()
    value = psnr(images.bfloat16(), images)
    assert value.dtype == torch.float32 and not value.requires_grad
    assert value.item() == math.inf  # bfloat16 is off by a quarter of a level at most


def test_ssim_equals_the_definition():
    pytest.importorskip("torchmetrics")
    first = random_levels(1, 3, 21, 30)
    second = noisy(first, 40)
    value = ssim(from_levels(second), from_levels(first))
    assert value.shape == (1,) and value.dtype == torch.float32
    assert value.item() == pytest.approx(ssim_by_hand(second[0], first[0]), abs=1e-4)
    assert ssim(*[from_levels(first)] * 2).item() == pytest.approx(1, abs=1e-6)


GOOD = torch.zeros(1, 3, 16, 16)
BAD = {
    "rank": GOOD[0],
    "channels": GOOD[:, :1],
    "empty": GOOD[:0],
    "dtype": GOOD.byte(),
    "nan": GOOD + math.nan,
    "levels": GOOD + 200,
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_named(case):
    with pytest.raises(ValueError, match="`images` must"):
        psnr(BAD[case], GOOD)
    with pytest.raises(ValueError, match="`targets` must"):
        psnr(GOOD, BAD[case])


def test_images_of_different_size_or_too_small_are_refused():
    with pytest.raises(ValueError, match="same shape"):
        psnr(GOOD.expand(2, -1, -1, -1), GOOD)  # would broadcast
    pytest.importorskip("torchmetrics")
    with pytest.raises(ValueError, match="`images`"):
        ssim(*[torch.zeros(1, 3, SSIM_WINDOW - 1, 40)] * 2)
    assert ssim(*[torch.zeros(1, 3, SSIM_WINDOW, SSIM_WINDOW)] * 2).item() == pytest.approx(1)


def test_torchmetrics_is_imported_where_it_is_needed(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.delitem(sys.modules, metrics.__name__)
    monkeypatch.setattr(evaluation, "metrics", None)  # so that what is imported anew is taken back
    fresh = importlib.import_module(metrics.__name__)
    with pytest.raises(ImportError, match=r"pip install 'hieratok_hf\[eval\]'"):
        fresh.ssim(GOOD, GOOD)
    assert fresh.psnr(GOOD, GOOD).item() == math.inf
