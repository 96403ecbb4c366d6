"""Share options, errors, tables, reports and processes among the command-line scripts."""

import contextlib
import glob
import json
import math
import os
import platform
import sys
import tempfile
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
from accelerate import PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, get_int_from_env
from safetensors import SafetensorError
from tqdm import tqdm

from ..models.configuration_hieratok import HieraTokConfig
from ..training.state import hold_folder
from ..utils.files import write_whole

__all__ = [
    "Problem",
    "add_device",
    "add_training",
    "align_table",
    "check_batch",
    "check_config",
    "check_memory",
    "check_model_folder",
    "check_writable",
    "describe_machine",
    "device_of_process",
    "end",
    "find_device",
    "identify",
    "json_object",
    "load_or_explain",
    "make_parser",
    "one_line",
    "positive",
    "real",
    "refuse_unused",
    "run_on_processes",
    "run_script",
    "run_training",
    "seed",
    "whole",
    "write_or_explain",
    "write_report",
]

MOST = 2**31 - 1


class Problem(Exception):
    """Say in one line why a request of the user cannot be met."""


def one_line(error: BaseException) -> str:
    """Give an error's message, or its type's name, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


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
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    told = " and ".join(f"{name} {bound:g}" for name, bound in bounds.items() if math.isfinite(bound))

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            number = float(text)
            if math.isfinite(number) and least <= number <= most and above < number < below:
                return number
        raise ArgumentTypeError(f"must be a finite number, {told}, got {_short(text)}")

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


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def refuse_unused(parser: ArgumentParser, args: Namespace, **needed: str) -> None:
    """Refuse options that were given, as `fid_size="fid_model"`, without the one that they do nothing without."""
    for option, other in needed.items():
        if getattr(args, option) != parser.get_default(option) and not getattr(args, other):
            parser.error(f"--{option} needs --{other}")


def load_or_explain(load: Callable[..., Any], option: str, name: Any, *more: Any, **options: Any) -> Any:
    """Return `load(name, ...)`, or raise a `Problem` that names the option."""
    try:
        return load(name, *more, **options)
    except Exception as error:  # the libraries, safetensors, the Hub and torch raise many types
        raise Problem(f"{option} {name!r} cannot be loaded: {one_line(error)}") from error


def make_parser(description: str | None) -> ArgumentParser:
    """Make a parser whose help shows the default of every option that has one; what it prints suits any terminal."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:  # it was closed before Python began
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))  # noqa: SIM115 (open as long as the process)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    return _Parser(description=description, formatter_class=_ShowDefaults)


class _Parser(ArgumentParser):
    def print_help(self, file: Any = None) -> None:
        if file is not None:
            super().print_help(file)
        elif status := end([self.format_help().rstrip("\n")]):  # argparse passes over a full disk
            sys.exit(status)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if message:
            _complain(message)
        sys.exit(end([], status))


class _ShowDefaults(ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: Action) -> str | None:
        nothing = action.default is None or isinstance(action.default, bool)
        return action.help if nothing else super()._get_help_string(action)


