"""Describe a latent space: tails, spectra, neighbours, uniformity on the sphere, equivariance, and a linear probe."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.autoencoder_adapter import Codec
from ..utils.channel_statistics import add_sums, channel_sums
from .linear_probe import linear_probe

__all__ = [
    "choose_rows",
    "describe_latents",
    "excess_kurtosis",
    "measure_latents",
    "neighbour_correlation",
    "power",
    "radial_spectrum",
    "radii",
    "uniformity",
    "upper_half_share",
    "white_noise",
]

# Shape letters: N images, C latent channels, h w the latent's grid, D numbers of a vector, R rings of frequencies.

_MOST_OF_PAIRS = 2000
_QUANTILES = (0.5, 0.9, 0.99, 0.999, 0.9999, 1.0)
_PROBE_CELLS = 4

# What is done to images, and to their latents.
_CHANGES: dict[str, tuple[Callable[[Tensor, int], Tensor], Callable[[Tensor], Tensor]]] = {
    "mirrored": (lambda images, cell: images.flip(3), lambda latents: latents.flip(3)),
    "upside_down": (lambda images, cell: images.flip(2), lambda latents: latents.flip(2)),
    "shifted": (lambda images, cell: images[..., cell:, cell:], lambda latents: latents[..., 1:, 1:]),
    "halved": (lambda images, cell: F.avg_pool2d(images, 2), lambda latents: F.avg_pool2d(latents, 2)),
}


def _check(latents: Tensor) -> Tensor:
    if latents.ndim != 4 or 0 in latents.shape:
        raise ValueError(f"`latents` must have shape (N, C, h, w) and not be empty, got {tuple(latents.shape)}.")
    latents = latents.double()
    if not latents.isfinite().all():
        raise ValueError("`latents` must be finite.")
    spread = latents.amax((0, 2, 3)) - latents.amin((0, 2, 3))
    if not (spread > 0).all():
        raise ValueError(f"`latents` must vary in every channel, {int(spread.argmin())} does not.")
    return latents


def _cosines(size: int) -> Tensor:
    """Make the orthonormal DCT-II `(size, size)`, a row for each frequency: `k` of them are `k / 2` periods."""
    steps = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(torch.pi / size * steps[:, None] * (steps + 0.5)) * (2 / size) ** 0.5
    matrix[0] /= 2**0.5
    return matrix


def power(latents: Tensor) -> Tensor:
    """
    Measure the energy of each frequency of latents, by the DCT.

    Args:
        latents (`torch.Tensor` of shape `(N, C, h, w)`): Latents, of which each channel's mean is taken away.

    Returns:
        `torch.Tensor` of shape `(C, h, w)`: Mean squares in float64.

    Raises:
        ValueError: They have another shape, are empty or not finite, or a channel does not vary.
    """
    # A grid of latents is not periodic: the DFT would take the step from border to border for high frequencies, and
    # a Hann window, its remedy, would hide half of a grid of 8 cells. The DCT mirrors at the border instead.
    latents = _check(latents)
    latents = latents - latents.mean((0, 2, 3), keepdim=True)
    height, width = latents.shape[2:]
    return (_cosines(height) @ latents @ _cosines(width).T).square().mean(0)


def radii(height: int, width: int) -> Tensor:
    """Give how high each frequency of `power` is `(h, w)`: 1 is Nyquist's along a side, where neighbours alternate."""
    rows, columns = (torch.arange(size, dtype=torch.float64) / size for size in (height, width))
    return (rows[:, None].square() + columns.square()).sqrt()


def radial_spectrum(spectrum: Tensor) -> tuple[Tensor, Tensor]:
    """Give of a `spectrum` `(C, h, w)` the mean of `radii` in each ring `(R,)`, rising, and its own mean `(C, R)`."""
    size = spectrum.shape[1:]
    distance = radii(*size).flatten()
    rings = (distance * min(size)).round().long()
    counts = torch.bincount(rings).double()
    sums = torch.zeros(len(spectrum), len(counts), dtype=torch.float64).index_add_(1, rings, spectrum.flatten(1))
    return torch.bincount(rings, distance) / counts, sums / counts


