"""Hostile configurations, weights, folders, tensors and images: one clear error each, and nothing written or lost."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY, images, noise, random_core, tree
from PIL import Image
from transformers import ViTConfig

from hieratok_hf import AutoencoderHieraTok, HieraTokConfig, HieraTokImageProcessorPil, HieraTokModel

NAN, INF, HUGE = float("nan"), float("inf"), 10**400
CLASSES = (HieraTokModel, AutoencoderHieraTok)
WEIGHTS = "diffusion_pytorch_model.safetensors"
# What a mistake inside looks like to a user.
BAFFLING = (AssertionError, AttributeError, IndexError, KeyError, MemoryError, NotImplementedError, OverflowError)
BAFFLING += (RecursionError, UnboundLocalError, UnicodeError, ZeroDivisionError)


def refuse(named: str, folder: Path, call: Any, *args: Any, **kwargs: Any) -> None:
    """Call what must end in an error that names something, and leave a folder as it was."""
    before = tree(folder)
    with pytest.raises(Exception) as caught:
        call(*args, **kwargs)
    assert not isinstance(caught.value, BAFFLING), repr(caught.value)
    assert named in str(caught.value), repr(caught.value)
    assert tree(folder) == before


CONFIGURATIONS = [
    *({name: HUGE} for name in ("kl_weight", "shift_factor")),
    *({"scale_factors": value} for value in ([[2], 1], {2: 1}, [HUGE, 1.0], (None,), 8)),
    {"downsampling": ["learned"]},
    {"patch_size": 4.5},
    {"mlp_ratio": 1e-12},
    {"force_upcast": 1},
    {"encoder_num_layer": 1},
]


@pytest.mark.parametrize("values", CONFIGURATIONS, ids=lambda values: str(values)[:50])
def test_configurations(values, tmp_path):
    (name,) = values
    for call in (HieraTokConfig, AutoencoderHieraTok):
        refuse(name, tmp_path, call, **{**TINY, **values})


@pytest.fixture(scope="module")
def core():
    return random_core()


@pytest.fixture
def folder(core, tmp_path):
    AutoencoderHieraTok.from_core(core).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


JSON = {
    "list": "[]",
    "nested": "[" * 10**5,
    "long": '{"patch_size": ' + "9" * 5000 + "}",
    "latin": '{"author": "\xe9"}',
}


@pytest.mark.parametrize("text", JSON.values(), ids=JSON)
@pytest.mark.parametrize("cls", CLASSES)
def test_configuration_files(cls, text, folder):
    (folder / "config.json").write_text(text, encoding="latin-1")
    refuse("config.json", folder, cls.from_pretrained, folder)


def other(folder: Path) -> None:
    ViTConfig().save_pretrained(folder)


def fifo(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def loop(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")


def pipeline(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model_index.json").write_text(json.dumps({"vae": ["hieratok_hf", "AutoencoderHieraTok"]}))


def no_weights(folder: Path) -> None:
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()


def weights_are_a_folder(folder: Path) -> None:
    no_weights(folder)
    (folder / WEIGHTS).mkdir()


FOLDERS = {
    "config.json": [fifo, loop],
    "vit": [other],
    "subfolder='vae'": [pipeline],
    "model": [no_weights, weights_are_a_folder],
}


@pytest.mark.parametrize(("named", "spoil"), [(named, spoil) for named in FOLDERS for spoil in FOLDERS[named]])
@pytest.mark.parametrize("cls", CLASSES)
def test_folders(cls, named, spoil, folder):
    spoil(folder)
    names = sorted(folder.iterdir())
    refuse(named, folder.parent / "elsewhere", cls.from_pretrained, folder)
    assert sorted(folder.iterdir()) == names


INDICES = [
    "{}",
    '{"weight_map": []}',
    '{"weight_map": {"core.encoder.head.bias": "missing.safetensors"}}',
    '{"weight_map": {"core.encoder.head.bias": "config.json"}}',
    "[" * 10**5,
]


@pytest.mark.parametrize("text", INDICES, ids=lambda text: text[:60])
@pytest.mark.parametrize("cls", CLASSES)
def test_indices(cls, text, folder):
    for stem in ("model", "diffusion_pytorch_model"):
        (folder / f"{stem}.safetensors.index.json").write_text(text)
    refuse("index.json", folder, cls.from_pretrained, folder)


NAMES = ["", None, 3, b"bytes", "zero\0byte", "x" * 5000, "https://localhost/model", "two words", "../../.."]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:20])
@pytest.mark.parametrize("cls", CLASSES)
def test_names(cls, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name is not None or cls is AutoencoderHieraTok:  # with a configuration, transformers makes a model of nothing
        refuse("", tmp_path, cls.from_pretrained, name)


SAVES = {
    "save_directory": [("", {}), (None, {}), (3, {}), (b"bytes", {})],
    "null": [("zero\0byte", {})],
    "max_shard_size": [("model", {"max_shard_size": value}) for value in (0, -1, "x", "")],
    "variant": [("model", {"variant": value}) for value in ("../fp16", "a/b", 16, "")],
}


@pytest.mark.parametrize(("named", "case"), [(named, case) for named, cases in SAVES.items() for case in cases])
@pytest.mark.parametrize("cls", CLASSES)
def test_saves(cls, named, case, core, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuse(named, tmp_path, cls.from_core(core).save_pretrained, case[0], **case[1])


@pytest.mark.parametrize("place", ["config.json", WEIGHTS, ".hieratok-saved"])
@pytest.mark.parametrize("cls", CLASSES)
def test_places_that_are_taken(cls, place, core, tmp_path):
    (tmp_path / place).mkdir() if place != ".hieratok-saved" else (tmp_path / place).write_text("mine")
    refuse(place, tmp_path, cls.from_core(core).save_pretrained, tmp_path)


def changed(change: Any) -> list[tuple[str, Any, torch.Tensor]]:
    return [("pixel_values", change(images(1, 3, 8, 8))), ("latents", change(noise(1, 4, 2, 2)))]


TENSORS = {
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "float16": lambda x: x.half(),
    "float64": lambda x: x.double(),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x[0, 0].to_sparse_csr(),
    "oneDNN": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.as_nested_tensor([x[0], x[0]]),
    "jagged": lambda x: torch.nested.nested_tensor([x[0, 0], x[0, 0]], layout=torch.jagged),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "bool": lambda x: x > 0,
    "5-D": lambda x: x[None],
    "overflow": lambda x: x * 1e39,
    "None": lambda x: None,
    "distribution": lambda x: AutoencoderHieraTok,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors(kind, sliced, core, tmp_path):
    vae, model = AutoencoderHieraTok.from_core(core), HieraTokModel.from_core(core)
    vae.enable_tiling()
    if sliced:
        vae.enable_slicing()
    for (name, value), calls in zip(changed(TENSORS[kind]), [(vae, vae.encode, model), (vae.decode, model.decode)]):
        for call in calls[:-1] if kind.startswith("float") else calls:  # which the transformers class casts
            refuse(f"`{name}`", tmp_path, call, value)


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)
PICTURE = Image.new("RGB", (32, 32))
PROCESSING = [
    *(("size", PICTURE, {"size": value}) for value in (0, "x", {"foo": 1}, {"height": 8}, NAN)),
    *(("crop_size", PICTURE, {"crop_size": value}) for value in (0, {"height": 8}, "x")),
    ("size_divisor", PICTURE, {"size_divisor": 10**30}),
    *(("rescale_factor", PICTURE, {"rescale_factor": value}) for value in ("x", NAN)),
    *(("image_mean", PICTURE, {"image_mean": value}) for value in ("x", [NAN] * 3)),
    *(("image_std", PICTURE, {"image_std": value}) for value in ([0.0] * 3, [INF] * 3)),
    ("channels", PICTURE, {"image_mean": [0.5]}),
    ("std", PICTURE, {"image_std": [1.0] * 2}),
    ("resample", PICTURE, {"size": 8, "resample": 99}),
    ("do_resize", PICTURE, {"do_resize": "yes"}),
    ("TensorType", PICTURE, {"return_tensors": "xx"}),
    ("images", ENDLESS, {}),
    ("images", {"image": PICTURE}, {}),
    ("images", b"bytes", {}),
    ("image", Image.new("RGB", (0, 8)), {}),
    ("images", np.zeros((8, 8, 3), object), {}),
    ("images", np.zeros((8, 8, 3), "U1"), {}),
]


@pytest.mark.parametrize(
    ("named", "given", "options"), PROCESSING, ids=lambda value: str(value).partition(" at 0x")[0][:50]
)
def test_processing(named, given, options, tmp_path):
    refuse(named, tmp_path, HieraTokImageProcessorPil(size_divisor=8), given, **{"return_tensors": "pt", **options})
