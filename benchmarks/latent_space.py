"""Describe a latent space: spectra, neighbours, variances, uniformity on the sphere (arXiv 2005.10242), t-SNE."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import draw, markdown_table
from torch import Tensor

from hieratok_hf.cli.parsing import make_parser
from hieratok_hf.data.latent_cache import LatentCache
from hieratok_hf.utils.files import write_whole

# Shape letters: N images, C latent channels, h w the latent's grid, D numbers of a vector, R rings of frequencies.

IMAGES = 2000
"""Of the t-SNE and of uniformity, which looks at all pairs."""
NOISE = "white noise"


def checked(latents: Tensor) -> Tensor:
    """Latents in float64; `ValueError` unless they are `(N, C, h, w)`, finite, and vary in every channel."""
    if latents.ndim != 4 or 0 in latents.shape:
        raise ValueError(f"`latents` must have shape (N, C, h, w) and not be empty, got {tuple(latents.shape)}.")
    latents = latents.double()
    if not latents.isfinite().all():
        raise ValueError("`latents` must be finite.")
    spread = latents.amax((0, 2, 3)) - latents.amin((0, 2, 3))
    if not (spread > 0).all():
        raise ValueError(f"`latents` must vary in every channel, {int(spread.argmin())} does not.")
    return latents


def cosines(size: int) -> Tensor:
    """The orthonormal DCT-II `(size, size)`, a row for each frequency: `k` of them are `k / 2` periods."""
    steps = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(torch.pi / size * steps[:, None] * (steps + 0.5)) * (2 / size) ** 0.5
    matrix[0] /= 2**0.5
    return matrix


def power(latents: Tensor) -> Tensor:
    """Mean energy `(C, h, w)` in float64 of each frequency of latents `(N, C, h, w)`, less each channel's mean."""
    # A grid of latents is not periodic: the DFT would take the step from border to border for high frequencies, and
    # a Hann window, its remedy, would hide half of a grid of 8 cells. The DCT mirrors at the border instead.
    latents = checked(latents)
    latents = latents - latents.mean((0, 2, 3), keepdim=True)
    height, width = latents.shape[2:]
    return (cosines(height) @ latents @ cosines(width).T).square().mean(0)


def radii(height: int, width: int) -> Tensor:
    """How high each frequency of `power` is `(h, w)`: 1 is Nyquist's along one side, where neighbours alternate."""
    rows, columns = (torch.arange(size, dtype=torch.float64) / size for size in (height, width))
    return (rows[:, None].square() + columns.square()).sqrt()


def radial_spectrum(spectrum: Tensor) -> tuple[Tensor, Tensor]:
    """Give the mean of `radii` in each ring `(R,)`, rising, and the mean of `power` in it `(C, R)`."""
    size = spectrum.shape[1:]
    distance = radii(*size).flatten()
    rings = (distance * min(size)).round().long()
    counts = torch.bincount(rings).double()
    sums = torch.zeros(len(spectrum), len(counts), dtype=torch.float64).index_add_(1, rings, spectrum.flatten(1))
    return torch.bincount(rings, distance) / counts, sums / counts


def upper_half_share(spectrum: Tensor) -> Tensor:
    """Share of the energy `(C,)` at `radii` of a half and more; of white noise that of the frequencies there."""
    upper = radii(*spectrum.shape[1:]) >= 0.5
    return spectrum[:, upper].sum(1) / spectrum.sum((1, 2))


def neighbour_correlation(latents: Tensor) -> Tensor:
    """Correlation `(C,)` of cells side by side and one above the other, over all images; the mean of both ways."""
    latents = checked(latents)
    if min(latents.shape[2:]) < 2:
        raise ValueError(f"`latents` must have neighbours both ways, got the grid {tuple(latents.shape[2:])}.")
    latents = latents - latents.mean((0, 2, 3), keepdim=True)
    across, down = latents[..., 1:] * latents[..., :-1], latents[..., 1:, :] * latents[..., :-1, :]
    return (across.mean((0, 2, 3)) + down.mean((0, 2, 3))) / 2 / latents.square().mean((0, 2, 3))


def excess_kurtosis(latents: Tensor) -> Tensor:
    """Compute the excess kurtosis of each channel `(C,)`: 0 of a normal distribution, -1.2 of a uniform one."""
    values = checked(latents).transpose(0, 1).flatten(1)
    values = values - values.mean(1, keepdim=True)
    return values.pow(4).mean(1) / values.square().mean(1).square() - 3


def uniformity(vectors: Tensor, t: float = 2.0) -> float:
    """
    How evenly directions `(N, D)` cover the sphere: `log E exp(-t |x - y|^2)` over all pairs (Wang and Isola, 2020).

    It is 0 where all are one, and lower where they are more uniform; uniform ones of many dimensions give `-2 t`.
    """
    if vectors.ndim != 2 or len(vectors) < 2:
        raise ValueError(f"`vectors` must have shape (N, D) with N of 2 or more, got {tuple(vectors.shape)}.")
    vectors = vectors.double()
    lengths = vectors.norm(dim=1, keepdim=True)
    if not (lengths > 0).all():
        raise ValueError("`vectors` must not be zero, which has no direction.")
    distances = torch.pdist(vectors / lengths)
    return float(distances.square().mul(-t).exp().mean().log())


