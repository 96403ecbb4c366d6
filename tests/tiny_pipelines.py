"""Tiny pipelines with weights that are random everywhere, shared by the tests."""

from typing import Any

import diffusers
import torch
from helpers import random_core

from hieratok_hf import AutoencoderHieraTok, HieraTokDiTPipeline
from hieratok_hf.training.flow_matching import dit_from_size

NAMES = ("tench", "English_springer", "church, church building", "French_horn", "golf_ball")
SIDE = 2
"""Of the latent's grid."""
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FLOW_SCHEDULERS = [
    diffusers.FlowMatchEulerDiscreteScheduler(),
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    diffusers.FlowMatchHeunDiscreteScheduler(),
    diffusers.DPMSolverMultistepScheduler(**FLOW),
    diffusers.UniPCMultistepScheduler(**FLOW),
]


def make_pipeline(
    vae_overrides: dict[str, Any] | None = None, scheduler: Any = None, seed: int = 0
) -> HieraTokDiTPipeline:
    """A pipeline on the CPU that makes images of 8 x 8 pixels of the first three classes of `NAMES`."""
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderHieraTok.from_core(random_core(seed, **(vae_overrides or {}))).eval()
        transformer = dit_from_size(
            "dit-tiny", in_channels=vae.config.latent_channels, sample_size=SIDE, num_classes=3, **sizes
        ).eval()
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
    scheduler = scheduler or diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = HieraTokDiTPipeline(vae, transformer, scheduler, id2label=dict(enumerate(NAMES[:3])))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_pipeline(folder: Any, **arguments: Any) -> str:
    """A folder with a saved pipeline of `make_pipeline`."""
    make_pipeline(**arguments).save_pretrained(folder)
    return str(folder)
