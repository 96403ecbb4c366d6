"""Tests of `perceptual`: agreement with the definition, the order of real images, gradients, and LPIPS's door."""

import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import images, noise
from transformers import ConvNextConfig, ConvNextModel, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from hieratok_hf import open_image
from hieratok_hf.evaluation.perceptual import PerceptualDistance, load_lpips
from hieratok_hf.evaluation.vision_features import VisionFeatures

IMAGES = sorted((Path(__file__).parents[2] / "src" / "hieratok_hf" / "example_images").glob("*.webp"))
REAL = Path(__file__).parents[3] / "shared" / "data" / "mobilenet_v2_1.0_224"


def make_distance(kind, **options):
    torch.manual_seed(0)
    if kind == "vit":
        sizes = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 32}
        sizes |= {"image_size": 32, "patch_size": 8, **options}
        model = ViTModel(ViTConfig(**sizes, initializer_range=0.2))
    else:
        sizes = {"hidden_sizes": [8, 12, 16, 20], "depths": [1] * 4, "layer_scale_init_value": 1.0}
        model = ConvNextModel(ConvNextConfig(**sizes, initializer_range=0.2))
    return PerceptualDistance(VisionFeatures(model, [0.5] * 3, [0.5] * 3))


def real_images(size=32):
    """The middle of each example image `(B, 3, size, size)` in [-1, 1]."""
    images = [open_image(path).resize((64, 64)) for path in IMAGES]
    batch = torch.stack([torch.tensor(np.asarray(image)) for image in images]).permute(0, 3, 1, 2) / 127.5 - 1
    start = (64 - size) // 2
    return batch[:, :, start : start + size, start : start + size]


def blurred(x, width):
    return F.avg_pool2d(F.pad(x, [width // 2] * 4, mode="replicate"), width, stride=1)


def noisy(x, amount):
    return (x + amount * noise(*x.shape, seed=1)).clamp(-1, 1)


def by_hand(maps, target_maps):
    """The distance over chosen maps in float64 numpy."""
    layers = []
    for x, y in zip(maps, target_maps):
        x, y = (np.asarray(z.detach().flatten(2), dtype=np.float64) for z in (x, y))
        x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
        layers.append(((x - y) ** 2).sum(1).mean(1))
    return np.mean(layers, axis=0)


def test_of_a_convolutional_network_the_last_map_of_each_resolution_counts():
    distance, x, y = make_distance("convnext"), images(2, 3, 64, 64), images(2, 3, 64, 64, seed=1)
    chosen = [list({z.shape: z for z in distance.features(inputs)[1]}.values()) for inputs in (x, y)]
    assert [z.shape[1:] for z in chosen[0]] == [(8, 16, 16), (12, 8, 8), (16, 4, 4), (20, 2, 2)]
    assert distance(x, y).tolist() == pytest.approx(by_hand(*chosen).tolist(), rel=1e-4)


@pytest.mark.parametrize("num_layers", [3, 12])
def test_of_a_transformer_four_layers_evenly_spaced_count(num_layers):
    distance = make_distance("vit", num_hidden_layers=num_layers)
    x, y = images(2, 3, 32, 32), images(2, 3, 32, 32, seed=1)
    maps = [distance.features(inputs)[1] for inputs in (x, y)]
    assert len(maps[0]) == num_layers + 2  # the embeddings and the last layer's norm as well
    layers = np.linspace(0, num_layers + 1, 5)[1:].round().astype(int)
    assert len(set(layers)) == 4 and layers[-1] == num_layers + 1
    expected = by_hand(*([one[i] for i in layers] for one in maps))
    assert distance(x, y).tolist() == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_it_is_zero_for_equal_images_symmetric_and_bounded(kind):
    distance, x, y = make_distance(kind), real_images(), images(2, 3, 32, 32)
    assert distance(x, x.clone()).tolist() == [0, 0]
    values = distance(x, y)
    assert values.shape == (2,) and values.dtype == torch.float32
    assert (values > 0).all() and (values <= 4).all()
    torch.testing.assert_close(values, distance(y, x))
    torch.testing.assert_close(values, torch.cat([distance(x[i : i + 1], y[i : i + 1]) for i in range(2)]))


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/mobilenet_v2_1.0_224")
def test_a_trained_network_puts_distortions_in_order():
    distance, x = PerceptualDistance(VisionFeatures.from_pretrained(REAL)), real_images(64)
    for worse, amounts in ((blurred, (3, 5, 9)), (noisy, (0.03, 0.1, 0.3))):
        values = torch.stack([distance(worse(x, amount), x) for amount in amounts])
        assert (values.diff(dim=0) > 0).all() and (values[0] > 0).all()
    # A shift of a few levels is all but invisible, a blur of the same squared error is not.
    blur = blurred(x, 3)
    shift = (blur - x).square().mean((1, 2, 3), keepdim=True).sqrt()
    assert (distance(x + shift, x) < 0.5 * distance(blur, x)).all()


@pytest.mark.parametrize("kind", ["vit", "convnext"])
@pytest.mark.parametrize("case", ["equal", "one constant", "black"])
def test_gradients_are_finite_where_features_meet_or_vanish(kind, case):
    distance = make_distance(kind)
    x = real_images() if case == "equal" else torch.full((2, 3, 32, 32), -1.0 if case == "black" else 0.2)
    target = real_images() if case == "one constant" else x.clone()
    x.requires_grad_()
    values = distance(x, target)
    values.sum().backward()
    assert values.isfinite().all() and x.grad.isfinite().all()
    if case == "one constant":
        assert x.grad.abs().max() > 0
    else:
        assert x.grad.abs().max() == 0 and (values == 0).all()


def test_features_that_are_all_zero_are_equal_and_have_finite_gradients():
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"))
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(norm.bias, -100)  # nothing passes a rectifier
    distance = PerceptualDistance(VisionFeatures(model, [0.5] * 3, [0.5] * 3))
    x = real_images().requires_grad_()
    assert all((z == 0).all() for z in distance.features(x)[1])
    values = distance(x, images(2, 3, 32, 32))
    values.sum().backward()
    assert (values == 0).all() and (x.grad == 0).all()


def test_the_gradient_is_the_slope_and_flows_to_the_images_alone():
    distance, y = make_distance("vit"), real_images()[:1].requires_grad_()
    x = noisy(y.detach(), 0.3).requires_grad_()
    distance(x, y).sum().backward()
    assert y.grad is None and not any(x.requires_grad or x.grad is not None for x in distance.parameters())
    direction = x.grad / x.grad.norm()
    with torch.no_grad():
        step = 2e-2 * direction
        slope = (distance(x + step, y) - distance(x - step, y)).item() / 4e-2
    assert slope == pytest.approx(x.grad.norm().item(), rel=0.02)


def test_lpips_is_asked_for_its_network_and_frozen(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match="pip install lpips torchvision"):
        load_lpips()

    package = Mock(LPIPS=Mock(side_effect=lambda **given: torch.nn.Conv2d(3, 1, 1)))
    monkeypatch.setitem(sys.modules, "lpips", package)
    loaded, _ = load_lpips(), load_lpips("alex")
    assert [call.kwargs["net"] for call in package.LPIPS.call_args_list] == ["vgg", "alex"]
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
