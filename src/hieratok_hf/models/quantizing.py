"""Make integers of latents and back, by levels that are fitted after training (after arXiv 2503.16430)."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..ops.pyramid import PyramidLayout
from ..utils.choices import QUANTIZER_FILE, TOKEN_BITS
from ..utils.files import write_whole
from ..utils.numbers import whole_number

__all__ = ["LatentQuantizer", "TokensMixin", "coarser_tokens", "read_quantizer"]

# Shape letters: B batch, H W pixels, C latent channels, h w the latent's grid, n_h n_w that of a scale, n values.

_DENSITY_POWER = 0.2
_MOST_BINS = 4096
_LARGEST_FILE = 2**24  # bytes; more than 2000 channels have


class LatentQuantizer:
    """
    Round each channel of a latent to the nearest of `2**bits` levels, after training (TokenBridge, arXiv 2503.16430).

    With the levels `l` of a channel, in ascending order, a number `z` becomes an integer `q`, and that `z'`:

    ```
    q = number of i with (l[i] + l[i + 1]) / 2 < z,  z' = l[q]
    ```

    Levels lie as densely as `p ** 0.2`, where the density `p` of the channel's values is read off their quantiles.
    The cube root would make the mean squared error of many levels least (Panter and Dite, 1951), and evenly spaced
    ones take the fewest bytes for an error once they are compressed (Gish and Pierce, 1968); the power between was
    chosen by measurement. Numbers are compared in float32, which rounds nothing, so equal latents give equal integers
    on every machine.

    Args:
        levels (`dict[int, torch.Tensor]`): The levels `(C, 2**bits)` in float32, ascending, by `bits` from 1 to 8.

    Raises:
        ValueError: The levels are not as above.
    """

    def __init__(self, levels: dict[int, Tensor]):
        if levels.keys() != set(TOKEN_BITS) or len({len(values) for values in levels.values()}) != 1:
            raise ValueError(f"`levels` must be of as many channels for each of {list(TOKEN_BITS)} bits.")
        for bits, values in levels.items():
            if values.dtype != torch.float32 or values.shape[1:] != (2**bits,):
                got = f"{tuple(values.shape)} of {values.dtype}"
                raise ValueError(f"Levels of {bits} bits must have the shape (C, {2**bits}) in float32, got {got}.")
            if not (values.isfinite().all() and (values.diff() > 0).all()):
                raise ValueError(f"Levels of {bits} bits must be finite and ascending.")
        self.levels = levels

    @classmethod
    def fit(cls, latents: Iterable[Tensor]) -> "LatentQuantizer":
        """
        Fit levels to latents.

        Args:
            latents (iterable of `torch.Tensor` of shape `(B, C, h, w)`): Latents of training images, of any sizes.
                Some millions of numbers are enough; all of them are held in memory.

        Raises:
            ValueError: There are none, or a channel takes too few values for 256 levels.
        """
        parts: list[Tensor] = []
        for part in latents:
            if part.ndim != 4 or (parts and part.shape[1] != len(parts[0])):
                expected = f"(B, {len(parts[0]) if parts else 'C'}, h, w)"
                raise ValueError(f"`latents` must be batches of shape {expected}, got {tuple(part.shape)}.")
            if not part.isfinite().all():
                raise ValueError("`latents` must be finite.")
            parts.append(part.detach().float().cpu().transpose(0, 1).flatten(1))
        if not parts:
            raise ValueError("`latents` must not be empty.")
        channels = np.sort(torch.cat(parts, dim=1).double().numpy())  # (C, n)
        return cls(
            {bits: torch.from_numpy(np.stack([_fit_levels(x, 2**bits) for x in channels])) for bits in TOKEN_BITS}
        )

    @staticmethod
    def check_bits(bits: int) -> int:
        """Return `bits` as an `int`, or raise `ValueError` unless it is a whole number from 1 to 8."""
        return whole_number("bits", bits, min(TOKEN_BITS), max(TOKEN_BITS))

    def quantize(self, latents: Tensor, bits: int) -> Tensor:
        """
        Round latents to integers.

        Args:
            latents (`torch.Tensor` of shape `(B, C, h, w)`): Latents in any floating dtype, on any device.
            bits (`int`): Bits of an integer, 1 to 8.

        Returns:
            `torch.Tensor` of shape `(B, C, h, w)`: Integers from 0 to `2**bits - 1` in int64.

        Raises:
            ValueError: There are no levels of `bits`, or those are of another number of channels.
        """
        levels = self.levels[self.check_bits(bits)]
        if latents.ndim != 4 or latents.shape[1] != len(levels):
            raise ValueError(f"`latents` must have shape (B, {len(levels)}, h, w), got {tuple(latents.shape)}.")
        borders = ((levels[:, 1:] + levels[:, :-1]) / 2).to(latents.device)
        values = latents.float().transpose(0, 1).flatten(1).contiguous()  # (C, B * h * w)
        tokens = torch.searchsorted(borders, values)
        return tokens.unflatten(1, (len(latents), *latents.shape[2:])).transpose(0, 1).contiguous()

    def dequantize(self, tokens: Tensor, bits: int) -> Tensor:
        """
        Look up the levels of integers.

        Args:
            tokens (`torch.Tensor` of shape `(B, C, h, w)`): Integers of any dtype, on any device.
            bits (`int`): Bits of an integer, those of `quantize`.

        Returns:
            `torch.Tensor` of shape `(B, C, h, w)`: Latents in float32.

        Raises:
            ValueError: There are no levels of `bits`, or the tokens are no integers below `2**bits` of such a shape.
        """
        levels = self.levels[self.check_bits(bits)]
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        if not isinstance(tokens, Tensor) or kind == torch.bool or tokens.is_floating_point() or tokens.is_complex():
            raise ValueError(f"`tokens` must be a tensor of integers, got {kind}.")
        if tokens.ndim != 4 or tokens.shape[1] != len(levels) or not tokens.numel():
            raise ValueError(f"`tokens` must have shape (B, {len(levels)}, h, w), got {tuple(tokens.shape)}.")
        tokens = tokens.long()
        low, high = (int(x) for x in torch.aminmax(tokens))
        if low < 0 or high >= 2**bits:
            raise ValueError(f"`tokens` of {bits} bits must be from 0 to {2**bits - 1}, got {low} to {high}.")
        rows = tokens.transpose(0, 1).flatten(1)  # (C, B * h * w)
        values = levels.to(tokens.device).gather(1, rows)
        return values.unflatten(1, (len(tokens), *tokens.shape[2:])).transpose(0, 1).contiguous()

    def to_bytes(self) -> bytes:
        """Make the content of a file of levels, the same for the same levels."""
        return save({f"levels_{bits}": values for bits, values in self.levels.items()})

    @classmethod
    def from_bytes(cls, content: bytes, name: str = "The content") -> "LatentQuantizer":
        """Read the content of a file of levels; where it is damaged, a `ValueError` begins with `name`."""
        try:
            tensors = load(content)
            return cls({bits: tensors[f"levels_{bits}"] for bits in TOKEN_BITS})
        except (KeyError, SafetensorError, TypeError, ValueError) as error:
            raise ValueError(f"{name} is no file of levels: {' '.join(str(error).split())}") from error

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the levels to a file, whole or not at all."""
        with write_whole(path) as file:
            file.write(self.to_bytes())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "LatentQuantizer":
        """Read levels from a file; `OSError` where it cannot be read, `ValueError` where it is none."""
        if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for ever
            raise ValueError(f"{str(path)!r} is no file of levels: it is no file.")
        with open(path, "rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise ValueError(f"{str(path)!r} is no file of levels: it is too large.")
        return cls.from_bytes(content, repr(str(path)))


def _fit_levels(values: np.ndarray, count: int) -> np.ndarray:
    """Place `count` levels among ascending `values` `(n,)`; `ValueError` where these are too few different ones."""
    bins = min(_MOST_BINS, len(values) - 1)
    edges = values[np.linspace(0, len(values) - 1, bins + 1).round().astype(int)] if bins > 0 else values
    # Bins hold a share 1 / bins of the values each, so the density in one is the inverse of its width, and as many
    # levels belong there as width * density ** power.
    weights = np.diff(edges) ** (1 - _DENSITY_POWER)
    if not weights.any():
        raise ValueError("Every channel of the latents must take several values.")
    places = np.concatenate([[0.0], np.cumsum(weights)]) / weights.sum()
    levels = np.interp((np.arange(count) + 0.5) / count, places, edges).astype(np.float32)
    if not (np.diff(levels) > 0).all():
        raise ValueError(f"Every channel of the latents must take more different values than {count} levels need.")
    return levels


def read_quantizer(
    name_or_path: str | os.PathLike[str], channels: int | None, options: Mapping[str, Any]
) -> LatentQuantizer | None:
    """
    Read the levels that lie in a folder or in a repository of the Hub, if there are any.

    Args:
        name_or_path (`str` or `os.PathLike`): The folder or the repository.
        channels (`int` or `None`): The channels that they must have, where these are known.
        options (`Mapping`): Arguments of `from_pretrained` that say where, such as `subfolder` and `revision`.

    Raises:
        ValueError: The file is damaged, or its levels are of other channels.
    """
    subfolder = options.get("subfolder") or ""
    if os.path.isdir(name_or_path):
        path = Path(name_or_path, subfolder, QUANTIZER_FILE)
        if not path.is_file():
            return None
    else:
        names = ("revision", "cache_dir", "token", "local_files_only", "force_download")
        given = {name: options[name] for name in names if options.get(name) is not None}
        try:
            found = hf_hub_download(os.fspath(name_or_path), QUANTIZER_FILE, subfolder=subfolder or None, **given)
        except EntryNotFoundError:  # also where the Hub cannot be asked and the cache has none
            return None
        path = Path(found)
    hint = "delete it, and `hieratok fit-quantizer FOLDER --data IMAGES` makes another"
    try:
        quantizer = LatentQuantizer.read(path)
    except ValueError as error:
        raise ValueError(f"{error}; {hint}") from error
    if channels not in (None, got := len(quantizer.levels[1])):
        raise ValueError(f"{str(path)!r} must have levels of {channels} channels, got {got}; {hint}")
    return quantizer


def coarser_tokens(tokens: Tensor, scale_factors: tuple[int, ...]) -> tuple[Tensor, ...]:
    """
    Sum up tokens at the scales of a pyramid, so that a model can predict them scale by scale, coarse ones first.

    The token of a coarse cell is the mean of the integers in its block of `f x f`, rounded, halves upwards; a grid
    that `f` does not divide is continued by its border. All is computed in integers. The last map is `tokens` itself,
    which alone decides the latent: the coarser ones are functions of it, as in FlexVAR (arXiv 2502.20313), and no
    residuals are added up.

    Args:
        tokens (`torch.Tensor` of shape `(B, C, h, w)`): Integers of the finest map.
        scale_factors (`tuple[int, ...]`): Factors of the scales, strictly decreasing to 1.

    Returns:
        Integers of the same range in int64, `(B, C, n_h, n_w)` for each scale, on the grids of `PyramidLayout`.
    """
    height, width = tokens.shape[2:]
    layout = PyramidLayout.from_grid(height, width, scale_factors)
    maps = []
    for factor, (rows, columns) in zip(layout.scale_factors, layout.grids):
        row, column = (
            torch.arange(cells * factor, device=tokens.device).clamp(max=side - 1)
            for cells, side in ((rows, height), (columns, width))
        )
        blocks = tokens.long()[:, :, row][:, :, :, column].unflatten(3, (columns, factor)).unflatten(2, (rows, factor))
        maps.append((2 * blocks.sum((3, 5)) + factor**2) // (2 * factor**2))  # (B, C, n_h, n_w)
    return tuple(maps)


class TokensMixin:
    """
    Give a model `tokenize` and `detokenize`, by the levels that are stored beside its weights.

    Attributes:
        quantizer (`LatentQuantizer` or `None`): The levels; `None` where the model was saved without.
    """

    quantizer: LatentQuantizer | None = None

    @torch.no_grad()
    def fit_quantizer(self, batches: Iterable[Tensor]) -> LatentQuantizer:
        """
        Fit the levels to training images, which `save_pretrained` then stores with the model.

        Args:
            batches (iterable of `torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1], of any sizes that the
                model takes. A few hundred of them are enough.

        Raises:
            ValueError: There are none, or they are too much alike.
        """
        self.quantizer = LatentQuantizer.fit(self._latents_of(batch) for batch in batches)
        return self.quantizer

    @torch.no_grad()
    def tokenize(
        self, pixel_values: Tensor, bits: int = 8, return_scales: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        """
        Encode images to integers: the mode of the posterior, each number rounded to one of `2**bits` levels.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1], as for `encode`.
            bits (`int`, defaults to 8): Bits of an integer, 1 to 8.
            return_scales (`bool`, defaults to `False`): Whether to return the integers of every scale, coarse to fine,
                as `coarser_tokens` makes them, for models that predict scale by scale.

        Returns:
            `torch.Tensor` of shape `(B, C, h, w)`: Integers from 0 to `2**bits - 1` in int64; with `return_scales` a
            tuple of `(B, C, n_h, n_w)`, of which the last is that tensor.

        Raises:
            ValueError: The model has no levels, `bits` is out of range, or `encode` refuses the images.
        """
        quantizer = self._fitted()
        quantizer.check_bits(bits)
        tokens = quantizer.quantize(self._latents_of(pixel_values), bits)
        scale_factors = tuple(self.core.config.scale_factors)  # type: ignore[attr-defined]
        return coarser_tokens(tokens, scale_factors) if return_scales else tokens

    def detokenize(self, tokens: Tensor, bits: int = 8, **options: Any) -> Any:
        """
        Decode integers to images.

        Args:
            tokens (`torch.Tensor` of shape `(B, C, h, w)`): Integers of `tokenize`; of several scales the last map.
            bits (`int`, defaults to 8): Bits of an integer, those of `tokenize`.
            options: Further arguments of `decode`, such as `num_scales`.

        Returns:
            The decoded images, in the form in which the model's `decode` returns them.

        Raises:
            ValueError: The model has no levels, or the tokens are not as above.
        """
        latents = self._fitted().dequantize(tokens, bits)
        return self.decode(latents.to(self.dtype), **options)  # type: ignore[attr-defined]

    def _latents_of(self, pixel_values: Tensor) -> Tensor:
        encoded = self.encode(pixel_values)  # type: ignore[attr-defined]
        return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents

    def _fitted(self) -> LatentQuantizer:
        if self.quantizer is None:
            raise ValueError(
                f"The model has no {QUANTIZER_FILE}: `model.fit_quantizer(batches)` or `hieratok fit-quantizer FOLDER "
                "--data IMAGES` makes one."
            )
        return self.quantizer

    def _read_quantizer(self, name_or_path: str | os.PathLike[str], options: dict[str, Any]) -> None:
        """Take the levels that lie beside the weights, if there are any."""
        channels = self.core.config.latent_channels  # type: ignore[attr-defined]
        self.quantizer = read_quantizer(name_or_path, channels, options)

    def _write_quantizer(self, folder: Path) -> None:
        if self.quantizer is not None:
            self.quantizer.write(folder / QUANTIZER_FILE)
