"""Previews of pipelines at work: they show what the pipeline makes, in every one that packs or scales its latents."""

import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from helpers import random_core
from PIL import Image
from test_swaps import SMALL, SWAPS, TEXT, Swap, make_parts, run, watch
from torch import nn
from torch.nn import functional as F

from hieratok_hf import AutoencoderHieraTok, HieraTokConfig, HieraTokPreviewer
from hieratok_hf.models.sizes import count_flops
from hieratok_hf.utils.images import from_uint8, to_uint8

FLUX2 = SMALL | {"num_single_layers": 1, "axes_dims_rope": (4, 4, 4, 4), "joint_attention_dim": TEXT}
PIPELINES = {name: SWAPS[name] for name in ("DiT", "SD", "SDXL", "PixArt Sigma", "SD3", "Flux", "Sana")}
PIPELINES["SD3"] = SWAPS["SD3"]._replace(sizes=SWAPS["SD3"].sizes | {"pos_embed_max_size": 16})
PIPELINES["FLUX.2"] = Swap("Flux2Pipeline", "Flux2Transformer2DModel", FLUX2, guided=False, packed=True)
WITH_CALLBACK = [name for name in PIPELINES if name not in ("DiT", "PixArt Sigma")]


# Of these channels its pipeline takes mean and standard deviation alone.
STATISTICS = {"latents_mean": [0.3, -0.2, 0.1, 0.0], "latents_std": [0.5, 2.0, 1.0, 0.8]}


def make_pipeline(name, **overrides):
    """A pipeline with hieratok-tiny, whose latents it scales, or FLUX.2's way, normalises by batch statistics."""
    swap = PIPELINES[name]._replace(channels=16, patch=8)
    vae = AutoencoderHieraTok.from_pretrained("hieratok-tiny")
    if overrides:
        vae = AutoencoderHieraTok.from_core(random_core(std=0.05, patch_size=8, **overrides))
        swap = swap._replace(channels=overrides["latent_channels"])
    if name == "FLUX.2":
        vae.bn = nn.BatchNorm2d(64, affine=False)
        vae.bn.running_mean += torch.linspace(-0.2, 0.2, 64)
        vae.bn.running_var *= torch.linspace(0.5, 1.0, 64)
        vae.register_to_config(batch_norm_eps=1e-4)
    else:
        vae.register_to_config(scaling_factor=1.25, shift_factor=0.2 if name in ("SD3", "Flux") else 0.0)
    pipe = getattr(diffusers, swap.pipeline)(**make_parts(swap) | {"vae": vae})
    pipe.set_progress_bar_config(disable=True)
    return pipe, swap


def levels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def correlation(preview: Image.Image, image: torch.Tensor) -> float:
    """Of a preview with an image `(3, H, W)`, averaged to its size."""
    shown = from_uint8(levels_of(preview))
    small = F.interpolate(image[None], shown.shape[1:], mode="area")[0]
    return torch.corrcoef(torch.stack([shown.flatten(), small.flatten()]))[0, 1].item()


def check_last(previewer, pipe, latents):
    """The last preview is what the first scales make of the latents that the pipeline decodes."""
    with torch.no_grad():
        expected = to_uint8(pipe.vae.decode(latents, num_scales=previewer.num_scales).sample)
    assert len(previewer.images) == len(expected)
    for shown, image in zip(previewer.images, expected):
        height, width = shown.height, shown.width  # without what coarse cells show beyond the image
        assert (levels_of(shown).int() - image[:, :height, :width].int()).abs().max() <= 2


