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
from collections.abc import Callable, Iterator
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
from ..utils.memory import limit_arenas, release_memory
from .app_style import ABOUT_MODELS, COLOURS, COMPARE, CSS, HANDLES, INTRODUCTION, LIMITS
from .app_views import MAX_BYTES, Photo, Refused, Views, make_views, read_photo
from .command_line import load_or_explain
from .generate import as_images, class_label, load_pipeline
from .main import parse
from .reconstruct import enable_advised_tiling, load_model
from .terminal import Problem, end, one_line, run_script

IMAGES = Path(__file__).parents[1] / "page_images"
MAX_STEPS, MAX_IMAGES, MAX_GUIDANCE, MAX_SEED = 100, 8, 10.0, 2**31 - 1
# Colours stay natural, and flat areas smooth, with much guidance.
GUIDANCE: dict[str, Any] = {"guidance_eta": 0.5, "guidance_interval": (0.3, 1.0)}
RANDOM_SEEDS = 10**6  # few enough to be typed again
# Of what hieratok-dit-tiny makes, these are what one recognises, the surest first.
FIRST_CLASSES = ("church", "English springer", "garbage truck", "gas pump", "golf ball", "tench", "parachute")
WAITING, AT_ONCE = 40, 2
SWEEP_EVERY, KEEP_FILES, KEEP_UNREAD = 600, 3600, 900
"""Seconds: how often files are looked through, and how old those grow that a visitor got, or sent to no end."""
KEEP_VISITORS = 100
"""Visitors whose last image is held in memory, for another model; up to 2 MB each."""


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


def generate(
    pipe: HieraTokDiTPipeline,
    lock: threading.Lock,
    key: int | None,
    seed: int | None,
    count: int,
    steps: int,
    guidance: float,
    scales: int,
) -> Iterator[tuple[list[Image.Image], str]]:
    """
    Make images of a class, those of `hieratok generate` for that class, seed and guidance, and show them on the way.

    Yields:
        `count` images, and a line that says what they are: previews of the steps by so many scales of the tokenizer,
        as many as are asked for in time, then the images themselves. The lock is held while the pipeline is used.
    """
    if key is None or seed is None:
        raise Refused("Choose what to make, and a whole number as the seed")
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


