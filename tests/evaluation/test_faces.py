"""Tests of `faces`: what is cut out, which faces count, distances by hand, several processes, dlib on a real face."""

import sys

import numpy as np
import pytest
import torch
from helpers import random_core
from image_files import encoded, noise
from PIL import Image
from stand_in_faces import FACE, StandInNetworks
from torch.nn import functional as F

pytest.importorskip("datasets", reason="images are read through it")

from hieratok_hf.evaluation import faces
from hieratok_hf.evaluation.faces import FACE_HEIGHTS, SQUARE_SIZE, FaceDistances, FaceNetworks
from hieratok_hf.models.autoencoder_adapter import Codec


class Change(torch.nn.Module):
    """An autoencoder that makes of images what a function makes of them, and keeps what it was given."""

    def __init__(self, change=lambda images: images):
        super().__init__()
        self.weight, self.change, self.given = torch.nn.Parameter(torch.zeros(1)), change, []

    def encode(self, pixel_values):
        self.given += pixel_values
        return type("Output", (), {"latents": self.change(pixel_values)})

    def decode(self, latents):
        return type("Output", (), {"sample": latents})


def darker(images):
    return images - 0.5


def rows_of(*images, batch=2):
    """Numbered rows of images in batches; bytes stand for themselves."""
    content = [image if isinstance(image, bytes) else encoded(Image.fromarray(image)) for image in images]
    rows = [(i, {"image": {"bytes": x, "path": None}, "name": f"{i}", "label": None}) for i, x in enumerate(content)]
    return [rows[start : start + batch] for start in range(0, len(rows), batch)]


def unchanged(count, *heights):
    return {height: {"faces": count, "distance": 0, "same": 1} for height in heights}