def align_table(rows: Sequence[Sequence[str]]) -> str:
    """Align rows in columns, the first to the left and all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def check_writable(
    option: str, path: Path, folder: bool = False, *, overwrite: bool = True, inputs: Collection[Any] = ()
) -> None:
    """
    Make the folder that an output goes to, and fail before the work where the output could not be written.

    Args:
        option (str): The option that names the output.
        path (Path): A file, which may be there, or a folder.
        folder (bool): Whether `path` is a folder.
        overwrite (bool): Whether a file that is there may be replaced.
        inputs (collection): Files that must not be replaced in any case, of `identify`.

    Raises:
        Problem: No file can be made in the folder, or there is something where the file should be.
    """
    where = f"{option} {str(path)!r}"
    try:
        parent = path if folder else path.parent
        parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=parent).close()
    except (OSError, ValueError) as error:  # ValueError of a zero byte
        raise Problem(f"{where} cannot be written: {one_line(error)}") from error
    if folder or not (path.exists() or path.is_symlink()):
        return
    if not path.is_file():
        raise Problem(f"{where} cannot be written: it is a {'folder' if path.is_dir() else 'link or a device'}")
    if identify([path]) & set(inputs):
        raise Problem(f"{where} cannot be written: it is an input")
    if not overwrite:
        raise Problem(f"{where} is there already: add --overwrite, or take another name")


def identify(sources: Iterable[str | Path]) -> set[tuple[int, int]]:
    """Identify the files among paths and patterns, whatever name leads to them."""
    found = set()
    for path in (path for source in sources for path in [source, *glob.glob(str(source))]):
        with contextlib.suppress(OSError, ValueError):  # what else is wrong with an input is told where it is read
            facts = os.stat(path)
            found.add((facts.st_dev, facts.st_ino))
    return found


def check_model_folder(option: str, folder: Path, overwrite: bool) -> None:
    """Raise a `Problem` where a folder to train into holds a model already, unless that may be replaced."""
    check_writable(option, folder, folder=True)
    there = [name for name in ("config.json", "model_index.json") if (folder / name).exists()]
    if there and not overwrite:
        raise Problem(f"{option} {str(folder)!r} holds a model, {there[0]}: add --overwrite, or take another folder")


def check_memory(what: str, needed: int) -> None:
    """Raise a `Problem` where what is asked for cannot fit into the memory of this machine, in bytes."""
    if needed > (total := psutil.virtual_memory().total):
        raise Problem(f"{what} needs {needed // 2**30} GiB of memory and more, this machine has {total // 2**30}")


def check_batch(option: str, images: int, size: int) -> None:
    """Raise a `Problem` where a batch of images of a side in pixels cannot fit into the memory of this machine."""
    check_memory(f"{option}: a batch of {images} images of {size} x {size} pixels", images * 3 * size**2 * 4)


def check_config(option: str, config: HieraTokConfig) -> None:
    """Raise a `Problem` where the weights of a configuration cannot fit into the memory of this machine."""
    numbers = 0
    for side in ("encoder", "decoder"):
        width, layers = (getattr(config, f"{side}_{name}") for name in ("hidden_size", "num_layers"))
        numbers += width * (4 * width * layers + config.in_channels * config.patch_size**2 + config.latent_channels)
    if config.downsampling == "learned":
        cells = sum(factor**2 for factor in config.scale_factors if factor > 1)
        numbers += cells * config.latent_channels * config.decoder_hidden_size
    check_memory(f"{option}: a model of that size", 4 * numbers)


def write_or_explain(option: str, path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; a `Problem` where it cannot be written."""
    try:
        with write_whole(path) as file:
            file.write(content)
    except OSError as error:
        raise Problem(f"{option} {str(path)!r} cannot be written: {one_line(error)}") from error


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write the file of `--json` by `write_or_explain`; what is infinite or no number becomes null."""
    finite = json.loads(json.dumps(report, default=str), parse_constant=lambda _: None)
    write_or_explain("--json", path, f"{json.dumps(finite, indent=2)}\n".encode())


def describe_machine(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Describe the machine and the software that figures of speed come from."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        names = (line.partition(":")[2] for line in info.read_text().splitlines() if line.startswith("model name"))
        cpu = next(names, cpu).strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    software = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    return {"platform": platform.platform(), "cpu": cpu, "device": name, **software, "processes": processes}


def add_device(parser: ArgumentParser, default: str | None = None) -> None:
    """Add `--device`, a `torch.device`, or `None` where neither it nor a default is given."""
    text = "device of torch, such as cuda or cpu"
    text += "" if default else "; an accelerator if there is one unless given"
    parser.add_argument("--device", type=_device, default=default, help=text)


def _device(text: str) -> torch.device | None:
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
    parser: ArgumentParser, *, steps: int, lr: float, ema: float, sample_every: int
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Add the options that every training has, and return `add_argument` of their two groups for further ones."""
    more = "go on although options differ from those that the training was begun with"
    parser.add_argument("--allow_changes", action="store_true", help=f"with --resume: {more}")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that --output holds already")
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
    report = parser.add_argument_group("reports").add_argument
    report("--log_every", type=positive, default=50, help="steps between records of the losses")
    report("--sample_every", type=positive, default=sample_every, help="steps between samples")
    report("--save_every", type=positive, default=500, help="steps between states")
    report("--keep", type=positive, default=2, help="states to keep")
    report("--report_to", type=_tracker, help="a tracker of accelerate, as tensorboard")
    return optim, report


