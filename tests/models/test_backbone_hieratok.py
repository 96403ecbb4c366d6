"""HieraTokBackbone: feature maps of chosen blocks, from the folders of the other models."""

import json

import pytest
import torch
from helpers import images, random_core, tiny
from huggingface_hub import HfApi
from transformers import AutoBackbone, AutoModel

from hieratok_hf import AutoencoderHieraTok, HieraTokBackbone, HieraTokConfig, HieraTokModel


@pytest.fixture
def folder(tmp_path):
    HieraTokModel.from_core(random_core(encoder_num_layers=3)).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def pixel_values():
    return images(2, 3, 28, 20)  # 7x5 tokens


def test_maps_are_the_encoder_s_tokens_after_its_norm(folder, pixel_values):
    model = HieraTokModel.from_pretrained(folder)
    backbone, info = HieraTokBackbone.from_pretrained(folder, out_indices=[0, 2, 3], output_loading_info=True)
    assert not any(info.values())
    assert backbone.stage_names == ["stem", "stage1", "stage2", "stage3"]
    assert backbone.out_features == ["stem", "stage2", "stage3"] and backbone.channels == [32, 32, 32]
    with torch.no_grad():
        output = backbone(pixel_values)
        features = model.get_image_features(pixel_values, output_hidden_states=True)
    assert list(output) == ["feature_maps"] and {x.shape for x in output.feature_maps} == {(2, 32, 7, 5)}
    tokens = [x.flatten(2).transpose(1, 2) for x in output.feature_maps]
    norm = model.core.encoder.norm_after
    states = [norm(features.hidden_states[0]), norm(features.hidden_states[2]), features.last_hidden_state]
    torch.testing.assert_close(tokens, states, rtol=0, atol=0)


def test_outputs_that_are_asked_for_and_gradients_of_every_weight(folder, pixel_values):
    backbone = HieraTokBackbone.from_pretrained(folder, attn_implementation="eager").train()
    backbone.gradient_checkpointing_enable()
    output = backbone(pixel_values, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4 and [x.shape for x in output.attentions] == [(2, 2, 35, 35)] * 3
    assert torch.equal(backbone(pixel_values, return_dict=False)[0][0], output.feature_maps[0])
    output.feature_maps[0].square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in backbone.parameters())
    with pytest.raises(ValueError, match="pixel_values"):
        backbone(pixel_values[..., :-1])


def test_transformers_own_class_makes_and_loads_it(folder, pixel_values, monkeypatch):
    config = tiny(out_features=["stage1"])
    assert type(AutoBackbone.from_config(config)) is HieraTokBackbone
    monkeypatch.setattr(HfApi, "repo_exists", lambda *args, **kwargs: True)  # it takes repositories alone
    backbone = AutoBackbone.from_pretrained(str(folder), out_features=["stage1", "stage2"])
    assert type(backbone) is HieraTokBackbone and len(backbone(pixel_values).feature_maps) == 2
    backbone.save_pretrained(folder / "alone")
    again = HieraTokBackbone.from_pretrained(folder / "alone")
    assert again.out_indices == [1, 2]
    torch.testing.assert_close(again(pixel_values), backbone(pixel_values), rtol=0, atol=0)


def test_only_what_was_chosen_is_saved_and_it_troubles_no_other_class(tmp_path, recwarn, caplog):
    core = random_core()
    model = HieraTokModel.from_core(core)
    assert not {"out_features", "out_indices"} & model.config.to_dict().keys()
    model.config.out_features = ["stage1"]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["out_indices"] == [1]
    assert HieraTokModel.from_pretrained(tmp_path).config.out_features == ["stage1"]
    AutoencoderHieraTok.from_pretrained(tmp_path)
    assert not caplog.records and not recwarn.list


def test_a_backbone_does_not_pass_for_a_whole_model(folder):
    backbone = HieraTokBackbone.from_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="`save_directory`"):
        backbone.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    alone = folder / "alone"
    backbone.save_pretrained(alone)
    backbone.save_pretrained(alone)
    saved = json.loads((alone / "config.json").read_text())
    assert saved["architectures"] == ["HieraTokBackbone"] and not {"_class_name", "_diffusers_version"} & saved.keys()
    for load in (HieraTokModel.from_pretrained, AutoencoderHieraTok.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=r"alone.*got a backbone"):
            load(alone)
    HieraTokModel.from_pretrained(folder).save_pretrained(alone)
    AutoencoderHieraTok.from_pretrained(alone)


@pytest.mark.parametrize("chosen", [{"out_features": ["stage9"]}, {"out_indices": [9]}, {"out_features": "stage1"}])
def test_what_the_encoder_has_not_is_refused(chosen):
    with pytest.raises(ValueError, match=next(iter(chosen))):
        HieraTokConfig(**chosen, encoder_num_layers=2)
