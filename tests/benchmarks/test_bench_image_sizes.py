"""The benchmark of growing images: rows, the law of growth, and the stream of sizes."""

import pytest
import torch
from scripts import report_in, usage_error

CPU = torch.device("cpu")


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_a_row_is_measured(bench, direction):
    found = bench.one_row("hieratok-tiny", 256, direction, True, CPU)
    assert 0 < found["peak"] < found["process"] and found["seconds"] > 0


def test_rows_and_a_stream_are_recorded(bench, monkeypatch, tmp_path, capsys):
    def told(script, arguments, seconds):
        _, side, direction, *_ = arguments
        if direction == "decode":
            return {"failed": f"more than {seconds:g} s"}
        return {"seconds": side**2 / 1e6, "peak": side * 2**20, "process": 2 * side * 2**20}

    monkeypatch.setattr(bench, "in_fresh_process", told)  # tested for itself
    given = ["--sides", "256", "512", "--longest_whole", "256", "--stream", "10", "--longest", "64", "--json"]
    assert bench.main(["--device", "cpu", *given]) == 0
    report = report_in(tmp_path / "results")
    encoded = [row for row in report["rows"] if row["direction"] == "encode"]
    assert [(row["side"], row["tiled"]) for row in encoded] == [(256, False), (256, True), (512, True)]
    assert [row["times_the_smallest"] for row in encoded] == [1, 1, 4]
    assert all("seconds" not in row for row in encoded)  # speeds of a CPU are ratios
    assert [row["failed"] for row in report["rows"] if row["direction"] == "decode"] == ["more than 300 s"] * 3
    assert report["exponents"] == [
        {"direction": "encode", "tiled": True, "between": [256, 512], "time": 1.0, "memory": 0.5}
    ]
    assert report["stream"]["not_finite"] == 0 and len(report["stream"]["held_mib"]) == 10
    assert bench.table(report) in capsys.readouterr().out


def test_numbers_that_are_not_finite_are_counted(bench, monkeypatch):
    def broken(model, device):
        vae = bench.AutoencoderHieraTok.from_size("hieratok-tiny")
        vae.core.decoder.head.bias.data.fill_(float("nan"))
        return vae

    monkeypatch.setattr(bench, "load", broken)
    assert bench.stream("hieratok-tiny", 3, 64, CPU)["not_finite"] == 3


def test_sides_that_no_row_can_have_are_refused(bench, capsys):
    assert "--sides must be multiples of 32" in usage_error(capsys, bench.main, "--sides", 256, 300)
