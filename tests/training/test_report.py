"""Tests of `report`: records of resumed runs, averages over parts, and the step where a loss went wrong."""

import math
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import noise
from image_files import noise as pixels
from PIL import Image
from scripts import forget_processes, records

from hieratok_hf.training.report import JsonLines, TrainingReport


@pytest.fixture
def make(tmp_path):
    """Reports of a training of 10 steps, which go to one folder and are closed in the end."""
    reports = []

    def made(first_step=0, every=1, progress=None):
        reports.append(TrainingReport(Accelerator(cpu=True), tmp_path, first_step, 10, every, progress))
        return reports[-1]

    yield made
    for report in reports:
        report.close()
    forget_processes()


def take(report, step, *losses, norm=1.0, **others):
    """Take a step of a part for each of the losses."""
    for loss in losses:
        report.add({name: torch.tensor(float(x)) for name, x in {**others, "loss": loss}.items()}, [])
    report.end_step(step, torch.tensor(norm), count=4, learning_rate=0.1 / (step + 1))


@pytest.mark.parametrize("half", ['{"st', '{"step": 3, "loss": 0.12345}'])
def test_a_line_that_was_being_written_is_dropped(tmp_path, half):
    path = tmp_path / "losses.jsonl"
    whole = '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n'
    path.write_text(whole + half)
    lines = JsonLines(path, 2)
    assert path.read_text() == whole
    lines.write({"step": 3, "loss": 0.125})
    assert [record["loss"] for record in records(tmp_path)] == [0.5, 0.25, 0.125]


@pytest.mark.parametrize(
    "line", ["{", "[1]", "7", "{}", '{"step": "1"}', '{"step": null}', "\x00", "[" * 10**5, "\xff"]
)
def test_a_broken_record_is_named_and_nothing_is_lost(tmp_path, line):
    path = tmp_path / "losses.jsonl"
    content = b'{"step": 1}\n' + line.encode("latin-1") + b'\n{"step": 2}\n'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^Line 2 of '.*losses\.jsonl' is no record") as caught:
        JsonLines(path, 1)
    assert path.read_bytes() == content and "\n" not in str(caught.value)


def test_numbers_come_back_exactly(tmp_path):
    values = [*noise(5), torch.tensor(1e-30), torch.tensor(0.1, dtype=torch.float64), torch.tensor(7)]
    lines = JsonLines(tmp_path / "losses.jsonl", 0)
    for value in [*values, torch.tensor(math.nan)]:
        lines.write({"step": 1, "tensor": value, "float": value.item() / 3, "name": "x"})
    *found, last = records(tmp_path)
    for record, value in zip(found, values, strict=True):
        assert record["tensor"] == value.item() and type(record["tensor"]) is type(value.item())
        assert record["float"] == value.item() / 3 and record["name"] == "x"
    assert math.isnan(last["tensor"])


def test_losses_are_averaged_over_the_parts_and_steps_since_the_last_record(tmp_path, make):
    report = make(every=2)
    for step in range(4):
        take(report, step, 10 * step, 10 * step + 1, 10 * step + 5, norm=step + 0.5, kl=step)
    found = records(tmp_path)
    assert [(x["step"], x["loss"], x["norm"], x["kl"]) for x in found] == [(2, 7, 1.5, 0.5), (4, 27, 3.5, 2.5)]
    assert [x["lr"] for x in found] == [0.1 / 2, 0.1 / 4]


def test_the_last_step_has_a_record(tmp_path, make):
    report = make(first_step=7, every=50)
    for step in range(7, 10):
        take(report, step, step)
    assert [(x["step"], x["loss"]) for x in records(tmp_path)] == [(10, 8)]


def test_a_part_that_begins_later_appears_then_and_no_graph_is_held(tmp_path, make):
    report = make()
    report.add({"loss": torch.ones((), requires_grad=True) * 1}, [])
    assert not report.sums["loss"].requires_grad
    take(report, 0, 1)
    take(report, 1, 2, adversarial=-0.25)
    first, second = records(tmp_path)
    assert "adversarial" not in first and (second["adversarial"], second["loss"]) == (-0.25, 2)


