"""The pipeline: it ends where a perfect transformer points, whatever the scheduler, and refuses what cannot be."""

import json
import logging
import subprocess
import sys
import warnings
from unittest.mock import Mock

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.guiders.adaptive_projected_guidance import normalized_guidance
from diffusers.models.modeling_utils import ModelMixin
from helpers import TINY, images, noise, random_core, tree
from PIL import Image
from tiny_pipelines import FLOW, FLOW_SCHEDULERS

from hieratok_hf import AutoencoderHieraTok, HieraTokDiTPipeline
from hieratok_hf.pipelines.call_arguments import take_images
from hieratok_hf.pipelines.noise_levels import noise_levels

CLASSES = 3
NAMES = {0: "tench, Tinca tinca", 1: "English_springer", 2: "church"}
SIDE = 8
CHANNELS = TINY["latent_channels"]


class Oracle(ModelMixin, ConfigMixin):
    """Knows the latent of each class, the last of which is none, and predicts it from any noise."""

    @register_to_config
    def __init__(self, in_channels: int = CHANNELS, sample_size: int = SIDE, num_embeds_ada_norm: int = CLASSES):
        super().__init__()
        targets = noise(num_embeds_ada_norm + 1, in_channels, sample_size, sample_size, seed=5)
        self.targets = torch.nn.Parameter(targets)
        self.level, self.asked = None, []

    def forward(self, hidden_states, timestep, class_labels, return_dict=True):
        self.asked.append((timestep.tolist(), class_labels.tolist()))
        clean, level = self.targets[class_labels], self.level(timestep)
        eps = (hidden_states - level.signal * clean) / level.noise
        kinds = {"epsilon": eps, "flow_prediction": eps - clean, "sample": clean}
        return (kinds.get(level.kind, level.signal * eps - level.noise * clean),)


def quiet_pipeline(vae, transformer, scheduler=None, names=NAMES) -> HieraTokDiTPipeline:
    vae = AutoencoderHieraTok.from_core(random_core()) if vae is None else vae
    pipe = HieraTokDiTPipeline(vae, transformer, scheduler or diffusers.FlowMatchEulerDiscreteScheduler(), names)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def oracle_pipeline(scheduler=None, vae=None) -> HieraTokDiTPipeline:
    pipe = quiet_pipeline(vae, Oracle(), scheduler)

    def level(timestep):
        return noise_levels(pipe.scheduler)[(pipe.scheduler.timesteps == timestep[0]).nonzero()[0].item()]

    pipe.transformer.level = level
    return pipe


def dit_pipeline(seed: int = 0, names=NAMES, **overrides) -> HieraTokDiTPipeline:
    torch.manual_seed(seed)
    sizes = {"in_channels": CHANNELS, "sample_size": SIDE, "patch_size": 1, "num_embeds_ada_norm": CLASSES}
    sizes |= {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, **overrides}
    return quiet_pipeline(None, diffusers.DiTTransformer2DModel(**sizes).eval(), names=names)


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


SCHEDULERS = [
    *FLOW_SCHEDULERS,
    diffusers.DDIMScheduler(clip_sample=False),
    diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
    diffusers.DDPMScheduler(clip_sample=False),
    diffusers.EulerDiscreteScheduler(),
]


IMAGE_SCHEDULERS = [
    *SCHEDULERS,
    diffusers.DPMSolverMultistepScheduler(),
    diffusers.EulerAncestralDiscreteScheduler(),
    diffusers.HeunDiscreteScheduler(),
    diffusers.UniPCMultistepScheduler(prediction_type="sample"),
]
SIZE = SIDE * TINY["patch_size"]
PIXELS = images(2, 3, SIZE, SIZE)
PIL = Image.linear_gradient("L")


