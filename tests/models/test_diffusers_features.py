"""What diffusers offers for its own autoencoders, on this one: offloading, casts, adapters, quantised weights."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers import images, noise, random_core
from tiny_pipelines import make_pipeline
from torch import nn

import hieratok_hf
from hieratok_hf import AutoencoderHieraTok, HieraTokAttnProcessor, HieraTokImageProcessorPil, HieraTokModel
from hieratok_hf.evaluation.metrics import psnr

SHIPPED = Path(hieratok_hf.pretrained("hieratok-tiny"))
PHOTOGRAPH = Path(__file__).parents[2] / "src" / "hieratok_hf" / "example_images" / "hat.webp"


@pytest.fixture
def vae() -> AutoencoderHieraTok:
    return AutoencoderHieraTok.from_core(random_core(std=0.05, latent_channels=8))


@pytest.fixture
def sample() -> torch.Tensor:
    return images(2, 3, 28, 20)  # 7x5 cells


@torch.no_grad()
def everything(vae: AutoencoderHieraTok, sample: torch.Tensor) -> list[torch.Tensor]:
    """What every entry computes: moments, images of the mode, of two scales, of a forward pass, in this order."""
    posterior = vae.encode(sample).latent_dist
    latents = noise(2, 8, 7, 5).to(sample)
    if not sample.is_contiguous():
        latents = latents.contiguous(memory_format=torch.channels_last)
    decoded = [vae.decode(latents, num_scales=scales).sample for scales in (None, 2)]
    return [posterior.parameters, *decoded, vae(sample).sample]


assert_same = partial(torch.testing.assert_close, atol=1e-5, rtol=0)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading_through_every_entry(vae, sample, tmp_path, monkeypatch, offload_type):
    # Memory that nothing was written to holds NaN, so weights that are not brought back cannot pass.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        expected = everything(vae, sample)
        settings = {"offload_type": offload_type, "offload_to_disk_path": str(tmp_path), "num_blocks_per_group": 1}
        vae.enable_group_offload(onload_device=torch.device("cpu"), **settings)
        assert all(weight.isnan().all() for weight in vae.parameters())
        for _ in range(2):
            assert_same(everything(vae, sample), expected, atol=0)
    finally:
        torch.use_deterministic_algorithms(False)


def test_sequential_and_model_offloading_through_every_entry(vae, sample):
    accelerate = pytest.importorskip("accelerate")
    expected, moved = everything(vae, sample), []

    class Moving(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            moved.append(module)
            return args, kwargs

    accelerate.hooks.add_hook_to_module(vae, Moving())
    for enter, given in ((vae.encode, sample), (vae, sample), (vae.decode, noise(2, 8, 7, 5))):
        moved.clear()
        enter(given)
        assert moved and moved[0] is vae
    accelerate.hooks.remove_hook_from_module(vae)
    accelerate.cpu_offload(vae, execution_device=torch.device("cpu"))
    assert_same(everything(vae, sample), expected, atol=0)
    assert all(weight.is_meta for weight in vae.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["model", "sequential", "block_level", "leaf_level"])
def test_offloading_on_a_gpu(kind):
    expected = make_pipeline()([0, 1], 2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    pipe = make_pipeline()
    if kind == "model":
        pipe.enable_model_cpu_offload()
    elif kind == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        settings = {"offload_type": kind, "num_blocks_per_group": 1, "use_stream": True}
        pipe.transformer.to("cuda")
        pipe.enable_group_offload(onload_device=torch.device("cuda"), exclude_modules=["transformer"], **settings)
    made = pipe([0, 1], 2, generator=torch.Generator().manual_seed(0), output_type="pt").images.cpu()
    torch.testing.assert_close(made, expected, atol=2e-2, rtol=0)
    latents = torch.zeros(1, pipe.vae.config.latent_channels, 2, 2, device="cuda")
    assert pipe.vae.decode(latents).sample.device.type == "cuda"


@pytest.mark.parametrize(
    ("storage", "compute"), [(torch.float8_e4m3fn, torch.float32), (torch.float8_e5m2, torch.bfloat16)]
)
def test_layerwise_casting_is_the_rounding_of_the_weights(vae, sample, storage, compute):
    vae, sample = vae.to(compute), sample.to(compute)
    rounded = copy.deepcopy(vae)
    for name, module in rounded.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and "patch_embed" not in name:  # which diffusers keeps by default
            for weight in module.parameters():
                weight.data = weight.data.to(storage).to(compute)
    expected, plain = everything(rounded, sample), everything(vae, sample)
    vae.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)
    for _ in range(2):
        results = everything(vae, sample)
        assert_same(results, expected)
        dtypes = {name: weight.dtype for name, weight in vae.named_parameters()}
        assert all(dtype == storage for name, dtype in dtypes.items() if "to_q" in name or "head" in name)
        assert all(dtype == compute for name, dtype in dtypes.items() if "norm" in name or "scale" in name)
    assert not torch.allclose(results[1], plain[1], atol=1e-3)


def adapter_config(**given: Any) -> Any:
    peft = pytest.importorskip("peft")
    targets = {"target_modules": ["to_q", "to_v", "linear_in", "patch_embed", "coarse_embed.1"]}
    return peft.LoraConfig(r=2, **{"init_lora_weights": False, **targets, **given})


def test_an_adapter_is_saved_loaded_merged_and_taken_out_again(vae, sample, tmp_path):
    plain, base = everything(vae, sample), copy.deepcopy(vae)
    vae.add_adapter(adapter_config(lora_alpha=6), "mine")
    adapted = everything(vae, sample)
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(adapted, plain))
    vae.save_lora_adapter(tmp_path, adapter_name="mine")
    base.load_lora_adapter(tmp_path, prefix=None, adapter_name="theirs", use_safetensors=True)
    assert_same(everything(base, sample), adapted)
    base.unload_lora()
    assert_same(everything(base, sample), plain)
    vae.fuse_lora()
    assert_same(everything(vae, sample), adapted, atol=1e-4)
    vae.unfuse_lora()
    vae.set_adapters("mine", 0.5)
    halved = everything(vae, sample)
    vae.set_adapters("mine", 1.0)
    vae.fuse_lora(lora_scale=0.5)
    vae.unload_lora()
    assert_same(everything(vae, sample), halved, atol=1e-4)
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(halved, plain))
    assert not any("lora" in name for name in vae.state_dict())


def test_fused_projections_of_a_loaded_model_with_compiled_blocks_and_with_an_adapter(vae, sample, tmp_path):
    expected, keys = everything(vae, sample), list(vae.state_dict())
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderHieraTok.from_pretrained(tmp_path)
    loaded.fuse_qkv_projections()
    assert any("to_qkv" in name for name, _ in loaded.named_parameters())
    assert_same(everything(loaded, sample), expected)
    loaded.add_adapter(adapter_config(target_modules=["to_qkv"]))
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(everything(loaded, sample), expected))
    loaded.unload_lora()
    loaded.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert_same(everything(loaded, sample), expected)
    loaded.unfuse_qkv_projections()
    assert list(loaded.state_dict()) == keys


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_channels_last(vae, sample, dtype, atol):
    vae, sample = vae.to(dtype), sample.to(dtype)
    expected, turned = everything(vae, sample), sample.contiguous(memory_format=torch.channels_last)
    assert_same(everything(vae, turned), expected, atol=atol)
    vae.to(memory_format=torch.channels_last)
    assert vae.core.encoder.patch_embed.weight.is_contiguous(memory_format=torch.channels_last)
    assert_same(everything(vae, turned), expected, atol=atol)


def test_attention_processors_by_name(vae, sample):
    expected = everything(vae, sample)
    processors = {name: HieraTokAttnProcessor(backend="reference") for name in vae.attn_processors}
    vae.set_attn_processor({**processors})
    assert vae.attn_processors == processors and len(processors) == 4
    assert_same(everything(vae, sample), expected)


@pytest.fixture(scope="module")
def shipped() -> AutoencoderHieraTok:
    return AutoencoderHieraTok.from_pretrained(hieratok_hf.pretrained("hieratok-tiny"))


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, (40, 30)), (torch.float16, (55, 45))])
def test_half_precision_of_the_shipped_weights(shipped, dtype, least):
    photograph = HieraTokImageProcessorPil()(str(PHOTOGRAPH), return_tensors="pt").pixel_values[:, :, 64:192, 64:192]
    rows, columns = torch.arange(64)[:, None] // 8, torch.arange(64)[None] // 8
    board = ((rows + columns) % 2 * 2.0 - 1).expand(1, 3, 64, 64)  # the hardest contrasts
    half = copy.deepcopy(shipped).to(dtype)
    for sample, least_psnr in zip((photograph, board), least, strict=True):
        with torch.no_grad():
            posterior, expected = shipped.encode(sample).latent_dist, shipped(sample).sample
            moments, made = half.encode(sample.to(dtype)).latent_dist, half(sample.to(dtype)).sample
        assert torch.isfinite(moments.std).all() and made.dtype == dtype
        assert (moments.mean.float() - posterior.mean).abs().max() < 0.05 * posterior.mean.abs().max()
        assert psnr(made.float(), expected).item() > least_psnr


def quantisation(library: str) -> Any:
    """diffusers' configuration of weights in eight bits, where the library is installed."""
    if library == "torchao":
        pytest.importorskip("torchao", minversion="0.18")  # earlier ones cannot write these weights
        return diffusers.TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())
    pytest.importorskip("optimum.quanto")
    return diffusers.QuantoConfig(weights_dtype="int8")


