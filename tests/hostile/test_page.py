"""Whatever a visitor sends to the page is shown or refused in words, and nobody else gets it."""

import io
import json
import os
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from image_files import noise, png
from PIL import Image
from scripts import load_script
from tiny_pipelines import make_pipeline

gr = pytest.importorskip("gradio", reason="it is a page of Gradio")
pytest.importorskip("torchmetrics", reason="it computes the SSIM")

BOUNDARY, MODEL = "frontier", "hieratok-tiny"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
JSON = {"Content-Type": "application/json"}


def encoded(kind="PNG", size=(64, 64), **options):
    file = io.BytesIO()
    Image.fromarray(noise(*size)).save(file, kind, **options)
    return file.getvalue()


WHOLE = encoded()
# Name and content of a file, and what is said of it: "" of one that is shown.
FILES = {
    "no name but an ending": (".png", WHOLE, ""),
    "pipes and quotes": ("a|b`c.png", WHOLE, ""),
    "markup": ("<img src=x>.png", WHOLE, ""),
    "right to left": ("a\u202egnp.png", WHOLE, ""),
    "a very long name": ("x" * 300 + ".png", WHOLE, ""),
    "another ending": ("a.txt", WHOLE, ""),
    "a JPEG called PNG": ("a.png", encoded("JPEG"), ""),
    "EPS": ("a.eps", encoded("EPS"), "is no image"),
    "SVG": ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "is no image"),
    "nothing": ("a.png", b"", "is empty"),
    "half of a PNG": ("a.png", WHOLE[: len(WHOLE) // 2], "cannot be decoded"),
    "a bomb": ("a.png", png(60_000, 60_000, 8, 2), "is too large"),
    "a GIF bomb": ("a.gif", b"GIF89a" + b"\xff\xff\xff\xff\x00\x00\x00", "a.gif"),
    "a WebP bomb": ("a.webp", b"RIFF\x16\0\0\0WEBPVP8L\x0a\0\0\0\x2f\xff\xff\xff\x0f\0\0\0\0\0", "a.webp"),
    "TIFF without its end": ("a.tif", encoded("TIFF")[:-500], "cannot be decoded"),
    "less than a patch": ("a.png", encoded(size=(3, 30)), "got 3 x 30"),
}


class Page:
    """The page in a thread of this process."""

    def __init__(self, app, monkeypatch):
        self.url, self.folder, running = "", Path(), threading.Event()
        launch = gr.Blocks.launch

        def launched(demo, **settings):
            self.demo = demo
            launch(demo, **settings)
            self.url, self.folder = demo.local_url.rstrip("/"), Path(os.environ["GRADIO_TEMP_DIR"]).parent
            running.set()

        pipe = make_pipeline()
        monkeypatch.setattr(app, "load_model", lambda *_: pipe.vae)
        monkeypatch.setattr(app, "load_pipeline", lambda *_: pipe)
        monkeypatch.setattr(app.signal, "signal", lambda *_: None)
        monkeypatch.setattr(gr.Blocks, "launch", launched)
        monkeypatch.setenv("GRADIO_TEMP_DIR", "unset")
        self.thread = threading.Thread(target=app.main, args=([],))
        self.thread.start()
        assert running.wait(60)

    def stop(self):
        self.demo.close(verbose=False)
        self.thread.join(20)

    def ask(self, path, data=None, headers=None):
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers or {})) as answer:
                return answer.status, answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")

    def send(self, name, content):
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()
        return self.ask("/gradio_api/upload", body, FORM)

    def call(self, function, *data):
        session = f"s{time.monotonic_ns()}"
        event = {"data": data, "fn_index": function, "session_hash": session}
        status, text = self.ask("/gradio_api/queue/join?", json.dumps(event).encode(), JSON)
        return self.ask(f"/gradio_api/queue/data?session_hash={session}")[1] if status == 200 else text


@pytest.fixture(scope="module")
def page():
    with pytest.MonkeyPatch.context() as monkeypatch:
        page = Page(load_script("cli", "app"), monkeypatch)
        yield page
        page.stop()
        assert not page.folder.exists()


