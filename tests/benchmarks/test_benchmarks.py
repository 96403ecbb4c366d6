"""The figures that README.md and model_card.md print are those that the benchmarks compute and record."""

import itertools
import json
import shutil
import time
from importlib.metadata import version

import pytest
import torch
from helpers import recorded, tiny
from scripts import ROOT, load_script, report_in
from torch.utils.flop_counter import FlopCounterMode

from hieratok_hf import SIZES, HieraTokConfig, PyramidLayout, scale_causal_attention
from hieratok_hf.cli.protocol import describe_text
from hieratok_hf.evaluation.text import LETTER_HEIGHTS, TextReading
from hieratok_hf.ops.attention import FASTEST

RESULTS = ROOT / "benchmarks" / "results"
README, CARD, NUMBERS = ((ROOT / name).read_text() for name in ("README.md", "model_card.md", "benchmarks/README.md"))
PAGES = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
PROSE = " ".join(f"{PAGES} {NUMBERS}".split())  # where sentences run over the ends of lines
CPU = ["--device", "cpu", "--seconds", "0"]
measuring = load_script("benchmarks", "measuring")


def test_the_table_of_sizes_is_what_is_counted(tmp_path, capsys):
    load_script("benchmarks", "model_sizes").main(["--json", str(tmp_path / "sizes.json")])
    assert "hieratok-b" in capsys.readouterr().out
    rows = {row["size"]: row for row in json.loads((tmp_path / "sizes.json").read_text())["rows"]}
    lines = [line for line in PAGES.splitlines() if line.startswith("| hieratok-")]
    printed = {line.split("|")[1].strip(): line for line in lines if line.count("|") == 10}
    assert list(printed) == list(rows)
    for size, row in rows.items():
        parameters = (row["encoder_parameters"] + row["decoder_parameters"]) / 1e6
        flops = [row[key] / 1e9 for key in ("encode_flops", "decode_flops_4", "decode_flops_2")]
        expected = [row["latent"], *(f"{value:.1f}" for value in (parameters, *flops))]
        assert [cell.strip() for cell in printed[size].split("|")[5:10]] == expected
        short = f"| {row['latent']} | {expected[1]} | {expected[2]}, {expected[3]} |"
        assert any(line.startswith(f"| {size} |") and short in line for line in README.splitlines())
    row = rows["hieratok-b"]  # 4, 20, 84 and 340 tokens
    assert row["decode_flops_1"] < 0.02 * row["decode_flops_4"]
    assert row["decode_flops_2"] < 0.06 * row["decode_flops_4"]


SCRIPTS = {"autoencoders": "bench_autoencoders", "cpu": "bench_cpu", "image_sizes": "bench_image_sizes"}
SCRIPTS |= {"positions": "compare_positions", "teacher": "bench_teacher"}
TABLES = sorted(path.stem for kind in SCRIPTS for path in RESULTS.glob(f"{kind}_*.json"))


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_what_was_recorded(name):
    (script,) = (script for kind, script in SCRIPTS.items() if name.startswith(kind))
    assert load_script("benchmarks", script).table(recorded(name)) in NUMBERS


def test_the_text_that_is_read_is_what_was_recorded():
    report = recorded("text")
    assert [figures["model"] for figures in report["models"]] == ["hieratok-tiny", "hieratok-tiny-16x"]
    rows = {"pages as drawn": report["text_of_originals"]}
    rows |= {figures["model"]: figures["text"] for figures in report["models"]}
    shown = {}
    for name, read in rows.items():
        cells = [f"{100 * found['characters']:.1f}, {100 * found['lines']:.1f}" for found in read.values()]
        shown[name] = f"| {' | '.join([name, *cells])} |"
    heights = " | ".join(f"{height} px" for height in LETTER_HEIGHTS)
    head = f"| characters, lines read right, % | {heights} |\n|{'---|' * (1 + len(LETTER_HEIGHTS))}"
    assert "\n".join([head, *shown.values()]) in PAGES
    for name in ("hieratok-tiny", "hieratok-tiny-16x"):
        section = CARD.partition(f"\n# {name}\n")[2].partition("\n# ")[0]
        assert "\n".join([head, shown["pages as drawn"], shown[name]]) in section
    described, text = report["protocol"]["text"], TextReading(str)
    lines = text.pages[12].lines
    assert f"({len(lines)} of each height, {sum(map(len, ''.join(lines).split()))} characters" in PROSE
    if report["protocol"]["versions"]["pillow"] == version("pillow"):
        assert described["pages"] == describe_text(text)["pages"]


