"""Compute the layers of both sides, a superset of l-DeTok's (arXiv 2507.15856), of rotary positions and SwiGLU."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from ..ops.attention import ATTENTION_BACKENDS, REGISTERED_BACKENDS, scale_causal_attention, why_not
from ..ops.onednn_linear import HieraTokLinear
from ..ops.pyramid import PyramidLayout, keep_by_size
from .attention_dispatch import backend_of, preferring
from .configuration_hieratok import HieraTokConfig

__all__ = [
    "HieraTokAttention",
    "HieraTokAttnProcessor",
    "HieraTokBlock",
    "HieraTokBlockEmbed",
    "HieraTokDecoderBlock",
    "HieraTokEncoderBlock",
    "HieraTokPositions",
    "HieraTokSwiGLU",
    "apply_rotary",
    "init_weights",
    "rotary_tables",
]

# Shape letters: B batch, N tokens, D hidden size, A heads, d channels of a head, h w finest grid.


def rotary_tables(
    config: HieraTokConfig, layout: PyramidLayout, grid: tuple[int, int], head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """
    Compute the cosines and sines of the rotary angle of every token and channel (Su et al., arXiv 2104.09864).

    A token sits at the mean of the finest cells that it covers, of the rows `first ... end - 1` and of columns alike.
    The first half of a head's channels turns with the row, the second half with the column. Of each axis's `P = d / 4`
    pairs of neighbouring channels, pair `t` turns by

    ```
    angle = (first + end - 1) / 2 * rotary_scale * rotary_base ** -(t / (P - 1))
    ```

    With `rotary_coordinates="fraction"` the position is divided by the last one of its axis.

    Args:
        config (`HieraTokConfig`): The configuration, of which the `rotary_*` values count.
        layout (`PyramidLayout`): The scales of the sequence.
        grid (`tuple[int, int]`): Height and width of the finest grid, in cells.
        head_dim (`int`): Channels of a head, `d`, a multiple of 4.
        device (`torch.device`): The device of the tables.

    Returns:
        Two tensors `(N, 1, d)` in float32; the sines are negative in the first channel of a pair.
    """
    settings = config.rotary_coordinates, config.rotary_pairing, config.rotary_scale, config.rotary_base
    return _rotary_tables(layout, settings, grid, head_dim, device)


@keep_by_size
def _rotary_tables(
    layout: PyramidLayout, settings: tuple[Any, ...], grid: tuple[int, int], head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    coordinates, pairing, scale, base = settings
    exponents = torch.linspace(0, 1, head_dim // 4, device=device, dtype=torch.float32)
    frequencies = scale * base**-exponents  # (d / 4,)
    frequencies = frequencies.repeat(2) if pairing == "detok" else frequencies.repeat_interleave(2)  # (d / 2,)
    angles = []
    for num_cells, (first, end) in zip(grid, layout.cells(device).spans(grid)):
        centre = (first + end - 1).float() / 2  # (N,)
        if coordinates == "fraction":
            centre = centre / max(num_cells - 1, 1)
        angles.append(centre[:, None] * frequencies)  # (N, d / 2)
    table = torch.cat(angles, dim=-1)[:, None]  # (N, 1, d)
    # Counted on the device: numbers sent to it would make the host wait.
    signs = torch.arange(head_dim, device=device) % 2 * 2 - 1
    return table.cos(), table.sin() * signs


def apply_rotary(hidden_states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs of channels of `hidden_states` `(B, N, A, d)` by tables `(N, 1, d)`, in float32; keep the dtype."""
    cos, signed_sin = rotary
    values = hidden_states.float()
    pairs = values.unflatten(-1, (-1, 2))
    partners = torch.stack([pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)  # (B, N, A, d), faster than `flip`
    return torch.addcmul(values * cos, partners, signed_sin).to(hidden_states.dtype)


def fused_norm_rotary(hidden_states: Tensor, norm: nn.RMSNorm | None, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Compute `norm`, if there is one, and `apply_rotary` of `hidden_states` `(B, N, A, d)` in one Triton kernel."""
    from ..ops.rotary_triton import norm_rotary

    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    return norm_rotary(hidden_states, weight, *rotary, eps)


def takes_fused_rotary(hidden_states: Tensor, fused: bool | None) -> bool:
    """Tell whether to call `fused_norm_rotary` for `hidden_states` `(B, N, A, d)`: if `fused`, or where it pays."""
    is_faster = hidden_states.is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not (is_faster if fused is None else fused):
        return False
    reason = why_not("triton", hidden_states.transpose(1, 2), scale=1.0, needs_gradient=False)
    if fused and reason is not None:
        raise ValueError(f"`fused_rotary` cannot serve here: {reason}.")
    return reason is None


class HieraTokAttnProcessor:
    """
    Compute the attention of a `HieraTokAttention`: projections, rotary positions, and the one attention function.

    Args:
        backend (`str`, *optional*): One of `ATTENTION_BACKENDS` or a registered one. Unless given, the model's
            `attn_implementation` decides (see `ATTENTION_IMPLEMENTATIONS`), and without one it is `"auto"`.
        fused_rotary (`bool`, *optional*): Whether to compute QK-norm and rotary positions in one Triton kernel; unless
            given, where it was measured to be faster: on a CUDA device, without gradients and `torch.compile`.

    Raises:
        ValueError: `backend` is unknown, or, when called, cannot serve.
    """

    # A name of diffusers' `set_attention_backend`.
    _attention_backend = None

    def __init__(self, backend: str | None = None, fused_rotary: bool | None = None):
        if backend not in (None, *ATTENTION_BACKENDS, *REGISTERED_BACKENDS):
            known = [*ATTENTION_BACKENDS, *REGISTERED_BACKENDS]
            raise ValueError(f"`backend` must be one of {known} or None, got {backend!r}.")
        self.backend = backend
        self.fused_rotary = fused_rotary

    def __call__(
        self, attn: "HieraTokAttention", hidden_states: Tensor, rotary: tuple[Tensor, Tensor], layout: PyramidLayout
    ) -> tuple[Tensor, Tensor | None]:
        """Compute what `HieraTokAttention.forward` returns of `hidden_states` `(B, N, D)`, by `attn`'s weights."""
        if attn.fused_projections:
            projected = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            projected = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in projected)  # (B, N, A, d)
        if takes_fused_rotary(query, self.fused_rotary):
            query, key = fused_norm_rotary(query, attn.norm_q, rotary), fused_norm_rotary(key, attn.norm_k, rotary)
        else:
            if attn.norm_q is not None and attn.norm_k is not None:
                query, key = attn.norm_q(query), attn.norm_k(key)
            query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (B, A, N, d)

        implementation = attn.config._attn_implementation
        backend, kernel = backend_of(self.backend, self._attention_backend, implementation)
        eager = implementation == "eager" and backend == "reference"
        with preferring(kernel):
            attended = scale_causal_attention(query, key, value, layout, backend=backend, return_weights=eager)
        attended, weights = attended if isinstance(attended, tuple) else (attended, None)
        return attn.to_out[0](attended.transpose(1, 2).flatten(2)), weights


class HieraTokAttention(nn.Module):
    """
    Attend over a pyramid of tokens with `num_heads` heads; a layout of one scale makes it full attention.

    The module of `AutoencoderHieraTok` gives it diffusers' `AttentionModuleMixin` as a second base.
    """

    _default_processor_cls = HieraTokAttnProcessor
    fused_projections = False

    def __init__(self, config: HieraTokConfig, hidden_size: int, num_heads: int):
        super().__init__()
        self.config = config
        self.heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.use_bias = True
        self.is_cross_attention = False
        self.to_q = HieraTokLinear(hidden_size, hidden_size)
        self.to_k = HieraTokLinear(hidden_size, hidden_size)
        self.to_v = HieraTokLinear(hidden_size, hidden_size)
        self.to_out = nn.ModuleList([HieraTokLinear(hidden_size, hidden_size)])
        self.norm_q = nn.RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.norm_k = nn.RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.processor = self._default_processor_cls()

    def forward(
        self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], layout: PyramidLayout
    ) -> tuple[Tensor, Tensor | None]:
        """
        Attend over the tokens `hidden_states` `(B, N, D)`, coarse scale first, with the tables of `rotary_tables`.

        Returns:
            `(B, N, D)`, and the weights `(B, A, N, N)` where the eager implementation is in use, else `None`.
        """
        return self.processor(self, hidden_states, rotary, layout)


