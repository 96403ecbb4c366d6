"""Tests of `benchmarks/compare_generation.py`: both rows from images to table, going on, and what the table says."""

import json

import pytest
from helpers import random_core
from image_files import noise as pixels
from image_files import write_shard
from PIL import Image
from scripts import forget_processes, load_script, save_vision_model, usage_error
from transformers import MobileNetV2ForImageClassification

pytest.importorskip("datasets", reason="images are read through it")
pytest.importorskip("sklearn", reason="t-SNE is that of scikit-learn")
pytest.importorskip("torchmetrics", reason="it measures the distance")

from hieratok_hf import AutoencoderHieraTok
from hieratok_hf.cli.main import main

CLASSES = ["English_springer", "golf_ball", "tench"]
DIT = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
TINY = [
    *("--image_size", 16, "--dit_config", json.dumps(DIT), "--steps", 4, "--export_every", 2, "--batch_size", 4),
    *("--lr", 1e-2, "--warmup_steps", 1, "--ema", 0.5, "--mixed_precision", "no"),
    *("--samples", 6, "--sample_steps", 2, "--sample_batch_size", 4, "--seeds", 0),
]


compare = load_script("benchmarks", "compare_generation")
BEGINS, END = (compare.BEGIN, compare.SPACES_BEGIN), load_script("benchmarks", "measuring").END


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Images, a classifier, tokenizers, and a README and results of its own; scripts run in this process."""
    data = tmp_path / "data"
    (data / "imagenette_128").mkdir(parents=True)
    (data / "imagenette_128" / "meta.json").write_text(json.dumps({"classes": CLASSES}))
    images = [Image.fromarray(pixels(20, 24, seed=i)) for i in range(12)]
    write_shard(data / "imagenette_128" / "train-0000.tar", images, [i % 3 for i in range(12)])
    config = {"id2label": dict(enumerate(["background", "tench", "English springer", "golf ball"]))}
    config |= {"depth_divisible_by": 4, "finegrained_output": False}
    save_vision_model(data / "mobilenet_v2_1.0_224", MobileNetV2ForImageClassification, **config)
    for row, factors in (("single", (1,)), ("learned", (2, 1))):
        vae = AutoencoderHieraTok.from_core(random_core(scale_factors=factors))
        vae.save_pretrained(tmp_path / "tokenizers" / f"{row}-0")
    (tmp_path / "results").mkdir()
    readme = tmp_path / "README.md"
    markers = "".join(f"{begin}\nold\n{END}\n{i} kept\n" for i, begin in enumerate(BEGINS))
    readme.write_text(f"before\n{markers}")
    monkeypatch.setattr(compare, "README", readme)
    for name in ("RESULTS", "PLOT", "SPACES_PLOT"):
        monkeypatch.setattr(compare, name, tmp_path / "results" / getattr(compare, name).name)
    calls = []

    def call(name, arguments, log):
        calls.append(name)
        forget_processes()
        assert main([name, *map(str, arguments)]) == 0, name

    monkeypatch.setattr(compare, "call", call)
    folders = ["--data", data, "--tokenizers", tmp_path / "tokenizers", "--output", tmp_path / "runs"]
    return calls, list(map(str, [*folders, *TINY])), tmp_path


@pytest.mark.usefixtures("script_surroundings")
def test_both_rows_from_images_to_the_table(world, capsys, monkeypatch):
    calls, arguments, folder = world
    assert compare.main([*arguments, "--rows", "single"]) == 0
    stages = ["cache", "train-dit", "evaluate-generation", "evaluate-generation"]
    assert calls == stages
    assert compare.main(arguments) == 0 and calls == 2 * stages  # the first row is kept
    multi = folder / "runs" / "learned-0"

    # What is lost is made again, and nothing else.
    lost = multi / "seed-0" / "evaluation-000000002.json"
    before = json.loads(lost.read_text())
    lost.unlink()
    assert compare.main(arguments) == 0 and calls[8:] == ["evaluate-generation"]
    after = json.loads(lost.read_text())
    assert before[compare.DISTANCE] == after[compare.DISTANCE]
    last = json.loads((multi / "seed-0" / "evaluation-000000004.json").read_text())
    settings = last["settings"]
    assert settings["guidance_scale"] == 1 and settings["samples"] == 6 and settings["fid_size"] == 16
    assert last["reference_images"] == 12 and last["images_per_class"] == [2, 2, 2]

    capsys.readouterr()
    assert compare.main([*arguments, "--only_collect"]) == 0
    results = json.loads(compare.RESULTS.read_text())
    assert list(results["runs"]) == ["single-0/seed-0", "learned-0/seed-0"]
    recorded = results["runs"]["learned-0/seed-0"]
    curve = recorded["curve"]
    assert recorded["class_accuracy"] == last["class_accuracy"]
    assert [point["step"] for point in curve] == [2, 4] and curve[0][compare.DISTANCE] == after[compare.DISTANCE]
    assert list(results["latent_spaces"]) == ["single-0", "learned-0", "white noise"]
    text, printed = compare.README.read_text(), capsys.readouterr().out
    assert "old" not in text and text.startswith("before") and "0 kept" in text and text.endswith("1 kept\n")
    for begin, content in compare.sections(results).items():
        assert f"{begin}\n{content}\n{END}" in text and content in printed
        assert len({line.count("|") for line in content.splitlines() if line.startswith("|")}) == 1
    assert compare.PLOT.exists() and compare.SPACES_PLOT.exists()

    # What is recorded needs no files, and collecting again changes nothing.
    assert compare.main([*arguments, "--output", str(folder / "other")]) == 0 and len(calls) == 9
    assert compare.main([*arguments, "--output", str(folder / "other"), "--only_collect"]) == 0
    assert compare.README.read_text() == text and json.loads(compare.RESULTS.read_text())["runs"] == results["runs"]

    # Other settings are another comparison.
    monkeypatch.setattr(compare, "RESULTS", folder / "none.json")
    with pytest.raises(SystemExit, match="other settings"):
        compare.main([*arguments, "--samples", "8"])
    assert len(calls) == 9


def run_of(name, seed, distances, accuracy=0.5):
    curve = [{"step": 1000 * (i + 1), "FD-MobileNetV2": x} for i, x in enumerate(distances)]
    facts = {"tokenizer": f"{name}-0", "twin": "single-0", "seed": seed}
    return {**facts, "class_accuracy": accuracy, "curve": curve}


def test_the_table_sets_a_row_beside_its_twin():
    single = [run_of("single", seed, (400, 300, 200)) for seed in (0, 1)]
    multi = [run_of("multi", 0, (400, 240, 160), 0.625), run_of("multi", 1, (500, 300, 220))]
    text = compare.table({f"{run['tokenizer']}/seed-{run['seed']}": run for run in (*single, *multi)})
    head, _, twin, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
    assert head[2:5] == ["FD-MobileNetV2 after 1000 steps", "2000", "3000"]
    assert twin[2:] == ["400.0, 400.0", "300.0, 300.0", "200.0, 200.0", "", "", "", "50.0, 50.0"]
    expected = ["400.0, 500.0", "240.0, 300.0", "160.0, 220.0", "-20.0 %, +10.0 %", "2500, not", "1.20x, none"]
    assert row == ["`multi-0`", compare.ROWS["multi"][0], *expected, "62.5, 50.0"]


def test_a_row_that_was_never_above_its_twin_has_a_bound_only():
    single, multi = run_of("single", 0, (400, 300, 200)), run_of("multi", 0, (190, 150, 120))
    assert compare.reached(multi, single) == ("at most 1000", "3.00x or more")
    assert compare.reached(single, multi) == ("not", "none")


def test_what_cannot_run_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "none.json")
    folders = ["--tokenizers", str(tmp_path), "--output", str(tmp_path / "runs")]
    with pytest.raises(SystemExit, match=r"no tokenizer in .*single-0.*compare_scales\.py"):
        compare.main(folders)
    with pytest.raises(SystemExit, match="Nothing has finished"):
        compare.main([*folders, "--only_collect"])
    assert "multiple of --export_every" in usage_error(capsys, compare.main, "--steps", 5, "--export_every", 2)
    with pytest.raises(SystemExit, match=r"hieratok fails failed; .*log.txt says why"):
        compare.call("fails", ["--model", "none"], tmp_path / "log.txt")
    assert "has no command 'fails'" in (tmp_path / "log.txt").read_text()
    with pytest.raises(ValueError, match="once"):
        compare.fill_section("no marker", compare.BEGIN, "")