def test_what_was_sent_to_no_end_does_not_stay(page):
    (unread,) = json.loads(page.send("a.png", WHOLE)[1])
    with socket.create_connection(urllib.parse.urlsplit(page.url).netloc.split(":")) as half:
        head = "POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n"
        head += f"Content-Type: {FORM['Content-Type']}\r\n"
        part = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        half.sendall(f"{head}\r\n{part}".encode() + bytes(5000))
        deadline = time.monotonic() + 10
        while not list((page.folder / "sent").glob("tmp*")) and time.monotonic() < deadline:
            time.sleep(0.01)
    (page.folder / "sent" / "young").touch()
    for path in [Path(unread).parent, *(page.folder / "sent").glob("tmp*")]:
        os.utime(path, (0, 0))
    page.send("..", WHOLE)
    assert {path.name for path in (page.folder / "sent").iterdir() if path.stat().st_mtime < 1000} == set()
    assert (page.folder / "sent" / "young").exists() and not Path(unread).exists()


def test_a_request_deletes_no_file_but_the_one_that_it_sent(page):
    mine, other = (Path(json.loads(page.send(f"{name}.png", WHOLE)[1])[0]) for name in ("mine", "other"))
    for path in (mine.parent, mine.parent.parent, mine.parent / ".." / "..", mine.parent / "missing.png"):
        told = page.call(0, file_at(str(path)), MODEL)
        assert '"success":false' in told and mine.exists() and other.exists(), path
    assert (page.folder / "shown").exists()
    assert '"success":true' in page.call(0, file_at(str(mine)), MODEL)
    assert not mine.exists() and other.exists()
    other.unlink()


def file_at(path):
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(("name", "content", "said"), FILES.values(), ids=FILES)
def test_a_file_is_shown_or_refused_in_words_and_gone(page, name, content, said):
    status, text = page.send(name, content)
    assert status == 200
    (path,) = json.loads(text)
    answers = page.call(0, file_at(path), MODEL)
    assert '"success":true' in answers and "Traceback" not in answers
    assert ("cannot be used" in answers) == bool(said) and said in answers
    assert not list((page.folder / "sent").rglob("*.*"))


def test_nobody_gets_what_somebody_sent(page):
    paths = [json.loads(page.send("a.png", WHOLE)[1])[0] for _ in range(2)]
    assert paths[0] != paths[1]
    for path in (paths[0], f"{tempfile.gettempdir()}/..{paths[0]}", os.path.relpath(paths[0])):
        for door in ("/gradio_api/file=", "/gradio_api/file/", "/file=", "/file/"):
            assert page.ask(door + urllib.parse.quote(path))[0] in (403, 404)
    # One that is read leaves the other, of the same name and content, where it is.
    assert all("cannot be used" not in page.call(0, file_at(path), MODEL) for path in paths)
    again = page.call(0, file_at(paths[0]), MODEL)
    assert '"success":true' not in again or "cannot be used" in again


FOREIGN = ["/etc/passwd", 7, {"path": 7}, *map(file_at, ("/etc/passwd", "", "http://127.0.0.1:1/x", "a\0b"))]


@pytest.mark.parametrize("data", FOREIGN, ids=repr)
def test_what_is_no_file_that_was_sent_is_not_read(page, data):
    answers = page.call(0, data, MODEL)
    assert '"success":true' not in answers and "root:" not in answers and str(page.folder) not in answers


@pytest.mark.parametrize(
    "settings",
    [
        ["x", 0, False, 1, 2, 1.0, 1],
        [0, 0, False, 10**9, 2, 1.0, 1],
        [0, 0, False, 1, 10**9, 1.0, 1],
        [0, 0, False, 1],
        [None] * 7,
        [{}] * 7,
    ],
    ids=str,
)
def test_settings_beyond_the_limits_make_nothing(page, settings):
    answers = page.call(3, *settings)
    assert '"success":true' not in answers or "Nothing was made" in answers
    assert "image.png" not in answers and "Traceback" not in answers
