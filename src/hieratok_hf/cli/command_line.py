"""What the command-line scripts in `examples/` and `conversion/` share: their errors, reports and processes."""

import json
import math
import platform
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from ..utils.files import write_whole

__all__ = [
    "Problem",
    "add_device",
    "device_of_process",
    "load_or_explain",
    "machine",
    "one_line",
    "positive",
    "run_script",
    "run_on_processes",
    "run_training",
    "write_report",
]


class Problem(Exception):
    """What the user asked for cannot be done; the message is one line."""


def one_line(error: BaseException) -> str:
    """An error's message, or its type's name, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def positive(text: str) -> int:
    """A whole number from 1, for argparse; `ValueError` of any other text."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def load_or_explain(load: Callable[..., Any], option: str, name: str, *more: Any) -> Any:
    """What `load(name, ...)` gives; a `Problem` that names the option where it cannot."""
    try:
        return load(name, *more)
    except Exception as error:  # the libraries, safetensors, the Hub and torch raise many types
        raise Problem(f"{option} {name!r} cannot be loaded: {one_line(error)}") from error


def write_report(path: Path, report: dict[str, Any]) -> None:
    """
    Write the file of `--json`, whole or not at all; what is infinite or no number becomes null.

    Raises:
        Problem: The file cannot be written.
    """
    try:
        with write_whole(path) as file:
            file.write((json.dumps(_finite(report), indent=2, allow_nan=False, default=str) + "\n").encode())
    except OSError as error:
        raise Problem(f"--json {str(path)!r} cannot be written: {one_line(error)}") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def machine(device: torch.device, processes: int) -> dict[str, Any]:
    """Where figures of speed come from."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        names = (line.partition(":")[2] for line in info.read_text().splitlines() if line.startswith("model name"))
        cpu = next(names, cpu).strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    software = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    return {"platform": platform.platform(), "cpu": cpu, "device": name, **software, "processes": processes}


def add_device(parser: ArgumentParser) -> None:
    """Add `--device`, a `torch.device` or `None`."""
    parser.add_argument("--device", type=_device, help="a device of torch; what accelerate finds unless given")


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise ArgumentTypeError(f"must be a device of torch, such as cuda or cpu, got {text!r}") from error


def device_of_process(args: Namespace, state: PartialState) -> torch.device:
    """That of `--device`, or of this process: of several GPUs each process has its own."""
    return args.device if args.device and args.device != torch.device(state.device.type) else state.device


def run_training(train: Callable[[Namespace], None], args: Namespace) -> int:
    """Run a training; the exit status: 0, or 2 after an error that is said in one line, beside the progress bar."""
    try:
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
