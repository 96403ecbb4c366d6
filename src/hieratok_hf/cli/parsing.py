"""
Make parsers and the types of their arguments, shared by all commands.

Nothing here imports torch, so that `--help` and errors of typing come at once.
"""

import contextlib
import difflib
import json
import math
import sys
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..utils.files import read_json
from .terminal import complain, end, one_line, suit_terminal

if TYPE_CHECKING:
    import torch

__all__ = [
    "Parser",
    "add_buckets",
    "add_data",
    "add_device",
    "add_dtype",
    "add_protocol",
    "add_report",
    "add_training",
    "json_object",
    "make_parser",
    "own_loss",
    "positive",
    "real",
    "seed",
    "whole",
]

MOST = 2**31 - 1
DTYPES = ("float32", "bfloat16", "float16")


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """Make a type of argparse: a whole number from `least` to `most`; `ArgumentTypeError` of any other text."""

    def read(text: str) -> int:
        try:
            if least <= (number := int(text)) <= most:
                return number
        except ValueError:
            pass
        raise ArgumentTypeError(f"must be a whole number from {least} to {most}, got {_short(text)}")

    return read


positive, seed = whole(1), whole(0, 2**63 - 1)


def real(
    least: float = 0.0, most: float = math.inf, *, above: float = -math.inf, below: float = math.inf
) -> Callable[[str], float]:
    """
    Make a type of argparse: a finite number from `least` to `most`, greater than `above` and less than `below`;
    `ArgumentTypeError` of any other text.
    """
    bounds = {"above": above, "at least": least, "at most": most, "below": below}
    if above >= least:
        del bounds["at least"]
    told = " and ".join(f"{name} {bound:g}" for name, bound in bounds.items() if math.isfinite(bound))
    wanted = f"a finite number, {told}" if told else "a finite number"

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            number = float(text)
            if math.isfinite(number) and least <= number <= most and above < number < below:
                return number
        raise ArgumentTypeError(f"must be {wanted}, got {_short(text)}")

    return read


