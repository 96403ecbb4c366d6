"""Tests of `benchmarks/latent_space.py`: signals whose figures are known, and what it draws and prints."""

import json
import math

import pytest
import torch
from helpers import noise, random_core
from latent_data import make_images
from PIL import Image
from scripts import load_script, usage_error

pytest.importorskip("datasets", reason="images are read through it")
pytest.importorskip("sklearn", reason="t-SNE is that of scikit-learn")

from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.data.latent_writer import write_latents

space = load_script("benchmarks", "latent_space")


def directions(count, dimensions):
    return noise(count, dimensions).double()


def test_power_adds_up_to_the_variance_and_is_flat_for_white_noise():
    latents = noise(5, 3, 4, 6) * torch.tensor([1.0, 2.0, 0.1]).view(3, 1, 1) + 7
    expected = latents.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(space.power(latents).mean((1, 2)), expected)
    latents = noise(4000, 2, 8, 8)
    spectrum = space.power(latents)
    frequencies, rings = space.radial_spectrum(spectrum)
    assert frequencies[0] == 0 and (frequencies.diff() > 0).all() and rings.shape == (2, len(frequencies))
    torch.testing.assert_close(rings, torch.ones_like(rings), rtol=0, atol=0.1)
    upper = sum(i * i + j * j >= 16 for i in range(8) for j in range(8))
    shares = torch.full((2,), upper / 64).double()
    torch.testing.assert_close(space.upper_half_share(spectrum), shares, rtol=0.01, atol=0)
    assert space.neighbour_correlation(latents).abs().max() < 0.01
    assert space.excess_kurtosis(latents).abs().max() < 0.05


@pytest.mark.parametrize("k", [0, 3, 4])
def test_a_cosine_has_its_energy_in_its_own_ring(k):
    # k half periods across the grid; of k = 0 each image is a constant of its own.
    wave = torch.cos(torch.pi / 8 * k * (torch.arange(8) + 0.5))
    latents = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1) * wave.expand(2, 1, 8, 8)
    spectrum = space.power(latents)
    frequencies, rings = space.radial_spectrum(spectrum)
    assert rings[0].argmax() == k and rings[0].sort().values[-2] < 1e-9
    assert spectrum[0, 0, k] / spectrum.sum() == pytest.approx(1) and space.radii(8, 8)[0, k] == k / 8
    assert space.upper_half_share(spectrum).item() == pytest.approx(float(k >= 4), abs=1e-9)
    assert frequencies[0] == 0


def test_neighbours_agree_or_alternate():
    signs = torch.tensor([1.0, -1.0])
    constant = signs.view(2, 1, 1, 1).expand(2, 1, 6, 4)
    board = (signs[torch.arange(6) % 2][:, None] * signs[torch.arange(4) % 2]).expand(2, 1, 6, 4)
    rows = signs[torch.arange(6) % 2][:, None].expand(2, 1, 6, 4)  # alike side by side, opposite one above the other
    found = space.neighbour_correlation(torch.cat((constant, board, rows), dim=1))
    torch.testing.assert_close(found, torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64))


def test_kurtosis_of_known_distributions():
    uniform = torch.rand(2000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = space.excess_kurtosis(torch.cat((uniform, uniform.round()), dim=1))
    torch.testing.assert_close(found, torch.tensor([-1.2, -2.0], dtype=torch.float64), rtol=0, atol=0.01)


def test_uniformity_tells_a_sphere_from_a_cluster():
    # On the sphere of three dimensions the mean of exp(-2 |x - y|^2) = exp(4 x.y - 4) is an integral by hand.
    assert space.uniformity(directions(2000, 3)) == pytest.approx(math.log((1 - math.exp(-8)) / 8), abs=0.03)
    assert space.uniformity(directions(500, 1000)) == pytest.approx(-4, abs=0.05)
    cluster = torch.ones(500, 3).double() + 1e-3 * directions(500, 3)
    assert -1e-4 < space.uniformity(cluster) <= 0
    lengths = torch.linspace(0.1, 9, 500).double()[:, None]
    assert space.uniformity(lengths * cluster) == pytest.approx(space.uniformity(cluster))
    two = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert space.uniformity(two) == pytest.approx(-4) and space.uniformity(two, t=1.0) == pytest.approx(-2)


def test_what_has_no_figures_is_refused():
    for figures, latents, message in (
        (space.figures, torch.zeros(2, 4, 4), "must have shape"),
        (space.figures, torch.full((2, 1, 4, 4), torch.nan), "must be finite"),
        (space.figures, torch.stack((noise(2, 4, 4), torch.ones(2, 4, 4)), dim=1), "every channel, 1 does not"),
        (space.neighbour_correlation, noise(2, 3, 1, 4), "neighbours both ways"),
        (space.uniformity, torch.zeros(3, 2), "no direction"),
        (space.uniformity, torch.ones(1, 2), "N of 2 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            figures(latents)


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
