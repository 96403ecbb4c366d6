import pytest
import torch

from hieratok_hf.ops.exporting import is_exporting


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