def latents_of(pipe, pixels) -> torch.Tensor:
    with torch.no_grad():
        return pipe.vae.encode(pixels).latent_dist.mode()


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_every_scheduler_ends_at_what_the_transformer_knows(scheduler):
    pipe, clean = oracle_pipeline(scheduler), []

    def keep(pipe, step, timestep, tensors):
        clean.append(tensors["clean_latents"])
        return {}

    given = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": ["clean_latents"]}
    latents = pipe(["church", 0], 6, 1.0, generator=seeds(0, 1), output_type="latent", **given).images
    expected = pipe.transformer.targets[[2, 0]].detach()
    # Some end at a step that still has a little noise in it.
    torch.testing.assert_close(latents, expected, atol=0.05, rtol=0)
    for predicted in clean:
        torch.testing.assert_close(predicted, expected, atol=2e-2, rtol=0)
    assert len(clean) == pipe.num_timesteps == len(pipe.scheduler.timesteps)


def test_guidance_leads_away_from_no_class():
    pipe = oracle_pipeline()
    latents = pipe([1], 4, 3.0, generator=seeds(0), output_type="latent").images
    none, wanted = pipe.transformer.targets[3].detach(), pipe.transformer.targets[1].detach()
    torch.testing.assert_close(latents[0], none + 3 * (wanted - none), atol=1e-4, rtol=1e-4)
    assert [labels for _, labels in pipe.transformer.asked] == [[1, 3]] * 4  # the null class is the last
    assert pipe.guidance_scale == 3.0


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_guidance_is_projected_as_by_diffusers(scheduler, eta):
    pipe = oracle_pipeline(scheduler)
    latents = pipe([1], 6, 3.0, generator=seeds(0), output_type="latent", guidance_eta=eta).images
    none, wanted = pipe.transformer.targets[3].detach(), pipe.transformer.targets[1].detach()
    expected = normalized_guidance(wanted[None], none[None], 2.0, eta=eta, use_original_formulation=True)
    torch.testing.assert_close(latents, expected, atol=0.1, rtol=0)
    assert (latents - (none + 3 * (wanted - none))).abs().max() > 0.5


@pytest.mark.parametrize(
    ("steps", "scale", "interval", "guided"),
    [
        (4, 3.0, (0.3, 0.8), [False, True, True, False]),  # noise of 1, 0.75, 0.5 and 0.25
        (5, 3.0, (0.2, 0.6), [False, False, True, True, True]),  # 0.6 is a little more in float32
        (4, 1.0, (0.0, 1.0), [False] * 4),
    ],
)
def test_guidance_acts_in_its_interval_of_noise(steps, scale, interval, guided):
    pipe = oracle_pipeline()
    pipe([1], steps, scale, interval, generator=seeds(0), output_type="latent")
    # Where it does not act, half as much is asked.
    assert [labels for _, labels in pipe.transformer.asked] == [[1, 3] if acts else [1] for acts in guided]


def test_a_callback_of_diffusers_can_end_guidance():
    class CutOff(PipelineCallback):
        tensor_inputs = ["clean_latents"]

        def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
            assert list(callback_kwargs) == ["clean_latents"]
            if step_index == 1:
                pipeline._guidance_scale = 1.0
            return callback_kwargs

    pipe = oracle_pipeline()
    ending = CutOff(cutoff_step_ratio=None, cutoff_step_index=1)
    pipe([1], 4, 3.0, generator=seeds(0), output_type="latent", callback_on_step_end=ending)
    assert [labels for _, labels in pipe.transformer.asked] == [[1, 3], [1, 3], [1], [1]]
    assert pipe.guidance_scale == 1.0


def test_flow_steps_are_even_down_to_none_or_as_given():
    pipe = oracle_pipeline()
    pipe([1], 4, 1.0, generator=seeds(0), output_type="latent")
    assert [times[0] for times, _ in pipe.transformer.asked] == pytest.approx([1000, 750, 500, 250])
    assert pipe.scheduler.sigmas[-1] == 0
    for scheduler in (diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.UniPCMultistepScheduler(**FLOW)):
        pipe = oracle_pipeline(scheduler)
        pipe([1], guidance_scale=1.0, sigmas=[1.0, 0.5], generator=seeds(0), output_type="latent")
        assert [round(times[0] / 1000, 1) for times, _ in pipe.transformer.asked] == [1.0, 0.5]


