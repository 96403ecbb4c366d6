"""Measure what is left of faces: the distance of face embeddings, by face height (after arXiv 2505.18142)."""

import importlib.util
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..data.image_dataset import Row, image_of
from ..models.autoencoder_adapter import Codec
from ..utils.distributed import gather
from ..utils.extras import missing_extra
from ..utils.images import ImageError, from_uint8, to_uint8

__all__ = ["FACE_HEIGHTS", "SAME_PERSON", "SQUARE_SIZE", "FaceDistances", "FaceNetworks"]

# Shape letters: S side of a square in pixels.

FACE_HEIGHTS = (24, 32, 48, 64, 96, 128)
"""Heights of faces in pixels, which are about what lies between the eyebrows and the chin."""

SQUARE_SIZE = 256
"""Side of what is cut around a face in pixels, whatever the size of other images, so that figures compare."""

SAME_PERSON = 0.6
"""Distance of embeddings below which dlib takes two faces for those of one person."""

_VIEW_HEIGHT = SQUARE_SIZE // 2  # what a face is brought to for the networks
_LEAST_OVERLAP = 0.3  # of two boxes, as the part that both have of what any has


class _Face(NamedTuple):
    landmarks: Any
    embedding: np.ndarray  # (128,)
    squares: dict[int, np.ndarray]  # (S, S, 3) in uint8, by height
    embeddings: dict[int, np.ndarray]  # those of the squares


class FaceNetworks:
    """
    Find and embed faces by dlib, on the CPU, with the weights of `face_recognition_models`, which are CC0.

    Attributes:
        files (`list[Path]`): The weights.

    Raises:
        ImportError: `dlib-bin` or `face_recognition_models` is not installed.
    """

    def __init__(self) -> None:
        # Not imported, which would need the pkg_resources that setuptools no longer has.
        weights = importlib.util.find_spec("face_recognition_models")
        try:
            import dlib
        except ModuleNotFoundError:
            weights = None
        if weights is None or weights.origin is None:
            raise missing_extra("Comparing faces", "dlib-bin", "face_recognition_models")
        # The other predictor there, of 68 landmarks, was trained on images for research alone.
        landmarks, embedding = "shape_predictor_5_face_landmarks.dat", "dlib_face_recognition_resnet_model_v1.dat"
        folder = Path(weights.origin).parent / "models"
        self.files = [folder / name for name in ("mmod_human_face_detector.dat", landmarks, embedding)]
        detector, predictor, embedder = map(str, self.files)
        corner = (SQUARE_SIZE - _VIEW_HEIGHT) // 2
        self._box = dlib.rectangle(corner, corner, corner + _VIEW_HEIGHT - 1, corner + _VIEW_HEIGHT - 1)
        self._find = dlib.get_frontal_face_detector()
        self._find_again = dlib.cnn_face_detection_model_v1(detector)
        self._predict = dlib.shape_predictor(predictor)
        self._embed = dlib.face_recognition_model_v1(embedder)

    def find(self, levels: np.ndarray) -> list[tuple[float, float, float]]:
        """
        Find what may be faces of 40 pixels and more in `levels` `(H, W, 3)` in uint8: `x`, `y` of the middle and
        height of each, in pixels.
        """
        boxes = self._find(levels, 1)
        return [(box.left() + box.width() / 2, box.top() + box.height() / 2, box.height()) for box in boxes]

    def find_landmarks(self, view: np.ndarray) -> Any:
        """
        Find eyes and nose of a face 128 pixels high in the middle of `view` `(S, S, 3)` in uint8; `None` where
        another detector sees no face, as in wheels and badges that `find` takes for faces.
        """
        for found in self._find_again(view):
            shared = found.rect.intersect(self._box).area()
            if shared > _LEAST_OVERLAP * (found.rect.area() + self._box.area() - shared):
                return self._predict(view, self._box)
        return None

    def embed(self, view: np.ndarray, landmarks: Any) -> np.ndarray:
        """Embed the face that has these `landmarks` in `view` `(S, S, 3)` in uint8, `(128,)`."""
        return np.array(self._embed.compute_face_descriptor(view, landmarks))


