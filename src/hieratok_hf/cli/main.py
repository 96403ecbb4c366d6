"""The command `hieratok`: find what is asked for, and load it only to run it."""

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

from ..utils.extras import EXTRAS, missing_extra
from .arguments import generation, images, latents, training, weights
from .parsing import Parser, make_parser
from .terminal import complain, end, suit_terminal

__all__ = ["COMMANDS", "main", "parse"]


class Command(NamedTuple):
    """Hold what there is to know of a command before it runs; its module is that of its name."""

    group: str
    summary: str
    add_arguments: Callable[[Parser], None]
    needs_torch: bool = True


COMMANDS = {
    "reconstruct": Command(
        "Images", "Encode images and decode them again: a sheet with every scale, and figures.", images.add_reconstruct
    ),
    "evaluate": Command(
        "Images", "Evaluate a tokenizer beside other autoencoders on the same images.", images.add_evaluate
    ),
    "app": Command("Images", "Serve a page to try tokenizer and generator in a browser.", images.add_app),
    "encode": Command("Latents", "Encode a folder of images to an archive of latents.", latents.add_encode),
    "fit-quantizer": Command(
        "Latents", "Fit the levels by which latents become integers to training images.", latents.add_fit_quantizer
    ),
    "decode": Command("Latents", "Decode an archive to images of the same names and sizes.", latents.add_decode),
    "preview": Command("Latents", "Show the images of an archive on one sheet.", latents.add_preview),
    "latents": Command(
        "Latents", "Describe the latents of autoencoders: tails, spectrum, equivariance, a probe.", latents.add_latents
    ),
    "generate": Command("Generation", "Make images of classes, on one sheet.", generation.add_generate),
    "evaluate-generation": Command(
        "Generation", "Evaluate a generator: Fréchet distance and class accuracy.", generation.add_evaluate_generation
    ),
    "train": Command("Training", "Train or fine-tune a tokenizer.", training.add_train),
    "cache": Command("Training", "Encode a data set to latents once, to train a generator on.", training.add_cache),
    "train-dit": Command("Training", "Train a generator on the latents of a tokenizer.", training.add_train_dit),
    "info": Command(
        "Weights", "Describe a model, latents or a file, and what a folder lacks.", weights.add_info, needs_torch=False
    ),
    "convert checkpoint": Command(
        "Weights", "Convert a checkpoint for both libraries, and back.", weights.add_convert_checkpoint
    ),
    "convert detok": Command("Weights", "Make a hieratok-b of l-DeTok's weights.", weights.add_convert_detok),
    "export": Command("Weights", "Export encoder and decoder as ONNX and `.pt2` programs.", weights.add_export),
    "push": Command("Weights", "Test a saved model and upload it to the Hub.", weights.add_push),
}
"""Commands by their names, in the order of `hieratok --help`."""


def parse(name: str, argv: Sequence[str] | None = None) -> Any:
    """Parse the arguments of a command; the process ends with a line of error where they are wrong."""
    command = COMMANDS[name]
    parser = make_parser(command.summary, f"hieratok {name}")
    command.add_arguments(parser)
    return parser.parse_args(argv)


def _help(prefix: str) -> str:
    """List the commands whose names begin with `prefix`, by groups."""
    found = {name: command for name, command in COMMANDS.items() if name.startswith(prefix)}
    width = max(map(len, found)) + 2
    lines = [f"usage: hieratok {prefix}COMMAND ...", "", "HieraTok, the multi-scale visual tokenizer."]
    for group in dict.fromkeys(command.group for command in found.values()):
        lines += ["", f"{group}:"]
        lines += [f"  {name:{width}}{command.summary}" for name, command in found.items() if command.group == group]
    lines += ["", f"`hieratok {prefix}COMMAND --help` tells what a command takes, `hieratok --version` the version."]
    return "\n".join(lines)


def _complete() -> None:
    """Answer a shell that asks `argcomplete` how a line may go on, and end."""
    import argcomplete

    parsers = {"": Parser("hieratok")}
    inner = {"": parsers[""].add_subparsers()}
    for name, command in COMMANDS.items():
        outer, _, last = name.rpartition(" ")
        if outer not in inner:
            inner[outer] = inner[""].add_parser(outer).add_subparsers()
        command.add_arguments(inner[outer].add_parser(last))
    argcomplete.autocomplete(parsers[""])


def main(argv: Sequence[str] | None = None, load_package: Callable[[], None] | None = None) -> int:
    """
    Run a command.

    Args:
        argv (sequence of `str`): The arguments, those of the process unless given.
        load_package (callable): What has to run before any part of the package that needs torch is imported.

    Returns:
        The exit status: 2 after an error of the user, 130 where the user interrupts it.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    try:
        return _run(given, load_package)
    except KeyboardInterrupt:
        complain("interrupted\n")
        return end([], 130)


def _run(given: list[str], load_package: Callable[[], None] | None) -> int:
    for words in (2, 1):
        if (name := " ".join(given[:words])) in COMMANDS:
            parse(name, given[words:])  # --help and errors end here, before torch is imported
            if load_package is not None and COMMANDS[name].needs_torch:
                load_package()
            try:
                module = import_module(f".{name.replace(' ', '_').replace('-', '_')}", __package__)
            except ModuleNotFoundError as error:
                if error.name not in EXTRAS:
                    raise
                complain(f"error: {missing_extra(f'hieratok {name}', error.name)}\n")
                return end([], 2)
            return module.main(given[words:])
    return _explain(given)


def _explain(given: list[str]) -> int:
    """Answer what names no command: with the list, the version, or the nearest name."""
    suit_terminal()
    first, *rest = given or ["--help"]
    if first == "--version":
        return end([f"hieratok_hf {version('hieratok_hf')}"])
    prefix = f"{first} "
    if not any(name.startswith(prefix) for name in COMMANDS):
        prefix = ""
        rest = given
    if not rest or rest[0] in ("-h", "--help"):
        return end([_help(prefix)], 0 if rest else 2)
    names = [name.removeprefix(prefix) for name in COMMANDS if name.startswith(prefix)]
    words = dict.fromkeys(word for name in names for word in (name, name.split()[0]))
    near = difflib.get_close_matches(rest[0], words, 1, 0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(words)}."
    complain(f"error: hieratok {prefix}has no command {rest[0]!r}: {hint}\n")
    return end([], 2)
