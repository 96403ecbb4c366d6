"""One generator on the latents of a multi-scale tokenizer and on those of its single-scale twin, all else equal."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from compare_scales import DISTANCE, README, ROOT, ROWS, steps_to_reach
from latent_space import NOISE, latents_of
from latent_space import plot as plot_spaces
from latent_space import table as table_of_spaces
from measuring import describe_benchmark, fill_section, markdown_table

from hieratok_hf.cli.parsing import make_parser
from hieratok_hf.data.latent_cache import LatentCache
from hieratok_hf.evaluation.latent_statistics import describe_latents, white_noise
from hieratok_hf.utils.files import write_whole
from hieratok_hf.utils.plots import draw

RESULTS = ROOT / "benchmarks" / "results" / "compare_generation.json"
PLOT = RESULTS.with_suffix(".png")
SPACES_PLOT = RESULTS.with_name("latent_space.png")
BEGIN = "<!-- compare_generation.py --only_collect writes this -->"
SPACES_BEGIN = "<!-- compare_generation.py --only_collect writes this of latent_space.py -->"

# What decides a run's figures beside its tokenizer and seed; another value is another comparison.
SETTINGS: dict[str, Any] = {
    "image_size": 64,
    "dit": "dit-tiny",
    "dit_config": '{"num_layers": 4, "num_attention_heads": 3}',
    "steps": 2000,
    "export_every": 500,
    "batch_size": 64,
    "lr": 5e-4,
    "warmup_steps": 200,
    "ema": 0.999,
    "mixed_precision": "bf16",
    "samples": 2000,
    "sample_steps": 20,
    "sample_dtype": "bfloat16",
}


def call(name: str, arguments: list[Any], log: Path) -> None:
    """Run a command as a user would; what it prints goes to the log."""
    command = [sys.executable, "-m", "hieratok_hf", name, *map(str, arguments)]
    with log.open("a") as file:
        if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode:
            raise SystemExit(f"hieratok {name} failed; {log} says why.")


def cached(tokenizer: Path, folder: Path, data: Path, size: int) -> Path:
    """The latents of the training split, encoded unless they are there."""
    latents = folder / f"latents-{size}"
    try:
        LatentCache(latents)
    except (FileNotFoundError, ValueError):  # not begun, or not finished
        arguments = ["--model", tokenizer, "--data", data / "imagenette_128" / "train-*.tar", "--output", latents]
        call("cache", [*arguments, "--size", size, "--kind", "mode"], folder / "log.txt")
    return latents


def trained(tokenizer: Path, latents: Path, folder: Path, data: Path, seed: int, settings: dict[str, Any]) -> None:
    """Train the generator, or go on where it was interrupted."""
    if (folder / "model_index.json").exists():
        return
    arguments = ["--vae", tokenizer, "--latents", latents, "--output", folder, "--resume", "--seed", seed]
    arguments += ["--class_names", data / "imagenette_128" / "meta.json"]
    arguments += ["--size", settings["dit"], "--config", settings["dit_config"]]
    for name in ("steps", "export_every", "batch_size", "lr", "warmup_steps", "ema", "mixed_precision"):
        arguments += [f"--{name}", settings[name]]
    arguments += ["--sample_every", settings["steps"], "--save_every", min(500, settings["export_every"])]
    call("train-dit", arguments, folder / "log.txt")


def evaluated(folder: Path, data: Path, batch_size: int, settings: dict[str, Any]) -> None:
    """Measure each pipeline that the training left."""
    for step in range(settings["export_every"], settings["steps"] + 1, settings["export_every"]):
        path = folder / f"evaluation-{step:09d}.json"
        if path.exists():
            continue
        vision = data / "mobilenet_v2_1.0_224"
        arguments = ["--model", folder / f"pipeline-{step:09d}", "--json", path, "--samples", settings["samples"]]
        arguments += ["--steps", settings["sample_steps"], "--batch_size", batch_size]
        # Of these tokenizers and steps, guidance would hide what the generator has not learned.
        arguments += ["--guidance_scale", 1, "--seed", 0]
        # The split that it was trained on, as is usual for FID: that is the distribution which it is to have learned,
        # and the larger set is the steadier one.
        arguments += ["--reference", data / "imagenette_128" / "train-*.tar"]
        arguments += ["--fid_model", vision, "--fid_size", settings["image_size"]]
        arguments += ["--dtype", settings["sample_dtype"]]
        if step == settings["steps"]:  # the classifier takes longer than all else
            arguments += ["--classifier", vision]
        call("evaluate-generation", arguments, folder / "log.txt")


def run(name: str, twin: str, seed: int, args: argparse.Namespace) -> None:
    """All stages of one row and seed, but for those whose results are there."""
    tokenizer, folder = args.tokenizers / name, args.output / name / f"seed-{seed}"
    if not (tokenizer / "config.json").exists():
        row, _, tokenizer_seed = name.rpartition("-")
        command = f"benchmarks/compare_scales.py --in_process --rows {row} --seeds {tokenizer_seed}"
        raise SystemExit(f"There is no tokenizer in {tokenizer}: {command} --output {args.tokenizers} trains it.")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {key: getattr(args, key) for key in SETTINGS}
    facts = {"tokenizer": name, "twin": twin, "seed": seed, "settings": settings}
    if (path := folder / "settings.json").exists() and json.loads(path.read_text()) != facts:
        raise SystemExit(f"{path} is of other settings: take another --output, or remove {folder}.")
    with write_whole(path) as file:
        file.write((json.dumps(facts, indent=1) + "\n").encode())
    latents = cached(tokenizer, folder.parent, args.data, args.image_size)
    trained(tokenizer, latents, folder, args.data, seed, settings)
    evaluated(folder, args.data, args.sample_batch_size, settings)


def finished(folder: Path) -> dict[str, Any] | None:
    """The figures of a run, `None` while an evaluation is missing."""
    facts = json.loads((folder / "settings.json").read_text())
    reports = {int(path.stem.split("-")[1]): json.loads(path.read_text()) for path in folder.glob("evaluation-*.json")}
    if len(reports) < facts["settings"]["steps"] // facts["settings"]["export_every"]:
        return None
    curve = [{"step": step, DISTANCE: reports[step][DISTANCE]} for step in sorted(reports)]
    last = reports[curve[-1]["step"]]
    facts |= {name: last[name] for name in ("class_accuracy", "top1_accuracy", "reference_images")}
    return {**facts, "curve": curve}


def recorded() -> dict[str, Any]:
    """Read the results that are there already."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}, "latent_spaces": {}}


