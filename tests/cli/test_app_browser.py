"""Tests of the page of `hieratok app` in a browser: results, layout, live previews, messages, privacy."""

import argparse
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from image_files import noise, png, saved
from PIL import Image
from scripts import ROOT

import hieratok_hf
from hieratok_hf import HieraTokDiTPipeline
from hieratok_hf.cli.reconstruct import load_model, reconstruct
from hieratok_hf.evaluation.generation import number_images

pytest.importorskip("gradio", reason="it is a page of Gradio")
pytest.importorskip("torchmetrics", reason="it computes the SSIM")


WATCH_DIMMING = """() => {
    const look = () => {
        const faint = getComputedStyle(document.querySelector("#compare .html-container")).opacity < 0.7;
        window.dimmed ||= faint && document.querySelector("#compare [data-testid=status-tracker]").innerText;
        requestAnimationFrame(look);
    };
    look();
}"""
PATIENCE = 60_000  # milliseconds, for machines with other work
OBSERVER = """() => {
    window.seen = [];
    const look = () => {
        const line = document.querySelector("#status").innerText.trim();
        const image = document.querySelector("#generated img");
        window.seen.push([line, image ? image.src : null]);
    };
    new MutationObserver(look).observe(document.body, {subtree: true, childList: true, attributes: true,
        characterData: true});
}"""

# By each text that is seen, the least contrast with what is behind it.
CONTRASTS = """() => {
    const read = (color) => color.match(/[\\d.]+/g).map(Number);
    const over = ([r, g, b, a = 1], below) => [r, g, b].map((level, i) => a * level + (1 - a) * below[i]);
    const linear = (level) => level <= 10 ? level / 3294.6 : ((level / 255 + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b) + 0.05;
    const found = {}, texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const text = texts.currentNode.data.trim(), own = texts.currentNode.parentElement;
        if (!text || !own.checkVisibility({visibilityProperty: true}) || !own.getClientRects().length) continue;
        const behind = [];
        for (let x = own; x; x = x.parentElement) behind.unshift(getComputedStyle(x));
        const back = behind.reduce((below, style) => over(read(style.backgroundColor), below), [255, 255, 255]);
        const opacity = behind.reduce((product, style) => product * style.opacity, 1);
        const [r, g, b, a = 1] = read(getComputedStyle(own).color);
        const [less, more] = [light(back), light(over([r, g, b, a * opacity], back))].sort((x, y) => x - y);
        found[text] = Math.min(found[text] ?? 21, more / less);
    }
    return found;
}"""
# Where the centre of the view is in the images, and where the divider and its handle are in the view: 0 to 1.
VIEW = """() => {
    const view = document.querySelector("#window"), box = view.getBoundingClientRect();
    const divider = document.querySelector("#pair div").getBoundingClientRect();
    return {
        centre: [(view.scrollLeft + view.clientWidth / 2) / view.scrollWidth,
                 (view.scrollTop + view.clientHeight / 2) / view.scrollHeight],
        divider: (divider.left + 1 - box.left) / view.clientWidth,
        size: [box.width, box.height],
    };
}"""

# The page gives up its streams before their ends: they are read as they come.
LISTENER = """
    window.told = "";
    const plain = window.fetch;
    const listen = async (answer) => {
        const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
        for (let part = await reader.read(); !part.done; part = await reader.read()) window.told += part.value;
    };
    window.fetch = async (...request) => {
        const answer = await plain(...request);
        if (answer.body) listen(answer.clone()).catch(() => {});
        return answer;
    };
"""


class Site:
    """The page on a port of its own, run in a folder of its own: `cwd`, `home` and, for temporary files, `tmp`."""

    def __init__(self, folder):
        self.folders = {name: folder / name for name in ("cwd", "home", "tmp")}
        for path in self.folders.values():
            path.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "log.txt"
        surroundings = {k: v for k, v in os.environ.items() if not k.startswith(("GRADIO_", "HF_", "XDG_"))}
        surroundings |= {"HOME": str(self.folders["home"]), "TMPDIR": str(self.folders["tmp"]), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "hieratok_hf", "app", "--port", str(port)]
        with self.log.open("w") as log:
            where = {"cwd": self.folders["cwd"], "env": surroundings}
            self.process = subprocess.Popen(command, **where, stdout=log, stderr=subprocess.STDOUT)
        self.requests = []

    def wait(self):
        end = time.monotonic() + PATIENCE / 1000
        while True:
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            try:
                self.get("/config")
                break
            except OSError:
                time.sleep(0.1)
        self.at_first = self.files_elsewhere()

    @property
    def temporary(self):
        """The folder of the files that visitors send and get, as a list of one until the server ends."""
        return list(self.folders["tmp"].glob("hieratok-app-*"))

    def files_elsewhere(self):
        """All files but theirs, and but what onnxruntime, where it is installed, writes when it likes."""
        paths = {path for folder in self.folders.values() for path in folder.rglob("*") if path.is_file()}
        paths = {path for path in paths if path.name != ".ses" and ".onnxruntime" not in path.parts}
        return {path for path in paths if not any(path.is_relative_to(folder) for folder in self.temporary)}

    def get(self, path, data=None):
        """Status and text of an answer to a request without a browser."""
        headers = {"Content-Type": "application/json"} if data else {}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def stop(self):
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("site"))
    try:
        site.wait()
        yield site
    finally:
        site.process.kill()


