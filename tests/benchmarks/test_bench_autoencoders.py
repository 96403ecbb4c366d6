"""The benchmark against other autoencoders: every model is one, and its figures are those of what was measured."""

import pytest
import torch
from helpers import tiny
from scripts import report_in, usage_error
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hieratok_hf import AutoencoderHieraTok

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--batches", "1", "--seconds", "0"]
RATES = {torch.float32: 1e11, torch.bfloat16: 4e11, torch.int8: 8e11}
PAIR = ["--models", "hieratok-tiny", "small"]


@pytest.fixture
def bench(bench, monkeypatch):
    # Rates of this machine take seconds to measure and do not matter here.
    monkeypatch.setattr(bench, "best_rate", lambda device, dtype: RATES[dtype])
    # Stands in for the baseline, whose smallest call takes a second.
    monkeypatch.setitem(bench.MODELS, "small", ("small", lambda pixels: bench.kl((32, 32), 4)))
    monkeypatch.setattr(bench, "BASELINE", "small")
    monkeypatch.setattr(bench, "VARIANTS", [*bench.VARIANTS, "small, tiles"])
    return bench


@pytest.fixture
def times(bench, monkeypatch):
    """Seconds that every call is said to take, by its name; all others take one."""
    told = {}

    def timed(calls, device, budget, graphs):
        assert not graphs  # users wait for the launches too
        return {name: told.get(name, 1.0) for name in calls}

    monkeypatch.setattr(bench, "side_by_side", timed)
    return told


SHAPES = {
    "hieratok-tiny": (16, 8),
    "hieratok-tiny-16x": (16, 16),
    "hieratok-s": (16, 16),
    "hieratok-b": (16, 16),
    "hieratok-l": (32, 16),
    "AutoencoderKL": (4, 8),
    "AutoencoderKL-f16": (32, 16),
    "AutoencoderDC": (32, 32),
    "AutoencoderTiny": (4, 8),
    "AutoencoderRAE": (768, 16),
}


