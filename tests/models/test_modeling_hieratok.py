"""HieraTokModel: outputs, Auto classes, attention implementations, checkpointing, and what transformers expects."""

import pytest
import torch
from helpers import noise, random_core, tiny
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoConfig, AutoModel

import hieratok_hf
from hieratok_hf import AutoencoderHieraTok, HieraTokConfig, HieraTokModel
from hieratok_hf.models.layers import HieraTokAttnProcessor
from hieratok_hf.models.losses import image_pyramid


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return HieraTokModel(tiny_config).eval()


@pytest.fixture
def pixel_values():
    return torch.rand(2, 3, 28, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1  # 7x5 tokens


def test_output_holds_everything(model, pixel_values):
    output = model(pixel_values, output_hidden_states=True)
    assert output.reconstruction.shape == pixel_values.shape
    assert output.latents.shape == (2, 4, 7, 5) and output.moments.shape == (2, 8, 7, 5)
    assert torch.equal(output.posterior.mode(), output.latents)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    num_encoder_states = model.config.encoder_num_layers + 1
    assert {state.shape[1] for state in output.hidden_states[:num_encoder_states]} == {35}
    assert {state.shape[1] for state in output.hidden_states[num_encoder_states:]} == {1 + 4 + 12 + 35}
    assert output.attentions is None


def test_loss_weighs_squared_errors_and_divergence(model, pixel_values):
    output = model(pixel_values)
    assert list(output)[:3] == ["loss", "reconstruction", "latents"]
    mse = (output.reconstruction - pixel_values).square().mean()
    kl = output.posterior.kl().sum() / output.latents.numel()
    pairs = zip(model.core.decode_scales(output.latents), image_pyramid(pixel_values, model.config), strict=True)
    errors = [(a - b).square().mean() for a, b in pairs]
    coarse = (8 * errors[0] + 4 * errors[1] + 2 * errors[2]) / 3
    assert kl > 0 and coarse > 0
    expected = mse + model.config.kl_weight * kl + model.config.coarse_weight * coarse
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("downsampling", ["learned", "mean"])
def test_the_loss_trains_every_parameter(downsampling, pixel_values):
    model = HieraTokModel(tiny(downsampling=downsampling))
    model.train()(pixel_values, sample_posterior=True).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_tuple_output_has_the_same_values(model, pixel_values):
    as_tuple, as_output = model(pixel_values, return_dict=False), model(pixel_values)
    assert all(torch.equal(a, b) for a, b in zip(as_tuple, as_output.to_tuple(), strict=True))


def test_sampling_follows_its_generator(model, pixel_values):
    outputs = [
        model(pixel_values, sample_posterior=True, generator=torch.Generator().manual_seed(seed)).latents
        for seed in (1, 1, 2)
    ]
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], model(pixel_values).latents)


def test_encode_and_decode_are_the_forward_in_two(model, pixel_values):
    output = model(pixel_values)
    encoded = model.encode(pixel_values)
    assert torch.equal(encoded.latents, output.latents)
    assert torch.equal(model.decode(encoded.latents).reconstruction, output.reconstruction)
    assert torch.equal(model.decode(encoded.latents, return_dict=False)[0], output.reconstruction)


def test_progressive_decode_returns_the_smaller_image(model, pixel_values):
    latents = model.encode(pixel_values).latents
    sizes = [tuple(model.decode(latents, num_scales=k).reconstruction.shape[-2:]) for k in (1, 2, 3, 4)]
    assert sizes == [(4, 4), (8, 8), (16, 12), (28, 20)]
    coarse = model(pixel_values, num_scales=2)
    assert coarse.loss is None and coarse.reconstruction.shape[-2:] == (8, 8)


@pytest.mark.parametrize("num_scales", [None, 1, 3])
def test_all_scales_are_returned_where_they_are_asked_for(model, pixel_values, num_scales):
    latents = model.encode(pixel_values).latents
    expected = model.core.decode_scales(latents, num_scales)
    decoded = model.decode(latents, num_scales=num_scales, return_scales=True)
    as_tuple = model.decode(latents, num_scales=num_scales, return_scales=True, return_dict=False)
    assert list(decoded) == ["reconstruction", "scales"] and len(as_tuple) == 2
    assert torch.equal(as_tuple[0], decoded.reconstruction)
    for return_loss in (True, False):
        output = model(pixel_values, num_scales=num_scales, return_scales=True, return_loss=return_loss)
        assert (output.loss is not None) == (return_loss and num_scales is None)
        for scales in (decoded.scales, as_tuple[1], output.scales):
            assert type(scales) is tuple
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(scales, expected, strict=True))
        assert output.reconstruction is output.scales[-1]
    assert "scales" not in model(pixel_values) and "scales" not in model.decode(latents)
    assert len(model(pixel_values, return_scales=True, return_dict=False)) == 5


def test_without_a_loss_only_the_image_is_made(model, pixel_values):
    expected, output = model(pixel_values), model(pixel_values, return_loss=False)
    assert output.loss is None and torch.equal(output.reconstruction, expected.reconstruction)


def test_input_embeddings_can_be_replaced(model):
    replacement = torch.nn.Conv2d(3, 32, 4, stride=4)
    model.set_input_embeddings(replacement)
    assert model.get_input_embeddings() is replacement


