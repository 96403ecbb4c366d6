"""The benchmark of the ways to run a tokenizer on a CPU."""

import pytest
from helpers import random_core
from local_data import write_folder
from scripts import report_in

from hieratok_hf import AutoencoderHieraTok


def test_ways_are_timed_beside_the_plain_one_and_time_is_divided(bench, monkeypatch, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="ONNX programs need onnxruntime")
    pytest.importorskip("onnxscript", reason="export to ONNX needs onnxscript")
    core = random_core(scale_factors=(1,), encoder_num_layers=1, decoder_num_layers=1, patch_size=8, sample_size=32)
    AutoencoderHieraTok.from_core(core).save_pretrained(tmp_path / "model")
    data = write_folder(tmp_path / "data", cat=[1, 2])
    monkeypatch.setattr(bench, "PROGRAMS", {"int8": bench.PROGRAMS["int8"]})
    monkeypatch.setattr(bench, "IN_OPENVINO", {})
    monkeypatch.setattr(bench.torch, "compile", lambda call, options: call)  # takes a minute
    monkeypatch.setattr(bench, "best_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(bench, "copy_rate", lambda device: 1e6)
    given = ["--models", str(tmp_path / "model"), "--data", data, "--seconds", "0", "--json"]
    assert bench.main(given) == 0
    report = report_in(tmp_path / "results")
    assert [(row["part"], row["program"]) for row in report["programs"]] == [("encoder", "int8"), ("decoder", "int8")]
    plain = {f"PyTorch, {dtype}{how}" for dtype in ("float32", "bfloat16") for how in ("", ", compiled")}
    for row in report["ways"]:
        assert row["times_as_fast"]["PyTorch, float32"] == 1
        assert set(row["times_as_fast"]) - {"PyTorch, int8", "PyTorch, int8, compiled"} == {
            *plain,
            "onnxruntime, int8",
        }
        assert min(row["times_as_fast"].values()) > 0
        assert set(row["psnr_lost"]) - {"PyTorch, int8"} == {"PyTorch, bfloat16", "onnxruntime, int8"}
        assert all(abs(lost) < 0.3 for lost in row["psnr_lost"].values())
    for row in report["time"]:
        shares = row["share_of_time"]
        assert sum(shares.values()) == pytest.approx(1, abs=0.01) and min(shares.values()) > 0
        assert row["whole_of_peak"] > 0 and row["products_of_peak"] > 0 and row["reading_weights_of_time"] > 0
    assert bench.table(report) in capsys.readouterr().out
