"""Tests of `hieratok evaluate-generation`: figures of the images that it saves, two processes, bad input."""

import json
import re

import numpy as np
import pytest
import torch
from image_files import noise
from PIL import Image
from processes import two_processes
from scripts import error_of, load_script, tables_in, usage_error, with_defaults
from tiny_pipelines import tiny_pipeline
from transformers import ViTConfig, ViTForImageClassification

pytest.importorskip("datasets", reason="images are read through it")
pytest.importorskip("torchmetrics", reason="Fréchet distances are its own")

from hieratok_hf.evaluation.generation import ClassAccuracy, ImageClassifier
from hieratok_hf.evaluation.image_sets import FrechetDistance
from hieratok_hf.evaluation.vision_features import VisionFeatures

script = load_script("cli", "evaluate_generation")
pytestmark = pytest.mark.usefixtures("script_surroundings")

LABELS = ("background", "tench, Tinca tinca", "church, church building", "English springer", "French horn, horn")
SAMPLES, SIDE = 11, 8


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
    for i in range(12):
        Image.fromarray(noise(12, SIDE, seed=i)).save(folder / "images" / f"{i:02}.png")
    (folder / "images" / "07.png").write_bytes(b"no image")
    (folder / "empty").mkdir()
    np.savez(folder / "bad.npz", arr_0=np.zeros((2, 8, 8)))
    np.savez(folder / "statistics.npz", mu=np.zeros(2), sigma=np.eye(2))
    return folder


def arguments(space, *given):
    measured = {"--reference": "images", "--fid_model": "classifier", "--classifier": "classifier"}
    defaults = {option: space / name for option, name in measured.items()}
    defaults |= {"--model": space / "pipe", "--samples": SAMPLES, "--steps": 3, "--device": "cpu"}
    return with_defaults(list(given), defaults)


def run(space, *given):
    defaults = {"--model": space / "pipe", "--samples": 2, "--steps": 1, "--device": "cpu"}
    return script.main(with_defaults(list(given), defaults))


def load(paths):
    """Files as `(B, 3, H, W)` in [-1, 1]."""
    levels = np.stack([np.asarray(Image.open(path)) for path in paths])
    return torch.from_numpy(levels).permute(0, 3, 1, 2) / 127.5 - 1


def test_the_figures_are_those_of_the_saved_images(space, tmp_path, capsys):
    path = tmp_path / "new" / "figures.json"
    more = ["--save", tmp_path / "samples", "--json", path, "--guidance_scale", 2]
    assert script.main(arguments(space, *more)) == 0
    report, output = json.loads(path.read_text()), capsys.readouterr().out
    files = sorted((tmp_path / "samples").iterdir())
    assert [file.name for file in files] == [f"{i:06}_class{i % 3:04}.png" for i in range(SAMPLES)]
    samples = load(files)
    assert samples.shape == (SAMPLES, 3, SIDE, SIDE)

    whole = [file for file in sorted((space / "images").iterdir()) if file.name != "07.png"]
    frechet = FrechetDistance(VisionFeatures.from_pretrained(space / "classifier"))
    frechet.update(samples, load(whole)[:, :, 2:10])  # the middle of 8 x 12 pixels
    assert report["FD-ViT"] == pytest.approx(frechet.compute(), rel=1e-3) and report["FD-ViT"] > 0.1
    labels = [1, 3, 2]
    accuracy = ClassAccuracy(ImageClassifier.from_pretrained(space / "classifier"), labels)
    accuracy.update(samples, [i % 3 for i in range(SAMPLES)])
    assert accuracy.compute().items() <= report.items()
    assert report["images_per_class"] == [4, 4, 3]

    (figures,), per_class = tables_in(output)
    assert figures["FD-ViT"] == f"{report['FD-ViT']:.4f}"
    assert figures["class accuracy, %"] == f"{100 * report['class_accuracy']:.2f}"
    assert figures["top-1 accuracy, %"] == f"{100 * report['top1_accuracy']:.2f}"
    assert figures["images/s"] == f"{report['images_per_second']:.2f}" and report["images_per_second"] > 0
    assert [row["class"] for row in per_class] == ["tench", "English_springer", "church, church building"]
    shares = report["class_accuracy_per_class"]
    assert [row["class accuracy, %"] for row in per_class] == [f"{100 * share:.2f}" for share in shares]

    settings = report["settings"]
    expected = {"labels": "balanced", "samples": SAMPLES, "size": SIDE, "classifier_labels": labels, "fid_size": 16}
    expected |= {"guidance_scale": 2, "scheduler": "FlowMatchEulerDiscreteScheduler"}
    assert expected.items() <= settings.items()
    assert report["reference_images"] == 11
    (name,) = report["skipped"]
    assert name.endswith("07.png") and "skipped: 1" in output
    assert "note: FD-ViT is taken of images resized to 16 x 16 pixels" in output


