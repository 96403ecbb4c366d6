"""Run a script, kill it at random moments, go on: a program, because it forks before any thread exists."""

import importlib
import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from scripts import load_script


class HalfAndDie:
    """Stands in for `os.fsync`: cuts the n-th file in two, and the process dies."""

    def __init__(self, files: int):
        self.left = files

    def __call__(self, file: int) -> None:
        self.left -= 1
        if not self.left:
            os.ftruncate(file, os.fstat(file).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)


def start(
    script: ModuleType, arguments: list[str], folder: Path, world: int, cut: int, environment: dict[str, str]
) -> list[int]:
    """Start processes as torchrun does; with `cut` they die in the middle of writing their n-th file."""
    if world > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        environment = {"WORLD_SIZE": str(world), **address, **environment}
    children = []
    for rank in range(world):
        if (child := os.fork()) == 0:
            import torch

            torch.set_num_threads(1)
            os.environ.update(environment, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}))
            os.dup2(os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            os.dup2(1, 2)
            if cut:
                os.fsync = HalfAndDie(cut)
            os._exit(script.main(arguments))
        children.append(child)
    return children


def main() -> None:
    """
    Run a script as often as is told, and print as JSON how each run ended.

    The arguments are the script, a pattern of the files in its output folder that grow, and runs: `arguments`, and if
    given `world`, `environment`, `cut`, and `kill`, the most seconds after those files grew at which its processes are
    killed.
    """
    path, watch, runs = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    for slow in ("diffusers.models.autoencoders.autoencoder_kl", "hieratok_hf", "torch.distributed"):
        importlib.import_module(slow)  # once, and not in each child
    script = load_script(path.parent.name, path.stem)
    told: list[dict[str, Any]] = []
    for run in runs:
        folder = Path(run.get("output") or run["arguments"][run["arguments"].index("--output") + 1])

        def size(folder: Path = folder) -> int:
            return sum(file.stat().st_size for file in folder.glob(watch))

        before, deadline = size(), time.perf_counter() + 60
        given = run.get("world", 1), run.get("cut", 0), run.get("environment", {})
        children = start(script, run["arguments"], folder, *given)
        if "kill" in run:
            while size() == before and time.perf_counter() < deadline:
                time.sleep(0.001)
            time.sleep(random.uniform(0, run["kill"]))
            for child in children:
                os.kill(child, signal.SIGKILL)  # none has been waited for, so each is still there
        ended = {os.waitpid(child, 0)[1] for child in children} == {0}
        told.append({"ended": ended, "files": len(list(folder.glob(watch)))})
    print(json.dumps(told))


if __name__ == "__main__":
    main()
