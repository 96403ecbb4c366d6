"""A page to try the tokenizer and the generator in a browser; a Hugging Face Space runs it as it is."""

import contextlib
import os
import queue
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from diffusers.utils import logging
from gradio import route_utils
from PIL import Image
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from .. import AutoencoderHieraTok, HieraTokDiTPipeline
from ..evaluation.generation import number_images
from ..utils.images import ImageError, decode_image
from ..utils.memory import limit_arenas, release_memory
from .command_line import load_or_explain
from .generate import as_images, class_label, load_pipeline
from .main import parse
from .reconstruct import AMPLIFY, BUNDLED, amplify_difference, encode_and_decode, load_model
from .terminal import Problem, one_line, run_script

MAX_BYTES, MAX_PIXELS, MAX_SIDE = 20 * 2**20, 32_000_000, 768
MAX_STEPS, MAX_IMAGES, MAX_GUIDANCE, MAX_SEED = 100, 8, 10.0, 2**31 - 1
# Colours stay natural, and flat areas smooth, with much guidance.
GUIDANCE: dict[str, Any] = {"guidance_eta": 0.5, "guidance_interval": (0.3, 1.0)}
WAITING, AT_ONCE = 40, 2
SWEEP_EVERY, KEEP_FILES, KEEP_UNREAD = 600, 3600, 900
"""Seconds: how often files are looked through, and how old those grow that a visitor got, or sent to no end."""

INTRODUCTION = """# HieraTok
A multi-scale image tokenizer, for transformers and diffusers: an independent implementation of
[arXiv 2509.23736](https://arxiv.org/abs/2509.23736). These weights are small and were trained on a CPU."""
LIMITS = (
    f"Files of up to {MAX_BYTES / 2**20:.0f} MB and {MAX_PIXELS / 1e6:.0f} megapixels. An image with a side of more "
    f"than {MAX_SIDE} pixels is shrunk to that, and all figures are of the smaller image."
)
GALLERY = {"format": "png", "height": "max-content", "object_fit": "contain", "fit_columns": False}
GALLERY |= {"interactive": False, "show_label": False}
# Generated images have few pixels: they are shown as they are, not smoothed.
CSS = """
#generated img { image-rendering: pixelated; }
#figures table { width: 100%; }
#figures th { text-align: left; overflow-wrap: anywhere; }
#figures td:first-child { white-space: nowrap; }
#message { border-left: 4px solid #dc2626; padding-left: 12px; }
@media (max-width: 640px) { .grid-container { grid-template-columns: 1fr 1fr !important; } }
"""