def upper_half_share(spectrum: Tensor) -> Tensor:
    """
    Give the share `(C,)` of a `spectrum` `(C, h, w)` at `radii` of a half and more; of white noise it is the share of
    the frequencies that lie there.
    """
    upper = radii(*spectrum.shape[1:]) >= 0.5
    return spectrum[:, upper].sum(1) / spectrum.sum((1, 2))


def neighbour_correlation(latents: Tensor) -> Tensor:
    """
    Correlate cells side by side and one above the other, over all images.

    Args:
        latents (`torch.Tensor` of shape `(N, C, h, w)`): Latents of two cells or more each way.

    Returns:
        `torch.Tensor` of shape `(C,)`: The mean of both ways, in [-1, 1].

    Raises:
        ValueError: They are refused by `power`, or a cell has no neighbour.
    """
    latents = _check(latents)
    if min(latents.shape[2:]) < 2:
        raise ValueError(f"`latents` must have neighbours both ways, got the grid {tuple(latents.shape[2:])}.")
    latents = latents - latents.mean((0, 2, 3), keepdim=True)
    across, down = latents[..., 1:] * latents[..., :-1], latents[..., 1:, :] * latents[..., :-1, :]
    return (across.mean((0, 2, 3)) + down.mean((0, 2, 3))) / 2 / latents.square().mean((0, 2, 3))


def excess_kurtosis(latents: Tensor) -> Tensor:
    """
    Compute the excess kurtosis of each channel: 0 of a normal distribution, -1.2 of a uniform one.

    Args:
        latents (`torch.Tensor` of shape `(N, C, h, w)`): Latents that `power` takes.

    Returns:
        `torch.Tensor` of shape `(C,)`: `E (z - mean)^4 / variance^2 - 3` in float64.
    """
    values = _check(latents).transpose(0, 1).flatten(1)
    values = values - values.mean(1, keepdim=True)
    return values.pow(4).mean(1) / values.square().mean(1).square() - 3


def uniformity(vectors: Tensor, t: float = 2.0) -> float:
    """
    Measure how evenly directions cover the sphere: `log E exp(-t |x - y|^2)` over all pairs (arXiv 2005.10242).

    It is 0 where all are one, and lower where they are more uniform; uniform ones of many dimensions give `-2 t`.

    Args:
        vectors (`torch.Tensor` of shape `(N, D)`): Two vectors or more, of any lengths but zero.
        t (`float`, defaults to 2.0): How fast pairs cease to count as they move apart.

    Raises:
        ValueError: They have another shape, or one of them is zero.
    """
    if vectors.ndim != 2 or len(vectors) < 2:
        raise ValueError(f"`vectors` must have shape (N, D) with N of 2 or more, got {tuple(vectors.shape)}.")
    vectors = vectors.double()
    lengths = vectors.norm(dim=1, keepdim=True)
    if not (lengths > 0).all():
        raise ValueError("`vectors` must not be zero, which has no direction.")
    distances = torch.pdist(vectors / lengths)
    return float(distances.square().mul(-t).exp().mean().log())


