"""Tests of `dit_grids`: a DiT's tokens are joined to the grid of its latents, and squares stay as they were."""

import copy

import pytest
import torch
from diffusers import DiTTransformer2DModel
from helpers import noise

from hieratok_hf.models.dit_grids import allow_any_grid

SIZES = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "norm_type": "ada_norm_zero"}


@pytest.fixture
def stock():
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        **SIZES, in_channels=3, out_channels=3, sample_size=8, patch_size=2, num_embeds_ada_norm=4
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def call(model, latents, **options):
    count = len(latents)
    return model(latents, timestep=torch.arange(count) * 100.0, class_labels=torch.arange(count), **options)


def by_hand(model, latents):
    """The tokens in their places, of a model without hooks."""
    tokens = []
    handle = model.proj_out_2.register_forward_hook(lambda module, args, output: tokens.append(output))
    try:
        call(model, latents)
    except RuntimeError as error:
        assert "invalid for input" in str(error)
    handle.remove()
    height, width = latents.shape[2] // 2, latents.shape[3] // 2
    expected = torch.empty_like(latents)
    for number, token in enumerate(tokens[0].unbind(1)):
        top, left = 2 * (number // width), 2 * (number % width)
        expected[:, :, top : top + 2, left : left + 2] = token.view(-1, 2, 2, 3).permute(0, 3, 1, 2)
    assert number + 1 == height * width
    return expected


def test_squares_stay_the_same_to_the_bit(stock):
    latents = noise(3, 3, 8, 8)
    expected = call(stock, latents).sample
    for model in (stock, copy.deepcopy(stock)):
        for _ in range(2):
            allow_any_grid(model)
            assert torch.equal(call(model, latents).sample, expected)
            assert torch.equal(call(model, latents, return_dict=False)[0], expected)
        assert len(model._forward_hooks) == 1


@pytest.mark.parametrize("grid", [(4, 16), (6, 10), (10, 6), (2, 2)])
def test_tokens_come_to_their_places(stock, grid):
    model, latents = copy.deepcopy(stock), noise(2, 3, *grid)
    allow_any_grid(model)
    assert torch.equal(call(model, latents).sample, by_hand(stock, latents))
    assert torch.equal(model(hidden_states=latents, timestep=torch.zeros(2), class_labels=torch.zeros(2).int())[0][:1],
                       call(model, latents).sample[:1])  # fmt: skip


def test_a_saved_model_is_a_stock_one(stock, tmp_path):
    allow_any_grid(stock)
    stock.save_pretrained(tmp_path)
    loaded, latents = DiTTransformer2DModel.from_pretrained(tmp_path), noise(1, 3, 8, 8)
    assert not loaded._forward_hooks and torch.equal(call(loaded, latents).sample, call(stock, latents).sample)


def test_another_model_is_left_as_it_is():
    model = torch.nn.Linear(2, 2)
    allow_any_grid(model)
    assert not model._forward_hooks


def test_an_adapter_around_the_last_layer_acts_as_its_merged_weights(stock):
    peft = pytest.importorskip("peft", reason="adapters are peft's")
    model, latents = copy.deepcopy(stock), noise(2, 3, 4, 16)
    allow_any_grid(model)
    before = call(model, latents).sample
    config = peft.LoraConfig(r=2, target_modules=["proj_out_2"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    with_adapter = call(adapted, latents).sample
    assert (with_adapter - before).abs().max() > 0.1
    with adapted.disable_adapter():
        torch.testing.assert_close(call(adapted, latents).sample, before)
    torch.testing.assert_close(call(adapted.merge_and_unload(), latents).sample, with_adapter, atol=1e-4, rtol=1e-4)
