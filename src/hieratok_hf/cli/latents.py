"""Describe the latents that autoencoders make of images: a table, all figures as JSON, and a plot."""

import io
import math
from argparse import Namespace
from importlib.util import find_spec
from typing import Any

from datasets import disable_progress_bars as disable_data_progress_bars
from tqdm import tqdm

from ..data.image_dataset import load_images
from ..evaluation.latent_statistics import describe_latents, measure_latents, white_noise
from ..evaluation.reconstruction import EvaluationBatches
from ..models.autoencoder_adapter import Codec, load_codec
from ..utils.extras import missing_extra
from ..utils.plots import draw
from .command_line import check_memory, describe_machine, find_device, find_size, load_or_explain
from .main import parse
from .outputs import check_writable, identify, write_or_explain, write_report
from .terminal import Problem, align_table, one_line, run_script

NOISE = "white noise"


def cells(figures: dict[str, Any]) -> dict[str, str]:
    """The figures of a model in the table, by name; what it lacks is missing."""
    quantiles, std = figures["quantiles"], [math.sqrt(variance) for variance in figures["variance"]]
    kurtosis, correlation = (figures[name] for name in ("excess_kurtosis", "neighbour_correlation"))
    column = {
        "latent": "x".join(map(str, figures["shape"])),
        "largest |mean|": f"{max(map(abs, figures['mean'])):.3f}",
        "std": f"{min(std):.3f} ... {max(std):.3f}",
        "excess kurtosis": f"{sum(kurtosis) / len(kurtosis):.2f}",
        "99 % of |z - mean| / std are below": f"{quantiles['0.99']:.2f}",
        "99.9 % are below": f"{quantiles['0.999']:.2f}",
        "the largest is": f"{quantiles['1.0']:.2f}",
        "power in the upper half of the frequencies, %": f"{100 * figures['upper_half_share']:.1f}",
        "correlation of neighbours": f"{sum(correlation) / len(correlation):.2f}",
        "uniformity, flattened": f"{figures['uniformity_flattened']:.2f}",
        "uniformity, pooled": f"{figures['uniformity_pooled']:.2f}",
    }
    for name, error in figures.get("equivariance_error", {}).items():
        column[f"error when {name.replace('_', ' ')}, % of the variance"] = f"{100 * error:.1f}"
    if "probe_accuracy" in figures:
        column["linear probe, %"] = f"{100 * figures['probe_accuracy']:.1f}"
        column["commonest label, %"] = f"{100 * figures['probe_chance']:.1f}"
    return column


def table(spaces: dict[str, dict[str, Any]]) -> str:
    """A line a figure, a column a model."""
    columns = [cells(figures) for figures in spaces.values()]
    # A model may lack a figure that another has.
    names = list(dict.fromkeys(name for column in sorted(columns, key=len, reverse=True) for name in column))
    return align_table([["", *spaces], *([name, *(column.get(name, "-") for column in columns)] for name in names)])


def plot(spaces: dict[str, dict[str, Any]]) -> bytes:
    """A PNG file of the spectra, the tails and the errors of equivariance of all models."""
    content = io.BytesIO()
    errors = {name: space["equivariance_error"] for name, space in spaces.items() if name != NOISE}
    changes = list(dict.fromkeys(change for mine in errors.values() for change in mine))
    width = 0.8 / len(errors)
    with draw(content, 3, figsize=(15, 5)) as (figure, (spectrum, tail, bars)):
        for i, (name, space) in enumerate(spaces.items()):
            style: dict[str, Any] = {"color": f"C{i}", "marker": ".ox^"[i % 4], "markersize": 4, "label": name}
            if name == NOISE:
                style |= {"color": "grey", "linestyle": ":", "marker": ""}
            shares = [[x / variance for x in ring] for ring, variance in zip(space["spectra"], space["variance"])]
            spectrum.semilogy(space["frequencies"], [sum(ring) / len(ring) for ring in zip(*shares)], **style)
            shares_beyond = [(at, 1 - float(share)) for share, at in space["quantiles"].items() if float(share) < 1]
            tail.semilogy(*zip(*shares_beyond), **style)
            for change, error in errors.get(name, {}).items():
                place = changes.index(change) + (i - (len(errors) - 1) / 2) * width
                bars.bar(place, 100 * error, width, color=style["color"])
        spectrum.axvline(0.5, color="grey", linewidth=0.8)
        spectrum.set(title="power over the channel's variance", xlabel="frequency over that of alternating cells")
        tail.set(title="share of numbers farther from their channel's mean", xlabel="standard deviations")
        bars.set(title="error of equivariance, % of the variance", yscale="log")
        bars.set_xticks(range(len(changes)), [change.replace("_", " ") for change in changes])
        for axis in (spectrum, tail, bars):
            axis.grid(alpha=0.3)
        figure.legend(*spectrum.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return content.getvalue()


def run(args: Namespace) -> list[str]:
    """Measure, write the files, and return the lines to print."""
    if args.plot and not find_spec("matplotlib"):
        raise missing_extra("--plot", "matplotlib")
    for option in ("json", "plot"):
        if path := getattr(args, option):
            check_writable(f"--{option}", path, overwrite=args.overwrite, inputs=identify(args.data))
    device = find_device(args)
    # All of them before any work, so that a wrong name is told at once.
    codecs: dict[str, Codec] = {args.model: load_or_explain(load_codec, "--model", args.model, device)}
    codecs |= {name: load_or_explain(load_codec, "--compare", name, device) for name in args.compare}
    args.size = size = find_size(args, codecs[args.model])
    images = load_or_explain(load_images, "--data", args.data, split=args.split, streaming=args.streaming)
    batches = EvaluationBatches(images, size, args.batch_size, limit=args.max_images)
    count = args.max_images if images.streaming else min(args.max_images, len(images))

    spaces: dict[str, dict[str, Any]] = {}
    notes = []
    for name, codec in codecs.items():
        try:
            # In float64, and as much again for each of what is computed of them at a time.
            check_memory("--max_images", 4 * 8 * count * math.prod(codec.latent_shape(size)))
            with tqdm(batches, desc=name, unit="batch", leave=False) as shown:
                spaces[name] = measure_latents(codec, shown, size)
        except ValueError as error:
            raise Problem(f"{name!r} cannot be measured on {images.source}: {one_line(error)}") from error
        if "probe_accuracy" not in spaces[name]:
            notes.append(f"the probe of {name!r} was left out: it needs 20 images of two labels or more")
    noise = describe_latents(white_noise(tuple(spaces[args.model]["shape"])))
    shown_spaces = {**spaces, NOISE: noise}
    if args.json:
        report = {"settings": vars(args), "machine": describe_machine(device), "notes": notes}
        models = [
            {"model": name, "class": type(codecs[name].model).__name__, **codecs[name].statistics, **figures}
            for name, figures in spaces.items()
        ]
        write_report(args.json, {**report, "skipped": batches.skipped, "models": models, "white_noise": noise})
    if args.plot:
        write_or_explain("--plot", args.plot, plot(shown_spaces))
    title = f"{spaces[args.model]['images']} images of {images.source} at {size} x {size} pixels, "
    title += "mode of the posterior, float32"
    skipped = [f"skipped: {reason}" for reason in batches.skipped.values()]
    return [title, table(shown_spaces), *(f"note: {note}" for note in notes), *skipped]


def main(argv: list[str] | None = None) -> int:
    args = parse("latents", argv)
    disable_data_progress_bars()
    return run_script(run, args)