@pytest.fixture(scope="module")
def visitor(site, browser):
    """A browser of a visitor; what it asks for is kept in `site`."""
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    context.on("request", lambda request: site.requests.append(request.url))
    context.add_init_script(LISTENER)
    return context


@pytest.fixture
def page(site, visitor):
    page = visitor.new_page()
    page.goto(site.url)
    page.wait_for_selector("#compare img")
    yield page
    page.close()


def upload(page, path):
    page.set_input_files("#file input[type=file]", path)


def result(page, name):
    """The table of a file, once it is there."""
    page.wait_for_selector(f"#figures :text-is('{name}')")
    rows = page.locator("#figures tr").all()
    return {row.locator("td, th").first.inner_text(): row.locator("td, th").last.inner_text() for row in rows}


def otter(folder, name, size):
    image = Image.open(ROOT / "src" / "hieratok_hf" / "page_images" / "animal.webp")
    return saved(folder, image.resize(size), name)


def choose(page, label, value):
    page.get_by_label(label, exact=False).first.fill(str(value))
    page.keyboard.press("Tab")


def fetched(page, source):
    return Image.open(io.BytesIO(page.request.get(source).body()))


def shown_right(page):
    return page.locator("#pair img").first.get_attribute("src")


def test_upload_and_reconstruct(page, tmp_path):
    path = otter(tmp_path, "photo.png", (768, 512))
    page.evaluate(WATCH_DIMMING)
    start = time.perf_counter()
    upload(page, path)
    rows = result(page, "photo.png")
    seconds = time.perf_counter() - start
    print(f"{seconds:.1f} s from the upload of 768x512 pixels to the result")
    assert page.evaluate("window.dimmed"), "nothing told that work went on"
    vae = load_model("hieratok-tiny", "cpu", "float32")
    vae.enable_tiling()
    _, figures = reconstruct(path, vae, argparse.Namespace(size=None, full=False))
    assert rows["photo.png"] == "768 x 512 pixels"
    assert rows["Likeness (PSNR)"].startswith(f"{figures['psnr_db']:.2f} dB")
    assert rows["What is kept"] == "16 x 64 x 96 = 98,304 numbers" and rows["Fewer numbers"] == "12.0 times"

    made, original = (fetched(page, x.get_attribute("src")) for x in page.locator("#pair img").all())
    np.testing.assert_array_equal(original, Image.open(path))
    error = np.square(np.asarray(original).astype(int) - np.asarray(made)).mean()
    assert 10 * np.log10(255**2 / error) == pytest.approx(figures["psnr_db"], abs=1e-3)
    assert seconds < 20, f"{seconds:.1f} s from the upload to the result"

    # Another model makes another image of the same photograph, which is no longer on the server's disk.
    before = shown_right(page)
    page.get_by_label("hieratok-tiny-16x").check()
    page.wait_for_selector("#figures :text('16 x 32 x 48')")
    page.wait_for_function("(before) => document.querySelector('#pair img').src !== before", arg=before)
    assert result(page, "photo.png")["Fewer numbers"] == "48.0 times"
    page.get_by_label("hieratok-tiny:").check()

    page.locator("#examples button").last.click()
    assert result(page, "text.webp")["text.webp"] == "768 x 512 pixels"


def test_what_stands_on_the_right_and_how_large_it_is(page):
    images = {}
    for label in page.locator("#right label").all():
        label.click()
        caption = label.inner_text().strip().split(" of that")[0]
        page.wait_for_selector(f"#sides span:last-child:has-text('{caption}')")
        images[caption] = shown_right(page)
    assert {"reconstruction", "JPEG", "what is lost"} < images.keys() and len(set(images.values())) == 6


def seen_halves(page):
    """The columns of the view left and right of a narrow strip in its middle."""
    page.mouse.move(0, 0)
    shot = np.asarray(Image.open(io.BytesIO(page.locator("#view").screenshot())).convert("RGB")).astype(int)
    half = shot.shape[1] // 2
    return shot[20:-20, 20 : half - 40], shot[20:-20, half + 40 : -20]