@pytest.mark.parametrize("name", PIPELINES)
def test_a_preview_shows_what_the_pipeline_makes(name, monkeypatch):
    pipe, swap = make_pipeline(name)
    steps, step_of = [], pipe.scheduler.step
    previewer = HieraTokPreviewer(pipe.vae, every=2, show=lambda images, step: steps.append(step))
    plain, decoded = pipe.vae.decode, watch(monkeypatch, pipe.vae, "decode")
    with previewer.watch(pipe):
        made = run(pipe, swap, num_inference_steps=5)
    assert steps == [1, 3, 4] and pipe.scheduler.step == step_of
    assert previewer.images[0].size == (made.shape[3] // 4, made.shape[2] // 4)
    assert correlation(previewer.images[0], made[0]) > 0.9
    check_last(previewer, pipe, decoded[-1])
    monkeypatch.setattr(pipe.vae, "decode", plain)
    assert torch.equal(run(pipe, swap, num_inference_steps=5), made)  # it changes nothing


@pytest.mark.parametrize("name", WITH_CALLBACK)
def test_as_a_callback_it_shows_the_same(name):
    (pipe, swap), shown = make_pipeline(name), {}
    previewer = HieraTokPreviewer(
        pipe.vae, every=1, show=lambda images, step: shown.setdefault(step, []).append(images)
    )
    with previewer.watch(pipe):
        made = run(pipe, swap, num_inference_steps=4)
    step_of = pipe.scheduler.step
    for _ in range(2):
        assert torch.equal(run(pipe, swap, num_inference_steps=4, callback_on_step_end=previewer), made)
        assert pipe.scheduler.step == step_of
    assert sorted(shown) == [0, 1, 2, 3] and [len(shown[step]) for step in range(4)] == [1, 3, 3, 3]
    assert all(images == shown[step][0] for step in shown for images in shown[step])


@pytest.mark.parametrize("factors", [(5, 3, 1), (1,)])
def test_statistics_by_channel_and_grids_that_the_scales_do_not_divide(factors, monkeypatch):
    pipe, swap = make_pipeline("SDXL", latent_channels=4, scale_factors=factors)
    pipe.vae.register_to_config(**STATISTICS)
    previewer = HieraTokPreviewer(pipe.vae, num_scales=1)
    decoded = watch(monkeypatch, pipe.vae, "decode")
    with previewer.watch(pipe):
        run(pipe, swap, num_images_per_prompt=2)
    assert previewer.images[0].size == (-(-96 // factors[0]), -(-64 // factors[0]))
    check_last(previewer, pipe, decoded[-1])


@pytest.mark.parametrize("name", ["EulerDiscrete", "PNDM", "UniPCMultistep", "HeunDiscrete", "LCM", "DDPM"])
def test_every_scheduler_tells_of_its_clean_latents(name, monkeypatch):
    pipe, swap = make_pipeline("SD")
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config)
    previewer = HieraTokPreviewer(pipe.vae, num_scales=4)
    decoded = watch(monkeypatch, pipe.vae, "decode")
    with previewer.watch(pipe):
        made = run(pipe, swap, num_inference_steps=5)
    assert correlation(previewer.images[0], made[0]) > 0.9, decoded


def test_several_watch_and_end_in_any_order():
    (pipe, swap), calls = make_pipeline("SD"), []
    one, other = (HieraTokPreviewer(pipe.vae, every=1, show=lambda images, step, n=n: calls.append(n)) for n in (1, 2))
    first = one.watch(pipe)
    first.__enter__()
    with other.watch(pipe):
        run(pipe, swap)
        first.__exit__(None, None, None)
        run(pipe, swap)
    assert calls == [1, 2, 1, 2, 2, 2] and "step" not in vars(pipe.scheduler)
    with other.watch(pipe):  # a call with a callback of its own takes none of the steps away
        for previewer in (one, other):
            run(pipe, swap, callback_on_step_end=previewer)
    assert calls[6:] == [2, 2, 1, 2, 2] and "step" not in vars(pipe.scheduler)
    pipe.scheduler.step = step = partial(pipe.scheduler.step)
    with other.watch(pipe):
        pass
    assert vars(pipe.scheduler)["step"] is step  # what another tool had put there


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, "_interrupt"])
def test_an_interrupted_run_leaves_the_next_ones_alone(interruption):
    (pipe, swap), shown = make_pipeline("SD"), []
    previewer = HieraTokPreviewer(pipe.vae, every=1, show=lambda images, step: shown.append(step))

    def interrupt(pipe, step, timestep, values):
        values = previewer(pipe, step, timestep, values)
        if step == 1:
            if interruption is KeyboardInterrupt:
                raise KeyboardInterrupt
            pipe._interrupt = True
        return values

    for again in ({}, {"callback_on_step_end": previewer}):
        with pytest.raises(KeyboardInterrupt) if interruption is KeyboardInterrupt else nullcontext():
            run(pipe, swap, num_inference_steps=4, callback_on_step_end=interrupt)
        assert shown == [1]
        run(pipe, swap, num_inference_steps=4, **again)
        assert shown == ([1, 1, 2, 3] if again else [1]) and "step" not in vars(pipe.scheduler)
        assert not pipe.unet._forward_pre_hooks
        shown.clear()


