"""The benchmark of exported programs."""

import pytest
from helpers import random_core
from local_data import write_folder
from scripts import report_in

from hieratok_hf import AutoencoderHieraTok


def test_programs_are_weighed_and_timed_beside_the_model(bench, monkeypatch, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="ONNX programs need onnxruntime")
    pytest.importorskip("onnxscript", reason="export to ONNX needs onnxscript")
    core = random_core(scale_factors=(1,), encoder_num_layers=1, decoder_num_layers=1, sample_size=32)
    AutoencoderHieraTok.from_core(core).save_pretrained(tmp_path / "model")
    data = write_folder(tmp_path / "data", cat=[1, 2])
    monkeypatch.setattr(bench, "KINDS", {"int8": bench.KINDS["int8"]})
    given = ["--models", str(tmp_path / "model"), "--data", data, "--seconds", "0", "--json"]
    assert bench.main(given) == 0
    report = report_in(tmp_path / "results")
    assert [(row["part"], row["kind"]) for row in report["sizes"]] == [("encoder", "int8"), ("decoder", "int8")]
    assert all(row["megabytes"] >= 0 and abs(row["psnr_lost"]) < 0.3 for row in report["sizes"])
    for row in report["speeds"]:
        assert row["times_as_fast"]["PyTorch, float32"] == 1 and row["times_as_fast"]["onnxruntime, int8"] > 0
    assert bench.tables(report) in capsys.readouterr().out
