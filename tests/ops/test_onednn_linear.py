"""Linear layers: oneDNN and PyTorch's own choice give the same, and it is asked only where it may."""

import pytest
import torch
from helpers import images, noise, random_core
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from hieratok_hf import AutoencoderHieraTok
from hieratok_hf.ops.onednn_linear import HieraTokLinear, prefers_onednn

available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
pytestmark = pytest.mark.skipif(not available, reason="needs a build of torch with oneDNN")


@pytest.fixture
def calls(monkeypatch):
    """How often oneDNN was asked, on a machine that prefers it."""
    made = []
    plain = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr("hieratok_hf.ops.onednn_linear.PREFERS_ONEDNN", True)
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda *args: made.append(args[0].shape) or plain(*args), raising=False
    )
    return made


@pytest.mark.parametrize("shape", [(2, 85, 24), (24,), (0, 24), (2, 3, 5, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_linear_layer_of_pytorch(calls, shape, bias):
    torch.manual_seed(0)
    layer = HieraTokLinear(24, 40, bias=bias)
    strided = noise(*shape[:-1], 2 * shape[-1])[..., ::2]
    with torch.no_grad():
        for x in (noise(*shape), strided, noise(*shape[::-1]).permute(*range(len(shape))[::-1])):
            expected = nn.functional.linear(x, layer.weight, layer.bias)
            torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == 3


def test_gradients_go_through_pytorch_s_own(calls):
    layer, x = HieraTokLinear(8, 8), noise(2, 8).requires_grad_()
    layer(x).sum().backward()
    assert not calls and layer.weight.grad is not None and x.grad is not None
    layer.requires_grad_(False)
    layer(x.detach())
    assert len(calls) == 1
    layer(x).sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("case", ["half", "autocast", "meta", "exported", "traced", "disabled", "other machine"])
def test_other_cases_are_left_to_pytorch(calls, case, monkeypatch):
    layer, x = HieraTokLinear(8, 8), noise(2, 8)
    with torch.no_grad():
        if case == "half":
            layer.bfloat16()(x.bfloat16())
        elif case == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(x).dtype == torch.bfloat16
        elif case == "meta":
            layer.to("meta")(x.to("meta"))
        elif case == "exported":
            assert "linear.default" in str(torch.export.export(layer, (x,)).graph)
        elif case == "traced":
            torch.vmap(layer)(torch.jit.trace(make_fx(layer)(x), x)(x))
        elif case == "disabled":
            with torch.backends.mkldnn.flags(enabled=False):
                layer(x)
        else:
            monkeypatch.setattr("hieratok_hf.ops.onednn_linear.PREFERS_ONEDNN", False)
            layer(x)
    assert not calls


def test_compiled_layers_ask_it_too(calls):
    layer = HieraTokLinear(24, 40)
    run = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        run(noise(2, 3, 24)), run(noise(2, 5, 24))
    assert len(calls) == 2
    run(noise(2, 3, 24)).sum().backward()
    assert len(calls) == 2 and layer.weight.grad is not None


def test_the_compiler_gives_the_same_for_every_size(monkeypatch):
    monkeypatch.setattr("hieratok_hf.ops.onednn_linear.PREFERS_ONEDNN", True)
    layer = HieraTokLinear(24, 40)
    run = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for x in (noise(2, 3, 24), noise(2, 5, 24)):
            expected = nn.functional.linear(x, layer.weight, layer.bias)
            torch.testing.assert_close(run(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_whole_model_gives_the_same_images(calls, fused, monkeypatch):
    vae, sample = AutoencoderHieraTok.from_core(random_core()).eval(), images(2, 3, 28, 20)
    if fused:
        vae.fuse_qkv_projections()
    with torch.no_grad():
        ours = vae(sample).sample
        # The heads of the latent and of the patches and the embedding, and in each of 4 blocks 4 or 2 and 2 more.
        assert len(calls) == 3 + 4 * (4 if fused else 6)
        monkeypatch.setattr("hieratok_hf.ops.onednn_linear.PREFERS_ONEDNN", False)
        torch.testing.assert_close(ours, vae(sample).sample, atol=1e-5, rtol=1e-5)


def test_its_operations_are_counted(monkeypatch):
    monkeypatch.setattr("hieratok_hf.ops.onednn_linear.PREFERS_ONEDNN", True)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        HieraTokLinear(24, 40)(noise(2, 85, 24))
    assert counter.get_total_flops() == 2 * 2 * 85 * 24 * 40


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_forward_mode_derivatives_are_those_of_a_linear_map(calls, compiled, frozen):
    layer, x, tangent = HieraTokLinear(8, 8).requires_grad_(not frozen), noise(3, 8), noise(3, 8, seed=1)
    torch.compiler.reset()
    function = torch.compile(layer, backend="aot_eager") if compiled else layer
    with torch.no_grad():
        function(x)
        expected = nn.functional.linear(tangent, layer.weight)
        torch.testing.assert_close(torch.func.jvp(function, (x,), (tangent,))[1], expected)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent)))
            torch.testing.assert_close(dual.tangent, expected)
        of_bias = torch.func.jvp(
            lambda bias: torch.func.functional_call(layer, {"bias": bias}, (x,)), (layer.bias,), (layer.bias,)
        )
        torch.testing.assert_close(of_bias[1], layer.bias.expand(3, 8))
        torch.testing.assert_close(torch.func.jacfwd(layer)(x[0]), layer.weight)
    assert len(calls) == 1


@pytest.mark.parametrize(("vendor", "expected"), [("AuthenticAMD", True), ("GenuineIntel", False), ("", False)])
def test_the_choice_is_the_vendor_s(vendor, expected, monkeypatch):
    monkeypatch.setattr("hieratok_hf.ops.onednn_linear.processor_field", {"vendor_id": vendor}.get)
    assert prefers_onednn() == (expected and torch.backends.mkl.is_available())
