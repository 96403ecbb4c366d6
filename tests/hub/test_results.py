"""Reports of evaluations as figures of a model card: every value, its command and machine, and what is refused."""

import json
import shlex

import pytest
from helpers import recorded

from hieratok_hf.cli.main import parse
from hieratok_hf.hub.results import TASKS, line, report_results

TINY = {"parameters": 1482399, "channels": 16}
CLASSES = ("tench", "English springer", "cassette player", "chain saw", "church")
CLASSES += ("French horn", "garbage truck", "gas pump", "golf ball", "parachute")
DIT = {"names": {str(label): name for label, name in enumerate(CLASSES)}}


@pytest.mark.parametrize(("name", "place"), [(None, 0), ("runs/clothing", 1)])
def test_the_figures_of_a_tokenizer_are_those_of_its_model(name, place):
    report = recorded("fine_tune")
    model = report["models"][place] | {"lpips": 0.25, "probe_accuracy": 0.125, "rFID": 3, "perceptual": None}
    report["models"][place] = model
    figures, classes = report_results(report, "tokenizer", TINY, name)
    assert classes == []
    assert {(figure.metric_type, figure.metric_name, figure.metric_value) for figure in figures} == {
        ("psnr", "PSNR, dB", round(model["psnr"], 4)),
        ("ssim", "SSIM", round(model["ssim"], 4)),
        ("lpips", "LPIPS", 0.25),
        ("accuracy", "accuracy of a linear probe", 0.125),
        ("fid", "rFID of images resized to 128x128", 3.0),
        ("frechet_distance", "FD-MobileNetV2 of images resized to 128x128", round(model["FD-MobileNetV2"], 4)),
    }
    for figure in figures:
        assert figure.task_type == TASKS["tokenizer"]
        assert figure.dataset_name == figure.dataset_type == "clothing_256/test-0000.tar"
        assert figure.dataset_config == "372 images at 256x256"
        assert figure.metric_args["machine"] == "AMD EPYC, device cpu, torch 2.13.0+cpu, threads 1, processes 1"


def test_the_figures_of_a_generator_are_those_recorded():
    report = recorded("hieratok-dit-tiny")
    figures, classes = report_results(report, "pipeline", DIT)
    judge = "accuracy of mobilenet_v2_1.0_224 among"
    found = {figure.metric_name: figure.metric_value for figure in figures}
    right = {f"{judge} the classes of the model": 0.851, f"{judge} all its labels": 0.188}
    assert found == {**right, "IS-MobileNetV2": round(report["IS-MobileNetV2"], 4)}
    assert {figure.dataset_config for figure in figures} == {
        "1000 samples at 128x128, 25 steps, guidance 8 with eta 0.5, float32"
    }
    assert {figure.dataset_type for figure in figures} == {"generated"}
    assert all(" --seed 0 --batch_size 50 " in figure.metric_args["command"] for figure in figures)
    shares = zip(report["class_accuracy_per_class"], report["top1_accuracy_per_class"])
    assert classes == [(name, 100, among, first) for name, (among, first) in zip(CLASSES, shares)]


def test_a_distance_of_a_generator_is_to_its_reference_images():
    report = recorded("hieratok-dit-tiny")
    report["settings"] |= {"reference": ["/data/imagenette_128/val-0000.tar"], "fid_size": 64, "fid_model": "some/net"}
    report |= {"FD-Net": 12.34567, "reference_images": 3925, "skipped": {}}
    figures, _ = report_results(report, "pipeline", DIT)
    (distance,) = (figure for figure in figures if figure.metric_type == "frechet_distance")
    assert (distance.metric_name, distance.metric_value) == ("FD-Net of images resized to 64x64", 12.3457)
    assert distance.dataset_name == "imagenette_128/val-0000.tar"
    assert {figure.dataset_type for figure in figures} == {"generated", "imagenette_128/val-0000.tar"}


SUITE = {"rFID": 1.5, "sFID": 2.5, "IS": 3.5, "IS_std": 0.5, "precision": 0.5, "recall": 0.25, "gFID": 4.5}
SUITE |= {"FD-Net": 6.5, "sFD-Net": 7.5, "IS-Net": 8.5, "precision-Net": 0.75, "recall-Net": 0.125, "strange": 1.0}
TYPES = {"rFID": "fid", "gFID": "fid", "sFID": "sfid", "IS": "inception_score", "IS-Net": "inception_score"}
TYPES |= {"precision": "precision", "precision-Net": "precision", "recall": "recall", "recall-Net": "recall"}
TYPES |= {"FD-Net": "frechet_distance", "sFD-Net": "frechet_distance"}


