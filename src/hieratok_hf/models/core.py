"""Compose HieraTok (after arXiv 2509.23736): encoder, latent, pyramid and decoder."""

import copy
import functools
import logging
import math
import re
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..ops.onednn_linear import HieraTokLinear
from ..ops.processor import lacks_bfloat16
from ..ops.pyramid import PyramidLayout, check_scale_factors, continue_border, convolve_pyramid, flatten_pyramid
from ..ops.torch_compat import is_watched, mode_of
from ..utils.choices import DOWNSAMPLING
from .configuration_hieratok import HieraTokConfig
from .layers import (
    HieraTokBlockEmbed,
    HieraTokDecoderBlock,
    HieraTokEncoderBlock,
    HieraTokPositions,
    init_weights,
    rotary_tables,
)

__all__ = ["HieraTokCore", "HieraTokDecoder", "HieraTokEncoder", "PIXEL_LIMIT", "posterior_of"]

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

# Shape letters: B batch, H W pixels, p patch size, h w finest grid (H / p, W / p), D hidden size, C latent channels,
# N tokens of all scales, n tokens of one scale.

PIXEL_LIMIT = 16.0
"""Largest magnitude of a pixel that is taken for one in [-1, 1], which noise and resampling overshoot a little."""

_INITIAL_LOGVAR = -6.0
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class HieraTokEncoder(nn.Module):
    """
    Encode images by a vision transformer (Dosovitskiy et al., arXiv 2010.11929) to the moments of their latents.

    A convolution embeds patches of `p x p` pixels, the blocks mix them, and a linear head reads a mean and a
    log-variance of `C` channels each from every token. The linear path `L`, a convolution over
    `linear_path x linear_path` patches that `config.linear_path` switches on, adds to the mean:

    ```
    mean, log variance = head(blocks(patches(x))),  mean = mean + L x
    ```
    """

    def __init__(self, config: HieraTokConfig):
        super().__init__()
        hidden_size, patch_size = config.encoder_hidden_size, config.patch_size
        num_layers, num_heads = config.encoder_num_layers, config.encoder_num_heads
        self.config = config
        self.head_dim = hidden_size // num_heads
        self.patch_embed = nn.Conv2d(config.in_channels, hidden_size, patch_size, stride=patch_size)
        self.positions = HieraTokPositions(config, hidden_size) if config.learned_positions else None
        self.norm_before = nn.RMSNorm(hidden_size, config.norm_eps) if config.norm_before_blocks else nn.Identity()
        self.blocks = nn.ModuleList(HieraTokEncoderBlock(config, hidden_size, num_heads) for _ in range(num_layers))
        self.norm_after = nn.RMSNorm(hidden_size, config.norm_eps) if config.norm_after_blocks else nn.Identity()
        self.head = HieraTokLinear(hidden_size, 2 * config.latent_channels)
        self.linear_path: nn.Conv2d | None = None
        if config.linear_path:
            size, padding = config.linear_path * patch_size, config.linear_path // 2 * patch_size
            channels = config.in_channels, config.latent_channels
            self.linear_path = nn.Conv2d(
                *channels, size, stride=patch_size, padding=padding, padding_mode="replicate", bias=False
            )

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """
        Encode images to moments.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1]; sides are multiples of the patch
                size. They are not checked.

        Returns:
            The moments `(B, 2C, h, w)` and the features `(B, h * w, D)` that they are read from.
        """
        embedded = self.patch_embed(pixel_values)  # (B, D, h, w)
        grid = (embedded.shape[-2], embedded.shape[-1])
        if self.positions is not None:
            embedded = embedded + self.positions(*grid)
        layout = PyramidLayout.from_grid(*grid, (1,))
        rotary = rotary_tables(self.config, layout, grid, self.head_dim, embedded.device)

        hidden_states = self.norm_before(embedded.flatten(2).transpose(1, 2))  # (B, h * w, D)
        for block in self.blocks:
            hidden_states = block(hidden_states, rotary, layout)
        hidden_states = self.norm_after(hidden_states)

        moments = self.head(hidden_states).transpose(1, 2).unflatten(2, grid)  # (B, 2C, h, w)
        if self.linear_path is not None:
            mean, logvar = moments.chunk(2, dim=1)
            moments = torch.cat([mean + self.linear_path(pixel_values), logvar], dim=1)
        return moments, hidden_states


