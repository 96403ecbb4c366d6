"""Hold what the benchmarks share: the machine they ran on, times taken side by side, tables and plots."""

import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hieratok_hf.cli.command_line import describe_machine, find_device
from hieratok_hf.cli.outputs import write_report
from hieratok_hf.cli.parsing import add_device
from hieratok_hf.ops.attention import device_kind
from hieratok_hf.utils.memory import release_memory

END = "<!-- until here -->"


def describe_benchmark(device: torch.device) -> dict[str, Any]:
    """Describe the device, the versions that matter and the commit, for the record."""
    machine = describe_machine(device)
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    described = subprocess.run(git, capture_output=True, text=True)
    versions = {}
    for package in ("torch", "triton", "diffusers", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": machine["device"] if device.type == "cuda" else f"{machine['threads']} threads of {machine['cpu']}",
        "kind": device_kind(device),
        "platform": platform.machine(),
        "python": machine["python"],
        **versions,
        # A copy of the tree without its history is told by whoever made it.
        "commit": described.stdout.strip() or os.environ.get("GIT_COMMIT", "unknown"),
    }


def add_model_options(parser: ArgumentParser, dtypes: tuple[str, ...] | None = None) -> None:
    """Add the options of a benchmark that runs a model of a named size on one batch."""
    add = parser.add_argument
    add_device(parser)
    add("--size", default="hieratok-b", help="a named size")
    add("--images", type=int, help="images of a batch; 64 on a GPU, 2 on a CPU unless given")
    add("--pixels", type=int, default=256, help="side of the images")
    add("--dtype", choices=dtypes, help="dtype; bfloat16 on a GPU, float32 on a CPU unless given")
    add("--plain_only", action="store_true", help="compile nothing")


def settle_model_options(args: Namespace) -> tuple[torch.device, torch.dtype, int]:
    """Choose the device, the dtype and the number of images that `add_model_options` left open."""
    device = find_device(args)
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    return device, dtype, args.images or (64 if on_gpu else 2)


def print_machine(machine: dict[str, Any]) -> None:
    print(", ".join(f"{key} {value}" for key, value in machine.items()))


def record_report(
    folder: Path, name: str, report: dict[str, Any], key: tuple[str, ...] = (), lists: tuple[str, ...] = ("rows",)
) -> dict[str, Any]:
    """
    Write a report with its machine as `NAME_KIND.json` of the device's kind, whole or not at all, and return it.

    A benchmark that can be run in parts gives as `key` the values that tell its rows apart, and the lists of rows, of
    which each stands in one: rows that an earlier part recorded on the same device and versions are kept.
    """
    kind = report["machine"]["kind"].replace(" ", "_").replace(".", "").lower()
    path = folder / f"{name}_{kind}.json"
    if key and path.exists():
        report = with_earlier_rows(report, json.loads(path.read_text()), key, lists)
    folder.mkdir(exist_ok=True)
    write_report(path, report)
    print(f"wrote {path.name}")
    return report


def with_earlier_rows(
    report: dict[str, Any], earlier: dict[str, Any], key: tuple[str, ...], lists: tuple[str, ...]
) -> dict[str, Any]:
    """A report with the rows that an earlier one of this machine has beside it; those of another commit name it."""
    if {**earlier["machine"], "commit": None} != {**report["machine"], "commit": None}:
        return report

    def place(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(name)) for name in key)

    commit = {"commit": earlier["machine"]["commit"]} if earlier["machine"] != report["machine"] else {}
    whole = {name: {**earlier[name], **value} if isinstance(value, dict) else value for name, value in report.items()}
    measured = {place(row) for name in lists for row in report[name]}
    for name in lists:
        new = {place(row): row for row in report[name]}
        old = {
            place(row): {**commit, **row} for row in earlier[name] if place(row) in new or place(row) not in measured
        }
        whole[name] = list({**old, **new}.values())
    return whole


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type's name; compilers say pages."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _replayed(call: Callable[[], Any]) -> Callable[[], float]:
    """A timer of one call on the GPU, without the time that Python takes to launch it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        calls = max(1, min(50, int(0.005 / (time.perf_counter() - started))))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()

    def timed() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    return timed


def _called(call: Callable[[], Any], on_gpu: bool) -> Callable[[], float]:
    """A timer of one call as a user waits for it."""

    def timed() -> float:
        started = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return timed


def side_by_side(
    calls: dict[str, Callable[[], Any]], device: torch.device, budget: float, graphs: bool = True
) -> dict[str, float]:
    """
    Median seconds of each call, the calls taking turns so that all meet the same machine.

    All together take `budget` seconds, but each call is timed three times at least, and where one takes more than a
    minute, once. On a GPU, `graphs` times replays of a CUDA graph: the device alone.
    """
    on_gpu = device.type == "cuda"
    timers, least = {}, 3
    for name, call in calls.items():
        started = time.perf_counter()
        call()
        if time.perf_counter() - started > 60:
            least = 1
        timers[name] = _called(call, on_gpu)
        if on_gpu and graphs:
            try:
                timers[name] = _replayed(call)
            except RuntimeError as error:
                print(f"{name} allows no CUDA graph, so its launches are timed too: {error}", file=sys.stderr)
        if least > 1:
            timers[name]()
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    started = time.perf_counter()
    while len(seconds[name]) < least or (time.perf_counter() - started < budget and len(seconds[name]) < 200):
        for name, timer in timers.items():
            seconds[name].append(timer())
    return {name: statistics.median(values) for name, values in seconds.items()}


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured floating-point operations a second of a large square matrix product of random numbers."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / side_by_side({"product": lambda: left @ right}, device, 0.5)["product"]


@torch.inference_mode()
def best_rate(device: torch.device, dtype: torch.dtype) -> float:
    """
    Measured operations a second of the best of several large products and, on a CPU, convolutions of random numbers.

    PyTorch leaves products on a CPU to MKL or oneDNN and convolutions to oneDNN; one of kernel 1 is oneDNN's product.
    """
    if device.type == "cuda":
        return matrix_rate(device, dtype)
    size = 2048
    flops: dict[str, int] = {}
    calls: dict[str, Callable[[], Any]] = {}
    if dtype == torch.int8:
        left, right = (torch.randint(-127, 128, (size, size), dtype=dtype) for _ in range(2))
        flops["product"], calls["product"] = 2 * size**3, lambda: torch._int_mm(left, right)
    else:
        left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
        flops["product"], calls["product"] = 2 * size**3, lambda: left @ right
        for kernel, channels, side in ((1, size, 32), (3, 512, 64), (3, 256, 128)):
            layer = torch.nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False).to(dtype)
            name = f"convolution of {channels} channels"
            flops[name] = 2 * side**2 * layer.weight.numel()
            calls[name] = partial(layer, torch.randn(1, channels, side, side).to(dtype))
    times = side_by_side(calls, device, 1.5)
    return max(flops[name] / times[name] for name in calls)


def copy_rate(device: torch.device) -> float:
    """Measured bytes a second of a large copy, counting those read and those written."""
    source = torch.randn(2**30 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / side_by_side({"copy": lambda: target.copy_(source)}, device, 0.5)["copy"]


def resident(key: str = "VmRSS") -> int:
    """Bytes of this process in memory, or with `"VmHWM"` the most that there were since the count began."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[key].split()[0]) * 1024


