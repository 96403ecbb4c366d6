"""Tests of `attention_flex`: numbers against the reference, plain and compiled, and block masks made once and kept."""

import pytest
import torch
from helpers import AttendMaps, noise
from torch._subclasses.fake_tensor import FakeTensorMode

from hieratok_hf import PyramidLayout, scale_causal_attention
from hieratok_hf.ops import attention_flex

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


@pytest.fixture(autouse=True)
def made_masks(monkeypatch):
    """The lengths of the block masks that were made, from none at all."""
    made = []
    create = attention_flex.create_block_mask

    def counting(mask, batch, heads, query_length, *args, **kwargs):
        made.append(query_length)
        return create(mask, batch, heads, query_length, *args, **kwargs)

    monkeypatch.setattr(attention_flex, "create_block_mask", counting)
    attention_flex._kept_block_mask.cache_clear()
    yield made
    attention_flex._kept_block_mask.cache_clear()


def projected(layout, batch=2, heads=2, head_dim=16, seed=0):
    return [noise(batch, heads, layout.num_tokens, head_dim, seed=seed + i) for i in range(3)]


def attend(query, key, value, layout):
    return scale_causal_attention(query, key, value, layout, backend="flex")


def reference(query, key, value, layout):
    return scale_causal_attention(query, key, value, layout, backend="reference")


# One token, one whole block, and several blocks with ragged ends.
@pytest.mark.parametrize(("grid", "factors"), [((1, 1), (1,)), ((8, 16), (1,)), ((13, 19), (4, 3, 2, 1))], ids=str)
def test_outputs_equal_the_reference(grid, factors):
    layout = PyramidLayout.from_grid(*grid, factors)
    tensors = projected(layout)
    torch.testing.assert_close(attend(*tensors, layout), reference(*tensors, layout), atol=1e-5, rtol=0)


def test_an_exported_graph_gives_the_same_numbers(made_masks):
    maps = [noise(2, 32, 8, 6, seed=seed) for seed in range(3)]
    with torch.no_grad():
        exported = torch.export.export(AttendMaps("flex"), tuple(maps), strict=False)
        expected = AttendMaps("reference")(*maps)
        torch.testing.assert_close(exported.module()(*maps), expected, atol=1e-5, rtol=0)
        # What was traced is not kept for later.
        torch.testing.assert_close(AttendMaps("flex")(*maps), expected, atol=1e-5, rtol=0)


def test_a_block_mask_is_made_once_a_layout(made_masks):
    # The same length and other scales.
    first, second = (PyramidLayout(grids, (2, 1)) for grids in (((1, 5), (1, 30)), ((1, 10), (1, 25))))
    for layout in (first, second, first, PyramidLayout(first.grids, (2, 1)), second):
        for batch, head_dim in ((1, 8), (3, 16)):
            tensors = projected(layout, batch, head_dim=head_dim)
            torch.testing.assert_close(attend(*tensors, layout), reference(*tensors, layout), atol=1e-5, rtol=0)
    assert made_masks == [35, 35]


def test_a_mask_first_made_in_inference_mode_serves_later(made_masks):
    layout = PyramidLayout.from_grid(7, 5, (2, 1))
    with torch.inference_mode():
        expected = attend(*projected(layout), layout)
    kept = attention_flex._kept_block_mask(layout.ends, torch.device("cpu"))
    assert not any(getattr(kept, name).is_inference() for name in attention_flex.BLOCK_FIELDS)
    assert torch.equal(attend(*projected(layout), layout), expected)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*projected(layout), layout), expected, atol=1e-6, rtol=0)
    assert made_masks == [layout.num_tokens]


def test_no_mask_of_a_fake_mode_or_a_transform_is_kept(made_masks):
    layout, device = PyramidLayout.from_grid(6, 5, (2, 1)), torch.device("cpu")
    with FakeTensorMode():
        attention_flex._block_tensors(layout.ends, device)
    torch.func.functionalize(lambda x: attention_flex._block_tensors(layout.ends, device)[0])(noise(1))
    assert all(type(x) is torch.Tensor and x.data_ptr() for x in attention_flex._block_tensors(layout.ends, device))


def test_a_block_beyond_the_prefix_is_skipped_and_one_inside_it_has_no_mask():
    kept = attention_flex._kept_block_mask((100, 400), torch.device("cpu"))
    # Of each row of blocks: how many are whole, and how many partly masked.
    assert kept.full_kv_num_blocks.flatten().tolist() == [0, 3, 3, 0]
    assert kept.kv_num_blocks.flatten().tolist() == [4, 1, 1, 4]
    kept = attention_flex._kept_block_mask((256, 1280), torch.device("cpu"))
    assert kept.full_kv_num_blocks.flatten().tolist() == [2] * 2 + [10] * 8
    assert not kept.kv_num_blocks.any()


@pytest.mark.parametrize("which", range(3), ids=["query", "key", "value"])
def test_gradients_on_a_cpu_are_refused_and_where_none_is_computed_none_is_needed(which):
    layout = PyramidLayout(((1, 5), (1, 30)), (2, 1))
    tensors = projected(layout)
    tensors[which].requires_grad_()
    with pytest.raises(ValueError, match=r"backend='flex'.*no backward pass on a CPU"):
        attend(*tensors, layout)
    with torch.no_grad():
        torch.testing.assert_close(attend(*tensors, layout), reference(*tensors, layout), atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lengths", [(4, 16, 64, 256), (1, 6, 18, 66, 261, 1011)], ids=sum)
def test_a_gpu_gives_the_numbers_and_gradients_of_the_reference(lengths):
    layout = PyramidLayout(tuple((1, length) for length in lengths), tuple(range(len(lengths), 0, -1)))
    upstream = noise(2, 2, layout.num_tokens, 64, seed=9).to("cuda", torch.bfloat16)
    tensors = [x.to("cuda", torch.bfloat16) for x in projected(layout, head_dim=64)]
    results = []
    for function, dtype in ((attend, torch.bfloat16), (reference, torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        attended = function(*leaves, layout)
        results.append([attended, *torch.autograd.grad(attended, leaves, upstream.to(dtype))])
    for actual, expected in zip(*results):
        assert actual.dtype == torch.bfloat16
        assert (actual.float() - expected).norm() < 1e-2 * expected.norm()