class HieraTokDecoder(nn.Module):
    """
    Decode latents to the images of all scales, from one sequence of tokens.

    The tokens `t_s[i, j]` of scale `s`, made of the latent `z` by `convolve_pyramid` or `flatten_pyramid`, get the
    embedding `e_s` of their scale. Scale-causal blocks (`HieraTokDecoderBlock`) mix them, and one linear head for all
    scales turns each into a patch of `p x p` pixels. The linear path `L_s`, which `config.linear_path` switches on,
    adds to the image, and `O` is the output convolution or the identity:

    ```
    u = blocks([t_1 + e_1, t_2 + e_2, ...])
    y_s = O(unpatchify(head(norm(u_s))) + L_s z)
    ```
    """

    def __init__(self, config: HieraTokConfig):
        super().__init__()
        hidden_size, channels = config.decoder_hidden_size, config.in_channels
        num_layers, num_heads = config.decoder_num_layers, config.decoder_num_heads
        self.config = config
        self.head_dim = hidden_size // num_heads
        self.embed = HieraTokLinear(config.latent_channels, hidden_size)
        learned_factors = config.scale_factors[:-1] if config.downsampling == "learned" else ()
        self.coarse_embed = nn.ModuleList(
            HieraTokBlockEmbed(config.latent_channels, hidden_size, factor, stride=factor)
            for factor in learned_factors
        )
        self.scale_embedding = nn.Parameter(torch.zeros(len(config.scale_factors), hidden_size))
        self.positions = HieraTokPositions(config, hidden_size) if config.learned_positions else None
        self.norm_before = nn.RMSNorm(hidden_size, config.norm_eps) if config.norm_before_blocks else nn.Identity()
        self.blocks = nn.ModuleList(HieraTokDecoderBlock(config, hidden_size, num_heads) for _ in range(num_layers))
        self.norm_after = nn.RMSNorm(hidden_size, config.norm_eps) if config.norm_after_blocks else nn.Identity()
        self.head = HieraTokLinear(hidden_size, config.patch_size**2 * channels)
        self.linear_path = nn.ModuleList(
            nn.Conv2d(config.latent_channels, self.cell_size(factor) ** 2 * channels, config.linear_path)
            for factor in (config.scale_factors if config.linear_path else ())
        )
        self.output_conv = nn.Conv2d(channels, channels, 3, padding=1) if config.output_conv else None

    def cell_size(self, factor: int) -> int:
        """
        Return the side, in pixels, of the square that the linear path makes of one cell for the scale of `factor`.

        It is `p / factor`, or `p` where averages are convolved. Where `factor` does not divide the patch, the square
        is larger, and its pixels are averaged.
        """
        size = self.config.patch_size
        return size if self.config.downsampling == "mean" else size // math.gcd(size, factor)

    @torch.no_grad()
    def init_weights(self, initializer_range: float) -> None:
        """Start the scale embeddings at std `initializer_range`, and the output convolution as the identity."""
        init.normal_(self.scale_embedding, std=initializer_range)
        # Tokens of all scales vary alike.
        for factor, embed in zip(self.config.scale_factors, self.coarse_embed):
            init.normal_(embed.weight, std=initializer_range / factor)
        if self.output_conv is not None:
            init.dirac_(self.output_conv.weight)
            init.zeros_(self.output_conv.bias)

    @torch.no_grad()
    def init_coarse_path(self, index: int) -> None:
        """Start the linear path of a scale, 0 the coarsest, as the average of what the finest one makes."""
        size = self.cell_size(self.config.scale_factors[index])
        pixels = (size, self.config.patch_size // size) * 2
        for own, finest in zip(self.linear_path[index].parameters(), self.linear_path[-1].parameters()):
            own.copy_(finest.unflatten(0, (*pixels, -1)).mean((1, 3)).flatten(0, 2))

    def forward(self, latents: Tensor, layout: PyramidLayout, all_scales: bool = False) -> list[Tensor]:
        """
        Decode latents to images.

        Args:
            latents (`torch.Tensor` of shape `(B, C, h, w)`): The finest map.
            layout (`PyramidLayout`): The first scales of the model's pyramid, or all of them, over `h x w` cells.
            all_scales (`bool`, defaults to `False`): Whether to make the image of every scale, not only of the last.

        Returns:
            Images `(B, 3, n_h * p, n_w * p)`, coarse to fine; the last is that of the layout's last scale.
        """
        grid = (latents.shape[-2], latents.shape[-1])
        averages = flatten_pyramid(latents, layout) if self.config.downsampling == "mean" else None  # (B, N, C)
        hidden_states = self.embed_blocks(latents, layout) if averages is None else self.embed(averages)  # (B, N, D)
        hidden_states = hidden_states + F.embedding(layout.cells(latents.device).scale, self.scale_embedding)
        if self.positions is not None:
            hidden_states = hidden_states + flatten_pyramid(self.positions(*grid), layout)
        rotary = rotary_tables(self.config, layout, grid, self.head_dim, latents.device)

        visible = layout if self.config.scale_causal else PyramidLayout(((1, layout.num_tokens),), (1,))
        hidden_states = self.norm_before(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states, rotary, visible)

        images = []
        for i in range(0 if all_scales else layout.num_scales - 1, layout.num_scales):
            rows, cells = layout.slices[i], layout.grids[i]
            patches = self.head(self.norm_after(hidden_states[:, rows]))  # (B, n, p * p * 3)
            image = self.unpatchify(patches, *cells)
            if self.config.linear_path:
                source = latents if averages is None else averages[:, rows].transpose(1, 2).unflatten(2, cells)
                image = image + self.linear_image(source, i)
            images.append(image)
        return images if self.output_conv is None else [self.output_conv(image) for image in images]

    def embed_blocks(self, latents: Tensor, layout: PyramidLayout) -> Tensor:
        """Embed the blocks of `latents` `(B, C, h, w)` at the scales of `layout`, coarse first, `(B, N, D)`."""
        if torch.compiler.is_compiling():
            # All at once: a compiled graph of a single coarse token would serve no other number of them.
            return convolve_pyramid(latents, layout, [*self.coarse_embed, self._embed_map])
        num_coarse = min(layout.num_scales, len(self.coarse_embed))
        parts = [convolve_pyramid(latents, layout.truncate(num_coarse), self.coarse_embed)] if num_coarse else []
        if num_coarse < layout.num_scales:
            parts.append(self.embed(latents.flatten(2).transpose(1, 2)))
        return torch.cat(parts, dim=1)

    def _embed_map(self, latents: Tensor) -> Tensor:
        return self.embed(latents.movedim(1, -1)).movedim(-1, 1)  # (B, D, h, w)

    def linear_image(self, cells: Tensor, index: int) -> Tensor:
        """
        Compute the part of a scale's image that is linear in the latent, `(B, 3, n_h * p, n_w * p)`.

        With `k = config.linear_path`, and cells beyond the latent equal to its border, the cell `(i, j)` becomes a
        square of `cell_size(factor)` pixels a side, whose numbers `r` are

        ```
        r = b_s + sum over a, b < k, c < C of  L_s[:, c, a, b] * z[c, i + a - k // 2, j + b - k // 2]
        ```

        Their pixels are averaged where they are more than those of the scale's image.

        Args:
            cells (`torch.Tensor` of shape `(B, C, h, w)`): The latent; for averages, the scale's `(B, C, n_h, n_w)`.
            index (`int`): Number of the scale, 0 the coarsest.
        """
        height, width = cells.shape[-2:]
        around = continue_border(cells, *[self.config.linear_path // 2] * 4)
        image = self.unpatchify(self.linear_path[index](around).flatten(2).transpose(1, 2), height, width)
        if self.config.downsampling == "mean" or index == len(self.linear_path) - 1:
            return image
        factor, patch_size = self.config.scale_factors[index], self.config.patch_size
        size = self.cell_size(factor)
        # Rounded up without negative numbers, for exporters as in `PyramidLayout.from_grid`.
        rows, columns = ((side + factor - 1) // factor for side in (height, width))
        # A block too many, because a compiled graph for padding of any size serves neither 0 nor 1.
        bottom, right = ((rows + 1) * factor - height) * size, ((columns + 1) * factor - width) * size
        averages = F.avg_pool2d(continue_border(image, 0, right, 0, bottom), factor * size // patch_size)
        return averages[:, :, : rows * patch_size, : columns * patch_size]

    def unpatchify(self, patches: Tensor, height: int, width: int) -> Tensor:
        """
        Lay squares of any side `s` out as an image `(B, 3, height * s, width * s)`.

        Args:
            patches (`torch.Tensor` of shape `(B, n, s * s * 3)`): Squares in the order (row, column, colour).
            height, width (`int`): Sides of the grid of `n` squares.
        """
        size = math.isqrt(patches.shape[2] // self.config.in_channels)
        patches = patches.unflatten(2, (size, size, -1)).unflatten(1, (height, width))  # (B, height, width, s, s, 3)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, 3, height * s, width * s)


class HieraTokCore(nn.Module):
    """
    Compute the tokenizer without a library around it: `pixel_values -> moments -> latents -> pyramid -> images`.

    The encoder `E` gives the mean and the log-variance of a normal distribution (Kingma and Welling, arXiv 1312.6114),
    and the decoder `D` the images `y_s` of all scales `s`, coarse to fine, each at `1 / f` of the size of `x`:

    ```
    mean, log variance = E(x),  z = mean + exp(log variance / 2) * noise,  (y_1, y_2, ...) = D(z)
    ```
    """

    def __init__(self, config: HieraTokConfig):
        super().__init__()
        self.config = config
        self.encoder = HieraTokEncoder(config)
        self.decoder = HieraTokDecoder(config)

    def init_weights(self) -> "HieraTokCore":
        """Give every module its random weights, and return the core."""
        for module in self.modules():
            init_weights(module, self.config.initializer_range)
        self.decoder.init_weights(self.config.initializer_range)
        return self

    def encode_moments(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """
        Encode images to the moments of their latents.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1]; sides are multiples of the patch
                size. Values are checked on a CPU only.

        Returns:
            The moments `(B, 2C, h, w)`, mean first, and the encoder's features `(B, h * w, D)`.

        Raises:
            ValueError: The rank, batch, channels, size, dtype or values are not as above, or the dtype is not that of
                the weights.
        """
        with mode_of(pixel_values):
            check_pixel_values(pixel_values, self.config)
            return _name_dtype_in_errors("pixel_values", self.encoder, pixel_values)

    def encode(self, pixel_values: Tensor) -> "DiagonalGaussianDistribution":
        """Encode `pixel_values` `(B, 3, H, W)`, as `encode_moments`, to the distribution of their latents."""
        return posterior_of(self.encode_moments(pixel_values)[0])

    def decode(self, latents: Tensor, num_scales: int | None = None) -> Tensor:
        """
        Decode latents to the image of one scale, for the cost of its tokens and the coarser ones only.

        Args:
            latents (`torch.Tensor` of shape `(B, C, h, w)`): The finest map.
            num_scales (`int`, *optional*): Number of scales to run, coarse to fine; all unless given.

        Returns:
            `torch.Tensor` of shape `(B, 3, n_h * p, n_w * p)` with the grid of the last scale run; `(B, 3, H, W)` for
            all of them. Values lie about [-1, 1] and are not clamped.

        Raises:
            ValueError: The rank, batch, channels, dtype or values of `latents` are not as above, `num_scales` is not
                in `1 ... len(scale_factors)`, or it leaves out scales of a model without `scale_causal`.
        """
        return self._decode(latents, num_scales, all_scales=False)[-1]

    def decode_scales(self, latents: Tensor, num_scales: int | None = None) -> list[Tensor]:
        """Decode `latents` `(B, C, h, w)` as `decode`, to the images of all scales that run, coarse to fine."""
        return self._decode(latents, num_scales, all_scales=True)

    def _decode(self, latents: Tensor, num_scales: int | None, all_scales: bool) -> list[Tensor]:
        with mode_of(latents):
            check_latents(latents, self.config)
            layout = PyramidLayout.from_grid(latents.shape[-2], latents.shape[-1], tuple(self.config.scale_factors))
            if num_scales is not None:
                layout = layout.truncate(num_scales)
                if layout.num_scales < len(self.config.scale_factors) and not self.config.scale_causal:
                    raise ValueError(f"Without `scale_causal` no scale can run alone, got `num_scales={num_scales}`.")
            return _name_dtype_in_errors("latents", self.decoder, latents, layout, all_scales)

    @torch.no_grad()
    def with_scale_factors(self, scale_factors: tuple[int, ...], downsampling: str = "learned") -> "HieraTokCore":
        """
        Copy the model with other scales, in its dtype, on its device and in its mode.

        A coarse scale that this model does not have, or makes of averages where the copy is to learn, starts from the
        finest one: its tokens are those of the average cell, and its linear path is that of the finest one, averaged.
        Where the factors divide the grid and the scales are the same, all images stay as they are, within rounding.

        Args:
            scale_factors (`tuple[int, ...]`): The scales of the copy, strictly decreasing to 1.
            downsampling (`str`, defaults to `"learned"`): Kind of the copy's coarse tokens, one of `DOWNSAMPLING`.
                `"mean"` is for models that have it, or only one scale.

        Raises:
            ValueError: The factors do not decrease strictly to 1, averages cannot stand for what was learned, or the
                model has adapters.
        """
        scale_factors = check_scale_factors(scale_factors)
        if has_adapters(self):
            raise ValueError("The model has adapters, which a copy would lack: fuse them and unload them first.")
        own = tuple(self.config.scale_factors)
        kinds = DOWNSAMPLING if self.config.downsampling == "mean" or len(own) == 1 else ("learned",)
        if downsampling not in kinds:
            raise ValueError(f"`downsampling` must be one of {list(kinds)} for this model, got {downsampling!r}.")
        config = copy.deepcopy(self.config)
        config.scale_factors, config.downsampling = scale_factors, downsampling
        core = HieraTokCore(config).init_weights()
        ours, theirs = self.decoder, core.decoder
        of_scales = ("decoder.scale_embedding", "decoder.coarse_embed.", "decoder.linear_path.")
        shared = {name: x for name, x in self.state_dict().items() if not name.startswith(of_scales)}
        core.load_state_dict(shared, strict=False)

        sources = [own.index(factor) if factor in own else -1 for factor in scale_factors]
        theirs.scale_embedding.copy_(ours.scale_embedding[sources])
        if config.linear_path:
            theirs.linear_path[-1].load_state_dict(ours.linear_path[-1].state_dict())
        for i, factor in enumerate(scale_factors[:-1]):
            if factor in own and downsampling == self.config.downsampling:
                for name in ("coarse_embed", "linear_path"):
                    if layers := getattr(theirs, name):
                        layers[i].load_state_dict(getattr(ours, name)[sources[i]].state_dict())
                continue
            if downsampling == "learned":
                theirs.coarse_embed[i].weight.copy_((theirs.embed.weight / factor**2)[..., None, None])
                theirs.coarse_embed[i].bias.copy_(theirs.embed.bias)
            if config.linear_path:
                theirs.init_coarse_path(i)
        return core.to(ours.head.weight).train(self.training)

    @torch.no_grad()
    def set_linear_path(self, components: Tensor, mean: Tensor, scale: Tensor) -> None:
        """
        Start the linear path as a principal component analysis of patches, and the transformers at zero beside it.

        With components `V`, mean patch `m` and standard deviations `d`, a patch `x` and its latent cell `z` are

        ```
        z = (V (x - m)) / d,  y = V^T (d * z) + m
        ```

        The linear path of a coarse scale starts as the average of what the finest makes.

        Args:
            components (`torch.Tensor` of shape `(C, 3 * p * p)`): Orthonormal directions of patches in the order
                (colour, row, column).
            mean (`torch.Tensor` of shape `(3 * p * p,)`): Mean patch, of pixels in [-1, 1].
            scale (`torch.Tensor` of shape `(C,)`): Standard deviation of the patches along each direction.

        Raises:
            ValueError: The model has no linear path, a shape is not as above, or a scale is not positive and finite.
        """
        if not self.config.linear_path:
            raise ValueError("The model has no linear path: configure it with `linear_path`.")
        size, channels, middle = self.config.patch_size, self.config.latent_channels, self.config.linear_path // 2
        numbers = size**2 * self.config.in_channels
        _check_statistics("components", components, (channels, numbers))
        _check_statistics("mean", mean, (numbers,))
        _check_statistics("scale", scale, (channels,), positive=True)
        to_latent = components / scale[:, None]
        cells = slice(middle * size, (middle + 1) * size)
        self.encoder.linear_path.weight.zero_()
        self.encoder.linear_path.weight[:, :, cells, cells] = to_latent.view(channels, -1, size, size)
        self.encoder.head.weight[:channels].zero_()
        self.encoder.head.bias[:channels].copy_(-(to_latent @ mean))
        # A posterior as wide as the latents would drown them before training has begun.
        self.encoder.head.bias[channels:].fill_(_INITIAL_LOGVAR)
        # A decoded patch has its colours last.
        to_patch = (components * scale[:, None]).view(channels, -1, size, size).permute(2, 3, 1, 0).flatten(0, 2)
        self.decoder.head.weight.zero_()
        self.decoder.head.bias.zero_()
        finest = self.decoder.linear_path[-1]
        finest.weight.zero_()
        finest.weight[:, :, middle, middle] = to_patch
        finest.bias.copy_(mean.view(-1, size, size).permute(1, 2, 0).flatten())
        for i in range(len(self.config.scale_factors) - 1):
            self.decoder.init_coarse_path(i)

    @torch.no_grad()
    def fold_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """
        Fold a normalisation of the latent into the weights, so that latents change and images do not.

        Afterwards `encode` gives `(latent - mean) / std`, and `decode` of that gives the same image as before, because
        the layers on both sides are linear in the latent. For each weight `W` and bias `b` that reads the latent, in
        the embeddings and the linear paths of the decoder:

        ```
        mean' = (mean - m) / d,  log variance' = log variance - 2 log d
        W' = W * d,  b' = b + (sum over a, b of W[:, :, a, b]) m
        ```

        The entries of the configuration that tell pipelines of the latents, `scaling_factor`, `shift_factor`,
        `latents_mean` and `latents_std`, become those of normalised latents.

        Args:
            mean, std (`torch.Tensor` of shape `(C,)`): Mean `m` and standard deviation `d` of each latent channel over
                the training images.

        Raises:
            ValueError: A shape is not `(C,)`, a value is not finite, or a standard deviation is not positive.
        """
        channels = self.config.latent_channels
        _check_statistics("mean", mean, (channels,))
        _check_statistics("std", std, (channels,), positive=True)
        encoder, decoder = self.encoder, self.decoder
        encoder.head.weight[:channels] /= std[:, None]
        encoder.head.bias[:channels] = (encoder.head.bias[:channels] - mean) / std
        encoder.head.bias[channels:] -= 2 * std.log()
        decoder.embed.bias.add_(decoder.embed.weight @ mean)
        decoder.embed.weight.mul_(std)
        if self.config.linear_path:
            encoder.linear_path.weight.div_(std[:, None, None, None])
        # Continued borders keep a constant constant, so a shift of the latent is one of the bias.
        for layer in (*decoder.coarse_embed, *decoder.linear_path):
            layer.bias.add_(layer.weight.sum((2, 3)) @ mean)
            layer.weight.mul_(std[:, None, None])
        self.config.scaling_factor, self.config.shift_factor = 1.0, 0.0
        self.config.latents_mean = self.config.latents_std = None


def posterior_of(moments: Tensor) -> "DiagonalGaussianDistribution":
    """Make the distribution of the latent `(B, C, h, w)` from its `moments` `(B, 2C, h, w)`, mean first."""
    # Importing it loads every autoencoder of diffusers, for which a model of transformers should not wait.
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    return DiagonalGaussianDistribution(moments)


def has_adapters(model: nn.Module) -> bool:
    """Tell whether peft has put adapters around layers of a model."""
    return any(hasattr(module, "base_layer") for module in model.modules())


def check_pixel_values(pixel_values: Tensor, config: HieraTokConfig) -> None:
    """Raise `ValueError` unless `pixel_values` are images that a model of this configuration can encode."""
    _check_map(pixel_values, "pixel_values", config.in_channels, PIXEL_LIMIT)
    size, (height, width) = config.patch_size, pixel_values.shape[-2:]
    if height % size or width % size:
        raise ValueError(f"Sides of `pixel_values` must be multiples of the patch size {size}, got {height}x{width}.")


def check_latents(latents: Tensor, config: HieraTokConfig) -> None:
    """Raise `ValueError` unless `latents` are a latent that a model of this configuration can decode."""
    _check_map(latents, "latents", config.latent_channels)


def _check_map(tensor: Tensor, name: str, channels: int, limit: float = math.inf) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"`{name}` must be a torch.Tensor, got {type(tensor).__name__}.")
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise ValueError(f"`{name}` must be a dense tensor, got one that is {kind}.")
    if tensor.ndim != 4:
        raise ValueError(f"`{name}` must have shape (batch, channels, height, width), got {tuple(tensor.shape)}.")
    if tensor.shape[1] != channels:
        raise ValueError(f"`{name}` must have {channels} channels, got {tensor.shape[1]}.")
    if 0 in tensor.shape:
        raise ValueError(f"`{name}` must not be empty, got shape {tuple(tensor.shape)}.")
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"`{name}` must be floating point of 16 bits or more, got {tensor.dtype}.")
    # Elsewhere, reading values would wait for a device or break a graph.
    if tensor.device.type == "cpu" and not is_watched():
        low, high = (float(x) for x in torch.aminmax(tensor.detach()))  # finite where all are
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"`{name}` must be finite, got NaN or infinity.")
        if low < -limit or high > limit:
            raise ValueError(f"`{name}` must lie in [-1, 1], got values from {low:g} to {high:g}.")
        if tensor.dtype == torch.bfloat16:
            _warn_of_slow_bfloat16()


@functools.cache
def _warn_of_slow_bfloat16() -> None:
    if lacks_bfloat16():
        message = "This processor has no instructions for bfloat16, in which models are slower than in float32."
        logging.getLogger(__name__).warning(message)


def _name_dtype_in_errors(name: str, module: nn.Module, tensor: Tensor, *args: Any) -> Any:
    """Call a module, and tell which argument it was that torch could not join with the weights."""
    if torch.compiler.is_compiling():
        return module(tensor, *args)
    try:
        return module(tensor, *args)
    except RuntimeError as error:  # not before, because hooks and autocast may cast the one or the other
        dtype = next(parameter.dtype for parameter in module.parameters())
        if tensor.dtype == dtype or not re.search(r"should be the same|same dtype", str(error)):
            raise
        raise ValueError(f"`{name}` must have the dtype of the weights, {dtype}, got {tensor.dtype}.") from error


def _check_statistics(name: str, values: Tensor, shape: tuple[int, ...], positive: bool = False) -> None:
    got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
    if got != shape:
        raise ValueError(f"`{name}` must be a tensor of shape {shape}, got {got}.")
    if not torch.isfinite(values).all() or (positive and not (values > 0).all()):
        raise ValueError(f"`{name}` must be finite{' and positive' if positive else ''}, got {values.tolist()}.")
