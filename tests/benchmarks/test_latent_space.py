"""Tests of `benchmarks/latent_space.py`: what it draws and prints of caches."""

import json

import pytest
from helpers import random_core
from latent_data import make_images
from PIL import Image
from scripts import load_script, usage_error

pytest.importorskip("datasets", reason="images are read through it")
pytest.importorskip("sklearn", reason="t-SNE is that of scikit-learn")

from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.data.latent_writer import write_latents

space = load_script("benchmarks", "latent_space")


@pytest.mark.usefixtures("script_surroundings")
def test_caches_beside_each_other(tmp_path, capsys):
    images = load_images(str(make_images(tmp_path / "images", count=24)))
    folders = [tmp_path / name for name in ("single-0", "multi-0")]
    for folder, factors in zip(folders, ((1,), (2, 1))):
        write_latents(random_core(scale_factors=factors), images, folder, size=16, kind="mode", threads=1)
    (tmp_path / "meta.json").write_text(json.dumps({"classes": ["hat", "jacket"]}))
    more = ["--classes", tmp_path / "meta.json", "--plot", tmp_path / "plot.png", "--json", tmp_path / "figures.json"]
    assert space.main(list(map(str, [*folders, *more]))) == 0
    spaces = json.loads((tmp_path / "figures.json").read_text())
    assert list(spaces) == ["single-0", "multi-0", space.NOISE]
    assert spaces["multi-0"]["images"] == 23 and spaces["multi-0"]["shape"] == [4, 4, 4]
    assert spaces["single-0"]["upper_half_share"] != spaces["multi-0"]["upper_half_share"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and {line.count("|") for line in lines} == {9}
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width > image.height > 400
    assert "a name of its own" in usage_error(capsys, space.main, folders[0], folders[0])
