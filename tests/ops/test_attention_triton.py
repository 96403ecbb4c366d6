"""Tests of `attention_triton`: numbers and gradients, what is read and written, and what an operator promises."""

import itertools
import math
import random
import types

import pytest
import torch
from helpers import noise
from torch._dynamo.testing import CompileCounterWithBackend

from hieratok_hf import PyramidLayout, scale_causal_attention
from hieratok_hf.ops.attention import reference_attention
from hieratok_hf.ops.pyramid import flatten_pyramid

pytest.importorskip("triton", minversion="3.4", reason="needs Triton 3.4")
import triton

from hieratok_hf.ops import attention_triton
from hieratok_hf.ops.attention_triton import prefix_attention, prefix_attention_backward, why_not_triton

# The interpreter is loud about NaN, and about rows beyond a scale, which are computed but not written.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NAN = float("nan")
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
ENDS = (1, 5, 21, 85)
LONGER_ENDS = {340: (4, 20, 84, 340), 341: (1, 5, 21, 85, 341), 1363: (1, 7, 25, 91, 352, 1363)}


@pytest.fixture
def device(device_of):
    return device_of("triton")


def id_of(value):
    return str(value).removeprefix("torch.").replace(" ", "")


every_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=id_of)


def random_inputs(ends, device, dtype=torch.float32, head_dim=32, batch=1, heads=2, seed=0):
    """Queries, keys, values and upstream gradients `(B, N, A, d)`."""
    return [noise(batch, ends[-1], heads, head_dim, seed=10 * seed + i).to(device, dtype) for i in range(4)]


