"""
Tests of the page in `web/`, in a browser: its figures against PyTorch, times, messages, files of latents, no network.

They serve what `make web` built, with the sources as they are now, and the same programs as integers.
"""

import base64
import functools
import http.server
import io
import json
import shutil
import struct
import threading

import numpy as np
import pytest
import torch
from image_files import noise, saved
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from scripts import ROOT

import hieratok_hf
from hieratok_hf import AutoencoderHieraTok, open_image
from hieratok_hf.cli import decode
from hieratok_hf.cli.reconstruct import encode_and_decode
from hieratok_hf.data.latent_archive import write_archive

quantization = pytest.importorskip("onnxruntime.quantization", reason="it makes integers of the programs")

BUILT = ROOT / "build" / "web"


def built_dtype():
    path = BUILT / "model" / "export.json"
    return json.loads(path.read_text())["dtype"] if path.exists() else None


pytestmark = pytest.mark.skipif(built_dtype() != "float32", reason="needs what `make web` builds, in float32")

PATIENCE = 60_000  # milliseconds, for machines with other work
EXAMPLES = ROOT / "src" / "hieratok_hf" / "example_images"
DONE = "#result[aria-busy=false], #message:not([hidden])"
PIXELS = "canvas => [canvas.width, canvas.height, canvas.toDataURL('image/png')]"


class Site:
    """A folder on a port of its own, until it is stopped."""

    def __init__(self, folder):
        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_):
                pass

        self.folder = folder
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
        self.url = f"http://localhost:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A copy of what was built, with programs of a dtype."""

    def made(dtype):
        folder = tmp_path_factory.mktemp(dtype) / "web"
        shutil.copytree(BUILT, folder)
        for kind in ("html", "css", "js", "svg"):
            for path in (ROOT / "web").glob(f"*.{kind}"):
                shutil.copy(path, folder)
        if dtype == "int8":  # as `hieratok export --dtype int8` does
            for path in (folder / "model").glob("*.onnx"):
                quantization.quantize_dynamic(path, path, ["MatMul"], per_channel=True)
        return folder

    return made


@pytest.fixture(scope="module")
def site(build):
    site = Site(build("float32"))
    yield site
    site.stop()


def visit(browser, url, **settings):
    """A page of a new visitor, once it shows its first result; `asked` and `told` are its requests and its errors."""
    context = browser.new_context(**settings)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.asked, page.told = [], []
    context.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: page.told.append(message.text))
    page.on("pageerror", lambda error: page.told.append(str(error)))
    page.goto(url)
    page.wait_for_selector(DONE)
    return page


@pytest.fixture(scope="module")
def page(browser, site):
    page = visit(browser, site.url)
    yield page
    page.context.close()


def figures(page):
    page.wait_for_selector(DONE)
    assert not page.is_visible("#message"), page.inner_text("#message")
    rows = page.locator("#figures tr").all()
    return {row.locator("th").inner_text(): row.locator("td").inner_text() for row in rows}


def choose(page, name):
    """Take one of the bundled images, and give its figures."""
    page.click(f"#examples button:has(img[alt={name}])")
    page.wait_for_selector("#result[aria-busy=true]")
    return figures(page)


def upload(page, path):
    page.set_input_files("#file", path)
    page.wait_for_selector(f"#figures :text-is('{path.name}'), #message:has-text('{path.name}')")


def pixels(page, canvas):
    width, height, data = page.locator(canvas).evaluate(PIXELS)
    image = Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2])))
    assert image.size == (width, height)
    return np.asarray(image.convert("RGB")).astype(int)


def captions(page):
    """Number, size and time below each scale."""
    return [text.splitlines() for text in page.locator("figcaption").all_inner_texts()]


def milliseconds(text):
    value, unit = text.removeprefix("after ").split()
    return float(value) * {"ms": 1, "s": 1000}[unit]


def check_times(tries):
    """The best of some tries is in time; `pytest -rP` shows all of them."""
    first, whole = ([milliseconds(found[name]) for found in tries] for name in ("first scale", "all scales"))
    print(f"{tries[0]['computed by']}: first scale after {first} ms, all after {whole} ms")
    assert min(first) < 1000 and min(whole) < 3000


@pytest.fixture(scope="module")
def vae():
    return AutoencoderHieraTok.from_pretrained(hieratok_hf.pretrained("hieratok-tiny")).eval()


@pytest.fixture(scope="module")
def of_pytorch(vae):
    """Images and figures of the bundled images, in PyTorch."""
    return {name: encode_and_decode(open_image(EXAMPLES / f"{name}.webp"), vae) for name in ("hat", "jacket")}