@pytest.mark.parametrize("width", [390, 1280])
def test_zoom_keeps_the_view_its_centre_and_the_divider(page, width):
    page.set_viewport_size({"width": width, "height": 844})
    page.get_by_label("what is lost").check()
    page.wait_for_selector("#sides span:last-child:has-text('what is lost')")
    zoom, slide = page.get_by_label("Zoom"), page.get_by_label("Slide")
    first = page.evaluate(VIEW)
    wide = page.locator("#pair").bounding_box()["width"]

    def check(centre, at=0.5):
        page.wait_for_function("() => [...document.querySelectorAll('#view img')].every((x) => x.complete)")
        page.wait_for_timeout(100)  # what scrolling asks for is done in the next frame
        now = page.evaluate(VIEW)
        assert now["size"] == first["size"]
        assert now["centre"] == pytest.approx(centre, abs=0.01) and now["divider"] == pytest.approx(at, abs=0.01)

    for factor in (1, 1.5, 2, 4):
        zoom.fill(str(factor))
        assert page.locator("#pair").bounding_box()["width"] == pytest.approx(factor * wide, rel=0.02)
        check([0.5, 0.5])

    zoom.fill("2")
    page.evaluate("""() => {
        const view = document.querySelector("#window");
        view.scrollTo(0.1 * view.scrollWidth, 0.4 * view.scrollHeight);
    }""")
    check([0.35, 0.65])
    zoom.fill("4")
    check([0.35, 0.65])
    page.get_by_label("JPEG").check()
    page.wait_for_selector("#sides span:last-child:has-text('JPEG')")
    check([0.35, 0.65])
    page.get_by_label("what is lost").check()
    page.wait_for_selector("#sides span:last-child:has-text('what is lost')")
    check([0.35, 0.65])

    both = seen_halves(page)
    slide.press("End")
    check([0.35, 0.65], 1)
    original = seen_halves(page)
    slide.press("Home")
    check([0.35, 0.65], 0)
    lost = seen_halves(page)
    assert all(abs(a - b).mean() > 10 for a, b in zip(original, lost))
    np.testing.assert_array_equal(both[0], original[0])
    np.testing.assert_array_equal(both[1], lost[1])

    page.locator("#view").click(position={"x": first["size"][0] / 4, "y": 20})
    assert float(slide.input_value()) == pytest.approx(25, abs=1)
    check([0.35, 0.65], 0.25)
    zoom.fill("1")
    check([0.5, 0.5], 0.25)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_every_control_is_reachable_and_every_text_readable_on_phones_and_desks(site, visitor, width, theme):
    page = visitor.new_page()
    page.set_viewport_size({"width": width, "height": 844})
    page.goto(f"{site.url}/?__theme={theme}")
    page.wait_for_selector("#compare img")
    page.add_style_tag(content="* { transition: none !important; }")  # colours would be on their way
    assert page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")
    for tab in ("Reconstruct", "Generate"):
        page.get_by_role("tab", name=tab).click()
        if tab == "Generate":
            page.get_by_role("button", name="More settings").click()
            page.wait_for_selector("text=Guidance")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        controls = page.locator("input:visible, button:visible:not([tabindex='-1'])").all()
        assert len(controls) > 8
        contrasts = page.evaluate(CONTRASTS)
        assert {"Reconstruct", "Settings", "Built with Gradio"} < contrasts.keys()
        assert ("The same seed makes the same images." in contrasts) == (tab == "Generate")
        assert {text: ratio for text, ratio in contrasts.items() if ratio < 4.5} == {}
        for control in controls:
            control.scroll_into_view_if_needed()
            box = control.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width + 1, control.evaluate("x => x.outerHTML")
    page.get_by_role("tab", name="Reconstruct").click()
    tops = [page.locator(name).bounding_box()["y"] for name in ("#compare", "#right", "#figures")]
    assert tops == sorted(tops)
    page.close()


