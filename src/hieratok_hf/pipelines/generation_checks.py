"""What a pipeline refuses before it begins: parts that do not fit together, and arguments out of their range."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from .noise_levels import predicted_for

__all__ = ["check_numbers", "check_parts", "check_previews", "check_scheduler"]


def check_parts(vae: Any, transformer: Any, id2label: Mapping[int, str]) -> None:
    """`ValueError` unless a transformer denoises a tokenizer's latents and has the classes that are named."""
    channels, config = vae.config.latent_channels, transformer.config
    for name in ("in_channels", "sample_size", "num_embeds_ada_norm"):
        if not isinstance(config.get(name), int):
            raise ValueError(f"`transformer` must have a whole number {name!r} in its configuration.")
    if config.in_channels != channels:
        raise ValueError(
            f"`transformer` takes latents of {config.in_channels} channels, those of `vae` have {channels}."
        )
    # As many again are a predicted variance, which is not used.
    if (out := config.get("out_channels") or channels) not in (channels, 2 * channels):
        raise ValueError(f"`transformer` must give {channels} channels or twice as many, it gives {out}.")
    if config.sample_size % (patch := config.get("patch_size") or 1):
        raise ValueError(
            f"`transformer` has a sample size of {config.sample_size}, which is no multiple of its patch size {patch}."
        )
    if wrong := [key for key in id2label if not 0 <= key < config.num_embeds_ada_norm]:
        raise ValueError(
            f"`id2label` names the class {wrong[0]}, `transformer` has the classes 0 to "
            f"{config.num_embeds_ada_norm - 1}."
        )


def check_numbers(
    num_inference_steps: int,
    guidance_scale: float,
    guidance_interval: tuple[float, float],
    num_images_per_prompt: int,
) -> None:
    """`ValueError` with the name of the argument that is out of its range."""
    counts = {"num_inference_steps": num_inference_steps, "num_images_per_prompt": num_images_per_prompt}
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a positive whole number, got {value!r}.")
    if not 1 <= guidance_scale < math.inf:
        raise ValueError(f"`guidance_scale` must be at least 1, which is none, and finite; got {guidance_scale}.")
    if len(guidance_interval) != 2 or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
        raise ValueError(
            f"`guidance_interval` must be two rising shares of noise from 0 to 1, got {guidance_interval}."
        )


def check_scheduler(scheduler: Any, prediction_type: str) -> None:
    """`ValueError` unless a scheduler is for a transformer of that prediction type."""
    if scheduler.config.get("use_dynamic_shifting"):
        raise ValueError(
            "`scheduler` has use_dynamic_shifting=True, by the length of a prompt's picture: give it False."
        )
    if (kind := predicted_for(scheduler)) == prediction_type:
        return
    flow = ", use_flow_sigmas=True" if prediction_type == "flow_prediction" else ""
    raise ValueError(
        f"`scheduler` is a {type(scheduler).__name__} for a transformer of prediction type {kind!r}, this one's is "
        f"{prediction_type!r}: give the scheduler's `from_config` prediction_type={prediction_type!r}{flow}, if it "
        "can have it, or take another scheduler."
    )


def check_previews(vae: Any, preview_scales: int, callback: Any) -> None:
    """`ValueError` unless a tokenizer has that many scales, and somebody gets the previews."""
    if callback is None:
        raise ValueError("`preview_scales` needs a `callback_on_step_end`, which gets the previews.")
    if "num_scales" not in inspect.signature(vae.decode).parameters:
        raise ValueError(f"`preview_scales` needs a tokenizer with scales, `vae` is a {type(vae).__name__}.")
    scales = len(vae.config.scale_factors)
    if not isinstance(preview_scales, int) or not 1 <= preview_scales <= scales:
        raise ValueError(f"`preview_scales` must be from 1 to the {scales} scales of `vae`, got {preview_scales!r}.")
