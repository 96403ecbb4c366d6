"""Test of the looks of the page of `hieratok app`: they are of parts that are there."""

import re

import pytest
from scripts import load_script
from tiny_pipelines import make_pipeline

from hieratok_hf.utils.choices import SHIPPED

pytest.importorskip("gradio", reason="it is a page of Gradio")
pytest.importorskip("torchmetrics", reason="it computes the SSIM")


def test_what_is_styled_is_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    app, style = load_script("cli", "app"), load_script("cli", "app_style")
    pipe = make_pipeline({"scale_factors": (1,)})  # the fewest scales there are
    page = app.build({"tiny": pipe.vae}, pipe, str(tmp_path / "sent"))
    there = {getattr(block, "elem_id", None) for block in page.blocks.values()}
    there |= set(re.findall(r'id="(\w+)"', style.COMPARE))
    selectors = re.sub(r"\{[^{}]*\}", "", style.CSS)
    named = set(re.findall(r"#(\w+)", selectors + style.COMPARE + style.HANDLES))
    assert named and named <= there
    assert set(style.ABOUT_MODELS) <= set(SHIPPED)
