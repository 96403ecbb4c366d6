"""The one class for both libraries' `AutoModel`."""

import torch
from helpers import images, random_core, tiny

from hieratok_hf import AutoencoderHieraTok, HieraTokConfig, HieraTokModel
from hieratok_hf.hub.auto_model import HieraTokAutoModel


def test_a_configuration_means_transformers_and_none_means_diffusers(tmp_path):
    core = random_core()
    HieraTokModel.from_core(core).save_pretrained(tmp_path)
    for_transformers = HieraTokAutoModel.from_pretrained(tmp_path, config=HieraTokConfig.from_pretrained(tmp_path))
    for_diffusers = HieraTokAutoModel.from_pretrained(tmp_path)
    assert type(for_transformers) is HieraTokModel and type(for_diffusers) is AutoencoderHieraTok
    sample = images(1, 3, 16, 24)
    half, info = HieraTokAutoModel.from_pretrained(
        tmp_path, config=None, output_loading_info=True, torch_dtype=torch.bfloat16
    )
    assert half.dtype == torch.bfloat16 and not info["missing_keys"]
    with torch.no_grad():
        expected = core.decode(core.encode_moments(sample)[0][:, : core.config.latent_channels])
        assert torch.equal(for_transformers(sample).reconstruction, expected)
        assert torch.equal(for_diffusers(sample).sample, expected)


def test_models_of_a_configuration_alone():
    config = tiny(decoder_num_layers=1)
    assert type(HieraTokAutoModel._from_config(config)) is HieraTokModel
    vae = HieraTokAutoModel.from_config(config.model_fields)
    assert type(vae) is AutoencoderHieraTok and len(vae.core.decoder.blocks) == 1
