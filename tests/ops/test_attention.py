"""Tests of `attention`: the mask in words, every backend against the reference, and what `auto` makes of its table."""

import importlib.util
import subprocess
import sys
import types

import pytest
import torch
from helpers import AttendMaps, noise
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs

from hieratok_hf import PyramidLayout, scale_causal_attention
from hieratok_hf.ops import attention
from hieratok_hf.ops.attention import device_kind, fastest_backend, scale_causal_mask

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton"),  # NaN in the interpreter
]


SEVERAL_SCALES = [PyramidLayout.from_grid(7, 5, (8, 4, 2, 1)), PyramidLayout.from_grid(1, 3, (4, 2, 1))]
LAYOUTS = [*SEVERAL_SCALES, PyramidLayout.from_grid(5, 5, (1,))]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
TRITON = pytest.param("triton", marks=needs_triton)
BACKENDS = ["sdpa", "sdpa_mask", "flex", TRITON, "auto"]
WITH_GRADIENTS = ["sdpa", "sdpa_mask", "triton", "auto"]  # on a CPU `flex` goes forward only


def finest_grid(layout):
    return "x".join(map(str, layout.grids[-1]))


def projected(layout, dtype=torch.float32, batch=1, heads=2, head_dim=8, device="cpu"):
    return [noise(batch, heads, layout.num_tokens, head_dim, seed=seed).to(device, dtype) for seed in range(3)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=finest_grid)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_the_weighted_mean_of_its_own_and_every_coarser_scale(layout, dtype):
    query, key, value = projected(layout, dtype)
    attended, weights = scale_causal_attention(query, key, value, layout, scale=0.7, return_weights=True)
    assert torch.equal(attended, scale_causal_attention(query, key, value, layout, scale=0.7, backend="reference"))
    assert attended.dtype == dtype and weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, layout.num_tokens))
    scales = [scale for scale, (height, width) in enumerate(layout.grids) for _ in range(height * width)]
    visible = [[key_scale <= query_scale for key_scale in scales] for query_scale in scales]
    assert scale_causal_mask(layout).tolist() == visible
    assert ((weights > 0) == torch.tensor(visible)).all()
    query, key, value = (x.float() for x in (query, key, value))
    for i, seen in enumerate(visible):
        exponentials = torch.stack([(0.7 * query[0, 1, i] @ row).exp() for row in key[0, 1, seen]])
        expected = (exponentials[:, None] * value[0, 1, seen]).sum(0) / exponentials.sum()
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(attended[0, 1, i].float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS, ids=finest_grid)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients_equal_those_of_the_reference(layout, backend, device_of):
    device, scale = device_of(backend), 0.9 if layout.num_scales == 3 else None
    upstream = noise(1, 2, layout.num_tokens, 8, seed=9).to(device)
    results = {}
    for name, given in (("reference", 8**-0.5 if scale is None else scale), (backend, scale)):
        leaves = [x.requires_grad_(backend in WITH_GRADIENTS) for x in projected(layout, device=device)]
        attended = scale_causal_attention(*leaves, layout, backend=name, scale=given)
        gradients = torch.autograd.grad(attended, leaves, upstream) if backend in WITH_GRADIENTS else ()
        results[name] = [attended, *gradients]
    for actual, expected in zip(results[backend], results["reference"], strict=True):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_low_precision_stays_close_to_float32(dtype, tolerance, backend, device_of):
    layout = PyramidLayout.from_grid(7, 5, (4, 2, 1))
    tensors = projected(layout, dtype, device=device_of(backend))
    expected = scale_causal_attention(*(x.float() for x in tensors), layout, backend="reference")
    actual = scale_causal_attention(*tensors, layout, backend=backend)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("layout", SEVERAL_SCALES, ids=finest_grid)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_finer_tokens_leave_coarser_results_bit_identical(layout, backend, device_of):
    tensors = projected(layout, heads=1, device=device_of(backend))
    before = scale_causal_attention(*tensors, layout, backend=backend)
    for end in layout.ends[:-1]:
        changed = [x.clone() for x in tensors]
        for i, x in enumerate(changed):
            x[:, :, end:] = 5 * noise(*x[:, :, end:].shape, seed=20 + i)
            if backend in ("sdpa", "triton"):  # a mask takes a token's weight, but not its NaN
                x[:, :, end:] = float("nan")
        after = scale_causal_attention(*changed, layout, backend=backend)
        assert torch.equal(after[:, :, :end], before[:, :, :end])
        assert not torch.isclose(after[:, :, end:], before[:, :, end:]).any()


@pytest.mark.parametrize("layout", LAYOUTS, ids=finest_grid)
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
    monkeypatch.setattr(attention, "scale_causal_mask", forbidden)
    scale_causal_attention(*projected(layout), layout, backend=backend)
    assert [call[:3] for call in calls] == [(n, end, end) for n, end in zip(layout.lengths, layout.ends)]
    for *_, args, kwargs in calls:
        assert args == () and kwargs.get("attn_mask") is None and not kwargs.get("is_causal", False)


