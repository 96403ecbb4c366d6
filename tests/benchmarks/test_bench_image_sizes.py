"""The benchmark of growing images: rows of their own processes, the law of growth, and the stream of sizes."""

import json
from pathlib import Path

import pytest

RECORDED = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("image_sizes_*.json"))


@pytest.fixture
def bench(load_benchmark):
    return load_benchmark("bench_image_sizes")


def test_rows_are_measured_and_recorded(bench, tmp_path, capsys):
    given = ["--sides", "256", "--longest_whole", "0", "--stream", "10", "--longest", "64", "--json"]
    assert bench.main(["--device", "cpu", *given]) == 0
    (path,) = (tmp_path / "results").iterdir()
    report = json.loads(path.read_text())
    assert [(row["side"], row["direction"], row["tiled"]) for row in report["rows"]] == [
        (256, "encode", True),
        (256, "decode", True),
    ]
    for row in report["rows"]:
        assert row["times_the_smallest"] == 1 and 0 < row["peak_mib"] < row["process_mib"]
        assert "seconds" not in row  # speeds of a CPU are ratios
    assert report["stream"]["not_finite"] == 0 and len(report["stream"]["held_mib"]) == 10
    assert bench.table(report) in capsys.readouterr().out


def test_the_law_is_the_slope_between_the_two_largest(bench):
    kind = {"direction": "encode", "tiled": False}
    rows = [
        {**kind, "side": side, "times_the_smallest": (side / 256) ** 4, "peak_mib": side**2}
        for side in (256, 512, 1024)
    ]
    rows.append({"side": 2048, "direction": "encode", "tiled": False, "failed": "more than 1 s"})
    rows.append({"side": 256, "direction": "decode", "tiled": True, "times_the_smallest": 1.0, "peak_mib": 1.0})
    (law,) = bench.exponents(rows)
    assert law == {"direction": "encode", "tiled": False, "between": [512, 1024], "time": 2.0, "memory": 1.0}
    text = bench.table({"rows": rows})
    assert "| 1024 | 256.0, 1048576 | - | - | - |" in text and "| 2048 | more than 1 s | - | - | - |" in text


def test_a_row_that_takes_too_long_is_given_up(bench, capsys):
    assert (
        bench.main(["--device", "cpu", "--sides", "256", "--longest_whole", "0", "--seconds", "0.1", "--stream", "0"])
        == 0
    )
    assert capsys.readouterr().out.count('"failed": "more than 0.1 s"') == 2


def test_numbers_that_are_not_finite_are_counted(bench, monkeypatch):
    def broken(model, device):
        vae = bench.AutoencoderHieraTok.from_size("hieratok-tiny")
        vae.core.decoder.head.bias.data.fill_(float("nan"))
        return vae

    monkeypatch.setattr(bench, "load", broken)
    assert bench.stream("hieratok-tiny", 3, 64, bench.torch.device("cpu"))["not_finite"] == 3


@pytest.mark.parametrize("sides", [["100"], ["256", "300"]])
def test_sides_that_no_row_can_have_are_refused(bench, sides, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--sides", *sides])
    assert "--sides must be multiples of 32" in capsys.readouterr().err


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_the_table_is_what_was_recorded(bench, path):
    report = json.loads(path.read_text())
    assert bench.table(report) in (path.parents[1] / "README.md").read_text()
