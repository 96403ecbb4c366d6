"""Tests of `attention_triton`: numbers and gradients, what is read and written, and what an operator promises."""

import math
import types

import pytest
import torch
from helpers import empty_memory_is_nan, noise

from hieratok_hf import PyramidLayout, scale_causal_attention
from hieratok_hf.ops.attention import reference_attention

pytest.importorskip("triton", minversion="3.4", reason="needs Triton 3.4")
import triton
import triton.language as tl

from hieratok_hf.ops import attention_triton
from hieratok_hf.ops.attention_triton import _locate, prefix_attention, prefix_attention_backward, why_not_triton

# The interpreter is loud about NaN, and about rows beyond a scale, which are computed but not written.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NAN = float("nan")
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
ENDS = (1, 5, 21, 85)
TEN_SCALES = (3, 4, 9, 20, 21, 33, 36, 50, 64, 67)
AWKWARD_GRID = PyramidLayout.from_grid(9, 7, (6, 5, 3, 2, 1)).ends


@pytest.fixture
def device(device_of):
    return device_of("triton")


def on_a_gpu(*values):
    return pytest.param(*values, marks=[pytest.mark.gpu, needs_a_gpu])


def random_inputs(ends, device, dtype=torch.float32, head_dim=16, batch=1, heads=2, seed=0):
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


@pytest.mark.parametrize(
    ("ends", "head_dim", "dtype"),
    [
        ((1,), 64, torch.float32),
        ((1,), 8, torch.bfloat16),
        ((1, 5), 1, torch.float32),
        ((1, 5, 21), 128, torch.float32),
        ((1, 5, 21), 96, torch.bfloat16),
        (ENDS, 64, torch.float32),
        (ENDS, 40, torch.bfloat16),
        (ENDS, 127, torch.float16),
        (TEN_SCALES, 16, torch.float32),
        (AWKWARD_GRID, 8, torch.float32),
    ],
    ids=lambda value: str(value).removeprefix("torch.").replace(" ", ""),
)
def test_outputs_and_gradients_equal_the_reference(ends, head_dim, dtype, device):
    tensors = random_inputs(ends, device, dtype, head_dim, batch=2, heads=1, seed=len(ends))
    check_against_the_reference(tensors, ends, scale=head_dim**-0.5)


WHOLE_AND_RAGGED = [(16, 80), (3, 20, 70)]
LARGER = [(16, 80, 336, 1360), (1, 7, 25, 91, 352, 1363)]
KERNELS = {
    "_attend": attention_triton.ATTENTION_TILES,
    "_query_gradient": attention_triton.QUERY_GRADIENT_TILES,
    "_key_gradient": attention_triton.KEY_GRADIENT_TILES,
}


@pytest.mark.parametrize(
    ("kernels", "tile", "layouts", "dtype", "head_dim"),
    [
        *((KERNELS, tile, WHOLE_AND_RAGGED, torch.float32, 16) for tile in ((16, 64, 4, 1), (64, 16, 4, 1))),
        *(on_a_gpu([name], tile, LARGER, torch.bfloat16, 64) for name, tiles in KERNELS.items() for tile in tiles),
    ],
)
def test_any_tile_equals_the_reference(kernels, tile, layouts, dtype, head_dim, device, monkeypatch):
    m, k, warps, stages = tile
    config = triton.Config({"M": m, "K": k}, num_warps=warps, num_stages=stages)
    for name in kernels:
        monkeypatch.setattr(getattr(attention_triton, name), "configs", [config])
    for ends in layouts:
        try:
            check_against_the_reference(random_inputs(ends, device, dtype, head_dim), ends)
        except triton.runtime.errors.OutOfResources as error:
            pytest.skip(f"a tile for larger chips: {error}")


def test_scores_far_beyond_the_range_of_the_exponential_equal_the_reference(device):
    query, key, value, upstream = random_inputs(ENDS[:3], device, head_dim=32)
    # An exponent so large has fewer digits behind the point.
    results = check_against_the_reference([10 * query, key, value, upstream], ENDS[:3], scale=1.0, tolerance=1e-4)
    assert all(x.isfinite().all() for x in results)