def test_processes_and_batch_size_change_nothing(space, tmp_path):
    assert script.main(arguments(space, "--save", tmp_path / "one", "--json", tmp_path / "one.json")) == 0
    more = ["--batch_size", 3, "--save", tmp_path / "two", "--json", tmp_path / "two.json"]
    output, silent = two_processes(script, arguments(space, *more), tmp_path / "cache")
    assert "FD-ViT" in output and not silent
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["machine"]["processes"], two["machine"]["processes"]) == (1, 2)
    close = ("class_accuracy", "top1_accuracy", "FD-ViT", "IS-ViT")
    assert [two.pop(name) for name in close] == pytest.approx([one.pop(name) for name in close], rel=1e-3)
    for name in ("images_per_second", "machine", "settings", "protocol", "IS_std-ViT"):
        assert one.pop(name) and two.pop(name)
    assert one == two
    files = [sorted((tmp_path / name).iterdir()) for name in ("one", "two")]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    assert len(files[0]) == SAMPLES and (load(files[0]) - load(files[1])).abs().max() <= 1.01 / 127.5


def test_what_is_not_asked_for_is_left_out(space, tmp_path, capsys):
    assert run(space, "--json", tmp_path / "a.json") == 0
    ((figures,),) = tables_in(capsys.readouterr().out)
    report = json.loads((tmp_path / "a.json").read_text())
    assert list(figures) == ["images/s"] and report["notes"] == []
    assert report["protocol"]["seed"] == 0
    assert not {"class_accuracy", "gFID", "reference_images"} & set(report)


def test_classes_without_images_are_null_and_labels_may_be_given(space, tmp_path, capsys):
    given = ["--classifier", space / "classifier", "--classifier_labels", "4", "1-2", "--json", tmp_path / "a.json"]
    assert run(space, *given) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["settings"]["classifier_labels"] == [4, 1, 2]
    assert report["class_accuracy_per_class"][2] is None
    assert tables_in(capsys.readouterr().out)[1][2]["class accuracy, %"] == "nan"


def test_samples_go_into_a_file_and_are_evaluated_from_it(space, tmp_path, capsys):
    samples, statistics = tmp_path / "samples.npz", tmp_path / "statistics.npz"
    more = ["--suite", "--save", tmp_path / "folder", "--save_npz", samples, "--save_statistics", statistics]
    assert script.main(arguments(space, *more, "--json", tmp_path / "made.json")) == 0
    with np.load(samples, allow_pickle=False) as file:
        levels, labels = file["arr_0"], file["arr_1"]
    assert levels.dtype == np.uint8 and labels.tolist() == [i % 3 for i in range(SAMPLES)]
    files = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "folder").iterdir())]
    np.testing.assert_array_equal(levels, np.stack(files))

    figures = ("FD-ViT", "sFD-ViT", "IS-ViT", "IS_std-ViT", "precision-ViT", "recall-ViT")
    common = ["--suite", "--fid_model", space / "classifier", "--classifier", space / "classifier", "--device", "cpu"]
    made, found = json.loads((tmp_path / "made.json").read_text()), {}
    # A reference file of ADM has both.
    whole = [path for path in sorted((space / "images").iterdir()) if path.name != "07.png"]
    reference = np.stack([np.asarray(Image.open(path))[2:10] for path in whole])
    np.savez(tmp_path / "both.npz", **np.load(statistics), arr_0=reference)
    references = {"images": space / "images", "statistics": statistics, "both": tmp_path / "both.npz"}
    for name, reference in references.items():
        capsys.readouterr()
        given = ["--data", samples, "--reference", reference, "--json", tmp_path / f"{name}.json", *common]
        assert script.main(list(map(str, given))) == 0
        ((row,),) = tables_in(capsys.readouterr().out)
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
        assert row == {x: f"{made[x]:.4f}" for x in figures if x in found[name] and x != "IS_std-ViT"}
    assert {x: found["images"][x] for x in figures} == {x: made[x] for x in figures}
    assert {x: found["both"][x] for x in figures} == pytest.approx({x: made[x] for x in figures}, rel=1e-9)
    assert found["both"]["reference_images"] == 11 and "reference_images" not in found["statistics"]
    left = {x: found["statistics"][x] for x in figures if x in found["statistics"]}
    assert left == pytest.approx({x: made[x] for x in figures[:4]}, rel=1e-9)
    assert any("precision and recall were left out" in note for note in found["statistics"]["notes"])
    assert found["images"]["settings"]["seed"] is None and "class_accuracy" not in found["images"]


