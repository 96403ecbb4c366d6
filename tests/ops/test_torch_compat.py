"""Tests of `torch_compat`: when `torch.export` is tracing, and whose operators a copy of the code registers."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoModel
from helpers import random_core

from hieratok_hf import AutoencoderHieraTok
from hieratok_hf.hub.remote_code import add_remote_code
from hieratok_hf.ops import onednn_linear as linear
from hieratok_hf.ops import torch_compat
from hieratok_hf.ops.torch_compat import is_exporting


def copy(name):
    spec = importlib.util.spec_from_file_location(name, torch_compat.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_the_package_itself_has_its_name():
    assert copy("hieratok_hf.ops.torch_compat").NAMESPACE == torch_compat.NAMESPACE == "hieratok_hf"
    others = [copy(f"modules.{name}.code").NAMESPACE for name in ("somebody", "others")]
    assert len({*others, "hieratok_hf"}) == 3 and all(name.isidentifier() for name in others)


def test_code_that_comes_with_weights_leaves_the_operators_of_the_package(tmp_path, monkeypatch):
    AutoencoderHieraTok.from_core(random_core()).save_pretrained(tmp_path)
    add_remote_code(tmp_path)
    AutoModel.from_pretrained(str(tmp_path), trust_remote_code=True)
    answer = torch.zeros(2, 3)
    onednn = SimpleNamespace(_linear_pointwise=lambda *args: answer.clone())
    monkeypatch.setattr(linear, "torch", SimpleNamespace(ops=SimpleNamespace(mkldnn=onednn)))
    assert torch.equal(linear._onednn_linear(torch.ones(2, 4), torch.ones(3, 4), None), answer)


class Told(torch.nn.Module):
    """Adds 1 where it is exported, and nothing elsewhere."""

    def forward(self, x):
        return x + int(is_exporting())


@pytest.mark.parametrize("strict", [False, True])
def test_only_an_export_is_one(strict):
    x = torch.zeros(2)
    exported = torch.export.export(Told(), (x,), strict=strict).module()
    torch.compiler.reset()
    compiled = torch.compile(Told(), backend="eager", fullgraph=True)
    assert (is_exporting(), exported(x).tolist(), compiled(x).tolist()) == (False, [1, 1], [0, 0])