HERE = device_kind(torch.device("cpu"))
LAYOUT = PyramidLayout.from_grid(7, 5, (4, 2, 1))


@pytest.fixture
def fastest(monkeypatch):
    """An empty table, to be filled by the test."""
    table = {}
    monkeypatch.setattr(attention, "FASTEST", table)
    return table


def attend_by_default(*tensors, layout=LAYOUT):
    return scale_causal_attention(*tensors, layout)


def says(fastest, backend, *, needs_gradient=False, dtype="float32", head_dim=8):
    fastest[HERE, dtype, head_dim, needs_gradient] = {LAYOUT.num_tokens: backend}


@pytest.mark.parametrize(
    ("num_tokens", "different", "backend"),
    [
        *((num_tokens, {}, "sdpa") for num_tokens in (1, 42, 2721)),
        *((num_tokens, {}, "flex") for num_tokens in (43, 169)),
        *((num_tokens, {}, "sdpa_mask") for num_tokens in (171, 679)),
        *((num_tokens, {}, "triton") for num_tokens in (681, 2720)),
        # What was measured elsewhere says nothing.
        (85, {"device": "cpu"}, "sdpa"),
        (85, {"dtype": torch.bfloat16}, "sdpa"),
        (85, {"head_dim": 16}, "sdpa"),
        (85, {"needs_gradient": True}, "sdpa"),
    ],
)
def test_a_measured_length_speaks_for_those_within_a_factor_of_two(num_tokens, different, backend, fastest):
    fastest["meta", "float32", 8, False] = {85: "flex", 340: "sdpa_mask", 1360: "triton"}
    asked = {"device": "meta", "dtype": torch.float32, "head_dim": 8, "needs_gradient": False, **different}
    query = torch.empty(1, 1, num_tokens, asked["head_dim"], dtype=asked["dtype"], device=asked["device"])
    assert fastest_backend(query, asked["needs_gradient"]) == backend


