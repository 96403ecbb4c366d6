"""HieraTokModel: outputs, attention implementations, checkpointing, and what transformers expects."""

import re

import numpy as np
import pytest
import torch
from helpers import images, random_core, tiny
from PIL import Image
from transformers import AutoModel, pipeline

import hieratok_hf
from hieratok_hf import AutoencoderHieraTok, HieraTokImageProcessorPil, HieraTokModel
from hieratok_hf.models.losses import tokenizer_losses


@pytest.fixture
def model():
    return HieraTokModel.from_core(random_core())


@pytest.fixture
def pixel_values():
    return images(2, 3, 28, 20)  # 7x5 tokens


def test_output_holds_everything(model, pixel_values):
    output = model(pixel_values, output_hidden_states=True)
    names = ["last_hidden_state", "pooler_output", "loss", "reconstruction", "latents"]
    assert list(output)[: len(names)] == names
    assert output.reconstruction.shape == pixel_values.shape
    assert output.latents.shape == (2, 4, 7, 5) and output.moments.shape == (2, 8, 7, 5)
    assert torch.equal(output.posterior.mode(), output.latents)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    num_encoder_states = model.config.encoder_num_layers + 1
    assert {state.shape[1] for state in output.hidden_states[:num_encoder_states]} == {35}
    assert {state.shape[1] for state in output.hidden_states[num_encoder_states:]} == {1 + 4 + 12 + 35}
    assert output.attentions is None
    losses = tokenizer_losses(model.core.decode_scales(output.latents), pixel_values, output.moments, model.config)
    torch.testing.assert_close(output.loss, losses["loss"])
    as_tuple = model(pixel_values, return_dict=False)
    torch.testing.assert_close(as_tuple, model(pixel_values).to_tuple(), rtol=0, atol=0)
    alone = model(pixel_values, return_loss=False)
    assert alone.loss is None and torch.equal(alone.reconstruction, output.reconstruction)


@pytest.mark.parametrize("num_scales", [None, 1, 3])
def test_all_scales_are_returned_where_they_are_asked_for(model, pixel_values, num_scales):
    latents = model.encode(pixel_values).latents
    expected = tuple(model.core.decode_scales(latents, num_scales))
    options = {"num_scales": num_scales, "return_scales": True}
    decoded = model.decode(latents, **options)
    assert list(decoded) == ["reconstruction", "scales"]
    as_tuple = model.decode(latents, **options, return_dict=False)
    for made in (decoded.to_tuple(), as_tuple):
        torch.testing.assert_close(made, (expected[-1], expected), rtol=0, atol=0)
    for return_loss in (True, False):
        output = model(pixel_values, **options, return_loss=return_loss)
        assert (output.loss is not None) == (return_loss and num_scales is None)
        assert output.reconstruction is output.scales[-1]
        torch.testing.assert_close(output.scales, expected, rtol=0, atol=0)
    assert "scales" not in model(pixel_values) and "scales" not in model.decode(latents)


def test_what_transformers_asks_of_a_model_of_images(model, pixel_values):
    features = model.get_image_features(pixel_values, output_hidden_states=True)
    assert len(features.hidden_states) == model.config.encoder_num_layers + 1
    assert features.last_hidden_state.shape == (2, 35, model.config.hidden_size)
    assert torch.equal(features.pooler_output, features.last_hidden_state.mean(1))
    replacement = torch.nn.Conv2d(3, 32, 4, stride=4)
    model.set_input_embeddings(replacement)
    assert model.get_input_embeddings() is replacement
    assert type(AutoModel.from_config(model.config)) is HieraTokModel


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


def test_the_pipeline_of_transformers_gives_features(model, tmp_path):
    model.save_pretrained(tmp_path)
    HieraTokImageProcessorPil(size_divisor=4).save_pretrained(tmp_path)
    image = Image.fromarray(np.arange(20 * 28 * 3, dtype=np.uint8).reshape(20, 28, 3))
    extractor = pipeline("image-feature-extraction", model=str(tmp_path), device="cpu")
    values = extractor.image_processor(image, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model.get_image_features(values)
    assert torch.equal(extractor(image, return_tensors=True), expected.last_hidden_state)
    assert extractor(image, pool=True) == expected.pooler_output.tolist()
    extractor.model.forward = extractor.model.get_image_features  # as docs/models.md says
    for found in extractor([image, image, image], batch_size=2, return_tensors=True):
        torch.testing.assert_close(found, expected.last_hidden_state)
    assert len(extractor([image, image, image], batch_size=2, pool=True)) == 3


@pytest.mark.parametrize("name", ["sdpa", "flex_attention"])
def test_transformers_own_attentions_can_be_asked_for(model, tmp_path, name):
    model.save_pretrained(tmp_path)
    model.set_attn_implementation(name)
    loaded = HieraTokModel.from_pretrained(tmp_path, attn_implementation=name)
    assert model.config._attn_implementation == loaded.config._attn_implementation == name


@pytest.mark.parametrize("cls", [HieraTokModel, AutoencoderHieraTok])
def test_gradient_checkpointing_changes_no_gradient(cls, pixel_values):
    gradients = []
    for checkpointed in (False, True):
        model = cls.from_core(random_core()).train()
        if checkpointed:
            getattr(model, "gradient_checkpointing_enable", getattr(model, "enable_gradient_checkpointing", None))()
            assert model.is_gradient_checkpointing
        output = model(pixel_values)
        (output.sample if cls is AutoencoderHieraTok else output.loss).mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


def test_a_map_of_devices_splits_no_block(model, tmp_path):
    model.save_pretrained(tmp_path)
    room = sum(x.nbytes for x in model.parameters()) // 3  # which ends within a block
    options = {"max_memory": {"cpu": room, "disk": 10**9}, "offload_folder": tmp_path / "offloaded"}
    places = HieraTokModel.from_pretrained(tmp_path, device_map="auto", **options).hf_device_map
    assert set(places.values()) == {"cpu", "disk"}
    assert not [name for name in places if re.search(r"blocks\.\d+\.", name)]
    vae = AutoencoderHieraTok.from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": 10**9})
    assert vae.device.type == "cpu"  # diffusers refuses a model that does not name its blocks


def test_images_are_cast_to_the_weights(model, pixel_values):
    output = model.to(torch.bfloat16)(pixel_values)
    assert output.reconstruction.dtype == torch.bfloat16 and torch.isfinite(output.reconstruction).all()
    assert output.loss.dtype == torch.float32


def test_from_core_shares_the_weights_and_from_size_takes_overrides(model, pixel_values):
    vae = AutoencoderHieraTok.from_core(model.core)
    assert vae.core is model.core and HieraTokModel.from_core(vae.core).core is model.core
    model = HieraTokModel.from_size("hieratok-tiny", encoder_num_layers=1, decoder_num_layers=1)
    assert model.config.num_hidden_layers == 2 and not model.training


def test_public_names_resolve():
    for name in hieratok_hf.__all__:
        assert getattr(hieratok_hf, name) is not None
    assert set(hieratok_hf.__all__) <= set(dir(hieratok_hf))
    with pytest.raises(AttributeError, match="nothing"):
        _ = hieratok_hf.nothing


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_gives_the_images_of_the_cpu(dtype):
    torch.manual_seed(0)
    model, pixel_values = HieraTokModel(tiny()).eval(), images(2, 3, 64, 48)
    with torch.no_grad():
        expected = model(pixel_values).reconstruction
        result = model.to("cuda", dtype)(pixel_values.cuda()).reconstruction
    torch.testing.assert_close(result.float().cpu(), expected, rtol=0, atol=1e-3 if dtype == torch.float32 else 5e-2)
