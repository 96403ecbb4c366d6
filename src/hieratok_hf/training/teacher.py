"""
Learn the latents of another autoencoder, so that generators of its latents speak to this one: a distillation as
TAESD's (github.com/madebyollin/taesd), of which the encoder regresses to the latents and the decoder reads them.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.latent_cache import digest_of
from ..models.autoencoder_adapter import Codec
from ..models.configuration_hieratok import HieraTokConfig
from ..models.core import HieraTokCore
from ..ops.pyramid import continue_border
from ..utils.channel_statistics import add_sums, channel_sums
from ..utils.distributed import gather
from .pca_init import latent_statistics

__all__ = ["LatentTeacher", "TaughtCodec", "agreement", "start_from_teacher", "teacher_fields", "translate_latents"]

# Shape letters: B batch, H W pixels, p patch size, C latent channels, h w latent grid, k side of the linear path.

_SILENT_LOGVAR = -30.0  # the least that diffusers' distribution has
_RIDGE = 1e-4
_MOST_SOURCES = 8192  # of least squares, whose matrix grows with their square and whose time with their cube


def teacher_fields(teacher: Codec, size: int) -> dict[str, int]:
    """
    Find the `patch_size` and `latent_channels` that a tokenizer of a teacher's latents must have.

    Args:
        teacher (`Codec`): The teacher, which encodes and decodes one blank image here.
        size (`int`): Side of that image in pixels.

    Raises:
        ValueError: The teacher cannot take such an image, or a cell of its latent is no square of a power of two.
    """
    channels, height, width = teacher.latent_shape(size)
    factor = size // height
    if height != width or factor * height != size or factor & (factor - 1):
        raise ValueError(f"A latent's cells must be squares of a power of two, got {height}x{width} of {size} pixels.")
    return {"patch_size": factor, "latent_channels": channels}


class LatentTeacher(nn.Module):
    """
    Give the latents of a frozen autoencoder, each channel of mean 0 and standard deviation 1.

    Only the statistics `mean` and `std` `(C,)` are kept with a training's state; the autoencoder is no submodule.

    Args:
        codec (`Codec`): The autoencoder, on any device.
        channels (`int`): Channels `C` of its latents.
    """

    codec: Codec
    mean: Tensor
    std: Tensor

    def __init__(self, codec: Codec, channels: int):
        super().__init__()
        self.__dict__["codec"] = codec
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    @property
    def fingerprint(self) -> str:
        """Give the SHA-256 of the autoencoder's weights and of what scales its latents, in hexadecimal digits."""
        statistics = {name: torch.tensor(value) for name, value in self.codec.statistics.items()}
        return digest_of([*self.codec.model.state_dict().items(), *statistics.items()])

    def measure(self, batches: Iterable[Tensor]) -> None:
        """Measure the statistics over images `(B, 3, H, W)` in [-1, 1]."""
        mean, std = latent_statistics(self.codec, batches)
        self.mean.copy_(mean)
        self.std.copy_(std.clamp(min=1e-6))  # a channel that says nothing has none

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode `pixel_values` `(B, 3, H, W)` in [-1, 1] to normalised latents `(B, C, h, w)`, where `mean` is."""
        with torch.autocast(pixel_values.device.type, enabled=False):
            latents = self.codec.encode(pixel_values).to(self.mean)
        return (latents - self.mean[:, None, None]) / self.std[:, None, None]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised `latents` `(B, C, h, w)` to the autoencoder's images `(B, 3, H, W)`, in their dtype."""
        with torch.autocast(latents.device.type, enabled=False):
            own = latents.to(self.mean) * self.std[:, None, None] + self.mean[:, None, None]
            return self.codec.decode(own).to(latents)

    @torch.no_grad()
    def take_in(self, core: HieraTokCore) -> None:
        """Let a tokenizer of the teacher's own latents, as `hand_over` leaves it, work on normalised ones."""
        core.fold_latent_statistics(self.mean, self.std)

    @torch.no_grad()
    def hand_over(self, core: HieraTokCore) -> None:
        """
        Let a tokenizer of normalised latents work on the teacher's own: statistics in its configuration are then the
        teacher's, and a sample of its posterior is the mode.
        """
        core.fold_latent_statistics(-self.mean / self.std, 1 / self.std)
        channels = core.config.latent_channels
        core.encoder.head.weight[channels:] = 0
        core.encoder.head.bias[channels:] = _SILENT_LOGVAR
        for name, value in self.codec.statistics.items():
            setattr(core.config, name, value)
        theirs: Any = getattr(self.codec.model, "config", None)
        core.config.latents_mean = getattr(theirs, "latents_mean", None)
        core.config.latents_std = getattr(theirs, "latents_std", None)


