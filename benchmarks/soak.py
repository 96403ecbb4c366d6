"""Watch what long runs hold in memory: images of many sizes, a training, and the page with visitors."""

import argparse
import contextlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from bench_image_sizes import stream
from measuring import (
    MemoryWatch,
    describe_benchmark,
    in_fresh_process,
    markdown_table,
    print_machine,
    record_report,
)
from PIL import Image

from hieratok_hf import open_image
from hieratok_hf.cli.parsing import make_parser, positive
from hieratok_hf.cli.reconstruct import BUNDLED
from hieratok_hf.training.report import TrainingReport

RESULTS = Path(__file__).parent / "results"
ROWS = {"sizes": 1000, "training": 300, "page": 400}
"""Images, steps or requests of each row, of which the first three tenths warm it up."""
BOUNDARY = "frontier"


def sizes(count: int) -> dict[str, Any]:
    """Encode and decode images of random sides by hieratok-tiny."""
    return stream("hieratok-tiny", count, 512, torch.device("cpu"))


def training(count: int) -> dict[str, Any]:
    """Train a tokenizer from scratch on crops of several sizes, with states and samples on the way."""
    from hieratok_hf.cli.train import main

    watch, end_step = MemoryWatch(), TrainingReport.end_step

    def watched(self: Any, step: int, *facts: Any) -> None:
        end_step(self, step, *facts)
        if (step + 1) % max(count // 10, 1) == 0:
            watch.look()

    silent, patched = contextlib.redirect_stdout(sys.stderr), mock.patch.object(TrainingReport, "end_step", watched)
    with tempfile.TemporaryDirectory() as folder, silent, patched:
        given: list[Any] = ["--data", BUNDLED, "--output", folder, "--steps", count, "--batch_size", 4]
        given += ["--crop_sizes", 32, 48, 64, "--crop_scale", 0, 0]
        given += ["--linear_steps", 20, "--statistics_batches", 4, "--save_every", 50, "--sample_every", 50]
        if status := main([*map(str, given), "--log_every", "10"]):
            raise RuntimeError(f"the training ended with {status}")
    return {"steps": count, **watch.figures()}


def page(count: int, largest: int = 512) -> dict[str, Any]:
    """Send the page requests of eight visitors at a time, nine of ten with an image, and look at it from outside."""
    draw, watch = random.Random(0), MemoryWatch()
    photographs = [open_image(path) for path in sorted(BUNDLED.glob("*.webp"))]
    with tempfile.TemporaryDirectory() as folder, serve(folder) as (process, url), ThreadPoolExecutor(8) as visitors:
        for _ in range(10):
            sides = [(draw.randint(64, largest), draw.randint(64, largest)) for _ in range(count // 10)]
            images = [draw.choice(photographs).resize(size) for size in sides]
            answers = list(visitors.map(lambda pair: ask(url, *pair), enumerate(images)))
            if wrong := [answer for answer in answers if '"success":true' not in answer or "cannot be used" in answer]:
                raise RuntimeError(f"the page answered {wrong[0][-500:]}")
            watch.add("resident_mib", psutil.Process(process.pid).memory_info().rss)
        (own,) = Path(folder).glob("hieratok-app-*")
        sent = sum(path.is_file() for path in (own / "sent").rglob("*"))
        shown = [path.stat().st_size for path in (own / "shown").rglob("*") if path.is_file()]
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        files = {"files_of_visitors": sent, "folder_left_at_the_end": own.exists()}
    files |= {"results": len(shown), "results_mib": round(sum(shown) / 2**20, 1)}
    return {"requests": count, **watch.figures(), **files}


@contextlib.contextmanager
def serve(folder: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """Serve the page in another process, whose temporary files go to a folder; give the process and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hieratok_hf", "app", "--port", str(port)]
    environment = {**os.environ, "TMPDIR": folder}
    with subprocess.Popen(command, stdout=sys.stderr, env=environment) as process:
        try:
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline and process.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.5)
            yield process, f"http://127.0.0.1:{port}/gradio_api"
        finally:
            process.kill()


def ask(url: str, number: int, image: Image.Image) -> str:
    """Send an image and read what is shown of it, or generate two images where the number ends in 9."""
    function, data = 3, [number % 10, number, False, 2, 4, 2.0, 1]
    if number % 10 != 9:
        file = io.BytesIO()
        image.save(file, "png")
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="{number}.png"\r\n\r\n'
        body = head.encode() + file.getvalue() + f"\r\n--{BOUNDARY}--\r\n".encode()
        (path,) = json.loads(post(f"{url}/upload", body, f"multipart/form-data; boundary={BOUNDARY}"))
        function, data = 0, [{"path": path, "meta": {"_type": "gradio.FileData"}}, "hieratok-tiny"]
    session = f"s{time.monotonic_ns()}-{number}"
    event = {"data": data, "fn_index": function, "session_hash": session}
    post(f"{url}/queue/join?", json.dumps(event).encode(), "application/json")
    return post(f"{url}/queue/data?session_hash={session}")


def post(url: str, body: bytes | None = None, kind: str = "") -> str:
    with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": kind} if body else {})) as answer:
        return answer.read().decode(errors="replace")


def table(report: dict[str, Any]) -> str:
    """A line a row in Markdown: memory at the third tenth and at the end, as the system sees it and as it is held."""
    lines = []
    for name, row in report["rows"].items():
        cells = [name]
        for kind in ("resident", "held"):
            looks = row[f"{kind}_mib"]
            cells.append(f"{looks[2]:.0f}, {looks[-1]:.0f}, {100 * row[f'{kind}_growth']:+.1f} %" if looks else "-")
        lines.append(cells)
    return markdown_table("| row | resident: MiB warm, at the end, growth | held | ".rstrip(), lines)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], help="what to watch")
    parser.add_argument(
        "--count", type=positive, help="images, steps or requests of a row, 1000, 300 and 400 unless given"
    )
    parser.add_argument("--seconds", type=float, default=3600, help="time for each row, after which it is given up")
    parser.add_argument("--json", action="store_true", help="write results/soak_KIND.json")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.row:
        print(json.dumps({"sizes": sizes, "training": training, "page": page}[args.row](args.count)))
        return 0
    report: dict[str, Any] = {"machine": describe_benchmark(torch.device("cpu")), "rows": {}}
    print_machine(report["machine"])
    for name in args.rows:
        given = ["--row", name, "--count", args.count or ROWS[name]]
        report["rows"][name] = in_fresh_process(__file__, given, args.seconds)
        print(json.dumps({name: report["rows"][name]}), flush=True)
    print(table(report))
    if args.json:
        record_report(RESULTS, "soak", report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
