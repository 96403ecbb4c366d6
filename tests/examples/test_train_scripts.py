"""Tests of the scripts that train a denoiser in `examples/`: each learns, and leaves a sheet and what loads again."""

import pytest
import torch
from diffusers import PixArtSigmaPipeline
from PIL import Image
from scripts import ROOT, load_script
from stand_in_text import save_text_encoder
from tiny_pipelines import make_pipeline

from hieratok_hf import HieraTokDiTPipeline
from hieratok_hf.data.image_dataset import load_images

pytestmark = pytest.mark.usefixtures("script_surroundings")
CLOTHING = ROOT / "examples" / "clothing"


@pytest.fixture
def recipe(tmp_path, capsys):
    """Runs a script at a small size, and gives the folder that it leaves, once the loss has fallen and it is named."""

    def run(name, *given, columns, rows=2, size=16):
        output = tmp_path / "out"
        options = ["--output", output, "--batch_size", 8, "--lr", 5e-3, "--seed", 1, *given]
        losses = load_script("examples", name).main([str(word) for word in options])
        assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
        assert Image.open(output / "samples.png").size == (columns * size, rows * size)
        assert repr(str(output)) in capsys.readouterr().out
        assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 120
        return output

    return run


def test_a_dit_by_classes(recipe):
    small = ["--vae", "hieratok-tiny", "--data", CLOTHING, "--image_size", 16, "--layers", 1, "--heads", 1]
    folder = recipe("train_class_dit", *small, "--steps", 40, columns=10)
    pipe = HieraTokDiTPipeline.from_pretrained(folder)
    assert list(pipe.labels)[:2] == ["dress", "hat"] == load_images([str(CLOTHING)]).class_names[:2]
    assert pipe("hat", num_inference_steps=2).images[0].size == (16, 16)


@pytest.mark.parametrize("name", ["train_class_dit", "train_text_pixart", "train_lora"])
def test_images_without_classes_are_refused(name, tmp_path):
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (24, 16)).save(tmp_path / "flat" / "0.png")
    encoder = ["--text_encoder", save_text_encoder(tmp_path / "t5", ["a"])] if name == "train_text_pixart" else []
    given = ["--data", tmp_path / "flat", "--output", tmp_path / "out", *encoder]
    with pytest.raises(SystemExit, match=r"--data must have .*a folder for each class"):
        load_script("examples", name).main(list(map(str, given)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("described", [False, True], ids=["folders", "metadata.jsonl"])
def test_a_pixart_by_text(recipe, tmp_path, described):
    data, columns = CLOTHING / "train", 10
    captions = [f"a photo of a {path.name}" for path in sorted(data.iterdir())]
    if described:
        data, captions, columns = tmp_path / "data", ["a red hat", "two shoes"], 2
        data.mkdir()
        for number, colour in enumerate(("red", "blue")):
            Image.new("RGB", (24, 16), colour).save(data / f"{number}.png")
        lines = [f'{{"file_name": "{i}.png", "text": "{caption}"}}\n' for i, caption in enumerate(captions)]
        (data / "metadata.jsonl").write_text("".join(lines))
    encoder = save_text_encoder(tmp_path / "t5", captions)
    small = ["--vae", "hieratok-tiny", "--data", data, "--text_encoder", encoder, "--image_size", 16, "--lr", 0.01]
    folder = recipe("train_text_pixart", *small, "--layers", 1, "--heads", 1, "--steps", 100, columns=columns)
    pipe = PixArtSigmaPipeline.from_pretrained(folder)
    call = {"use_resolution_binning": False, "num_inference_steps": 2, "max_sequence_length": 16, "output_type": "pt"}
    images = [pipe(caption, generator=torch.manual_seed(0), **call).images for caption in captions[:2]]
    assert images[0].shape == (1, 3, 16, 16) and not torch.equal(*images)


def test_an_adapter_for_a_generator(recipe, tmp_path, capsys):
    pytest.importorskip("peft", reason="adapters are peft's")
    make_pipeline().save_pretrained(tmp_path / "generator")
    given = ["--generator", tmp_path / "generator", "--rank", 2]
    data = tmp_path / "data"
    for number, name in enumerate(("black", "white")):
        (data / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), name).save(data / name / f"{number}.png")
    folder = recipe("train_lora", *given, "--data", data, "--steps", 100, "--lr", 0.05, columns=2, rows=3, size=8)
    pipe = HieraTokDiTPipeline.from_pretrained(tmp_path / "generator")
    pipe.load_lora_weights(folder)
    assert {path.name for path in folder.iterdir()} == {"pytorch_lora_weights.safetensors", "samples.png"}
    with pytest.raises(SystemExit, match="--data has 10 classes"):
        load_script("examples", "train_lora").main(["--data", str(CLOTHING), *map(str, given)])
