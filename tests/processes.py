"""Processes of a command beside a test: they are forked from a server that imported what they need, and are killed."""

import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType
from typing import Any

# What accelerate launch --use_fsdp sets, on CPUs.
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
FSDP |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true"}
FSDP |= {"ACCELERATE_USE_CPU": "true"}

COMMANDS = ("cache", "decode", "encode", "evaluate", "evaluate_generation", "train", "train_dit")
SLOW = (
    "diffusers.models.autoencoders.autoencoder_kl",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torchmetrics.image",
)
# A fork does not copy threads: the server runs no operation of torch, which would start some.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([*SLOW, *(f"hieratok_hf.cli.{name}" for name in COMMANDS)])


class HalfAndDie:
    """Stands in for `os.fsync`: cuts the n-th file in two, and the process dies."""

    def __init__(self, files: int):
        self.left = files

    def __call__(self, file: int) -> None:
        self.left -= 1
        if not self.left:
            os.ftruncate(file, os.fstat(file).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)


def run_command(module: str, arguments: list[str], log: Path, cut: int, environment: dict[str, str]) -> None:
    """What a process does: a command, whose output goes to files; with `cut`, it dies while it writes its n-th."""
    import datasets
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment)
    datasets.config.HF_DATASETS_CACHE = Path(environment["HF_DATASETS_CACHE"])
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if cut:
        os.fsync = HalfAndDie(cut)
    raise SystemExit(import_module(module).main(arguments))


@contextmanager
def running(
    script: ModuleType,
    arguments: list[Any],
    folder: Path,
    world: int = 1,
    cut: int = 0,
    environment: dict[str, str] | None = None,
) -> Iterator[list[Any]]:
    """
    Start a command in as many processes as torchrun would; what they print goes to `rank-N.out` in `folder`. At the
    end wait until all have ended; once one has failed the others are killed, and after an error here all are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    group = {}
    if world > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(world)}
    processes: list[Any] = []
    try:
        for rank in map(str, range(world)):
            place = {"RANK": rank, "LOCAL_RANK": rank} if group else {}
            given = {"HF_DATASETS_CACHE": str(folder / "datasets"), **group, **place, **(environment or {})}
            log = folder / f"rank-{rank}"
            task = (script.__name__, list(map(str, arguments)), log, cut, given)
            process = SERVER.Process(target=run_command, args=task)
            process.start()
            processes.append(process)
        yield processes
        deadline = time.perf_counter() + 240
        while not any(process.exitcode for process in processes) and time.perf_counter() < deadline:
            if not (left := [process.sentinel for process in processes if process.is_alive()]):
                break
            wait(left, max(0, deadline - time.perf_counter()))
    finally:
        for process in processes:
            process.kill()
            process.join()


def two_processes(script: ModuleType, arguments: list[Any], folder: Path) -> tuple[str, str]:
    """What the first and the second of two processes of a command print; both must end well."""
    with running(script, arguments, folder, world=2) as processes:
        pass
    errors = "".join(path.read_text() for path in sorted(folder.glob("*.err")))
    assert [process.exitcode for process in processes] == [0, 0], errors
    return (folder / "rank-0.out").read_text(), (folder / "rank-1.out").read_text()


def kill_and_go_on(script: ModuleType, watch: str, runs: list[dict[str, Any]], logs: Path) -> list[dict[str, Any]]:
    """
    Run a command as often as is told, and tell how each run ended, and how many files there were.

    `watch` is a pattern of the files in its output folder that grow. A run has `arguments`, and if given `output`,
    `world`, `environment`, `cut`, and `kill`, the most seconds after those files grew at which its processes are
    killed.
    """
    told = []
    for number, run in enumerate(runs):
        folder = Path(run.get("output") or run["arguments"][run["arguments"].index("--output") + 1])

        def size(folder: Path = folder) -> int:
            return sum(file.stat().st_size for file in folder.glob(watch))

        before, deadline = size(), time.perf_counter() + 60
        options = {name: run[name] for name in ("world", "cut", "environment") if name in run}
        with running(script, run["arguments"], logs / str(number), **options) as processes:
            if "kill" in run:
                while size() == before and processes[0].is_alive() and time.perf_counter() < deadline:
                    time.sleep(0.001)
                time.sleep(random.uniform(0, run["kill"]))
                for process in processes:
                    process.kill()
        ended = all(process.exitcode == 0 for process in processes)
        told.append({"ended": ended, "files": len(list(folder.glob(watch)))})
    return told
