"""Latents that are no squares for diffusers' DiT, whose `forward` joins its tokens to a square whatever they were."""

from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn

__all__ = ["allow_any_grid"]

# Shape letters: B images, C channels, H W the latent's grid, N tokens (h * w of them), p cells of a token's side.


def allow_any_grid(transformer: nn.Module) -> None:
    """
    Let a `DiTTransformer2DModel` take latents `(B, C, H, W)` of any height and width that its patches divide; what it
    makes of squares stays the same to the bit. Another model is left as it is, and given twice makes no difference.
    """
    transformer = getattr(transformer, "_orig_mod", transformer)  # of `torch.compile`
    if isinstance(transformer, DiTTransformer2DModel) and not hasattr(transformer, "_allows_any_grid"):
        transformer._allows_any_grid = True
        _find_last_layer(transformer)
        transformer.register_forward_pre_hook(_find_last_layer)
        transformer.register_forward_hook(_join_tokens, with_kwargs=True)


def _find_last_layer(module: nn.Module, args: Any = None) -> None:
    """Part the tokens of the layer that is the last now: an adapter may have been put around it, or taken off."""
    last, handle = module.__dict__.get("_parted", (None, None))
    if last is not module.proj_out_2:
        if handle is not None:
            handle.remove()
        handle = module.proj_out_2.register_forward_hook(_part_tokens)
        module.__dict__["_parted"] = (module.proj_out_2, handle)


def _part_tokens(module: nn.Module, args: Any, tokens: Tensor) -> Tensor:
    """Make an image of each token: of `(B, N, p * p * C)` the shape `(B * N, 1, p * p * C)`."""
    return tokens.flatten(0, 1)[:, None]


def _join_tokens(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Join images of one token each, `(B * N, C, p, p)`, to `(B, C, H, W)`."""
    hidden_states: Tensor = args[0] if args else kwargs["hidden_states"]
    cells = output[0]
    grid = [side // module.patch_size for side in hidden_states.shape[2:]]
    cells = cells.unflatten(0, (-1, *grid)).permute(0, 3, 1, 4, 2, 5)  # (B, C, h, p, w, p)
    sample = cells.flatten(4).flatten(2, 3)
    return (sample,) if isinstance(output, tuple) else Transformer2DModelOutput(sample=sample)
