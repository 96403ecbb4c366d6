"""The benchmark of sampling: its correlation, and that it measures all that it prints."""

import pytest
import torch
from helpers import images
from scripts import report_in
from tiny_pipelines import tiny_pipeline


def test_the_correlation_is_pearsons(bench):
    finals = images(3, 3, 16, 16)
    shrunk = finals.unflatten(2, (4, 4)).unflatten(4, (4, 4)).mean((3, 5))
    torch.testing.assert_close(bench.correlation(2 * shrunk + 1, finals), torch.ones(3))
    torch.testing.assert_close(bench.correlation(-shrunk, finals), -torch.ones(3))
    others = images(3, 3, 4, 4, seed=1)
    expected = [torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] for a, b in zip(others, shrunk)]
    torch.testing.assert_close(bench.correlation(others, finals), torch.stack(expected))


def test_the_last_preview_of_all_scales_is_the_image(bench, tmp_path):
    pipe = bench.HieraTokDiTPipeline.from_pretrained(tiny_pipeline(tmp_path))
    pipe.set_progress_bar_config(disable=True)
    quarters = bench.preview_correlations(pipe, 4, 8, 3, 1.5)
    assert len(quarters) == 4 and quarters[-1] == pytest.approx(1, abs=1e-5)
    assert quarters[0] < 1 - 1e-3


def test_everything_is_measured_and_recorded(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "DECODERS", [("hieratok-tiny", 64, 1, 1)])
    folder = tiny_pipeline(tmp_path / "pipe")
    given = ["--model", folder, "--device", "cpu", "--steps", "4", "--images", "3", "--seconds", "0", "--json"]
    assert bench.main(given) == 0
    report = report_in(tmp_path / "results")
    assert report["model"] == "pipe" and report["images_per_second"] > 0
    assert 0 < report["decode_share"] < 1 and len(report["correlation_at_each_quarter"]) == 4
    (row,) = report["decoders"]
    # Three calls on a busy machine tell little more than that both were timed.
    assert row["of_full_decode"]["4"] == 1 and 0 < row["of_full_decode"]["1"] < 3
    out = capsys.readouterr().out
    assert "of which decoding takes" in out and "previews of 2 scales cost" in out