class FaceDistances:
    """
    Measure how far the embeddings of faces move when the faces are scaled, and when they are reconstructed.

    A face is found in its image at the size that it has there. Around its middle a square of `SQUARE_SIZE` is cut out
    of the image, scaled so that the face gets each of the heights, but never enlarged; where the image ends, its
    border goes on. Nothing is looked for again in what is scaled or reconstructed: landmarks stay where they were.

    Args:
        rows (iterable of sequences of `(int, Row)`): Numbered rows of `Images`, for each process its share, as
            `EvaluationBatches.numbered_rows` gives them; images that cannot be decoded are passed over.
        networks (`FaceNetworks`): What finds and embeds faces.
        heights (`Sequence[int]`, defaults to `FACE_HEIGHTS`): Heights of faces in pixels, at most 128.

    Attributes:
        found (`list[tuple[int, float, float, float]]`): The faces of all processes: number of the image, `x`, `y` of
            the middle and height in pixels.

    Raises:
        ValueError: There are no faces of the least height.
    """

    def __init__(
        self, rows: Iterable[Sequence[tuple[int, Row]]], networks: FaceNetworks, heights: Sequence[int] = FACE_HEIGHTS
    ):
        self.networks = networks
        self._faces: list[_Face] = []
        found = []
        for number, row in chain.from_iterable(rows):
            try:
                image = image_of(row)
            except ImageError:
                continue
            for x, y, height in networks.find(np.asarray(image)):
                # A face that the border cuts is none.
                whole = height <= 2 * min(x, y, image.width - x, image.height - y)
                if whole and (face := self._look_at(image, x, y, height, heights)):
                    found.append((number, x, y, height))
                    self._faces.append(face)
        self.found = sorted(face for part in gather(found) for face in part)
        if not self.found:
            raise ValueError(f"no faces of {min(heights)} pixels or more were found")
        self._heights = [height for height in heights if any(height <= face[-1] for face in self.found)]

    def _look_at(self, image: Image.Image, x: float, y: float, height: float, heights: Sequence[int]) -> _Face | None:
        squares = {small: _cut_square(image, x, y, small / height) for small in heights if small <= height}
        view = _cut_square(image, x, y, _VIEW_HEIGHT / height)
        landmarks = self.networks.find_landmarks(view) if squares else None
        if landmarks is None:
            return None
        embeddings = {small: self._embed(square, small, landmarks) for small, square in squares.items()}
        return _Face(landmarks, self.networks.embed(view, landmarks), squares, embeddings)

    @torch.no_grad()
    def measure(self, codec: Codec | None = None, batch_size: int = 16) -> dict[str, dict[str, float]]:
        """
        Embed all faces at all heights; every process calls this.

        Args:
            codec (`Codec`, *optional*): The autoencoder that reconstructs the squares.
            batch_size (`int`, defaults to 16): Most squares to reconstruct at a time.

        Returns:
            For each height that a face has, as `"24"`: the number of `faces`, the mean `distance` of their embeddings
            from those of the same squares before `codec`, or without one from those of the faces at 128 pixels, and
            the share `same` of distances below `SAME_PERSON`.
        """
        figures = {}
        for height in self._heights:
            faces, mine = [face for face in self._faces if height in face.squares], []
            for start in range(0, len(faces), batch_size):
                some = faces[start : start + batch_size]
                if codec is None:
                    mine += [np.linalg.norm(face.embeddings[height] - face.embedding) for face in some]
                    continue
                levels = torch.from_numpy(np.stack([face.squares[height] for face in some])).permute(0, 3, 1, 2)
                made = to_uint8(codec.decode(codec.encode(from_uint8(levels)))).cpu().permute(0, 2, 3, 1).numpy()
                for face, square in zip(some, made):
                    embedding = self._embed(square, height, face.landmarks)
                    mine.append(np.linalg.norm(embedding - face.embeddings[height]))
            distances = [float(distance) for part in gather(mine) for distance in part]
            same = fmean(distance < SAME_PERSON for distance in distances)
            figures[str(height)] = {"faces": len(distances), "distance": fmean(distances), "same": same}
        return figures

    def _embed(self, square: np.ndarray, height: int, landmarks: Any) -> np.ndarray:
        """Embed the face of a height in the middle of a square, brought to the size that its landmarks are of."""
        corner, far = SQUARE_SIZE // 2 - height, SQUARE_SIZE // 2 + height
        box = (corner, corner, far, far)
        view = Image.fromarray(square).resize((SQUARE_SIZE, SQUARE_SIZE), Image.Resampling.BICUBIC, box=box)
        return self.networks.embed(np.asarray(view), landmarks)


def _cut_square(image: Image.Image, x: float, y: float, scale: float) -> np.ndarray:
    """Scale an image and cut the square `(S, S, 3)` around what lay at `x`, `y` and now lies between its pixels."""
    half = SQUARE_SIZE // 2
    spaces = (x, y, image.width - x, image.height - y)
    left, top, right, bottom = (min(half, int(scale * space)) for space in spaces)
    box = (max(0, x - left / scale), max(0, y - top / scale), x + right / scale, y + bottom / scale)
    cut = image.resize((left + right, top + bottom), Image.Resampling.LANCZOS, box=box)
    return np.pad(np.asarray(cut), ((half - top, half - bottom), (half - left, half - right), (0, 0)), "edge")
