"""A folder of images of many sizes and kinds, some of which cannot be read, that tests of archives share."""

import numpy as np
from image_files import noise
from PIL import Image

SIZES = {
    "a.png": (48, 32),
    "b/deep grey.png": (33, 17),
    "b/two.names.webp": (5, 70),
    "b/upright.jpg": (20, 40),
    "c 1/é.bmp": (31, 64),
    "c 1/dot.png": (3, 2),
    "z.gif": (16, 16),
}
"""Width and height of each image that can be read, upright."""

BROKEN = ("b/broken.png", "b/text.jpg")


def write_images(folder):
    """Write all of them, and files that are no images or hidden, and return the folder."""
    for seed, (name, (width, height)) in enumerate(SIZES.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "b/deep grey.png":
            Image.fromarray(noise(height, width, 0, seed).astype(np.uint16) * 257).save(path)
        elif name == "b/upright.jpg":
            exif = Image.Exif()
            exif[0x0112] = 6  # to be turned by a quarter
            Image.fromarray(noise(width, height, 3, seed)).save(path, exif=exif)
        else:
            Image.fromarray(noise(height, width, 4 if name == "a.png" else 3, seed)).save(path, lossless=True)
    (folder / "b/broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    (folder / "b/text.jpg").write_text("no image")
    (folder / "notes.txt").write_text("not looked at")
    (folder / ".hidden.png").write_bytes((folder / "a.png").read_bytes())
    return folder