@pytest.mark.parametrize("kind", TASKS)
def test_the_figures_of_a_suite_are_told_with_what_they_compare(kind):
    report, known = (recorded("trade_off"), TINY) if kind == "tokenizer" else (recorded("hieratok-dit-tiny"), DIT)
    (report["models"][0] if kind == "tokenizer" else report).update(SUITE)
    report["settings"] |= {"reference": ["/data/mine/val-0000.tar"], "fid_size": 64}
    figures, _ = report_results(report, kind, known)
    found = {figure.metric_name.split()[0]: figure for figure in figures if figure.metric_name[0] != "P"}
    assert {key: figure.metric_type for key, figure in found.items() if key in SUITE} == TYPES
    for key in TYPES:
        scored = "kodak" if kind == "tokenizer" else "its own images, each class as often"
        assert found[key].metric_value == SUITE[key]
        assert found[key].dataset_name == (scored if "IS" in key else "mine/val-0000.tar")
        assert found[key].metric_name == key if "IS" in key else "of images resized to 64x64" in found[key].metric_name


def test_psnr_from_wrong_latents_is_a_figure_an_amount():
    report = recorded("perturbed")
    report["models"][0]["psnr_with_noise"]["0.2"] = None  # as what is infinite is written
    figures, _ = report_results(report, "tokenizer", TINY)
    found = {figure.metric_name: figure.metric_value for figure in figures if figure.metric_type == "psnr"}
    noise, replaced = (report["models"][0][f"psnr_with_{kind}"] for kind in ("noise", "replaced_levels"))
    expected = {f"PSNR with noise of {x} of the latents' deviation, dB": noise[x] for x in ("0.01", "0.1", "0.3")}
    expected |= {f"PSNR with {x} of the latents' integers of 8 bits replaced, dB": y for x, y in replaced.items()}
    assert found == {"PSNR, dB": round(report["models"][0]["psnr"], 4)} | {x: round(y, 4) for x, y in expected.items()}


def test_text_is_a_figure_a_height_beside_the_originals():
    report = recorded("text")
    figures, _ = report_results(report, "tokenizer", TINY)
    read = {figure.dataset_config: figure for figure in figures if figure.dataset_type == "generated"}
    assert {place: figure.metric_value for place, figure in read.items()} == {
        f"letters of {height} pixels": round(shares["characters"], 4)
        for height, shares in report["models"][0]["text"].items()
    }
    assert "0.9950 of the pages as drawn" in read["letters of 12 pixels"].metric_name
    assert {figure.metric_type for figure in read.values()} == {"accuracy"}


def test_faces_are_a_figure_a_height_that_some_have():
    report = recorded("faces")
    faces = report["models"][0]["faces"]
    faces["128"] = {**faces["128"], "faces": 0, "distance": None}
    figures, _ = report_results(report, "tokenizer", TINY)
    found = [figure for figure in figures if figure.metric_type == "face_distance"]
    assert [figure.metric_value for figure in found] == [round(x["distance"], 4) for x in faces.values() if x["faces"]]
    assert "5 faces" in found[0].metric_name and "24 pixels" in found[0].metric_name and len(found) == len(faces) - 1


def as_json(value):
    return json.loads(json.dumps(value, default=str))


FIRST = "--model mine --data /a/b/kodak --lpips --streaming --no_fid --size 64 --batch_size 3"
SECOND = "--model mine --reference /a/x.tar --fid_model some/net --fid_size 32 --classifier c --classifier_labels 0-2"


THIRD = "--data x --reference /a/b/x.npz --suite --classifier c --text --perturb 0.1 0.2 --size 64"


