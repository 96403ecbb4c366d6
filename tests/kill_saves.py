"""Kill saves at random and at all critical moments: a program, because it forks before any thread exists."""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from helpers import random_core
from safetensors.torch import load_file
from tqdm import tqdm

from hieratok_hf import AutoencoderHieraTok, HieraTokModel

SHARDED, ONE_FILE = {"max_shard_size": "200KB"}, {}
# How the older model was saved, how the new one is, at how many random moments it dies, and if at all critical ones.
KINDS = {
    "one file": (ONE_FILE, ONE_FILE, 2, False),
    "shards": (None, SHARDED, 2, False),
    "shards over shards": (SHARDED, SHARDED, 2, True),
    "one file over shards": (SHARDED, ONE_FILE, 2, False),
}


def in_child(work: Callable[[], int]) -> int:
    """Start a process that ends with the number that a function returns."""
    if (child := os.fork()) == 0:
        status = 100
        try:
            status = work()
        finally:
            os._exit(status)
    return child


def result(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(step: int, work: Callable[[], int]) -> int:
    """Work, but die before the n-th change of a name."""
    left = [step]

    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("rename", "replace", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    return work()


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Read weights as a tool does that knows nothing of this package."""
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "diffusion_pytorch_model.safetensors")
    names = json.loads(index.read_text())["weight_map"]
    return {key: load_file(folder / name)[key] for key, name in names.items()}


def main() -> None:
    """
    Save below the folder that is the argument, and print as JSON how each save ended.

    `had` tells whether there was an older model, `seen` and `found` which one another tool and a class of the package
    load (0 the older, 1 the new, 2 a mixture, 3 none), `left` what the next save leaves more or less than a first one.
    """
    folder = Path(sys.argv[1])
    # They differ in a value that no shape shows.
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # without a thread that watches progress bars
    tqdm.set_lock(threading.RLock())  # its own is shared by all children, also after one that held it was killed
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    models = [random_core(seed=0, rotary_base=20.0), random_core(seed=1, rotary_base=30.0)]
    states = [core.state_dict() for core in models]
    classes = [HieraTokModel, AutoencoderHieraTok]
    told = []

    def save(target: Path, which: int, options: dict[str, str], cls: type) -> int:
        cls.from_core(models[which]).save_pretrained(target, **options)
        return 0

    def loads(target: Path, cls: type) -> int:
        try:
            loaded = cls.from_pretrained(target)
        except OSError:
            return 3
        base, state = loaded.config.rotary_base, loaded.core.state_dict()
        for which, core in enumerate(models):
            if base == core.config.rotary_base and all(torch.equal(state[key], states[which][key]) for key in state):
                return which
        return 2

    def foreign(target: Path) -> int:
        try:
            found = weights_in(target)
        except OSError:
            return 3
        for which, state in enumerate(states):
            if all(torch.equal(found[f"core.{key}"], state[key]) for key in state):
                return which
        return 2

    def listing(target: Path) -> list[str]:
        return [str(path.relative_to(target)) for path in target.rglob("*")]

    for cls in classes:  # imports what they need, once and not in each child
        save(folder / "warm", 0, SHARDED, cls)
        cls.from_pretrained(folder / "warm")
    assert len(os.listdir("/proc/self/task")) == 1  # a child could wait for ever for what another thread holds
    for kind, (old, new, moments, every_step) in KINDS.items():
        root = folder / kind
        clean, seconds = [], 0.0
        for cls in classes:
            if old is not None:
                result(in_child(partial(save, root / f"old {cls.__name__}", 0, old, cls)))
            began = time.perf_counter()
            result(in_child(partial(save, root / f"new {cls.__name__}", 1, new, cls)))
            seconds = max(seconds, time.perf_counter() - began)
            clean.append(listing(root / f"new {cls.__name__}"))
        for i in itertools.count():
            cls, target = classes[i % 2], root / str(i)
            if old is not None:
                shutil.copytree(root / f"old {cls.__name__}", target)
            new_save = partial(save, target, 1, new, cls)
            if i < moments:
                child = in_child(new_save)
                time.sleep(random.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
            else:
                child = in_child(partial(die_at, i - moments + 1, new_save))
            ended = result(child) == 0
            seen = foreign(target)
            found = result(in_child(partial(loads, target, classes[i // 2 % 2])))
            result(in_child(new_save))
            left = sorted(set(listing(target)) ^ set(clean[i % 2]))
            told.append({"kind": kind, "i": i, "had": old is not None, "seen": seen, "found": found, "left": left})
            if (i >= moments and ended) or (i + 1 == moments and not every_step):
                break
    print(json.dumps(told))


if __name__ == "__main__":
    main()
