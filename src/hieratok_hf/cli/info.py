"""Describe a model, latents or a file, and what a folder has and lacks for each library."""

from argparse import Namespace
from collections.abc import Iterable
from typing import Any

from ..hub.describe import Facts, describe
from .outputs import check_writable, identify, write_report
from .terminal import Problem, align_table, one_line, run_script

__all__ = ["main", "run", "show"]

_LONGEST = 100  # characters of a value in a line


def show(facts: Facts) -> list[str]:
    """Lay out in lines what `describe` has found."""
    is_elsewhere = facts["place"] not in (None, facts["name"])
    lines = [f"{facts['name']}: {facts['kind']}" + (f", in {facts['place']}" if is_elsewhere else "")]
    lines += [facts["note"]] if "note" in facts else []
    if "parts" in facts:
        rows: list[tuple[str, ...]] = [("part", "class", "library", "numbers", "dtype")]
        for name, part in facts["parts"].items():
            weights: Facts = next(iter(part.get("weights", {}).values()), {"numbers": None, "dtypes": ["-"]})
            numbers = "-" if weights["numbers"] is None else _millions(weights["numbers"])
            rows += [(name, part["kind"], part["library"], numbers, ", ".join(weights["dtypes"]))]
        lines += ["", align_table(rows)]
    if "classes" in facts:
        lines += ["", f"{len(facts['classes'])} classes: {_text(', '.join(map(str, facts['classes'])))}"]
    described: Facts = {"": facts, **facts.get("parts", {})}
    for name, part in described.items():
        if not name or "image" in part:
            lines += [*(["", f"{name}:"] if name else []), *_show_model(part)]
    if "tensors" in facts:
        rows = [(name, _by(tensor["shape"]), tensor["dtype"]) for name, tensor in facts["tensors"].items()]
        lines += ["", align_table([("tensor", "shape", "dtype"), *rows])]
    libraries = [
        (library, "; ".join(f"{verb} {', '.join(files)}" for verb, files in found.items() if files))
        for library, found in facts.get("libraries", {}).items()
    ]
    for pairs in (_tell_latents(facts), _tell_training(facts.get("training", {})), libraries):
        lines += ["", *_align(pairs)] if pairs else []
    return lines


def _show_model(facts: Facts) -> list[str]:
    """Lay out sizes, statistics, weights and levels, and the table of scales."""
    config, pairs = facts.get("configuration", {}), []
    if "image" in facts:
        total, encoder, decoder = (_millions(facts["parameters"][name]) for name in ("total", "encoder", "decoder"))
        pairs += [("patch size", f"{config['patch_size']}x{config['patch_size']} pixels")]
        pairs += [("scale factors", f"{', '.join(map(str, config['scale_factors']))}; {config['downsampling']}")]
        pairs += [("parameters", f"{total}: encoder {encoder}, decoder {decoder}")]
    else:
        pairs += [(name, _text(value)) for name, value in config.items()]
    if statistics := facts.get("statistics"):
        pairs += [("statistics", ", ".join(f"{name} {_text(value)}" for name, value in statistics.items()))]
    for name, weights in facts.get("weights", {}).items():
        size, files = sum(weights["files"].values()), len(weights["files"])
        numbers = f"{_millions(weights['numbers'])} numbers in {weights['num_tensors']} tensors"
        told = [numbers, *weights["dtypes"]] if weights["num_tensors"] else ["a pickle, which is not opened"]
        pairs += [(name, ", ".join([*told, f"{size / 1e6:.1f} MB" + (f" in {files} files" if files > 1 else "")]))]
    if levels := facts.get("levels"):
        pairs += [("levels", f"{levels['channels']} channels, for {levels['bits'][0]} to {levels['bits'][-1]} bits")]
    lines = ["", *_align(pairs)] if pairs else []
    if "image" in facts:
        image, scales = facts["image"], facts["image"]["scales"]
        rows: list[tuple[str, ...]] = [(f"latent {_by(image['latent'])}", "image", "tokens", "GFLOP")]
        rows += [("encode", _by(image["size"]), str(scales[-1]["tokens"]), _billions(image["encode_flops"]))]
        for count, scale in enumerate(scales, 1):
            sides, tokens, flops = scale["image"], scale["tokens"], scale["decode_flops"]
            rows += [(f"decode {count} of {len(scales)} scales", _by(sides), str(tokens), _billions(flops))]
        lines += ["", align_table(rows)]
    return lines


def _tell_latents(facts: Facts) -> list[tuple[str, str]]:
    """Tell the entries of a manifest, a list of objects by one line each, and how many shards there are."""
    pairs = []
    for name, value in facts.get("manifest", {}).items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            pairs += [(name, _text(item)) for item in value]
        else:
            pairs += [(name, _text(value))]
    if shards := facts.get("shards"):
        wanted = "?" if shards["wanted"] is None else shards["wanted"]
        end = "" if shards["there"] == wanted else ": unfinished"
        pairs += [("shards", f"{shards['there']} of {wanted}, {shards['bytes'] / 1e6:.1f} MB{end}")]
    return pairs


def _tell_training(training: Facts) -> list[tuple[str, str]]:
    states = [(name, f"state of {size / 1e6:.1f} MB") for name, size in training.get("states", {}).items()]
    records = ((name, training[name]) for name in ("losses", "validation") if name in training)
    return states + [
        (f"last {name}", ", ".join(f"{key} {_text(value)}" for key, value in record.items()))
        for name, record in records
    ]


def _align(pairs: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in pairs)
    return [f"{name:{width}}  {value}" for name, value in pairs]


def _by(sides: Iterable[int]) -> str:
    return "x".join(map(str, sides))


def _millions(numbers: int) -> str:
    return f"{numbers / 1e6:.1f} M" if numbers >= 1e5 else str(numbers)


def _billions(operations: int | None) -> str:
    return "-" if operations is None else f"{operations / 1e9:.2f}"


def _text(value: Any) -> str:
    """Write a value in a line: a fraction with five digits, and what is long without its end."""
    if isinstance(value, dict):
        text = ", ".join(f"{name} {_text(item)}" for name, item in value.items())
    elif isinstance(value, list):
        text = ", ".join(map(_text, value))
    else:
        text = f"{value:.5g}" if isinstance(value, float) else " ".join(str(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def run(args: Namespace) -> list[str]:
    """Describe `args.what`, and write what there is to say to `args.json` as well, where that is given."""
    if args.json is not None:
        inputs = identify([args.what, f"{args.what}/*"])
        check_writable("--json", args.json, overwrite=args.overwrite, inputs=inputs)
    try:
        facts = describe(args.what, args.size)
        lines = show(facts)
    except (OSError, ValueError) as error:
        raise Problem(one_line(error)) from error
    except (ArithmeticError, RecursionError) as error:
        raise Problem(f"{args.what!r} holds values that cannot be shown: {one_line(error)}") from error
    if args.json is not None:
        write_report(args.json, facts)
    return lines


def main(argv: list[str] | None = None) -> int:
    from .main import parse

    return run_script(run, parse("info", argv))
