"""Tests of `attention_choice`: the table of what was fastest, what `auto` makes of it, and `auto` without Triton."""

import importlib.util
import itertools
import subprocess
import sys
import types

import pytest
import torch
from helpers import noise
from torch._dynamo.testing import EagerAndRecordGraphs

from hieratok_hf import PyramidLayout, scale_causal_attention
from hieratok_hf.ops import attention
from hieratok_hf.ops.attention import FASTEST, device_kind, fastest_backend
from hieratok_hf.ops.pyramid import flatten_pyramid

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
HERE = device_kind(torch.device("cpu"))
LAYOUT = PyramidLayout.from_grid(7, 5, (4, 2, 1))
MEASURED = {85: "flex", 340: "sdpa_mask", 1360: "triton"}


@pytest.fixture
def fastest(monkeypatch):
    """An empty table, to be filled by the test."""
    table = {}
    monkeypatch.setattr(attention, "FASTEST", table)
    return table


def tokens(num_tokens, dtype=torch.float32, head_dim=8, device="meta"):
    return torch.empty(1, 1, num_tokens, head_dim, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("num_tokens", "backend"),
    [
        (1, "sdpa"),
        (42, "sdpa"),
        (43, "flex"),
        (85, "flex"),
        (169, "flex"),
        (171, "sdpa_mask"),
        (340, "sdpa_mask"),
        (679, "sdpa_mask"),
        (681, "triton"),
        (2720, "triton"),
        (2721, "sdpa"),
    ],
)
def test_a_measured_length_speaks_for_those_within_a_factor_of_two(num_tokens, backend, fastest):
    fastest["meta", "float32", 8, False] = MEASURED
    assert fastest_backend(tokens(num_tokens), needs_gradient=False) == backend


@pytest.mark.parametrize(
    ("query", "needs_gradient"),
    [
        (tokens(85, device="cpu"), False),
        (tokens(85, torch.bfloat16), False),
        (tokens(85, head_dim=16), False),
        (tokens(85), True),
    ],
    ids=["device", "dtype", "head", "gradient"],
)
def test_what_was_measured_elsewhere_says_nothing(query, needs_gradient, fastest):
    fastest["meta", "float32", 8, False] = MEASURED
    assert fastest_backend(query, needs_gradient) == "sdpa"


def test_measurements_are_told_apart_by_the_chip(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    assert [device_kind(torch.device(name)) for name in ("cpu", "cuda", "mps")] == ["cpu SVE256", "cuda 9.0", "mps"]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert device_kind(torch.device("cuda")) == "cuda"


def test_the_table_names_what_exists():
    for (device, dtype, head_dim, needs_gradient), measured in FASTEST.items():
        assert device.split()[0] in ("cpu", "cuda") and isinstance(getattr(torch, dtype), torch.dtype)
        assert head_dim > 0 and isinstance(needs_gradient, bool)
        # "reference" is for tests, and "auto" would ask again.
        assert set(measured.values()) <= {*attention.ATTENTION_BACKENDS} - {"auto", "reference"}
        lengths = sorted(measured)
        assert all(3.9 * short < long for short, long in itertools.pairwise(lengths))


def projected(layout, dtype=torch.float32, head_dim=8):
    return [noise(1, 2, layout.num_tokens, head_dim, seed=seed).to(dtype) for seed in range(3)]


def attend_by_default(*tensors, layout=LAYOUT):
    return scale_causal_attention(*tensors, layout)


def says(fastest, backend, *, needs_gradient=False, dtype="float32", head_dim=8):
    fastest[HERE, dtype, head_dim, needs_gradient] = {LAYOUT.num_tokens: backend}


@pytest.mark.parametrize(
    ("backend", "calls"),
    [
        ("sdpa", ["sdpa"] * 3),
        ("sdpa_mask", ["sdpa_mask"]),
        ("flex", ["flex"]),
        pytest.param(
            "triton",
            ["triton"],
            marks=[needs_triton, pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")],
        ),
    ],
)
def test_auto_takes_what_the_table_says(backend, calls, fastest, reached):
    says(fastest, backend)
    tensors = projected(LAYOUT)
    attended = attend_by_default(*tensors)
    assert reached == calls
    expected = scale_causal_attention(*tensors, LAYOUT, backend="reference")
    torch.testing.assert_close(attended, expected, atol=1e-5, rtol=0)


def test_auto_with_an_empty_table_is_sdpa(fastest, reached):
    attend_by_default(*projected(LAYOUT))
    assert reached == ["sdpa"] * 3


@pytest.mark.parametrize("backend", ["sdpa_mask", "flex", "triton"])
def test_one_scale_is_left_to_sdpa(backend, fastest, reached):
    layout = PyramidLayout.from_grid(7, 5, (1,))
    fastest[HERE, "float32", 8, False] = {35: backend}
    attend_by_default(*projected(layout), layout=layout)
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


def test_auto_is_sdpa_where_flex_has_no_gradient(fastest, reached):
    says(fastest, "flex", needs_gradient=True)
    tensors = [x.requires_grad_() for x in projected(LAYOUT)]
    attend_by_default(*tensors).square().sum().backward()
    assert reached == ["sdpa"] * 3 and all(x.grad.abs().max() > 0 for x in tensors)


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float64, 8), (torch.float32, 136)])
def test_auto_is_sdpa_where_the_kernel_cannot_serve(dtype, head_dim, fastest, reached):
    says(fastest, "triton", dtype=str(dtype).removeprefix("torch."), head_dim=head_dim)
    attend_by_default(*projected(LAYOUT, dtype, head_dim))
    assert reached == ["sdpa"] * 3