def test_several_images_of_each_class_stand_together():
    pipe = oracle_pipeline()
    latents = pipe([2, 0], 3, 1.0, num_images_per_prompt=2, generator=seeds(0, 1, 2, 3), output_type="latent").images
    torch.testing.assert_close(latents, pipe.transformer.targets[[2, 2, 0, 0]].detach(), atol=1e-4, rtol=1e-4)


def test_a_batch_equals_single_runs():
    pipe = dit_pipeline()
    labels = [0, 1, 2, "church"]
    batch = pipe(labels, 5, generator=seeds(0, 1, 2, 3), output_type="pt").images
    for i, label in enumerate(labels):
        single = pipe(label, 5, generator=seeds(i), output_type="pt").images
        torch.testing.assert_close(batch[i : i + 1], single, atol=1e-4, rtol=0)
    drawn = torch.cat([torch.randn(1, CHANNELS, SIDE, SIDE, generator=seeds(i)[0]) for i in range(4)])
    again = pipe(labels, 5, latents=drawn, output_type="pt").images
    assert torch.equal(again, batch)
    assert not torch.allclose(pipe(labels, 5, generator=seeds(4, 5, 6, 7), output_type="pt").images, batch, atol=1e-2)


@pytest.mark.parametrize(("kind", "given"), [("epsilon", 2 * CHANNELS), ("v_prediction", CHANNELS)])
def test_the_same_as_diffusers_own_pipeline(kind, given):
    parts = dit_pipeline(num_embeds_ada_norm=1000, out_channels=given)  # twice as many with a variance, left out
    ours, theirs = diffusers.DDIMScheduler(prediction_type=kind), diffusers.DDIMScheduler(prediction_type=kind)
    ours = quiet_pipeline(parts.vae, parts.transformer, ours)
    theirs = diffusers.DiTPipeline(parts.transformer, parts.vae, theirs, {0: "a"})
    theirs.set_progress_bar_config(disable=True)
    for scale in (1.0, 4.0):
        settings = {"guidance_scale": scale, "num_inference_steps": 5, "output_type": "np"}
        images = ours([7, 999], generator=torch.manual_seed(0), **settings).images
        expected = theirs([7, 999], generator=torch.manual_seed(0), **settings).images
        np.testing.assert_allclose(images, expected, atol=1e-4)


def test_a_saved_pipeline_gives_the_same_images(tmp_path, caplog, monkeypatch):
    pipe = dit_pipeline()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == ["hieratok_hf", "AutoencoderHieraTok"]
    assert index["_class_name"] == "HieraTokDiTPipeline" and index["prediction_type"] == "flow_prediction"
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    loaded = HieraTokDiTPipeline.from_pretrained(tmp_path)
    assert not caplog.records
    assert loaded.config.id2label == NAMES
    half = HieraTokDiTPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.vae.dtype == half.transformer.dtype == torch.bfloat16
    settings = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "pt"}
    made = (one(["church", 1], generator=seeds(3, 4), **settings).images for one in (loaded, half, pipe))
    images, low, expected = made
    assert torch.equal(images, expected)
    assert (low.float() - expected).abs().mean() < 0.02
    assert half([0], 2, output_type="latent").images.dtype == torch.bfloat16