def _tracker(text: str) -> str:
    """Refuse what accelerate would leave out without a word."""
    if text not in LoggerType.list():
        raise ArgumentTypeError(f"must be one of {', '.join(LoggerType.list())}, got {_short(text)}")
    if text != "all" and LoggerType(text) not in get_available_trackers():
        raise ArgumentTypeError(f"{text!r} needs a package of that name, which is not installed")
    return text


def find_device(args: Namespace) -> torch.device:
    """Find the device of a script of one process: that of `--device`, or an accelerator if there is one."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return args.device or found or torch.device("cpu")


def device_of_process(args: Namespace, state: PartialState) -> torch.device:
    """Choose the device of `--device`, or of this process: of several GPUs each process has its own."""
    return args.device if args.device and args.device != torch.device(state.device.type) else state.device


def end(lines: Sequence[str], status: int = 0) -> int:
    """
    Print lines and give the exit status: 2 after an error where they cannot be written, as on a full disk.

    Nothing is said where nobody reads, as after `script | head`.
    """
    try:
        if lines:
            print("\n".join(lines))
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # Python tries once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            _complain(f"error: the standard output cannot be written: {one_line(error)}\n")
            return 2
    return status


def _complain(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody is there to be told
        sys.stderr.write(text)
        sys.stderr.flush()


def run_training(train: Callable[[Namespace], None], args: Namespace) -> int:
    """
    Run a training, the only one in the folder `args.output`.

    Returns:
        The exit status: 0, or 2 after an error that is said in one line, beside the progress bar.
    """
    is_main = get_int_from_env(["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"], 0) == 0
    try:
        with hold_folder(args.output) if is_main else contextlib.nullcontext():
            train(args)
    except (FloatingPointError, ImportError, MemoryError, OSError, Problem, SafetensorError, ValueError) as error:
        with contextlib.suppress(OSError):
            tqdm.write(f"error: {one_line(error)}", file=sys.stderr)
        return end([], 2)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            tqdm.write("interrupted: --resume goes on from the last state, one in --save_every steps", file=sys.stderr)
        return end([], 130)
    return end([])


def run_script(run: Callable[[Namespace], list[str] | tuple[list[str], int]], args: Namespace) -> int:
    """
    Run a script and print its lines; the exit status: 0 or that which it gives beside its lines, or 2 after a
    `Problem`, which goes to stderr.
    """
    try:
        made = run(args)
    except Problem as problem:
        _complain(f"error: {problem}\n")
        return end([], 2)
    return end(*made) if isinstance(made, tuple) else end(made)


def run_on_processes(run: Callable[[Namespace, PartialState], list[str]], args: Namespace) -> int:
    """
    Run a script on all processes that accelerate or torchrun started, and give the exit status.

    `run` is given `args`, whose `device` may be `None`, and the processes; the main one prints the lines that it
    gives. The status is 0, or 2 after a `Problem`, which every process that meets it prints to stderr.
    """
    # Unless it is told, accelerate leaves processes of a machine without an accelerator unconnected.
    state = PartialState(cpu=args.device.type == "cpu" if args.device else not torch.accelerator.is_available())
    try:
        lines = run(args, state)
        return end(lines if state.is_main_process else [])
    except Problem as problem:
        where = "" if state.num_processes == 1 else f" (process {state.process_index})"
        _complain(f"error{where}: {problem}\n")
        return end([], 2)
    finally:
        state.destroy_process_group()
