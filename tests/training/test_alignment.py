"""Tests of `alignment`: the definition place by place, the grids of several vision models, and gradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import images, noise

from hieratok_hf.evaluation.vision_features import VisionFeatures
from hieratok_hf.training.alignment import BlockAlignment, LatentAlignment

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
CONV = {
    "hidden_sizes": [8, 12, 16, 20],
    "depths": [1] * 4,
    "layer_scale_init_value": 1.0,
    "initializer_range": 0.2,
}
MOBILENET = {"depth_multiplier": 0.1, "min_depth": 4, "depth_divisible_by": 4, "image_size": 32}
REGISTERS = {**VIT, "mlp_ratio": 2, "image_size": 28, "patch_size": 14, "num_register_tokens": 3}
# Side of a patch or cell, feature channels, tokens that are no patches; the model and its configuration.
KINDS = {
    "convnext": (32, 20, 0, "ConvNext", CONV),
    "mobilenet": (32, 1280, 0, "MobileNetV2", MOBILENET),
    "vit": (8, 16, 1, "ViT", {**VIT, "intermediate_size": 32, "image_size": 32, "patch_size": 8}),
    "registers": (14, 16, 4, "Dinov2WithRegisters", REGISTERS),
}
MARGINS = {"vit": (0.5, 0.25), "registers": (0.1, 0.1), "convnext": (1.2, 0.25), "mobilenet": (0, 0)}


def vision_features(kind, **config):
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**config))
    if kind == "MobileNetV2":
        with torch.no_grad():
            model.train()(images(8, 3, 64, 64))  # statistics of batches, without which all features are zero
    return VisionFeatures(model, [0.5] * 3, [0.5] * 3)


def alignment(kind="vit", **margins):
    *_, name, config = KINDS[kind]
    features = vision_features(name, **config)
    torch.manual_seed(1)
    return LatentAlignment(4, features, **margins)


def by_hand(latents, targets, weight, cosine_margin, distance_margin):
    """The loss in float64, place by place; `targets` on the latents' grid."""
    latents, targets, weight = (np.asarray(x.detach(), dtype=np.float64) for x in (latents, targets, weight))
    cosine_terms, distance_terms = [], []
    for z, f in zip(latents, targets):
        z, f = weight[:, :, 0, 0] @ z.reshape(len(z), -1), f.reshape(len(f), -1)
        z, f = z / np.linalg.norm(z, axis=0), f / np.linalg.norm(f, axis=0)
        for i in range(z.shape[1]):
            cosine_terms.append(max(0, 1 - cosine_margin - z[:, i] @ f[:, i]))
            for j in range(z.shape[1]):
                distance_terms.append(max(0, abs(z[:, i] @ z[:, j] - f[:, i] @ f[:, j]) - distance_margin))
    return np.mean(cosine_terms) + np.mean(distance_terms)


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_the_last_map_at_the_models_own_grid(kind):
    cell, channels, others, *_ = KINDS[kind]
    module = alignment(kind)
    x = images(2, 3, *((32, 32) if kind == "vit" else (2 * cell, 3 * cell)))  # this ViT takes one size
    height, width = (x.shape[2] // cell, x.shape[3] // cell)
    with torch.no_grad():
        last = module.features.model(x).last_hidden_state
    expected = last if not others else last[:, others:].reshape(2, height, width, channels).permute(0, 3, 1, 2)
    target = module.target_map(x)
    assert target.shape == (2, channels, height, width) and module.projection.weight.shape == (channels, 4, 1, 1)
    torch.testing.assert_close(target, expected, rtol=1e-5, atol=1e-5)
    assert target.std(dim=(2, 3)).mean() > 1e-3  # or the order of the places would not matter


@pytest.mark.parametrize("kind", MARGINS)
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (8, 8)])
def test_the_loss_is_the_definition_over_features_resampled_to_the_latents_grid(kind, grid):
    given = {} if kind == "vit" else dict(zip(("cosine_margin", "distance_margin"), MARGINS[kind]))
    module, x = alignment(kind, **given), images(2, 3, *((32, 32) if kind == "vit" else (96, 64)))
    latents, target = noise(2, 4, *grid), module.target_map(x)
    resampled = F.interpolate(target, grid, mode="bilinear", antialias=True)
    loss = module(latents, x)
    assert loss.shape == () and loss.dtype == torch.float32
    expected = by_hand(latents, resampled, module.projection.weight, *MARGINS[kind])
    assert loss.item() == pytest.approx(expected, rel=1e-4) and (expected > 0.01 or grid == (1, 1))