class TaughtCodec(Codec):
    """Encode by a teacher, to normalised latents, and decode by the tokenizer that learns from it."""

    def __init__(self, core: HieraTokCore, teacher: LatentTeacher):
        super().__init__(core)
        self.teacher = teacher

    def encode(self, pixel_values: Tensor, noise: Tensor | None = None) -> Tensor:
        """
        Encode `pixel_values` `(B, 3, H, W)` in [-1, 1] to the teacher's normalised latents `(B, C, h, w)`, whatever
        the `noise` `(B, C, h, w)`.
        """
        return self.teacher(pixel_values)


@torch.no_grad()
def agreement(core: HieraTokCore, teacher: LatentTeacher, batches: Iterable[Tensor]) -> float:
    """
    Measure how much of the variance of a teacher's normalised latents those of a tokenizer explain, R squared, the
    mean over the channels: 1 where they are the same, 0 for a constant. All processes call it, each with its share.

    Args:
        core (`HieraTokCore`): The tokenizer, which encodes to normalised latents.
        teacher (`LatentTeacher`): The teacher, with its statistics.
        batches (iterable of `torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1], on one device with both.
    """
    errors: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for pixel_values in batches:
        theirs = teacher(pixel_values)
        add_sums(errors, channel_sums(theirs - core.encode(pixel_values).mode()))
        add_sums(values, channel_sums(theirs))
    error: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}
    for of_errors, of_values in gather((errors, values)):
        add_sums(error, of_errors)
        add_sums(total, of_values)
    spread = total["squares"] - total["sum"].square() / total["count"]
    return float((1 - error["squares"] / spread.clamp(min=1e-12)).mean())


@torch.no_grad()
def start_from_teacher(
    core: HieraTokCore, teacher: LatentTeacher, batches: Callable[[], Iterable[Tensor]], pretrained: bool
) -> HieraTokCore:
    """
    Measure a teacher's statistics, and bring a tokenizer as near to its normalised latents as linear maps can.

    Args:
        core (`HieraTokCore`): The tokenizer; it may be changed.
        teacher (`LatentTeacher`): The teacher.
        batches (`Callable`): Gives images `(B, 3, H, W)` in [-1, 1], the same at each call.
        pretrained (`bool`): Whether the tokenizer has been trained. One that explains anything of the teacher's
            latents stays as it is, one of other latents goes through `translate_latents`. Of a random one the linear
            path is fitted, if it has one, in the encoder up to patches of 16 pixels for a path of three patches.

    Returns:
        The tokenizer to go on with, with the teacher's number of channels.
    """
    teacher.measure(batches())
    if not pretrained:
        if core.config.linear_path:
            _fit_linear_path(core, teacher, batches())
        return core
    if core.config.latent_channels == len(teacher.mean):
        teacher.take_in(core)
        if agreement(core, teacher, batches()) > 0:
            return core
    return translate_latents(core, teacher, batches())