def json_object(text: str) -> dict[str, Any]:
    """Read a JSON object, for argparse; `ArgumentTypeError` of any other text."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (RecursionError, ValueError) as error:
        raise ArgumentTypeError(f"must be a JSON object, got {_short(text)}: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"must be a JSON object, such as '{{\"qk_norm\": true}}', got {_short(text)}")
    return value


def own_loss(text: str) -> str:
    """Check a loss that is named as `module:function=weight`, for argparse; `ArgumentTypeError` of any other text."""
    name, _, weight = text.partition("=")
    module, _, function = name.partition(":")
    try:
        real()(weight)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"must be module:function=weight, got {_short(text)}: the weight {error}") from error
    if not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ArgumentTypeError(f"must be module:function=weight, such as mine:edges=0.5, got {_short(text)}")
    return text


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def make_parser(description: str | None, prog: str | None = None) -> "Parser":
    """Make a parser whose help shows the default of every option that has one; what it prints suits any terminal."""
    suit_terminal()
    return Parser(prog, description=description)


OUTPUT_OPTIONS = ("json", "overwrite", "protocol", "save", "save_npz", "save_statistics")
"""Options of an evaluation that say where figures and images go, which a protocol says nothing of."""


class Parser(ArgumentParser):
    """
    Parse arguments and run `checks` on what was given, each a function of the parsed arguments that calls `error`.
    """

    def __init__(self, prog: str | None = None, **options: Any):
        super().__init__(prog, formatter_class=_ShowDefaults, **options)
        self.checks: list[Callable[[Namespace], None]] = []
        self._beside = ""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """
        Parse as argparse does, and run the checks; an option of no such name is told with the nearest one. What is
        not given is taken from the file of `--protocol`, if the command has that option.
        """
        given = list(sys.argv[1:] if args is None else args)
        args, unknown = self.parse_known_args([*self._words_of_protocol(given), *given], namespace)
        if unknown:
            # Without the dashes, which all have in common.
            names = [option.lstrip("-") for option in self._option_string_actions]
            near = difflib.get_close_matches(unknown[0].partition("=")[0].lstrip("-"), names, 1, 0.65)
            hint = f": did you mean --{near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        for check in self.checks:
            check(args)
        return args

    def _words_of_protocol(self, given: list[str]) -> list[str]:
        """Write the options that a protocol names and nobody gave, as they are typed."""
        finder = Parser(self.prog, add_help=False)
        finder.add_argument("--protocol", type=Path)
        if "--protocol" not in self._option_string_actions or not (path := finder.parse_known_args(given)[0].protocol):
            return []
        try:
            protocol = (read_json(path) or {})["protocol"]
            known, options = protocol["command"] == self.prog, dict(protocol["options"])
        except (KeyError, OSError, TypeError, ValueError):
            known, options = False, {}
        if not known:
            self.error(f"--protocol must be a report by --json of `{self.prog}`, got {_short(str(path))}")
        self._beside = f", with the options of {str(path)!r}"
        words: list[str] = []
        typed = {word.partition("=")[0] for word in given}
        for name, value in options.items():
            # A file of somebody else does not say where to write.
            if f"--{name}" not in typed and name not in (*OUTPUT_OPTIONS, "help"):
                values = value if isinstance(value, list) else [] if value is True else [value]
                words += [f"--{name}", *map(str, values)]
        return words

    def needs(self, **needed: str) -> None:
        """Refuse options that are given, as `fid_size="fid_model"`, without the one that they do nothing without."""

        def check(args: Namespace) -> None:
            for option, other in needed.items():
                if getattr(args, option) != self.get_default(option) and not getattr(args, other):
                    self.error(f"--{option} needs --{other}")

        self.checks.append(check)

    def contradict(self, option: str, *others: str) -> None:
        """Refuse `option` beside any of the others."""

        def check(args: Namespace) -> None:
            given = [other for other in others if getattr(args, other) != self.get_default(other)]
            if getattr(args, option) and given:
                self.error(f"--{option} and --{given[0]} contradict each other")

        self.checks.append(check)

    def add_range(self, add: Callable[..., Any], name: str, default: tuple[float, float], text: str) -> None:
        """Add an option of two numbers in [0, 1], the smaller one first, to the parser or to a group of it."""

        def check(args: Namespace) -> None:
            low, high = getattr(args, name.removeprefix("--"))
            if low > high:
                self.error(f"{name} must be a range, got {low:g} to {high:g}")

        add(name, type=real(0, 1), nargs=2, default=default, metavar=("LO", "HI"), help=text)
        self.checks.append(check)

    def error(self, message: str) -> NoReturn:
        """End the process with one line of error, which a page of usage would hide."""
        self.exit(2, f"error: {message}{self._beside} (`{self.prog} --help` lists the options)\n")

    def print_help(self, file: Any = None) -> None:
        """Print the help, or end the process with a line of error where the standard output is full."""
        if file is not None:
            super().print_help(file)
        elif status := end([self.format_help().rstrip("\n")]):  # argparse passes over a full disk
            sys.exit(status)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End the process, whoever still reads what it prints."""
        if message:
            complain(message)
        sys.exit(end([], status))


class _ShowDefaults(ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: Action) -> str | None:
        default = action.default
        if default is None or isinstance(default, bool) or default in ([], {}):
            return action.help
        if isinstance(default, (list, tuple)):  # as it is typed
            return f"{action.help} (default: {' '.join(map(str, default))})"
        return super()._get_help_string(action)


def add_data(add: Callable[..., Any], while_doing: str, **options: Any) -> None:
    """Add `--data`, `--split` and `--streaming` to a parser or a group by its `add_argument`."""
    sources = "folders of images, tar shards in webdataset style, data sets of the Hub, or an .npz file of images"
    add("--data", nargs="+", help=sources, **options)
    add("--split", default="train", help="split of folders and data sets; data without splits is train")
    copy = f"read while {while_doing} instead of first making a copy in the cache"
    add("--streaming", action="store_true", help=copy)


