"""Tests of `text`: whole letters on pages, scores by hand, autoencoders, several processes, the OCR itself."""

import sys

import numpy as np
import pytest
import torch
from helpers import random_core
from PIL import Image, ImageFilter
from text_reader import template_reader

pytest.importorskip("torchmetrics", reason="characters are counted by it")

from hieratok_hf.evaluation import text
from hieratok_hf.evaluation.text import LETTER_HEIGHTS, PAGE_SIZE, PASSAGE, TextPages, TextReading, load_reader
from hieratok_hf.models.autoencoder_adapter import Codec


def strips_of(pages):
    return [strip for number, page in enumerate(pages.levels) for strip in pages.cut_lines(page, number)]


@pytest.fixture(scope="module")
def ocr():
    pytest.importorskip("rapidocr_onnxruntime", exc_type=ImportError, reason="the extra ocr is not installed")
    return load_reader()


@pytest.mark.parametrize("height", LETTER_HEIGHTS)
def test_pages_hold_every_line_whole_and_are_the_same_again(height):
    pages = TextPages(height)
    assert " ".join(pages.lines) == PASSAGE
    assert pages.levels.shape[1:] == (3, PAGE_SIZE, PAGE_SIZE) and pages.levels.dtype == torch.uint8
    assert torch.equal(pages.levels, TextPages(height).levels)
    strips = strips_of(pages)
    assert len(strips) == len(pages.lines)
    # No ink lies outside of the strips, or at their borders, where it could have been cut.
    assert sum(int((255 - strip.astype(int)).sum()) for strip in strips) == int((255 - pages.levels.int()).sum())
    for strip in strips:
        assert min(strip[0].min(), strip[-1].min(), strip[:, 0].min(), strip[:, -1].min()) == 255
    tall = max(int((strip.min((1, 2)) < 128).sum()) for strip in strips)
    assert 0.85 * height <= tall <= 1.1 * height


def test_characters_and_lines_are_counted_by_hand_without_spaces():
    pages = TextPages(40)
    lines = list(pages.lines)
    lines[0] = f" {lines[0]} "
    lines[1] = lines[1][1:]
    lines[2] = f"{lines[2]}xy"
    lines[3] = ""
    errors = 1 + 2 + len(pages.lines[3].replace(" ", ""))
    answers = iter(lines)
    figures = TextReading(lambda strip: next(answers), heights=[40]).measure()
    assert figures.keys() == {"40"} and next(answers, None) is None
    assert figures["40"]["characters"] == pytest.approx(1 - errors / len(PASSAGE.replace(" ", "")))
    assert figures["40"]["lines"] == pytest.approx(1 - 3 / len(lines))
    much = TextReading(lambda strip: "x" * 99, heights=[40]).measure()
    assert much["40"] == {"characters": 0, "lines": 0}  # more errors than characters


class Shift(torch.nn.Module):
    """An autoencoder that makes everything darker by a part of the range."""

    def __init__(self, amount):
        super().__init__()
        self.amount = torch.nn.Parameter(torch.tensor(amount))

    def encode(self, pixel_values):
        return type("Output", (), {"latents": pixel_values - self.amount})

    def decode(self, latents):
        return type("Output", (), {"sample": latents})


@pytest.mark.parametrize(("amount", "share"), [(0.0, 1), (0.5, 0)])
def test_what_is_read_is_what_the_autoencoder_made(amount, share):
    reading = TextReading(template_reader(12, 40), heights=[12, 40])
    expected = {height: {"characters": share, "lines": share} for height in ("12", "40")}
    for batch_size in (1, 3, 99):
        assert reading.measure(Codec(Shift(amount)), batch_size) == expected


def test_a_model_with_random_weights_leaves_nothing_to_read():
    figures = TextReading(template_reader(12), heights=[12]).measure(Codec(random_core(patch_size=16)))
    assert figures == {"12": {"characters": 0, "lines": 0}}


@pytest.mark.parametrize("world", [3, 20])
def test_processes_share_the_pages(world, monkeypatch):
    reading, parts = TextReading(template_reader(16), heights=[16]), []
    read, pages = reading.read, range(len(reading.pages[16].levels))
    monkeypatch.setattr(reading, "read", lambda strip: read(strip)[1:])
    codec = Codec(Shift(0.0))
    alone = reading.measure(codec)
    assert 0 < alone["16"]["characters"] < 1 and 3 < len(pages) < 20

    def gather(mine):
        parts.append(mine)
        return parts if len(parts) == world else [dict.fromkeys(pages, ("",))]

    monkeypatch.setattr(text, "gather", gather)
    for rank in range(world):
        monkeypatch.setattr(text, "process_place", lambda rank=rank: (rank, world))
        together = reading.measure(codec)
    assert together == alone
    assert sorted(number for part in parts for number in part) == list(pages)


@pytest.mark.parametrize("height", [min(LETTER_HEIGHTS), max(LETTER_HEIGHTS)])
def test_the_ocr_reads_pages_as_drawn_and_not_what_is_blurred(height, ocr):
    pages = TextPages(height)
    assert TextReading(ocr, heights=[height]).measure()[str(height)]["characters"] > 0.99
    blurred = Image.fromarray(strips_of(pages)[1]).filter(ImageFilter.GaussianBlur(height / 3))
    assert ocr(np.asarray(blurred)) != pages.lines[1]


def test_a_missing_ocr_is_named_with_its_extra_and_a_broken_one_by_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(ImportError, match=r"Python below 3.13.*rapidocr-onnxruntime.*hieratok_hf\[ocr\]"):
        load_reader()
    broken = type(sys)("rapidocr_onnxruntime")  # as where OpenCV misses a library of the system
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", broken)
    with pytest.raises(ImportError, match="RapidOCR") as found:
        load_reader()
    assert "pip install" not in str(found.value)
