"""Tiling: tiles cover a side, their weights sum to one, and tiled results are those of the whole image."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import images, noise, random_core
from PIL import Image
from processes import SERVER

from hieratok_hf import AutoencoderHieraTok, pretrained
from hieratok_hf.evaluation.metrics import psnr
from hieratok_hf.models.tiling import run_in_tiles, tile_spans, tile_weights

KODAK = Path(__file__).resolve().parents[3] / "shared" / "data" / "kodak"
SIDES = [(length, 16, stride, unit) for length in (1, 16, 17, 31, 100) for stride, unit in ((12, 1), (5, 1), (10, 4))]


@pytest.mark.parametrize(("length", "size", "stride", "unit"), SIDES)
def test_tiles_cover_a_side_with_weights_that_sum_to_one_and_pass_evenly(length, size, stride, unit):
    spans, total = tile_spans(length, size, stride, unit), torch.zeros(length)
    assert spans[0][0] == 0 and spans[-1][1] == length
    assert all(start % unit == 0 for start, _ in spans)
    for (start, end), (following, _) in pairwise(spans):
        assert end - start == size and start < following <= min(end, start + stride)
    last = spans[-1][1] - spans[-1][0]
    assert length <= size or size - unit < last <= size
    for (start, end), weight in zip(spans, tile_weights(spans)):
        assert weight.shape == (end - start,) and (weight > 0).all()
        assert weight.diff().numel() == 0 or weight.diff().abs().max() < 0.7  # no seam: a step would be 1
        total[start:end] += weight
    torch.testing.assert_close(total, torch.ones(length))


def test_weights_are_of_float32_under_any_default_dtype():
    expected = tile_weights([(0, 100), (80, 180)])
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = tile_weights([(0, 100), (80, 180)])
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_flat_image_stays_flat_in_half_precision():
    x = torch.full((1, 1, 100, 90), 0.7, dtype=torch.bfloat16)
    made = run_in_tiles(lambda part: part, x, (32, 32), (24, 20), (1, 1))
    assert made.dtype == torch.bfloat16 and (made.float() - x.float()).abs().max() <= 2**-8


def local_vae(**overrides) -> AutoencoderHieraTok:
    """A tokenizer that looks at one cell at a time, so that tiles lose nothing."""
    core = random_core(linear_path=1, output_conv=False, **overrides)
    with torch.no_grad():
        core.encoder.head.weight.zero_()
        core.decoder.head.weight.zero_()
    return AutoencoderHieraTok.from_core(core).eval()


@pytest.mark.parametrize("size", [(164, 260), (64, 300), (68, 36)])
@pytest.mark.parametrize(("slicing", "downsampling"), [(False, "learned"), (True, "learned"), (True, "mean")])
def test_every_scale_is_that_of_the_whole_image_where_nothing_looks_beyond_a_tile(size, slicing, downsampling):
    vae, sample = local_vae(downsampling=downsampling), images(2, 3, *size)
    with torch.no_grad():
        moments = vae.encode(sample).latent_dist.parameters
        latents = noise(2, 4, size[0] // 4, size[1] // 4)
        whole = vae.core.decode_scales(latents)
        vae.enable_tiling(64, 96)
        if slicing:
            vae.enable_slicing()
        torch.testing.assert_close(vae.encode(sample).latent_dist.parameters, moments, atol=1e-5, rtol=0)
        for k, image in zip((1, 2, 3, None), whole):
            torch.testing.assert_close(vae.decode(latents, num_scales=k).sample, image, atol=1e-5, rtol=0)
        torch.testing.assert_close(vae.decode(latents, return_scales=True).scales, tuple(whole), atol=1e-5, rtol=0)


@pytest.fixture
def vae() -> AutoencoderHieraTok:
    return AutoencoderHieraTok.from_core(random_core()).eval()


def test_images_no_larger_than_a_tile_are_left_alone_and_disabling_restores(vae):
    small, large = images(2, 3, 64, 64), images(1, 3, 96, 64)
    with torch.no_grad():
        expected = vae(small).sample, vae(large).sample
        vae.enable_tiling(64, 64)
        assert torch.equal(vae(small).sample, expected[0])
        assert not torch.equal(vae(large).sample, expected[1])
        vae.disable_tiling()
        assert torch.equal(vae(large).sample, expected[1])


def test_sides_of_tiles_are_checked_and_remembered_and_the_stride_follows_the_side(vae):
    for size, stride, unit in ((16, 0, 1), (16, 17, 1), (16, 8, 32)):
        with pytest.raises(ValueError, match="do not cover"):
            tile_spans(100, size, stride, unit)
    # A tile holds two cells of the coarsest scale.
    assert AutoencoderHieraTok.from_core(random_core(scale_factors=(64, 1))).tile_sample_min_height == 2 * 64 * 4
    assert not vae.use_tiling and (vae.tile_sample_min_height, vae.tile_sample_stride_width) == (256, 192)
    vae.enable_tiling(tile_sample_min_height=128, tile_sample_stride_height=64)
    vae.enable_tiling(tile_sample_min_width=32)
    for name, value, more in (
        ("tile_sample_min_height", 30, {}),
        ("tile_sample_min_width", 0, {}),
        ("tile_sample_stride_width", 2.0, {}),
        ("tile_sample_stride_width", 68, {"tile_sample_min_width": 64}),
    ):
        with pytest.raises(ValueError, match=f"{name}.*got {value}"):
            vae.enable_tiling(**{name: value}, **more)
    assert vae.use_tiling
    assert (vae.tile_sample_min_height, vae.tile_sample_stride_height) == (128, 64)
    assert (vae.tile_sample_min_width, vae.tile_sample_stride_width) == (32, 24)


def test_what_cannot_be_tiled_is_refused_by_its_own_size(vae):
    vae.enable_tiling(64, 64)
    for shape, named in (((1, 3, 99, 64), "99x64"), ((1, 4, 128, 128), "3 channels"), ((3, 128, 128), "shape")):
        with pytest.raises(ValueError, match=named):
            vae.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match="num_scales"):
        vae.decode(noise(1, 4, 40, 40), num_scales=5)


def test_without_scale_causality_all_scales_come_in_tiles_but_none_alone():
    vae, latents = local_vae(scale_causal=False), noise(1, 4, 40, 24)
    whole = vae.core.decode_scales(latents)
    vae.enable_tiling(64, 64)
    torch.testing.assert_close(vae.decode(latents, return_scales=True).scales, tuple(whole), atol=1e-5, rtol=0)
    for return_scales in (False, True):
        with pytest.raises(ValueError, match="num_scales=2"):
            vae.decode(latents, num_scales=2, return_scales=return_scales)


@pytest.mark.skipif(not KODAK.is_dir(), reason="needs ../shared/data/kodak")
def test_the_shipped_weights_tile_without_a_seam():
    vae = AutoencoderHieraTok.from_pretrained(pretrained("hieratok-tiny"))
    image = Image.open(KODAK / "kodim17.png").convert("RGB")
    sample = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        latents = vae.encode(sample).latent_dist.mode()
        whole = vae.decode(latents).sample
        vae.enable_tiling(256, 256)
        tiled = vae.decode(latents).sample
        both = vae(sample).sample
    assert psnr(tiled, whole) > 45 and psnr(both, whole) > 45
    # No more error where tiles meet than elsewhere: rows 192 to 256 of the first two tiles.
    error = (tiled - whole).square().mean(dim=(0, 1, 3))
    assert error[192:256].mean() < 2 * error.mean()


# More tiles than processes, and fewer.
PROCESSES = 3
SHARED = {"decode": (1, 4, 20, 43), "encode": (2, 3, 96, 64)}


def run_shared(rank: int, folder: Path) -> None:
    """What a process does: decode and encode what all others do, and save what it got."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    vae = AutoencoderHieraTok.from_core(random_core()).eval()
    vae.enable_tiling(64, 64)
    vae.enable_parallel_tiling()
    scales = vae.decode(noise(*SHARED["decode"]), return_scales=True).scales
    moments = vae.encode(images(*SHARED["encode"])).latent_dist.parameters
    torch.save([*scales, moments], folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_processes_that_share_tiles_all_get_the_image_of_one_to_the_bit(vae, tmp_path):
    processes = [SERVER.Process(target=run_shared, args=(rank, tmp_path)) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    vae.enable_tiling(64, 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            expected = [*vae.decode(noise(*SHARED["decode"]), return_scales=True).scales]
            expected.append(vae.encode(images(*SHARED["encode"])).latent_dist.parameters)
    finally:
        torch.set_num_threads(threads)
    for rank, process in enumerate(processes):
        process.join(120)
        assert process.exitcode == 0
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert not any(tensor.requires_grad for tensor in found)


def test_parallel_tiling_needs_processes_and_ends_with_tiling(vae, tmp_path):
    with pytest.raises(ValueError, match="init_process_group"):
        vae.enable_parallel_tiling()
    sample = images(1, 3, 96, 64)
    with torch.no_grad():
        whole = vae.encode(sample).latent_dist.parameters
        dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            with pytest.raises(ValueError, match="`group`"):
                vae.enable_parallel_tiling(dist.GroupMember.NON_GROUP_MEMBER)
            vae.enable_tiling(64, 64)
            tiled = vae.encode(sample).latent_dist.parameters
            vae.enable_parallel_tiling(dist.group.WORLD)
            assert torch.equal(vae.encode(sample).latent_dist.parameters, tiled)
        finally:
            dist.destroy_process_group()
        vae.disable_tiling()
        assert not vae.use_parallel_tiling
        assert torch.equal(vae.encode(sample).latent_dist.parameters, whole)
