"""The weights in the package: both libraries load them, they are small and normalised, and they reconstruct."""

import io
import tarfile
import time
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import torch
from PIL import Image
from transformers import AutoModel

import hieratok_hf
from hieratok_hf import (
    AutoencoderHieraTok,
    HieraTokConfig,
    HieraTokDiTPipeline,
    HieraTokImageProcessor,
    HieraTokImageProcessorPil,
    HieraTokModel,
    open_image,
    shipped,
)
from hieratok_hf.evaluation.generation import ClassAccuracy, GeneratedBatches, ImageClassifier, find_classes
from hieratok_hf.evaluation.metrics import psnr
from hieratok_hf.models.losses import image_pyramid
from hieratok_hf.shipped import resolve_model

ROOT = Path(__file__).parents[1]
IMAGES = sorted((ROOT / "src" / "hieratok_hf" / "example_images").glob("*.webp"))
CLASSIFIER = ROOT.parent / "shared" / "data" / "mobilenet_v2_1.0_224"
KODAK = ROOT.parent / "shared" / "data" / "kodak"
IMAGENETTE = ROOT.parent / "shared" / "data" / "imagenette_128" / "val-0000.tar"


# Name: least PSNR of the bundled photographs, and of three Kodak images, where principal components of as many
# numbers have 25.9 and 22.6 dB.
TOKENIZERS = {"hieratok-tiny": (28, 27), "hieratok-tiny-16x": (24, 23.5)}


