"""Share checks, reports, devices and processes among the commands."""

import contextlib
import platform
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import TorchDynamoPlugin, get_int_from_env
from safetensors import SafetensorError
from tqdm import tqdm

from ..data.image_dataset import Images
from ..data.latent_cache import LatentCache
from ..models.autoencoder_adapter import Codec
from ..models.configuration_hieratok import HieraTokConfig
from ..models.sizes import count_parameters
from ..ops.processor import processor_field
from ..training.record import write_record
from ..training.report import TrainingReport
from ..training.state import hold_folder, options_of, states_in
from .arguments.training import AUTOCAST
from .outputs import check_writable
from .terminal import Problem, end, one_line, run_script

__all__ = [
    "autocast",
    "begin_training",
    "check_batch",
    "check_config",
    "check_memory",
    "check_steps",
    "describe_machine",
    "device_of_process",
    "find_device",
    "find_size",
    "load_or_explain",
    "record_training",
    "run_on_processes",
    "run_training",
]


def load_or_explain(load: Callable[..., Any], option: str, name: Any, *more: Any, **options: Any) -> Any:
    """Return `load(name, ...)`, or raise a `Problem` that names the option."""
    try:
        return load(name, *more, **options)
    except Problem:
        raise
    except Exception as error:  # the libraries, safetensors, the Hub and torch raise many types
        raise Problem(f"{option} {name!r} cannot be loaded: {one_line(error)}") from error


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


def find_size(args: Namespace, codec: Codec) -> int:
    """Find the side of `--size`, or of the images that `--model` was made for; a `Problem` where there is none."""
    size = args.size or getattr(codec.model.config, "sample_size", None)
    if not isinstance(size, int):
        raise Problem(f"--size is needed: the configuration of {args.model!r} names no side of its images")
    check_batch("--size and --batch_size", args.batch_size, size)
    return size


def check_config(option: str, config: HieraTokConfig) -> None:
    """Raise a `Problem` where the weights of a configuration cannot fit into the memory of this machine."""
    check_memory(f"{option}: a model of that size", 4 * sum(count_parameters(config).values()))


def describe_machine(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Describe the machine and the software that figures of speed come from."""
    cpu = processor_field("model name") or platform.processor() or platform.machine()
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


def autocast(args: Namespace, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make the context of `--mixed_precision`."""
    name = AUTOCAST.get(args.mixed_precision)
    return torch.autocast(device.type, getattr(torch, name)) if name else contextlib.nullcontext()


def begin_training(args: Namespace, dynamic: bool | None = None) -> Accelerator:
    """
    Make the folder of a training, connect its processes, and seed torch; `dynamic` is that of `torch.compile`. Raise
    a `Problem` where the folder cannot be written, or holds a model without a state that must not be replaced.
    """
    if not states_in(args.output):
        check_writable("--output", args.output, folder=True)
        there = [name for name in ("config.json", "model_index.json") if (args.output / name).exists()]
        if there and not args.overwrite:
            where = f"--output {str(args.output)!r} holds a model, {there[0]}"
            raise Problem(f"{where}: add --overwrite, or take another folder")
    accelerator = Accelerator(
        # Unless it is told, accelerate leaves processes of a machine without an accelerator unconnected.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.accumulate,
        dynamo_plugin=TorchDynamoPlugin(backend="inductor", dynamic=dynamic) if args.compile else None,
        log_with=args.report_to,
        project_dir=args.output,
    )
    torch.manual_seed(args.seed)
    if args.warmup_steps > args.steps:
        reached = f"{args.steps / args.warmup_steps:.0%} of --lr"
        accelerator.print(f"note: --warmup_steps {args.warmup_steps} are more than --steps: only {reached} is reached")
    return accelerator


def record_training(
    folder: Path,
    command: str,
    args: Namespace,
    accelerator: Accelerator,
    report: TrainingReport,
    names: list[Any],
    data: Images | LatentCache,
) -> None:
    """Write what the training by a command was so far, with the data of these names, beside the model in a folder."""
    is_stream = isinstance(data, Images) and data.streaming
    found = {"names": list(map(str, names)), "images": None if is_stream else len(data)}
    machine = describe_machine(accelerator.device, accelerator.num_processes)
    facts = {**found, "fingerprint": data.fingerprint}
    write_record(
        folder, f"hieratok {command}", options_of(vars(args)), facts, report.steps_taken, report.seconds, machine
    )


def run_training(train: Callable[[Namespace], None], args: Namespace, next_command: str = "hieratok info {}") -> int:
    """
    Run a training, the only one in the folder `args.output`; `next_command` takes that folder, quoted, for its `{}`.

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
    todo = next_command.format(shlex.quote(str(args.output)))
    return end([f"The model is in {str(args.output)!r}: {todo}"] if is_main else [])


def run_on_processes(run: Callable[[Namespace, PartialState], list[str]], args: Namespace) -> int:
    """
    Run a script on all processes that accelerate or torchrun started, and give the exit status.

    `run` is given `args`, whose `device` may be `None`, and the processes; the main one prints the lines that it
    gives. The status is 0, or 2 after a `Problem`, which every process that meets it prints to stderr.
    """
    # Unless it is told, accelerate leaves processes of a machine without an accelerator unconnected.
    state = PartialState(cpu=args.device.type == "cpu" if args.device else not torch.accelerator.is_available())

    def run_here(args: Namespace) -> list[str]:
        lines = run(args, state)
        return lines if state.is_main_process else []

    try:
        return run_script(run_here, args, "" if state.num_processes == 1 else f" (process {state.process_index})")
    finally:
        state.destroy_process_group()
