"""Tests of `examples/evaluate_generation.py`: figures against computations by hand, two processes, bad input."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import images
from huggingface_hub import constants
from PIL import Image
from scripts import two_processes
from tiny_pipelines import tiny_pipeline
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

pytest.importorskip("datasets", reason="images are read through it")
pytest.importorskip("torchmetrics", reason="Fréchet distances are its own")

import datasets

from hieratok_hf.evaluation.generation import ImageClassifier
from hieratok_hf.evaluation.vision_features import VisionFeatures

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "evaluate_generation.py"
SPEC = importlib.util.spec_from_file_location("evaluate_generation", SCRIPT)
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)

LABELS = ("background", "tench, Tinca tinca", "church, church building", "English springer", "French horn, horn")
SAMPLES, SIDE = 26, 8


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A folder with a pipeline, a classifier, whose features serve too, and images, one of them broken."""
    folder = tmp_path_factory.mktemp("generation")
    tiny_pipeline(folder / "pipe")
    torch.manual_seed(3)
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    sizes |= {"image_size": 16, "patch_size": 4, "initializer_range": 1.0}
    names = {"id2label": dict(enumerate(LABELS))}
    ViTForImageClassification(ViTConfig(**sizes, **names)).save_pretrained(folder / "classifier")
    ViTForImageClassification(ViTConfig(**sizes, num_labels=2)).save_pretrained(folder / "nameless")
    (folder / "images").mkdir()
    levels = ((images(20, 12, SIDE, 3) + 1) * 127.5).round().byte().numpy()
    for i, image in enumerate(levels):
        Image.fromarray(image).save(folder / "images" / f"{i:02}.png")
    (folder / "images" / "07.png").write_bytes(b"no image")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def run(space, monkeypatch, capsys):
    """Call `main`; gives the exit status, what it printed, and its errors."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the variable is read once, at import
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", space / "cache")

    def call(*argv, samples=SAMPLES):
        more = ["--model", space / "pipe", "--samples", samples, "--steps", 3, "--device", "cpu"]
        status = script.main([*map(str, more), *map(str, argv)])
        return status, *capsys.readouterr()

    return call


def options(space):
    measured = {"reference": "images", "fid_model": "classifier", "classifier": "classifier"}
    return [str(x) for option, name in measured.items() for x in (f"--{option}", space / name)]


def loaded(paths):
    """Files as `(B, 3, H, W)` in [-1, 1]."""
    levels = np.stack([np.asarray(Image.open(path)) for path in paths])
    return torch.from_numpy(levels).permute(0, 3, 1, 2) / 127.5 - 1


def rows_of(output):
    """The tables, as lists of dictionaries."""
    blocks = [block.splitlines() for block in output.split("\n\n")]
    blocks[0] = blocks[0][1:]
    split = [[re.split(r"\s{2,}", line.strip()) for line in x if not line.startswith("note: ")] for x in blocks]
    return [[dict(zip(header, row, strict=True)) for row in rows] for header, *rows in split]


def test_the_figures_are_those_of_the_saved_images(run, space, tmp_path):
    linalg = pytest.importorskip("scipy.linalg", reason="its matrix root is the independent computation")
    path = tmp_path / "new" / "figures.json"
    status, output, _ = run(*options(space), "--save", tmp_path / "samples", "--json", path, "--guidance_scale", 2)
    assert status == 0
    report = json.loads(path.read_text())
    assert list(path.parent.iterdir()) == [path]
    files = sorted((tmp_path / "samples").iterdir())
    assert [file.name for file in files] == [f"{i:06}_class{i % 3:04}.png" for i in range(SAMPLES)]
    samples = loaded(files)
    assert samples.shape == (SAMPLES, 3, SIDE, SIDE)

    whole = [file for file in sorted((space / "images").iterdir()) if file.name != "07.png"]
    middle = loaded(whole)[:, :, 2:10]  # of 8 x 12 pixels
    features = VisionFeatures.from_pretrained(space / "classifier")
    with torch.no_grad():
        sets = [features(x, 16)[0].double().numpy() for x in (samples, middle)]
    means, covariances = [x.mean(0) for x in sets], [np.cov(x, rowvar=False) for x in sets]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    distance = ((means[0] - means[1]) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    assert report["FD-ViT"] == pytest.approx(distance, rel=1e-3) and distance > 0.1

    model, labels = AutoModelForImageClassification.from_pretrained(space / "classifier"), [1, 3, 2]
    resized = torch.nn.functional.interpolate(samples, (16, 16), mode="bicubic", antialias=True).clamp(-1, 1)
    with torch.no_grad():
        logits = model(resized).logits
    classes = torch.arange(SAMPLES) % 3
    among = logits[:, labels].argmax(1) == classes
    first = logits.argmax(1) == torch.tensor(labels)[classes]
    assert report["class_accuracy"] == pytest.approx(among.double().mean())
    assert report["top1_accuracy"] == pytest.approx(first.double().mean())
    assert report["class_accuracy_per_class"] == pytest.approx([among[i::3].double().mean().item() for i in range(3)])
    assert report["top1_accuracy_per_class"] == pytest.approx([first[i::3].double().mean().item() for i in range(3)])
    assert report["images_per_class"] == [9, 9, 8]

    (figures,), per_class = rows_of(output)
    assert figures["FD-ViT"] == f"{report['FD-ViT']:.4f}"
    assert figures["class accuracy, %"] == f"{100 * report['class_accuracy']:.2f}"
    assert figures["top-1 accuracy, %"] == f"{100 * report['top1_accuracy']:.2f}"
    assert figures["images/s"] == f"{report['images_per_second']:.2f}" and report["images_per_second"] > 0
    assert [row["class"] for row in per_class] == ["tench", "English_springer", "church, church building"]
    shares = report["class_accuracy_per_class"]
    assert [row["class accuracy, %"] for row in per_class] == [f"{100 * share:.2f}" for share in shares]
    assert [row["images"] for row in per_class] == ["9", "9", "8"]

    settings = report["settings"]
    assert settings["labels"] == "balanced" and settings["samples"] == SAMPLES and settings["size"] == SIDE
    assert settings["classifier_labels"] == labels and settings["fid_size"] == 16
    assert settings["guidance_scale"] == 2 and settings["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert report["machine"]["torch"] == torch.__version__ and report["machine"]["processes"] == 1
    assert report["reference_images"] == 19
    (name,) = report["skipped"]
    assert name.endswith("07.png") and "skipped: 1" in output
    assert "note: FD-ViT is taken of images resized to 16 x 16 pixels" in output


def test_processes_and_batch_size_change_nothing(run, space, tmp_path):
    assert run(*options(space), "--save", tmp_path / "one", "--json", tmp_path / "one.json")[0] == 0
    more = ["--model", space / "pipe", "--samples", SAMPLES, "--steps", 3, "--device", "cpu", "--batch_size", 3]
    more += ["--save", tmp_path / "two", "--json", tmp_path / "two.json"]
    output, silent = two_processes(SCRIPT, [*options(space), *more], space / "cache")
    assert "FD-ViT" in output and not silent
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["machine"]["processes"], two["machine"]["processes"]) == (1, 2)
    assert list(one) == list(two)
    for name, value in one.items():
        if name in ("class_accuracy", "top1_accuracy", "FD-ViT"):
            assert two[name] == pytest.approx(value, rel=1e-3), name
        elif name not in ("images_per_second", "machine", "settings"):
            assert two[name] == value, name
    files = [sorted((tmp_path / name).iterdir()) for name in ("one", "two")]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    assert len(files[0]) == SAMPLES and (loaded(files[0]) - loaded(files[1])).abs().max() <= 1.01 / 127.5


def test_what_is_not_asked_for_is_left_out(run, tmp_path):
    status, output, _ = run("--json", tmp_path / "a.json", samples=2)
    ((figures,),) = rows_of(output)
    assert status == 0 and list(figures) == ["images/s"]
    report = json.loads((tmp_path / "a.json").read_text())
    assert not {"class_accuracy", "gFID", "reference_images"} & set(report) and report["notes"] == []


def test_classes_without_images_are_null_and_labels_may_be_given(run, space, tmp_path):
    labels = ["--classifier_labels", "4", "1-2"]
    status, output, _ = run("--classifier", space / "classifier", *labels, "--json", tmp_path / "a.json", samples=2)
    report = json.loads((tmp_path / "a.json").read_text())
    assert status == 0 and report["settings"]["classifier_labels"] == [4, 1, 2]
    assert report["class_accuracy_per_class"][2] is None and rows_of(output)[1][2]["class accuracy, %"] == "nan"


def test_saved_images_are_those_of_a_classifier_with_8_bits(run, space, tmp_path):
    assert run("--save", tmp_path / "x", samples=4)[0] == 0
    classifier = ImageClassifier.from_pretrained(space / "classifier")
    assert classifier(loaded(sorted((tmp_path / "x").iterdir()))).shape == (4, len(LABELS))


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity would be used")
def test_an_fid_that_cannot_be_measured_becomes_a_note(run, space):
    status, output, _ = run("--reference", space / "images", samples=2)
    assert status == 0 and list(rows_of(output)[0][0]) == ["images/s"]
    assert re.search(r"note: gFID was left out: it needs torch-fidelity .*; --fid_model takes another", output)


BAD = {
    "a missing pipeline": (["--model", "missing/model"], "--model 'missing/model' cannot be loaded: "),
    "no pipeline": (["--model", "{space}/empty"], "--model .* cannot be loaded: .*model_index.json"),
    "no reference": (["--reference", "missing/data/folder"], "--reference: No images found in 'missing/data"),
    "one sample": (["--samples", "1"], "a Fréchet distance needs two samples and two images"),
    "no vision model": (["--fid_model", "{space}/empty"], "--fid_model .* cannot be loaded: "),
    "no such size": (["--fid_size", "2"], "--fid_model .*ViT takes no images of 2 x 2 pixels"),
    "no classifier": (["--classifier", "{space}/empty"], "--classifier .* cannot be loaded: "),
    "a classifier of others": (
        ["--classifier", "{space}/nameless"],
        "--classifier .*no labels of the names tench, English_springer, church, church building; --classifier_labels",
    ),
    "too few labels": (["--classifier_labels", "1", "2"], "the pipeline has 3 classes, not 2"),
    "labels that are not there": (["--classifier_labels", "3-5"], "different numbers from 0 to 4, got 3, 4, 5"),
    "no guidance": (["--guidance_scale", "0"], "`guidance_scale` must be at least 1"),
    "a folder that is not empty": (["--save", "{space}/images"], "--save .* cannot be written: it is not empty"),
    "a file for a folder": (["--json", "{space}/images/00.png/x.json"], "--json .* cannot be written: "),
    "a folder for a file": (["--json", "{space}/empty"], "--json .* cannot be written: .*it is a folder"),
    "no device": (["--device", "cuda:99"], "--model .* cannot be loaded: "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_no_file(case, space, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", space / "cache")
    argv, message = BAD[case]
    given = [text.format(space=space) for text in argv]
    defaults = dict(zip(options(space)[::2], options(space)[1::2]))
    defaults |= {"--model": str(space / "pipe"), "--json": str(tmp_path / "figures.json"), "--samples": "4"}
    defaults |= {"--steps": "1", "--device": "cpu"}
    more = [x for pair in defaults.items() if pair[0] not in given for x in pair]
    assert script.main([*given, *more]) == 2
    error = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert re.match(f"error: .*{message}", error), error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--samples", "0"], "--samples: invalid positive value: '0'"),
        (["--device", "abacus"], "--device: must be a device of torch, such as cuda or cpu, got 'abacus'"),
        (["--fid_size", "64"], "--fid_size needs --fid_model"),
        (["--fid_model", "x"], "--fid_model needs --reference"),
        (["--classifier_labels", "1"], "--classifier_labels needs --classifier"),
        (["--classifier", "x", "--classifier_labels", "a"], "invalid numbers value: 'a'"),
    ],
)
def test_bad_arguments_are_refused_by_the_command_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