@pytest.mark.filterwarnings("ignore:Quanto:FutureWarning")
@pytest.mark.parametrize("library", ["torchao", "quanto"])
def test_quantised_weights_give_the_same_images(shipped, library, tmp_path):
    options = {"quantization_config": quantisation(library), "dtype": torch.float32}
    quantised, sample = AutoencoderHieraTok.from_pretrained(SHIPPED, **options), images(1, 3, 64, 96)
    with torch.no_grad():
        expected, made = shipped(sample).sample, quantised(sample).sample
        latents = shipped.encode(sample).latent_dist.mode()
        assert psnr(quantised.decode(latents).sample, shipped.decode(latents).sample) > 50
    assert psnr(made, expected) > 50 and not torch.equal(made, expected)

    quantised.save_pretrained(tmp_path)
    weights = [(folder / "diffusion_pytorch_model.safetensors").stat().st_size for folder in (tmp_path, SHIPPED)]
    assert weights[0] < 0.5 * weights[1]
    loaded = AutoencoderHieraTok.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(sample).sample, made)
        if library == "torchao":
            assert torch.equal(HieraTokModel.from_pretrained(tmp_path).eval()(sample).reconstruction, made)
    if library == "torchao":
        quantised.requires_grad_(False)
        quantised.add_adapter(adapter_config(init_lora_weights=True, target_modules=["to_q", "to_v"]))
        quantised(sample).sample.square().mean().backward()
        gradients = {name: weight.grad for name, weight in quantised.named_parameters() if weight.grad is not None}
        assert gradients and all("lora_" in name for name in gradients)
        assert any(gradient.abs().max() > 0 for gradient in gradients.values())
