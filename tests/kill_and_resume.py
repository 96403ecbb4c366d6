"""Train, kill at random moments, resume: run as a program, because it forks before any thread exists."""

import contextlib
import importlib.util
import json
import os
import random
import signal
import sys
import time
from pathlib import Path


def trained_to_the_end(train_tokenizer, arguments: list[str], kill_after: float | None, kill_in_save: int) -> bool:
    """Train in a child that is killed some seconds after its first step, or in the middle of its n-th save."""
    folder = Path(arguments[arguments.index("--output") + 1])
    child = os.fork()
    if child == 0:
        import torch

        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        if kill_in_save:
            save, saves = torch.save, []

            def save_half_and_die(state, file):
                saves.append(state)
                save(state, file)
                if len(saves) == kill_in_save:
                    file.truncate(file.tell() // 2)
                    file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)

            torch.save = save_half_and_die
        os._exit(train_tokenizer.main([*arguments, "--resume"]))
    if kill_after is not None:
        records, size = folder / "losses.jsonl", 0
        while not (records.exists() and records.stat().st_size > size):
            time.sleep(0.01)
            if os.waitpid(child, os.WNOHANG)[0]:
                return True
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


def main() -> None:
    script, arguments = sys.argv[1], sys.argv[2:]
    spec = importlib.util.spec_from_file_location("train_tokenizer", script)
    train_tokenizer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_tokenizer)
    rng, killed = random.Random(0), 0
    for _ in range(5):
        killed += not trained_to_the_end(train_tokenizer, arguments, rng.uniform(0.0, 0.5), 0)
    killed_in_save = not trained_to_the_end(train_tokenizer, arguments, None, 2)
    finished = trained_to_the_end(train_tokenizer, arguments, None, 0)
    print(json.dumps({"killed": killed, "killed_in_save": killed_in_save, "finished": finished}))


if __name__ == "__main__":
    main()