def test_the_figures_of_the_weights_their_seams_and_noise_are_those_recorded():
    report = recorded("reconstruction_cpu_avx512")
    rows = {(row["like"], row["code"]): row for row in report["rows"]}
    codes = ("tokenizer", "its linear path alone", "principal components", "JPEG")
    assert rows.keys() == set(itertools.product(("hieratok-tiny", "hieratok-tiny-16x"), codes))
    assert all((row["data"], row["images"]) == ("kodak", 24) for row in rows.values())
    assert load_script("benchmarks", "bench_reconstruction").table(report) in PAGES
    for key, row in rows.items():
        assert f" | {row['psnr']:.2f} | {row['ssim']:.3f} |" in CARD, key
        for psnr in row.get("scales_psnr", ()):
            assert f"{psnr:.2f}" in PAGES and f"{psnr:.2f}" in CARD
    report = recorded("seams_cpu_avx512")
    assert load_script("benchmarks", "bench_seams").tables(report) in PAGES
    tokenizers = {row["name"]: row for row in report["tokenizers"]}
    for name in ("hieratok-tiny", "hieratok-tiny-16x"):
        ours, components = rows[name, "tokenizer"], rows[name, "principal components"]
        assert f"{ours['psnr']:.2f} dB, SSIM {ours['ssim']:.3f}" in README
        assert f"{components['psnr']:.2f} dB, {components['ssim']:.3f})" in README
        assert tokenizers[name]["border_ratio"] < tokenizers[f"{name}-averages"]["border_ratio"]
    now, before = (tokenizers[name]["psnr_with_noise"] for name in ("hieratok-tiny", "hieratok-tiny-averages"))
    assert all(decibels > before[noise] for noise, decibels in now.items())


def test_the_trade_off_of_the_losses_and_the_gain_of_fine_tuning_are_those_recorded():
    report = recorded("trade_off")
    assert report["images"] == 24 and report["settings"]["size"] == 512
    for text in (PAGES, CARD):
        rows = {line for line in text.splitlines() if line.count("|") == 5}
        for figures in report["models"]:
            cells = f"| {figures['psnr']:.2f} | {figures['ssim']:.4f} | {figures['perceptual']:.4f} |"
            assert any(row.endswith(cells) for row in rows), cells


def test_the_figures_of_latents_and_of_wrong_ones_are_those_recorded():
    report = recorded("latents")
    cells = load_script("cli", "latents").cells
    columns = [cells(figures) for figures in (*report["models"], report["white_noise"])]
    for name in columns[0]:
        row = " | ".join(column.get(name, "-") for column in columns)
        assert f" | {row} |" in PAGES, name
    for figures, column in zip(report["models"], columns):
        assert figures["images"] == 2000 and figures["model"] in ("hieratok-tiny", "hieratok-tiny-16x")
        assert all(column[name] in CARD for name in ("excess kurtosis", "99.9 % are below", "the largest is"))
    for figures in recorded("perturbed")["models"]:
        for kind in ("noise", "replaced_levels"):
            decibels = [figures["psnr"], *figures[f"psnr_with_{kind}"].values()]
            assert f" | {' | '.join(f'{value:.2f}' for value in decibels)} |" in PAGES


def test_the_speeds_of_decoding_and_beside_other_autoencoders_are_those_recorded():
    ways = [f"{name}{how}" for name in ("sdpa_mask", "sdpa", "auto") for how in ("", ", compiled")]
    for path in RESULTS.glob("decode_*_cpu_*.json"):
        report = recorded(path.stem)
        cells = [f"{report['times_as_fast'][way]:.2f}" for way in ways]
        assert f"| {report['size']}, {report['images']} images | {' | '.join(cells)} |" in NUMBERS
    rows = recorded("autoencoders_eager_cpu_avx512")["rows"]
    for direction in ("encode", "decode"):
        place = (256, 1, direction)
        mine = [row for row in rows if (row["pixels"], row["images"], row["direction"]) == place]
        found = {row["model"]: row["times_as_fast"]["eager"] for row in mine}
        models = [*(size for size in SIZES if size in found), "AutoencoderKL-f16", "AutoencoderTiny"]
        assert f"| {direction} | {' | '.join(f'{found[model]:.1f}' for model in models)} |" in PAGES
        assert f"{direction}s {found['hieratok-b']:.1f} times" in README