def reached(mine: dict[str, Any], other: dict[str, Any]) -> tuple[str, str]:
    """Where a curve comes down to the twin's last value, and how many times as many steps the twin took."""
    curve, distance, last = mine["curve"], other["curve"][-1][DISTANCE], other["curve"][-1]["step"]
    # Before the first point nothing was measured.
    if curve[0][DISTANCE] <= distance:
        return f"at most {curve[0]['step']}", f"{last / curve[0]['step']:.2f}x or more"
    step = steps_to_reach(curve, distance)
    return ("not", "none") if step is None else (f"{step:.0f}", f"{last / step:.2f}x")


def table(runs: dict[str, dict[str, Any]]) -> str:
    """A row for each tokenizer, its seeds' figures side by side, in Markdown."""
    steps = [point["step"] for point in next(iter(runs.values()))["curve"]] if runs else []
    after = " | ".join(f"{DISTANCE} after {step} steps" if not i else f"{step}" for i, step in enumerate(steps))
    heads = [after] if after else []
    heads += ["against its twin", "steps to the twin's last", "steps of the twin over these"]
    rows = []
    for name in dict.fromkeys(run["tokenizer"] for run in runs.values()):
        own = [run for run in runs.values() if run["tokenizer"] == name]
        ratios, steps_taken, gains = [], [], []
        for mine in own:
            other = runs.get(f"{mine['twin']}/seed-{mine['seed']}")
            if other is None or mine["twin"] == name:
                continue
            ratios.append(f"{100 * (mine['curve'][-1][DISTANCE] / other['curve'][-1][DISTANCE] - 1):+.1f} %")
            for cells, value in zip((steps_taken, gains), reached(mine, other)):
                cells.append(value)
        distances = [", ".join(f"{run['curve'][i][DISTANCE]:.1f}" for run in own) for i in range(len(steps))]
        accuracy = ", ".join(f"{100 * run['class_accuracy']:.1f}" for run in own)
        cells = [f"`{name}`", ROWS[name.rpartition("-")[0]][0], *distances]
        cells += [", ".join(ratios), ", ".join(steps_taken), ", ".join(gains), accuracy]
        rows.append(cells)
    return markdown_table(f"| {' | '.join(['tokenizer', '', *heads, 'class accuracy, %'])} |", rows)