@pytest.mark.parametrize("kind", ["convnext", "registers"])
def test_gradients_flow_to_the_latents_and_the_map_alone(kind):
    module = alignment(kind).train()
    latents, x = noise(2, 4, 3, 3).requires_grad_(), images(2, 3, 56, 56).requires_grad_()
    module(latents, x).backward()
    assert [name for name, weight in module.named_parameters() if weight.requires_grad] == ["projection.weight"]
    assert [name for name, weight in module.named_parameters() if weight.grad is not None] == ["projection.weight"]
    assert latents.grad.abs().max() > 0 and module.projection.weight.grad.abs().max() > 0 and x.grad is None
    assert not any(part.training for part in module.features.modules())


def test_gradients_are_finite_at_zero():
    module, x = alignment(), images(1, 3, 32, 32)
    latents = torch.zeros(1, 4, 4, 4, requires_grad=True)
    loss = module(latents, x)
    loss.backward()
    assert loss.isfinite() and latents.grad.isfinite().all() and latents.grad.norm() < 1e5


def test_it_is_float32_under_autocast():
    module, x, latents = alignment(), images(2, 3, 32, 32), noise(2, 4, 4, 4)
    plain = module(latents, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(latents, x), plain)
        low = module(latents.bfloat16(), x.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, plain, rtol=0.05, atol=0.01)


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        ("Swin", {"embed_dim": 8, "num_heads": [1] * 2, "depths": [1] * 2, "window_size": 4, "patch_size": 4}, "Swin"),
        ("Pvt", {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4}, "patch_size"),
    ],
)
def test_models_whose_tokens_are_no_grid_of_patches_are_refused(kind, sizes, message):
    with pytest.raises(ValueError, match=message):
        LatentAlignment(4, vision_features(kind, **sizes, image_size=32))


def block_alignment(width=6):
    torch.manual_seed(2)
    statistics = [(noise(n, seed=n), noise(n, seed=n + 1).abs() + 0.5) for n in (5, 3)]
    return BlockAlignment(width, statistics, hidden_width=16), statistics


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_the_loss_of_a_block_is_the_definition_place_by_place(grid):
    module, statistics = block_alignment()
    tokens, maps = noise(2, *grid, 6), [noise(2, 5, 4, 4), noise(2, 3, 2, 2, seed=1)]
    projected = module.projector(tokens).detach().double().numpy()
    expected, first = 0.0, 0
    for features, (mean, std) in zip(maps, statistics):
        resampled = F.interpolate(features, grid, mode="bilinear", antialias=True)
        targets = (resampled.double() - mean[:, None, None]) / std[:, None, None]
        distances = []
        for i, row, column in np.ndindex(2, *grid):
            y, f = projected[i, row, column, first : first + len(mean)], targets[i, :, row, column].numpy()
            distances.append(1 - y @ f / np.linalg.norm(y) / np.linalg.norm(f))
        expected, first = expected + np.mean(distances), first + len(mean)
    loss = module(tokens, maps)
    assert loss.shape == () and loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)


def test_maps_of_one_channel_that_is_always_zero_leave_the_loss_of_a_block_finite():
    module = BlockAlignment(6, [(torch.tensor([0.1, 0.0]), torch.tensor([1.0, 0.0]))])
    features = torch.stack([noise(2, 3, 3), torch.zeros(2, 3, 3)], 1)
    tokens = noise(2, 3, 3, 6).requires_grad_()
    module(tokens, [features]).backward()
    assert tokens.grad.isfinite().all() and tokens.grad.any()


def test_statistics_of_maps_are_no_weights():
    module, _ = block_alignment()
    assert all(name.startswith("projector.") for name in module.state_dict())
