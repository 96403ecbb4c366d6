"""AutoencoderHieraTok: equality with HieraTokModel, what pipelines read, and what diffusers expects of a model."""

import copy
import functools
import logging
import pickle

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from helpers import images, random_core
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.backends import mkldnn
from torch.fx.experimental.proxy_tensor import make_fx

from hieratok_hf import AutoencoderHieraTok, HieraTokModel
from hieratok_hf.models.autoencoder_hieratok import AutoencoderHieraTokOutput


@pytest.fixture
def vae():
    return AutoencoderHieraTok.from_core(random_core())


@pytest.fixture
def sample():
    return images(3, 3, 28, 20)  # 7x5 tokens


@pytest.mark.parametrize("downsampling", ["learned", "mean"])
def test_both_classes_give_the_same_bits(downsampling, sample):
    vae = AutoencoderHieraTok.from_core(random_core(downsampling=downsampling))
    model = HieraTokModel.from_core(copy.deepcopy(vae.core))
    output, posterior = model(sample), vae.encode(sample).latent_dist
    latents = model.encode(sample).latents
    assert type(posterior) is DiagonalGaussianDistribution
    assert torch.equal(vae.encode(sample, return_dict=False)[0].mode(), latents)
    assert torch.equal(output.moments, posterior.parameters) and torch.equal(output.latents, latents)
    assert torch.equal(output.reconstruction, vae(sample).sample)
    for num_scales in (1, 2, 3, 4, None):
        ours = vae.decode(latents, num_scales=num_scales, generator=torch.Generator()).sample
        assert torch.equal(ours, model.decode(latents, num_scales=num_scales).reconstruction)
        assert torch.equal(ours, vae.core.decode(latents, num_scales))
    seeds = [{"sample_posterior": True, "generator": torch.Generator().manual_seed(seed)} for seed in (1, 1, 2)]
    sampled = [model(sample, **seeds[0]).reconstruction, *(vae(sample, **options).sample for options in seeds[1:])]
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[1], sampled[2]) and not torch.equal(sampled[1], vae(sample).sample)


@pytest.mark.parametrize("slicing", [False, True])
@pytest.mark.parametrize("num_scales", [None, 1, 3])
def test_all_scales_are_returned_where_they_are_asked_for(vae, sample, num_scales, slicing):
    latents = vae.encode(sample).latent_dist.mode()
    expected = tuple(vae.core.decode_scales(latents, num_scales))
    if slicing:
        vae.enable_slicing()
    output = vae.decode(latents, num_scales=num_scales, return_scales=True)
    assert type(output) is AutoencoderHieraTokOutput and isinstance(output, DecoderOutput)
    torch.testing.assert_close(output.to_tuple(), (expected[-1], expected), rtol=0, atol=1e-5)
    as_tuple = vae.decode(latents, num_scales=num_scales, return_scales=True, return_dict=False)
    torch.testing.assert_close(as_tuple, output.to_tuple(), rtol=0, atol=0)
    plain = vae.decode(latents, num_scales=num_scales)
    assert plain.scales is None and plain.to_tuple() == (plain.sample,)
    torch.testing.assert_close(plain.sample, expected[-1], rtol=0, atol=1e-5)
    if num_scales is None:
        image, scales = vae(sample, return_scales=True, return_dict=False)
        assert torch.equal(vae(sample).sample, image)
        torch.testing.assert_close(scales, expected, rtol=0, atol=1e-5)
    vae.disable_slicing()
    assert torch.equal(vae.decode(latents, num_scales=num_scales).sample, vae.core.decode(latents, num_scales))


def test_what_pipelines_read(vae):
    assert (vae.config.scaling_factor, vae.config.shift_factor, vae.config.force_upcast) == (1.0, 0.0, False)
    assert vae.config.latents_mean is None and vae.config.latents_std is None
    assert 2 ** (len(vae.config.block_out_channels) - 1) == vae.spatial_compression_ratio == vae.config.patch_size == 4
    assert len(vae.config.encoder_block_out_channels) == len(vae.config.block_out_channels) == 3
    assert vae.config.latent_channels == 4