def test_an_error_while_showing_ends_the_watch_of_its_run():
    pipe, swap = make_pipeline("SD")

    def show(images, step):
        raise LookupError

    previewer = HieraTokPreviewer(pipe.vae, every=2, show=show)
    with pytest.raises(LookupError):
        run(pipe, swap, callback_on_step_end=previewer)
    assert "step" not in vars(pipe.scheduler) and not pipe.unet._forward_pre_hooks


def test_guidance_and_batches_give_an_image_each():
    pipe, swap = make_pipeline("DiT")
    previewer = HieraTokPreviewer(pipe.vae)
    for labels, scale in (([1, 2], 4.0), ([1, 2], 1.0), ([3], 1.0)):
        with previewer.watch(pipe):
            run(pipe, swap, class_labels=labels, guidance_scale=scale)
        assert len(previewer.images) == len(labels)


def test_a_file_holds_the_newest_images_and_is_whole_or_not_there(tmp_path):
    pipe, swap = make_pipeline("SD")
    previewer = HieraTokPreviewer(pipe.vae, show=tmp_path / "preview.png")
    with previewer.watch(pipe):
        run(pipe, swap, num_images_per_prompt=2)
    assert Image.open(tmp_path / "preview.png").size == (2 * 24, 16) and len(list(tmp_path.iterdir())) == 1


def test_a_notebook_shows_them_in_one_place(monkeypatch):
    shown, shell = [], SimpleNamespace(execution_count=3)
    module = SimpleNamespace(get_ipython=lambda: shell, display=SimpleNamespace())
    display = SimpleNamespace(display=lambda sheet, display_id, update: shown.append((display_id, update)))
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    pipe, swap = make_pipeline("SD")
    with HieraTokPreviewer(pipe.vae, every=1).watch(pipe):
        run(pipe, swap, num_inference_steps=3)
    assert [update for _, update in shown] == [False, True, True] and len({name for name, _ in shown}) == 1
    shown.clear()
    # The first that a callback shows is of the second step.
    run(pipe, swap, num_inference_steps=3, callback_on_step_end=HieraTokPreviewer(pipe.vae, every=1))
    assert [update for _, update in shown] == [False, True]


def test_what_cannot_be_shown_is_named():
    pipe, swap = make_pipeline("SD")
    for arguments, message in (
        ({"num_scales": 5}, "`num_scales`"),
        ({"num_scales": 0}, "`num_scales`"),
        ({"every": 0}, "`every`"),
    ):
        with pytest.raises(ValueError, match=message):
            HieraTokPreviewer(pipe.vae, **arguments)
    with pytest.raises(ValueError, match="`vae`"):
        HieraTokPreviewer(diffusers.AutoencoderTiny())
    pipe.scheduler = diffusers.SCMScheduler()
    with pytest.raises(ValueError, match="SCMScheduler"), HieraTokPreviewer(pipe.vae).watch(pipe):
        pass
    pipe.scheduler = diffusers.DDIMScheduler()
    other = AutoencoderHieraTok.from_core(random_core())
    step_of = pipe.scheduler.step
    with pytest.raises(ValueError, match="`latents` must have 4 channels"), HieraTokPreviewer(other).watch(pipe):
        run(pipe, swap)
    assert pipe.scheduler.step == step_of


@pytest.mark.parametrize("size", ["hieratok-tiny", "hieratok-tiny-16x", "hieratok-b"])
def test_a_preview_costs_less_than_a_tenth_of_a_decoding(size):
    for side in (256, 1024):
        decode = count_flops(HieraTokConfig.from_size(size), side, side)["decode"]
        assert decode[1] < 0.1 * decode[-1]