@pytest.fixture(scope="module", params=TOKENIZERS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def vae(name):
    return AutoencoderHieraTok.from_pretrained(hieratok_hf.pretrained(name))


def load(path, name, size=None):
    processor = HieraTokImageProcessorPil.from_pretrained(hieratok_hf.pretrained(name))
    crop = {"do_center_crop": True, "crop_size": {"height": size, "width": size}} if size else {}
    return processor(open_image(path), return_tensors="pt", **crop).pixel_values


def test_both_libraries_load_the_shipped_weights(name, vae):
    model = AutoModel.from_pretrained(hieratok_hf.pretrained(name))
    assert type(model) is HieraTokModel
    assert model.config.model_fields == HieraTokConfig.from_size(name).model_fields
    torch.testing.assert_close(model.state_dict(), vae.state_dict(), rtol=0, atol=0)


def test_the_files_are_small():
    for name in hieratok_hf.SHIPPED:
        files = [path for path in Path(hieratok_hf.pretrained(name)).rglob("*") if path.is_file()]
        # That of a pipeline brings the tokenizer along.
        assert sum(path.stat().st_size for path in files if "vae" not in path.parts) < 16e6


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
@torch.no_grad()
def test_bundled_photographs_come_back(path, name, vae):
    pixel_values = load(path, name)
    images = vae.core.decode_scales(vae.encode(pixel_values).latent_dist.mode())
    assert psnr(images[-1], pixel_values).item() > TOKENIZERS[name][0]
    targets = image_pyramid(pixel_values, vae.core.config)
    for image, target in zip(images, targets, strict=True):
        assert (image.mean((2, 3)) - target.mean((2, 3))).abs().max() < 0.05  # no shift of colour
        assert psnr(image, target).item() > 18


@torch.no_grad()
def test_no_seams_between_patches(name, vae):
    pixel_values = load(IMAGES[0], name)
    error = vae(pixel_values).sample - pixel_values
    steps = (error[..., 1:] - error[..., :-1]).abs().mean((0, 1, 2))
    across = steps[vae.spatial_compression_ratio - 1 :: vae.spatial_compression_ratio].mean()
    assert across < 1.25 * steps.mean()


@pytest.mark.skipif(not IMAGENETTE.exists(), reason="needs ../shared/data/imagenette_128")
@torch.no_grad()
def test_latents_arrive_normalised(name, vae):
    with tarfile.open(IMAGENETTE) as shard:
        members = [member for member in shard if member.name.endswith(".webp")][:64]
        processor = HieraTokImageProcessorPil.from_pretrained(hieratok_hf.pretrained(name))
        images = [Image.open(io.BytesIO(shard.extractfile(member).read())) for member in members]
    latents = vae.encode(processor(images, return_tensors="pt").pixel_values).latent_dist.mode()
    assert vae.config.scaling_factor == 1.0 and vae.config.shift_factor == 0.0
    assert latents.mean((0, 2, 3)).abs().max() < 0.25
    assert ((latents.std((0, 2, 3)) > 0.7) & (latents.std((0, 2, 3)) < 1.4)).all()


@pytest.mark.skipif(not KODAK.exists(), reason="needs ../shared/data/kodak")
@torch.no_grad()
def test_kodak_beats_principal_components(name, vae):
    names = ("kodim05", "kodim14", "kodim23")
    values = [psnr(vae(x).sample, x).item() for x in (load(KODAK / f"{file}.png", name, size=512) for file in names)]
    assert sum(values) / len(values) > TOKENIZERS[name][1]


LOADERS = {
    "hieratok-tiny": (
        HieraTokConfig,
        HieraTokModel,
        AutoencoderHieraTok,
        HieraTokImageProcessorPil,
        HieraTokImageProcessor,
    ),
    "hieratok-dit-tiny": (HieraTokDiTPipeline,),
}
CASES = [(loader, name) for name, loaders in LOADERS.items() for loader in loaders]
by_class = pytest.mark.parametrize(("loader", "name"), CASES, ids=[loader.__name__ for loader, _ in CASES])


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """Work in an empty folder, in offline mode or not, where a request to the Hub is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("a name that ships was looked for on the Hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(httpx.Client, "send", refuse)
    return tmp_path


@by_class
@pytest.mark.parametrize(("kind", "is_offline"), [(str, True), (Path, False)], ids=["offline", "online"])
def test_names_that_ship_load_without_a_network(loader, name, kind, is_offline, empty_folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", is_offline)
    start = time.perf_counter()
    loaded = loader.from_pretrained(kind(name), revision="main")
    assert time.perf_counter() - start < 10  # retries of a request take longer
    again = loader.from_pretrained(hieratok_hf.pretrained(name))
    for part in ("vae", "transformer") if loader is HieraTokDiTPipeline else [None]:
        model, other = (getattr(x, part) if part else x for x in (loaded, again))
        if isinstance(model, torch.nn.Module):
            torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)
        else:
            assert type(model) is type(other) and model.to_dict() == other.to_dict()


@by_class
def test_what_was_loaded_by_name_saves_and_a_folder_of_that_name_comes_first(loader, name, empty_folder):
    loaded = loader.from_pretrained(name)
    is_model = loader in (HieraTokModel, AutoencoderHieraTok)
    if is_model:
        with torch.no_grad():
            loaded.core.encoder.head.bias.fill_(3.0)
    elif loader is HieraTokDiTPipeline:
        loaded.register_to_config(id2label={0: "a cat"})
    elif loader is HieraTokConfig:
        loaded.kl_weight = 32.0
    else:
        loaded.size_divisor = 32
    before = {path: path.read_bytes() for path in Path(hieratok_hf.pretrained(name)).rglob("*.json")}
    loaded.save_pretrained(name)
    own = loader.from_pretrained(name)
    if is_model:
        assert (own.core.encoder.head.bias == 3).all()
    elif loader is HieraTokDiTPipeline:
        assert own.id2label == {0: "a cat"}
    elif loader is HieraTokConfig:
        assert own.kl_weight == 32
    else:
        assert own.size_divisor == 32
    assert before == {path: path.read_bytes() for path in before}


def test_the_tokenizer_of_a_pipeline_that_ships_loads_by_subfolder(empty_folder):
    for loader in (HieraTokModel, AutoencoderHieraTok):
        model = loader.from_pretrained("hieratok-dit-tiny", subfolder="vae")
        assert model.config.latent_channels == 16
        with pytest.raises(OSError, match="subfolder='vae'"):
            loader.from_pretrained("hieratok-dit-tiny")


@by_class
@pytest.mark.parametrize("size", ["hieratok-s", "hieratok-b", "hieratok-l"])
def test_sizes_without_weights_say_how_to_make_some(loader, name, size, empty_folder):
    with pytest.raises(ValueError, match=rf"'{size}'.*`hieratok convert detok hieratok-b`.*`hieratok train --model"):
        loader.from_pretrained(size)


def test_all_else_stays(empty_folder):
    assert resolve_model("hieratok-tiny") == hieratok_hf.pretrained("hieratok-tiny")
    for other in ("somebody/hieratok-b", "./hieratok-tiny", "", None, 3, Path("elsewhere")):
        assert resolve_model(other) is other
    for name in ("hieratok-b", "hieratok-tinny"):
        (empty_folder / name).mkdir()
        assert resolve_model(name) == name


def test_a_misspelt_name_is_answered_with_the_nearest(empty_folder):
    for name, near in (("hieratok_tiny", "hieratok-tiny"), ("hieratok-dit-tinny", "hieratok-dit-tiny")):
        with pytest.raises(ValueError, match=f"'{name}'.* '{near}'"):
            resolve_model(name)


def test_an_installation_without_its_weights_says_so(empty_folder, monkeypatch):
    monkeypatch.setattr(shipped, "_SHIPPED_WEIGHTS", empty_folder)
    with pytest.raises(FileNotFoundError, match="hieratok-tiny"):
        HieraTokModel.from_pretrained("hieratok-tiny")


def test_the_shipped_pipeline_has_the_shipped_tokenizer():
    vae = AutoencoderHieraTok.from_pretrained(hieratok_hf.pretrained("hieratok-tiny-16x"))
    pipe = HieraTokDiTPipeline.from_pretrained(hieratok_hf.pretrained("hieratok-dit-tiny"))
    torch.testing.assert_close(pipe.vae.state_dict(), vae.state_dict(), rtol=0, atol=0)
    assert pipe.num_classes == 10 and len(pipe.labels) == 10


@pytest.mark.skipif(not CLASSIFIER.exists(), reason="needs ../shared/data/mobilenet_v2_1.0_224")
def test_a_classifier_knows_what_the_shipped_pipeline_makes():
    pipe = HieraTokDiTPipeline.from_pretrained(hieratok_hf.pretrained("hieratok-dit-tiny"))
    pipe.set_progress_bar_config(disable=True)
    classifier = ImageClassifier.from_pretrained(CLASSIFIER)
    accuracy = ClassAccuracy(classifier, find_classes(pipe.config.id2label, 10, classifier.names))
    samples = GeneratedBatches(pipe, range(40), batch_size=20, num_inference_steps=12, guidance_scale=8.0)
    for batch in samples:
        accuracy.update(batch["pixel_values"], batch["labels"])
    assert accuracy.compute()["class_accuracy"] > 0.6  # chance is 0.1


def test_example_images_have_names():
    assert [Path(hieratok_hf.example_image(path.stem)) for path in IMAGES] == IMAGES
    with pytest.raises(ValueError, match="`name` must be one of"):
        hieratok_hf.example_image("../weights")