def test_image_features(model, pixel_values):
    features = model.get_image_features(pixel_values, output_hidden_states=True)
    assert len(features.hidden_states) == model.config.encoder_num_layers + 1
    assert features.last_hidden_state.shape == (2, 35, model.config.hidden_size)
    assert torch.equal(features.pooler_output, features.last_hidden_state.mean(1))


def test_eager_and_sdpa_agree_and_eager_returns_causal_weights(model, pixel_values):
    with torch.no_grad():
        expected = model(pixel_values).reconstruction
        model.set_attn_implementation("eager")
        output = model(pixel_values, output_attentions=True)
    torch.testing.assert_close(output.reconstruction, expected, rtol=0, atol=1e-5)
    assert len(output.attentions) == model.config.num_hidden_layers
    decoder_weights = output.attentions[-1]
    assert decoder_weights.shape[-2:] == (52, 52)
    for end in (1, 5, 17):  # rows of a scale see nothing behind its end
        assert decoder_weights[..., :end, end:].abs().max() == 0
    assert decoder_weights[..., 17:, :].min() > 0


@pytest.mark.parametrize("make", [AutoModel.from_config, HieraTokModel])
def test_auto_model_makes_the_class(make, tiny_config):
    assert type(make(tiny_config)) is HieraTokModel


def test_auto_classes_are_registered(tmp_path, tiny_config):
    HieraTokModel(tiny_config).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is HieraTokConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is HieraTokModel


def test_gradient_checkpointing_changes_no_gradient(tiny_config, pixel_values):
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = HieraTokModel(tiny_config).train()
        if enable:
            model.gradient_checkpointing_enable()
        model(pixel_values).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert (plain is None) == (checkpointed is None)
        if plain is not None:
            torch.testing.assert_close(plain, checkpointed)


def test_random_weights_are_those_of_the_other_class(tiny_config):
    torch.manual_seed(3)
    model = HieraTokModel(tiny_config)
    for name, weight in model.named_parameters():
        if weight.ndim == 1 and name.endswith("bias"):
            assert weight.abs().max() == 0, name
        elif "norm" in name:
            assert (weight == 1).all(), name
        elif weight.ndim == 2 and weight.numel() > 1000:
            assert abs(weight.std().item() - tiny_config.initializer_range) < 0.003, name
    reference = dict(AutoencoderHieraTok(**tiny_config.model_fields).named_parameters())
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in reference.items()}


def test_images_are_cast_to_the_weights(model, pixel_values):
    output = model.to(torch.bfloat16)(pixel_values)
    assert output.reconstruction.dtype == torch.bfloat16 and torch.isfinite(output.reconstruction).all()
    assert output.loss.dtype == torch.float32


def test_a_batch_is_its_images(model, pixel_values):
    together = model(pixel_values).reconstruction
    alone = torch.cat([model(image).reconstruction for image in pixel_values.split(1)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_from_core_shares_the_weights(model, pixel_values):
    vae = AutoencoderHieraTok.from_core(model.core)
    assert vae.core is model.core
    assert torch.equal(vae(pixel_values).sample, model(pixel_values).reconstruction)
    assert HieraTokModel.from_core(vae.core).core is model.core


def test_from_size_takes_overrides():
    model = HieraTokModel.from_size("hieratok-tiny", encoder_num_layers=1, decoder_num_layers=1)
    assert model.config.num_hidden_layers == 2 and not model.training


def test_an_attention_processor_overrules_the_implementation(model, pixel_values):
    expected = model(pixel_values).reconstruction
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(HieraTokAttnProcessor(backend="reference"))
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(pixel_values).reconstruction, expected, rtol=0, atol=1e-5)


def test_compiles_without_a_graph_break_at_two_sizes(model):
    compiled = torch.compile(model.core.decode, backend="eager", fullgraph=True, dynamic=True)
    for grid in ((7, 5), (4, 6), (9, 3)):
        latents = torch.randn(1, 4, *grid)
        torch.testing.assert_close(compiled(latents), model.core.decode(latents), rtol=0, atol=1e-6)


def test_one_graph_makes_all_scales_of_every_size():
    core, counted = random_core(scale_factors=(4, 2, 1)), CompileCounterWithBackend("eager")
    compiled = torch.compile(core.decode_scales, backend=counted, fullgraph=True, dynamic=True)
    for grid in ((9, 10), (10, 12), (12, 11), (7, 13), (16, 9)):
        latents = noise(1, 4, *grid)
        for made, expected in zip(compiled(latents), core.decode_scales(latents), strict=True):
            torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
    assert counted.frame_count == 1


def test_public_names_resolve():
    for name in hieratok_hf.__all__:
        assert getattr(hieratok_hf, name) is not None
    assert set(hieratok_hf.__all__) <= set(dir(hieratok_hf))
    with pytest.raises(AttributeError, match="module 'hieratok_hf' has no attribute 'nothing'"):
        _ = hieratok_hf.nothing


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_gives_the_images_of_the_cpu(dtype, tiny_config):
    torch.manual_seed(0)
    model = HieraTokModel(tiny_config).eval()
    pixel_values = torch.rand(2, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        expected = model(pixel_values).reconstruction
        result = model.to("cuda", dtype)(pixel_values.cuda()).reconstruction
    torch.testing.assert_close(result.float().cpu(), expected, rtol=0, atol=1e-3 if dtype == torch.float32 else 5e-2)
