"""Tests of `hieratok app` without a browser: what it shows, limits, messages, and the folder of the Space."""

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from scripts import ROOT, error_of, load_script
from tiny_pipelines import make_pipeline

from hieratok_hf.evaluation.generation import number_images

gr = pytest.importorskip("gradio", reason="it is a page of Gradio")
pytest.importorskip("torchmetrics", reason="it computes the SSIM")

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def app():
    return load_script("cli", "app")


def test_a_missing_setting(app):
    for key, seed in ((None, 0), (0, None)):
        with pytest.raises(app.Refused):
            next(app.generate(make_pipeline(), threading.Lock(), key, seed, 1, 2, 1.0, 1))


def as_levels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_previews_come_before_the_images_of_the_script(app):
    pipe, scales = make_pipeline(), 3
    *previews, (images, line) = app.generate(pipe, threading.Lock(), 1, 5, 3, 6, 2.0, scales)
    settings = {"num_inference_steps": 6, "guidance_scale": 2.0, **app.GUIDANCE}
    expected = number_images(make_pipeline(), [1, 4, 7], 5, **settings).permute(0, 2, 3, 1).numpy()
    assert abs(as_levels(images) - expected.astype(int)).max() <= 1
    assert "seed 5, 6 steps, guidance 2" in line and "8 x 8 pixels" in line
    steps = [int(re.fullmatch(r"step (\d) of 6: previews of 4 x 4 pixels", line)[1]) for _, line in previews]
    assert steps and steps == sorted(set(steps))
    assert all([image.size for image in shown] == [(4, 4)] * 3 for shown, _ in previews)


def test_who_leaves_stops_the_pipeline(app):
    pipe, lock = make_pipeline(), threading.Lock()
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(time.sleep(0.01)))
    visit = app.generate(pipe, lock, 0, 0, 1, 100, 1.0, 1)
    next(visit)
    visit.close()
    assert len(calls) < 50 and not lock.locked()
    *_, (images, _) = app.generate(pipe, lock, 0, 0, 1, 2, 1.0, 1)
    assert len(images) == 1


def test_two_visitors_get_their_own_images(app):
    pipe, lock = make_pipeline(), threading.Lock()
    with ThreadPoolExecutor(2) as threads:
        visits = [(pipe, lock, key, seed, 2, steps, 3.0, 2) for key, steps, seed in ((0, 9, 1), (2, 5, 8))]
        together = list(threads.map(lambda visit: list(app.generate(*visit))[-1], visits))
    for visit, (images, line) in zip(visits, together):
        alone, same_line = list(app.generate(*visit))[-1]
        np.testing.assert_array_equal(as_levels(images), as_levels(alone))
        assert line == same_line


def build(app, pipe, folder):
    return app.build({"tiny": pipe.vae}, pipe, str(folder / "sent"))


# The most that a setting takes, and what is beyond its limits.
LIMITS = {
    "Steps": (100, [0, 101]),
    "Images": (8, [0, 9]),
    "Guidance (1 is none)": (10, [0.5, 10.5]),
    "Seed": (7, [-1, 2**31]),
    "Scales of the previews": (4, [0, 5]),
    "Model": ("tiny", ["other"]),
    "What to make": (2, [3, "tench"]),
}


def test_the_server_holds_visitors_to_the_limits_and_keeps_to_itself(app, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    page = build(app, make_pipeline(), tmp_path)
    blocks = {block.label: block for block in page.blocks.values() if getattr(block, "label", None)}
    for label, (most, beyond) in LIMITS.items():
        assert blocks[label].preprocess(most) == most
        for value in beyond:
            with pytest.raises(gr.Error):
                blocks[label].preprocess(value)
    assert page.analytics_enabled is False and page.delete_cache == (app.SWEEP_EVERY, app.KEEP_FILES)
    at_work = [fn for fn in page.fns.values() if fn.fn is not None]
    assert sorted(fn.concurrency_limit for fn in at_work) == [1, *[app.AT_ONCE] * 3]
    assert {fn.api_visibility for fn in page.fns.values()} == {"private"}
    assert page._queue.max_size == app.WAITING


def test_classes_that_look_good_come_first(app, tmp_path, monkeypatch):
    pipe = make_pipeline()
    first, second, third = (app.class_label(pipe, key) for key in range(3))
    monkeypatch.setattr(app, "FIRST_CLASSES", (third, "none of these", second))
    page = build(app, pipe, tmp_path)
    (classes,) = (block.choices for block in page.blocks.values() if isinstance(block, gr.Dropdown))
    assert classes == [(third, 2), (second, 1), (first, 0)]


@pytest.fixture
def launched(app, monkeypatch):
    """What `main` asks of `launch`, which has the folder for files and cannot take port 80."""
    calls, handlers = [], {}

    def launch(demo, **settings):
        calls.append({**settings, "folder": os.environ["GRADIO_TEMP_DIR"], "handlers": handlers})
        assert Path(calls[-1]["folder"]).is_dir()
        if settings["server_port"] == 80:
            raise OSError("Cannot find empty port in range: 80-80.")
        demo.local_url = f"http://127.0.0.1:{settings['server_port']}/"

    monkeypatch.setattr(gr.Blocks, "launch", launch)
    monkeypatch.setattr(app.signal, "signal", lambda number, handler: handlers.update({number: handler}))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "unset")
    return calls


