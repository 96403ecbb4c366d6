"""Hold what the command-line scripts share: options, errors, tables, reports and processes."""

import json
import math
import platform
import sys
import tempfile
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import get_int_from_env
from tqdm import tqdm

from ..training.state import hold_folder
from ..utils.files import write_whole

__all__ = [
    "Problem",
    "add_device",
    "add_training",
    "align_table",
    "check_writable",
    "describe_machine",
    "device_of_process",
    "find_device",
    "load_or_explain",
    "make_parser",
    "one_line",
    "positive",
    "run_on_processes",
    "run_script",
    "run_training",
    "write_or_explain",
    "write_report",
]


class Problem(Exception):
    """Say in one line why a request of the user cannot be met."""


def one_line(error: BaseException) -> str:
    """An error's message, or its type's name, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def positive(text: str) -> int:
    """A whole number from 1, for argparse; `ValueError` of any other text."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def load_or_explain(load: Callable[..., Any], option: str, name: Any, *more: Any, **options: Any) -> Any:
    """Return `load(name, ...)`, or raise a `Problem` that names the option."""
    try:
        return load(name, *more, **options)
    except Exception as error:  # the libraries, safetensors, the Hub and torch raise many types
        raise Problem(f"{option} {name!r} cannot be loaded: {one_line(error)}") from error


def make_parser(description: str | None) -> ArgumentParser:
    """Make a parser whose help shows the default of every option that has one."""
    return ArgumentParser(description=description, formatter_class=_ShowDefaults)


class _ShowDefaults(ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: Action) -> str | None:
        nothing = action.default is None or isinstance(action.default, bool)
        return action.help if nothing else super()._get_help_string(action)


def align_table(rows: Sequence[Sequence[str]]) -> str:
    """Align rows in columns, the first to the left and all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def check_writable(option: str, path: Path, folder: bool = False) -> None:
    """
    Make the folder that an output goes to, and fail before the work where the output could not be written.

    Args:
        option (str): The option that names the output.
        path (Path): A file, which may be there, or a folder.
        folder (bool): Whether `path` is a folder.

    Raises:
        Problem: No file can be made in the folder, or there is a folder where the file should be.
    """
    try:
        parent = path if folder else path.parent
        parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise Problem(f"{option} {str(path)!r} cannot be written: {one_line(error)}") from error
    if not folder and path.is_dir():
        raise Problem(f"{option} {str(path)!r} cannot be written: it is a folder")


def write_or_explain(option: str, path: Path, content: bytes) -> None:
    """
    Write a file, whole or not at all.

    Raises:
        Problem: The file cannot be written.
    """
    try:
        with write_whole(path) as file:
            file.write(content)
    except OSError as error:
        raise Problem(f"{option} {str(path)!r} cannot be written: {one_line(error)}") from error


def write_report(path: Path, report: dict[str, Any]) -> None:
    """
    Write the file of `--json`, whole or not at all; what is infinite or no number becomes null.

    Raises:
        Problem: The file cannot be written.
    """
    text = json.dumps(_finite(report), indent=2, allow_nan=False, default=str)
    write_or_explain("--json", path, f"{text}\n".encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe_machine(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Describe where figures of speed come from."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        names = (line.partition(":")[2] for line in info.read_text().splitlines() if line.startswith("model name"))
        cpu = next(names, cpu).strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    software = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    return {"platform": platform.platform(), "cpu": cpu, "device": name, **software, "processes": processes}


def add_device(parser: ArgumentParser, default: str | None = None) -> None:
    """Add `--device`, a `torch.device`, or `None` where neither it nor a default is given."""
    unless = "" if default else "; an accelerator if there is one unless given"
    text = f"device of torch, such as cuda or cpu{unless}"
    parser.add_argument("--device", type=_device, default=default, help=text)


def _device(text: str) -> torch.device | None:
    try:
        return None if text == "auto" else torch.device(text)
    except RuntimeError as error:
        raise ArgumentTypeError(f"must be a device of torch, such as cuda or cpu, got {text!r}") from error


def add_training(
    parser: ArgumentParser, *, steps: int, lr: float, ema: float, sample_every: int
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Add the options that every training has, and return `add_argument` of their two groups for further ones."""
    optim = parser.add_argument_group("optimisation").add_argument
    optim("--steps", type=positive, default=steps, help="steps of the optimiser")
    optim("--lr", type=float, default=lr, help="largest learning rate")
    optim("--warmup_steps", type=int, default=100, help="steps in which the learning rate rises")
    optim("--weight_decay", type=float, default=0.0, help="weight decay of AdamW")
    optim("--clip", type=float, default=1.0, help="largest norm of the gradient")
    optim("--ema", type=float, default=ema, help="decay of the averaged weights, which are exported")
    optim("--accumulate", type=positive, default=1, help="parts that a step is computed in")
    optim("--mixed_precision", choices=("no", "bf16", "fp16"), help="precision; that of accelerate unless given")
    optim("--compile", action="store_true", help="compile the model")
    report = parser.add_argument_group("reports").add_argument
    report("--log_every", type=positive, default=50, help="steps between records of the losses")
    report("--sample_every", type=positive, default=sample_every, help="steps between samples")
    report("--save_every", type=positive, default=500, help="steps between states")
    report("--keep", type=positive, default=2, help="states to keep")
    report("--report_to", help="a tracker of accelerate, as tensorboard")
    return optim, report


def find_device(args: Namespace) -> torch.device:
    """Find the device of a script of one process: that of `--device`, or an accelerator if there is one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return args.device or found or torch.device("cpu")


def device_of_process(args: Namespace, state: PartialState) -> torch.device:
    """Choose the device of `--device`, or of this process: of several GPUs each process has its own."""
    return args.device if args.device and args.device != torch.device(state.device.type) else state.device


def run_training(train: Callable[[Namespace], None], args: Namespace) -> int:
    """
    Run a training, the only one in the folder `args.output`.

    Returns:
        The exit status: 0, or 2 after an error that is said in one line, beside the progress bar.
    """
    is_main = get_int_from_env(["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"], 0) == 0
    try:
        with hold_folder(args.output) if is_main else nullcontext():
            train(args)
    except (FloatingPointError, ImportError, OSError, ValueError) as error:
        tqdm.write(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run_script(run: Callable[[Namespace], list[str]], args: Namespace) -> int:
    """Run a script and print its lines; the exit status: 0, or 2 after a `Problem`, which goes to stderr."""
    try:
        print("\n".join(run(args)))
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


def run_on_processes(run: Callable[[Namespace, PartialState], list[str]], args: Namespace) -> int:
    """
    Run a script on all processes that accelerate or torchrun started; the main one prints.

    Args:
        run (callable): Given `args`, whose `device` may be `None`, and the processes; gives the lines to print.

    Returns:
        The exit status: 0, or 2 after a `Problem`, which every process that meets it prints to stderr.
    """
    # Unless it is told, accelerate leaves processes of a machine without an accelerator unconnected.
    state = PartialState(cpu=args.device.type == "cpu" if args.device else not torch.accelerator.is_available())
    try:
        state.print("\n".join(run(args, state)))
    except Problem as problem:
        where = "" if state.num_processes == 1 else f" (process {state.process_index})"
        print(f"error{where}: {problem}", file=sys.stderr)
        return 2
    finally:
        state.destroy_process_group()
    return 0
