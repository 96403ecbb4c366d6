"""DiT by name, and its training by flow matching: the velocity of a straight line (SiT, arXiv 2401.08740)."""

import inspect
from typing import Any

import torch
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn

from ..data.training_batches import step_generator
from ..models.dit_grids import allow_any_grid
from ..utils.choices import DIT_SIZES
from ..utils.numbers import whole_number
from .alignment import BlockAlignment

__all__ = ["VelocityTraining", "dit_from_size", "flow_draws"]

# Shape letters: B images, C latent channels, h w the latent's grid.

# Schedulers of diffusers count the time from 0 to this.
NUM_TRAIN_TIMESTEPS = 1000


def dit_from_size(
    size: str, *, in_channels: int, sample_size: int, num_classes: int, patch_size: int = 1, **overrides: Any
) -> DiTTransformer2DModel:
    """
    Make a DiT of a named size with random weights, in evaluation mode; as in the paper, every block does nothing yet.

    Args:
        size (`str`): One of `DIT_SIZES`.
        in_channels (`int`): Channels of the latent.
        sample_size (`int`): Side of the latent's grid.
        num_classes (`int`): Number of classes; the label after the last is that of no class.
        patch_size (`int`, defaults to 1): Cells of a token's side, a divisor of `sample_size`.
        overrides: Further values of the configuration.

    Raises:
        ValueError: There is no such size, the grid is no multiple of the patch, or an override is no value of the
            configuration that can be chosen.
    """
    if size not in DIT_SIZES:
        raise ValueError(f"`size` must be one of {list(DIT_SIZES)}, got {size!r}.")
    in_channels, num_classes = whole_number("in_channels", in_channels, 1), whole_number("num_classes", num_classes, 1)
    sample_size, patch_size = whole_number("sample_size", sample_size, 1), whole_number("patch_size", patch_size, 1)
    if sample_size % patch_size:
        raise ValueError(f"`patch_size` must divide the latent's side, {sample_size}, got {patch_size}.")
    sizes = ("in_channels", "out_channels", "sample_size", "patch_size", "num_embeds_ada_norm")
    known = set(inspect.signature(DiTTransformer2DModel.__init__).parameters) - {"self", *sizes}
    if unknown := sorted(set(overrides) - known):
        raise ValueError(f"A DiT's configuration has no {unknown[0]!r} to be chosen here, but {sorted(known)}.")
    model = DiTTransformer2DModel(
        **{**DIT_SIZES[size], **overrides},
        in_channels=in_channels,
        out_channels=in_channels,  # diffusers' DiTPipeline cannot do without it
        sample_size=sample_size,
        patch_size=patch_size,
        num_embeds_ada_norm=num_classes,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    nn.init.xavier_uniform_(model.pos_embed.proj.weight.flatten(1))
    for block in model.transformer_blocks:
        embedder = block.norm1.emb.timestep_embedder
        for layer in (embedder.linear_1, embedder.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    nn.init.zeros_(model.proj_out_1.weight)
    nn.init.zeros_(model.proj_out_2.weight)
    return model.eval()


class VelocityTraining(nn.Module):
    """
    Hold the trained weights and compute their loss, so that one wrapper (DDP, FSDP, `torch.compile`) serves.

    Args:
        transformer (`ModelMixin`): A `DiTTransformer2DModel`, or another model that is called as one.
        alignment (`BlockAlignment`, *optional*): Pulls the tokens of a block towards a vision model's features; the
            transformer then has `transformer_blocks`.
        weight (`float`, defaults to 0.0): Weight of the alignment.
        block (`int`, defaults to 1): The block whose output is aligned, counted from 1.
    """

    # What accelerate's FSDP wraps one by one, with `--fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP`.
    _no_split_modules = ["BasicTransformerBlock"]

    def __init__(
        self, transformer: ModelMixin, alignment: BlockAlignment | None = None, weight: float = 0.0, block: int = 1
    ):
        super().__init__()
        allow_any_grid(transformer)
        self.transformer, self.alignment, self.weight = transformer, alignment, weight
        self._tokens: dict[str, Tensor] = {}
        if alignment is not None:
            transformer.transformer_blocks[block - 1].register_forward_hook(self._keep_tokens)

    def _keep_tokens(self, module: nn.Module, args: Any, tokens: Tensor) -> None:
        self._tokens["kept"] = tokens

    def train(self, mode: bool = True) -> "VelocityTraining":
        """Set the mode, but never drop labels inside: each block would drop others."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, LabelEmbedding):
                module.eval()
        return self

    def forward(
        self, latents: Tensor, noise: Tensor, times: Tensor, labels: Tensor, *features: Tensor
    ) -> dict[str, Tensor]:
        """
        Compute the `loss`, the mean square of the velocity's error; with an alignment, that is `velocity`, and the
        `loss` is its sum with `weight` times the `alignment`. Each is float32 of shape `()`.

        Args:
            latents (`torch.Tensor` of shape `(B, C, h, w)`): Clean latents of about unit variance.
            noise (`torch.Tensor` of shape `(B, C, h, w)`): Standard normal noise.
            times (`torch.Tensor` of shape `(B,)`): Times in [0, 1], from clean to noise alone.
            labels (`torch.Tensor` of shape `(B,)`): int64; the number of classes stands for no class.
            features (`torch.Tensor` of shape `(B, D, h', w')`): The maps that the alignment was made for.
        """
        share = times[:, None, None, None]
        noisy = (1 - share) * latents + share * noise
        timestep = times * NUM_TRAIN_TIMESTEPS
        velocity = self.transformer(noisy, timestep=timestep, class_labels=labels, return_dict=False)[0]
        velocity = velocity[:, : latents.shape[1]].float()
        loss = (velocity - (noise - latents)).square().mean()
        if self.alignment is None:
            return {"loss": loss}
        grid = [side // self.transformer.config.patch_size for side in latents.shape[2:]]
        alignment = self.alignment(self._tokens.pop("kept").unflatten(1, grid), features)
        return {"loss": loss + self.weight * alignment, "velocity": loss, "alignment": alignment}


def flow_draws(
    seed: int,
    step: int,
    count: int,
    *,
    rows: Tensor,
    shape: tuple[int, ...],
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Draw the times and noise of some images of a step, a function of seed and step however the images are divided.

    Args:
        seed, step (`int`): The training's seed and the step's number.
        count (`int`): Images of the whole step.
        rows (`torch.Tensor` of shape `(B,)`): Which of them these are.
        shape (`tuple[int, ...]`): The shape `(C, h, w)` of a latent.
        mean, std (`float`, default to 0.0 and 1.0): Moments of the times' logit, which is normal (arXiv 2403.03206).
        shift (`float`, defaults to 1.0): More than 1 draws noisier times, as the `shift` of diffusers' schedulers.

    Returns:
        `noise` `(B, C, h, w)`, standard normal; `times` `(B,)` in [0, 1]; `dropping` `(B,)`, uniform in [0, 1): a
        label is dropped where it is below the rate. All are float32.
    """
    drawn: dict[str, Any] = {"generator": step_generator(seed, step), "dtype": torch.float32}
    noise = torch.randn(count, *shape, **drawn)
    times = torch.sigmoid(mean + std * torch.randn(count, **drawn))
    times = shift * times / (1 + (shift - 1) * times)
    return noise[rows], times[rows], torch.rand(count, **drawn)[rows]
