"""Pipelines of diffusers with this tokenizer for their VAE: they run, and its own decoding makes the image."""

import inspect
import logging
import warnings
from contextlib import contextmanager
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from helpers import images, random_core

from hieratok_hf import AutoencoderHieraTok

# What diffusers says of itself, whatever the VAE.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`(FluxPosEmbed|LoraLoaderMixin)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]

HEIGHT, WIDTH = 64, 96
TEXT, TOKENS = 32, 7
"""Channels of a prompt's embedding, and how many tokens it has."""
SMALL = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
UNET = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2}
UNET |= {"cross_attention_dim": TEXT, "sample_size": 8}
UNET |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
UNET |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
SDXL = UNET | {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True}
SDXL |= {"projection_class_embeddings_input_dim": 6 * 4 + TEXT, "transformer_layers_per_block": 1}
LCM = UNET | {"time_cond_proj_dim": 32}
DIT = SMALL | {"sample_size": HEIGHT // 16, "patch_size": 1, "num_embeds_ada_norm": 1000}
JOINT = {"joint_attention_dim": TEXT, "pooled_projection_dim": TEXT}
SD3 = SMALL | JOINT | {"sample_size": 8, "patch_size": 1, "pos_embed_max_size": 8, "caption_projection_dim": 32}
FLUX = SMALL | JOINT | {"num_single_layers": 1, "axes_dims_rope": (4, 4, 8)}
CHROMA = SMALL | {"num_single_layers": 1, "axes_dims_rope": (4, 4, 8), "joint_attention_dim": TEXT}
CHROMA |= {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
AURA = {"attention_head_dim": 16, "num_attention_heads": 2, "num_mmdit_layers": 1, "num_single_dit_layers": 1}
AURA |= {"joint_attention_dim": TEXT, "caption_projection_dim": 32, "sample_size": 8, "pos_embed_max_size": 64}
CAPTION = {"caption_channels": TEXT, "cross_attention_dim": 32, "sample_size": 8}
PIXART = SMALL | CAPTION | {"norm_type": "ada_norm_single"}
SANA = SMALL | CAPTION | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16}
SPRINT = SANA | {"guidance_embeds": True}
COGVIEW = SMALL | {"text_embed_dim": TEXT, "time_embed_dim": 8, "condition_dim": 4, "sample_size": 8}
COGVIEW4 = COGVIEW | {"rope_axes_dim": (8, 8)}
PRX = {"context_in_dim": TEXT, "hidden_size": 32, "num_heads": 2, "depth": 1, "axes_dim": [8, 8]}
ZIMAGE = {"dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": TEXT}
ZIMAGE |= {"axes_dims": [4, 4, 8], "axes_lens": [1024, 64, 64]}
HUNYUAN = SMALL | {"patch_size": 2, "hidden_size": 32, "sample_size": 8, "text_len": TOKENS, "text_len_t5": TOKENS}
HUNYUAN |= {"cross_attention_dim": TEXT, "cross_attention_dim_t5": TEXT, "use_style_cond_and_image_meta_size": False}
NEXT = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16}
LUMINA = NEXT | {"cross_attention_dim": TEXT, "sample_size": 8}
LUMINA2 = NEXT | {"cap_feat_dim": TEXT, "sample_size": 8, "num_refiner_layers": 1}
LUMINA2 |= {"axes_dim_rope": (4, 4, 8), "axes_lens": (64, 64, 64)}


class Swap(NamedTuple):
    """How to build a pipeline around a VAE, and what to call it with."""

    pipeline: str
    denoiser: str
    sizes: dict[str, Any]  # of the denoiser, besides its channels
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler()
    embeds: tuple[str, ...] = ("prompt_embeds",)  # which stand for the prompt
    call: dict[str, Any] = {}
    guided: bool = True  # takes the negatives of `embeds` too
    from_image: bool = False  # starts at an image
    packed: bool = False  # the denoiser's tokens are 2x2 cells of the latent
    channels: int = 8  # of the tokenizer
    patch: int = 16

    def variant(self, kind: str, **changes: Any) -> "Swap":
        """The pipeline of the same family that starts at an image."""
        name = self.pipeline.replace("Pipeline", f"{kind}Pipeline")
        return self._replace(pipeline=name, from_image=True, **changes)