def test_the_second_result_is_the_base_2_logarithm_under_the_softmax(device):
    query, key, value, _ = random_inputs(ENDS, device, torch.bfloat16)
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


@pytest.mark.parametrize(("ends", "head_dim"), [(ENDS, 40), ((32, 64), 16)], ids=["ragged", "whole"])
def test_nothing_beside_the_inputs_is_read_and_every_element_is_written(ends, head_dim, device):
    tensors = random_inputs(ends, device, head_dim=head_dim, heads=1)
    expected = [prefix_attention(*tensors[:3], ends, 0.2)[1], *computed(*tensors, ends)]
    tensors = list(map(amid_nan, tensors))
    with empty_memory_is_nan():
        results = [prefix_attention(*tensors[:3], ends, 0.2)[1], *computed(*tensors, ends)]
    for actual, same in zip(results, expected):
        assert torch.equal(actual, same)


def test_finer_queries_and_coarser_keys_that_are_nan_leave_no_trace_beyond_their_own(device):
    ends, cut = (1, 5, 37), 5
    tensors = random_inputs(ends, device, torch.bfloat16, heads=1)
    before = computed(*tensors, ends)
    finer, coarser = ([x.clone() for x in tensors] for _ in range(2))
    for x in finer:
        x[:, cut:] = NAN
    for actual, expected in zip(computed(*finer, ends)[:2], before[:2]):  # outputs and gradients of queries
        assert torch.equal(actual[:, :cut], expected[:, :cut])
        assert actual[:, cut:].isnan().all()
    for x in (coarser[0], coarser[3]):  # queries and upstream gradients
        x[:, :cut] = NAN
    for actual, expected in zip(computed(*coarser, ends)[2:], before[2:]):  # gradients of keys and values
        assert torch.equal(actual[:, cut:], expected[:, cut:])
        assert actual[:, :cut].isnan().all()


def every_second_channel(x):
    return torch.stack([x, x + 1], dim=-1).flatten(-2)[..., ::2]


def heads_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def batch_last(x):
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def one_head(x):
    return x[:1, :, :1].expand_as(x)


def one_number(x):
    return x[0, 0, 0, 0].expand_as(x)


@pytest.mark.parametrize(
    "arrangements",
    [(every_second_channel, heads_first, batch_last, one_number), (heads_first, one_head, one_number, batch_last)],
    ids=["first", "last"],
)
def test_strides_change_no_bit(arrangements, device):
    ends = (9, 43)  # more than a tile
    arranged = [arrange(x) for arrange, x in zip(arrangements, random_inputs(ends, device, batch=2))]
    compact = [x.contiguous() for x in arranged]
    assert len({x.stride() for x in (*arranged, compact[0])}) == 5
    for actual, expected in zip(computed(*arranged, ends), computed(*compact, ends)):
        assert torch.equal(actual, expected) and actual.is_contiguous()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