def test_a_failed_save_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    pipe, other = dit_pipeline(), dit_pipeline(seed=1)
    pipe.save_pretrained(tmp_path)
    before = tree(tmp_path)
    monkeypatch.setattr(other.vae, "save_pretrained", Mock(side_effect=OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        other.save_pretrained(tmp_path)
    assert tree(tmp_path) == before
    with pytest.raises(ValueError, match="`save_directory`"):
        pipe.save_pretrained(tmp_path / "model_index.json")


def test_a_transformer_in_training_mode_drops_no_labels_and_stays_in_it():
    pipe = dit_pipeline()
    expected = pipe([0, 1, 2] * 10, 2, generator=seeds(*range(30)), output_type="latent").images
    pipe.transformer.train()
    pipe.transformer.transformer_blocks[0].ff.eval()
    modes = [module.training for module in pipe.transformer.modules()]
    assert torch.equal(pipe([0, 1, 2] * 10, 2, generator=seeds(*range(30)), output_type="latent").images, expected)
    assert [module.training for module in pipe.transformer.modules()] == modes


def test_images_are_the_decoded_latents_in_every_type():
    pipe, pixels = dit_pipeline(), SIDE * TINY["patch_size"]
    kinds = ("pil", "np", "pt", "latent")
    made = {kind: pipe([0, 1], 2, generator=seeds(0, 1), output_type=kind).images for kind in kinds}
    assert [(image.size, image.mode) for image in made["pil"]] == [((pixels, pixels), "RGB")] * 2
    assert made["latent"].shape == (2, CHANNELS, SIDE, SIDE)
    with torch.no_grad():
        expected = (pipe.vae.decode(made["latent"]).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(made["pt"], expected)
    assert np.array_equal(made["np"], made["pt"].permute(0, 2, 3, 1).numpy())
    as_tuple = pipe([0, 1], 2, generator=seeds(0, 1), output_type="pt", return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], made["pt"])


def test_the_callback_sees_and_changes_the_latents_and_can_stop():
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), sorted(tensors)))
        pipe._interrupt = step == 2
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else None

    latents = dit_pipeline()([0], 5, output_type="latent", callback_on_step_end=callback).images
    assert not latents.any()
    assert seen == [(i, pytest.approx(1000 * (1 - i / 5), rel=1e-4), ["latents"]) for i in range(3)]