@pytest.mark.parametrize(
    ("kind", "options", "shortened"),
    [
        ("tokenizer", FIRST, {"data": ["kodak"]}),
        ("tokenizer", "--data a/images --fid_model some/net --fid_size 32 --compare x y --size 64", {}),
        ("pipeline", "--model mine --samples 4 --seed 0 --guidance_scale 1 --guidance_interval 0 0.5", {}),
        ("pipeline", SECOND, {"reference": ["a/x.tar"]}),
        ("tokenizer", THIRD, {"reference": ["x.npz"]}),
    ],
)
def test_the_command_means_the_settings(kind, options, shortened):
    pytest.importorskip("datasets", reason="the scripts read images through it")
    pytest.importorskip("torchmetrics", reason="the scripts measure by it")
    name = "evaluate" if kind == "tokenizer" else "evaluate-generation"
    asked = as_json(vars(parse(name, options.split())))
    # What the scripts add to the options; without a network for the distance there is a size all the same.
    added = {"fid_size": asked["fid_size"] or 299}
    if kind == "tokenizer":
        report, known = recorded("trade_off"), TINY
        report["models"][0]["model"] = asked["model"]
    else:
        report, known = recorded("hieratok-dit-tiny"), DIT
        added |= {"labels": "balanced", "size": 64, "scheduler": "EulerDiscreteScheduler"}
    report["settings"] = {**asked, **added}
    figures, _ = report_results(report, kind, known)
    (command,) = {figure.metric_args["command"] for figure in figures}
    words = shlex.split(command)
    assert words[:2] == ["hieratok", name]
    assert as_json(vars(parse(name, words[2:]))) == {**asked, **shortened}


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("frgfm/imagenette", "frgfm/imagenette"),
        ("/home/alice/secret/kodak/", "kodak"),
        ("../../alice/kodak", "kodak"),
        ("~alice/kodak", "kodak"),
        (r"C:\Users\alice\kodak", "kodak"),
        ("https://alice:password@example.com/kodak", "kodak"),
        ("/home/alice/shards/test-0.tar", "shards/test-0.tar"),
    ],
)
def test_no_place_on_a_machine_is_told(place, told):
    report = recorded("trade_off")
    report["settings"] |= {"data": [place], "json": place}
    figures, _ = report_results(report, "tokenizer", TINY)
    assert {figure.dataset_name for figure in figures} == {told}
    words = shlex.split(figures[0].metric_args["command"])
    assert words[words.index("--data") + 1] == words[words.index("--json") + 1] == told


def changed(*path, value):
    report = owner = recorded("trade_off")
    *parents, last = path
    for key in parents:
        owner = owner[key]
    owner[last] = value
    return report


@pytest.mark.parametrize(
    ("report", "kind", "known", "message"),
    [
        (changed("machine", value=None), "tokenizer", TINY, "'machine'"),
        (changed("models", 0, "psnr", value="30"), "tokenizer", TINY, "'psnr'"),
        (changed("models", 0, "ssim", value=True), "tokenizer", TINY, "'ssim'"),
        (changed("models", 0, "ssim", value=float("nan")), "tokenizer", TINY, "'ssim'"),
        (changed("models", 0, "psnr", value=1e300), "tokenizer", TINY, "'psnr'"),
        (changed("models", 0, "psnr", value=-(10**400)), "tokenizer", TINY, "'psnr'"),
        (changed("images", value=-3), "tokenizer", TINY, "'images'"),
        (changed("models", 0, "faces", value={"24": {"faces": -3}}), "tokenizer", TINY, "'faces'"),
        (changed("models", 0, "faces", value={"tall": {"faces": 3, "distance": 0.1}}), "tokenizer", TINY, "'tall'"),
        (changed("models", 0, "parameters", value=5), "tokenizer", TINY, "another model"),
        (changed("models", 0, "latent_shape", value=[4, 8, 8]), "tokenizer", TINY, "another model"),
        (changed("models", 1, "model", value="hieratok-tiny"), "tokenizer", TINY, "'hieratok-tiny', got 2"),
        (changed("models", value=[3]), "tokenizer", TINY, "'model'"),
        (changed("settings", value=[]), "tokenizer", TINY, "'settings'"),
        (recorded("hieratok-dit-tiny"), "tokenizer", TINY, "'models'"),
        ([], "tokenizer", TINY, "'settings'"),
        (changed("models", 0, "psnr_with_noise", value=[30.0]), "tokenizer", TINY, "'psnr_with_noise'"),
        (changed("models", 0, "psnr_with_noise", value={"0.1": "much"}), "tokenizer", TINY, "'0.1'"),
        (changed("models", 0, "text", value={"12": {"characters": 0.5}}), "tokenizer", TINY, "'text_of_originals'"),
        (changed("models", 0, "text", value={}), "tokenizer", TINY, "'text_of_originals'"),
        (recorded("hieratok-dit-tiny"), "pipeline", {"names": {**DIT["names"], "9": "kite"}}, "another model"),
    ],
)
def test_a_report_that_does_not_fit_is_refused(report, kind, known, message):
    with pytest.raises(ValueError, match=message):
        report_results(report, kind, known)


def test_a_line_is_one_line_of_characters_that_can_be_written():
    assert line("a\n---\r\nb\u2028c\x85d\te") == "a --- b c d e"
    assert line("\x00x\ud800\u202ey\x7f") == "xy"
    line("\ud800é").encode()