class MemoryWatch:
    """What a long run holds in memory: looked at ten times, of which the first three belong to its start."""

    def __init__(self) -> None:
        self.looks: dict[str, list[float]] = {"resident_mib": [], "held_mib": []}

    def look(self, device: torch.device | None = None) -> None:
        """Look at this process as the system sees it, and without what the allocator keeps of freed memory."""
        gc.collect()
        on_gpu = device is not None and device.type == "cuda"
        self.add("resident_mib", torch.cuda.memory_reserved(device) if on_gpu else resident())
        release_memory()
        self.add("held_mib", torch.cuda.memory_allocated(device) if on_gpu else resident())

    def add(self, name: str, found: int) -> None:
        self.looks[name].append(round(found / 2**20, 1))

    def figures(self) -> dict[str, Any]:
        """The looks, and by which share the last is more than the third."""
        growth = {
            f"{name.removesuffix('_mib')}_growth": round(found[-1] / found[min(2, len(found) - 1)] - 1, 4)
            for name, found in self.looks.items()
            if found
        }
        return {**self.looks, **growth}


def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """
    The most bytes that a call holds at a time, beyond what was held before it.

    On a CPU it is read off the whole process, so ask in a fresh one: what earlier calls freed and the allocator kept
    would be used again without being counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    release_memory()
    Path("/proc/self/clear_refs").write_text("5")  # starts the count of the peak anew
    before = resident()
    call()
    return max(resident("VmHWM") - before, 0)


def in_fresh_process(
    script: str | Path, arguments: list[Any], seconds: float, memory: float | None = None
) -> dict[str, Any]:
    """
    Run a script in a process of its own, with as many threads, and read the last line that it prints as JSON.

    Where the seconds or the bytes of memory that it may have do not suffice, it is `{"failed": ...}` with the reason;
    `RuntimeError` where the script fails in another way.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([sys.executable, str(script), *map(str, arguments)], **pipes) as process:
        if memory is not None:
            resource.prlimit(process.pid, resource.RLIMIT_DATA, (int(memory), int(memory)))
        try:
            told, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return {"failed": f"more than {seconds:g} s"}
    if process.returncode == 0:
        return json.loads(told.splitlines()[-1])
    if process.returncode == -9 or "out of memory" in errors or "allocate memory" in errors:
        return {"failed": "out of memory" if memory is None else f"more than {memory / 2**30:g} GiB"}
    raise RuntimeError(f"{Path(script).name} failed: {errors[-2000:]}")


def markdown_table(head: str, rows: Iterable[Sequence[Any]]) -> str:
    """Compose a table in Markdown of the line of its heads and of the cells of each row."""
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, cells))} |" for cells in rows)])


def fill_section(text: str, begin: str, content: str) -> str:
    """Put other content between a marker of a text, which it must hold once, and the next `END`."""
    if text.count(begin) != 1:
        raise ValueError(f"The text must hold {begin!r} once.")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{content}\n{END}{rest.partition(END)[2]}"