def test_the_figures_of_a_gpu_are_those_recorded():
    decoding = recorded("decode_hieratok-b_cuda_90")
    for name, how in (("plain", ""), ("compiled", ", compiled")):
        ways = [f"{x}{how}" for x in ("sdpa_mask", "sdpa", "flex", "triton", "triton+rotary")]
        cells = [f"{decoding['times_as_fast'][way]:.2f}, {decoding['milliseconds'][way]:.1f}" for way in ways]
        assert f"| {name}: times as fast, ms | {' | '.join(cells)} |" in NUMBERS
    assert f"decodes 64 images in {decoding['milliseconds']['auto, compiled']:.1f} ms" in README
    speeds = recorded("train_hieratok-b_cuda_90")["images_per_second"]
    assert f"{speeds['plain']:.0f} images a second, {speeds['compiled']:.0f} compiled" in PROSE
    generation = recorded("generation_cuda_90")
    assert f"makes {generation['images_per_second']:.0f} images of 64x64 a second" in PROSE
    assert_costs_are_printed(generation)


def assert_costs_are_printed(report):
    for row in report["decoders"]:
        shares = " | ".join(f"{100 * row['of_full_decode'][scales]:.1f} %" for scales in "123")
        assert f"| {row['size']}, {row['images']} images of {row['pixels']}x{row['pixels']} | {shares} |" in NUMBERS


def test_the_gain_of_tiles_is_that_recorded():
    report = recorded("positions_hieratok-tiny_cpu_avx512")
    tiles, whole = (report["psnr_db"][variant]["768x512"] for variant in ("tiles", "cells"))
    assert f"{tiles:.2f} dB on the whole Kodak images, against {whole:.2f} dB" in PROSE
    sizes = recorded("image_sizes_hieratok-tiny_cpu_avx512")
    most = max(row["process_mib"] for row in sizes["rows"] if row["tiled"] and row["side"] == 4096)
    assert f"to {most:.0f} MiB for all the process at 4096x4096" in PROSE


def test_the_figures_of_generation_are_those_recorded():
    report = recorded("generation_cpu_avx2")
    assert f"decoding takes {100 * report['decode_share']:.1f} % of the time" in PROSE
    assert f"of 2 scales {100 * report['preview_of_decode']:.1f} % of a decoding" in PROSE
    assert report["preview_scales"] == 2
    *first, last = (f"{value:.2f}" for value in report["correlation_at_each_quarter"])
    assert f"{', '.join(first)} and {last} after each quarter" in PROSE
    large = next(row for row in report["decoders"] if row["size"] == "hieratok-b")["of_full_decode"]["2"]
    assert f"({100 * large:.1f} % of hieratok-b at 256x256 pixels)" in PROSE and large < 0.1
    assert_costs_are_printed(report)
    newer = recorded("generation_cpu_avx512")
    large_now = next(row for row in newer["decoders"] if row["size"] == "hieratok-b")["of_full_decode"]["2"]
    shares = f"{100 * newer['decode_share']:.1f} % of the time, {100 * newer['preview_of_decode']:.1f} % of a decoding"
    assert f"{shares} ({100 * large_now:.1f} % of hieratok-b)" in PROSE
    cached = recorded("cache_hieratok-tiny_cpu_avx512")
    assert f"shards at {cached['caching_over_encoding']:.2f} of the speed" in NUMBERS
    assert cached["caching_over_encoding"] >= 0.9
    judged = recorded("hieratok-dit-tiny")
    assert judged["settings"]["samples"] == 1000 and judged["settings"]["guidance_scale"] == 8
    for name, accuracy in zip(judged["classes"].values(), judged["class_accuracy_per_class"]):
        assert f"| {name} | {100 * accuracy:.0f} |" in CARD
    assert f"| all | {100 * judged['class_accuracy']:.1f} |" in CARD
    assert f"previews by 2 of 4 scales, hieratok-b at 256x256 | {100 * large:.1f} % of the time" in README
    assert f"| {100 * judged['class_accuracy']:.1f} % (10 classes) |" in README


