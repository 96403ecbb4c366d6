"""Share checks, reports, devices and processes among the commands."""

import contextlib
import platform
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import get_int_from_env
from safetensors import SafetensorError
from tqdm import tqdm

from ..models.configuration_hieratok import HieraTokConfig
from ..models.sizes import count_parameters
from ..training.state import hold_folder
from ..utils.extras import MissingExtra
from .outputs import check_writable, identify, write_or_explain, write_report
from .terminal import Problem, complain, end, one_line, run_script

__all__ = [
    "check_batch",
    "check_config",
    "check_memory",
    "check_model_folder",
    "check_steps",
    "check_writable",
    "describe_machine",
    "device_of_process",
    "find_device",
    "identify",
    "load_or_explain",
    "run_on_processes",
    "run_script",
    "run_training",
    "write_or_explain",
    "write_report",
]


def load_or_explain(load: Callable[..., Any], option: str, name: Any, *more: Any, **options: Any) -> Any:
    """Return `load(name, ...)`, or raise a `Problem` that names the option."""
    try:
        return load(name, *more, **options)
    except Exception as error:  # the libraries, safetensors, the Hub and torch raise many types
        raise Problem(f"{option} {name!r} cannot be loaded: {one_line(error)}") from error


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


def check_steps(name: str, sides: Sequence[int], patch: int, step: int | None) -> int:
    """
    Choose what the sides of crops are multiples of, `--bucket_step` or a patch; a `Problem` where `--bucket_step`, or
    a side of the option `name`, is none.
    """
    if (step or patch) % patch:
        raise Problem(f"--bucket_step must be a multiple of the patch size {patch}, got {step}")
    if wrong := [side for side in sides if side % (step or patch)]:
        of = f"--bucket_step {step}" if step else f"the patch size {patch}"
        raise Problem(f"{name} must be multiples of {of}, got {wrong[0]}")
    return step or patch


def check_batch(option: str, images: int, size: int) -> None:
    """Raise a `Problem` where a batch of images of a side in pixels cannot fit into the memory of this machine."""
    check_memory(f"{option}: a batch of {images} images of {size} x {size} pixels", images * 3 * size**2 * 4)


def check_config(option: str, config: HieraTokConfig) -> None:
    """Raise a `Problem` where the weights of a configuration cannot fit into the memory of this machine."""
    check_memory(f"{option}: a model of that size", 4 * sum(count_parameters(config).values()))


def describe_machine(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Describe the machine and the software that figures of speed come from."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        names = (line.partition(":")[2] for line in info.read_text().splitlines() if line.startswith("model name"))
        cpu = next(names, cpu).strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    software = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    return {"platform": platform.platform(), "cpu": cpu, "device": name, **software, "processes": processes}


def find_device(args: Namespace) -> torch.device:
    """Find the device of a script of one process: that of `--device`, or an accelerator if there is one."""
    found = torch.accelerator.current_accelerator(check_available=True)
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
    return end([f"The model is in {str(args.output)!r}."] if is_main else [])


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
    except (MissingExtra, Problem) as problem:
        where = "" if state.num_processes == 1 else f" (process {state.process_index})"
        complain(f"error{where}: {problem}\n")
        return end([], 2)
    finally:
        state.destroy_process_group()
