"""The figures that README.md and model_card.md print are those that the benchmarks compute and record."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
README, CARD = (ROOT / "README.md").read_text(), (ROOT / "model_card.md").read_text()


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_sizes_is_what_is_counted(tmp_path, capsys):
    load("model_sizes").main(["--json", str(tmp_path / "sizes.json")])
    assert "hieratok-b" in capsys.readouterr().out
    rows = {row["size"]: row for row in json.loads((tmp_path / "sizes.json").read_text())["rows"]}
    lines = [line for line in README.splitlines() if line.startswith("| hieratok-")]
    printed = {line.split("|")[1].strip(): line for line in lines if line.count("|") == 10}
    assert list(printed) == list(rows)
    for size, row in rows.items():
        parameters = (row["encoder_parameters"] + row["decoder_parameters"]) / 1e6
        flops = [row[key] / 1e9 for key in ("encode_flops", "decode_flops_4", "decode_flops_2")]
        expected = [row["latent"], *(f"{value:.1f}" for value in (parameters, *flops))]
        assert [cell.strip() for cell in printed[size].split("|")[5:10]] == expected


def test_progressive_decoding_costs_its_tokens_only():
    row = load("model_sizes").count("hieratok-b", 256, 256)
    # 4, 20, 84 and 340 tokens
    assert row["decode_flops_1"] < 0.02 * row["decode_flops_4"]
    assert row["decode_flops_2"] < 0.06 * row["decode_flops_4"]


def test_the_figures_of_the_weights_are_those_recorded():
    report = json.loads((ROOT / "benchmarks" / "results" / "reconstruction.json").read_text())
    assert len(report["psnr_db_of_each_picture"]) == 24
    for text in (README, CARD):
        for mean in report["mean"].values():
            assert f"{mean['psnr_db']:.2f}" in text and f"{mean['ssim']:.3f}" in text