def test_measurements_are_told_apart_by_the_chip(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    assert [device_kind(torch.device(name)) for name in ("cpu", "cuda", "mps")] == ["cpu SVE256", "cuda 9.0", "mps"]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert device_kind(torch.device("cuda")) == "cuda"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("backend", ["sdpa", "sdpa_mask", "flex", TRITON])
def test_auto_takes_what_the_table_says_and_sdpa_for_one_scale(backend, fastest, reached):
    attend_by_default(*projected(LAYOUT))
    assert reached == ["sdpa"] * 3  # the table is empty
    reached.clear()
    says(fastest, backend)
    attend_by_default(*projected(LAYOUT))
    assert reached == ["sdpa"] * 3 if backend == "sdpa" else [backend]
    reached.clear()
    one_scale = PyramidLayout(((1, LAYOUT.num_tokens),), (1,))
    attend_by_default(*projected(one_scale), layout=one_scale)
    assert reached == ["sdpa"]


def test_what_autocast_makes_of_the_projections_is_looked_up(fastest, reached):
    says(fastest, "sdpa_mask", dtype="bfloat16")
    attend_by_default(*projected(LAYOUT))
    assert set(reached) == {"sdpa"}
    reached.clear()
    with torch.autocast("cpu", torch.bfloat16):
        attend_by_default(*projected(LAYOUT))
    assert reached == ["sdpa_mask"]


@pytest.mark.parametrize("which", range(3), ids=["query", "key", "value"])
def test_gradients_are_needed_where_one_input_asks_and_none_are_switched_off(which, fastest, reached):
    says(fastest, "sdpa_mask", needs_gradient=True)
    tensors = projected(LAYOUT)
    attend_by_default(*tensors)
    assert reached == ["sdpa"] * 3
    reached.clear()
    tensors[which].requires_grad_()
    attend_by_default(*tensors).sum().backward()
    assert reached == ["sdpa_mask"] and tensors[which].grad.abs().max() > 0
    for switch in (torch.no_grad, torch.inference_mode):
        reached.clear()
        with switch():
            attend_by_default(*tensors)
        assert reached == ["sdpa"] * 3


@pytest.mark.parametrize(
    ("backend", "dtype", "head_dim", "needs_gradient"),
    [("flex", torch.float32, 8, True), ("triton", torch.float64, 8, False), ("triton", torch.float32, 136, False)],
)
def test_auto_is_sdpa_where_the_fastest_cannot_serve(backend, dtype, head_dim, needs_gradient, fastest, reached):
    says(fastest, backend, needs_gradient=needs_gradient, dtype=str(dtype).removeprefix("torch."), head_dim=head_dim)
    attend_by_default(*(x.requires_grad_(needs_gradient) for x in projected(LAYOUT, dtype, head_dim=head_dim)))
    assert reached == ["sdpa"] * 3


@pytest.mark.parametrize(
    ("found", "reason"),
    [(None, "Triton is not installed"), ("3.3.1", "Triton 3.4 or later is needed, 3.3.1 is installed")],
)
def test_auto_is_sdpa_where_triton_is_missing_or_old(found, reason, fastest, reached, monkeypatch):
    says(fastest, "triton")
    monkeypatch.delitem(sys.modules, "hieratok_hf.ops.attention_triton", raising=False)
    for name in ("triton", "triton.language"):
        monkeypatch.setitem(sys.modules, name, found and types.ModuleType(name))
    if found:
        sys.modules["triton"].__version__ = found
        sys.modules["triton"].language = sys.modules["triton.language"]
    attend_by_default(*projected(LAYOUT))
    assert reached == ["sdpa"] * 3
    with pytest.raises(ValueError, match=f"backend='triton'.*{reason}"):
        scale_causal_attention(*projected(LAYOUT), LAYOUT, backend="triton")


@pytest.mark.parametrize(("backend", "masked"), [("sdpa", [True, False]), ("sdpa_mask", [True])])
def test_auto_chooses_inside_a_compiled_graph(backend, masked, fastest):
    says(fastest, backend, needs_gradient=True)
    torch.compiler.reset()
    recorder = EagerAndRecordGraphs()
    tensors = [x.requires_grad_() for x in projected(LAYOUT)]
    attended = torch.compile(attend_by_default, backend=recorder, fullgraph=True)(*tensors)
    torch.testing.assert_close(attended, attend_by_default(*tensors))
    (graph,) = recorder.graphs
    made = [node for node in graph.graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    # With a mask of the coarse scales alone, or of all.
    assert [node.kwargs["attn_mask"] is not None for node in made] == masked


@pytest.mark.parametrize(
    ("backend", "num_graphs"),
    # A block mask is of one size, also where shapes are symbols.
    [pytest.param("triton", 1, marks=needs_triton), ("flex", 2)],
)
def test_a_compiled_graph_gives_the_same_bits_at_any_size(backend, num_graphs, device_of):
    torch.compiler.reset()
    device, counter = device_of(backend), CompileCounterWithBackend("aot_eager")
    attend_maps, needs_gradient = AttendMaps(backend), backend in WITH_GRADIENTS
    compiled = torch.compile(attend_maps, backend=counter, fullgraph=True, dynamic=True)
    for size in ((6, 8), (4, 6), (6, 8)):
        maps = [noise(1, 16, *size, seed=seed).to(device).requires_grad_(needs_gradient) for seed in range(3)]
        results = []
        for function in (compiled, attend_maps):
            attended = function(*maps)
            gradients = torch.autograd.grad(attended.square().sum(), maps) if needs_gradient else ()
            results.append([attended, *gradients])
        assert all(torch.equal(actual, expected) for actual, expected in zip(*results, strict=True))
    assert counter.frame_count == num_graphs


@pytest.mark.parametrize(
    ("backend", "strict"), [("auto", False), ("auto", True), pytest.param("triton", False, marks=needs_triton)]
)
def test_an_exported_graph_serves_every_size_whatever_the_table_says(backend, strict, fastest, device_of):
    fastest[HERE, "float32", 8, False] = {60: "sdpa", 240: "sdpa_mask"}
    device, attend_maps = device_of(backend), AttendMaps(backend)
    any_size = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    maps = tuple(noise(1, 16, 6, 8, seed=seed).to(device) for seed in range(3))
    exported = torch.export.export(attend_maps, maps, dynamic_shapes=[any_size] * 3, strict=strict).module()
    for size in ((6, 8), (12, 16)):
        maps = [noise(1, 16, *size, seed=seed).to(device) for seed in range(3)]
        torch.testing.assert_close(exported(*maps), attend_maps(*maps), atol=1e-5, rtol=0)


WITHOUT_TRITON = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refusing())
"""
MODEL = """
import sys
import torch
from hieratok_hf import HieraTokModel

model = HieraTokModel.from_size("hieratok-tiny", encoder_num_layers=1, decoder_num_layers=1)
pixel_values = torch.rand(1, 3, 64, 64)
model(pixel_values).loss.backward()
with torch.no_grad():
    model.decode(model.encode(pixel_values).latents)
assert not [name for name in sys.modules if name.startswith("hieratok_hf") and name.endswith("_triton")]
"""


@pytest.mark.parametrize("before", [pytest.param("", marks=needs_triton), WITHOUT_TRITON], ids=["with", "without"])
def test_a_model_needs_no_triton_and_never_imports_the_kernels_by_itself(before):
    result = subprocess.run([sys.executable, "-c", before + MODEL], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