def figures(latents: Tensor) -> dict[str, Any]:
    """All of the above of latents `(N, C, h, w)`, ready for JSON; uniformity is that of `chosen` ones."""
    latents = checked(latents)
    spectrum = power(latents)
    frequencies, spectra = radial_spectrum(spectrum)
    some = latents[chosen(len(latents))]
    return {
        "images": len(latents),
        "shape": list(latents.shape[1:]),
        "frequencies": frequencies.tolist(),
        "spectra": spectra.tolist(),
        "upper_half_share": float(upper_half_share(spectrum.sum(0, keepdim=True))),
        "upper_half_share_of_channels": upper_half_share(spectrum).tolist(),
        "neighbour_correlation": neighbour_correlation(latents).tolist(),
        "variance": latents.var((0, 2, 3), correction=0).tolist(),
        "excess_kurtosis": excess_kurtosis(latents).tolist(),
        "uniformity_flattened": uniformity(some.flatten(1)),
        "uniformity_pooled": uniformity(some.mean((2, 3))),
    }


def chosen(count: int, most: int = IMAGES) -> Tensor:
    """Numbers of at most so many images, the same ones of every cache of the same images."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most].sort().values


def white_noise(shape: tuple[int, ...]) -> Tensor:
    """Compute the figures of latents without any structure."""
    return torch.randn(IMAGES, *shape, generator=torch.Generator().manual_seed(0))


def embedded(latents: Tensor) -> np.ndarray:
    """A t-SNE `(N, 2)` of flattened latents `(N, C, h, w)`; pooled ones would be few numbers and no shapes."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(latents) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(latents.flatten(1).numpy())


def table(spaces: dict[str, dict[str, Any]]) -> str:
    """A row for each latent space in Markdown."""
    head = (
        "| latents of | energy in the upper half of the frequencies | correlation of neighbours | variance of the "
        "channels, least and largest | their ratio | excess kurtosis | uniformity, flattened | pooled |"
    )
    rows = []
    for name, space in spaces.items():
        keys = ("variance", "neighbour_correlation", "excess_kurtosis")
        variance, correlation, kurtosis = (space[key] for key in keys)
        cells = [
            f"`{name}`" if name != NOISE else name,
            f"{100 * space['upper_half_share']:.1f} %",
            f"{sum(correlation) / len(correlation):.2f}",
            f"{min(variance):.2f}, {max(variance):.2f}",
            f"{max(variance) / min(variance):.2f}",
            f"{sum(kurtosis) / len(kurtosis):.2f}",
            f"{space['uniformity_flattened']:.2f}",
            f"{space['uniformity_pooled']:.2f}",
        ]
        rows.append(cells)
    return markdown_table(head, rows)


def plot(
    spaces: dict[str, dict[str, Any]], images: dict[str, tuple[Tensor, Tensor]], classes: list[str], path: Path
) -> None:
    """Spectra of all spaces, and beside them a t-SNE of latents `(N, C, h, w)` by their labels `(N,)`."""
    styles: dict[str, Any] = {NOISE: {"color": "grey", "linestyle": ":"}}
    for i, name in enumerate(name for name in spaces if name != NOISE):
        styles[name] = {"color": f"C{i}", "marker": ".ox^"[i % 4], "markersize": 4}
    panels = len(images) + 1
    with draw(path, panels, figsize=(5 * panels, 5.4)) as (figure, (first, *others)):
        for name, space in spaces.items():
            for channel, spectrum in enumerate(space["spectra"]):
                # Shares of the variance, so that spaces of other scales lie beside each other.
                values = [x / space["variance"][channel] for x in spectrum]
                label = None if channel else name
                first.semilogy(space["frequencies"], values, alpha=0.8, label=label, **styles[name])
        first.axvline(0.5, color="grey", linewidth=0.8)
        first.set(title="power over the channel's variance, a line a channel")
        first.set(xlabel="frequency over that of alternating cells")
        first.grid(alpha=0.3)
        first.legend()
        for axis, (name, (latents, labels)) in zip(others, images.items()):
            points = embedded(latents)
            for label, title in enumerate(classes):
                mine = points[(labels == label).numpy()]
                axis.scatter(*mine.T, s=6, color=f"C{label % 10}", label=title.replace("_", " "))
            axis.set(title=f"{name}: t-SNE of {len(latents)} latents", xticks=[], yticks=[])
        if others:
            handles = others[0].get_legend_handles_labels()
            figure.legend(*handles, loc="outside lower right", ncols=5, markerscale=2.5)


def latents_of(folder: Path, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Latents `(N, C, h, w)` and labels `(N,)` of a cache, of all its images or of `chosen` ones, unmirrored."""
    cache = LatentCache(folder)
    return cache.batch(torch.arange(len(cache)) if most is None else chosen(len(cache), most))


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("caches", type=Path, nargs="+", help="folders of hieratok cache, of one data set")
    add("--names", nargs="+", help="a name for each cache; its folder's unless given")
    add("--classes", type=Path, help="a JSON file with the classes' names under 'classes'")
    add("--plot", type=Path, help="a PNG file to write")
    add("--json", type=Path, help="a file for all figures")
    args = parser.parse_args(argv)
    names = args.names or [folder.name for folder in args.caches]
    if len(set(names)) != len(names) or len(names) != len(args.caches):
        parser.error(f"there must be a name of its own for each cache, got {names}")
    folders = dict(zip(names, args.caches))
    spaces = {name: figures(latents_of(folder)[0]) for name, folder in folders.items()}
    spaces[NOISE] = figures(white_noise(tuple(spaces[names[0]]["shape"])))
    if args.json:
        with write_whole(args.json) as file:
            file.write((json.dumps(spaces, indent=1) + "\n").encode())
    if args.plot:
        images = {name: latents_of(folder, IMAGES) for name, folder in folders.items()}
        count = 1 + max(int(labels.max()) for _, labels in images.values())
        classes = json.loads(args.classes.read_text())["classes"] if args.classes else list(map(str, range(count)))
        plot(spaces, images, classes, args.plot)
    print(table(spaces))
    return 0


if __name__ == "__main__":
    sys.exit(main())
