"""Compute linear layers in float32 on a CPU by oneDNN, where PyTorch's own choice is slow at them."""

import torch
from torch import Tensor, nn

from .processor import processor_field
from .torch_compat import NAMESPACE, has_tangents, is_exporting, is_watched

__all__ = ["HieraTokLinear", "prefers_onednn"]


def prefers_onednn() -> bool:
    """
    Tell whether oneDNN multiplies float32 matrices faster here than what `torch.nn.Linear` calls.

    PyTorch leaves such products to MKL, which keeps its fastest code for Intel's processors; convolutions, which
    other autoencoders are made of, it leaves to oneDNN, which goes by the instructions that there are.
    """
    is_amd = processor_field("vendor_id") == "AuthenticAMD"
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return is_amd and has_both and hasattr(torch.ops.mkldnn, "_linear_pointwise")


# The operator is private, see CONTRIBUTING.md.
@torch.library.custom_op(f"{NAMESPACE}::onednn_linear", mutates_args=())
def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@_onednn_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# The compiler reads a constant, and would look through a cached function at `/proc` itself.
PREFERS_ONEDNN = prefers_onednn()


class HieraTokLinear(nn.Linear):
    """Compute what `torch.nn.Linear` does; without gradients, float32 on a CPU goes to oneDNN where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `(..., in_features)` to `(..., out_features)`."""
        if not self._is_for_onednn(x):
            return super().forward(x)
        if torch.compiler.is_compiling():  # the compiler takes oneDNN's own operator with frozen weights alone
            return _onednn_linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def _is_for_onednn(self, x: Tensor) -> bool:
        # What is exported runs elsewhere, and quantised weights have their own products.
        if is_exporting() or type(self.weight) is not nn.Parameter or type(x) is not Tensor:
            return False
        # Its operator drops tangents, and has no rules for tracers and `torch.func`.
        if has_tangents() or (is_watched() and not torch.compiler.is_compiling()):
            return False
        if not x.device.type == self.weight.device.type == "cpu" or not x.dtype == self.weight.dtype == torch.float32:
            return False
        needs_gradient = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if needs_gradient or torch.is_autocast_enabled("cpu"):
            return False
        return bool(torch.backends.mkldnn.enabled) and PREFERS_ONEDNN
