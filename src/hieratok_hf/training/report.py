"""Report a training: its progress, a file of records, a tracker, and the step at which it went wrong."""

import contextlib
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..utils.files import name_when_full, write_whole

__all__ = ["JsonLines", "TrainingReport", "say"]


def say(line: str) -> None:
    """Print a line beside the progress bar; a training goes on where nobody reads it, or the disk is full."""
    with contextlib.suppress(OSError):
        tqdm.write(line)


class JsonLines:
    """
    Keep records in a file, a line each; a run that goes on from `first_step` drops those after it.

    Raises:
        ValueError: A line but the last, which a kill may have cut, is no JSON object with the number of a `step`.
    """

    def __init__(self, path: Path, first_step: int):
        self.path = path
        if path.exists() and not path.is_file():
            raise ValueError(f"{str(path)!r} must be a file of records.")
        lines = path.read_bytes().splitlines() if path.exists() else []
        kept = []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                step = record["step"]
            except (ValueError, TypeError, LookupError, RecursionError):
                step = None
            if type(step) is not int:
                if number < len(lines):
                    raise ValueError(f"Line {number} of {str(path)!r} is no record: mend or remove it.")
            elif step <= first_step:
                kept.append(line + b"\n")
        if path.exists():
            with write_whole(path) as file:
                file.writelines(kept)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; tensors become numbers, without rounding."""
        plain = {name: x.item() if isinstance(x, Tensor) else x for name, x in record.items()}
        with name_when_full(self.path), self.path.open("a") as file:
            file.write(json.dumps(plain) + "\n")


class TrainingReport:
    """
    Show losses, averaged over all processes and the steps since the last record, on a progress bar, in `losses.jsonl`
    of a folder and in the accelerator's tracker, from `first_step` to the last of `steps`, `every` so many: looking at
    a loss makes a GPU wait. What `progress` gave of an earlier run, it goes on with.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        first_step: int,
        steps: int,
        every: int,
        progress: dict[str, Any] | None = None,
    ):
        self.accelerator, self.folder, self.every, self.steps = accelerator, folder, every, steps
        is_main = accelerator.is_main_process
        self.records = JsonLines(folder / "losses.jsonl", first_step) if is_main else None
        self.figures = JsonLines(folder / "validation.jsonl", first_step) if is_main else None
        self.bar = tqdm(total=steps, initial=first_step, disable=not is_main, unit="step", dynamic_ncols=True)
        progress = progress or {}
        self.sums: dict[str, Tensor] = {}  # sums over the parts of a step
        self.window = {
            name: torch.tensor(value, device=accelerator.device) for name, value in progress.get("sums", {}).items()
        }
        self.counts: Counter[str] = Counter(progress.get("counts", {}))
        self.crop_sizes: list[str] = list(progress.get("crop_sizes", []))
        self.parts = self.images = 0
        self.steps_taken = first_step
        self.skipped: set[str] = set()
        # Counted on the device, so that no step has to wait for its own loss.
        self.bad_step = torch.full((), -1, device=accelerator.device)
        self.start = time.perf_counter()
        self.seconds_before = progress.get("seconds", 0.0)

    def add(self, losses: dict[str, Tensor], skipped: list[str]) -> None:
        """Take in the losses of one part of a step, and the reasons of images that were left out."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        self.parts += 1
        for reason in skipped:
            if reason not in self.skipped:
                self.skipped.add(reason)
                say(f"left out ({len(self.skipped)} so far): {reason}")

    def end_step(
        self, step: int, norm: Any, count: int, learning_rate: float, crop: tuple[int, int] | None = None
    ) -> None:
        """
        Close a step of `count` images, of the height and width `crop` in pixels, whose gradient has the norm `norm`
        `()`; raises what `check` does, with a GPU only when a record is due.
        """
        finite = torch.isfinite(self.sums["loss"])
        if self.accelerator.scaler is None:  # a scaler of float16 tries scales until one does not overflow
            finite = finite & torch.isfinite(norm)
        self.bad_step = torch.where((self.bad_step < 0) & ~finite, step, self.bad_step)
        if self.bad_step.device.type == "cpu":
            self.check()
        for name, value in self.sums.items():
            self.window[name] = self.window.get(name, 0) + value / self.parts
        self.counts.update(self.sums.keys())
        self.sums, self.parts = {}, 0
        if crop is not None:
            self.crop_sizes = sorted({*self.crop_sizes, "x".join(map(str, crop))})
        self.images += count
        self.steps_taken = step + 1
        self.bar.update()
        if (step + 1) % self.every == 0 or step + 1 == self.steps:
            means = {name: value / self.counts[name] for name, value in self._sums_of_window().items()}
            record = {"step": step + 1, **means, "norm": norm.item(), "lr": learning_rate}
            self.check()
            speed = self.images / (time.perf_counter() - self.start)
            if self.records is not None:
                self.records.write(
                    {**record, **({"crop_sizes": " ".join(self.crop_sizes)} if self.crop_sizes else {})}
                )
            self.bar.set_postfix({"images/s": f"{speed:.1f}"} | {name: f"{x:.4g}" for name, x in means.items()})
            self.accelerator.log({**record, "images_per_second": speed}, step=step + 1)
            self.window, self.crop_sizes = {}, []
            self.counts.clear()

    def _sums_of_window(self) -> dict[str, float]:
        """Average the sums since the last record over all processes, which all call it."""
        if not self.window:
            return {}
        means = self.accelerator.reduce(torch.stack(list(self.window.values())), "mean")
        return dict(zip(self.window, means.tolist()))

    @property
    def seconds(self) -> float:
        """Give the time since the training began, of all its runs."""
        return self.seconds_before + time.perf_counter() - self.start

    def progress(self) -> dict[str, Any]:
        """Give what a state keeps, for a report that goes on; all processes call it."""
        window = {"sums": self._sums_of_window(), "counts": dict(self.counts), "crop_sizes": self.crop_sizes}
        return {"seconds": self.seconds, **window}

    def validated(self, step: int, figures: dict[str, Any]) -> None:
        """Write the figures of a validation after `step` steps."""
        if self.figures is not None:
            self.figures.write({"step": step, **figures})
        scalars = {name: value for name, value in figures.items() if isinstance(value, int | float)}
        say(f"step {step}: " + ", ".join(f"{name} {value:.5g}" for name, value in scalars.items()))
        self.accelerator.log({f"validation/{name}": value for name, value in scalars.items()}, step=step)

    def sampled(self, step: int, sheet: Image.Image) -> None:
        """Keep a sheet of samples after `step` steps as `samples/step-*.png`."""
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        with write_whole(folder / f"step-{step:09d}.png") as file:
            sheet.save(file, format="png")
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                order = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": np.asarray(sheet)[None]}, step=step, **order)

    def check(self) -> None:
        """Raise `FloatingPointError` with the number of the step, if a loss or gradient was not finite."""
        if (bad_step := int(self.bad_step)) >= 0:
            raise FloatingPointError(
                f"The loss or its gradient was not finite at step {bad_step + 1}. The last state is from before; a "
                "lower --lr or --clip, or bf16 instead of fp16, may help."
            )

    def close(self) -> None:
        """End the progress bar, and say how many images were left out."""
        self.bar.close()
        if self.skipped:
            say(f"{len(self.skipped)} images were left out, because they cannot be decoded.")