def choose_rows(count: int, most: int = _MOST_OF_PAIRS) -> Tensor:
    """Choose the rows `(N,)` of at most so many images for what looks at all pairs, the same of the same number."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most].sort().values


def white_noise(shape: tuple[int, ...], images: int = _MOST_OF_PAIRS) -> Tensor:
    """Draw latents `(N, C, h, w)` of a shape `(C, h, w)` without any structure, the same ones each time."""
    return torch.randn(images, *shape, generator=torch.Generator().manual_seed(0))


def describe_latents(latents: Tensor) -> dict[str, Any]:
    """
    Describe latents by figures that are ready for JSON.

    Args:
        latents (`torch.Tensor` of shape `(N, C, h, w)`): Latents of two images or more.

    Returns:
        `images` and `shape`; by channel `mean`, `variance`, `excess_kurtosis`, `neighbour_correlation`, `spectra` (the
        means of `radial_spectrum`, at `frequencies`) and `upper_half_share_of_channels`; over all channels
        `upper_half_share` and `quantiles` of `|z - mean| / std`, by their share, the largest as `1.0`; and
        `uniformity` of `choose_rows`, `uniformity_flattened` and, of means over the cells, `uniformity_pooled`.

    Raises:
        ValueError: `power`, `neighbour_correlation` or `uniformity` refuses them.
    """
    latents = _check(latents)
    mean, variance = latents.mean((0, 2, 3)), latents.var((0, 2, 3), correction=0)
    distances = (latents - mean[:, None, None]).abs() / variance.sqrt()[:, None, None]
    quantiles = np.quantile(distances.numpy(), _QUANTILES).tolist()  # torch's takes 16 million numbers at most
    spectrum = power(latents)
    frequencies, spectra = radial_spectrum(spectrum)
    some = latents[choose_rows(len(latents))]
    return {
        "images": len(latents),
        "shape": list(latents.shape[1:]),
        "frequencies": frequencies.tolist(),
        "spectra": spectra.tolist(),
        "upper_half_share": float(upper_half_share(spectrum.sum(0, keepdim=True))),
        "upper_half_share_of_channels": upper_half_share(spectrum).tolist(),
        "neighbour_correlation": neighbour_correlation(latents).tolist(),
        "mean": mean.tolist(),
        "variance": variance.tolist(),
        "excess_kurtosis": excess_kurtosis(latents).tolist(),
        "quantiles": dict(zip(map(str, _QUANTILES), quantiles)),
        "uniformity_flattened": uniformity(some.flatten(1)),
        "uniformity_pooled": uniformity(some.mean((2, 3))),
    }


@torch.no_grad()
def measure_latents(codec: Codec, batches: Iterable[dict[str, Any]], size: int) -> dict[str, Any]:
    """
    Describe the latents of images by any autoencoder, the modes of its posterior if it has one.

    Args:
        codec (`Codec`): The autoencoder.
        batches (iterable of dictionaries): Batches of `EvaluationBatches`.
        size (`int`): Side of their images in pixels.

    Returns:
        The figures of `describe_latents`, and

        - `equivariance_error`: the mean squared difference of the latents of an image that is `mirrored`,
          `upside_down`, `shifted` by a cell both ways or `halved` in size from its latents after the same, over the
          variance of their channel: 0 where they are equal, about 2 where they have nothing in common; without those
          that make a size which the model cannot take;
        - `probe_accuracy`: where images have labels, the share of a random half of them whose label `linear_probe`
          finds, fitted to the others, in latents averaged to at most 4 x 4 cells; and `probe_chance`, the share of
          the commonest label among that half.

    Raises:
        ValueError: The model cannot take images of that size, there are none, or `describe_latents` refuses latents.
    """
    channels, height, width = codec.latent_shape(size)
    if min(height, width) < 2:
        raise ValueError(f"Latents of {size} x {size} pixels must have two cells or more each way.")
    cell = size // height
    blank, grid = torch.zeros(1, 3, size, size), torch.zeros(1, channels, height, width)
    changes = {}
    for name, (of_images, of_latents) in _CHANGES.items():
        with suppress(ValueError):
            rows, columns = of_images(blank, cell).shape[2:]
            if codec.latent_shape((rows, columns)) == of_latents(grid).shape[1:]:
                changes[name] = of_images, of_latents
    found: list[Tensor] = []
    labels: list[int | None] = []
    sums: dict[str, dict[str, Tensor]] = {name: {} for name in changes}
    for batch in batches:
        latents = codec.encode(batch["pixel_values"])
        found.append(latents.float().cpu())
        labels += batch["labels"]
        for name, (of_images, of_latents) in changes.items():
            changed = codec.encode(of_images(batch["pixel_values"], cell))
            add_sums(sums[name], channel_sums(changed - of_latents(latents)))
    if not found:
        raise ValueError("There were no images to take latents of.")
    latents = torch.cat(found)
    figures = describe_latents(latents)
    variance = torch.tensor(figures["variance"])
    errors = {name: float((x["squares"] / x["count"] / variance).mean()) for name, x in sums.items()}
    figures["equivariance_error"] = errors
    if None not in labels:
        cells = (min(_PROBE_CELLS, height), min(_PROBE_CELLS, width))
        features, known = F.adaptive_avg_pool2d(latents, cells).flatten(1), torch.tensor(labels)
        # At random, because data may be in the order of its labels, or name them in turn.
        fit, test = torch.randperm(len(known), generator=torch.Generator().manual_seed(0)).tensor_split(2)
        with suppress(ValueError):  # of too few images, or labels
            figures["probe_accuracy"] = linear_probe(features[fit], known[fit], features[test], known[test])
            figures["probe_chance"] = known[test].unique(return_counts=True)[1].max().item() / len(test)
    return figures