def test_previews_arrive_before_the_images(page):
    page.get_by_role("tab", name="Generate").click()
    page.get_by_role("button", name="More settings").click()
    assert page.get_by_label("Another seed").is_checked()
    choose(page, "Seed", 7)
    page.wait_for_selector("input[type=checkbox]:not(:checked)")  # the seed that is typed is the one that is wanted
    assert not page.get_by_label("Another seed").is_checked()
    choose(page, "number input for Steps", 20)
    choose(page, "number input for Images", 2)
    page.evaluate(OBSERVER)
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector("#status :text('seed 7, 20 steps')")
    page.wait_for_timeout(500)
    seen = page.evaluate("window.seen")
    lines = [line for line, _ in seen if line]
    found = (re.fullmatch(r"step (\d+) of 20: previews of 32 x 32 pixels", line) for line in lines)
    steps = [int(match[1]) for match in found if match]
    assert steps and steps == sorted(steps) and len(set(steps)) > 2
    assert lines[-1] == "seed 7, 20 steps, guidance 8: images of 128 x 128 pixels"
    # What was shown on the way were the previews.
    sources = list(dict.fromkeys(source for line, source in seen if source and line.startswith("step")))
    sizes = {fetched(page, source).size for source in sources}
    assert (32, 32) in sizes
    images = [fetched(page, x.get_attribute("src")) for x in page.locator("#generated img").all()]
    pipe = HieraTokDiTPipeline.from_pretrained(hieratok_hf.pretrained("hieratok-dit-tiny"))
    pipe.set_progress_bar_config(disable=True)
    guidance = {"guidance_scale": 8.0, "guidance_eta": 0.5, "guidance_interval": (0.3, 1.0)}
    expected = number_images(pipe, [4, 14], 7, num_inference_steps=20, **guidance)
    shown = np.stack([np.asarray(image).astype(int) for image in images])
    assert abs(shown - expected.permute(0, 2, 3, 1).numpy()).max() <= 2


def test_files_that_cannot_be_used_are_named_with_the_reason(page, tmp_path):
    whole = saved(tmp_path, Image.fromarray(noise(64, 64)), "whole.png").read_bytes()
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000, 8, 2))
    reasons = {"notes.txt": "is no image", "bomb.png": "is too large for the limit of 32 megapixels"}
    for name, reason in reasons.items():
        upload(page, tmp_path / name)
        page.wait_for_selector(f"#message:has-text('{name}')")
        assert f"'{name}': {reason}" in page.inner_text("#message")
        assert not page.is_visible("#pair")  # nothing stands there that could be taken for its result
    (tmp_path / "heavy.png").write_bytes(whole + bytes(21 * 2**20))
    upload(page, tmp_path / "heavy.png")
    page.wait_for_selector(".toast-body:has-text('heavy.png')")
    assert "exceed the maximum allowed size of 20" in page.inner_text(".toast-body")
    upload(page, tmp_path / "whole.png")
    assert result(page, "whole.png")["whole.png"] == "64 x 64 pixels"
    assert page.is_visible("#pair") and not page.is_visible("#message")


STRANGE = "/etc/hostname"


def server_paths(text, temporary):
    """Paths of this machine in a text, but for the files that visitors sent or got, and what they asked for."""
    found = {match.rstrip(".") for match in re.findall(r"/(?:[\w.+@~-]+/)+[\w.+@~-]+", text)} - {STRANGE}
    return {path for path in found if os.path.exists(path) and not Path(path).is_relative_to(temporary)}


def test_the_page_keeps_to_itself(page, site, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    for path in (otter(tmp_path, "photo.png", (256, 256)), tmp_path / "notes.txt"):
        upload(page, path)
        page.wait_for_selector(f"#figures :text-is('{path.name}'), #message:has-text('{path.name}')")
    page.get_by_role("tab", name="Generate").click()
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector("#status :text('step')")
    page.wait_for_selector("#status :text('seed')")

    hosts = {url.split("/")[2] for url in site.requests if not url.startswith(("data:", "blob:"))}
    assert hosts == {site.url.split("/")[2]}

    (temporary,) = site.temporary
    page.wait_for_function("() => window.told.split('process_completed').length - 1 >= 3")
    texts = [page.evaluate("window.told")]
    assert str(temporary) in texts[0]  # names of files, by which the page asks for them
    log = site.log.read_text()
    assert f"The page is at {site.url}/" in log and "share" not in log and "Traceback" not in log
    foreign = {"path": STRANGE, "meta": {"_type": "gradio.FileData"}}
    stranger = json.dumps({"data": [foreign], "fn_index": 0, "session_hash": "x"}).encode()
    texts += [text for _, text in (site.get("/config"), site.get("/gradio_api/info"), site.get("/"))]
    for path, data in ((f"/gradio_api/file={STRANGE}", None), ("/gradio_api/run/predict", stranger)):
        status, text = site.get(path, data)
        assert status >= 400
        texts.append(text)
    site.get("/gradio_api/queue/join?", stranger)
    texts.append(site.get("/gradio_api/queue/data?session_hash=x")[1])
    assert '"success":false' in texts[-1]
    for text in texts:
        assert not server_paths(text, temporary)

    site.stop()
    assert not site.temporary and site.files_elsewhere() == site.at_first  # caches of libraries