def test_a_protocol_gives_the_same_figures_again(space, tmp_path, capsys):
    given = ["--suite", "--guidance_scale", 2.7, "--guidance_eta", 0.3, "--guidance_interval", 0.1, 0.83]
    given += ["--seed", 5, "--batch_size", 4]
    assert script.main(arguments(space, *given, "--json", tmp_path / "a.json")) == 0
    protocol = json.loads((tmp_path / "a.json").read_text())["protocol"]
    guidance = {"guidance_scale": 2.7, "guidance_eta": 0.3, "guidance_interval": [0.1, 0.83]}
    assert protocol["guidance"] == guidance and protocol["seed"] == 5
    assert protocol["sampler"]["class"] == "FlowMatchEulerDiscreteScheduler" and protocol["sampler"]["steps"] == 3
    assert protocol["data"]["reference"]["split"] == "train" and protocol["images"] == SAMPLES
    assert protocol["weights"].keys() == {"transformer", "vae", "frechet", "classifier"}
    again = ["--protocol", str(tmp_path / "a.json"), "--json", str(tmp_path / "b.json")]
    assert script.main(again) == 0
    assert "note: all figures are those of --protocol, to the last digit" in capsys.readouterr().out
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    for name in ("images_per_second", "settings", "notes"):
        assert one.pop(name) and two.pop(name)
    assert one == two

    assert script.main([*again, "--overwrite", "--seed", "6"]) == 0
    output = capsys.readouterr().out
    assert "note: protocol.seed was 5 in --protocol, is 6" in output
    assert re.search(r"note: FD-ViT was [0-9.]+ in --protocol, is [0-9.]+", output)


BAD = {
    "no images": (["--reference", "{space}/bad.npz"], "--reference .*must hold images as `arr_0`"),
    "statistics of another": (
        ["--reference", "{space}/statistics.npz"],
        "--reference .*must be of 4 pooled features, got 2",
    ),
    "too few for neighbours": (
        ["--suite", "--samples", "3"],
        "--samples and --reference: .* more than 3 images in each set, got 3",
    ),
    "no pipeline": (["--model", "{space}/empty"], "--model .* cannot be loaded: .*model_index.json"),
    "no reference": (["--reference", "missing/folder"], "--reference .* cannot be loaded: No images found in "),
    "one sample": (["--samples", "1"], "--samples and --reference: A Fréchet .* got 1"),
    "no such size": (["--fid_size", "2"], "--fid_model .*ViT takes no images of 2 x 2 pixels"),
    "a classifier of others": (["--classifier", "{space}/nameless"], "--classifier .*; --classifier_labels"),
    "too few labels": (["--classifier_labels", "1", "2"], "the pipeline has 3 classes, not 2"),
    "no guidance": (["--guidance_scale", "0"], "`guidance_scale` must be .* at least 1"),
    "a folder that is not empty": (["--save", "{space}/images"], "--save .* must be a new or empty folder"),
    "a file for a folder": (["--json", "{space}/images/00.png/x.json"], "--json .* cannot be written: "),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_no_file(given, message, space, capsys, tmp_path):
    given = with_defaults([text.format(space=space) for text in given], {"--json": tmp_path / "figures.json"})
    assert script.main(arguments(space, *given)) == 2
    assert re.match(f"error: .*{message}", error_of(capsys))
    assert not list(tmp_path.iterdir())


def test_bad_arguments_are_refused_by_the_command_line(space, tmp_path, capsys):
    (tmp_path / "other.json").write_text(json.dumps({"protocol": {"command": "hieratok evaluate", "options": {}}}))
    for argv, message in (
        (["--suite"], "--suite needs --reference"),
        (["--streaming"], "--streaming needs --data or --reference"),
        (["--split", "test"], "--split needs --data"),
        (["--data", "x", "--seed", "3"], "--data and --seed contradict"),
        (["--data", "x", "--save_npz", "a.npz"], "--data and --save_npz contradict"),
        (["--save_npz", "a.npy"], "--save_npz must be an .npz file"),
        (["--protocol", "missing.json"], "--protocol must be a report by --json of `hieratok evaluate-generation`"),
        (["--protocol", str(tmp_path / "other.json")], "--protocol must be a report"),
    ):
        assert message in usage_error(capsys, script.main, *argv)
