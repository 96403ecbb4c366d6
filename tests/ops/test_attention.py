"""Tests of `attention`: every backend against the reference, and causality bit for bit."""

import importlib.util
import math

import pytest
import torch
from helpers import noise

from hieratok_hf import PyramidLayout, scale_causal_attention
from hieratok_hf.ops import attention
from hieratok_hf.ops.attention import scale_causal_mask

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton"),  # NaN in the interpreter
]
LAYOUTS = [
    pytest.param(PyramidLayout.from_grid(*grid, factors), id=f"{grid[0]}x{grid[1]}-{factors}".replace(" ", ""))
    for grid, factors in [
        ((7, 5), (8, 4, 2, 1)),
        ((4, 6), (8, 4, 2, 1)),
        ((1, 3), (4, 2, 1)),
        ((9, 2), (3, 1)),
        ((5, 5), (1,)),
    ]
]
SEVERAL_SCALES = LAYOUTS[:-1]
TRITON = pytest.param(
    "triton", marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
)
BACKENDS = ["sdpa", "sdpa_mask", "flex", TRITON, "auto"]
WITH_GRADIENTS = ["sdpa", "sdpa_mask", TRITON, "auto"]  # on a CPU `flex` goes forward only
WITHOUT_A_MASK = ["sdpa", TRITON]  # a mask takes a token's weight, but not its NaN


def projected(layout, dtype=torch.float32, batch=2, heads=3, head_dim=8, device="cpu"):
    return [noise(batch, heads, layout.num_tokens, head_dim, seed=seed).to(device, dtype) for seed in range(3)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [None, 0.9])
def test_outputs_equal_the_reference(layout, backend, scale, device_of):
    tensors = projected(layout, device=device_of(backend))
    expected = scale_causal_attention(*tensors, layout, backend="reference", scale=scale)
    assert expected.abs().max() > 0.1
    actual = scale_causal_attention(*tensors, layout, backend=backend, scale=scale)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", WITH_GRADIENTS)
@pytest.mark.parametrize("scale", [None, 0.9])
def test_gradients_equal_those_of_the_reference(layout, backend, scale, device_of):
    device = device_of(backend)
    upstream = noise(2, 3, layout.num_tokens, 8, seed=9).to(device)
    results = {}
    for name in ("reference", backend):
        leaves = [x.requires_grad_() for x in projected(layout, device=device)]
        attended = scale_causal_attention(*leaves, layout, backend=name, scale=scale)
        results[name] = torch.autograd.grad(attended, leaves, upstream)
    for actual, expected in zip(results[backend], results["reference"]):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_default_scale_is_that_of_the_head(backend, device_of):
    layout = PyramidLayout.from_grid(4, 6, (2, 1))
    tensors = projected(layout, head_dim=16, device=device_of(backend))
    default = scale_causal_attention(*tensors, layout, backend=backend)
    assert torch.equal(default, scale_causal_attention(*tensors, layout, backend=backend, scale=1 / math.sqrt(16)))
    assert not torch.allclose(default, scale_causal_attention(*tensors, layout, backend=backend, scale=1.0), atol=0.01)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_low_precision_stays_close_to_float32(layout, dtype, tolerance, backend, device_of):
    tensors = projected(layout, dtype, device=device_of(backend))
    expected = scale_causal_attention(*(x.float() for x in tensors), layout, backend="reference")
    actual = scale_causal_attention(*tensors, layout, backend=backend)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("layout", SEVERAL_SCALES)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_finer_tokens_leave_coarser_results_bit_identical(layout, backend, device_of):
    tensors = projected(layout, device=device_of(backend))
    before = scale_causal_attention(*tensors, layout, backend=backend)
    for end in layout.ends[:-1]:
        changed = [x.clone() for x in tensors]
        for i, x in enumerate(changed):
            x[:, :, end:] = 5 * noise(*x[:, :, end:].shape, seed=20 + i)
        after = scale_causal_attention(*changed, layout, backend=backend)
        assert torch.equal(after[:, :, :end], before[:, :, :end])
        assert not torch.isclose(after[:, :, end:], before[:, :, end:]).all()


