"""Measure what is left of text: characters and lines that an OCR reads, by letter height (after arXiv 2505.18142)."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..models.autoencoder_adapter import Codec
from ..utils.distributed import gather, process_place
from ..utils.extras import missing_extra
from ..utils.images import from_uint8, to_uint8

__all__ = ["LETTER_HEIGHTS", "PAGE_SIZE", "PASSAGE", "TextPages", "TextReading", "load_reader"]

# Shape letters: N pages, P side of a page, L lines of text, h w of the strip that holds a line, in pixels.

LETTER_HEIGHTS = (12, 16, 20, 24, 32, 40)
"""Sizes of the font in pixels, which are about what lies between the top of a d and the bottom of a p."""

PAGE_SIZE = 256
"""Side of a page in pixels, whatever the size of other images, so that figures compare."""

# Public domain.
PASSAGE = (
    "It is interesting to contemplate an entangled bank, clothed with many plants of many kinds, with birds singing "
    "on the bushes, with various insects flitting about, and with worms crawling through the damp earth, and to "
    "reflect that these elaborately constructed forms, so different from each other, and dependent on each other in "
    "so complex a manner, have all been produced by laws acting around us. There is grandeur in this view of life, "
    "with its several powers, having been originally breathed into a few forms or into one; and that, whilst this "
    "planet has gone cycling on according to the fixed law of gravity, from so simple a beginning endless forms most "
    "beautiful and most wonderful have been, and are being, evolved."
)
"""The text of all pages, from the end of Darwin's Origin of Species (1859)."""

_LONGEST_LINE = 11  # characters: what fits on a page at every height, and no word is longer
_MARGIN = 4


class TextPages:
    """
    Draw `PASSAGE` in short lines, the same at every height, in black on white pages in columns; nothing is random.

    The font is Pillow's own, Aileron.

    Args:
        height (`int`): Letter height in pixels, at most 40.

    Attributes:
        lines (`list[str]`): The `L` lines.
        levels (`torch.Tensor` of shape `(N, 3, P, P)` in uint8): The pages.
    """

    def __init__(self, height: int):
        font: Any = ImageFont.load_default(height)
        # Raqm, which is not on every machine, places letters otherwise.
        font = font.font_variant(layout_engine=ImageFont.Layout.BASIC)
        self.lines = textwrap.wrap(PASSAGE, _LONGEST_LINE)
        self._widths = [round(font.getlength(line)) + 2 * _MARGIN for line in self.lines]
        self._width = max(self._widths)
        self._height = round(1.5 * height)
        self._rows, self._columns = PAGE_SIZE // self._height, PAGE_SIZE // self._width
        a_page = self._rows * self._columns
        pages = []
        for start in range(0, len(self.lines), a_page):
            page = Image.new("RGB", (PAGE_SIZE, PAGE_SIZE), "white")
            for place, line in enumerate(self.lines[start : start + a_page]):
                row, column = divmod(place, self._columns)
                corner = (column * self._width + _MARGIN, row * self._height + round(height / 8))
                ImageDraw.Draw(page).text(corner, line, "black", font)
            pages.append(torch.from_numpy(np.array(page)).permute(2, 0, 1))
        self.levels = torch.stack(pages)

    def cut_lines(self, levels: Tensor, page: int) -> list[np.ndarray]:
        """Cut the lines `(h, w, 3)` in uint8 out of `levels` `(3, P, P)`, a page or a reconstruction of it."""
        strips = levels[:, : self._rows * self._height, : self._columns * self._width]
        strips = strips.unflatten(2, (self._columns, -1)).unflatten(1, (self._rows, -1))
        strips = strips.permute(1, 3, 2, 4, 0).flatten(0, 1)  # (rows * columns, h, w, 3)
        widths = self._widths[page * len(strips) : (page + 1) * len(strips)]
        return [strip[:, :width].numpy() for strip, width in zip(strips, widths)]


class TextReading:
    """
    Measure how much of pages of known text is read right, as they were drawn and reconstructed.

    Args:
        read (callable): What reads the text of a line from its pixels `(h, w, 3)` in uint8, as `load_reader` gives it.
        heights (`Sequence[int]`, defaults to `LETTER_HEIGHTS`): Letter heights in pixels, at most 40.

    Attributes:
        pages (`dict[int, TextPages]`): The pages of each height.
    """

    def __init__(self, read: Callable[[np.ndarray], str], heights: Sequence[int] = LETTER_HEIGHTS):
        self.read = read
        self.pages = {height: TextPages(height) for height in heights}

    @torch.no_grad()
    def measure(self, codec: Codec | None = None, batch_size: int = 16) -> dict[str, dict[str, float]]:
        """
        Read all lines; each process reads some of the pages, and each must call this.

        Args:
            codec (`Codec`, *optional*): The autoencoder that reconstructs the pages; they are read as drawn unless
                given.
            batch_size (`int`, defaults to 16): Most pages to reconstruct at a time.

        Returns:
            For each height, as `"12"`, the shares `characters`, which is one less the edit distance over the number
            of characters and at least 0, and `lines`, those without an error. Spaces do not count: OCR of a line
            leaves them out where letters are large.

        Raises:
            ImportError: torchmetrics is not installed.
        """
        try:
            from torchmetrics.functional.text import char_error_rate
        except ImportError as error:
            raise missing_extra("Reading text", "torchmetrics") from error
        rank, world = process_place()
        figures = {}
        for height, pages in self.pages.items():
            mine: dict[int, list[str]] = {}
            share = range(len(pages.levels))[rank::world]
            for start in range(0, len(share), batch_size):
                numbers = list(share[start : start + batch_size])
                levels = pages.levels[numbers]
                if codec is not None:
                    levels = to_uint8(codec.decode(codec.encode(from_uint8(levels)))).cpu()
                for page, number in zip(levels, numbers):
                    mine[number] = [self.read(strip) for strip in pages.cut_lines(page, number)]
            read = {number: lines for part in gather(mine) for number, lines in part.items()}
            found = [line.replace(" ", "") for number in sorted(read) for line in read[number]]
            wanted = [line.replace(" ", "") for line in pages.lines]
            right = sum(one == other for one, other in zip(found, wanted))
            characters = max(0.0, 1 - float(char_error_rate(found, wanted)))
            figures[str(height)] = {"characters": characters, "lines": right / len(wanted)}
        return figures


def load_reader() -> Callable[[np.ndarray], str]:
    """
    Load PP-OCRv4, which `rapidocr-onnxruntime` holds and runs on the CPU, for single lines of known place.

    Returns:
        A function from the pixels of a line `(h, w, 3)` in uint8 to its text.

    Raises:
        ImportError: `rapidocr-onnxruntime` is not installed, or what OpenCV needs is not on the system.
    """
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ModuleNotFoundError as error:
        raise missing_extra("Reading text, under Python below 3.13,", "rapidocr-onnxruntime") from error
    engine = RapidOCR(intra_op_num_threads=torch.get_num_threads())

    def read(strip: np.ndarray) -> str:
        # Blue comes first there.
        ((text, _),), _ = engine(strip[..., ::-1], use_det=False, use_cls=False)
        return text

    return read