@pytest.fixture
def attention(load_benchmark, monkeypatch):
    module = load_benchmark("bench_attention")
    monkeypatch.setattr(module, "CPU_SIZES", {2: 1, 3: 2})
    monkeypatch.setattr(module, "CPU_KINDS", [("float32", 8, 2), ("bfloat16", 8, 2)])
    # Rates of this machine take seconds to measure and do not matter here.
    monkeypatch.setattr(module, "matrix_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(module, "copy_rate", lambda device: 1e10)
    return module


def test_parts_of_the_attention_benchmark_add_up_to_every_row(attention, tmp_path, capsys):
    for part in (["--kinds", "1", "--sides", "2"], ["--kinds", "0"], ["--kinds", "1"]):
        assert attention.main([*CPU, "--json", *part]) == 0
    report = report_in(tmp_path / "results")
    assert report["machine"]["kind"].startswith("cpu") and report["machine"]["commit"]
    rows = [(row["dtype"], row["grid"][0], row["gradients"]) for row in report["rows"]]
    assert sorted(rows) == sorted(itertools.product(["float32", "bfloat16"], (2, 3), (False, True)))
    assert report["measured_rates"].keys() == {"copy_gb_per_s", "float32_tflops", "bfloat16_tflops"}
    for row in report["rows"]:
        assert row["tokens"] == PyramidLayout.from_grid(*row["grid"], (8, 4, 2, 1)).num_tokens
        assert row["of_sdpa_mask"].keys() == row["of_sdpa_mask_again"].keys()
        assert row["of_sdpa_mask"]["sdpa_mask"] == 1 and row["of_sdpa_mask"]["sdpa"] > 0
        assert "milliseconds" not in row  # speeds of a CPU are ratios
    assert "tokens (3x3 finest), forward and backward" in capsys.readouterr().out


def test_a_backend_that_fails_is_absent_and_a_wrong_one_ends_the_report(attention, monkeypatch, tmp_path, capsys):
    right, factor = attention.scale_causal_attention, {"sdpa": 1}

    def changed(*args, backend, **kwargs):
        if backend == "flex":
            raise NotImplementedError("no compiler here\nand more")
        return right(*args, backend=backend, **kwargs) * factor.get(backend, 1)

    monkeypatch.setattr(attention, "scale_causal_attention", changed)
    given = [*CPU, "--kinds", "0", "--json", "--backends", "sdpa_mask", "sdpa", "flex"]
    assert attention.main(given) == 0
    report = report_in(tmp_path / "results")
    assert all(row["absent"] == {"flex": "no compiler here"} for row in report["rows"])
    assert "absent: no compiler here" in capsys.readouterr().out
    factor["sdpa"] += 1e-4
    assert attention.main(given) == 1
    out, err = capsys.readouterr()
    assert "of sdpa_mask" not in out and "error: wrong results, so nothing is reported: sdpa, torch.float32" in err
    assert report_in(tmp_path / "results") == report


def test_rows_of_another_machine_are_not_kept(tmp_path):
    keys, machine = ("size",), {"kind": "cpu", "torch": "1", "commit": "a"}
    measuring.record_report(tmp_path, "x", {"machine": machine, "rows": [{"size": 1, "time": 3}]}, keys)
    new = {"machine": {**machine, "commit": "b"}, "rows": [{"size": 2, "time": 4}]}
    kept = measuring.record_report(tmp_path, "x", new, keys)
    assert kept["rows"] == [{"commit": "a", "size": 1, "time": 3}, {"size": 2, "time": 4}]
    other = {"machine": {**machine, "torch": "2"}, "rows": [{"size": 3, "time": 5}]}
    assert measuring.record_report(tmp_path, "x", other, keys) == other
    assert report_in(tmp_path) == other


def test_work_is_what_pytorch_counts(attention):
    layout = PyramidLayout.from_grid(3, 5, (1,))
    query, key, value = (torch.randn(2, 3, 15, 8, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counted:
        attended = scale_causal_attention(query, key, value, layout, backend="reference")
    assert attention.work(layout, 2, 3, 8, backward=False)[0] == counted.get_total_flops()
    with FlopCounterMode(display=False) as counted:
        attended.sum().backward()
    # Weights are kept there and computed again in a kernel that keeps none: one product more.
    again = 2 * 2 * 3 * 15 * 15 * 8
    both = attention.work(layout, 2, 3, 8, backward=True)[0] - attention.work(layout, 2, 3, 8, backward=False)[0]
    assert both == counted.get_total_flops() + again


def test_auto_follows_the_recorded_measurements(attention, monkeypatch):
    monkeypatch.setattr(attention, "RESULTS", RESULTS)
    assert attention.choices(attention.recorded()) == FASTEST
    assert attention.markdown(attention.recorded()) in NUMBERS


def test_recording_writes_a_table_that_python_reads(attention, monkeypatch, tmp_path):
    times = {"sdpa_mask": 1.0, "sdpa": 0.99, "triton": 0.5, "full": 0.4, "floor": 0.1}
    row = {"dtype": "bfloat16", "head_dim": 64, "gradients": True, "tokens": 340, "of_sdpa_mask": times}
    row["of_sdpa_mask_again"] = times
    close = {**row, "tokens": 1360, "of_sdpa_mask": {**times, "sdpa": 1.01, "triton": 1.0}}
    unsteady = {**row, "tokens": 5440, "of_sdpa_mask_again": {**times, "sdpa": 0.4}}
    report = {"machine": {"kind": "cuda 9.0"}, "rows": [row, close, unsteady]}
    (tmp_path / "attention_cuda_90.json").write_text(json.dumps(report))
    monkeypatch.setattr(attention, "RESULTS", tmp_path)
    for name in ("CHOICE", "README"):
        shutil.copy(getattr(attention, name), tmp_path / name)
        monkeypatch.setattr(attention, name, tmp_path / name)
    for _ in range(2):  # also over what it wrote itself
        attention.record()
        written = {"__name__": "hieratok_hf.ops.choice", "__package__": "hieratok_hf.ops"}
        exec((tmp_path / "CHOICE").read_text(), written)
        assert written["FASTEST"] == {("cuda 9.0", "bfloat16", 64, True): {340: "triton", 1360: "sdpa", 5440: "sdpa"}}
        assert callable(written["fastest_backend"])
    line = "| cuda 9.0 | bfloat16 | 64 | 340 | forward, backward | 0.99, 0.99 |  | 0.50, 0.50 |"
    assert line in attention.README.read_text()


def test_times_side_by_side_tell_slow_from_fast():
    calls = {"fast": lambda: None, "slow": lambda: time.sleep(0.01)}
    seconds = measuring.side_by_side(calls, torch.device("cpu"), budget=0)
    assert seconds["fast"] < 0.005 < 0.01 <= seconds["slow"]


def test_a_fresh_process_tells_its_last_line_or_why_not(tmp_path):
    scripts = {"tells": "print('[2]')", "sleeps": "import time; time.sleep(9)", "fails": "raise KeyError('x')"}
    for name, text in scripts.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert measuring.in_fresh_process(tmp_path / "tells.py", [], 60) == [2]
    assert measuring.in_fresh_process(tmp_path / "sleeps.py", [], 0.1) == {"failed": "more than 0.1 s"}
    with pytest.raises(RuntimeError, match="KeyError"):
        measuring.in_fresh_process(tmp_path / "fails.py", [], 60)


@pytest.mark.parametrize("argument", [[], ["--plain_only", "--backends", "sdpa_mask", "sdpa"]])
def test_the_decoding_benchmark_compares_with_the_dense_mask(argument, load_benchmark, monkeypatch, tmp_path, capsys):
    decode = load_benchmark("bench_decode")
    monkeypatch.setattr(decode.torch, "compile", lambda function, **_: function)
    small = ["--size", "hieratok-tiny", "--pixels", "32", "--images", "1"]
    assert decode.main([*CPU, *small, *argument, "--json"]) == 0
    report = report_in(tmp_path / "results")
    assert report["times_as_fast"]["sdpa_mask"] == 1 and len(report["times_as_fast"]) == (2 if argument else 6)
    assert "times as fast as sdpa_mask" in capsys.readouterr().out


def test_the_training_benchmark_takes_real_steps(load_benchmark, monkeypatch, tmp_path, capsys):
    train = load_benchmark("bench_train")
    monkeypatch.setattr(train, "matrix_rate", lambda device, dtype: 1e11)
    small = ["--size", "hieratok-tiny", "--pixels", "32", "--images", "1"]
    assert train.main([*CPU, *small, "--plain_only", "--json"]) == 0
    report = report_in(tmp_path / "results")
    # Three times the forward pass, but for the first layer's input, which needs no gradient.
    sizes = load_script("benchmarks", "model_sizes").count("hieratok-tiny", 32, 32)
    forward = (sizes["encode_flops"] + sizes["decode_flops_4"]) / 1e9
    assert 2.5 * forward < report["gflop_an_image"] < 3.5 * forward
    assert 0 < report["share_of_the_matrix_rate"]["plain"] < 10
    assert "of the measured matrix rate" in capsys.readouterr().out


scales = load_script("benchmarks", "compare_scales")


def test_the_tables_of_the_comparisons_are_what_was_recorded():
    runs = json.loads(scales.RESULTS.read_text())["runs"]
    assert {f"{row}-{seed}" for row in ("single", "multi", "full", "two", "three") for seed in (0, 1)} <= set(runs)
    assert f"{scales.BEGIN}\n{scales.table(runs)}\n{measuring.END}" in scales.README.read_text()
    assert all(run["images"] == 3925 and run["curve"][-1]["step"] >= 1000 for run in runs.values())

    generation = load_script("benchmarks", "compare_generation")
    results, text = generation.recorded(), generation.README.read_text()
    for begin, content in generation.sections(results).items():
        assert f"{begin}\n{content}\n{measuring.END}" in text
    for run in results["runs"].values():
        assert run["settings"] == generation.SETTINGS and run["reference_images"] == 9469
        assert [point["step"] for point in run["curve"]] == [500, 1000, 1500, 2000]


def test_a_curve_is_followed_to_a_distance():
    curve = [{"step": step, scales.DISTANCE: value} for step, value in ((250, 800.0), (500, 600.0), (750, 500.0))]
    assert scales.steps_to_reach(curve, 600) == 500
    assert scales.steps_to_reach(curve, 575) == 562.5
    assert scales.steps_to_reach(curve, 499) is None


def test_rows_of_scales_have_models_and_twins():
    configs = {row: scales.CONFIG | scales.CONFIGS.get(row, {}) for row in scales.ROWS}
    for row, (text, twin, arguments) in scales.ROWS.items():
        core = scales.core_class(row)(HieraTokConfig.from_size("hieratok-tiny", **configs[row]))
        assert core.config.downsampling == ("learned" if row.startswith("learned") else "mean")
        assert ("learned tokens" in text, "averages" in text) == (row.startswith("learned"), row.startswith("multi"))
        assert ("no linear path" in text) is (core.config.linear_path == 0)
        _, _, of_twin = scales.ROWS[twin]
        assert "--scale_factors 1" in of_twin and {*of_twin.split()} <= {*arguments.split(), "--scale_factors", "1"}
        differing = {name for name, value in configs[row].items() if configs[twin].get(name) != value}
        assert differing <= {"downsampling", "scale_causal"}


@pytest.mark.parametrize("name", ["scale_layers", "coarse_context", "encoder_too"])
def test_the_other_models_of_the_comparison_are_multi_scale_models(name):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="`downsampling` must be 'mean' for a variant, got 'learned'"):
        scales.VARIANTS[name](tiny())
    core = scales.VARIANTS[name](tiny(scale_factors=(4, 2, 1), downsampling="mean")).init_weights()
    pixel_values = torch.rand(2, 3, 24, 32) * 2 - 1
    moments, _ = core.encode_moments(pixel_values)
    latents = moments.chunk(2, dim=1)[0]
    made = core.decode_scales(latents)
    assert [image.shape[2:] for image in made] == [(8, 8), (12, 16), (24, 32)]
    (sum(image.square().mean() for image in made) + moments.square().mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in core.parameters())
    # The mean of a cell decides the coarser scales, what lies within it does not.
    shuffled = latents.detach().clone()
    shuffled[:, :, 0, 0], shuffled[:, :, 0, 1] = latents[:, :, 0, 1].detach(), latents[:, :, 0, 0].detach()
    for before, after in zip(made[:-1], core.decode_scales(shuffled)):
        torch.testing.assert_close(before, after, rtol=0, atol=1e-5)
    assert not torch.allclose(made[-1], core.decode_scales(shuffled)[-1], atol=1e-3)