def test_the_order_of_programs_changes_no_bit(monkeypatch):
    tensors = random_inputs(ENDS[:3], "cpu")
    expected = computed(*tensors, ENDS[:3])
    interpreter = triton.runtime.interpreter.interpreter_builder
    in_order, launched = interpreter.set_grid_idx, []

    def backwards(x, y, z):
        launched.append(interpreter.grid_dim[0])
        in_order(interpreter.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(interpreter, "set_grid_idx", backwards)
    assert all(torch.equal(a, b) for a, b in zip(computed(*tensors, ENDS[:3]), expected))
    assert launched and min(launched) > 1


def test_an_empty_batch_gives_empty_results(device):
    tensors = random_inputs(ENDS, device, batch=0)
    assert [x.shape for x in computed(*tensors, ENDS)] == [(0, 85, 2, 16)] * 4
    assert prefix_attention(*tensors[:3], ENDS, 0.2)[1].shape == (0, 2, 85)


def test_only_what_needs_a_gradient_gets_one_and_that_has_no_second_derivative(device):
    ends = (1, 5)
    query, key, value, upstream = random_inputs(ends, device)
    expected = computed(query, key, value, upstream, ends)[3]
    output, log_sum = prefix_attention(query, key, value.requires_grad_(), ends, 0.2)
    assert output.requires_grad and not log_sum.requires_grad
    (gradient,) = torch.autograd.grad((output * upstream).sum(), value, create_graph=True)
    assert torch.equal(gradient, expected)
    with pytest.raises(RuntimeError, match=r"prefix_attention_backward.* no autograd formula was registered"):
        gradient.sum().backward()


def test_operators_keep_what_they_promise_to_pytorch(device):
    ends = (1, 5)
    query, key, value, upstream = map(every_second_channel, random_inputs(ends, device, torch.float16, head_dim=8))
    saved = prefix_attention(query, key, value, ends, 0.2)
    torch.library.opcheck(prefix_attention_backward, (upstream, query, key, value, *saved, ends, 0.2))
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    torch.library.opcheck(prefix_attention, (*leaves, ends, 0.2))


@pytest.mark.parametrize(
    ("different", "reason"),
    [
        *(({"dtype": dtype, "channels": channels}, None) for dtype, channels in zip(TOLERANCES, (1, 64, 128))),
        ({"dtype": torch.float64}, "float16, bfloat16 and float32, not torch.float64"),
        ({"channels": 129}, "at most 128 channels, not 129"),
        ({"scale": 0.0}, "positive `scale`, not 0.0"),
        ({"scale": NAN}, "positive `scale`, not nan"),
        ({"device": "cpu"}, "the kernel runs on a CUDA device, not on 'cpu'"),
        ({"capability": (7, 5)}, "the kernel needs CUDA compute capability 8.0 or higher, not 7.5"),
        ({"capability": (7, 5), "hip": "6.4"}, None),
    ],
)
def test_what_the_kernel_does_not_take_is_named(different, reason, monkeypatch):
    asked = {"dtype": torch.bfloat16, "channels": 64, "scale": 0.1, "device": "cuda", "capability": (8, 0)}
    asked |= different
    monkeypatch.setattr(attention_triton, "INTERPRETED", tl.constexpr(False))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked["capability"])
    monkeypatch.setattr(torch.version, "hip", asked.get("hip"))
    shape = (1, 1, 4, asked["channels"])
    query = types.SimpleNamespace(dtype=asked["dtype"], shape=shape, device=torch.device(asked["device"]))
    found = why_not_triton(query, asked["scale"])
    assert found is None if reason is None else reason in found


@triton.jit
def scale_ends_kernel(scale_ends, ends, BLOCK: tl.constexpr, FINEST_FIRST: tl.constexpr):
    """Where the scale ends that each program is of, `(programs,)`."""
    _, _, _, end = _locate(tl.program_id(0), ends, BLOCK, FINEST_FIRST)
    tl.store(scale_ends + tl.program_id(0), end)


@pytest.mark.parametrize("finest_first", [False, True])
def test_the_programs_with_most_work_start_first(finest_first, device):
    query = torch.zeros(1, ENDS[-1], 2, 16, device=device)
    programs = attention_triton._programs(query, ENDS, "M")({"M": 16})
    found = torch.zeros(programs, dtype=torch.int32, device=device)
    told = attention_triton._arguments(query, ENDS, 1.0)["ends"]
    scale_ends_kernel[programs](found, told, BLOCK=16, FINEST_FIRST=finest_first)
    # A query of a finer scale sees more keys; a key of a coarser scale is seen by more queries.
    expected = sorted([1, 5, 21, *[85] * 4], reverse=finest_first)
    assert found.view(2, -1).tolist() == [expected] * 2


ON_A_GPU = LARGER[0]


@pytest.mark.gpu
@needs_a_gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
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
