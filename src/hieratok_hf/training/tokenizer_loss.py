"""Compute the loss of a tokenizer in training: its forward pass with noise, and the weighted sum of all losses."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..data.training_batches import step_generator
from ..models.configuration_hieratok import HieraTokConfig
from ..models.core import HieraTokCore, posterior_of
from ..models.losses import add_weighted, border_loss, tokenizer_losses
from ..utils.choices import PIXEL_LOSSES
from .alignment import LatentAlignment
from .discriminator import adaptive_weight, generator_hinge_loss
from .teacher import LatentTeacher

__all__ = ["LossWeights", "TokenizerTraining", "TrainingLoss", "step_noise"]

# Shape letters: B batch, H W pixels, C latent channels, h w latent grid.

TrainingOutputs = tuple[list[Tensor], Tensor | None, Tensor | None, Tensor | None, Tensor]

_PARTS = ("loss", "kl", "coarse", "alignment", "latents", "adversarial", "adaptive_weight", "border", *PIXEL_LOSSES)


@dataclass(frozen=True)
class LossWeights:
    """
    Weigh the parts of the loss, `kl` and `coarse` aside, which the configuration weighs; 0 leaves a part out.

    Attributes:
        pixel (`str`): Kind of the difference of pixels, one of `PIXEL_LOSSES`; its weight is 1.
        border (`float`): Weight of seams between patches, see `border_loss`.
        perceptual, lpips (`float`): Weights of the distances over a vision model, and by the published LPIPS.
        alignment (`float`): Weight of the latents' alignment with a vision model.
        adversarial (`float`): Factor of the discriminator's verdict, beside the adaptive weight.
        adversarial_start, coarse_start (`int`): Steps before which those parts do not count.

    Raises:
        ValueError: A weight is negative or not finite, or the kind is none of those.
    """

    pixel: str = "l1"
    border: float = 0.0
    perceptual: float = 0.0
    lpips: float = 0.0
    alignment: float = 0.0
    adversarial: float = 0.0
    adversarial_start: int = 0
    coarse_start: int = 0

    def __post_init__(self) -> None:
        if self.pixel not in PIXEL_LOSSES:
            raise ValueError(f"`pixel` must be one of {list(PIXEL_LOSSES)}, got {self.pixel!r}.")
        for name in ("border", "perceptual", "lpips", "alignment", "adversarial"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"The weight `{name}` must be finite and not negative, got {value}.")


class TokenizerTraining(nn.Module):
    """
    Hold every trained weight but the discriminator's, so that one wrapper (DDP, FSDP, `torch.compile`) serves.

    Args:
        core (`HieraTokCore`): The tokenizer.
        alignment (`LatentAlignment`, *optional*): Aligns the latents with a vision model.
        latent_noise (`float`, defaults to 0.0): Largest standard deviation of the noise that latents are mixed with
            before they are decoded (l-DeTok, arXiv 2507.15856).
        latent_jitter (`float`, defaults to 0.0): Largest standard deviation of noise that is added to latents before
            they are decoded, because those of a generator are never exact; that of a latent is this times the fourth
            power of its `mix`, so that half of them stay nearly exact.
        teacher (`LatentTeacher`, *optional*): Gives the latents that the encoder, unless it is frozen, learns and that
            the decoder reads.
        teacher_images (`bool`, defaults to `False`): Whether the decoder learns to make what the teacher makes of the
            same latents, with their noise, instead of the images that they come from.
    """

    # What accelerate's FSDP wraps one by one, with `--fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP`.
    _no_split_modules = ["HieraTokEncoderBlock", "HieraTokDecoderBlock"]

    def __init__(
        self,
        core: HieraTokCore,
        alignment: LatentAlignment | None = None,
        latent_noise: float = 0.0,
        latent_jitter: float = 0.0,
        teacher: LatentTeacher | None = None,
        teacher_images: bool = False,
    ):
        super().__init__()
        self.core, self.alignment, self.teacher, self.teacher_images = core, alignment, teacher, teacher_images
        self.latent_noise, self.latent_jitter = latent_noise, latent_jitter

    def forward(self, pixel_values: Tensor, noise: Tensor, mix: Tensor) -> TrainingOutputs:
        """
        Encode, add noise and decode: the images of all scales; the moments `(B, 2C, h, w)`, if their distribution
        counts, which a teacher's does not; the alignment loss; the mean squared distance to a teacher's latents; and
        the images `(B, 3, H, W)` that the finest scale should be.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1].
            noise (`torch.Tensor` of shape `(2, B, C, h, w)`): Standard normal: for the posterior, and for the mixing.
            mix (`torch.Tensor` of shape `(B, 1, 1, 1)`): Share in [0, 1] of a latent that the noise replaces.
        """
        moments: Tensor | None = None
        distance: Tensor | None = None
        if self.teacher is None:
            moments, _ = self.core.encode_moments(pixel_values)
            posterior = posterior_of(moments)
            latents = posterior.mean + posterior.std * noise[0]
        else:
            latents = self.teacher(pixel_values)
            if self.core.encoder.head.weight.requires_grad:
                mean = self.core.encode_moments(pixel_values)[0].chunk(2, dim=1)[0]
                distance = F.mse_loss(mean.float(), latents)
        decoded = latents
        if self.latent_noise:
            decoded = (1 - mix) * latents + mix * self.latent_noise * noise[1]
        if self.latent_jitter:
            decoded = decoded + mix**4 * self.latent_jitter * noise[1]
        aligned = self.alignment(latents, pixel_values) if self.alignment is not None else None
        targets = pixel_values
        if self.teacher is not None and self.teacher_images:
            targets = self.teacher.decode(decoded)
        return self.core.decode_scales(decoded), moments, aligned, distance, targets


def step_noise(batch: dict[str, Any], config: HieraTokConfig, seed: int) -> tuple[Tensor, Tensor]:
    """
    Draw what `TokenizerTraining` takes with a batch of `training_loader`: `noise` `(2, B, C, h, w)`, standard normal,
    and `mix` `(B, 1, 1, 1)`, uniform in [0, 1), float32 on the CPU. They are a function of the seed and the step,
    however its images are divided over processes and parts.
    """
    height, width = (side // config.patch_size for side in batch["pixel_values"].shape[2:])
    drawn: dict[str, Any] = {"generator": step_generator(seed, batch["step"]), "dtype": torch.float32}
    noise = torch.randn(2, batch["count"], config.latent_channels, height, width, **drawn)
    mix = torch.rand(batch["count"], 1, 1, 1, **drawn)
    return noise[:, batch["rows"]], mix[batch["rows"]]


class TrainingLoss:
    """
    Add up all weighted losses, in float32.

    Args:
        weights (`LossWeights`): The weights of the parts.
        perceptual, lpips (`nn.Module`, *optional*): Distances of images; needed where their weight is not 0.
        discriminator (`nn.Module`, *optional*): Scores images; needed where `adversarial` is not 0.
        total (`Callable`, *optional*): Adds a tensor up over all processes.
        own (`Mapping[str, tuple[Callable, float]]`, *optional*): Further losses by names of their own, each a function
            of the reconstruction and the images in [-1, 1], both `(B, 3, H, W)` in float32, with its weight. The mean
            of what a function gives counts.

    Raises:
        ValueError: A part has a weight and nothing to compute it, or one of `own` has a weight that is negative or not
            finite, or the name of another part.
    """

    def __init__(
        self,
        weights: LossWeights,
        perceptual: nn.Module | None = None,
        lpips: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        total: Callable[[Tensor], Tensor] = lambda x: x,
        own: Mapping[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] | None = None,
    ):
        for name, module in (("perceptual", perceptual), ("lpips", lpips), ("adversarial", discriminator)):
            if (value := getattr(weights, name)) and module is None:
                raise ValueError(f"The weight `{name}` must be 0 where nothing computes that part, got {value}.")
        distances: dict[str, tuple[Any, float]] = {
            "perceptual": (perceptual, weights.perceptual),
            "lpips": (lpips, weights.lpips),
        }
        for name, (_, weight) in (own or {}).items():
            if name in (*_PARTS, *distances) or not 0 <= weight < math.inf:
                wanted = "have names of their own and finite weights, not negative"
                raise ValueError(f"The losses of `own` must {wanted}, got {name!r} of weight {weight}.")
        self.distances = {name: pair for name, pair in {**distances, **(own or {})}.items() if pair[1]}
        self.weights, self.discriminator, self.total = weights, discriminator, total

    def is_adversarial(self, step: int) -> bool:
        """Tell whether the discriminator counts at a step, and learns."""
        return self.weights.adversarial > 0 and step >= self.weights.adversarial_start

    def __call__(self, config: HieraTokConfig, outputs: TrainingOutputs, step: int) -> dict[str, Tensor]:
        """
        Compute the parts by name, each a scalar, and their sum `loss`.

        Args:
            config (`HieraTokConfig`): The tokenizer's configuration.
            outputs (`tuple`): What `TokenizerTraining` returned.
            step (`int`): Step of the training, from 0.
        """
        weights, (images, moments, aligned, distance, targets) = self.weights, outputs
        parts = tokenizer_losses(images, targets, moments, config, weights.pixel)
        image = images[-1].float()
        reconstruction = parts[weights.pixel]
        if weights.border:
            parts["border"] = border_loss(image, config.patch_size)
            reconstruction = reconstruction + weights.border * parts["border"]
        for name, (function, weight) in self.distances.items():
            parts[name] = function(image, targets.float()).mean()
            reconstruction = reconstruction + weight * parts[name]
        # A factor of 0 instead of leaving the coarse scales out: DDP waits for a gradient of every weight.
        loss = add_weighted(reconstruction, parts, config, factor=step >= weights.coarse_start)
        if aligned is not None:
            parts["alignment"] = aligned.float()
            loss = loss + weights.alignment * parts["alignment"]
        if distance is not None:
            parts["latents"] = distance
            loss = loss + distance
        if self.is_adversarial(step) and self.discriminator is not None:
            # Detached, or this loss would leave its gradient for the discriminator's own step.
            frozen = {name: x.detach() for name, x in self.discriminator.named_parameters()}
            parts["adversarial"] = generator_hinge_loss(functional_call(self.discriminator, frozen, image))
            squares = [
                self.total(torch.autograd.grad(part, images[-1], retain_graph=True)[0].float().square().sum())
                for part in (reconstruction, parts["adversarial"])
            ]
            parts["adaptive_weight"] = adaptive_weight(*squares)
            loss = loss + weights.adversarial * parts["adaptive_weight"] * parts["adversarial"]
        parts["loss"] = loss
        return parts