@pytest.mark.parametrize("scales", [1, 4])
def test_previews_are_the_coarse_images_of_the_predicted_latents(scales):
    pipe, previews = oracle_pipeline(), []

    def callback(pipe, step, timestep, tensors):
        with torch.no_grad():
            coarse = pipe.vae.decode(tensors["clean_latents"], num_scales=scales).sample
        torch.testing.assert_close(tensors["preview"], (coarse / 2 + 0.5).clamp(0, 1))
        previews.append(tensors["preview"])
        return {}

    settings = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "pt"}
    given = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["clean_latents"]}
    final = pipe([0, 2], generator=seeds(0, 1), preview_scales=scales, **settings, **given).images
    assert torch.equal(final, pipe([0, 2], generator=seeds(0, 1), **settings).images)
    factor = pipe.vae.config.scale_factors[scales - 1]
    assert len(previews) == 3 and previews[0].shape == (2, 3, *(-(-s // factor) for s in final.shape[2:]))
    if scales == 4:
        torch.testing.assert_close(previews[-1], final, atol=1e-4, rtol=0)


def assert_begins_with(pipe, clean):
    """The latents to which noise is added are those."""
    seen, add = [], pipe.scheduler.scale_noise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.scheduler, "scale_noise", lambda sample, *given: seen.append(sample) or add(sample, *given))
        size = clean.shape[-1] * pipe.image_processor.config.vae_scale_factor
        pipe([0, 1], 2, image=(PIXELS[..., :size, :size] + 1) / 2, output_type="latent")
    torch.testing.assert_close(seen[0], clean.detach(), atol=1e-5, rtol=1e-5)


def test_another_autoencoder_serves_without_previews():
    torch.manual_seed(0)
    sizes = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    sizes |= {"block_out_channels": (8, 8, 8), "norm_num_groups": 4}
    vae = diffusers.AutoencoderKL(**sizes, scaling_factor=0.5, shift_factor=0.1).eval()
    pipe = oracle_pipeline(vae=vae)
    images = pipe([0], 3, 1.0, generator=seeds(0), output_type="pt").images
    with torch.no_grad():
        expected = vae.decode(pipe.transformer.targets[:1] / 0.5 + 0.1).sample
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)
    assert_begins_with(pipe, (latents_of(pipe, PIXELS) - 0.1) * 0.5)
    with pytest.raises(ValueError, match="needs a tokenizer with scales, `vae` is a AutoencoderKL"):
        pipe([0], 3, preview_scales=1, callback_on_step_end=lambda *given: {})


def test_an_autoencoder_that_says_its_ratio_serves():
    blocks = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    depths = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
    multiscale = {"encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ())}
    torch.manual_seed(0)
    vae = diffusers.AutoencoderDC(latent_channels=CHANNELS, **blocks, **widths, **depths, **multiscale).eval()
    pipe = oracle_pipeline(vae=vae)
    size = SIDE * vae.spatial_compression_ratio
    assert pipe([0], 2, 1.0, output_type="pt").images.shape == (1, 3, size, size)
    with torch.no_grad():
        assert_begins_with(pipe, vae.encode(PIXELS[..., :size, :size]).latent)


def test_without_a_tokenizer_there_are_latents(tmp_path):
    dit_pipeline().save_pretrained(tmp_path)
    pipe = HieraTokDiTPipeline.from_pretrained(tmp_path, vae=None)
    assert pipe([0], 2, generator=seeds(0), output_type="latent").images.shape == (1, CHANNELS, SIDE, SIDE)
    with pytest.raises(ValueError, match="'latent' without a `vae`, got 'pil'"):
        pipe([0], 2)


@pytest.mark.parametrize(("height", "width"), [(24, 40), (40, None), (16, 64)])
def test_images_of_other_shapes(height, width):
    pipe, patch = dit_pipeline(patch_size=2), TINY["patch_size"]
    grid = (height // patch, (width or SIDE * patch) // patch)
    settings = {"num_inference_steps": 3, "height": height, "width": width}
    latents = pipe([0, 1], generator=seeds(0, 1), output_type="latent", **settings).images
    assert latents.shape == (2, CHANNELS, *grid)
    images = pipe([0, 1], generator=seeds(0, 1), **settings).images
    assert [image.size for image in images] == [(grid[1] * patch, grid[0] * patch)] * 2
    # A transformer that takes the place of the first does as well, and the noise may be given.
    again = dit_pipeline(patch_size=2)
    again.transformer = type(pipe.transformer).from_config(pipe.transformer.config).eval()
    again.transformer.load_state_dict(pipe.transformer.state_dict())
    drawn = torch.cat([torch.randn(1, CHANNELS, *grid, generator=seeds(i)[0]) for i in range(2)])
    assert torch.equal(again([0, 1], latents=drawn, output_type="latent", **settings).images, latents)
    with pytest.raises(ValueError, match="`latents` must be"):
        again([0, 1], latents=drawn, num_inference_steps=3)


def test_the_own_size_may_be_named_and_others_must_suit_the_parts():
    pipe, side = dit_pipeline(), SIDE * TINY["patch_size"]
    expected = pipe([0], 3, generator=seeds(0), output_type="pt").images
    assert torch.equal(pipe([0], 3, generator=seeds(0), output_type="pt", height=side, width=side).images, expected)
    with pytest.raises(ValueError, match="`height` must be a multiple of 8 pixels, got 20"):
        dit_pipeline(patch_size=2)([0], height=20)
    pipe.vae = None
    with pytest.raises(ValueError, match="`width` must be None without a `vae`"):
        pipe([0], output_type="latent", width=side)


@pytest.mark.parametrize("scheduler", IMAGE_SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_with_an_image_the_steps_that_are_left_begin_with_its_latents_and_their_noise(scheduler):
    pipe, drawn = oracle_pipeline(scheduler), noise(2, CHANNELS, SIDE, SIDE, seed=3)
    pipe.transformer.targets.data[:2] = latents_of(pipe, PIXELS)
    settings = {"num_inference_steps": 6, "guidance_scale": 1.0, "latents": drawn, "output_type": "latent"}
    pipe([0, 1], **settings)
    asked, fed = pipe.transformer.asked[:], []
    pipe.transformer.asked.clear()
    pipe.transformer.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0]))
    made = pipe([0, 1], image=(PIXELS + 1) / 2, strength=0.5, **settings).images
    left = pipe.transformer.asked
    assert left == asked[-len(left) :] and len(left) == pipe.num_timesteps
    assert len(left) == (3 if scheduler.order == 1 else 5)  # the last step of the second order asks once
    level = noise_levels(pipe.scheduler)[-len(left)]
    expected = pipe.transformer.targets[:2].detach()
    torch.testing.assert_close(fed[0], level.signal * expected + level.noise * drawn, atol=1e-4, rtol=1e-4)
    # Who predicts the image gets it back, up to the little noise with which some end.
    torch.testing.assert_close(made, expected, atol=0.05, rtol=0)
    # The next call begins at the beginning.
    fresh = oracle_pipeline(type(scheduler).from_config(scheduler.config))
    fresh.transformer.targets = pipe.transformer.targets
    plain, expected = (each([2, 0], **settings, generator=seeds(0, 1)).images for each in (pipe, fresh))
    assert torch.equal(plain, expected)


@pytest.mark.parametrize("kind", [diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler])
def test_of_steps_at_one_time_the_right_one_is_the_first(kind):
    pipe, fed = dit_pipeline(), []
    pipe.scheduler = kind(**FLOW, flow_shift=9.0, num_train_timesteps=20)
    pipe.transformer.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0]))
    drawn = noise(1, CHANNELS, SIDE, SIDE)
    pipe([0], 12, 1.0, image=PIL, strength=0.75, latents=drawn, output_type="latent")
    levels, times = noise_levels(pipe.scheduler), pipe.scheduler.timesteps
    assert len(fed) == 9 and times[2] == times[3] and levels[2] != levels[3]
    clean = (fed[0] - levels[3].noise * drawn) / levels[3].signal
    expected = latents_of(pipe, take_images(PIL, 1, (SIZE, SIZE)))
    torch.testing.assert_close(clean, expected, atol=1e-3, rtol=1e-3)