def test_every_model_is_counted(bench):
    found = {name: bench.count(name, 256, 2) for name in SHAPES}
    assert set(bench.MODELS) == {*SHAPES, "small"}
    for name, (channels, factor) in SHAPES.items():
        assert found[name]["latent"] == (2, channels, 256 // factor, 256 // factor)
    assert found["AutoencoderKL"]["parameters"] == 83_653_863  # Stable Diffusion's published size
    once = bench.count("hieratok-b", 256, 1)
    assert once["encode"] * 2 == found["hieratok-b"]["encode"] and once["decode"] > once["encode"]


def test_what_is_counted_is_what_runs(bench):
    latent = bench.count("small", 64, 2)["latent"]
    for direction in bench.DIRECTIONS:
        call, shape = bench.prepared("small", 64, latent, direction, CPU, torch.float32)
        # The counter does not know the CPU's own kernel of attention.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
            assert call().shape == shape
        assert bench.count("small", 64, 2)[direction] == counted.get_total_flops()


def test_ratios_and_shares_are_those_of_the_times(bench, times, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    times |= {"small eager": 3.0, "hieratok-tiny eager": 0.5}
    for size in ("64", "128"):  # parts are recorded one after the other
        given = ["--sizes", size, "--eager", "--json", "--plot", str(tmp_path / "plot.png")]
        assert bench.main([*SMALL, *PAIR, *given]) == 0
    report = report_in(tmp_path / "results")
    rows = {(row["model"], row["direction"]): row for row in report["rows"] if row["pixels"] == 64}
    assert len(rows) == 6 and len(report["rows"]) == 12 and report["left_out"] == []
    flops = bench.count("hieratok-tiny", 64, 1)
    flops["both"] = flops["encode"] + flops["decode"]
    for direction, seconds in (("encode", 0.5), ("decode", 0.5), ("both", 1.0)):
        assert rows["small", direction]["times_as_fast"] == {"eager": 1}
        row = rows["hieratok-tiny", direction]
        assert row["times_as_fast"] == {"eager": 6}
        assert "images_per_second" not in row and "peak_mib" not in row  # speeds of a CPU are ratios
        assert row["share_of_the_peak"]["eager"] == round(flops[direction] / seconds / 1e11, 4)
    assert report["models"]["hieratok-tiny"]["latent"] == "16 of 1/8"
    assert bench.table(report).splitlines()[-1] in capsys.readouterr().out
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_like_is_compared_with_like(bench):
    times = {"small": {"eager": 4.0, "compiled": 2.0}, "ours": {"eager": 1.0, "compiled": 0.25}}
    flops = {"small": 8e9, "ours": 2e9}
    ours = bench.figures(times, flops, 16, lambda name: 1e10, on_gpu=True)["ours"]
    assert ours["times_as_fast"] == {"eager": 4, "compiled": 8}
    assert ours["share_of_the_peak"] == {"eager": 0.2, "compiled": 0.8}
    assert ours["images_per_second"] == {"eager": 16, "compiled": 64}
    assert (
        "times_as_fast"
        not in bench.figures({"ours": times["ours"]}, flops, 16, lambda name: 1e10, on_gpu=True)["ours"]
    )


def test_other_ways_are_compared_with_the_peaks_of_their_dtypes_and_tiles_with_tiles(
    bench, times, monkeypatch, tmp_path
):
    pytest.importorskip("onnxscript", reason="export to ONNX needs onnxscript")
    # Export takes seconds a block and a scale.
    small = tiny(encoder_num_layers=1, decoder_num_layers=1, scale_factors=(1,), sample_size=64).model_fields
    monkeypatch.setitem(bench.MODELS, "hieratok-tiny", ("one block", lambda pixels: AutoencoderHieraTok(**small)))
    times |= {"small eager": 3.0, "small, tiles eager": 2.0}
    ours = [f"hieratok-tiny, {way}" for way in ("bfloat16", "onnxruntime", "onnxruntime int8", "tiles")]
    given = [
        "--sizes",
        "64",
        "--directions",
        "encode",
        "--eager",
        "--json",
        "--models",
        *ours,
        "small",
        "small, tiles",
    ]
    assert bench.main([*SMALL, *given]) == 0
    report = report_in(tmp_path / "results")
    flops = bench.count("hieratok-tiny", 64, 1)["encode"]
    rows = {row["model"]: row for row in report["rows"]}
    assert rows["small, tiles"]["times_as_fast"] == rows["small"]["times_as_fast"] == {"eager": 1}
    for name, dtype in zip(ours, (torch.bfloat16, torch.float32, torch.int8, torch.float32)):
        assert rows[name]["times_as_fast"] == {"eager": 2 if "tiles" in name else 3}
        assert rows[name]["share_of_the_peak"]["eager"] == round(flops / RATES[dtype], 4)


def test_tiles_are_counted_with_what_they_share(bench):
    whole, tiles = (bench.count(name, 512, 1) for name in ("hieratok-tiny", "hieratok-tiny, tiles"))
    one = bench.count("hieratok-tiny", 256, 1)
    assert tiles["latent"] == whole["latent"]
    for direction in bench.DIRECTIONS:
        assert 4 * one[direction] < tiles[direction] <= 9 * one[direction]


def test_what_costs_too_much_is_named_until_it_is_measured(bench, times, tmp_path, capsys):
    ours, other = bench.count("hieratok-tiny", 64, 1), bench.count("small", 64, 1)
    assert other["encode"] < other["decode"] and ours["decode"] < other["encode"]
    limit = (other["encode"] + other["decode"]) / 2 / 1e12
    given = [*SMALL, *PAIR, "--sizes", "64", "--eager", "--json"]
    assert bench.main([*given, "--limit", str(limit)]) == 0
    report = report_in(tmp_path / "results")
    assert {row["direction"] for row in report["rows"]} == {"encode"} and len(report["rows"]) == 2
    left = {row["model"]: row["why"] for row in report["left_out"] if row["direction"] == "decode"}
    assert "more than --limit" in left["small"] and left["hieratok-tiny"] == "small is left out"
    assert "left out: hieratok-tiny, decode, 1 of 64x64: small is left out" in capsys.readouterr().out
    assert bench.main(given) == 0
    report = report_in(tmp_path / "results")
    assert len(report["rows"]) == 6 and report["left_out"] == []


@pytest.mark.parametrize("broken", ["nan", "compiled"])
def test_a_model_is_left_out_where_its_result_is_wrong(bench, times, broken, monkeypatch, tmp_path, capsys):
    decode = bench.CALLS["decode"]
    spoil = {"nan": lambda x: x.log(), "compiled": lambda x: x}[broken]
    monkeypatch.setitem(bench.CALLS, "decode", lambda vae, latents: spoil(decode(vae, latents)))
    monkeypatch.setattr(bench.torch, "compile", lambda call, **_: lambda: call() * (1 + 1e-3 * (broken == "compiled")))
    assert bench.main([*SMALL, *PAIR, "--sizes", "64", "--json"]) == 1
    out, err = capsys.readouterr()
    report = report_in(tmp_path / "results")
    reason = "compiled is off by 1.0e-03" if broken == "compiled" else "should decode to finite numbers"
    for name in ("small", "hieratok-tiny"):
        assert f"error: {name}: {name} {reason}" in err and f"left out: {name}, decode, 1 of 64x64: {name}" in out
    # A compiler that is wrong is so in both directions.
    assert {row["direction"] for row in report["rows"]} == (set() if broken == "compiled" else {"encode"})
    assert all(reason.split()[-2] in row["why"] for row in report["left_out"] if row["direction"] == "decode")


def test_ours_must_compile_in_one_graph_and_stop_no_others(bench, times, monkeypatch, tmp_path, capsys):
    codes = []

    def fails(call, *, fullgraph, dynamic):
        codes.append(call.__code__)
        assert not dynamic
        if fullgraph:
            raise NotImplementedError
        return call

    monkeypatch.setattr(bench.torch, "compile", fails)
    assert bench.main([*SMALL, *PAIR, "--sizes", "64", "--json"]) == 1
    report = report_in(tmp_path / "results")
    assert {row["model"] for row in report["rows"]} == {"small"}
    assert len(codes) == 4 == len(set(map(id, codes)))  # the compiler counts graphs by code object
    assert [row["why"] for row in report["left_out"]] == ["NotImplementedError"] * 2
    assert "error: hieratok-tiny: NotImplementedError" in capsys.readouterr().err


def test_a_peak_is_that_of_one_call(bench, capsys):
    # In this process the peak before could be higher, so only a fresh one is trusted with the figure.
    given = ["--device", "cpu", "--dtype", "float32", "--peak_of", "AutoencoderTiny", 256, 4, "decode"]
    told = bench.in_fresh_process(bench.__file__, given, seconds=120)
    # Two maps of 64 channels at the image's size are held at once, and no more than a few.
    assert 2 <= told["peak"] / (4 * 64 * 256 * 256 * 4) < 8


def test_bad_arguments_are_refused(bench, capsys):
    for argv, message in (
        (["--models", "hieratok-tiny"], "--models must name small"),
        ([*PAIR, "hieratok-tiny, tiles"], "--models must name small, tiles"),
        ([*PAIR, "--sizes", "100"], "--sizes must be multiples of 32"),
        ([*PAIR, "--batches", "0"], "--batches positive"),
    ):
        assert message in usage_error(capsys, bench.main, "--device", "cpu", *argv)