@torch.no_grad()
def translate_latents(core: HieraTokCore, teacher: LatentTeacher, batches: Iterable[Tensor]) -> HieraTokCore:
    """
    Copy a tokenizer so that it speaks a teacher's latents `t` instead of its own `z`, as well as linear maps can.

    By least squares the encoder's last layers give `t` from its features and pixels, and `z = A t + a` goes into the
    layers that read the latent.

    Args:
        core (`HieraTokCore`): A tokenizer that has been trained, of the teacher's patch size.
        teacher (`LatentTeacher`): The teacher, with its statistics.
        batches (iterable of `torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1].
    """
    channels, width = len(teacher.mean), core.config.encoder_hidden_size
    copied = HieraTokCore(HieraTokConfig(**{**core.config.model_fields, "latent_channels": channels}))
    ours, shapes = core.state_dict(), {name: x.shape for name, x in copied.state_dict().items()}
    copied.load_state_dict({name: x for name, x in ours.items() if x.shape == shapes[name]}, strict=False)
    encoding: dict[str, Tensor] = {}
    decoding: dict[str, Tensor] = {}
    for pixel_values in batches:
        latents = teacher(pixel_values).flatten(2)
        moments, features = core.encode_moments(pixel_values)
        sources = [features.transpose(1, 2)]
        if _fits_pixels(core):
            sources.append(_pixels_around(core, pixel_values))
        _add_products(encoding, torch.cat(sources, dim=1), latents)
        _add_products(decoding, latents, moments.chunk(2, dim=1)[0].flatten(2))
    weight, bias = _solve(encoding)
    copied.encoder.head.weight[:channels] = weight[:, :width]
    copied.encoder.head.bias[:channels] = bias
    copied.encoder.head.weight[channels:] = copied.encoder.head.bias[channels:] = 0
    if core.config.linear_path:
        path = copied.encoder.linear_path.weight
        path.copy_(weight[:, width:].view_as(path) if _fits_pixels(core) else torch.zeros_like(path))
    weight, bias = _solve(decoding)
    pairs = [(core.decoder.embed, copied.decoder.embed)]
    for name in ("coarse_embed", "linear_path"):
        pairs += zip(getattr(core.decoder, name), getattr(copied.decoder, name))
    for old, new in pairs:
        new.weight.copy_(torch.einsum("oc...,cn->on...", old.weight, weight))
        new.bias.copy_(old.bias + old.weight.flatten(2).sum(2) @ bias if old.weight.ndim > 2 else old(bias))
    return copied.train(core.training)


def _fit_linear_path(core: HieraTokCore, teacher: LatentTeacher, batches: Iterable[Tensor]) -> None:
    """Start the linear path at least squares of both directions, and the transformers at zero beside it."""
    config, encoder, decoder = core.config, core.encoder, core.decoder
    size, side, channels = config.patch_size, config.linear_path, config.latent_channels
    encoding: dict[str, Tensor] = {}
    decoding: dict[str, Tensor] = {}
    for pixel_values in batches:
        latents = teacher(pixel_values)
        cells_around = continue_border(latents, *[side // 2] * 4)
        if _fits_pixels(core):
            _add_products(encoding, _pixels_around(core, pixel_values), latents.flatten(2))
        _add_products(decoding, F.unfold(cells_around, side), F.pixel_unshuffle(pixel_values, size).flatten(2))
    if encoding:
        weight, bias = _solve(encoding)
        encoder.linear_path.weight.copy_(weight.view_as(encoder.linear_path.weight))
        encoder.head.weight[:channels] = 0
        encoder.head.bias[:channels] = bias
    # A decoded patch has its colours last.
    weight, bias = (x.unflatten(0, (-1, size**2)).transpose(0, 1).flatten(0, 1) for x in _solve(decoding))
    decoder.linear_path[-1].weight.copy_(weight.view_as(decoder.linear_path[-1].weight))
    decoder.linear_path[-1].bias.copy_(bias)
    decoder.head.weight.zero_()
    decoder.head.bias.zero_()
    for i in range(len(config.scale_factors) - 1):
        decoder.init_coarse_path(i)


def _fits_pixels(core: HieraTokCore) -> bool:
    """Tell whether the encoder's linear path has few enough weights a channel for least squares."""
    return 0 < core.config.in_channels * (core.config.linear_path * core.config.patch_size) ** 2 <= _MOST_SOURCES


def _pixels_around(core: HieraTokCore, pixel_values: Tensor) -> Tensor:
    """Gather what the encoder's linear path sees of each cell, `(B, 3 * k * p * k * p, h * w)`."""
    size, side = core.config.patch_size, core.config.linear_path
    around = continue_border(pixel_values, *[side // 2 * size] * 4)
    return F.unfold(around, side * size, stride=size)


def _add_products(sums: dict[str, Tensor], sources: Tensor, targets: Tensor) -> None:
    """Add what least squares need of `sources` `(B, n, cells)` and `targets` `(B, m, cells)` to `sums`."""
    sources, targets = (x.transpose(1, 2).flatten(0, 1) for x in (F.pad(sources, (0, 0, 0, 1), value=1.0), targets))
    add_sums(sums, {"gram": (sources.T @ sources).double(), "products": (sources.T @ targets).double()})


def _solve(sums: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Solve the normal equations for a weight `(m, n)` and a bias `(m,)`, float32."""
    gram = sums["gram"]
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())  # neighbouring pixels are all but the same
    solution = torch.linalg.solve(gram, sums["products"]).float().T  # (m, n + 1)
    return solution[:, :-1], solution[:, -1]