def test_a_bundled_image_is_what_pytorch_makes_of_it(page, of_pytorch):
    for name, (originals, scales, _, expected) in of_pytorch.items():
        found = choose(page, name)
        assert float(found["PSNR"].removesuffix(" dB")) == pytest.approx(expected["psnr_db"], abs=0.05)
        assert found["latent"] == "16 x 32 x 32, 16,384 numbers" and found["compression"] == "12.0x fewer numbers"
        assert abs(pixels(page, "#original") - np.asarray(originals[-1])).mean() < 0.1
        for index, scale in enumerate(scales):
            shown = pixels(page, f"#scales figure:nth-child({index + 1}) canvas")
            assert abs(shown - np.asarray(scale)).mean() < 0.1, (name, index)
        assert (pixels(page, "#reconstruction") == pixels(page, "#scales figure:last-child canvas")).all()
    assert not page.told


def test_scales_arrive_coarse_to_fine_and_soon(page):
    page.evaluate("""() => {
        window.widths = [];
        const canvas = document.querySelector("#reconstruction");
        new MutationObserver(() => window.widths.push(canvas.width)).observe(canvas, {attributes: true});
    }""")
    tries = [choose(page, "hat") for _ in range(3)]  # the machine may have other work
    widths = page.evaluate("window.widths")
    assert [width for width in widths if width < 256] == 3 * [32, 64, 128] and widths[-1] == 256
    numbers, _, times = zip(*captions(page))
    assert numbers == ("scale 1", "scale 2", "scale 3", "scale 4")
    assert all(0 < milliseconds(text) < 3000 for text in times)
    check_times(tries)


def test_programs_of_integers_lose_little(browser, build, of_pytorch):
    site = Site(build("int8"))
    page = visit(browser, site.url)
    for name, (*_, expected) in of_pytorch.items():
        assert float(choose(page, name)["PSNR"].removesuffix(" dB")) == pytest.approx(expected["psnr_db"], abs=0.3)
    page.context.close()
    site.stop()