def add_buckets(parser: Parser, add: Callable[..., Any], size: str) -> None:
    """Add `--aspect_buckets` and `--bucket_step` to a parser or a group of it, for images of the area of `size`."""
    buckets = f"cut images to the nearest of rectangles of about the pixels of {size}, up to this ratio of sides; 2 "
    buckets += "without a number; squares unless given"
    add("--aspect_buckets", type=real(1, 100), nargs="?", const=2.0, metavar="RATIO", help=buckets)
    step = "pixels that the sides of those rectangles are multiples of; the model's patch unless given"
    add("--bucket_step", type=positive, metavar="PIXELS", help=step)
    parser.needs(bucket_step="aspect_buckets")
    parser.contradict("streaming", "aspect_buckets")  # whose images are not known beforehand


def add_dtype(parser: Parser) -> None:
    """Add `--dtype` of a model that is run."""
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="dtype of the model")


def add_report(parser: Parser) -> None:
    """Add `--json` and `--overwrite`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write all figures to")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")


def add_protocol(parser: Parser) -> None:
    """Add `--protocol`, the report whose options are taken where none are given."""
    text = "report by --json of an earlier call, which is made again; options beside it go before its own"
    parser.add_argument("--protocol", type=Path, metavar="FILE", help=text)


def add_device(parser: Parser, default: str | None = None) -> None:
    """Add `--device`, a `torch.device`, or `None` where neither it nor a default is given."""
    text = "device of torch, such as cuda or cpu"
    text += "" if default else "; an accelerator if there is one unless given"
    parser.add_argument("--device", type=_device, default=default, help=text)


def _device(text: str) -> "torch.device | None":
    import torch

    if text == "auto":
        return None
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    known = ["cpu", *([here.type] if here else [])]
    with contextlib.suppress(Exception):  # torch raises several types
        device = torch.device(text)
        count = torch.accelerator.device_count() if here and device.type == here.type else 1
        if device.type in known and (device.index or 0) < count:
            return device
    raise ArgumentTypeError(f"must be a device of torch on this machine, such as {known[-1]}, got {_short(text)}")


def add_training(
    parser: Parser, *, steps: int, lr: float, ema: float, sample_every: int
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Add the options that every training has, and return `add_argument` of their two groups for further ones."""
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for states, records, samples and the model")
    add("--resume", action="store_true", help="go on from the newest state in --output, if there is one")
    add("--seed", type=seed, default=0, help="seed of the weights, of the order and of all noise")
    more = "go on although options differ from those that the training was begun with"
    add("--allow_changes", action="store_true", help=f"with --resume: {more}")
    add("--overwrite", action="store_true", help="replace a model that --output holds already")
    optim = parser.add_argument_group("optimisation").add_argument
    optim("--steps", type=positive, default=steps, help="steps of the optimiser")
    optim("--lr", type=real(), default=lr, help="largest learning rate")
    optim("--warmup_steps", type=whole(0), default=100, help="steps in which the learning rate rises")
    optim("--weight_decay", type=real(), default=0.0, help="weight decay of AdamW")
    optim("--clip", type=real(above=0), default=1.0, help="largest norm of the gradient")
    optim("--ema", type=real(below=1), default=ema, help="decay of the averaged weights, which are exported")
    optim("--accumulate", type=positive, default=1, help="parts that a step is computed in")
    optim("--mixed_precision", choices=("no", "bf16", "fp16"), help="precision; that of accelerate unless given")
    optim("--compile", action="store_true", help="compile the model")
    optim("--gradient_checkpointing", action="store_true", help="save memory, not time")
    report = parser.add_argument_group("reports").add_argument
    report("--log_every", type=positive, default=50, help="steps between records of the losses")
    report("--sample_every", type=positive, default=sample_every, help="steps between samples")
    report("--save_every", type=positive, default=500, help="steps between states")
    report("--keep", type=positive, default=2, help="states to keep")
    exports = "steps between exports of the averaged weights, each kept in a folder of --output; none unless given"
    report("--export_every", type=positive, help=exports)
    report("--report_to", type=_tracker, help="a tracker of accelerate, as tensorboard")
    parser.needs(allow_changes="resume")
    return optim, report


def _tracker(text: str) -> str:
    """Refuse what accelerate would leave out without a word."""
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    if text not in LoggerType.list():
        raise ArgumentTypeError(f"must be one of {', '.join(LoggerType.list())}, got {_short(text)}")
    if text != "all" and LoggerType(text) not in get_available_trackers():
        raise ArgumentTypeError(f"{text!r} needs a package of that name, which is not installed")
    return text