@pytest.mark.parametrize(
    ("found", "reason"),
    [(None, "Triton is not installed"), ("3.3.1", "Triton 3.4 or later is needed, 3.3.1 is installed")],
)
def test_auto_is_sdpa_where_triton_is_missing_or_old(found, reason, fastest, reached, monkeypatch):
    says(fastest, "triton")
    for name in ("attention_triton",):
        monkeypatch.delitem(sys.modules, f"hieratok_hf.ops.{name}", raising=False)
    for name in ("triton", "triton.language"):
        monkeypatch.setitem(sys.modules, name, found and types.ModuleType(name))
    if found:
        sys.modules["triton"].__version__ = found
        sys.modules["triton"].language = sys.modules["triton.language"]
    attend_by_default(*projected(LAYOUT))
    assert reached == ["sdpa"] * 3
    with pytest.raises(ValueError) as refusal:
        scale_causal_attention(*projected(LAYOUT), LAYOUT, backend="triton")
    assert str(refusal.value) == f"`backend='triton'` cannot serve here: {reason}."


@pytest.mark.parametrize(("backend", "calls"), [("sdpa", 2), ("sdpa_mask", 1)])
def test_auto_chooses_inside_a_compiled_graph(backend, calls, fastest):
    says(fastest, backend, needs_gradient=True)
    torch.compiler.reset()
    recorder = EagerAndRecordGraphs()
    tensors = [x.requires_grad_() for x in projected(LAYOUT)]
    attended = torch.compile(attend_by_default, backend=recorder, fullgraph=True)(*tensors)
    torch.testing.assert_close(attended, attend_by_default(*tensors))
    (graph,) = recorder.graphs
    made = [node for node in graph.graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    assert len(made) == calls
    # Of the coarse scales alone, or of all.
    masked = [node.kwargs["attn_mask"] is not None for node in made]
    assert masked == ([True, False] if backend == "sdpa" else [True])


class AttendMaps(torch.nn.Module):
    def forward(self, query, key, value):
        layout = PyramidLayout.from_grid(*query.shape[2:], (2, 1))
        tokens = (flatten_pyramid(x, layout).unflatten(2, (2, 8)).transpose(1, 2) for x in (query, key, value))
        return attend_by_default(*tokens, layout=layout)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_graph_serves_every_size_whatever_the_table_says(strict, fastest):
    fastest[HERE, "float32", 8, False] = {60: "sdpa", 240: "sdpa_mask"}
    any_size = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    maps = [noise(1, 16, 6, 8, seed=seed) for seed in range(3)]
    exported = torch.export.export(AttendMaps(), tuple(maps), dynamic_shapes=[any_size] * 3, strict=strict).module()
    for size in ((6, 8), (12, 16), (30, 20)):
        maps = [noise(1, 16, *size, seed=seed) for seed in range(3)]
        torch.testing.assert_close(exported(*maps), AttendMaps()(*maps), atol=1e-5, rtol=0)


MODEL = """
import sys
import torch
import hieratok_hf
from hieratok_hf import HieraTokModel, PyramidLayout, scale_causal_attention

model = HieraTokModel.from_size("hieratok-tiny", encoder_num_layers=1, decoder_num_layers=1)
pixel_values = torch.rand(1, 3, 64, 64)
model(pixel_values).loss.backward()
with torch.no_grad():
    model.decode(model.encode(pixel_values).latents)
kernels = {"attention_triton", "rotary_triton"}
assert not kernels & {name.removeprefix("hieratok_hf.") for name in sys.modules}
"""
WITHOUT_TRITON = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refusing())
"""
REFUSED = """
layout = PyramidLayout.from_grid(4, 4, (2, 1))
tensors = [torch.randn(1, 2, 20, 8) for _ in range(3)]
by_sdpa = scale_causal_attention(*tensors, layout, backend="sdpa")
assert torch.equal(scale_causal_attention(*tensors, layout), by_sdpa)
try:
    scale_causal_attention(*tensors, layout, backend="triton")
except ValueError as error:
    print(error)
"""


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip()


@needs_triton
def test_a_model_never_imports_the_kernels_by_itself():
    run(MODEL)


def test_without_triton_all_but_its_backend_works():
    assert run(WITHOUT_TRITON + MODEL + REFUSED) == "`backend='triton'` cannot serve here: Triton is not installed."
