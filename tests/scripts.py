"""What tests of several scripts share: surroundings of their own, and the records that they leave."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState


def forget_processes() -> None:
    """accelerate keeps what the first script of a process asked for."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def records(output: Path, name: str = "losses.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


def two_processes(script: Path, arguments: list[Any], cache: Path) -> tuple[str, str]:
    """What the first and the second of two processes of a script print; both must end well."""
    command = [sys.executable, str(script), *map(str, arguments)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        # What torchrun tells its processes; starting it as well would take as long as all else.
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    group |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen(command, env={**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank}, **pipes)
        for rank in "01"
    ]
    try:
        told = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "".join(errors for _, errors in told)
    return told[0][0], told[1][0]
