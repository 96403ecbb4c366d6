"""Tests of `rotary_triton`: one kernel against the separate steps that it stands for."""

import pytest
import torch
from helpers import empty_memory_is_nan, noise, random_core
from torch import nn

from hieratok_hf import HieraTokAttnProcessor, HieraTokConfig, PyramidLayout
from hieratok_hf.models import layers
from hieratok_hf.models.layers import apply_rotary, rotary_tables

pytest.importorskip("triton", reason="Triton is not installed")
from hieratok_hf.ops.rotary_triton import norm_rotary, norm_rotary_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-3
GRID = (7, 5)
LAYOUT = PyramidLayout.from_grid(*GRID, (4, 2, 1))
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def tables(head_dim, **overrides):
    return rotary_tables(HieraTokConfig(**overrides), LAYOUT, GRID, head_dim, torch.device(DEVICE))


def states(head_dim=32, dtype=torch.float32, batch=2, heads=3, seed=0):
    return noise(batch, LAYOUT.num_tokens, heads, head_dim, seed=seed).to(DEVICE, dtype)


def weight_of_norm(head_dim, dtype=torch.float32):
    return (1 + 0.3 * noise(head_dim, seed=5)).to(DEVICE, dtype).requires_grad_()


@pytest.mark.parametrize(
    ("dtype", "head_dim", "normed", "overrides"),
    [
        (torch.float32, 8, True, {}),
        (torch.float32, 128, False, {}),
        (torch.bfloat16, 40, True, {}),
        (torch.float16, 64, True, {}),
        (torch.float16, 96, False, {}),
        # Tables that are no pure rotation.
        (torch.float32, 32, False, {"rotary_pairing": "detok"}),
        (torch.float32, 32, True, {"rotary_coordinates": "fraction"}),
    ],
)
def test_outputs_and_gradients_are_those_of_the_separate_steps(dtype, head_dim, normed, overrides):
    rotary = tables(head_dim, **overrides)
    hidden_states, upstream = states(head_dim, dtype).requires_grad_(), states(head_dim, dtype, seed=1)
    weight = weight_of_norm(head_dim, dtype) if normed else None
    leaves = [hidden_states, weight] if normed else [hidden_states]
    rotated = norm_rotary(hidden_states, weight, *rotary, EPS)
    actual = [rotated, *torch.autograd.grad(rotated, leaves, upstream)]

    exact = [x.detach().float().requires_grad_() for x in leaves]
    rotated = apply_rotary(
        nn.functional.rms_norm(exact[0], exact[1].shape, exact[1], EPS) if normed else exact[0], rotary
    )
    expected = [rotated, *torch.autograd.grad(rotated, exact, upstream.float())]
    for one, other, leaf in zip(actual, expected, [hidden_states, *leaves]):
        assert one.dtype == leaf.dtype and relative_error(one, other) < TOLERANCES[dtype]


def test_strides_and_poisoned_surroundings_do_not_matter():
    rotary, weight = tables(32), weight_of_norm(32)
    expected = norm_rotary(states(), weight, *rotary, EPS)
    padded = torch.full((2, LAYOUT.num_tokens + 2, 5, 48), float("nan"), device=DEVICE)
    inside = padded[:, 1:-1, 1:4, 8:40]
    inside.copy_(states())
    heads_first = states().transpose(1, 2).contiguous().transpose(1, 2)
    channels_first = states().movedim(-1, 1).contiguous().movedim(1, -1)
    for hidden_states in (inside, heads_first, channels_first):
        assert not hidden_states.is_contiguous()
        assert torch.equal(norm_rotary(hidden_states, weight, *rotary, EPS), expected)


def test_an_expanded_gradient_is_read_every_element_written_and_runs_agree_to_the_bit():
    rotary, weight = tables(40), weight_of_norm(40).detach()
    runs = []
    for upstream in (torch.ones(()).to(DEVICE).expand_as(states(40)), torch.ones_like(states(40))):
        with empty_memory_is_nan():
            rotated = norm_rotary(states(40), weight, *rotary, EPS)
            runs.append([rotated, *norm_rotary_backward(upstream, states(40), weight, *rotary, EPS)])
    for one, other in zip(*runs):
        assert torch.equal(one, other) and one.isfinite().all()


def test_an_empty_batch():
    hidden_states = states(batch=0).requires_grad_()
    rotated = norm_rotary(hidden_states, weight_of_norm(32), *tables(32), EPS)
    rotated.sum().backward()
    assert rotated.shape == hidden_states.grad.shape == (0, LAYOUT.num_tokens, 3, 32)


@pytest.mark.parametrize("normed", [True, False])
def test_what_pytorch_asks_of_an_operator(normed):
    weight = weight_of_norm(8) if normed else None
    torch.library.opcheck(norm_rotary, (states(8).requires_grad_(), weight, *tables(8), EPS))
    weight = weight.detach() if normed else None
    torch.library.opcheck(norm_rotary_backward, (states(8, seed=1), states(8), weight, *tables(8), EPS))


def test_a_model_gives_the_same_images_and_gradients():
    core = random_core().to(DEVICE)
    pixel_values = noise(1, 3, 12, 8).to(DEVICE)
    results = []
    for fused in (False, True):
        for block in [*core.encoder.blocks, *core.decoder.blocks]:
            block.attn.set_processor(HieraTokAttnProcessor("sdpa", fused_rotary=fused))
        core.zero_grad()
        image = core.decode(core.encode(pixel_values).mode())
        image.square().sum().backward()
        results.append([image, *(x.grad for x in core.parameters() if x.grad is not None)])
    assert len(results[0]) == len(results[1]) > 30
    for one, other in zip(*results):
        assert (one - other).norm() <= 1e-4 * other.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_only_eager_inference_takes_the_kernel_by_itself(monkeypatch):
    core = random_core().to(DEVICE)
    latents = noise(1, 4, 7, 5).to(DEVICE)
    taken = []
    fused = layers.fused_norm_rotary
    monkeypatch.setattr(layers, "fused_norm_rotary", lambda *arguments: taken.append(1) or fused(*arguments))
    expected = core.decode(latents)
    assert not taken
    with torch.no_grad():
        torch.testing.assert_close(core.decode(latents), expected, atol=1e-4, rtol=0)
    assert len(taken) == 2 * len(core.decoder.blocks)


def test_compiles_without_a_graph_break():
    core = random_core(decoder_num_layers=1, scale_factors=(2, 1)).to(DEVICE)
    latents = noise(1, 4, 3, 2).to(DEVICE)
    expected = core.decode(latents)
    for block in core.decoder.blocks:
        block.attn.set_processor(HieraTokAttnProcessor(fused_rotary=True))
    decode = torch.compile(core.decode, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(decode(latents), expected, atol=1e-4, rtol=0)


def test_a_device_without_triton_is_refused(monkeypatch):
    core = random_core()
    core.decoder.blocks[0].attn.set_processor(HieraTokAttnProcessor(fused_rotary=True))
    monkeypatch.setattr("hieratok_hf.ops.attention_triton.INTERPRETED", type("No", (), {"value": False}))
    with pytest.raises(ValueError, match=r"\A`fused_rotary` cannot serve here: the kernel runs on a CUDA device"):
        core.decode(noise(1, 4, 7, 5))