POOLED = ("prompt_embeds", "pooled_prompt_embeds")
MASKED = ("prompt_embeds", "prompt_attention_mask")
TWICE = (*MASKED, "prompt_embeds_2", "prompt_attention_mask_2")
ANY_SIZE = {"use_resolution_binning": False}
ANY_PROMPT = ANY_SIZE | {"negative_prompt": None}
DDIM, DPM = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1), diffusers.DPMSolverMultistepScheduler()
COG, DDPM, SCM = diffusers.CogVideoXDDIMScheduler(), diffusers.DDPMScheduler(), diffusers.SCMScheduler()
SWAPS = {
    "DiT": Swap("DiTPipeline", "DiTTransformer2DModel", DIT, DDIM, (), {"class_labels": [1]}),
    "SD": Swap("StableDiffusionPipeline", "UNet2DConditionModel", UNET, DDIM),
    "LCM": Swap("LatentConsistencyModelPipeline", "UNet2DConditionModel", LCM, diffusers.LCMScheduler(), guided=False),
    "SDXL": Swap("StableDiffusionXLPipeline", "UNet2DConditionModel", SDXL, DDIM, POOLED),
    "PixArt Alpha": Swap("PixArtAlphaPipeline", "PixArtTransformer2DModel", PIXART, DPM, MASKED, ANY_PROMPT),
    "PixArt Sigma": Swap("PixArtSigmaPipeline", "PixArtTransformer2DModel", PIXART, DPM, MASKED, ANY_PROMPT),
    "SD3": Swap("StableDiffusion3Pipeline", "SD3Transformer2DModel", SD3, embeds=POOLED),
    "Flux": Swap("FluxPipeline", "FluxTransformer2DModel", FLUX, embeds=POOLED, guided=False, packed=True),
    "Chroma": Swap("ChromaPipeline", "ChromaTransformer2DModel", CHROMA, embeds=MASKED, packed=True),
    "AuraFlow": Swap("AuraFlowPipeline", "AuraFlowTransformer2DModel", AURA, embeds=MASKED),
    "CogView3+": Swap("CogView3PlusPipeline", "CogView3PlusTransformer2DModel", COGVIEW, COG),
    "CogView4": Swap("CogView4Pipeline", "CogView4Transformer2DModel", COGVIEW4),
    "PRX": Swap("PRXPipeline", "PRXTransformer2DModel", PRX, embeds=MASKED, call=ANY_SIZE),
    "Sana": Swap("SanaPipeline", "SanaTransformer2DModel", SANA, embeds=MASKED, call=ANY_PROMPT),
    "Sana Sprint": Swap("SanaSprintPipeline", "SanaTransformer2DModel", SPRINT, SCM, MASKED, ANY_SIZE, guided=False),
    "Z-Image": Swap("ZImagePipeline", "ZImageTransformer2DModel", ZIMAGE),
    # These only with tokenizers of this patch size.
    "HunyuanDiT": Swap("HunyuanDiTPipeline", "HunyuanDiT2DModel", HUNYUAN, DDPM, TWICE, ANY_SIZE, patch=8),
    "Lumina": Swap("LuminaPipeline", "LuminaNextDiT2DModel", LUMINA, embeds=MASKED, patch=8),
    "Lumina2": Swap("Lumina2Pipeline", "Lumina2Transformer2DModel", LUMINA2, embeds=MASKED, patch=8),
}
for name in ("SD", "LCM", "SDXL", "SD3", "Flux", "Chroma", "Z-Image"):
    more = {"call": {"original_inference_steps": 8}} if name == "LCM" else {}
    SWAPS[f"{name} img2img"] = SWAPS[name].variant("Img2Img", **more)
# Those of Stable Diffusion only with tokenizers of these channels.
for name, channels in {"SD": 4, "SDXL": 4, "SD3": 16, "Flux": 8}.items():
    whole = {"mask_image": torch.ones(1, 1, HEIGHT, WIDTH)}
    SWAPS[f"{name} inpaint"] = SWAPS[name].variant("Inpaint", call=whole, channels=channels)
FROM_IMAGES = [name for name in SWAPS if SWAPS[name].from_image]


def make_vae(swap: Swap) -> AutoencoderHieraTok:
    return AutoencoderHieraTok.from_core(random_core(std=0.05, latent_channels=swap.channels, patch_size=swap.patch))