def test_the_strength_leads_from_the_image_to_none_of_it():
    pipe = dit_pipeline()
    settings = {"num_inference_steps": 20, "output_type": "latent"}

    def made(**given):
        return pipe([0, 1], generator=seeds(0, 1), **given, **settings).images

    clean = latents_of(pipe, PIXELS)
    strengths = (0.0, 0.25, 0.5, 1.0)
    away = [(made(image=(PIXELS + 1) / 2, strength=strength) - clean).std().item() for strength in strengths]
    assert away == sorted(away) and away[0] < 0.1 * away[-1]
    assert torch.equal(made(image=(PIXELS + 1) / 2, strength=1), made())
    pipe([0], strength=0, image=PIL, **settings)
    assert pipe.num_timesteps == 1
    pipe([0], strength=0.34, image=PIL, sigmas=[1.0, 0.6, 0.3], output_type="latent")
    assert pipe.num_timesteps == 1


def test_images_to_begin_with_are_one_for_all_or_one_for_each():
    pipe, size = dit_pipeline(), (2, CHANNELS, SIDE, SIDE)
    settings = {"num_inference_steps": 4, "strength": 0.5, "output_type": "latent"}
    zeros, ones, drawn = torch.zeros(3, SIZE, SIZE), torch.ones(3, SIZE, SIZE), noise(*size)
    each = [pipe([1], image=x, latents=drawn[:1], **settings).images for x in (zeros, ones)]
    both = pipe([1, 1], image=[zeros, ones], latents=drawn[:1].expand(size), **settings).images
    torch.testing.assert_close(both, torch.cat(each), atol=1e-4, rtol=0)
    doubled = {"num_images_per_prompt": 2, "latents": drawn[:1].expand(4, -1, -1, -1)}
    made = pipe([1, 1], image=torch.stack([zeros, ones]), **doubled, **settings).images
    torch.testing.assert_close(made, both.repeat_interleave(2, 0), atol=1e-4, rtol=0)
    made = pipe([1, 1], image=zeros, **doubled, **settings).images
    torch.testing.assert_close(made, each[0].expand(4, -1, -1, -1), atol=1e-4, rtol=0)
    wide = pipe([0], image=PIL, height=SIZE // 2, width=2 * SIZE, generator=seeds(0), **settings).images
    assert wide.shape == (1, CHANNELS, SIDE // 2, 2 * SIDE)
    pipe.vae = None
    with pytest.raises(ValueError, match="`image` must be None without a `vae`"):
        pipe([0], image=PIL, **settings)


@pytest.mark.parametrize("shares", [{"church": 0.25, 0: 0.75}, {2: 0.25, 0: 0.75, 1: 0}])
def test_an_image_between_classes_follows_the_mean_of_their_predictions(shares):
    pipe = oracle_pipeline()
    settings = {"num_inference_steps": 4, "output_type": "latent", "generator": seeds(0, 1, 2)}
    made = pipe([1, shares, 2], **settings, guidance_scale=2.0).images
    targets = pipe.transformer.targets.detach()
    wanted = torch.stack([targets[1], 0.25 * targets[2] + 0.75 * targets[0], targets[2]])
    torch.testing.assert_close(made, targets[3] + 2 * (wanted - targets[3]), atol=1e-4, rtol=1e-4)
    # A class without a share is not asked for.
    assert [sorted(labels) for _, labels in pipe.transformer.asked] == [[0, 1, 2, 2, 3, 3, 3]] * 4
    single = pipe(shares, 4, 1.0, generator=seeds(1), output_type="latent").images
    torch.testing.assert_close(single[0], wanted[1], atol=1e-4, rtol=1e-4)
    whole = [pipe(x, 2, generator=seeds(0), output_type="latent").images for x in ("church", {"church": 1})]
    assert torch.equal(*whole)


@pytest.mark.parametrize("kind", ["pil", "np", "pt", "latent"])
def test_a_stream_ends_with_what_the_call_gives(kind):
    pipe = dit_pipeline()
    seen, settings = [], {"num_inference_steps": 5, "output_type": kind}
    expected = pipe([0, {1: 0.5, 2: 0.5}], generator=seeds(0, 1), **settings).images

    def keep(pipe, step, timestep, tensors):
        seen.append(tensors["clean_latents"])

    watched = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": ["clean_latents"]}
    *previews, made = pipe.stream([0, {1: 0.5, 2: 0.5}], generator=seeds(0, 1), **settings, **watched)
    assert len(previews) == 4 and len(seen) == 5
    assert type(made) is type(expected) and all(map(np.array_equal, made, expected))
    for preview, latents in zip(previews, seen):
        if kind != "latent":
            with torch.no_grad():
                latents = pipe.image_processor.postprocess(pipe.vae.decode(latents).sample, kind)
        assert all(map(np.array_equal, preview, latents))


def test_a_stream_previews_by_some_scales_and_keeps_gradients_out_of_its_steps_alone():
    pipe = dit_pipeline()
    stream = pipe.stream([0], 3, preview_scales=2, generator=seeds(0), output_type="pt")
    shapes = []
    for images_of_step in stream:
        shapes.append(tuple(images_of_step.shape))
        assert torch.is_grad_enabled() and not images_of_step.requires_grad
    assert shapes == [(1, 3, SIZE // 4, SIZE // 4)] * 2 + [(1, 3, SIZE, SIZE)]
    with pytest.raises(ValueError, match="`preview_scales` needs"):
        next(pipe.stream([0], 3, preview_scales=2, output_type="latent"))
    with pytest.raises(TypeError, match="stpes"):
        pipe.stream([0], stpes=3)


def test_half_precision_begins_with_an_image_too():
    pipe, half = dit_pipeline(), dit_pipeline().to(torch.bfloat16)
    settings = {"num_inference_steps": 4, "image": PIL, "strength": 0.5, "output_type": "pt"}
    expected, made = (each([{0: 0.5, 2: 0.5}], generator=seeds(0), **settings).images for each in (pipe, half))
    assert (made.float() - expected).abs().mean() < 0.02


def test_who_leaves_a_stream_leaves_the_pipeline_as_it_was():
    pipe, freed = dit_pipeline(), []
    pipe.maybe_free_model_hooks = lambda: freed.append(True)
    settings = {"num_inference_steps": 6, "output_type": "pt"}
    expected = pipe([0], generator=seeds(0), **settings).images
    pipe.transformer.train()
    stream = pipe.stream([1], generator=seeds(1), image=PIL, **settings)
    next(stream)
    assert pipe.transformer.training
    stream.close()
    assert len(freed) == 2
    assert torch.equal(pipe([0], generator=seeds(0), **settings).images, expected)
    stream = pipe.stream([1], generator=seeds(1), **settings)
    next(stream)
    assert torch.equal(pipe([0], generator=seeds(0), **settings).images, expected)
    with pytest.raises(RuntimeError, match="stream"):
        next(stream)
    stream = pipe.stream([0], generator=seeds(0), **settings)
    next(stream)
    pipe._interrupt = True
    assert len(list(stream)) == 1  # the image as far as it got


def test_an_unfinished_stream_ends_with_its_program_in_silence():
    code = """
import sys
sys.path += {path!r}
from tiny_pipelines import make_pipeline
pipe = make_pipeline()
stream = pipe.stream([0], 4, output_type="latent")
next(stream)
free = pipe.maybe_free_model_hooks
pipe.maybe_free_model_hooks = lambda: (free(), print("freed"))
"""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code.format(path=sys.path)], capture_output=True, text=True, check=True
    )
    assert (ended.stdout, ended.stderr) == ("freed\n", "")


def test_a_call_that_fails_ends_a_stream_whose_steps_it_replaced():
    pipe = oracle_pipeline(diffusers.LMSDiscreteScheduler())
    stream = pipe.stream([1], 6, output_type="latent")
    next(stream)
    with pytest.raises(ValueError, match="`strength`"):
        pipe([0], 3, strength=2)
    next(stream)
    with pytest.raises(ValueError, match="`image`"):
        pipe([0], 3, image=PIL)
    with pytest.raises(RuntimeError, match="stream"):
        next(stream)


def test_labels_by_name():
    pipe = dit_pipeline()
    assert pipe.get_label_ids(["Church", "tinca_tinca", 1]) == [2, 0, 1]
    with warnings.catch_warnings():  # diffusers deprecates its own way to `config` from the pipeline
        warnings.simplefilter("error")
        assert pipe.id2label == NAMES
    nameless = dit_pipeline(names=None)
    assert nameless.labels == {} and nameless.num_classes == CLASSES
    assert len(nameless([0, 2], 1, output_type="latent").images) == 2


WRONG = {"height": (0, SIDE * TINY["patch_size"] + 1, 16.0), "width": (-4, "32")}  # tests/hostile has the others


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_size_is_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        dit_pipeline()([0], 2, **{name: value})


def test_a_scheduler_of_another_kind_is_refused():
    pipe = dit_pipeline()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=r"`scheduler` .*'epsilon'.*flow_prediction"):
        pipe([0], 2)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **FLOW)
    assert len(pipe([0], 2).images) == 1


