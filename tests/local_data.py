"""Folders and shards of small images that tests of the data make, known by their seeds."""

import image_files
import numpy as np
import pytest
from image_files import encoded, noise
from PIL import Image

from hieratok_hf.data.image_dataset import image_of, load_images


def picture(seed):
    return Image.fromarray(noise(10, 12, seed=seed))


def write_shard(path, seeds, kind="png", labels=True):
    """A tar shard of the labels `seed % 3`."""
    image_files.write_shard(path, map(picture, seeds), [seed % 3 for seed in seeds] if labels else (), kind)
    return str(path)


def write_folder(folder, **classes):
    for name, seeds in classes.items():
        (folder / name).mkdir(parents=True)
        for seed in seeds:
            (folder / name / f"{seed}.png").write_bytes(encoded(picture(seed)))
    return str(folder)


def seen(images, seeds):
    """Assert that these are the very images of the seeds, and return their labels."""
    rows = list(images)
    for row, seed in zip(rows, seeds, strict=True):
        assert (np.asarray(image_of(row)) == noise(10, 12, seed=seed)).all(), row["name"]
    return [row["label"] for row in rows]


def refused(source, message, **options):
    with pytest.raises(ValueError) as caught:
        load_images(source, **options)
    text = str(caught.value)
    assert message in text and "\n" not in text, text
    assert all(name in text for name in ([source] if isinstance(source, str) else source)), text
