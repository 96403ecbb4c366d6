"""Tests of `hieratok generate`: the sheets and their labels, schedulers, independence of the batch, bad input."""

import re

import numpy as np
import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image, ImageDraw, ImageFont
from scripts import error_of, load_script, with_defaults
from tiny_pipelines import make_pipeline, tiny_pipeline

from hieratok_hf.evaluation.generation import number_images

script = load_script("cli", "generate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("generate") / "pipe")


@pytest.fixture
def run(folder, tmp_path):
    """Call `main`; gives the exit status."""

    def call(*given):
        defaults = {"--model": folder, "--output": tmp_path / "sheet.png", "--steps": 3, "--device": "cpu"}
        return script.main(with_defaults(list(given), defaults))

    return call


def array(path):
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        return np.asarray(image).astype(int)


def panels(sheet, columns, rows):
    """The images of a sheet, column by column: its right lower part is a regular grid."""
    panel, step = script.SMALLEST_PANEL, script.SMALLEST_PANEL + script.MARGIN
    left, top = sheet.shape[1] - columns * step, sheet.shape[0] - rows * step
    corners = [[(left + i * step, top + j * step) for j in range(rows)] for i in range(columns)]
    return [[sheet[y : y + panel, x : x + panel] for x, y in column] for column in corners]


def test_a_column_a_class_and_every_image_as_a_file(run, tmp_path, capsys):
    assert run("church", "English springer", "--rows", 2, "--images", tmp_path / "new", "--seed", 7) == 0
    output = capsys.readouterr().out
    names = ["0001_English_springer_000", "0001_English_springer_001", "0002_church_000", "0002_church_001"]
    files = sorted((tmp_path / "new").iterdir())
    assert [file.name for file in files] == [f"{name}.png" for name in names]
    assert all(f"image: {file}" in output for file in files) and f"sheet: {tmp_path / 'sheet.png'}" in output
    assert re.search(r"^4 images in .* s: [\d.]+ images/s on cpu$", output, re.MULTILINE)
    columns = panels(array(tmp_path / "sheet.png"), 2, 2)
    images = [array(file) for file in files]
    for column, expected in zip(columns, (images[2:], images[:2])):  # in the order that was asked for
        for panel, image in zip(column, expected, strict=True):
            np.testing.assert_array_equal(panel, image.repeat(16, 0).repeat(16, 1))
    # They are those that the seed numbers.
    levels = number_images(make_pipeline(), [1, 4, 2, 5], 7, num_inference_steps=3).permute(0, 2, 3, 1)
    assert abs(np.stack(images) - levels.numpy().astype(int)).max() <= 1


def test_images_do_not_depend_on_batch_size_previews_or_other_classes(run, tmp_path):
    kinds = {"whole": ["--batch_size", 16], "small": ["--batch_size", 1, "--previews", 2], "one": ["2"]}
    for name, options in kinds.items():
        assert run(*options, "--overwrite", "--rows", 3, "--images", tmp_path / name) == 0
    files = {name: sorted(file.name for file in (tmp_path / name).iterdir()) for name in kinds}
    assert len(files["whole"]) == 9 and files["whole"] == files["small"]
    assert files["one"] == [name for name in files["whole"] if name.startswith("0002")]
    for name, there in files.items():
        for file in there:
            assert abs(array(tmp_path / name / file) - array(tmp_path / "whole" / file)).max() <= 1


def test_images_begin_with_a_file_s_and_leave_it_as_it_was(run, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((80, 40)).save(photo)
    content, folder = photo.read_bytes(), tmp_path / "new"
    assert run("church", "--image", photo, "--strength", 0.4, "--rows", 2, "--steps", 8, "--images", folder) == 0
    settings = {"num_inference_steps": 8, "image": Image.open(photo), "strength": 0.4}
    levels = number_images(make_pipeline(), [2, 5], 0, **settings).permute(0, 2, 3, 1)
    for path, expected in zip(sorted(folder.iterdir()), levels.numpy().astype(int), strict=True):
        assert abs(array(path) - expected).max() <= 1
    assert run("church", "--image", photo, "--output", photo, "--overwrite") == 2
    assert re.match("error: --output .* is an input", error_of(capsys)) and photo.read_bytes() == content


def test_previews_end_with_the_image(run, tmp_path, capsys):
    assert run("--rows", 2, "--previews", 4, "--images", tmp_path / "all", "--steps", 9) == 0
    assert "previews of 4 scales: " in capsys.readouterr().out
    columns = panels(array(tmp_path / "sheet_previews.png"), 3, script.PREVIEWS + 1)
    for key, column in enumerate(columns):
        final = array(next((tmp_path / "all").glob(f"{key:04}_*_000.png"))).repeat(16, 0).repeat(16, 1)
        np.testing.assert_array_equal(column[-1], final)
        # With all scales the last step's prediction is the image, and the first step's is not.
        assert abs(column[-2] - final).max() <= 1 < abs(column[0] - final).max()


def ink(text, font):
    """How dark a label is as a whole, on paper that is large enough."""
    paper = Image.new("RGB", (2000, 400), "white")
    ImageDraw.Draw(paper).multiline_text((100, 100), text, fill="black", font=font)
    return (255 - np.asarray(paper).astype(int)).sum()


LONG = ["a", "great white shark man-eater", "Rindfleischetikettierungsüberwachungsaufgabe", "jÄy gÇq"] * 4


@pytest.mark.parametrize("size", [1, 130])
@pytest.mark.parametrize("sides", [[], ["step 1 of 1000", "the image itself"]])
def test_no_label_is_cut_off_or_covered(size, sides):
    white = Image.new("RGB", (size, size), "white")
    sheet = script.make_sheet(LONG, [[white, white]] * len(LONG), sides)
    panel = size * -(-script.SMALLEST_PANEL // size)
    font = ImageFont.load_default(size=max(16, panel // 16))
    heads = [script.wrapped(label, font, panel) for label in LONG]
    assert all(" ".join(head.split("\n")) == label for head, label in zip(heads, LONG))
    bands = -(-len(LONG) // script.COLUMNS)
    expected = sum(ink(head, font) for head in heads) + bands * sum(ink(side, font) for side in sides)
    drawn = (255 - np.asarray(sheet).astype(int)).sum()
    assert drawn == pytest.approx(expected, rel=2e-3)  # a label that is centred may fall between two pixels
    assert panel >= script.SMALLEST_PANEL


def test_schedulers_keep_the_shift_and_the_kind():
    pipe = make_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.scheduler = script.other_scheduler(pipe, "dpm")
    assert pipe.scheduler.config.flow_shift == 3.0 and pipe.scheduler.config.prediction_type == "flow_prediction"
    assert [script.other_scheduler(pipe, name).config.shift for name in ("heun", "euler")] == [3.0, 3.0]
    pipe = make_pipeline(scheduler=DDIMScheduler(prediction_type="v_prediction", beta_end=0.03))
    for name, kind in (("dpm", DPMSolverMultistepScheduler), ("ddim", DDIMScheduler)):
        other = script.other_scheduler(pipe, name)
        assert type(other) is kind and other.config.prediction_type == "v_prediction" and other.config.beta_end == 0.03
        pipe.scheduler = other
        assert number_images(pipe, [0], 0, num_inference_steps=2).shape == (1, 3, 8, 8)
    with pytest.raises(script.Problem, match=r"one of ddim, dpm for a pipeline of 'v_prediction', got 'heun'"):
        script.other_scheduler(pipe, "heun")


BAD = {
    "a class with a near name": (["curch"], r"'curch' is no class of this pipeline; did you mean 'church'.*\?"),
    "a file": (["--model", "{0}/file"], "--model '.*file' cannot be loaded: .*not a folder"),
    "a tokenizer": (["--model", "hieratok-tiny"], "--model .hieratok-tiny. cannot be loaded: .*not a pipeline"),
    "another scheduler": (["--scheduler", "ddim"], "--scheduler must be one of euler, heun, dpm .*, got 'ddim'"),
    "no guidance": (["--guidance_scale", "0.5"], "`guidance_scale` must be .* at least 1"),
    "a folder for the sheet": (["--output", "{0}/a.png"], "--output '.*a.png' cannot be written: it is a folder"),
    "no image": (["--image", "{0}/file"], "--image '.*file': "),
    "no such image": (["--image", "{0}/none.png"], "--image '.*none.png': "),
    "a file for images": (["--images", "{0}/file"], "--images '.*file' cannot be written: "),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_no_file(given, message, run, capsys, tmp_path):
    (tmp_path / "a.png").mkdir()
    (tmp_path / "file").write_text("{}")
    assert run(*[text.format(tmp_path) for text in given]) == 2
    assert re.match(f"error: .*{message}", error_of(capsys))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "file"]