def plot(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """The distance over the steps: one colour a tokenizer, one kind of line a seed."""
    names = list(dict.fromkeys(run["tokenizer"] for run in runs.values()))
    seeds = sorted({run["seed"] for run in runs.values()})
    with draw(path, figsize=(7, 4.5)) as (_, (axis,)):
        for run in runs.values():
            style = {"color": f"C{names.index(run['tokenizer'])}", "marker": "o"}
            style["linestyle"] = ["-", "--", ":", "-."][seeds.index(run["seed"]) % 4]
            points = [(point["step"], point[DISTANCE]) for point in run["curve"]]
            axis.plot(*zip(*points), label=f"{run['tokenizer']}, seed {run['seed']}", **style)
        steps = sorted({point["step"] for run in runs.values() for point in run["curve"]})
        axis.set(xlabel="steps of the generator", title=f"{DISTANCE} of samples, lower is better", xticks=steps)
        axis.grid(alpha=0.3)
        axis.legend()


def sections(results: dict[str, Any]) -> dict[str, str]:
    """Compose the sections of README.md, by the markers that they follow."""
    caption = f"{DISTANCE} of the samples over the steps of the generator"
    parts = {BEGIN: f"{table(results['runs'])}\n\n![{caption}](results/{PLOT.name})"}
    if results["latent_spaces"]:
        caption = "Spectra of the latents, and a t-SNE of those of each tokenizer"
        image = f"![{caption}](results/{SPACES_PLOT.name})"
        parts[SPACES_BEGIN] = f"{table_of_spaces(results['latent_spaces'])}\n\n{image}"
    return parts


def collect(args: argparse.Namespace) -> None:
    """Add what has finished to the results, and write tables and plots of all of them."""
    results = recorded()
    runs = results["runs"]
    for path in sorted(args.output.glob("*/seed-*/settings.json")):
        if (found := finished(path.parent)) is not None:
            runs[f"{found['tokenizer']}/seed-{found['seed']}"] = found
    if not runs:
        raise SystemExit(f"Nothing has finished in {args.output}, and nothing is recorded in {RESULTS}.")
    if len({json.dumps(run["settings"], sort_keys=True) for run in runs.values()}) > 1:
        raise SystemExit(f"The runs of {args.output} and those of {RESULTS} are of several settings.")
    size = next(iter(runs.values()))["settings"]["image_size"]
    # Pairs follow each other, each led by its twin.
    order = {name: (run["twin"], run["twin"] != run["tokenizer"], name) for name, run in runs.items()}
    runs = {name: runs[name] for name in sorted(runs, key=order.__getitem__)}
    folders = {name: args.output / name / f"latents-{size}" for name in args.pair}
    spaces = results["latent_spaces"]
    # Whose run has finished, its cache has, unless it was removed since.
    done = {run["tokenizer"] for run in runs.values()}
    if all(name in done and folder.exists() for name, folder in folders.items()):
        spaces = {name: describe_latents(latents_of(folder)[0]) for name, folder in folders.items()}
        spaces[NOISE] = describe_latents(white_noise(tuple(spaces[args.pair[0]]["shape"])))
        images = {name: latents_of(folder, some=True) for name, folder in folders.items()}
        classes = json.loads((args.data / "imagenette_128" / "meta.json").read_text())["classes"]
        plot_spaces(spaces, images, classes, SPACES_PLOT)
    results = {"machine": describe_benchmark(torch.device("cpu")), "runs": runs, "latent_spaces": spaces}
    plot(runs, PLOT)
    text = README.read_text()
    for begin, content in sections(results).items():
        text = fill_section(text, begin, content)
        print(content)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    README.write_text(text)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    add("--tokenizers", type=Path, default=ROOT / "runs" / "compare_scales", help="the --output of compare_scales.py")
    add("--output", type=Path, default=ROOT / "runs" / "compare_generation", help="folder for the runs")
    pair, seed_help = ("single", "learned"), "seed of the tokenizers, which all generators share"
    add("--pair", nargs=2, choices=ROWS, metavar=("SINGLE", "MULTI"), default=pair, help="rows of compare_scales.py")
    add("--tokenizer_seed", type=int, default=0, help=seed_help)
    add("--rows", nargs="+", choices=("single", "multi"), default=("single", "multi"), help="rows of the pair to run")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="seeds of the generators")
    add("--only_collect", action="store_true", help="run nothing; add what has finished to the results")
    memory = "images that are made and judged at a time; they do not depend on it"
    add("--sample_batch_size", type=int, default=50, help=memory)
    for name, value in SETTINGS.items():
        add(f"--{name}", type=type(value), default=value, help=f"{name} of every run")
    args = parser.parse_args(argv)
    args.pair = [f"{row}-{args.tokenizer_seed}" for row in args.pair]
    if args.export_every < 1 or args.steps % args.export_every:
        parser.error(f"--steps must be a multiple of --export_every, got {args.steps} and {args.export_every}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.only_collect:
        collect(args)
        return 0
    for seed in args.seeds:
        for name in (args.pair[("single", "multi").index(row)] for row in args.rows):
            if f"{name}/seed-{seed}" in recorded()["runs"]:
                print(f"{name}, seed {seed}: recorded in {RESULTS} already")
            else:
                run(name, args.pair[0], seed, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