def test_main_serves_this_machine_alone_and_leaves_no_files(app, launched, monkeypatch, capsys):
    assert app.main(["--port", "7861"]) == 0
    assert capsys.readouterr().out == "The page is at http://127.0.0.1:7861/\n"
    (settings,) = launched
    assert settings["server_name"] is None and settings["server_port"] == 7861
    assert settings["max_file_size"] == app.MAX_BYTES
    off = ("share", "show_error", "run_history", "enable_monitoring", "ssr_mode", "pwa", "mcp_server")
    assert not any(settings[name] for name in off) and all(name in settings for name in off)
    assert "api" not in settings["footer_links"]
    assert not Path(settings["folder"]).exists()
    monkeypatch.setattr(app, "build", lambda *_: gr.Blocks())
    assert app.main(["--port", "80"]) == 2
    assert error_of(capsys) == "error: --host and --port: Cannot find empty port in range: 80-80."


def test_a_signal_ends_it_at_once_with_the_files_of_visitors(app, launched, monkeypatch):
    left = []
    monkeypatch.setattr(app.os, "_exit", lambda status: left.append((status, folder.exists())))

    class Interrupted(gr.Blocks):
        def launch(self, **settings):
            nonlocal folder
            super().launch(**settings)
            folder = Path(launched[-1]["folder"]).parent
            (folder / "sent" / "photo.png").write_bytes(b"private")
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                launched[-1]["handlers"][number](number, None)

    folder = None
    monkeypatch.setattr(app, "build", lambda *_: Interrupted())
    assert app.main([]) == 0 and left == [(0, False)] * 3


@pytest.mark.parametrize(
    ("given", "variable", "told"),
    [
        (["--host", "0.0.0.0"], None, True),
        ([], "0.0.0.0", True),
        (["--host", "127.0.0.1"], "0.0.0.0", False),
        (["--host", "localhost"], None, False),
        ([], None, False),
    ],
)
def test_a_page_that_others_can_reach_says_so(app, launched, monkeypatch, capsys, given, variable, told):
    monkeypatch.setattr(app, "build", lambda *_: gr.Blocks())
    if variable:
        monkeypatch.setenv("GRADIO_SERVER_NAME", variable)
    assert app.main(given) == 0
    assert ("whoever reaches this machine" in capsys.readouterr().err) == told


@pytest.mark.parametrize("option", ["--model", "--generator"])
def test_unknown_models(app, launched, capsys, option):
    assert app.main([option, "nobody/nothing"]) == 2
    assert "'nobody/nothing' cannot be loaded" in error_of(capsys) and not launched


def test_the_card_of_the_space_and_its_index_of_scripts_and_notebooks():
    _, header, text = (EXAMPLES / "README.md").read_text().split("---\n", 2)
    header = yaml.safe_load(header)
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in constraints if "==" in line)
    assert header["sdk"] == "gradio" and header["sdk_version"] == pinned["gradio"]
    assert (EXAMPLES / header["app_file"]).is_file() and header["license"] == "apache-2.0"
    assert isinstance(header["python_version"], str)  # 3.10 as a number is 3.1
    lines = (EXAMPLES / "requirements.txt").read_text().splitlines()
    needed = dict(line.split("==") for line in lines if not line.startswith(("#", "-")))
    assert {"torch", "torchmetrics", "transformers", "diffusers"} <= needed.keys()
    assert needed.items() <= pinned.items()
    assert set(re.findall(r"\| `(\w+\.py)` \|", text)) == {path.name for path in EXAMPLES.glob("*.py")}
    notebooks = {path.name for path in EXAMPLES.glob("notebooks/*.ipynb")}
    assert notebooks == set(re.findall(r"\| `(\w+\.ipynb)` \|", text))


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_space_gets_what_it_starts_with():
    make = ["make", "-n", "space", "READY="]
    told = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"examples/{name}" in told for name in ("app.py", "README.md", "requirements.txt"))