@pytest.mark.parametrize("layout", SEVERAL_SCALES)
@pytest.mark.parametrize("backend", WITHOUT_A_MASK)
def test_finer_tokens_are_never_read_even_when_they_are_nan(layout, backend, device_of):
    tensors = projected(layout, device=device_of(backend))
    before = scale_causal_attention(*tensors, layout, backend=backend)
    for end in layout.ends[:-1]:
        poisoned = [x.clone() for x in tensors]
        for x in poisoned:
            x[:, :, end:] = float("nan")
        after = scale_causal_attention(*poisoned, layout, backend=backend)
        assert torch.equal(after[:, :, :end], before[:, :, :end])
        assert after[:, :, end:].isnan().all()


@pytest.mark.parametrize("layout", SEVERAL_SCALES)
@pytest.mark.parametrize("backend", ["reference", *WITH_GRADIENTS])
def test_every_scale_reads_its_own_and_every_coarser_token(layout, backend, device_of):
    query, key, value = projected(layout, batch=1, heads=1, device=device_of(backend))
    value.requires_grad_()
    attended = scale_causal_attention(query, key, value, layout, backend=backend)
    for rows, end in zip(layout.slices, layout.ends):
        (gradient,) = torch.autograd.grad(attended[:, :, rows].sum(), value, retain_graph=True)
        read = gradient[0, 0, :, 0] > 0
        assert read[:end].all() and not read[end:].any()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_one_scale_is_full_attention(backend, device_of):
    layout = PyramidLayout.from_grid(5, 5, (1,))
    query, key, value = projected(layout, device=device_of(backend))
    expected = ((query @ key.transpose(-1, -2)) / math.sqrt(8)).softmax(-1) @ value
    actual = scale_causal_attention(query, key, value, layout, backend=backend)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["sdpa", "auto"])
def test_no_mask_is_built_on_the_sdpa_path(layout, backend, monkeypatch):
    calls = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def recording(query, key, value, *args, **kwargs):
        calls.append((query.shape[2], key.shape[2], value.shape[2], args, kwargs))
        return plain(query, key, value, *args, **kwargs)

    def forbidden(*args, **kwargs):
        raise AssertionError("a dense mask was built")

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", recording)
    monkeypatch.setattr("hieratok_hf.ops.attention.scale_causal_mask", forbidden)
    monkeypatch.setattr(PyramidLayout, "visible_ends", forbidden)
    scale_causal_attention(*projected(layout), layout, backend=backend)
    assert [call[:3] for call in calls] == [(n, end, end) for n, end in zip(layout.lengths, layout.ends)]
    for *_, args, kwargs in calls:
        assert args == () and kwargs.get("attn_mask") is None and not kwargs.get("is_causal", False)


def test_the_watch_for_masks_sees_the_one_of_the_reference(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a dense mask was built")

    layout = PyramidLayout.from_grid(4, 6, (2, 1))
    monkeypatch.setattr("hieratok_hf.ops.attention.scale_causal_mask", forbidden)
    with pytest.raises(AssertionError, match="a dense mask was built"):
        scale_causal_attention(*projected(layout), layout, backend="reference")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_returned_weights_are_those_of_the_attended_values(layout, backend):
    query, key, value = projected(layout)
    attended, weights = scale_causal_attention(query, key, value, layout, backend=backend, return_weights=True)
    assert weights.shape == (2, 3, layout.num_tokens, layout.num_tokens) and weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, layout.num_tokens))
    assert (weights.masked_select(~scale_causal_mask(layout)) == 0).all()
    torch.testing.assert_close(weights @ value, attended, atol=1e-6, rtol=1e-5)