def ramps(height, width):
    """An image whose red is 4 times the column, and whose green is 4 times the row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([4 * columns, 4 * rows, np.full_like(rows, 128)], -1).astype(np.uint8)


@pytest.mark.parametrize("height", [8, 12, 24])
def test_the_face_has_its_height_in_the_middle_and_the_border_goes_on(height):
    model, (x, y, full) = Change(), FACE
    FaceDistances(rows_of(ramps(40, 60)), StandInNetworks(), [height]).measure(Codec(model))
    (square,) = model.given
    assert square.shape == (3, SQUARE_SIZE, SQUARE_SIZE)
    levels, places = (square + 1) * 127.5, torch.arange(SQUARE_SIZE) + 0.5 - SQUARE_SIZE / 2
    for values, middle, extent in ((levels[0, 128], x, 60), (levels[1, :, 128], y, 40)):
        # What lies between two pixels' middles is between their values; Lanczos overshoots at a border.
        expected = 4 * (middle + places * full / height - 0.5).clamp(0, extent - 1)
        torch.testing.assert_close(values, expected, rtol=0, atol=4 * full / height)
        near = places.abs() < height / 2
        torch.testing.assert_close(values[near], expected[near], rtol=0, atol=1)


def test_faces_count_where_they_are_large_enough_whole_and_seen_twice():
    dark = noise(40, 60)
    dark[:30, :34] = 0
    places = FACE, (45, 20, 12), (10, 20, 24), (20, 30, 24), (52, 20, 24)  # the last three are cut
    images = noise(40, 60), b"no image", noise(40, 60, seed=1), dark
    found = FaceDistances(rows_of(*images), StandInNetworks(*places), [6, 12, 16, 24, 25])
    assert found.found == [(i, *place) for i in (0, 2, 3) for place in places[:2] if (i, place) != (3, FACE)]
    counts = {height: figures["faces"] for height, figures in found.measure().items()}
    assert counts == {"6": 5, "12": 5, "16": 2, "24": 2}
    for given, heights in ((dark[:30, :34], [12]), (noise(40, 60), [25])):
        with pytest.raises(ValueError, match=f"no faces of {heights[0]} pixels"):
            FaceDistances(rows_of(given), StandInNetworks(), heights)


def test_distances_are_those_of_the_embeddings():
    grey = np.full((40, 60, 3), 200, np.uint8)
    found = FaceDistances(rows_of(grey, grey, grey), StandInNetworks(), [12, 24])
    for batch_size in (1, 2, 9):
        same = found.measure(Codec(Change()), batch_size)
        assert same == found.measure() == unchanged(3, "12", "24")
        for levels, share in ((5, 1), (20, 0)):
            # An embedding has 8 * 8 * 3 numbers.
            expected = {"faces": 3, "distance": pytest.approx(levels / 255 * 192**0.5), "same": share}
            model = Change(lambda images, levels=levels: images - levels / 127.5)
            assert found.measure(Codec(model), batch_size) == {"12": expected, "24": expected}


def test_scaled_faces_differ_from_what_they_were_and_a_random_model_leaves_none():
    found = FaceDistances(rows_of(noise(40, 60), noise(40, 60, seed=1)), StandInNetworks(), [6, 24])
    scaled, made = found.measure(), found.measure(Codec(random_core(patch_size=16)))
    assert scaled["6"]["distance"] > 5 * scaled["24"]["distance"]
    assert all(made[height]["distance"] > 1 and made[height]["same"] == 0 for height in made)


@pytest.mark.parametrize("world", [2, 5])
def test_processes_share_the_faces(world, monkeypatch):
    images, codec = [noise(40, 60, seed=i) for i in range(4)], Codec(Change(darker))
    alone = FaceDistances(rows_of(*images), StandInNetworks(), [12, 24])
    alone_measured = [alone.measure(), alone.measure(codec)]
    parts = []  # of each process what it gave, in order

    def gather(mine):
        asked = len(parts[-1])
        parts[-1].append(mine)
        if len(parts) < world:  # not all are known yet
            return [alone.found] if asked == 0 else [mine or [0.0]]
        return [part[asked] for part in parts]

    monkeypatch.setattr(faces, "gather", gather)
    for rank in range(world):
        parts.append([])
        share = rows_of(*images, batch=1)[rank::world]
        together = FaceDistances(share, StandInNetworks(), [12, 24])
        measured = [together.measure(), together.measure(codec)]
    assert together.found == alone.found and measured == alone_measured
    assert [number for part in parts for number, *_ in part[0]] == [
        i for r in range(world) for i in range(4)[r::world]
    ]


@pytest.fixture(scope="module")
def astronaut():
    """A photograph by NASA, which is in the public domain, of one face and of badges that are like some."""
    return pytest.importorskip("skimage.data", reason="the photograph comes with scikit-image").astronaut()


@pytest.fixture(scope="module")
def networks():
    pytest.importorskip("dlib", reason="the extra faces is not installed")
    return FaceNetworks()


def test_dlib_finds_the_face_alone_and_knows_it_the_better_the_larger(astronaut, networks):
    found = FaceDistances(rows_of(astronaut[:280, 80:360], np.zeros((300, 300, 3), np.uint8)), networks)
    ((number, x, y, height),) = found.found
    assert number == 0 and abs(x - 140) < 15 and abs(y - 120) < 20 and 80 <= height <= 110
    heights = [str(height) for height in FACE_HEIGHTS if height <= 80]
    assert found.measure(Codec(Change())) == unchanged(1, *heights)
    blurred = Codec(Change(lambda images: F.interpolate(F.avg_pool2d(images, 8), scale_factor=8, mode="bicubic")))
    for measured in (found.measure(), found.measure(blurred)):
        distances = [measured[height]["distance"] for height in heights]
        assert len(distances) == 4 and distances == sorted(distances, reverse=True) and distances[-1] > 0.01
    assert measured["24"]["same"] == 0 and found.measure()["24"]["same"] == 1


def test_what_only_one_detector_takes_for_a_face_is_none(astronaut, networks):
    badge = (171.0, 380.5, 91.0)
    x, y, height = map(int, badge)
    view = Image.fromarray(astronaut).crop((x - height, y - height, x + height, y + height)).resize((256, 256))
    assert networks.find_landmarks(np.asarray(view)) is None
    assert networks.find(astronaut) and badge in networks.find(astronaut)


@pytest.mark.parametrize("package", ["dlib", "face_recognition_models"])
def test_a_missing_package_is_named_with_its_extra(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"dlib-bin, face_recognition_models.*hieratok_hf\[faces\]"):
        FaceNetworks()
