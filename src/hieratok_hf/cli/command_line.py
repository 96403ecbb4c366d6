"""Share checks, reports, devices and processes among the commands."""

import contextlib
import glob
import json
import os
import platform
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import get_int_from_env
from safetensors import SafetensorError
from tqdm import tqdm

from ..models.configuration_hieratok import HieraTokConfig
from ..training.state import hold_folder
from ..utils.files import write_whole
from .terminal import Problem, complain, end, one_line

__all__ = [
    "check_batch",
    "check_config",
    "check_memory",
    "check_model_folder",
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


def run_script(run: Callable[[Namespace], list[str] | tuple[list[str], int]], args: Namespace) -> int:
    """
    Run a script and print its lines; the exit status: 0 or that which it gives beside its lines, or 2 after a
    `Problem`, which goes to stderr.
    """
    try:
        made = run(args)
    except Problem as problem:
        complain(f"error: {problem}\n")
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
        complain(f"error{where}: {problem}\n")
        return end([], 2)
    finally:
        state.destroy_process_group()