def make_parts(swap: Swap) -> dict[str, Any]:
    """The parts of its pipeline: text encoders and what else it can do without are `None`."""
    needed = inspect.signature(getattr(diffusers, swap.pipeline)).parameters.values()
    parts = {parameter.name: None for parameter in needed if parameter.default is inspect.Parameter.empty}
    denoiser = getattr(diffusers, swap.denoiser)
    channels = swap.channels * 4 if swap.packed else swap.channels
    channels_given = {"in_channels", "out_channels"} & set(inspect.signature(denoiser).parameters)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = denoiser(**dict.fromkeys(channels_given, channels), **swap.sizes).eval()
    parts["unet" if "unet" in parts else "transformer"] = network
    parts["scheduler"] = type(swap.scheduler).from_config(swap.scheduler.config)
    if "safety_checker" in parts:
        parts["requires_safety_checker"] = False
    return parts | {"vae": make_vae(swap)}


def make_pipeline(swap: Swap) -> Any:
    pipe = getattr(diffusers, swap.pipeline)(**make_parts(swap))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image() -> torch.Tensor:
    return (images(1, 3, HEIGHT, WIDTH) + 1) / 2


def run(pipe: Any, swap: Swap, **given: Any) -> Any:
    """What the pipeline makes of seed 0: images `(B, 3, H, W)` in [0, 1] unless another `output_type` is given."""
    source = torch.Generator().manual_seed(1)
    dtype = pipe.vae.dtype
    arguments = {"num_inference_steps": 4 if swap.from_image else 2, "output_type": "pt", **swap.call}
    for name in swap.embeds:
        for prefix in ("", "negative_") if swap.guided else ("",):
            shape = (1, TEXT) if "pooled" in name else (1, TOKENS, TEXT)
            embeds = torch.randn(shape, generator=source).to(dtype)
            arguments[prefix + name] = torch.ones(1, TOKENS, dtype=torch.bool) if "mask" in name else embeds
            if swap.pipeline.startswith("ZImage"):
                arguments[prefix + name] = list(embeds)
    if swap.from_image:
        arguments["image"] = image()
    parameters = inspect.signature(pipe.__call__).parameters
    size = {"height": HEIGHT, "width": WIDTH}
    arguments |= {name: value for name, value in size.items() if name in parameters}
    return pipe(**{**arguments, "generator": torch.Generator().manual_seed(0), **given}).images


def watch(monkeypatch, owner: Any, name: str) -> list[torch.Tensor]:
    """The first argument of every call of a method from now on."""
    plain, seen = getattr(owner, name), []

    def watched(first, *args, **kwargs):
        seen.append(first)
        return plain(first, *args, **kwargs)

    monkeypatch.setattr(owner, name, watched)
    return seen


@contextmanager
def complaints(caplog):
    """What diffusers logs and warns of in the meantime."""
    messages: list[str] = []
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    caplog.clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield messages
    finally:
        logger.removeHandler(caplog.handler)
    messages += [record.getMessage() for record in caplog.records if record.name.startswith("diffusers")]
    messages += [str(warning.message) for warning in caught]


def unpacked(latents: torch.Tensor) -> torch.Tensor:
    """Tokens of 2x2 cells, `(B, h * w / 4, 4 * C)`, as the latent `(B, C, h, w)`."""
    height, width = HEIGHT // 32, WIDTH // 32
    cells = latents.unflatten(2, (-1, 2, 2)).unflatten(1, (height, width))  # (B, h / 2, w / 2, C, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