def test_a_latent_goes_to_a_file_and_back(page, vae, tmp_path):
    choose(page, "hat")
    made = pixels(page, "#reconstruction")
    with page.expect_download() as download:
        page.click("#download")
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    assert path.name == "hat.safetensors" and f"{path.stat().st_size / 1000:.1f} kB" in page.inner_text("#download")
    with safe_open(path, "pt") as file:
        latent, records = file.get_tensor("hat.webp"), json.loads(file.metadata()["records"])
    assert records == [{"name": "hat.webp", "width": 256, "height": 256, "box": [0, 0, 256, 256]}]
    image = torch.from_numpy(np.array(open_image(EXAMPLES / "hat.webp"))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(image).latent_dist.mode()[0]
    assert latent.dtype == torch.float16 and latent.shape == (16, 32, 32)
    assert (latent - expected).abs().mean() < 5e-3

    assert decode.main([str(path), str(tmp_path / "again"), "--format", "png", "--device", "cpu"]) == 0
    np.testing.assert_allclose(np.asarray(Image.open(tmp_path / "again" / "hat.png")).astype(int), made, atol=2)

    upload(page, path)
    assert "PSNR" not in figures(page) and not page.is_visible("#slider") and not page.is_visible("#download")
    assert abs(pixels(page, "#reconstruction") - made).mean() < 0.1


def test_a_latent_of_an_archive_is_shown_in_the_size_of_its_image(page, vae, tmp_path):
    (tmp_path / "images").mkdir()
    image = open_image(EXAMPLES / "jacket.webp").crop((0, 0, 201, 130))
    saved(tmp_path / "images", image, "part.png")
    write_archive(vae, tmp_path / "images", tmp_path / "archive")
    upload(page, tmp_path / "archive" / "shard-00000.safetensors")
    assert figures(page)["decoded"].startswith("201 x 130 pixels")
    shown = pixels(page, "#reconstruction")
    assert shown.shape == (130, 201, 3) and np.square(shown - np.asarray(image)).mean() < 255**2 / 10**2.5


def broken_latents(folder):
    """Files of latents that are none, by what the page says of each."""
    good = torch.randn(16, 4, 6)
    tensors = {
        "must hold a latent of the shape 16 x rows x columns, got 4 x 4 x 6": good[:4],
        "must hold a latent of the shape 16 x rows x columns, got 1 x 16 x 4 x 6": good[None],
        "must hold float16, bfloat16 or float32, got I64": good.long(),
        "is damaged: it holds what is no number": torch.full_like(good, float("nan")),
        "must have 2 to 64 rows and columns, got 4 x 65": torch.randn(16, 4, 65),
        "must have 2 to 64 rows and columns, got 1 x 6": good[:, :1],
    }
    for index, (reason, tensor) in enumerate(tensors.items()):
        save_file({"x.png": tensor.contiguous()}, path := folder / f"broken-{index}.safetensors")
        yield path, reason
    save_file({"x.png": good}, path := folder / "short.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    yield path, "is damaged: it is cut short"
    for index, content in enumerate(
        (b"", b"no latent", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]")
    ):
        (path := folder / f"none-{index}.safetensors").write_bytes(content)
        yield path, "is no safetensors file, or is damaged"
    (path := folder / "empty.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    yield path, "holds no latent"


def test_files_that_cannot_be_used_are_named_with_the_reason(page, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "notes.png").write_text("no image")
    whole = saved(tmp_path, Image.fromarray(noise(64, 64)), "whole.png")
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:20])
    large = saved(tmp_path, Image.new("1", (8000, 6250)), "large.png")
    flat = saved(tmp_path, Image.new("RGB", (300, 15)), "flat.png")
    reasons = {
        **{tmp_path / name: "is no image" for name in ("notes.txt", "notes.png", "half.png")},
        large: "is too large for the limit of 32 megapixels, got 8000 x 6250",
        flat: "must have sides of 16 pixels or more",
        **dict(broken_latents(tmp_path)),
    }
    for path, reason in reasons.items():
        upload(page, path)
        told = page.inner_text("#message")
        assert f"'{path.name}': {reason}" in told, told
        assert not page.is_visible("#result")  # nothing stands there that could be taken for its result
    upload(page, whole)
    assert figures(page)["whole.png"] == "64 x 64 pixels" and not page.is_visible("#message")


def test_an_image_of_any_size_is_shrunk_and_cut_to_whole_patches(page, tmp_path):
    image = open_image(EXAMPLES / "hat.webp").resize((250, 131))
    upload(page, saved(tmp_path, image, "odd.png"))
    assert figures(page)["encoded"].startswith("248 x 128 pixels")
    np.testing.assert_array_equal(pixels(page, "#original"), np.asarray(image.crop((1, 1, 249, 129))))
    assert [size for _, size, _ in captions(page)] == [f"{248 // factor} x {128 // factor}" for factor in (8, 4, 2, 1)]

    tall = image.resize((600, 1200))
    upload(page, saved(tmp_path, tall, "tall.png"))
    assert figures(page)["encoded"].startswith("128 x 256 pixels")
    smaller = np.asarray(tall.resize((128, 256), Image.Resampling.BOX)).astype(int)
    assert abs(pixels(page, "#original") - smaller).mean() < 2

    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    upload(page, saved(tmp_path, clear, "clear.png"))
    figures(page)
    assert (pixels(page, "#original") == 255).all()


def test_all_of_it_works_by_keyboard(page):
    choose(page, "hat")
    page.evaluate("document.activeElement.blur()")
    page.locator("h1").click()
    reached = []
    for _ in range(7):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.innerHTML.slice(0, 4)"))
    assert reached[1:7] == ["file", "<img", "<img", "longest", "slider", "download"]  # after the link of the header
    page.focus("#slider")
    hidden = []
    for key in ("Home", "ArrowRight", "ArrowRight", "End"):
        page.keyboard.press(key)
        clip = page.locator("#reconstruction").evaluate("x => getComputedStyle(x).clipPath")
        hidden.append(clip.removeprefix("inset(0px 0px 0px ").removesuffix(")"))
    assert hidden == ["0%", "1%", "2%", "100%"]
    assert page.locator("#pair").evaluate("x => getComputedStyle(x).outlineStyle") == "solid"
    page.focus("#examples button:last-child")
    page.keyboard.press("Enter")
    page.wait_for_selector("#result[aria-busy=true]")
    assert "jacket.webp" in figures(page)


DROP = """async () => {
    const answer = await fetch("images/jacket.webp");
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([await answer.blob()], "dropped.webp"));
    document.querySelector("#drop").dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true}));
}"""


def test_files_are_dropped_and_the_edge_is_dragged(page, of_pytorch):
    page.evaluate(DROP)
    page.wait_for_selector("#figures :text-is('dropped.webp')")
    assert float(figures(page)["PSNR"].split()[0]) == pytest.approx(of_pytorch["jacket"][-1]["psnr_db"], abs=0.05)
    page.locator("#pair").scroll_into_view_if_needed()
    box = page.locator("#pair").bounding_box()
    y, found = box["y"] + box["height"] / 2, []
    page.mouse.move(box["x"] + 0.25 * box["width"], y)
    page.mouse.down()
    found.append(page.locator("#slider").input_value())
    page.mouse.move(box["x"] + 0.75 * box["width"], y)
    page.mouse.up()
    page.mouse.move(box["x"], y)
    assert [*found, page.locator("#slider").input_value()] == ["25", "75"]


def test_it_fits_a_narrow_window_and_is_dark_where_that_is_asked_for(page):
    choose(page, "hat")
    levels = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for width in (390, 1280):
            page.set_viewport_size({"width": width, "height": 844})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        found = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        levels[scheme] = [int(colour.split("(")[1].split(",")[0]) for colour in found]
    assert levels["light"][0] > 240 > 100 > levels["light"][1]
    assert levels["dark"][0] < 40 < 200 < levels["dark"][1]


def test_functions_of_numbers_are_those_of_numpy(page):
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.normal(size=500) * 10.0 ** rng.integers(-9, 6, 500), [0, -0.0, 65504, 65520, 1e9, np.pi]]
    )
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    between = (halves[:-1].astype(np.float32) + halves[1:].astype(np.float32)) / 2  # ties
    with np.errstate(over="ignore"):
        values = np.concatenate([values, between[::7]]).astype(np.float32)
        expected = values.astype(np.float16).view(np.uint16)
    found = page.evaluate(
        "async x => { const c = await import('./core.js'); return x.map(c.toHalf); }", values.tolist()
    )
    np.testing.assert_array_equal(found, expected)
    found = page.evaluate(
        "async x => { const c = await import('./core.js'); return x.map(c.fromHalf); }",
        halves.view(np.uint16).tolist(),
    )
    np.testing.assert_array_equal(found, halves.astype(float))


