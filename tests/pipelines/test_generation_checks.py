"""What a pipeline refuses before it begins."""

from types import SimpleNamespace

import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from hieratok_hf.pipelines.generation_checks import check_numbers, check_parts, check_previews, check_scheduler

NUMBERS = {
    "num_inference_steps": 4,
    "guidance_scale": 2.0,
    "guidance_interval": (0.0, 1.0),
    "num_images_per_prompt": 1,
}


VAE = SimpleNamespace(config=SimpleNamespace(latent_channels=4))
SIZES = {"in_channels": 4, "sample_size": 8, "num_embeds_ada_norm": 3}


class Config(dict):
    __getattr__ = dict.__getitem__


def transformer(**overrides):
    return SimpleNamespace(config=Config({**SIZES, **overrides}))


@pytest.mark.parametrize(
    "overrides", [{}, {"out_channels": None}, {"out_channels": 4}, {"out_channels": 8}, {"patch_size": 2}]
)
def test_parts_that_fit_pass(overrides):
    check_parts(VAE, transformer(**overrides), {0: "a", 2: "b"})


@pytest.mark.parametrize(
    ("overrides", "names", "message"),
    [
        ({"in_channels": 16}, {}, "takes latents of 16 channels, those of `vae` have 4"),
        ({"out_channels": 5}, {}, "4 channels or twice as many, it gives 5"),
        ({"patch_size": 5}, {}, "sample size of 8, which is no multiple of its patch size 5"),
        ({"num_embeds_ada_norm": None}, {}, "must have a whole number 'num_embeds_ada_norm'"),
        ({"sample_size": (8, 8)}, {}, "must have a whole number 'sample_size'"),
        ({}, {3: "c"}, "names the class 3, `transformer` has the classes 0 to 2"),
    ],
)
def test_parts_that_do_not_fit_are_named(overrides, names, message):
    with pytest.raises(ValueError, match=message):
        check_parts(VAE, transformer(**overrides), names)


def test_numbers_in_their_range_pass():
    check_numbers(**NUMBERS)
    check_numbers(**{**NUMBERS, "guidance_scale": 1, "guidance_interval": [0.2, 0.2]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_inference_steps", 0),
        ("num_inference_steps", 2.5),
        ("num_images_per_prompt", -1),
        ("guidance_scale", 0.99),
        ("guidance_scale", float("nan")),
        ("guidance_interval", (0.5, 0.4)),
        ("guidance_interval", (-0.1, 0.4)),
        ("guidance_interval", (0.1, 0.2, 0.3)),
    ],
)
def test_a_number_out_of_its_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        check_numbers(**{**NUMBERS, name: value})


def test_a_scheduler_must_be_of_the_transformers_kind():
    check_scheduler(FlowMatchEulerDiscreteScheduler(), "flow_prediction")
    check_scheduler(DDIMScheduler(), "epsilon")
    with pytest.raises(ValueError, match=r"prediction_type='flow_prediction', use_flow_sigmas=True"):
        check_scheduler(DPMSolverMultistepScheduler(), "flow_prediction")
    with pytest.raises(ValueError, match="prediction type 'epsilon', this one's is 'v_prediction'"):
        check_scheduler(DDIMScheduler(), "v_prediction")


def test_a_shift_by_the_length_of_a_prompt_is_refused():
    with pytest.raises(ValueError, match="use_dynamic_shifting=True"):
        check_scheduler(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "flow_prediction")


def test_previews_need_scales_and_somebody_to_see_them():
    class Tokenizer:
        config = SimpleNamespace(scale_factors=(2, 1))

        def decode(self, z, num_scales=None):
            return z

    check_previews(Tokenizer(), 2, print)
    for scales in (0, 3, 1.5):
        with pytest.raises(ValueError, match="from 1 to the 2 scales"):
            check_previews(Tokenizer(), scales, print)
    with pytest.raises(ValueError, match="needs a `callback_on_step_end`"):
        check_previews(Tokenizer(), 1, None)
    with pytest.raises(ValueError, match="needs a tokenizer with scales, `vae` is a SimpleNamespace"):
        check_previews(SimpleNamespace(decode=lambda z: z), 1, print)
