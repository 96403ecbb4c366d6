"""What a pipeline is called with, in every form that it may have; `tests/hostile/test_pipeline.py` has the others."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import noise
from torch import nn

from hieratok_hf.pipelines.call_arguments import (
    evaluating,
    take_falling,
    take_generators,
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
    with pytest.raises(ValueError, match=r"`generator` .* 3 images, got 2"):
        take_generators([one, other], 3)


def test_latents_of_a_callback_get_the_dtype_of_the_step():
    latents = noise(1, 4, 2, 2)
    for nothing in (None, {}, {"clean_latents": None}):
        assert take_latents(nothing, latents) is latents
    changed = take_latents({"latents": torch.ones(1, 4, 2, 2, dtype=torch.bfloat16)}, latents)
    assert changed.dtype == torch.float32 and changed.eq(1).all()


def test_a_model_is_evaluated_and_gets_its_mode_back_after_an_error_too():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()).eval())
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == [True, True, False, False]
