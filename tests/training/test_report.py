"""Tests of `report`: records of resumed runs, averages over parts, and the step where a loss went wrong."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import noise
from PIL import Image
from scripts import forget_processes, records

from hieratok_hf.training.report import JsonLines, TrainingReport


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    forget_processes()


def report_of(accelerator, folder, first_step=0, every=1):
    return TrainingReport(accelerator, folder, first_step, 10, every)


def losses(value, **others):
    return {name: torch.tensor(float(x)) for name, x in {**others, "loss": value}.items()}


ONE = torch.tensor(1.0)


@pytest.mark.parametrize("half", ['{"st', '{"step": 3, "loss": 0.12345}'])
def test_a_line_that_was_being_written_is_dropped(tmp_path, half):
    path = tmp_path / "losses.jsonl"
    whole = '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n'
    path.write_text(whole + half)
    lines = JsonLines(path, 2)
    assert path.read_text() == whole
    lines.write({"step": 3, "loss": 0.125})
    assert [record["loss"] for record in records(tmp_path)] == [0.5, 0.25, 0.125]


def test_numbers_come_back_exactly(tmp_path):
    values = [*noise(5), torch.tensor(1e-30), torch.tensor(0.1, dtype=torch.float64), torch.tensor(7)]
    lines = JsonLines(tmp_path / "a.jsonl", 0)
    for value in values:
        lines.write({"step": 1, "tensor": value, "float": value.item() / 3, "name": "x"})
    for record, value in zip(records(tmp_path, "a.jsonl"), values, strict=True):
        assert record["tensor"] == value.item() and type(record["tensor"]) is type(value.item())
        assert record["float"] == value.item() / 3 and record["name"] == "x"
    lines.write({"step": 99, "tensor": torch.tensor(math.nan)})
    assert math.isnan(records(tmp_path, "a.jsonl")[-1]["tensor"])


def test_losses_are_averaged_over_the_parts_of_their_step(tmp_path, accelerator):
    report = report_of(accelerator, tmp_path, every=2)
    for step in range(4):
        for part in range(3):
            report.add(losses(10 * step + part, kl=part**2), [])
        report.end_step(step, ONE * (step + 0.5), count=12, learning_rate=0.1 / (step + 1))
    report.close()
    found = records(tmp_path)
    assert [(x["step"], x["loss"], x["norm"]) for x in found] == [(2, 11, 1.5), (4, 31, 3.5)]
    assert [x["kl"] for x in found] == pytest.approx([5 / 3] * 2)
    assert [x["lr"] for x in found] == [0.1 / 2, 0.1 / 4]


def test_a_part_that_begins_later_appears_then_and_no_graph_is_held(tmp_path, accelerator):
    report = report_of(accelerator, tmp_path)
    report.add({"loss": torch.ones((), requires_grad=True) * 1}, [])
    assert not report.sums["loss"].requires_grad
    report.end_step(0, ONE, 4, 0.1)
    report.add(losses(2, adversarial=-0.25), [])
    report.end_step(1, ONE, 4, 0.1)
    report.close()
    first, second = records(tmp_path)
    assert "adversarial" not in first and (second["adversarial"], second["loss"]) == (-0.25, 2)


def bad_step(report, step, bad, which):
    """A step of two parts, one of which goes wrong, or its gradient."""
    report.add(losses(1), [])
    report.add(losses(bad if which == "loss" else 1), [])
    report.end_step(step, ONE * (bad if which == "norm" else 1), 4, 0.1)


@pytest.mark.parametrize("looks", [True, False], ids=["at once", "later"])
@pytest.mark.parametrize(("bad", "which"), [(math.nan, "loss"), (-math.inf, "loss"), (math.inf, "norm")])
def test_a_number_that_is_not_finite_stops_the_training_and_names_its_step(
    tmp_path, accelerator, monkeypatch, bad, which, looks
):
    report = report_of(accelerator, tmp_path, every=1 if looks else 5)
    with monkeypatch.context() as patch:
        if not looks:
            patch.setattr(report, "check", lambda: None)  # as on a GPU, which a look would stall
            bad_step(report, 1, bad, which)
        else:
            bad_step(report, 0, 1, which)
    with pytest.raises(FloatingPointError, match=r"not finite at step 2\."):
        bad_step(report, *((1, bad) if looks else (2, 1)), which)
    report.close()
    assert [record["step"] for record in records(tmp_path)] == ([1] if looks else [])


def test_every_image_left_out_is_told_once(tmp_path, accelerator, capsys):
    report = report_of(accelerator, tmp_path)
    for skipped in (["'a.png': is empty"], [], ["'b.png': is empty", "'a.png': is empty"], ["'b.png': is empty"]):
        report.add(losses(1), skipped)
    report.close()
    told = capsys.readouterr().out
    assert told.count("'a.png'") == told.count("'b.png'") == 1
    assert "left out (1 so far): 'a.png': is empty" in told and "left out (2 so far): 'b.png': is empty" in told
    assert "2 images were left out, because they cannot be decoded." in told
    report_of(accelerator, tmp_path).close()
    assert "left out" not in capsys.readouterr().out


def test_a_run_that_goes_on_keeps_the_records_before_it(tmp_path, accelerator):
    report = report_of(accelerator, tmp_path)
    for step in range(4):
        report.add(losses(step), [])
        report.end_step(step, ONE, 4, 0.1)
        report.validated(step + 1, {"psnr": 20.0 + step, "per_scale": [1.0, 2.0]})
    report.close()
    assert len(records(tmp_path)) == 4
    resumed = report_of(accelerator, tmp_path, first_step=2)
    assert resumed.bar.n == 2 and resumed.bar.total == 10
    resumed.add(losses(9), [])
    resumed.end_step(2, ONE, 4, 0.1)
    resumed.close()
    assert [(x["step"], x["loss"]) for x in records(tmp_path)] == [(1, 0), (2, 1), (3, 9)]
    expected = [{"step": step, "psnr": 19.0 + step, "per_scale": [1.0, 2.0]} for step in (1, 2)]
    assert records(tmp_path, "validation.jsonl") == expected


def test_trackers_get_the_numbers_and_the_sheets(tmp_path, accelerator):
    report, logged, images = report_of(accelerator, tmp_path), [], []

    class Tracker:
        name = "tracker"

        def log_images(self, values, step):
            images.append((step, values["samples"].shape))

    accelerator.log = lambda values, step: logged.append((step, values))
    accelerator.trackers = [Tracker(), object()]
    report.add(losses(3), [])
    report.end_step(0, ONE, 4, 0.1)
    report.validated(1, {"psnr": 20.0, "per_scale": [1.0]})
    sheet = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    report.sampled(1, sheet)
    report.close()
    (_, first), second = logged
    assert first["loss"] == 3 and first["images_per_second"] > 0 and second == (1, {"validation/psnr": 20.0})
    assert images == [(1, (1, 6, 9, 3))]
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step-000000001.png"]
    assert (np.asarray(Image.open(tmp_path / "samples" / "step-000000001.png")) == np.asarray(sheet)).all()
