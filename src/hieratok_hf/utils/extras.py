"""Name the extra of the package that brings what an installation lacks."""

__all__ = ["EXTRAS", "MissingExtra", "missing_extra"]

EXTRAS = {
    "datasets": "eval",
    "torchmetrics": "eval",
    "matplotlib": "eval",
    "tensorboard": "train",
    "peft": "train",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "gradio": "app",
    "rapidocr-onnxruntime": "ocr",
    "dlib-bin": "faces",
    "face_recognition_models": "faces",
}
"""Packages that the core does without, each with the extra that brings it."""


class MissingExtra(ImportError):
    """Say which package is missing, what for, and how to install it."""


def missing_extra(what: str, *packages: str) -> MissingExtra:
    """Make the error of something, as `"`ssim`"`, that needs packages of one extra which are not installed."""
    return MissingExtra(f"{what} needs {', '.join(packages)}: pip install 'hieratok_hf[{EXTRAS[packages[0]]}]'")