class HieraTokSwiGLU(nn.Module):
    """Compute a gated feed-forward layer, `W_out (silu(W_gate x) * W_value x)` (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: HieraTokConfig, hidden_size: int):
        super().__init__()
        width = int(2 / 3 * config.mlp_ratio * hidden_size)
        self.linear_in = HieraTokLinear(hidden_size, 2 * width)
        self.linear_out = HieraTokLinear(width, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `hidden_states` `(B, N, D)` to `(B, N, D)`, token by token."""
        gate, value = self.linear_in(hidden_states).chunk(2, dim=-1)  # (B, N, width)
        return self.linear_out(F.silu(gate) * value)


class HieraTokBlock(GradientCheckpointingLayer):
    """Compute a pre-norm transformer block, `y = x + attention(norm(x))` and `y + mlp(norm(y))`."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        # A trap: dynamo keeps its compiled graphs, and counts recompilations, by code object, and transformers puts
        # the same one around every layer's `forward` (5.17 puts none, hence the two `forward` below). The blocks of a
        # side get a code object of their own, so that the two sides do not use up each other's limit.
        cls.forward.__code__ = cls.forward.__code__.replace(co_name=cls.__name__)

    def __init__(self, config: HieraTokConfig, hidden_size: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.RMSNorm(hidden_size, config.norm_eps)
        self.attn = HieraTokAttention(config, hidden_size, num_heads)
        self.norm2 = nn.RMSNorm(hidden_size, config.norm_eps)
        self.mlp = HieraTokSwiGLU(config, hidden_size)

    def forward(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], layout: PyramidLayout) -> Tensor:
        """Map `hidden_states` `(B, N, D)` to `(B, N, D)`; the others are those of `HieraTokAttention.forward`."""
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), rotary, layout)[0]
        return hidden_states + self.mlp(self.norm2(hidden_states))


class HieraTokEncoderBlock(HieraTokBlock):
    """Compute a block of the encoder, whose tokens all see each other."""

    def forward(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], layout: PyramidLayout) -> Tensor:
        """Map `hidden_states` `(B, h * w, D)` to `(B, h * w, D)`, as `HieraTokBlock.forward`."""
        return super().forward(hidden_states, rotary, layout)


class HieraTokDecoderBlock(HieraTokBlock):
    """Compute a block of the decoder, whose tokens see their own scale and every coarser one."""

    def forward(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], layout: PyramidLayout) -> Tensor:
        """Map `hidden_states` `(B, N, D)` to `(B, N, D)`, as `HieraTokBlock.forward`."""
        return super().forward(hidden_states, rotary, layout)


class HieraTokBlockEmbed(nn.Conv2d):
    """Embed blocks of `f x f` cells by a convolution whose kernel and stride are both `f`."""

    def forward(self, maps: Tensor) -> Tensor:
        """Map `maps` `(B, C, n * f, m * f)` to `(B, D, n, m)`."""
        # As cells of more channels: of bfloat16, oneDNN 3.12 computes the strided convolution wrongly on AMX.
        return F.conv2d(F.pixel_unshuffle(maps, self.stride[0]), self.weight.flatten(1)[..., None, None], self.bias)


class HieraTokPositions(nn.Module):
    """Hold a learned grid of absolute positions, and resample it to the grid of each image."""

    def __init__(self, config: HieraTokConfig, hidden_size: int):
        super().__init__()
        self.grid = nn.Parameter(torch.zeros(1, hidden_size, config.learned_positions, config.learned_positions))

    def forward(self, height: int, width: int) -> Tensor:
        """Resample the positions to a grid of `height x width` cells, `(1, D, height, width)`, bilinearly."""
        # Half-pixel linear resampling returns the grid itself at its own size, so no size is a special case.
        return F.interpolate(self.grid, (height, width), mode="bilinear", align_corners=False)


@torch.no_grad()
def init_weights(module: nn.Module, initializer_range: float) -> None:
    """Give a module weights of std `initializer_range`, biases 0 and norms 1; those that were loaded stay."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        init.normal_(module.weight, std=initializer_range)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.RMSNorm):
        init.ones_(module.weight)
    elif isinstance(module, HieraTokPositions):
        init.normal_(module.grid, std=initializer_range)