def test_no_request_leaves_the_site(page, site):
    assert len(page.asked) > 10
    assert {url.split("/")[2] for url in page.asked if not url.startswith(("blob:", "data:"))} == {
        site.url.split("/")[2]
    }


def test_after_the_first_visit_it_needs_no_network(browser, build):
    site = Site(build("float32"))
    page = visit(browser, site.url)
    before = figures(page)
    site.stop()
    page.reload()
    after, tries = figures(page), [choose(page, name) for name in ("hat", "jacket", "hat")]
    assert after["PSNR"] == tries[0]["PSNR"] == before["PSNR"] and "jacket.webp" in tries[1]
    check_times(tries)
    # What the service worker sends along lends the page threads.
    assert page.evaluate("crossOriginIsolated") and before["computed by"] == "WASM, 1 thread"
    cores = page.evaluate("navigator.hardwareConcurrency")
    assert after["computed by"] == (f"WASM, {min(cores, 4)} threads" if cores > 1 else "WASM, 1 thread")
    assert not page.told
    page.context.close()


def test_what_a_host_lacks_is_told(browser, build):
    folder = build("float32")
    (folder / "model" / "decoder.onnx").unlink()
    site = Site(folder)
    page = visit(browser, site.url)
    assert (
        page.inner_text("#message")
        == "This browser cannot compute it. 'hat.webp': decoder.onnx cannot be loaded (404)."
    )
    assert not page.is_visible("#result")
    page.context.close()
    site.stop()


def test_a_new_version_takes_over_with_all_its_files(browser, build):
    site = Site(build("float32"))
    page = visit(browser, site.url)
    title, worker = site.folder / "index.html", site.folder / "sw.js"
    title.write_text(title.read_text().replace("<h1>HieraTok", "<h1>HieraTok anew"))
    worker.write_text(worker.read_text().replace("const VERSION = ", "const VERSION = 1 + "))
    page.evaluate("""async () => {
        await caches.open("of another page");
        const registration = await navigator.serviceWorker.ready;
        await registration.update();
        const next = registration.installing ?? registration.waiting;
        while (next.state === "installing") await new Promise((resolve) => setTimeout(resolve, 50));
    }""")
    site.stop()
    page.goto("about:blank")  # once no page is left of the old version, the new one is taken
    page.wait_for_timeout(500)
    page.goto(site.url)
    assert "PSNR" in figures(page) and page.inner_text("h1") == "HieraTok anew"
    assert len(page.evaluate("caches.keys()")) == 2
    page.context.close()
