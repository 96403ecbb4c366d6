"""What a pipeline is called with, in every form that it may have; `tests/hostile/test_pipeline.py` has the others."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import noise
from PIL import Image
from torch import nn

from hieratok_hf.pipelines.call_arguments import (
    evaluating,
    take_falling,
    take_generators,
    take_images,
    take_interval,
    take_latents,
)


@pytest.mark.parametrize(
    "given", [(0, 0.5), [0.0, 0.5], np.array([0, 0.5]), torch.tensor([0, 0.5]), (0, Fraction(1, 2))]
)
def test_intervals(given):
    assert take_interval(given) == (0.0, 0.5)


@pytest.mark.parametrize(
    "given", [[3, 2, 0], (3.0, 2.0, 0.0), range(3, -1, -1), np.array([3, 2, 0]), torch.tensor([3, 2, 0])]
)
def test_falling_numbers(given):
    taken = take_falling("sigmas", given, math.inf)
    assert taken == [float(number) for number in given] and type(taken) is list
    assert take_falling("sigmas", None, 1) is None


def test_generators():
    one, other = torch.Generator(), torch.Generator()
    assert take_generators(None, 2) is None and take_generators(one, 2) is one
    for given in ([one, other], (one, other)):
        assert take_generators(given, 2) == [one, other]
    with pytest.raises(ValueError, match=r"`generator` .*`torch\.Generator\(\)\.manual_seed\(7\)`"):
        take_generators(7, 1)
    with pytest.raises(ValueError, match=r"`generator` .* 3 images, got 2"):
        take_generators([one, other], 3)


def test_latents_of_a_callback_get_the_dtype_of_the_step():
    latents = noise(1, 4, 2, 2)
    for nothing in (None, {}, {"clean_latents": None}):
        assert take_latents(nothing, latents) is latents
    changed = take_latents({"latents": torch.ones(1, 4, 2, 2, dtype=torch.bfloat16)}, latents)
    assert changed.dtype == torch.float32 and changed.eq(1).all()


LEVELS = np.random.default_rng(0).integers(0, 256, (2, 6, 4, 3), dtype=np.uint8)
SHARES = torch.from_numpy(LEVELS).permute(0, 3, 1, 2) / 255
FORMS = {
    "PIL": [Image.fromarray(image) for image in LEVELS],
    "PIL with transparency": [Image.fromarray(image).convert("RGBA") for image in LEVELS],
    "levels": LEVELS,
    "arrays": list(LEVELS / 255),
    "big-endian": (LEVELS / 255).astype(">f4"),
    "tensor": SHARES,
    "tensors": (SHARES[0], SHARES[1].double()),
    "tensor of levels": torch.from_numpy(LEVELS).permute(0, 3, 1, 2),
    "mixed": [Image.fromarray(LEVELS[0]), SHARES[1:]],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_images_is_the_same(form):
    pixel_values = take_images(FORMS[form], 2, (6, 4))
    assert pixel_values.dtype == torch.float32
    torch.testing.assert_close(pixel_values, 2 * SHARES - 1, atol=1e-6, rtol=0)
    first = take_images(FORMS[form][0], 2, (6, 4))
    torch.testing.assert_close(first, 2 * SHARES[:1] - 1, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (LEVELS.astype(np.int64), r"in uint8 or of floating point.* \(2, 6, 4, 3\) of int64"),
        (LEVELS.astype(np.uint16), "in uint8 or of floating point.* of uint16"),
        (torch.from_numpy(LEVELS).permute(0, 3, 1, 2).int(), r"in uint8 or of floating point.* of torch\.int32"),
        (LEVELS.astype(np.float32), r"of uint8 or lie in \[0, 1\].*float32 with values from 0 to 2"),
        (SHARES.permute(0, 2, 3, 1), r"\(3, 6, 4\), or several.*got \(2, 6, 4, 3\) of torch.float32"),
        (SHARES * torch.nan, r"of uint8 or lie in \[0, 1\].*nan"),
    ],
)
def test_images_of_other_dtypes_and_values_are_told_from_those_that_serve(image, message):
    with pytest.raises(ValueError, match=f"`image` must be .*{message}"):
        take_images(image, 2, (6, 4))


def test_of_an_image_of_pil_the_middle_is_taken():
    wide = Image.new("L", (60, 20))
    wide.paste(255, (20, 0, 40, 20))
    assert torch.equal(take_images(wide, 1, (20, 20)), torch.ones(1, 3, 20, 20))
    assert take_images(wide, 1, (8, 40)).shape == (1, 3, 8, 40)
    with pytest.raises(ValueError, match="image must have pixels"):
        take_images(Image.new("RGB", (0, 8)), 1, (8, 8))


def test_a_model_is_evaluated_and_gets_its_mode_back_after_an_error_too():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()).eval())
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == [True, True, False, False]