def faked(function, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inside = function(mode.from_tensor(x))
    after = function(mode.from_tensor(x))
    assert {type(inside), type(after)} == {FakeTensor} and inside.dtype == after.dtype == torch.float32
    assert inside.shape == after.shape
    return torch.zeros(inside.shape)


def traced(function, x, kind):
    return make_fx(function, tracing_mode=kind, _allow_non_fake_inputs=True)(x)(x)


WATCHERS = {
    "fakes": faked,
    "vmap": lambda function, x: torch.vmap(function)(x[None])[0],
    "jit": lambda function, x: torch.jit.trace(function, x[..., :20, :16])(x),
    "real": functools.partial(traced, kind="real"),
    "fake": functools.partial(traced, kind="fake"),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", WATCHERS)
@pytest.mark.parametrize("part", ["encode", "decode", "forward"])
def test_tracers_transforms_and_fakes_see_through_the_model(part, name, monkeypatch):
    monkeypatch.setattr("hieratok_hf.ops.onednn_linear.PREFERS_ONEDNN", mkldnn.is_available())
    core = random_core(scale_factors=(4, 1), encoder_num_layers=1, decoder_num_layers=1)
    vae = AutoencoderHieraTok.from_core(core).requires_grad_(False)
    parts = {"encode": lambda x: vae.encode(x).latent_dist.mode(), "decode": lambda x: vae.decode(x).sample}
    function, x = parts.get(part, lambda x: vae(x).sample), images(2, 4 if part == "decode" else 3, 28, 20)
    expected = function(x)
    found = WATCHERS[name](function, x)
    torch.testing.assert_close(found, torch.zeros_like(expected) if name == "fakes" else expected, rtol=0, atol=1e-5)


def test_repeated_blocks_compile_to_one_graph_a_side(sample):
    vae = AutoencoderHieraTok.from_core(random_core(std=0.05))
    expected = vae(sample).sample
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    vae.compile_repeated_blocks(backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(vae(sample).sample, expected, rtol=0, atol=1e-6)
    assert counter.frame_count == 2


@pytest.mark.parametrize("downsampling", ["learned", "mean"])
def test_one_graph_serves_every_size(downsampling):
    # More blocks and scales are more of the same to the compiler, which takes seconds for each, and more for learned.
    sizes = {"encoder_num_layers": 1, "decoder_num_layers": 1, "downsampling": downsampling}
    if downsampling == "learned":
        core = random_core(scale_factors=(6, 1), **sizes)
        function, backend, unit, channels = core.decode, "aot_eager", 1, 4
    else:
        core = random_core(scale_factors=(6, 4, 1), rotary_coordinates="fraction", learned_positions=3, **sizes)
        function, backend, unit, channels = AutoencoderHieraTok.from_core(core), "eager", 4, 3
    torch.compiler.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    # That the first image's sides are equal says nothing of the others'.
    any_sides = torch.fx.experimental._config.patch(use_duck_shape=False)
    with any_sides, torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        # Coarse grids of one cell, of one row, and of many.
        for height, width in ((8, 8), (4, 4), (2, 16), (7, 5), (24, 40)):
            given = images(2, channels, height * unit, width * unit)
            torch.testing.assert_close(compiled(given), function(given), rtol=0, atol=1e-5)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_loading_warns_of_unknown_keys_alone(vae, sample, tmp_path, caplog, low_cpu_mem_usage):
    vae.save_pretrained(tmp_path)
    logger = logging.getLogger("diffusers")
    caplog.set_level(logging.WARNING, logger="diffusers")  # whatever another test wants of it
    logger.addHandler(caplog.handler)
    loaded = AutoencoderHieraTok.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not caplog.records
    AutoencoderHieraTok.from_config({**vae.config, "author": "me"})
    logger.removeHandler(caplog.handler)
    assert "author" in caplog.text
    assert torch.equal(loaded(sample).sample, vae(sample).sample)
    assert dict(loaded.config) | {"_name_or_path": None} == dict(vae.config) | {"_name_or_path": None}


def test_copies_and_pickles(vae, sample):
    for other in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        assert torch.equal(other(sample).sample, vae(sample).sample)
