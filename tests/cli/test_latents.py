"""Tests of `hieratok latents`: the table, the JSON and the plot say the same of any autoencoder, and bad input."""

import json
import re

import pytest
from helpers import tree
from latent_data import make_images, save_autoencoders, tiny_dc
from PIL import Image
from scripts import error_of, load_script, usage_error, with_defaults

pytest.importorskip("datasets", reason="images are read through it")

from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.evaluation.latent_statistics import measure_latents
from hieratok_hf.evaluation.reconstruction import EvaluationBatches
from hieratok_hf.models.autoencoder_adapter import load_codec

script = load_script("cli", "latents")
OTHERS = ("kl", "tiny", "dc")
pytestmark = pytest.mark.usefixtures("script_surroundings")


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A folder with models, images, and a broken one among them."""
    folder = tmp_path_factory.mktemp("latents")
    save_autoencoders(folder)
    tiny_dc().save_pretrained(folder / "dc")
    make_images(folder / "images", count=24)
    (folder / "empty").mkdir()
    return folder


def arguments(space, *given):
    return with_defaults(list(given), {"--model": space / "hieratok", "--data": space / "images", "--device": "cpu"})


def test_models_side_by_side_in_a_table_a_file_and_a_plot(space, tmp_path, capsys):
    files = ["--json", tmp_path / "figures.json", "--plot", tmp_path / "plot.png"]
    assert (
        script.main(arguments(space, "--compare", *(space / name for name in OTHERS), "--batch_size", 5, *files)) == 0
    )
    title, header, *lines, skipped = capsys.readouterr().out.splitlines()
    assert title.startswith("23 images of ") and "at 32 x 32 pixels" in title and "005.png" in skipped
    report = json.loads((tmp_path / "figures.json").read_text())
    models = {figures["model"]: figures for figures in report["models"]}
    assert list(models) == [str(space / name) for name in ("hieratok", *OTHERS)] and not report["notes"]
    assert len({tuple(figures) for figures in models.values()}) == 1
    columns = re.split(r"\s{2,}", header.strip())
    assert columns == [*models, "white noise"]
    names, *cells = zip(*(re.split(r"\s{2,}", line.strip()) for line in lines))
    for figures, column in zip([*models.values(), report["white_noise"]], cells):
        made = script.cells(figures)
        assert dict(zip(names, column)) == {name: made.get(name, "-") for name in names}
        kurtosis = sum(figures["excess_kurtosis"]) / len(figures["excess_kurtosis"])
        assert made["excess kurtosis"] == f"{kurtosis:.2f}"
        assert made["99.9 % are below"] == f"{figures['quantiles']['0.999']:.2f}"
    assert "error when halved, % of the variance" in names and "linear probe, %" in names

    batches = EvaluationBatches(load_images(str(space / "images")), 32)
    expected = measure_latents(load_codec(space / "kl"), batches, 32)
    figures = models[str(space / "kl")]
    assert figures["variance"] == pytest.approx(expected["variance"], rel=1e-4)
    assert figures["equivariance_error"] == pytest.approx(expected["equivariance_error"], rel=1e-3)
    assert figures["class"] == "AutoencoderKL" and figures["scaling_factor"] == 0.18215
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG" and image.width > 2 * image.height > 400
        assert len(image.convert("RGB").getcolors(2**24)) > 20


def test_a_probe_without_labels_is_a_note(space, capsys):
    assert script.main(arguments(space, "--data", space / "images" / "hat", "--max_images", 4)) == 0
    output = capsys.readouterr().out
    assert output.startswith("4 images") and "linear probe" not in output and "note: the probe of " in output


BAD = {
    "no images": (["--data", "{space}/empty"], "--data .*No images found"),
    "no such model": (["--compare", "missing/model"], "--compare 'missing/model' cannot be loaded"),
    "a size that does not fit": (["--size", "30"], "cannot be measured on .*patch size 4"),
    "one image": (["--max_images", "1"], "cannot be measured on .*N of 2 or more"),
    "more than fits into memory": (["--max_images", "2000000000", "--streaming"], "--max_images needs .*GiB"),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_no_file(given, message, space, capsys, tmp_path):
    before = tree(space)
    files = ["--json", tmp_path / "figures.json", "--plot", tmp_path / "plot.png"]
    assert script.main(arguments(space, *(text.format(space=space) for text in given), *files)) == 2
    assert re.match(f"error: .*{message}", error_of(capsys))
    assert not list(tmp_path.iterdir()) and tree(space) == before


def test_files_that_are_there_stay_and_a_plot_is_png(space, capsys, tmp_path):
    path = tmp_path / "plot.png"
    path.write_bytes(b"mine")
    assert script.main(arguments(space, "--plot", path)) == 2 and "--plot" in error_of(capsys)
    assert path.read_bytes() == b"mine"
    assert "--plot must be a .png file" in usage_error(capsys, script.main, *arguments(space, "--plot", "a.svg"))


def test_a_plot_without_matplotlib_names_the_extra_before_the_work(space, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    assert script.main(arguments(space, "--plot", tmp_path / "plot.png")) == 2
    assert re.search(r"--plot needs matplotlib.*\[eval\]", error_of(capsys))