@pytest.mark.parametrize("name", SWAPS)
def test_its_own_decoding_makes_the_image_also_in_half_precision(name, monkeypatch, caplog):
    swap = SWAPS[name]
    with complaints(caplog) as messages:
        pipe = make_pipeline(swap)
        decoded = watch(monkeypatch, pipe.vae, "decode")
        made = run(pipe, swap)
    assert messages == []
    height, width = (HEIGHT, HEIGHT) if name == "DiT" else (HEIGHT, WIDTH)
    assert made.shape == (1, 3, height, width)
    assert [tuple(z.shape) for z in decoded] == [(1, swap.channels, height // swap.patch, width // swap.patch)]
    with torch.no_grad():
        expected = pipe.vae.core.decode(decoded[0])
    torch.testing.assert_close(made, (expected / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
    if name != "DiT":  # which has no such output
        latents = run(pipe, swap, output_type="latent")
        # They arrive normalised: nothing is done to them on the way.
        assert torch.equal(unpacked(latents) if swap.packed else latents, decoded[0]) and len(decoded) == 1
    pipe.to(torch.bfloat16)
    decoded.clear()
    made = run(pipe, swap)
    assert pipe.vae.dtype == decoded[0].dtype == torch.bfloat16
    with torch.no_grad():
        expected = (make_vae(swap).decode(decoded[0].float()).sample / 2 + 0.5).clamp(0, 1)
    assert (made.float() - expected).abs().mean() < 0.01


@pytest.mark.parametrize("name", FROM_IMAGES)
def test_its_own_posterior_is_where_images_start(name, monkeypatch):
    swap = SWAPS[name]
    pipe = make_pipeline(swap)
    method = "scale_noise" if hasattr(pipe.scheduler, "scale_noise") else "add_noise"
    noised = watch(monkeypatch, pipe.scheduler, method)
    made = run(pipe, swap)
    with torch.no_grad():
        posterior = pipe.vae.core.encode(image() * 2 - 1)
    assert torch.equal(noised[0], posterior.sample(torch.Generator().manual_seed(0)))
    assert made.shape == (1, 3, HEIGHT, WIDTH)


@pytest.mark.parametrize("name", ["SD", "Flux"])
def test_a_saved_pipeline_has_it_again(name, tmp_path, caplog):
    swap = SWAPS[name]
    pipe = make_pipeline(swap)
    expected = run(pipe, swap)
    pipe.save_pretrained(tmp_path)
    with complaints(caplog) as messages:
        nothing = {part: None for part, held in pipe.components.items() if held is None}
        loaded = type(pipe).from_pretrained(tmp_path, **nothing)
    assert all(message.startswith("Expected types for vae: ") for message in messages), messages
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.vae) is AutoencoderHieraTok and loaded.vae.config.patch_size == swap.patch
    torch.testing.assert_close(run(loaded, swap), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["SD", "Flux"])
def test_it_takes_the_place_of_another(name, dtype):
    swap = SWAPS[name]
    own = make_pipeline(swap).to(dtype)
    widths = {"block_out_channels": (4,), "norm_num_groups": 2, "latent_channels": swap.channels}
    other = type(own)(**make_parts(swap) | {"vae": diffusers.AutoencoderKL(**widths)}).to(dtype)
    pipe = type(own).from_pipe(other, vae=own.vae, dtype=other.dtype)  # as README.md and docs/pipelines.md have it
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae is own.vae
    for part in (*pipe.components.values(), *other.components.values()):
        assert getattr(part, "dtype", dtype) == dtype
    torch.testing.assert_close(run(pipe, swap), run(own, swap), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.*upcast_vae` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["SDXL", "SDXL img2img", "SDXL inpaint"])
def test_half_pipelines_decode_in_float32_where_the_tokenizer_asks_for_it(name, monkeypatch):
    swap = SWAPS[name]
    pipe = make_pipeline(swap)
    pipe.vae.register_to_config(force_upcast=True)
    pipe.to(torch.float16)
    expected = make_vae(swap).to(torch.float16).float()
    decoded = watch(monkeypatch, pipe.vae, "decode")
    encoded = watch(monkeypatch, pipe.vae.core.encoder, "forward")
    made = run(pipe, swap)
    assert {x.dtype for x in decoded + encoded} == {torch.float32} and pipe.vae.dtype == torch.float16
    assert bool(encoded) == swap.from_image
    with torch.no_grad():
        images = (expected.decode(decoded[0]).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(made.float(), images, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("name", "tokenizer", "error", "message"),
    [
        ("SD inpaint", {"channels": 8}, ValueError, "either 4 or 9 input channels"),
        ("SDXL inpaint", {"channels": 8}, ValueError, "either 4 or 9 input channels"),
        ("SD3 inpaint", {"channels": 8}, ValueError, "16 input channels or 33"),
        ("HunyuanDiT", {"patch": 16}, RuntimeError, "size of tensor"),
    ],
)
def test_pipelines_that_refuse_another_tokenizer(name, tokenizer, error, message):
    swap = SWAPS[name]._replace(**tokenizer)
    with pytest.raises(error, match=message):
        run(make_pipeline(swap), swap)


@pytest.mark.parametrize("name", ["Lumina", "Lumina2"])
def test_pipelines_that_count_eight_pixels_a_cell(name):
    swap = SWAPS[name]._replace(patch=16)
    assert run(make_pipeline(swap), swap).shape == (1, 3, 2 * HEIGHT, 2 * WIDTH)