def build(vaes: dict[str, AutoencoderHieraTok], pipe: HieraTokDiTPipeline, uploads: str) -> gr.Blocks:
    """
    Build the page, which opens with results; `run` serves it, with a folder for what is sent.

    Args:
        vaes: The tokenizers to choose among by name, the first one chosen at first.
        pipe: The generator.
        uploads: The folder for files that visitors send.
    """
    # Each thread that makes images keeps memory of its own, and Gradio has up to 40.
    makers = ThreadPoolExecutor(AT_ONCE)
    lock, examples = threading.Lock(), [str(path) for path in sorted(IMAGES.glob("*.webp"))]
    ranks = {name: rank for rank, name in enumerate(FIRST_CLASSES)}
    classes = sorted(range(pipe.num_classes), key=lambda key: ranks.get(class_label(pipe, key), len(ranks)))
    choices = [(class_label(pipe, key), key) for key in classes]
    scales = list(range(1, len(pipe.vae.config.scale_factors) + 1))
    first: dict[str, Any] = {"key": classes[0], "count": 4, "seed": 0, "steps": 25, "guidance": 8.0}
    first["scales"] = scales[:2][-1]
    *_, (made, line) = generate(pipe, lock, **first)
    photo, model = read_photo(examples[0]), next(iter(vaes))
    views = make_views(photo, vaes[model])

    def show(read: Callable[[], Photo], model: str) -> dict[Any, Any]:
        def work() -> tuple[Photo, Views]:
            photo = read()
            return photo, make_views(photo, vaes[model])

        values: dict[Any, Any] = {file: None}  # the place for files is ready for the next
        try:
            values[last], views = makers.submit(work).result()
        except Refused as problem:
            told = gr.update(value=f"**This file cannot be used.** {problem}.", visible=True)
            return {**values, last: None, message: told, column: gr.update(visible="hidden"), table: None}
        finally:
            release_memory()
        values |= {message: gr.update(visible=False), column: gr.update(visible=True), table: views.table}
        return {**values, gallery: views.images, right: gr.update(choices=views.choices)}

    def path_of(sent: Any) -> str | None:
        """The place of a file that was sent; a request may name any other, such as the folder of all."""
        if sent is None:
            return None
        path = Path(sent.path)
        if path.parent.parent != Path(uploads) or not path.is_file():
            raise gr.Error("What was named is no file that was sent.")
        return str(path)

    def of_upload(path: str | None, model: str) -> dict[Any, Any]:
        try:
            return show(lambda: read_photo(path), model)
        finally:
            if path is not None:  # nobody asks for it again, and nobody else may see it
                shutil.rmtree(Path(path).parent, ignore_errors=True)

    def of_example(index: int, model: str) -> dict[Any, Any]:
        return show(lambda: read_photo(examples[index]), model)

    def of_model(photo: Photo | None, model: str) -> dict[Any, Any]:
        return show(lambda: photo, model) if photo else {file: None}

    def of_class(key: int | None, seed: int | None, another: bool, *settings: Any) -> Iterator[tuple[Any, str, Any]]:
        if another:
            seed = secrets.randbelow(RANDOM_SEEDS)
        try:
            for images, line in generate(pipe, lock, key, seed, *settings):
                yield images, line, seed  # which may be given again
        except Refused as problem:
            yield None, f"**Nothing was made.** {problem}.", seed

    with gr.Blocks(title="HieraTok", analytics_enabled=False, delete_cache=(SWEEP_EVERY, KEEP_FILES)) as demo:
        gr.Markdown(INTRODUCTION)
        with gr.Tab("Reconstruct"), gr.Row():
            with gr.Column(scale=1, min_width=300):
                last = gr.State(photo, time_to_live=KEEP_FILES)
                file = gr.File(label="An image of yours", height=120, elem_id="file")
                file.GRADIO_CACHE = uploads  # it stays where it was sent to
                file.preprocess = path_of  # Gradio's own leaves an empty file for each
                message = gr.Markdown(visible=False, elem_id="message")
                thumbnails = {"components": [gr.Image(visible=False)], "samples": [[path] for path in examples]}
                choice = gr.Dataset(**thumbnails, type="index", label="Or one of these", elem_id="examples")
                models = [(f"{name}: {ABOUT_MODELS[name]}" if name in ABOUT_MODELS else name, name) for name in vaes]
                chosen = gr.Radio(models, value=model, label="Model", elem_id="model")
            with gr.Column(scale=2, min_width=320, elem_id="result") as column:
                pair = gr.HTML(js_on_load=HANDLES, elem_id="compare")
                right = gr.Radio(views.choices, value=1, label="On the right", elem_id="right")
                gallery = gr.Gallery(views.images, format="png", elem_id="files")  # for the comparison, not shown
                table = gr.Markdown(views.table, elem_id="figures")
                gr.Markdown(LIMITS)
            made_by = {"concurrency_limit": AT_ONCE, "show_progress_on": pair, "api_visibility": "private"}
            made_by["outputs"] = [last, file, message, column, right, gallery, table]
            file.upload(of_upload, [file, chosen], **made_by)
            choice.click(of_example, [choice, chosen], **made_by)
            chosen.input(of_model, [last, chosen], **made_by)
        with gr.Tab("Generate"), gr.Row():
            with gr.Column(scale=1, min_width=300):
                key = gr.Dropdown(choices, value=first["key"], label="What to make")
                limits = {"precision": 0, "minimum": 0, "maximum": MAX_SEED}
                seed = gr.Number(first["seed"], **limits, label="Seed", info="The same seed makes the same images.")
                another = gr.Checkbox(True, label="Another seed each time")
                button = gr.Button("Generate", variant="primary", elem_id="generate")
                with gr.Accordion("More settings", open=False):
                    more = [
                        gr.Slider(1, MAX_IMAGES, value=first["count"], step=1, precision=0, label="Images"),
                        gr.Slider(1, MAX_STEPS, value=first["steps"], step=1, precision=0, label="Steps"),
                        gr.Slider(1.0, MAX_GUIDANCE, value=first["guidance"], step=0.1, label="Guidance (1 is none)"),
                        gr.Radio(
                            scales,
                            value=first["scales"],
                            label="Scales of the previews",
                            info="With more of them, previews have more pixels.",
                        ),
                    ]
            with gr.Column(scale=2, min_width=320):
                status = gr.Markdown(line, elem_id="status")
                look = {"height": "max-content", "object_fit": "contain", "fit_columns": False, "show_label": False}
                generated = gr.Gallery(made, columns=4, format="png", interactive=False, **look, elem_id="generated")
            # The pipeline keeps the state of a call, so that one call goes on at a time.
            made_by = {"concurrency_limit": 1, "show_progress_on": generated, "api_visibility": "private"}
            button.click(of_class, [key, seed, another, *more], [generated, status, seed], **made_by)
            # Who types a seed wants that one.
            seed.input(None, None, another, js="() => false", api_visibility="private")
        changes = [demo.load, gallery.change, right.change]
        gr.on(changes, None, [gallery, right], pair, js=COMPARE, api_visibility="private")
    return demo.queue(max_size=WAITING)


def run(args: Namespace) -> list[str]:
    """Load the models, serve the page until it is stopped, and return no lines to print."""
    # One program a layer and size of image, as oneDNN keeps by the thousand, would add up: every visitor has another.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    limit_arenas(2)
    vaes = {}
    for name in (args.model, *ABOUT_MODELS):
        if (shown := Path(name).name if Path(name).is_dir() else name) not in vaes:  # a path is nobody's business
            vaes[shown] = load_or_explain(load_model, "--model", name, args.device, "float32")
            enable_advised_tiling(vaes[shown])
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

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, leave)
        sent, shown = (os.path.join(folder, name) for name in ("sent", "shown"))
        os.mkdir(sent)
        os.environ["GRADIO_TEMP_DIR"] = shown
        page = build(vaes, pipe, sent)
        os.environ["GRADIO_TEMP_DIR"] = sent
        settings = {"server_name": args.host, "server_port": args.port, "max_file_size": MAX_BYTES, "css": CSS}
        settings["theme"] = gr.themes.Default().set(**COLOURS)
        settings |= {"allowed_paths": [shown], "state_session_capacity": KEEP_VISITORS}
        settings["app_kwargs"] = {"middleware": [Middleware(KeepUploads, folder=sent)]}
        settings["footer_links"] = ["gradio", "settings"]
        off = ("share", "show_error", "run_history", "enable_monitoring", "ssr_mode", "pwa", "mcp_server")
        try:
            # Gradio's own words advise what this command has no option for.
            page.launch(**settings, **dict.fromkeys(off, False), quiet=True, prevent_thread_lock=True)
        except OSError as error:
            raise Problem(f"--host and --port: {one_line(error)}") from error
        end([f"The page is at {page.local_url}"])
        page.block_thread()
    return []


def main(argv: list[str] | None = None) -> int:
    args = parse("app", argv)
    logging.disable_progress_bar()  # of loading
    return run_script(run, args)
