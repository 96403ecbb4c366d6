"""The benchmark of caching: it measures both sides on the same images and records what it prints."""

import pytest
from scripts import report_in

pytest.importorskip("datasets", reason="images are read through it")
pytestmark = pytest.mark.usefixtures("script_surroundings")


ARGUMENTS = ["--device", "cpu", "--images", "6", "--pixels", "16", "--batch_size", "3", "--seconds", "0", "--json"]


def test_both_sides_are_measured_and_recorded(bench, tmp_path, capsys):
    assert bench.main(ARGUMENTS) == 0
    report = report_in(tmp_path / "results")
    assert report["images"] == 6 and report["shard_size"] == 3 and report["size"] == "hieratok-tiny"
    assert 0 < report["caching_over_encoding"] < 10
    assert "images_per_second" not in report  # speeds of a CPU are ratios
    assert f"caching runs at {report['caching_over_encoding']:.3f}" in capsys.readouterr().out


def test_nothing_is_reported_when_the_cache_is_wrong(bench, tmp_path, capsys, monkeypatch):
    class Wrong(bench.LatentCache):
        def __getitem__(self, index):
            found = super().__getitem__(index)
            return {**found, "moments": 2 * found["moments"]}

    monkeypatch.setattr(bench, "LatentCache", Wrong)
    assert bench.main(ARGUMENTS) == 1
    assert "are off by" in capsys.readouterr().err and not (tmp_path / "results").exists()
