"""A stand-in for the networks that find and embed faces, which are told where these are and look at pixels alone."""

from pathlib import Path

import numpy as np

FACE = (20.0, 18.5, 24.0)
"""Where a face is in each image: `x`, `y` of its middle, and height."""


class StandInNetworks:
    """Take the places that are given for faces, but for dark ones, and an image in few pixels for its embedding."""

    files = [Path(__file__)]

    def __init__(self, *places):
        self.places = places or (FACE,)

    def find(self, levels):
        return list(self.places)

    def find_landmarks(self, view):
        return "landmarks" if view[64:192, 64:192].mean() > 10 else None

    def embed(self, view, landmarks):
        assert view.shape == (256, 256, 3) and view.dtype == np.uint8 and landmarks == "landmarks"
        return (view[64:192, 64:192].reshape(8, 16, 8, 16, 3) / 255).mean((1, 3)).flatten()
