"""Describe a latent space: spectra, neighbours, variances, uniformity on the sphere (arXiv 2005.10242), t-SNE."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import markdown_table
from torch import Tensor

from hieratok_hf.cli.parsing import make_parser
from hieratok_hf.data.latent_cache import LatentCache
from hieratok_hf.evaluation.latent_statistics import choose_rows, describe_latents, white_noise
from hieratok_hf.utils.files import write_whole
from hieratok_hf.utils.plots import draw

# Shape letters: N images, C latent channels, h w the latent's grid.

NOISE = "white noise"


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


def latents_of(folder: Path, some: bool = False) -> tuple[Tensor, Tensor]:
    """Latents `(N, C, h, w)` and labels `(N,)` of a cache, of all its images or of `choose_rows`, unmirrored."""
    cache = LatentCache(folder)
    return cache.batch(choose_rows(len(cache)) if some else torch.arange(len(cache)))


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
    spaces = {name: describe_latents(latents_of(folder)[0]) for name, folder in folders.items()}
    spaces[NOISE] = describe_latents(white_noise(tuple(spaces[names[0]]["shape"])))
    if args.json:
        with write_whole(args.json) as file:
            file.write((json.dumps(spaces, indent=1) + "\n").encode())
    if args.plot:
        images = {name: latents_of(folder, some=True) for name, folder in folders.items()}
        count = 1 + max(int(labels.max()) for _, labels in images.values())
        classes = json.loads(args.classes.read_text())["classes"] if args.classes else list(map(str, range(count)))
        plot(spaces, images, classes, args.plot)
    print(table(spaces))
    return 0


if __name__ == "__main__":
    sys.exit(main())
