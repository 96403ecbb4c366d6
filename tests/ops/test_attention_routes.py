"""Tests of every route to an attention backend: it is the one that computes, and images stay scale-causal."""

import tempfile

import pytest
import torch
from diffusers.models import attention_dispatch
from helpers import changed_tokens, images, noise, random_core
from transformers import AutoModel

from hieratok_hf import AutoencoderHieraTok, HieraTokAttnProcessor, HieraTokModel, PyramidLayout
from hieratok_hf.models.attention_dispatch import ATTENTION_IMPLEMENTATIONS
from hieratok_hf.ops.attention import ATTENTION_BACKENDS, scale_causal_attention

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),  # norms under autocast
]

FACTORS = (4, 2, 1)
GRID = (5, 3)
LAYOUT = PyramidLayout.from_grid(*GRID, FACTORS)
IMPLEMENTATIONS = {"eager": "reference", "sdpa": "auto", "flex_attention": "flex"}
IMPLEMENTATIONS |= {f"hieratok_{backend}": backend for backend in ATTENTION_BACKENDS}
# On a CPU `flex` goes forward only. A `sdpa` has one computation a scale, and the encoder has one scale.
CALLS_OF_TRAINING = {"sdpa": 2 * 1 + 2 * 3, "sdpa_mask": 4, "triton": 4}


def tiny_core():
    torch.manual_seed(0)
    return random_core(scale_factors=FACTORS)


@pytest.fixture(scope="module")
def expected():
    """The images of all scales by the reference."""
    with torch.no_grad():
        return processed("reference").decode_scales(noise(1, 4, *GRID))


def loaded(name):
    with tempfile.TemporaryDirectory() as folder:
        HieraTokModel.from_core(tiny_core()).save_pretrained(folder)
        return AutoModel.from_pretrained(folder, attn_implementation=name).core


def switched(name):
    model = HieraTokModel.from_core(tiny_core())
    model.set_attn_implementation(name)
    return model.core


def switched_by_diffusers(name):
    vae = AutoencoderHieraTok.from_core(tiny_core())
    vae.set_attention_backend(name)
    return vae.core


def processed(name, **options):
    vae = AutoencoderHieraTok.from_core(tiny_core())
    vae.set_attn_processor(HieraTokAttnProcessor(name, **options))
    return vae.core


def rotary_fused(name):
    return processed(name, fused_rotary=True)


def projections_fused(name):
    vae = AutoencoderHieraTok.from_core(processed(name))
    vae.fuse_qkv_projections()
    return vae.core


def checkpointed(name):
    model = HieraTokModel.from_core(processed(name)).train()
    model.gradient_checkpointing_enable()
    return model.core


def compiled(name):
    torch.compiler.reset()
    return processed(name)


def autocast(name):
    return processed(name)


ROUTES = [
    *((loaded, name, IMPLEMENTATIONS[name]) for name in ("eager", "sdpa", "hieratok_sdpa_mask")),
    *((switched, name, backend) for name, backend in IMPLEMENTATIONS.items()),
    *((switched_by_diffusers, name, backend) for name, backend in (("native", "sdpa"), ("flex", "flex"))),
    *((processed, backend, backend) for backend in ATTENTION_BACKENDS),
    (rotary_fused, "auto", "auto"),
    *((projections_fused, backend, backend) for backend in ("flex", "triton")),
    *((checkpointed, backend, backend) for backend in ("auto", "sdpa_mask")),
    *((compiled, backend, backend) for backend in ("auto", "flex", "triton")),
    *((autocast, backend, backend) for backend in ATTENTION_BACKENDS),
]


def test_every_name_has_a_route():
    assert ATTENTION_IMPLEMENTATIONS == IMPLEMENTATIONS


@pytest.mark.parametrize(
    ("make", "name", "backend"), ROUTES, ids=lambda value: value if isinstance(value, str) else value.__name__
)
def test_the_route_ends_at_its_backend_and_keeps_coarser_images_from_finer_tokens(
    make, name, backend, expected, device_of, reached, monkeypatch
):
    in_triton = backend == "triton" or make is rotary_fused
    if in_triton:
        pytest.importorskip("triton", reason="needs Triton")
    # diffusers keeps the backend that was set last for all its models.
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    device = device_of("triton" if in_triton else backend)
    core = make(name).to(device)
    decoder, tolerance = core.decoder, 1e-4
    if make is compiled:
        decoder = torch.compile(decoder, backend="eager", fullgraph=True)
    if make is autocast:
        decoder, tolerance = torch.autocast(device, torch.bfloat16)(decoder), 0.1
    asked_for = []

    def recording(*args, backend, **kwargs):
        asked_for.append(backend)
        return scale_causal_attention(*args, backend=backend, **kwargs)

    monkeypatch.setattr("hieratok_hf.models.layers.scale_causal_attention", recording)
    latents = noise(1, 4, *GRID).to(device)
    # From the start and added, because a compiled route does not look for hooks again.
    change = {"tokens": torch.zeros(1, LAYOUT.num_tokens, 32, device=device)}
    with (
        torch.set_grad_enabled(make is checkpointed),
        changed_tokens(core.decoder, lambda tokens: tokens + change["tokens"]),
    ):
        before = decoder(latents, LAYOUT, all_scales=True)
        assert asked_for == [backend] * 2  # two layers
        for image, other in zip(before, expected, strict=True):
            torch.testing.assert_close(image.float().cpu(), other, atol=tolerance, rtol=0)
        for scale in range(1, LAYOUT.num_scales):
            change["tokens"] = 3 * noise(1, LAYOUT.num_tokens, 32, seed=5).to(device)
            change["tokens"][:, : LAYOUT.slices[scale].start] = 0
            after = decoder(latents, LAYOUT, all_scales=True)
            assert all(torch.equal(image, same) for image, same in zip(before[:scale], after[:scale]))
            for image, other in zip(before[scale:], after[scale:]):
                assert not torch.allclose(image, other, atol=0.1)
        asked_for.clear()
        core.encode(images(1, 3, 20, 12).to(device))
    assert asked_for == [backend] * 2
    if backend != "auto":
        assert set(reached) == {backend}


def gradients_of(core, device):
    core.to(device).zero_grad()
    shown = images(1, 3, 20, 12).to(device)
    made = core.decode_scales(core.encode(shown).mode())
    sum(image.square().sum() for image in made).backward()
    return {name: x.grad.cpu() for name, x in core.named_parameters() if x.grad is not None}


@pytest.mark.parametrize(
    ("make", "backend"),
    [(processed, "sdpa"), (checkpointed, "sdpa_mask"), (projections_fused, "sdpa"), (checkpointed, "triton")],
)
def test_training_has_the_gradients_of_the_reference(make, backend, device_of, reached):
    if backend == "triton":
        pytest.importorskip("triton", reason="needs Triton")
    expected = gradients_of(make("reference"), "cpu")
    reached.clear()
    actual = gradients_of(make(backend), device_of(backend))
    assert reached == [backend] * CALLS_OF_TRAINING[backend] * (2 if make is checkpointed else 1)
    assert list(actual) == list(expected) and len(actual) > 40
    for name, gradient in actual.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm(), name