def computed(query, key, value, upstream, ends, scale=0.2):
    """The output and the gradients of queries, keys and values."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    output = prefix_attention(*leaves, ends, scale)[0]
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


def layout_of(ends):
    lengths = [end - start for start, end in zip((0, *ends), ends)]
    return PyramidLayout(tuple((1, length) for length in lengths), tuple(range(len(ends), 0, -1)))


def expected_of(query, key, value, upstream, ends, scale=0.2):
    """The same of the reference in float32."""
    leaves = [x.detach().float().transpose(1, 2).requires_grad_() for x in (query, key, value)]
    output = reference_attention(*leaves, layout_of(ends), scale)[0]
    results = [output.detach(), *torch.autograd.grad(output, leaves, upstream.float().transpose(1, 2))]
    return [x.transpose(1, 2) for x in results]


def check_against_the_reference(tensors, ends, scale=0.2, tolerance=None):
    tolerance = tolerance or TOLERANCES[tensors[0].dtype]
    results = computed(*tensors, ends, scale)
    for name, actual, expected in zip(
        ("output", "query", "key", "value"), results, expected_of(*tensors, ends, scale)
    ):
        assert actual.dtype == tensors[0].dtype and actual.shape == expected.shape
        # One token alone moves no weight, and zero has no relative error.
        size = tensors[3].float().norm() if ends == (1,) and name in ("query", "key") else expected.norm()
        error = (actual.float() - expected).norm() / size
        assert error < tolerance, (name, error.item())
    return results


@every_dtype
@pytest.mark.parametrize("ends", [ENDS[:1], ENDS[:2], ENDS[:3], ENDS], ids=id_of)
def test_outputs_and_gradients_equal_the_reference(ends, dtype, device):
    check_against_the_reference(random_inputs(ends, device, dtype, head_dim=64, batch=2, seed=len(ends)), ends)


@pytest.mark.parametrize(
    ("num_tokens", "dtype"),
    [*itertools.product((340, 341), (torch.float32, torch.bfloat16)), (1363, torch.float16)],
    ids=id_of,
)
def test_outputs_and_gradients_of_longer_sequences_equal_the_reference(num_tokens, dtype, device):
    ends = LONGER_ENDS[num_tokens]
    tensors = random_inputs(ends, device, dtype, head_dim=64, heads=1, seed=num_tokens)
    check_against_the_reference(tensors, ends)


@pytest.mark.parametrize("num_scales", range(1, 11))
def test_any_number_of_scales_equals_the_reference(num_scales, device):
    inner = sorted(random.Random(num_scales).sample(range(1, 101), num_scales - 1))
    ends = (*inner, 101)
    check_against_the_reference(random_inputs(ends, device, heads=1, seed=num_scales), ends)


@pytest.mark.parametrize(
    ("grid", "factors"), [((3, 29), (8, 4, 2, 1)), ((37, 1), (5, 2, 1)), ((2, 13), (3, 1)), ((9, 11), (6, 5, 3, 2, 1))]
)
def test_odd_aspect_ratios_equal_the_reference(grid, factors, device):
    ends = PyramidLayout.from_grid(*grid, factors).ends
    check_against_the_reference(random_inputs(ends, device, heads=1, seed=grid[0]), ends)


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        *((head_dim, torch.float32) for head_dim in (1, 8, 32, 40, 64, 96, 127, 128)),
        *((head_dim, torch.bfloat16) for head_dim in (40, 96, 128)),
        (32, torch.float16),
    ],
    ids=id_of,
)
def test_any_size_of_head_equals_the_reference(head_dim, dtype, device):
    tensors = random_inputs(ENDS, device, dtype, head_dim, heads=1, seed=head_dim)
    check_against_the_reference(tensors, ENDS, scale=head_dim**-0.5)


@pytest.mark.parametrize(("m", "k"), [(16, 16), (16, 64), (64, 16), (64, 64), (128, 128)])
def test_any_tile_equals_the_reference(m, k, device, monkeypatch):
    for kernel in (attention_triton._attend, attention_triton._query_gradient, attention_triton._key_gradient):
        monkeypatch.setattr(kernel, "configs", [triton.Config({"M": m, "K": k}, num_stages=1)])
    for ends in ((16, 80, 144), (3, 20, 101)):  # with and without whole tiles
        check_against_the_reference(random_inputs(ends, device, head_dim=16, heads=1, seed=m + k), ends)


def test_scores_far_beyond_the_range_of_the_exponential_equal_the_reference(device):
    query, key, value, upstream = random_inputs(ENDS, device)
    # An exponent so large has fewer digits behind the point.
    results = check_against_the_reference([10 * query, key, value, upstream], ENDS, scale=1.0, tolerance=1e-4)
    assert all(x.isfinite().all() for x in results)


@every_dtype
def test_the_second_result_is_the_base_2_logarithm_under_the_softmax(dtype, device):
    query, key, value, _ = random_inputs(ENDS, device, dtype)
    log_sum = prefix_attention(query, key, value, ENDS, 0.2)[1]
    assert log_sum.shape == (1, 2, 85) and log_sum.dtype == torch.float32
    scores = torch.einsum("bqad,bkad->baqk", query.float(), key.float()) * 0.2
    for rows, end in zip(layout_of(ENDS).slices, ENDS):
        expected = scores[:, :, rows, :end].logsumexp(-1) / math.log(2)
        torch.testing.assert_close(log_sum[:, :, rows], expected, atol=1e-5, rtol=1e-5)


def amid_nan(tensor):
    """The same values inside a larger tensor that is NaN wherever they are not."""
    batch, rows, heads, channels = tensor.shape
    storage = torch.full((batch + 1, rows + 200, heads + 2, channels + 9), NAN, dtype=tensor.dtype)
    inside = storage.to(tensor.device)[:batch, 67 : 67 + rows, 1 : 1 + heads, 5 : 5 + channels]
    return inside.copy_(tensor)


@pytest.mark.parametrize("head_dim", [32, 40])
def test_nothing_beside_the_inputs_is_read(head_dim, device):
    tensors = random_inputs(ENDS, device, torch.bfloat16, head_dim)
    for actual, expected in zip(computed(*map(amid_nan, tensors), ENDS), computed(*tensors, ENDS)):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("head_dim", [32, 40])
@pytest.mark.parametrize("ends", [ENDS, (64, 128)], ids=id_of)
def test_every_element_is_written(ends, head_dim, device, monkeypatch):
    tensors = random_inputs(ends, device, head_dim=head_dim)
    expected = [prefix_attention(*tensors[:3], ends, 0.2)[1], *computed(*tensors, ends)]
    made = []

    def full_of_nan(allocate):
        def allocated(*args, **kwargs):
            made.append(allocate(*args, **kwargs).fill_(NAN))
            return made[-1]

        return allocated

    poisoned = types.SimpleNamespace(**vars(torch))
    poisoned.empty, poisoned.empty_like = full_of_nan(torch.empty), full_of_nan(torch.empty_like)
    monkeypatch.setattr(attention_triton, "torch", poisoned)
    results = [prefix_attention(*tensors[:3], ends, 0.2)[1], *computed(*tensors, ends)]
    assert {x.data_ptr() for x in results} <= {x.data_ptr() for x in made}
    assert len(made) == 8  # an output and a sum, twice, `delta`, and three gradients
    for actual, same in zip(results, expected):
        assert torch.equal(actual, same)


def test_finer_tokens_that_are_nan_leave_coarser_results_bit_identical(device):
    tensors = random_inputs(ENDS, device, torch.bfloat16)
    before = computed(*tensors, ENDS)
    for end in ENDS[:-1]:
        poisoned = [x.clone() for x in tensors]
        for x in poisoned:
            x[:, end:] = NAN
        after = computed(*poisoned, ENDS)
        for actual, expected in zip(after[:2], before[:2]):  # outputs and gradients of queries
            assert torch.equal(actual[:, :end], expected[:, :end])
            assert actual[:, end:].isnan().all()


def test_gradients_of_keys_and_values_come_from_their_own_and_finer_scales_alone(device):
    tensors = random_inputs(ENDS, device, torch.bfloat16)
    before = computed(*tensors, ENDS)
    for start in ENDS[:-1]:
        query, key, value, upstream = (x.clone() for x in tensors)
        query[:, :start], upstream[:, :start] = NAN, NAN
        after = computed(query, key, value, upstream, ENDS)
        for actual, expected in zip(after[2:], before[2:]):
            assert torch.equal(actual[:, start:], expected[:, start:])
            assert actual[:, :start].isnan().all()


@pytest.mark.parametrize("scale", range(4))
def test_gradients_of_every_visible_key_and_value_reach_them(scale, device):
    query, key, value, upstream = random_inputs(ENDS, device)
    rows = layout_of(ENDS).slices[scale]
    upstream[:, : rows.start], upstream[:, rows.stop :] = 0, 0
    _, _, of_key, of_value = computed(query, key, value, upstream, ENDS)
    for gradient in (of_key, of_value):
        assert (gradient[:, rows.stop :] == 0).all()
        if scale > 0:  # one token alone moves no weight
            assert (gradient[:, : rows.stop].abs().sum(-1) > 0).all()


def rows_first(x):
    return x.clone(memory_format=torch.contiguous_format)


def heads_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def one_of_three(x):
    return (
        torch.cat([x.flatten(2) + 1, x.flatten(2), x.flatten(2) - 1], dim=-1).chunk(3, dim=-1)[1].unflatten(2, (2, -1))
    )


def every_second_channel(x):
    return torch.stack([x, x + 1], dim=-1).flatten(-2)[..., ::2]


def channels_before_rows(x):
    return x.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)


def batch_last(x):
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


ARRANGEMENTS = [heads_first, one_of_three, every_second_channel, channels_before_rows, batch_last]


@pytest.mark.parametrize(
    "arrangements",
    [*([arrange] * 4 for arrange in ARRANGEMENTS), ARRANGEMENTS[:4], ARRANGEMENTS[:0:-1]],
    ids=lambda arrangements: "-".join(dict.fromkeys(arrange.__name__ for arrange in arrangements)),
)
def test_strides_change_no_bit(arrangements, device):
    ends = (9, 73)  # more than a tile
    tensors = random_inputs(ends, device, batch=2)
    arranged = [arrange(x) for arrange, x in zip(arrangements, tensors)]
    assert not {x.stride() for x in arranged} & {x.stride() for x in tensors}
    for actual, expected in zip(computed(*arranged, ends), computed(*tensors, ends)):
        assert torch.equal(actual, expected) and actual.is_contiguous()


def test_expanded_tensors_are_taken(device):
    query, key, value, upstream = random_inputs(ENDS, device, batch=2)
    one_sequence, one_head, one_row = key[:1].expand_as(key), value[:, :, :1].expand_as(value), upstream[:, :1]
    expanded = [query, one_sequence, one_head, one_row.expand_as(upstream)]
    compact = [x.contiguous() for x in expanded]
    for actual, expected in zip(computed(*expanded, ENDS), computed(*compact, ENDS)):
        assert torch.equal(actual, expected)


def test_the_expanded_gradient_of_a_sum_is_taken(device):
    query, key, value, _ = random_inputs(ENDS, device)
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    prefix_attention(*leaves, ENDS, 0.2)[0].sum().backward()
    for leaf, expected in zip(leaves, computed(query, key, value, torch.ones_like(query), ENDS)[1:]):
        assert torch.equal(leaf.grad, expected)


def test_a_repeated_run_gives_the_same_bits(device):
    tensors = random_inputs(ENDS, device, torch.bfloat16)
    first, second = computed(*tensors, ENDS), computed(*tensors, ENDS)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
def test_the_order_of_programs_changes_no_bit(monkeypatch):
    tensors = random_inputs(ENDS, "cpu")
    expected = computed(*tensors, ENDS)
    interpreter = triton.runtime.interpreter.interpreter_builder
    in_order, launched = interpreter.set_grid_idx, []

    def backwards(x, y, z):
        launched.append(interpreter.grid_dim[0])
        in_order(interpreter.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(interpreter, "set_grid_idx", backwards)
    assert all(torch.equal(a, b) for a, b in zip(computed(*tensors, ENDS), expected))
    assert launched and min(launched) > 1


def test_an_empty_batch_gives_empty_results(device):
    tensors = random_inputs(ENDS, device, batch=0)
    assert [x.shape for x in computed(*tensors, ENDS)] == [(0, 85, 2, 32)] * 4
    assert prefix_attention(*tensors[:3], ENDS, 0.2)[1].shape == (0, 2, 85)


def test_the_second_result_has_no_gradient(device):
    query, key, value, _ = random_inputs(ENDS[:2], device)
    output, log_sum = prefix_attention(query.requires_grad_(), key, value, ENDS[:2], 0.2)
    assert output.requires_grad and not log_sum.requires_grad


def test_only_what_needs_a_gradient_gets_one(device):
    query, key, value, upstream = random_inputs(ENDS, device)
    expected = computed(query, key, value, upstream, ENDS)[3]
    value.requires_grad_()
    prefix_attention(query, key, value, ENDS, 0.2)[0].backward(upstream)
    assert query.grad is None and key.grad is None and torch.equal(value.grad, expected)


def test_a_second_derivative_is_refused(device):
    query, key, value, _ = random_inputs(ENDS[:3], device)
    query.requires_grad_()
    output = prefix_attention(query, key, value, ENDS[:3], 0.2)[0]
    (gradient,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"prefix_attention_backward.* no autograd formula was registered"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("arrange", "dtype"),
    [(rows_first, torch.bfloat16), (heads_first, torch.float32), (every_second_channel, torch.float16)],
    ids=["rows_first", "heads_first", "every_second_channel"],
)
def test_operators_keep_what_they_promise_to_pytorch(arrange, dtype, device):
    query, key, value, upstream = map(arrange, random_inputs(ENDS[:3], device, dtype, head_dim=8))
    saved = prefix_attention(query, key, value, ENDS[:3], 0.2)
    torch.library.opcheck(prefix_attention_backward, (upstream, query, key, value, *saved, ENDS[:3], 0.2))
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    torch.library.opcheck(prefix_attention, (*leaves, ENDS[:3], 0.2))


def attend_maps(query, key, value):
    """Attention over a pyramid that follows the size of maps `(B, 16, h, w)`."""
    layout = PyramidLayout.from_grid(*query.shape[2:], (2, 1))
    tokens = [flatten_pyramid(x, layout).unflatten(2, (2, 8)).transpose(1, 2) for x in (query, key, value)]
    return scale_causal_attention(*tokens, layout, backend="triton")


class AttendMaps(torch.nn.Module):
    def forward(self, query, key, value):
        return attend_maps(query, key, value)


def random_maps(height, width, device):
    return [noise(2, 16, height, width, seed=seed).to(device) for seed in range(3)]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_gives_the_same_bits_at_any_size(dynamic, device):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend_maps, backend=counter, fullgraph=True, dynamic=dynamic)
    for height, width in ((6, 4), (8, 7), (6, 4)):
        maps = [x.requires_grad_() for x in random_maps(height, width, device)]
        results = []
        for function in (compiled, attend_maps):
            attended = function(*maps)
            upstream = noise(*attended.shape, seed=9).to(device)
            results.append([attended, *torch.autograd.grad(attended, maps, upstream)])
        assert all(torch.equal(actual, expected) for actual, expected in zip(*results))
    assert counter.frame_count == (1 if dynamic else 2)
    assert "prefix_attention" in str(counter.graphs[0].code)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_graph_of_any_size_holds_the_operator(strict, device):
    any_size = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    maps = tuple(random_maps(6, 4, device))
    exported = torch.export.export(AttendMaps(), maps, dynamic_shapes=[any_size] * 3, strict=strict)
    assert "hieratok_hf.prefix_attention.default" in [str(node.target) for node in exported.graph.nodes]
    for height, width in ((6, 4), (9, 7)):
        maps = random_maps(height, width, device)
        assert torch.equal(exported.module()(*maps), attend_maps(*maps))


def test_autocast_computes_in_its_dtype(device):
    layout = layout_of(ENDS)
    tensors = [x.transpose(1, 2) for x in random_inputs(ENDS, device)[:3]]
    leaves = [x.clone().requires_grad_() for x in tensors]
    with torch.autocast(device, torch.bfloat16):
        attended = scale_causal_attention(*leaves, layout, backend="triton")
    expected = scale_causal_attention(*(x.bfloat16() for x in tensors), layout, backend="triton")
    assert attended.dtype == torch.bfloat16 and torch.equal(attended, expected)
    attended.float().square().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 and leaf.grad.abs().max() > 0 for leaf in leaves)


def test_what_the_kernel_takes_has_no_reason_against_it(device):
    for dtype, head_dim in itertools.product(TOLERANCES, (1, 64, 128)):
        assert why_not_triton(torch.zeros(1, 1, 4, head_dim, dtype=dtype, device=device), 0.1) is None


@pytest.mark.parametrize(
    ("dtype", "head_dim", "scale", "reason"),
    [
        (torch.float64, 64, 0.1, "the kernel takes float16, bfloat16 and float32, not torch.float64"),
        (torch.float32, 129, 0.1, "the kernel takes heads of at most 128 channels, not 129"),
        (torch.bfloat16, 256, 0.1, "the kernel takes heads of at most 128 channels, not 256"),
        (torch.float32, 64, 0.0, "the kernel takes a positive `scale`, not 0.0"),
        (torch.float32, 64, -0.1, "the kernel takes a positive `scale`, not -0.1"),
        (torch.float32, 64, NAN, "the kernel takes a positive `scale`, not nan"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused_by_name_and_goes_elsewhere_by_default(
    dtype, head_dim, scale, reason, device
):
    query, key, value = (noise(1, 1, 5, head_dim, seed=seed).to(device, dtype) for seed in range(3))
    assert why_not_triton(query, scale) == reason
    layout = layout_of((1, 5))
    with pytest.raises(ValueError) as refusal:
        scale_causal_attention(query, key, value, layout, backend="triton", scale=scale)
    assert str(refusal.value) == f"`backend='triton'` cannot serve here: {reason}."
    by_default = scale_causal_attention(query, key, value, layout, scale=scale)
    by_sdpa = scale_causal_attention(query, key, value, layout, backend="sdpa", scale=scale)
    torch.testing.assert_close(by_default, by_sdpa, atol=0, rtol=0, equal_nan=True)


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(attention_triton, "INTERPRETED", triton.language.constexpr(False))
    reason = "the kernel runs on a CUDA device, not on 'cpu' (or anywhere with TRITON_INTERPRET=1)"
    assert why_not_triton(torch.zeros(1, 1, 4, 64), 0.1) == reason


@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [
        ((7, 5), None, "the kernel needs CUDA compute capability 8.0 or higher, not 7.5"),
        ((8, 0), None, None),
        ((12, 0), None, None),
        ((7, 5), "6.4", None),
    ],
)
def test_an_old_chip_is_refused(capability, hip, reason, monkeypatch):
    monkeypatch.setattr(attention_triton, "INTERPRETED", triton.language.constexpr(False))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    query = types.SimpleNamespace(dtype=torch.bfloat16, shape=(1, 1, 4, 64), device=torch.device("cuda"))
    assert why_not_triton(query, 0.1) == reason


ON_A_GPU = (16, 80, 336, 1360)


@pytest.mark.gpu
@needs_a_gpu
@every_dtype
def test_a_gpu_computes_a_training_batch_as_the_reference(dtype):
    batch = 64 if dtype == torch.bfloat16 else 8
    tensors = random_inputs(ON_A_GPU, "cuda", dtype, head_dim=64, batch=batch, heads=12)
    results = computed(*tensors, ON_A_GPU)
    for i, head in ((0, 0), (batch // 2, 7), (batch - 1, 11)):
        one = [x[i : i + 1, :, head : head + 1] for x in tensors]
        for actual, expected in zip(results, expected_of(*one, ON_A_GPU)):
            error = (actual[i : i + 1, :, head : head + 1].float() - expected).norm() / expected.norm()
            assert error < TOLERANCES[dtype]
    assert all(torch.equal(a, b) for a, b in zip(results, computed(*tensors, ON_A_GPU)))


@pytest.mark.gpu
@needs_a_gpu
@pytest.mark.parametrize(
    ("kernel", "tile"),
    [
        *(("_attend", tile) for tile in attention_triton.ATTENTION_TILES),
        *(("_query_gradient", tile) for tile in attention_triton.QUERY_GRADIENT_TILES),
        *(("_key_gradient", tile) for tile in attention_triton.KEY_GRADIENT_TILES),
    ],
)
def test_every_tile_equals_the_reference_on_a_gpu(kernel, tile, device, monkeypatch):
    m, k, warps, stages = tile
    config = triton.Config({"M": m, "K": k}, num_warps=warps, num_stages=stages)
    monkeypatch.setattr(getattr(attention_triton, kernel), "configs", [config])
    for ends in (ON_A_GPU, LONGER_ENDS[1363]):
        tensors = random_inputs(ends, device, torch.bfloat16, head_dim=64)
        try:
            check_against_the_reference(tensors, ends)
        except triton.runtime.errors.OutOfResources as error:
            pytest.skip(f"a tile for larger chips: {error}")


@pytest.mark.gpu
@needs_a_gpu
def test_memory_grows_with_the_tokens_not_with_their_square(device):
    peaks = []
    for factor in (1, 4):
        ends = tuple(factor * end for end in ON_A_GPU)
        tensors = random_inputs(ends, device, torch.bfloat16, head_dim=64, batch=4, heads=12)
        computed(*tensors, ends)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        computed(*tensors, ends)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert 0 < peaks[1] < 4.4 * peaks[0]


@pytest.mark.gpu
@needs_a_gpu
def test_a_graph_of_inductor_gives_the_same_numbers(device):
    torch.compiler.reset()
    layout = layout_of(ON_A_GPU)

    def attend(query, key, value):
        return scale_causal_attention(2 * query, key, value, layout, backend="triton")

    *tensors, upstream = (x.transpose(1, 2) for x in random_inputs(ON_A_GPU, device, torch.bfloat16, head_dim=64))
    results = []
    for function in (attend, torch.compile(attend, fullgraph=True)):
        leaves = [x.detach().requires_grad_() for x in tensors]
        attended = function(*leaves)
        results.append([attended, *torch.autograd.grad(attended, leaves, upstream)])
    for expected, actual in zip(*results):
        assert (actual - expected).float().norm() < 1e-3 * expected.float().norm()


@pytest.mark.gpu
@needs_a_gpu
def test_a_cuda_graph_replays_the_same_bits(device):
    static, fresh = (random_inputs(ON_A_GPU, device, torch.bfloat16, head_dim=64, seed=seed) for seed in (0, 1))
    expected = computed(*fresh, ON_A_GPU)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        computed(*static, ON_A_GPU)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = computed(*static, ON_A_GPU)
    for kept, new in zip(static, fresh):
        kept.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected))
