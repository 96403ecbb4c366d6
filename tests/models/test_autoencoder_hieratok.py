"""AutoencoderHieraTok: equality with HieraTokModel, what pipelines read, and what diffusers expects of a model."""

import copy
import logging
import os
import pickle
import subprocess
import sys

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.training_utils import EMAModel
from helpers import changed_tokens, images, random_core, tiny
from torch._dynamo.testing import CompileCounterWithBackend

from hieratok_hf import AutoencoderHieraTok, HieraTokAttnProcessor, HieraTokModel
from hieratok_hf.models.autoencoder_hieratok import AutoencoderHieraTokOutput


@pytest.fixture
def vae(tiny_config):
    torch.manual_seed(0)
    return AutoencoderHieraTok(**tiny_config.model_fields).eval()


@pytest.fixture
def sample():
    return torch.rand(3, 3, 28, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1  # 7x5 tokens


@pytest.mark.parametrize("downsampling", ["learned", "mean"])
def test_both_classes_give_the_same_bits(downsampling, sample):
    config = tiny(downsampling=downsampling)
    vae, model = AutoencoderHieraTok(**config.model_fields).eval(), HieraTokModel(config).eval()
    assert list(model.state_dict()) == list(vae.state_dict())
    model.load_state_dict(vae.state_dict())
    output, posterior = model(sample), vae.encode(sample).latent_dist
    assert torch.equal(output.moments, posterior.parameters)
    assert torch.equal(output.reconstruction, vae(sample).sample)
    for num_scales in (1, 2, 3, 4):
        ours = vae.decode(output.latents, num_scales=num_scales).sample
        assert torch.equal(ours, model.decode(output.latents, num_scales=num_scales).reconstruction)


def test_encode_and_decode_speak_diffusers(vae, sample):
    posterior = vae.encode(sample).latent_dist
    assert type(posterior) is DiagonalGaussianDistribution
    assert torch.equal(vae.encode(sample, return_dict=False)[0].mode(), posterior.mode())
    latents = posterior.sample(torch.Generator().manual_seed(0))
    assert latents.shape == (3, 4, 7, 5)
    decoded = vae.decode(latents, return_dict=False, generator=torch.Generator())[0]
    assert decoded.shape == sample.shape and torch.equal(decoded, vae.decode(latents).sample)


def test_forward_samples_only_when_asked(vae, sample):
    mode = vae(sample).sample
    assert torch.equal(mode, vae(sample, return_dict=False)[0])
    noisy = [vae(sample, sample_posterior=True, generator=torch.Generator().manual_seed(1)).sample for _ in range(2)]
    assert torch.equal(*noisy) and not torch.equal(noisy[0], mode)


def test_what_pipelines_read(vae):
    assert (vae.config.scaling_factor, vae.config.shift_factor, vae.config.force_upcast) == (1.0, 0.0, False)
    assert vae.config.latents_mean is None and vae.config.latents_std is None
    assert 2 ** (len(vae.config.block_out_channels) - 1) == vae.spatial_compression_ratio == vae.config.patch_size == 4
    assert len(vae.config.encoder_block_out_channels) == len(vae.config.block_out_channels)
    assert vae.config.latent_channels == 4


@pytest.mark.parametrize("slicing", [False, True])
@pytest.mark.parametrize("num_scales", [None, 1, 3])
def test_all_scales_are_returned_where_they_are_asked_for(vae, sample, num_scales, slicing):
    latents = vae.encode(sample).latent_dist.mode()
    expected = vae.core.decode_scales(latents, num_scales)
    if slicing:
        vae.enable_slicing()
    output = vae.decode(latents, num_scales=num_scales, return_scales=True)
    assert type(output) is AutoencoderHieraTokOutput and isinstance(output, DecoderOutput)
    assert output.sample is output.scales[-1]
    plain = vae.decode(latents, num_scales=num_scales)
    assert plain.scales is None and plain.to_tuple() == (plain.sample,)
    image, scales = vae.decode(latents, num_scales=num_scales, return_scales=True, return_dict=False)
    (alone,) = vae.decode(latents, num_scales=num_scales, return_dict=False)
    assert torch.equal(image, output.sample) and torch.equal(alone, plain.sample)
    for ours, same, theirs in zip(output.scales, scales, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        assert torch.equal(ours, same)
    torch.testing.assert_close(plain.sample, expected[-1], rtol=0, atol=1e-5)
    if num_scales is None:
        called = vae(sample, return_scales=True)
        image, scales = vae(sample, return_scales=True, return_dict=False)
        assert torch.equal(called.sample, image) and vae(sample).scales is None
        assert all(torch.equal(*pair) for pair in zip(called.scales, scales, strict=True))
        torch.testing.assert_close(called.scales, output.scales, rtol=0, atol=1e-5)


def test_slicing_changes_nothing(vae, sample):
    expected, latents = vae(sample).sample, vae.encode(sample).latent_dist.mode()
    vae.enable_slicing()
    torch.testing.assert_close(vae(sample).sample, expected, rtol=0, atol=1e-5)
    assert vae.decode(latents, num_scales=2).sample.shape == (3, 3, 8, 8)
    vae.disable_slicing()
    assert torch.equal(vae(sample).sample, expected)


def test_fused_projections_give_the_same_image(vae, sample):
    expected, keys = vae(sample).sample, list(vae.state_dict())
    vae.fuse_qkv_projections()
    assert any("to_qkv" in name for name, _ in vae.named_parameters())
    torch.testing.assert_close(vae(sample).sample, expected, rtol=0, atol=1e-5)
    vae.unfuse_qkv_projections()
    assert list(vae.state_dict()) == keys and torch.equal(vae(sample).sample, expected)


def test_attention_processors_are_set_and_used(vae, sample):
    expected = vae(sample).sample
    assert len(vae.attn_processors) == 4
    calls = []

    class Counting(HieraTokAttnProcessor):
        def __call__(self, *args, **kwargs):
            calls.append(self)
            return super().__call__(*args, **kwargs)

    vae.set_attn_processor(Counting(backend="reference"))
    torch.testing.assert_close(vae(sample).sample, expected, rtol=0, atol=1e-5)
    assert len(calls) == 4


@pytest.mark.parametrize("backend", ["reference", "sdpa", "auto"])
def test_the_scale_causal_property_holds_through_every_processor(vae, backend):
    vae.set_attn_processor(HieraTokAttnProcessor(backend=backend))
    latents = torch.randn(1, 4, 8, 8)
    before = vae.core.decode_scales(latents)
    with changed_tokens(vae.core.decoder, lambda tokens: torch.cat([tokens[:, :-64], tokens[:, -64:].flip(1)], dim=1)):
        after = vae.core.decode_scales(latents)
    assert all(torch.equal(*pair) for pair in zip(before[:-1], after[:-1]))
    assert (before[-1] - after[-1]).abs().max() > 1e-3


def test_gradient_checkpointing_changes_no_gradient(tiny_config, sample):
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        vae = AutoencoderHieraTok(**tiny_config.model_fields).train()
        if enable:
            vae.enable_gradient_checkpointing()
            assert vae.is_gradient_checkpointing
        vae(sample).sample.square().mean().backward()
        gradients.append([p.grad for p in vae.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert (plain is None) == (checkpointed is None)
        if plain is not None:
            torch.testing.assert_close(plain, checkpointed)


def test_training_with_an_average_of_the_weights(vae, sample):
    average = EMAModel(vae.parameters())
    optimizer = torch.optim.SGD(vae.parameters(), lr=0.1)
    before = copy.deepcopy(vae.state_dict())
    (vae.train()(sample).sample - sample).square().mean().backward()
    optimizer.step()
    average.step(vae.parameters())
    assert any(not torch.equal(before[name], weight) for name, weight in vae.state_dict().items())


def test_layerwise_casting_stores_eight_bits(vae, sample):
    expected = vae(sample).sample
    vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert vae.core.decoder.blocks[0].mlp.linear_in.weight.dtype == torch.float8_e4m3fn
    result = vae(sample).sample
    assert result.dtype == torch.float32 and (result - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_close_and_finite(vae, sample, dtype):
    expected = vae(sample).sample
    result = vae.to(dtype)(sample.to(dtype)).sample
    assert result.dtype == dtype and torch.isfinite(result).all()
    assert (result.float() - expected).abs().max() < 0.05


def test_repeated_blocks_compile_to_one_graph_a_side(vae, sample):
    expected = vae(sample).sample
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    vae.compile_repeated_blocks(backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(vae(sample).sample, expected, rtol=0, atol=1e-6)
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("scale_factors", "coordinates", "downsampling"),
    [((8, 6, 2, 1), "cells", "learned"), ((6, 4, 1), "fraction", "mean"), ((1,), "cells", "learned")],
)
def test_one_graph_serves_every_size(scale_factors, coordinates, downsampling):
    # More blocks are more of the same to the compiler, which takes seconds for each.
    blocks = {"encoder_num_layers": 1, "decoder_num_layers": 1}
    kinds = {"scale_factors": scale_factors, "rotary_coordinates": coordinates, "downsampling": downsampling}
    core = random_core(**kinds, **blocks, learned_positions=3)
    vae = AutoencoderHieraTok.from_core(core)
    torch.compiler.reset()
    compiled = torch.compile(vae, backend="aot_eager", fullgraph=True, dynamic=True)
    # That the first image's sides are equal says nothing of the others'.
    any_sides = torch.fx.experimental._config.patch(use_duck_shape=False)
    with any_sides, torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        # Coarse grids of one cell, of one row, and of many.
        for height, width in ((32, 32), (16, 16), (8, 64), (28, 20), (96, 160)):
            sample = images(2, 3, height, width)
            torch.testing.assert_close(compiled(sample).sample, vae(sample).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_loading_warns_of_nothing(vae, sample, tmp_path, caplog, low_cpu_mem_usage):
    vae.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        logging.getLogger("diffusers").addHandler(caplog.handler)
        loaded = AutoencoderHieraTok.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not caplog.records
    assert torch.equal(loaded(sample).sample, vae(sample).sample)
    assert dict(loaded.config) | {"_name_or_path": None} == dict(vae.config) | {"_name_or_path": None}


def test_lora_adapters_train_and_merge(vae, sample):
    peft = pytest.importorskip("peft")
    expected = vae(sample).sample
    vae.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert not torch.allclose(vae(sample).sample, expected)
    vae.disable_adapters()
    torch.testing.assert_close(vae(sample).sample, expected)


def test_a_pipeline_takes_it_for_its_vae(vae, tmp_path):
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=1, num_embeds_ada_norm=1000,  # the pipeline takes 1000 for the null class
    )  # fmt: skip
    pipe = DiTPipeline(transformer=transformer.eval(), vae=vae, scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    made = pipe([1, 2], num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert made.shape == (2, 32, 32, 3)
    pipe.save_pretrained(tmp_path)
    # Another process has imported no more of the package than its name.
    load = f"DiTPipeline.from_pretrained({str(tmp_path)!r})"
    code = f"import hieratok_hf; from diffusers import DiTPipeline; print({load}.vae.config.patch_size)"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "4", result.stderr
    loaded = DiTPipeline.from_pretrained(tmp_path)
    assert type(loaded.vae) is AutoencoderHieraTok
    loaded.set_progress_bar_config(disable=True)
    again = loaded([1, 2], num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert (made == again).all()


def test_an_unknown_key_is_warned_of(vae, caplog):
    logger = logging.getLogger("diffusers")
    caplog.set_level(logging.WARNING, logger="diffusers")  # whatever another test wants of it
    logger.addHandler(caplog.handler)
    AutoencoderHieraTok.from_config({**vae.config, "latent_chanels": 9})
    logger.removeHandler(caplog.handler)
    assert "latent_chanels" in caplog.text and "not expected" in caplog.text


def test_copies_and_pickles(vae, sample):
    for other in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        assert torch.equal(other(sample).sample, vae(sample).sample)
