"""Tests of `hieratok fit-quantizer`: the levels are those of the images, and what is there stays."""

import re

import numpy as np
import pytest
import torch
from helpers import tree
from latent_data import make_images, save_autoencoders, tiny_dc
from scripts import error_of

pytest.importorskip("datasets", reason="images are read through it")

from hieratok_hf import AutoencoderHieraTok, open_image
from hieratok_hf.cli import decode, encode
from hieratok_hf.cli import fit_quantizer as script
from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.evaluation.reconstruction import EvaluationBatches
from hieratok_hf.models.quantizing import LatentQuantizer
from hieratok_hf.utils.choices import QUANTIZER_FILE


@pytest.fixture
def space(tmp_path):
    """A folder with models and images."""
    save_autoencoders(tmp_path)
    tiny_dc().save_pretrained(tmp_path / "dc")
    make_images(tmp_path / "images")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.png").write_bytes(b"no image")
    return tmp_path


def run(space, folder, *given, data="images"):
    given = [str(space / folder), "--data", str(space / data), "--device", "cpu", *given]
    return script.main(given)


def test_levels_are_those_of_the_images_and_lie_beside_the_weights(space, capsys):
    before = tree(space / "hieratok")
    assert run(space, "hieratok", "--size", "16", "--max_images", "9", "--batch_size", "2") == 1
    out, err = capsys.readouterr()
    path = space / "hieratok" / QUANTIZER_FILE
    assert out == f"levels written to {str(path)!r}\n" and re.findall("failed: (.*): cannot", err) == [
        f"'{space}/images/hat/005.png'"
    ]
    after = tree(space / "hieratok")
    assert after.pop(QUANTIZER_FILE) == path.read_bytes() and after == before
    model = AutoencoderHieraTok.from_pretrained(space / "hieratok")
    batches = EvaluationBatches(load_images(str(space / "images")), 16, 2, limit=9)
    found = model.quantizer
    expected = model.fit_quantizer(batch["pixel_values"] for batch in batches)
    assert all(torch.equal(found.levels[bits], expected.levels[bits]) for bits in expected.levels)


@pytest.mark.parametrize("folder", ["hieratok", "kl", "tiny", "dc"])
def test_integers_of_any_autoencoder_go_to_a_file_and_back(folder, space):
    assert run(space, folder, "--size", "32", "--max_images", "4") == 0
    (space / "images/hat/005.png").unlink()  # the one that is broken
    options = ["--model", str(space / folder), "--device", "cpu"]
    decoded = {}
    for bits in (2, 8, None):
        archive, out = space / f"{bits}.tokens", space / f"{bits} again"
        given = [*options, *(["--dtype", "float32"] if bits is None else ["--bits", str(bits)])]
        assert encode.main([str(space / "images"), str(archive), *given]) == 0
        assert decode.main([str(archive), str(out), "--device", "cpu"]) == 0
        decoded[bits] = [np.array(open_image(path), float) for path in sorted(out.rglob("*.png"))]
    errors = {
        bits: sum(np.square(x - whole).mean() for x, whole in zip(images, decoded[None], strict=True))
        for bits, images in decoded.items()
    }
    assert len(decoded[8]) == 13 and 0 < errors[8] < errors[2] / 10


def test_levels_are_replaced_only_if_that_is_asked_for(space, capsys):
    assert run(space, "hieratok", "--max_images", "4") == 0
    first = (space / "hieratok" / QUANTIZER_FILE).read_bytes()
    assert run(space, "hieratok") == 2 and error_of(capsys).endswith("is there already: add --overwrite to replace it")
    assert (space / "hieratok" / QUANTIZER_FILE).read_bytes() == first
    assert run(space, "hieratok", "--max_images", "5", "--overwrite") == 0
    assert (space / "hieratok" / QUANTIZER_FILE).read_bytes() != first


@pytest.mark.parametrize("folder", ["hieratok", "kl"])
def test_damaged_levels_are_replaced(folder, space, capsys):
    path = space / folder / QUANTIZER_FILE
    path.write_bytes(b"levels")
    given = [folder, "--size", "32", "--max_images", "4"]
    assert run(space, *given) == 2 and "--overwrite" in error_of(capsys)
    assert path.read_bytes() == b"levels"
    assert run(space, *given, "--overwrite") == 0
    assert len(LatentQuantizer.read(path).levels[8]) == 4


BAD = {
    "no folder": ({"folder": "missing"}, "FOLDER .*missing' must be that of an autoencoder"),
    "a size that another library's model cannot take": (
        {"folder": "kl", "given": ["--size", "1"]},
        "--data .*at 1 pix",
    ),
    "no images that can be read": ({"folder": "hieratok", "data": "broken"}, "--data .*broken.*none .*read.*0.png"),
    "no images": ({"folder": "hieratok", "data": "empty"}, "--data .*empty"),
    "a size that the model cannot take": ({"folder": "hieratok", "given": ["--size", "15"]}, "--data .*at 15 pixels"),
}


@pytest.mark.parametrize(("case", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_no_file(case, message, space, capsys):
    before = tree(space)
    assert run(space, case["folder"], *case.get("given", []), data=case.get("data", "images")) == 2
    assert re.match(f"error: .*{message}", error_of(capsys))
    assert tree(space) == before
