"""Tests of `vision_features`: the features are the model's own, frozen, whatever the mode, company or precision."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import images
from PIL import Image
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hieratok_hf.evaluation.vision_features import VisionFeatures

HALF = [0.5] * 3
VIT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}


def make_model(kind, **options):
    torch.manual_seed(0)
    if kind == "vit":
        return transformers.ViTModel(transformers.ViTConfig(**VIT, patch_size=8, **options))
    if kind == "dinov2":
        sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2}
        sizes |= {"image_size": 28, "patch_size": 14, "drop_path_rate": 0.5}
        return transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    if kind == "convnext":
        sizes = {"hidden_sizes": [8, 12, 16, 20], "depths": [1] * 4, "layer_scale_init_value": 1.0}
        return transformers.ConvNextModel(transformers.ConvNextConfig(**sizes, image_size=32, drop_path_rate=0.5))
    sizes = {"depth_multiplier": 0.1, "min_depth": 4, "depth_divisible_by": 4}
    model = transformers.MobileNetV2Model(transformers.MobileNetV2Config(**sizes, image_size=32))
    with torch.no_grad():
        model.train()(images(8, 3, 64, 64))  # statistics of batches, without which nothing reaches the last layers
    return model


def vision_features(kind, mean=HALF, std=HALF):
    return VisionFeatures(make_model(kind), mean, std)


def assert_equal(first, second, **tolerance):
    torch.testing.assert_close((first[0], *first[1]), (second[0], *second[1]), **tolerance)


def test_a_folder_gives_the_features_of_its_model_and_processor(tmp_path):
    model = make_model("vit").eval()
    processor = ViTImageProcessorPil(image_mean=[0.4, 0.5, 0.3], image_std=[0.2, 0.3, 0.1])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    levels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pooled, maps = VisionFeatures.from_pretrained(tmp_path)(torch.tensor(levels).permute(2, 0, 1)[None] / 127.5 - 1)
    inputs = processor(Image.fromarray(levels), do_resize=False, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
    expected = outputs.pooler_output, [x.mT for x in (*outputs.hidden_states, outputs.last_hidden_state)]
    assert_equal((pooled, maps), expected, rtol=0, atol=1e-5)


def test_without_a_processor_images_stay_in_their_range(tmp_path):
    model, x = make_model("convnext").eval(), images(2, 3, 64, 32)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        outputs = model(x)
    pooled, maps = VisionFeatures.from_pretrained(str(tmp_path))(x)
    torch.testing.assert_close((pooled, maps[-1]), (outputs.pooler_output, outputs.last_hidden_state))
    assert [x.shape[1:] for x in maps] == [(8, 16, 8), (8, 16, 8), (12, 8, 4), (16, 4, 2), (20, 2, 1), (20, 2, 1)]


def test_shapes_of_transformers():
    pooled, maps = vision_features("dinov2")(images(2, 3, 28, 42))
    assert pooled.shape == (2, 16) and [x.shape[1:] for x in maps] == [(16, 1 + 2 * 3)] * 5


def test_a_size_resizes_first():
    features, x = vision_features("vit"), images(1, 3, 48, 40)
    resized = F.interpolate(x, (32, 32), mode="bilinear", antialias=True)
    assert_equal(features(x, size=32), features(resized), rtol=0, atol=0)
    assert_equal(features(resized, size=32), features(resized), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["dinov2", "mobilenet"])
def test_it_never_trains(kind):
    features, x = vision_features(kind), images(2, 3, 56, 56).requires_grad_()
    before, state = features(x), {name: value.clone() for name, value in features.state_dict().items()}
    parent = torch.nn.Sequential(features).train()
    assert parent.training and not any(module.training for module in features.modules())
    assert_equal(features(x), before, rtol=0, atol=0)
    assert all(torch.equal(value, state[name]) for name, value in features.state_dict().items())
    # In training mode dropped paths or statistics of batches do show.
    assert not torch.equal(features.model.train()(x).last_hidden_state.flatten(2), before[1][-1].flatten(2))
    before[0].square().sum().backward()
    assert x.grad.abs().max() > 0 and x.grad.isfinite().all()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in features.parameters())


def test_features_are_float32_under_autocast():
    features, x = vision_features("vit"), images(1, 3, 32, 32)
    plain = features(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = features(x)
        assert features(x.bfloat16())[0].dtype == torch.float32
    assert all(y.dtype == torch.float32 for y in (cast[0], *cast[1]))
    assert_equal(cast, plain, rtol=0, atol=0)


def test_the_name_and_the_size_are_the_models():
    assert [vision_features(kind).name for kind in ("vit", "mobilenet", "dinov2")] == ["ViT", "MobileNetV2", "Dinov2"]
    assert vision_features("dinov2").image_size == 28
    oblong = transformers.ViTModel(transformers.ViTConfig(**{**VIT, "image_size": [48, 64]}, patch_size=8))
    assert VisionFeatures(oblong, HALF, HALF).image_size == 48


def test_a_pooler_without_weights_is_not_made_up(tmp_path):
    torch.manual_seed(0)
    without_pooler = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, patch_size=8))
    without_pooler.save_pretrained(tmp_path)
    x = images(1, 3, 32, 32)
    first, second = (VisionFeatures.from_pretrained(tmp_path)(x) for _ in range(2))
    assert_equal(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first[0], first[1][-1].mean(2))  # of the last map instead


def test_other_layers_without_weights_are_refused(tmp_path):
    make_model("vit").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"must hold all weights of ViTModel, but lacks \['.*\.3\."):
        VisionFeatures.from_pretrained(tmp_path)


def test_folders_that_are_no_vision_model_are_refused(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=9)).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="text' must be a vision model, got BertModel"):
        VisionFeatures.from_pretrained(tmp_path / "text")
    with pytest.raises(OSError, match="missing"):
        VisionFeatures.from_pretrained(tmp_path / "missing")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(ValueError, match="nonesuch"):
        VisionFeatures.from_pretrained(tmp_path / "unknown")


class LastLayerAlone(torch.nn.Module):
    def forward(self, pixel_values, **_):
        return BaseModelOutput(last_hidden_state=pixel_values)


def test_a_model_without_hidden_states_is_refused():
    with pytest.raises(ValueError, match="must give hidden states, which LastLayerAlone does not"):
        VisionFeatures(LastLayerAlone(), HALF, HALF)(images(1, 3, 32, 32))


def test_wrong_statistics_are_refused():
    for mean, std in (([0.5], HALF), (HALF, [0.5] * 4), (HALF, [0.5, 0, 0.5])):
        with pytest.raises(ValueError, match="`std`"):
            vision_features("mobilenet", mean, std)
