"""Cache latents, kill at random moments, go on: run as a program, because it forks before any thread exists."""

import importlib.util
import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path


class HalfAndDie:
    """Stands in for `os.fsync`: cuts the n-th file in two, and the process dies."""

    def __init__(self, files: int):
        self.left = files

    def __call__(self, file: int) -> None:
        self.left -= 1
        if not self.left:
            os.ftruncate(file, os.fstat(file).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)


def start(cache_latents, arguments: list[str], world: int = 1, cut: int = 0) -> list[int]:
    """Start processes as torchrun does; with `cut` they die in the middle of writing their n-th file."""
    environment = {}
    if world > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        environment = {"WORLD_SIZE": str(world), **address}
    children = []
    for rank in range(world):
        if (child := os.fork()) == 0:
            import torch

            torch.set_num_threads(1)
            os.environ.update(environment, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}))
            log = Path(arguments[arguments.index("--output") + 1]).with_suffix(".log")
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            os.dup2(1, 2)
            if cut:
                os.fsync = HalfAndDie(cut)
            os._exit(cache_latents.main(arguments))
        children.append(child)
    return children


def finished(children: list[int]) -> bool:
    return {os.waitpid(child, 0)[1] for child in children} == {0}


def killed(children: list[int], folder: Path, seconds: float) -> bool:
    """Kill some seconds after the next shard is there; whether that came before the end."""
    before, deadline = len(list(folder.glob("shard-*"))), time.perf_counter() + 60
    while len(list(folder.glob("shard-*"))) == before and time.perf_counter() < deadline:
        time.sleep(0.001)
    time.sleep(seconds)
    for child in children:
        os.kill(child, signal.SIGKILL)  # none has been waited for, so each is still there
    return not finished(children)


def main() -> None:
    script, folder, arguments = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    for slow in (
        "diffusers.models.autoencoders.autoencoder_kl",
        "hieratok_hf.models.autoencoder_hieratok",
        "torch.distributed",
    ):
        importlib.import_module(slow)  # once, and not in each child
    spec = importlib.util.spec_from_file_location("cache_latents", script)
    cache_latents = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cache_latents)

    def to(name: str, streaming: bool = False) -> list[str]:
        return [*arguments, "--output", str(folder / name), *(["--streaming"] if streaming else [])]

    ended = {"whole": finished(start(cache_latents, to("whole")))}
    ended["stream"] = finished(start(cache_latents, to("stream", streaming=True)))
    ended["two"] = finished(start(cache_latents, to("two"), world=2))
    rng, kills, counts = random.Random(), 0, []
    for world, streaming in ((1, True), (2, True), (1, False), (2, False), (1, True)):
        run = start(cache_latents, to("parts", streaming), world)
        kills += killed(run, folder / "parts", rng.uniform(0, 0.05))
        counts.append(len(list((folder / "parts").glob("shard-*"))))
    cut = not finished(start(cache_latents, to("cut", streaming=True), cut=4))
    ended["cut"] = finished(start(cache_latents, to("cut")))
    ended["parts"] = finished(start(cache_latents, to("parts"), world=2))
    print(json.dumps({"killed": kills, "cut": cut, "ended": ended, "counts": counts}))


if __name__ == "__main__":
    main()