class KeepUploads:
    """Serve no file that a visitor sent, to nobody, and remove what was never asked about."""

    def __init__(self, app: Any, folder: str):
        self.app, self.folder = app, os.path.realpath(folder)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        names = re.split("file[=/]", scope.get("path", ""), maxsplit=1)
        if any(os.path.realpath(name).startswith(self.folder) for name in (names[-1], f"/{names[-1]}")):
            await PlainTextResponse("File not allowed.", 403)(scope, receive, send)
            return
        if scope.get("path", "").endswith("/upload"):
            self.sweep()
        await self.app(scope, receive, send)

    def sweep(self) -> None:
        for path in Path(self.folder).glob("*"):
            with contextlib.suppress(OSError):  # it may just have been read
                if path.stat().st_mtime < time.time() - KEEP_UNREAD:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def give_uploads_names_of_their_own() -> None:
    """Let no two files that were sent share a path, which Gradio makes of their content: each is removed once read."""
    plain = route_utils.GradioUploadFile.__init__

    def salted(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self.sha.update(secrets.token_bytes(16))

    route_utils.GradioUploadFile.__init__ = salted


class Refused(Exception):
    """A file or a setting of a visitor that cannot be used; the message is for them."""


def read_image(path: str) -> tuple[Image.Image, str]:
    """
    Read a file that a visitor sent, upright and in RGB, with sides of at most `MAX_SIDE` pixels.

    Returns:
        The image, and one line that says what it was and, if so, that it was shrunk.

    Raises:
        Refused: The file is too large, or no image, or damaged; the message has its name without the folders.
    """
    name = Path(path).name
    try:
        if (size := os.stat(path).st_size) > MAX_BYTES:
            limit = f"the limit of {MAX_BYTES / 2**20:.0f} MB"
            raise Refused(f"{name!r}: is too large for {limit} ({size / 2**20:.1f} MB)")
        image = decode_image(Path(path).read_bytes(), name, max_pixels=MAX_PIXELS)
    except OSError as error:
        raise Refused(f"{name!r}: cannot be read ({error.strerror})") from error
    except ImageError as error:
        limit = f"the limit of {MAX_PIXELS / 1e6:.0f} megapixels"
        raise Refused(str(error).replace(f"max_pixels={MAX_PIXELS}", limit)) from error
    width, height = image.size
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    shrunk = image.size != (width, height)
    return image, f"{width} x {height} pixels" + (f", shrunk to at most {MAX_SIDE} a side" if shrunk else "")


def reconstruct(path: str | None, vae: AutoencoderHieraTok) -> tuple[Any, Any, str]:
    """Make what the page shows of a file: the pair under the slider, labelled images, and a table in Markdown."""
    if path is None:
        raise Refused("There is none")
    image, size = read_image(path)
    try:
        (*_, original), scales, figures = encode_and_decode(image, vae)
    except ValueError as error:
        raise Refused(f"{Path(path).name!r}: {one_line(error)}") from error
    # A browser would smooth what it enlarges.
    shown = [(x.resize(original.size, Image.Resampling.NEAREST), x.size) for x in scales]
    labelled = [
        (x, f"scale {i}: {w} x {h}, {decibels:.1f} dB")
        for i, ((x, (w, h)), decibels) in enumerate(zip(shown, figures["scales_psnr_db"]), start=1)
    ]
    difference = amplify_difference(original, scales[-1])
    channels, height, width = figures["latent_shape"]
    rows = {
        f"`{Path(path).name}`": size,
        "-": "-",  # what is above this is the head of the table
        "PSNR": f"{figures['psnr_db']:.2f} dB",
        "SSIM": "-" if figures["ssim"] is None else f"{figures['ssim']:.4f}",
        "encoded": f"{original.width} x {original.height} pixels, {3 * original.width * original.height:,} numbers",
        "latent": f"{channels} x {height} x {width}, {channels * height * width:,} numbers",
        "compression": f"{figures['compression']:.1f}x fewer numbers",
    }
    images = [(original, "original"), *labelled, (difference, f"difference x{AMPLIFY}")]
    return (original, scales[-1]), images, "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def generate(
    pipe: HieraTokDiTPipeline,
    lock: threading.Lock,
    key: int | None,
    count: int,
    steps: int,
    guidance: float,
    seed: int | None,
    scales: int,
) -> Iterator[tuple[list[Image.Image], str]]:
    """
    Make images of a class, those of `hieratok generate` for that class, seed and guidance, and show them on the way.

    Yields:
        `count` images, and a line that says what they are: previews of the steps by so many scales of the tokenizer,
        as many as are asked for in time, then the images themselves. The lock is held while the pipeline is used.
    """
    if key is None or seed is None:
        raise Refused("Choose a class, and a whole number as the seed")
    rows = [row * pipe.num_classes + key for row in range(count)]
    shown: queue.Queue[Any] = queue.Queue()
    left = threading.Event()

    def show(pipe: HieraTokDiTPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        shown.put((step, (255 * tensors["preview"].float().cpu()).round().byte()))
        pipe._interrupt = left.is_set()
        return {}

    def work() -> torch.Tensor:
        settings = {"num_inference_steps": steps, "guidance_scale": guidance, **GUIDANCE}
        with lock:
            return number_images(pipe, rows, seed, callback_on_step_end=show, preview_scales=scales, **settings)

    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(work)
        future.add_done_callback(lambda _: shown.put(None))
        try:
            for step, levels in iter(shown.get, None):
                if shown.empty():  # a page that is slow misses some, and falls back by none
                    size = f"{levels.shape[-1]} x {levels.shape[-2]}"
                    yield as_images(levels), f"step {step + 1} of {pipe.num_timesteps}: previews of {size} pixels"
            images = as_images(future.result())
        finally:
            left.set()
    width, height = images[0].size
    yield images, f"seed {seed}, {steps} steps, guidance {guidance:g}: images of {width} x {height} pixels"


def build(vae: AutoencoderHieraTok, pipe: HieraTokDiTPipeline, uploads: str) -> gr.Blocks:
    """The page of two models, which opens with results of both; `run` serves it, with a folder for what is sent."""
    # Each thread that makes images keeps memory of its own, and Gradio has up to 40.
    makers = ThreadPoolExecutor(AT_ONCE)
    lock, examples = threading.Lock(), [str(path) for path in sorted(BUNDLED.glob("*.webp"))]
    choices = [(class_label(pipe, key), key) for key in range(pipe.num_classes)]
    scales = list(range(1, len(pipe.vae.config.scale_factors) + 1))
    first: dict[str, Any] = {"key": 0, "count": 4, "steps": 25, "guidance": 8.0, "seed": 0, "scales": scales[:2][-1]}
    *_, (made, line) = generate(pipe, lock, **first)
    pair, images, figures = reconstruct(examples[0], vae) if examples else (None, None, None)

    def of_file(path: str | None) -> dict[Any, Any]:
        try:
            values = dict(zip((slider, gallery, table), makers.submit(reconstruct, path, vae).result()))
        except Refused as problem:
            told = gr.update(value=f"**This file cannot be used.** {problem}.", visible=True)
            values, shown = {message: told, table: None}, False
        else:
            values[message], shown = gr.update(visible=False), True
        finally:
            release_memory()
        return {file: None, column: gr.update(visible=shown), **values}  # the place for files is ready for the next

    def of_upload(path: str | None) -> dict[Any, Any]:
        try:
            return of_file(path)
        finally:
            if path is not None:  # nobody asks for it again, and nobody else may see it
                shutil.rmtree(Path(path).parent, ignore_errors=True)

    def of_example(index: int) -> dict[Any, Any]:
        return of_file(examples[index])

    def of_class(*settings: Any) -> Iterator[tuple[list[Image.Image] | None, str]]:
        try:
            yield from generate(pipe, lock, *settings)
        except Refused as problem:
            yield None, f"**Nothing was made.** {problem}."

    with gr.Blocks(title="HieraTok", analytics_enabled=False, delete_cache=(SWEEP_EVERY, KEEP_FILES)) as demo:
        gr.Markdown(INTRODUCTION)
        with gr.Tab("Reconstruct"), gr.Row():
            with gr.Column(scale=1, min_width=300):
                file = gr.File(label="An image of yours", height=160, elem_id="file")
                file.GRADIO_CACHE = uploads  # it stays where it was sent to
                file.preprocess = lambda sent: sent and sent.path  # Gradio's own leaves an empty file for each
                message = gr.Markdown(visible=False, elem_id="message")
                gr.Markdown(LIMITS)
                thumbnails = {"components": [gr.Image(visible=False)], "samples": [[path] for path in examples]}
                choice = gr.Dataset(**thumbnails, type="index", label="Or one of these", elem_id="examples")
                table = gr.Markdown(figures, elem_id="figures")
            with gr.Column(scale=2, min_width=320) as column:
                gr.Markdown("### Original on the left, reconstruction on the right")
                slider = gr.ImageSlider(pair, format="png", interactive=False, show_label=False, elem_id="slider")
                gr.Markdown("### An image a scale, and the difference")
                gallery = gr.Gallery(images, columns=3, **GALLERY, elem_id="scales")
            outputs = [file, message, column, slider, gallery, table]
            made_by = {"concurrency_limit": AT_ONCE, "show_progress_on": [slider, table], "api_visibility": "private"}
            file.upload(of_upload, file, outputs, **made_by)
            choice.click(of_example, choice, outputs, **made_by)
        with gr.Tab("Generate"), gr.Row():
            with gr.Column(scale=1, min_width=300):
                settings = [
                    gr.Dropdown(choices, value=first["key"], label="Class"),
                    gr.Slider(1, MAX_IMAGES, value=first["count"], step=1, precision=0, label="Images"),
                    gr.Slider(1, MAX_STEPS, value=first["steps"], step=1, precision=0, label="Steps"),
                    gr.Slider(1.0, MAX_GUIDANCE, value=first["guidance"], step=0.1, label="Guidance (1 is none)"),
                    gr.Number(first["seed"], precision=0, minimum=0, maximum=MAX_SEED, label="Seed"),
                    gr.Radio(scales, value=first["scales"], label="Scales in the previews"),
                ]
                button = gr.Button("Generate", variant="primary", elem_id="generate")
            with gr.Column(scale=2, min_width=320):
                status = gr.Markdown(line, elem_id="status")
                generated = gr.Gallery(made, columns=4, **GALLERY, elem_id="generated")
            # The pipeline keeps the state of a call, so that one call goes on at a time.
            made_by = {"concurrency_limit": 1, "show_progress_on": generated, "api_visibility": "private"}
            button.click(of_class, settings, [generated, status], **made_by)
    return demo.queue(max_size=WAITING)


def run(args: Namespace) -> list[str]:
    """Load the models, serve the page until it is stopped, and return no lines to print."""
    # One program a layer and size of image, as oneDNN keeps by the thousand, would add up: every visitor has another.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    limit_arenas(2)
    vae = load_or_explain(load_model, "--model", args.model, args.device, "float32")
    pipe = load_or_explain(load_pipeline, "--generator", args.generator, args.device, "float32")
    if not isinstance(pipe.vae, AutoencoderHieraTok):
        raise Problem(f"--generator {args.generator!r}: its {type(pipe.vae).__name__} decodes no previews")
    pipe.set_progress_bar_config(disable=True)
    host = args.host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    if host != "localhost" and not host.startswith("127.") and host != "::1":
        print(f"note: --host {host}: whoever reaches this machine can use the page", file=sys.stderr)
    give_uploads_names_of_their_own()
    with tempfile.TemporaryDirectory(prefix="hieratok-app-") as folder:

        def leave(*_: Any) -> None:
            while os.path.exists(folder):  # a visitor may be sending something
                shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)  # the server would wait for its visitors

        for end in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(end, leave)
        sent, shown = (os.path.join(folder, name) for name in ("sent", "shown"))
        os.mkdir(sent)
        os.environ["GRADIO_TEMP_DIR"] = shown
        page = build(vae, pipe, sent)
        os.environ["GRADIO_TEMP_DIR"] = sent
        settings = {"server_name": args.host, "server_port": args.port, "max_file_size": MAX_BYTES, "css": CSS}
        settings["allowed_paths"] = [shown]
        settings["app_kwargs"] = {"middleware": [Middleware(KeepUploads, folder=sent)]}
        settings["footer_links"] = ["gradio", "settings"]
        off = ("share", "show_error", "run_history", "enable_monitoring", "ssr_mode", "pwa", "mcp_server")
        try:
            page.launch(**settings, **dict.fromkeys(off, False))
        except OSError as error:
            raise Problem(f"--host and --port: {one_line(error)}") from error
    return []


def main(argv: list[str] | None = None) -> int:
    args = parse("app", argv)
    logging.disable_progress_bar()  # of loading
    return run_script(run, args)
