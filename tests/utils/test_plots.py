"""Plots are PNG files, in a path or in memory, with axes of the widths that are asked for."""

import io

import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from hieratok_hf.utils.plots import draw


def test_a_plot_has_the_size_and_the_axes_that_are_asked_for(tmp_path):
    content = io.BytesIO()
    for target in (content, tmp_path / "plot.png"):
        with draw(target, 2, width_ratios=[3, 1], figsize=(4, 2)) as (figure, (first, second)):
            first.plot([0, 1], [1, 0])
            figure.canvas.draw()
            assert first.get_position().width > 2 * second.get_position().width
    assert content.getvalue()[:8] == (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with Image.open(content) as image:
        assert image.size == (440, 220)
