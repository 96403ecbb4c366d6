"""Names of attention: which of the libraries' settings decides, and what each means."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from helpers import images, noise, random_core
from torch.nn.attention import SDPBackend

from hieratok_hf import (
    AutoencoderHieraTok,
    HieraTokAttnProcessor,
    HieraTokModel,
    PyramidLayout,
    register_attention_backend,
    scale_causal_attention,
)
from hieratok_hf.models import layers
from hieratok_hf.models.attention_dispatch import DIFFUSERS_BACKENDS, backend_of
from hieratok_hf.ops.attention import reference_attention

NATIVE = [name for name in DIFFUSERS_BACKENDS if name.startswith("_native")]


@pytest.fixture
def vae():
    yield AutoencoderHieraTok.from_core(random_core()).eval()
    # `set_attention_backend` of any model is the whole process's.
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def test_the_model_s_setting_comes_first_and_transformers_last():
    assert backend_of(None, None, None) == ("auto", None)
    assert backend_of(None, None, "eager") == ("reference", None)
    assert backend_of("sdpa", None, "eager") == ("sdpa", None)
    assert backend_of("sdpa", "flex", "eager") == ("flex", None)
    with attention_backend("_native_math"):
        assert backend_of(None, None, "eager") == ("sdpa", SDPBackend.MATH)
        assert backend_of("reference", None, None) == ("reference", None)
        assert backend_of(None, "native", None) == ("sdpa", None)
    assert backend_of(None, None, "eager") == ("reference", None)


def test_a_choice_of_the_process_that_has_no_meaning_here_is_another_model_s(monkeypatch):
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName._NATIVE_NPU)
    assert backend_of(None, None, None) == ("auto", None)
    with pytest.raises(ValueError, match=r"_NATIVE_NPU.* is not supported"):
        backend_of(None, AttentionBackendName._NATIVE_NPU, None)


@pytest.mark.parametrize("name", ["native", "flex", *NATIVE])
def test_set_and_context_give_the_same_images(vae, name):
    sample = images(2, 3, 28, 20)
    with torch.no_grad():
        expected = vae(sample).sample
        with attention_backend(name):
            in_context = vae(sample).sample
        vae.set_attention_backend(name)
        torch.testing.assert_close(vae(sample).sample, in_context, rtol=0, atol=0)
        torch.testing.assert_close(in_context, expected, rtol=0, atol=1e-5)
        vae.reset_attention_backend()
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)  # it leaves the process's alone
        assert torch.equal(vae(sample).sample, expected)


@pytest.mark.parametrize("name", NATIVE)
def test_a_kernel_comes_before_all_others_while_the_model_attends(vae, name, monkeypatch):
    orders, before = [], torch._C._get_sdp_priority_order()

    def attend(*args, attend=layers.scale_causal_attention, **kwargs):
        orders.append(torch._C._get_sdp_priority_order())
        return attend(*args, **kwargs)

    monkeypatch.setattr(layers, "scale_causal_attention", attend)
    vae.set_attention_backend(name)
    vae.encode(images(1, 3, 16, 16))
    assert {order[0] for order in orders} == {int(DIFFUSERS_BACKENDS[name][1])}
    assert all({int(SDPBackend.MATH), int(SDPBackend.FLASH_ATTENTION)} < set(order) for order in orders)
    assert torch._C._get_sdp_priority_order() == before


def test_threads_leave_the_order_of_the_kernels_as_it_was(vae, monkeypatch):
    before, latents = torch._C._get_sdp_priority_order(), noise(1, 4, 3, 3)
    vae.requires_grad_(False).set_attention_backend("_native_math")
    expected, lasting = vae.decode(latents).sample, iter([0.05, 0.15, 0.1] + 100 * [0])

    def attend(*args, attend=layers.scale_causal_attention, **kwargs):
        time.sleep(next(lasting))  # so that the first thread to come is not the last to go
        return attend(*args, **kwargs)

    monkeypatch.setattr(layers, "scale_causal_attention", attend)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: vae.decode(latents).sample, range(3)))
    after = torch._C._get_sdp_priority_order()
    torch._C._set_sdp_priority_order(before)
    assert after == before and all(torch.equal(image, expected) for image in found)


def test_a_preferred_kernel_compiles_without_a_break(vae):
    sample = images(2, 3, 28, 20)
    with torch.no_grad():
        expected = vae(sample).sample
        vae.set_attention_backend("_native_math")
        torch.compiler.reset()
        compiled = torch.compile(vae, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(sample).sample, expected, rtol=0, atol=1e-5)


@pytest.fixture
def mine():
    """Registers the reference as "mine", and gives the numbers of tokens that it was called with."""
    lengths = []

    def attend(query, key, value, layout):
        lengths.append(layout.num_tokens)
        return reference_attention(query, key, value, layout, query.shape[-1] ** -0.5)[0]

    register_attention_backend("mine", attend)
    return lengths


def test_a_registered_backend_serves_by_its_name_everywhere(vae, mine, tmp_path):
    sample = images(2, 3, 28, 20)
    vae.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = vae(sample).sample
        vae.set_attn_processor(HieraTokAttnProcessor(backend="mine"))
        torch.testing.assert_close(vae(sample).sample, expected, rtol=0, atol=1e-5)
        assert mine == [35, 35, 52, 52]  # two blocks a side
        for model in (
            HieraTokModel.from_pretrained(tmp_path, attn_implementation="mine"),
            HieraTokModel(vae.core.config),
        ):
            model.set_attn_implementation("mine")
            mine.clear()
            model(sample)
            assert mine == [35, 35, 52, 52]


@pytest.mark.parametrize("scale", [None, 0.7])
def test_a_registered_backend_heeds_the_scale(mine, scale):
    layout = PyramidLayout.from_grid(3, 5, (2, 1))
    tokens = [noise(2, 2, layout.num_tokens, 8, seed=seed) for seed in range(3)]
    expected = scale_causal_attention(*tokens, layout, backend="reference", scale=scale)
    found = scale_causal_attention(*tokens, layout, backend="mine", scale=scale)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="mine"):
        scale_causal_attention(*tokens, layout, backend="mine", return_weights=True)


@pytest.mark.parametrize(
    ("attend", "got"),
    [
        (lambda value: value[:, :, 1:], r"\(1, 2, 4, 8\)"),
        (lambda value: value.double(), "float64"),
        (lambda value: (value, None), "tuple"),
        (lambda value: None, "NoneType"),
    ],
)
def test_what_a_registered_backend_returns_is_refused_by_its_name_unless_it_is_as_the_query(attend, got):
    register_attention_backend("wrong", lambda query, key, value, layout: attend(value))
    tokens, layout = torch.rand(1, 2, 5, 8), PyramidLayout.from_grid(2, 2, (2, 1))
    with pytest.raises(ValueError, match=rf"`backend='wrong'` must return .*float32, got .*{got}"):
        scale_causal_attention(tokens, tokens, tokens, layout, backend="wrong")


def test_of_two_functions_of_a_name_the_later_counts():
    tokens, layout = torch.rand(1, 2, 5, 8), PyramidLayout.from_grid(2, 2, (2, 1))
    for factor in (2, 3):
        register_attention_backend("mine", lambda query, key, value, layout, factor=factor: factor * value)
    assert torch.equal(scale_causal_attention(tokens, tokens, tokens, layout, backend="mine"), 3 * tokens)


@pytest.mark.parametrize("name", ["auto", "eager", "hieratok_sdpa", "_native_math", "flash_attention_2", "", "a b", 3])
def test_a_name_that_is_taken_or_none_is_refused(name):
    with pytest.raises(ValueError, match="`name`"):
        register_attention_backend(name, len)
    with pytest.raises(ValueError, match="`function`"):
        register_attention_backend("new", "sdpa")