def test_a_record_has_the_crop_sizes_and_a_part_is_averaged_over_the_steps_that_had_it(tmp_path, make):
    report = make(every=3)
    for step, crop in enumerate([(64, 64), (32, 40), (64, 64), (32, 32)]):
        report.add({"loss": torch.tensor(1.0), **({"late": torch.tensor(float(step))} if step else {})}, [])
        report.end_step(step, torch.tensor(1.0), 4, 0.1, crop)
    (record,) = records(tmp_path)
    assert record["crop_sizes"] == "32x40 64x64" and record["late"] == 1.5


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_report_that_goes_on_writes_what_one_without_a_stop_does(tmp_path, make, cut):
    def steps(report, first, last):
        for step in range(first, last):
            report.add({"loss": torch.tensor(1 / (step + 3))}, [])
            report.end_step(step, torch.tensor(1.0), 4, 0.1, (8 * step, 8))
        return report

    steps(make(every=5), 0, 5)
    whole = records(tmp_path)
    (tmp_path / "losses.jsonl").unlink()
    progress = steps(make(every=5), 0, cut).progress()
    time.sleep(0.01)
    resumed = steps(make(cut, every=5, progress=progress), cut, 5)
    assert records(tmp_path) == whole and resumed.seconds > progress["seconds"] > 0


BAD = pytest.mark.parametrize("bad", [{"loss": math.nan}, {"loss": -math.inf}, {"norm": math.inf}], ids=str)


@BAD
def test_a_number_that_is_not_finite_stops_the_training_and_names_its_step(tmp_path, make, bad):
    report = make()
    take(report, 0, 1, 1)
    with pytest.raises(FloatingPointError, match=r"not finite at step 2\."):
        take(report, 1, 1, bad.get("loss", 1), norm=bad.get("norm", 1.0))
    assert [record["step"] for record in records(tmp_path)] == [1]


@BAD
def test_where_looking_at_a_loss_costs_time_it_is_named_later(tmp_path, make, monkeypatch, bad):
    report = make(every=5)
    with monkeypatch.context() as patch:
        patch.setattr(report, "check", lambda: None)  # as on a GPU, which a look would stall
        take(report, 1, 1, bad.get("loss", 1), norm=bad.get("norm", 1.0))
    with pytest.raises(FloatingPointError, match=r"not finite at step 2\."):
        take(report, 2, 1, 1)
    assert not (tmp_path / "losses.jsonl").exists()


def test_every_image_left_out_is_told_once(make, capsys):
    report = make()
    for skipped in (["'a.png': is empty"], [], ["'b.png': is empty", "'a.png': is empty"], ["'b.png': is empty"]):
        report.add({}, skipped)
    report.close()
    told = capsys.readouterr().out
    assert told.count("'a.png'") == told.count("'b.png'") == 1
    assert "left out (1 so far): 'a.png': is empty" in told and "left out (2 so far): 'b.png': is empty" in told
    assert "2 images were left out, because they cannot be decoded." in told
    make().close()
    assert "left out" not in capsys.readouterr().out


def test_a_run_that_goes_on_keeps_the_records_before_it(tmp_path, make):
    report = make()
    for step in range(4):
        take(report, step, step)
        report.validated(step + 1, {"psnr": 20.0 + step, "per_scale": [1.0, 2.0]})
    assert len(records(tmp_path)) == 4
    resumed = make(first_step=2)
    assert resumed.bar.n == 2 and resumed.bar.total == 10
    take(resumed, 2, 9)
    assert [(x["step"], x["loss"]) for x in records(tmp_path)] == [(1, 0), (2, 1), (3, 9)]
    expected = [{"step": step, "psnr": 19.0 + step, "per_scale": [1.0, 2.0]} for step in (1, 2)]
    assert records(tmp_path, "validation.jsonl") == expected


def test_trackers_get_the_numbers_and_the_sheets(tmp_path, make):
    report, logged, images = make(), [], []

    class Tracker:
        name = "tracker"

        def log_images(self, values, step):
            images.append((step, values["samples"].shape))

    report.accelerator.log = lambda values, step: logged.append((step, values))
    report.accelerator.trackers = [Tracker(), object()]
    take(report, 0, 3)
    report.validated(1, {"psnr": 20.0, "per_scale": [1.0]})
    report.sampled(1, Image.fromarray(pixels(6, 9)))
    (_, first), second = logged
    assert first["loss"] == 3 and first["images_per_second"] > 0 and second == (1, {"validation/psnr": 20.0})
    assert images == [(1, (1, 6, 9, 3))]
    (path,) = (tmp_path / "samples").iterdir()
    assert path.name == "step-000000001.png" and (np.asarray(Image.open(path)) == pixels(6, 9)).all()
