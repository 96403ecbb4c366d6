"""Tests of `hieratok fit-quantizer`: the levels are those of the images, and what is there stays."""

import re

import pytest
import torch
from helpers import random_core, tree
from latent_data import make_images, tiny_kl
from scripts import error_of

pytest.importorskip("datasets", reason="images are read through it")

from hieratok_hf import AutoencoderHieraTok
from hieratok_hf.cli import fit_quantizer as script
from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.evaluation.reconstruction import EvaluationBatches
from hieratok_hf.models.quantizing import QUANTIZER_FILE


@pytest.fixture
def space(tmp_path):
    """A folder with models and images."""
    AutoencoderHieraTok.from_core(random_core()).save_pretrained(tmp_path / "model")
    tiny_kl().save_pretrained(tmp_path / "kl")
    make_images(tmp_path / "images")
    (tmp_path / "empty").mkdir()
    return tmp_path


def run(space, folder, *given, data="images"):
    given = [str(space / folder), "--data", str(space / data), "--device", "cpu", *given]
    return script.main(given)


def test_levels_are_those_of_the_images_and_lie_beside_the_weights(space, capsys):
    before = tree(space / "model")
    assert run(space, "model", "--size", "16", "--max_images", "9", "--batch_size", "2") == 1
    out, err = capsys.readouterr()
    path = space / "model" / QUANTIZER_FILE
    assert out == f"levels written to {str(path)!r}\n" and len(re.findall("failed: ", err)) == 1
    after = tree(space / "model")
    assert after.pop(QUANTIZER_FILE) == path.read_bytes() and after == before
    model = AutoencoderHieraTok.from_pretrained(space / "model")
    batches = EvaluationBatches(load_images(str(space / "images")), 16, 2, limit=9)
    found = model.quantizer
    expected = model.fit_quantizer(batch["pixel_values"] for batch in batches)
    assert all(torch.equal(found.levels[bits], expected.levels[bits]) for bits in expected.levels)


def test_levels_are_replaced_only_if_that_is_asked_for(space, capsys):
    assert run(space, "model", "--max_images", "4") == 0
    first = (space / "model" / QUANTIZER_FILE).read_bytes()
    assert run(space, "model") == 2 and "is there already: add --overwrite" in error_of(capsys)
    assert (space / "model" / QUANTIZER_FILE).read_bytes() == first
    assert run(space, "model", "--max_images", "5", "--overwrite") == 0
    assert (space / "model" / QUANTIZER_FILE).read_bytes() != first


BAD = {
    "no folder": ({"folder": "missing"}, "FOLDER .*missing' must be that of a tokenizer"),
    "another autoencoder": ({"folder": "kl"}, "FOLDER .*kl' must be that of a HieraTok model, got AutoencoderKL"),
    "no images": ({"folder": "model", "data": "empty"}, "--data .*empty"),
    "a size that the model cannot take": ({"folder": "model", "given": ["--size", "15"]}, "--data .*at 15 pixels"),
}


@pytest.mark.parametrize(("case", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_no_file(case, message, space, capsys):
    before = tree(space)
    assert run(space, case["folder"], *case.get("given", []), data=case.get("data", "images")) == 2
    assert re.match(f"error: .*{message}", error_of(capsys))
    assert tree(space) == before
