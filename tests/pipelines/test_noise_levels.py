"""The noise of a scheduler's steps, and the clean latents that a perfect model predicts from them."""

import math
import re

import diffusers
import pytest
import torch
from helpers import noise
from tiny_pipelines import FLOW, FLOW_SCHEDULERS

from hieratok_hf.pipelines.noise_levels import NoiseLevel, noise_levels, prediction_type_of, read_noise_levels

# Latents of the latter are not of unit variance, until they are scaled.
PLAIN = ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
SCALED = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")


@pytest.mark.parametrize("scheduler", FLOW_SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_with_flow_matching_the_share_is_the_time(scheduler):
    scheduler.set_timesteps(8)
    times = scheduler.timesteps.float() / scheduler.config.num_train_timesteps
    levels = noise_levels(scheduler)
    assert prediction_type_of(scheduler) == "flow_prediction"
    assert len(levels) == len(times)
    for index, level in enumerate(levels):
        assert level.kind == "flow_prediction" and level.signal + level.noise == pytest.approx(1)
        assert level.share == pytest.approx(times[index].item(), abs=1.1e-3)  # some round the time to whole numbers
        clean, eps = noise(2, 4, 3, 3), noise(2, 4, 3, 3, seed=1)
        noisy = level.signal * clean + level.noise * eps
        torch.testing.assert_close(level.clean(noisy, eps - clean), clean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", [*PLAIN, *SCALED])
def test_a_perfect_prediction_gives_the_clean_latents(name, kind):
    scheduler = getattr(diffusers, name)(prediction_type=kind)
    assert prediction_type_of(scheduler) == kind
    scheduler.set_timesteps(6)
    clean, eps = noise(2, 4, 3, 3), noise(2, 4, 3, 3, seed=1)
    shares = []
    for index, t in enumerate(scheduler.timesteps):
        level = noise_levels(scheduler)[index]
        shares.append(level.share)
        # What the model is fed, by the scheduler's own arithmetic.
        noisy = scheduler.add_noise(clean, eps, t[None])
        fed = noisy / math.hypot(1, float(scheduler.sigmas[index])) if name in SCALED else noisy
        velocity = level.signal * eps - level.noise * clean
        given = {"epsilon": eps, "v_prediction": velocity, "sample": clean}[kind]
        torch.testing.assert_close(level.clean(fed, given), clean, atol=2e-2, rtol=1e-3)
    assert shares == sorted(shares, reverse=True) and 0 <= shares[-1] < shares[0] <= 1


@pytest.mark.parametrize("name", ["HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"])
def test_schedulers_of_the_second_order_feed_the_model_what_the_signal_says(name):
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    scheduler.set_timesteps(5)
    for t, level in zip(scheduler.timesteps, read_noise_levels(scheduler)):
        assert float(scheduler.scale_model_input(torch.ones(1), t)) == pytest.approx(level.signal, rel=1e-5)
        scheduler.step(torch.zeros(1), t, torch.ones(1))


def test_clean_latents_and_noise_alone():
    assert NoiseLevel(1.0, 0.0, "epsilon").share == 0
    assert NoiseLevel(0.0, 1.0, "epsilon").share == 1
    zeros = NoiseLevel(0.0, 1.0, "epsilon").clean(noise(1, 4, 2, 2), noise(1, 4, 2, 2))
    assert torch.isfinite(zeros).all()
    # Zero terminal signal-to-noise: the first step is noise alone.
    no_signal = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = diffusers.DDIMScheduler(**no_signal, prediction_type="v_prediction")
    scheduler.set_timesteps(4)
    assert noise_levels(scheduler)[0].share == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.EDMEulerScheduler(), "EDMEulerScheduler"),
        (diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "use_flow_sigmas=False"),
        (diffusers.DDIMScheduler(prediction_type="flow_prediction"), "DDIMScheduler, which cannot do flow matching"),
        (diffusers.IPNDMScheduler(), "prediction type None"),
        (diffusers.CogVideoXDPMScheduler(), "CogVideoXDPMScheduler, which asks for"),
        (object(), "is a object"),
    ],
)
def test_a_scheduler_that_fits_no_transformer_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        prediction_type_of(scheduler)


def test_what_flow_matching_needs_is_told_by_the_call_that_makes_it():
    config = diffusers.FlowMatchEulerDiscreteScheduler().config
    with pytest.raises(ValueError, match=r"use_flow_sigmas=True and prediction_type='epsilon'") as caught:
        prediction_type_of(diffusers.DPMSolverMultistepScheduler.from_config(config, use_flow_sigmas=True))
    (call,) = re.findall(r"\w+\.from_config\(.*\)", str(caught.value))
    assert prediction_type_of(eval(call, vars(diffusers) | {"config": config})) == "flow_prediction"


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.DDIMInverseScheduler(), "noise rises"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "noise rises"),
        (diffusers.DEISMultistepScheduler(**FLOW), "ends with a share of noise of 0.10"),
    ],
)
def test_a_scheduler_that_does_not_end_at_clean_latents_is_refused(scheduler, message):
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=message):
        noise_levels(scheduler)