@pytest.mark.parametrize(
    ("overrides", "names", "message"),
    [
        ({"in_channels": 8}, NAMES, "latents of 8 channels"),
        ({"out_channels": 6}, NAMES, "4 channels or twice as many"),
        ({"patch_size": 3}, NAMES, "patch size 3"),
        ({"num_embeds_ada_norm": 2}, NAMES, "`id2label` names the class 2"),
    ],
)
def test_parts_that_do_not_fit_are_refused(overrides, names, message):
    with pytest.raises(ValueError, match=message):
        dit_pipeline(names=names, **overrides)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offload_on_a_gpu():
    pipe, offloaded = dit_pipeline(), dit_pipeline()
    offloaded.enable_model_cpu_offload()
    expected, images = (x([0, 1], 4, generator=seeds(0, 1), output_type="pt").images for x in (pipe, offloaded))
    torch.testing.assert_close(images.cpu(), expected, atol=2e-2, rtol=0)
    assert offloaded.transformer.device.type == "cpu"
    from_image, images = (
        list(each.stream({0: 0.5, 1: 0.5}, 4, generator=seeds(0), image=PIL, output_type="pt"))
        for each in (pipe, offloaded)
    )
    assert len(images) == len(from_image) == 2
    torch.testing.assert_close(images[-1].cpu(), from_image[-1], atol=2e-2, rtol=0)
    assert offloaded.vae.device.type == offloaded.transformer.device.type == "cpu"
