"""Tests of parsers: values of every type, and options that need or contradict each other."""

import argparse
import json
import math

import pytest
import torch

from hieratok_hf.cli.command_line import find_device
from hieratok_hf.cli.parsing import (
    Parser,
    add_device,
    add_protocol,
    json_object,
    make_parser,
    own_loss,
    positive,
    real,
    seed,
    whole,
)

HUGE = "9" * 400


@pytest.mark.parametrize(
    ("kind", "taken", "refused"),
    [
        (positive, {"3": 3}, ["0", "-1", "1.5", "three", "", HUGE, "9" * 5000, "2147483648"]),
        (whole(0, 7), {"0": 0, " 7 ": 7}, ["-1", "8", "nan", "0x1"]),
        (seed, {"9007199254740993": 2**53 + 1}, ["-1", HUGE]),
        (real(), {"0": 0, "1e-3": 0.001}, ["-1", "nan", "inf", "1e400", "-0.1", "one", ""]),
        (real(above=0, below=1), {"0.5": 0.5}, ["0", "1", "-1"]),
        (real(-math.inf), {"-1": -1}, ["nan", "inf"]),
        (real(0, 1), {"0": 0, "1": 1}, ["1.01"]),
        (
            own_loss,
            {"a.b:c=0": "a.b:c=0"},
            ["", "a", "a:b", "a=1", ":b=1", "a:=1", "a.:b=1", "a:b=nan", "a:b=-1", "a:b=1=2"],
        ),
        (json_object, {'{"a": [1]}': {"a": [1]}}, ["[]", "3", "null", "{", "", '{"a": NaN}', "[" * 9999, f"[{HUGE}]"]),
    ],
    ids=["positive", "whole", "seed", "real", "open", "any", "share", "loss", "json"],
)
def test_what_a_user_types_becomes_a_value_or_one_line(kind, taken, refused):
    assert {text: kind(text) for text in taken} == taken
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match=r"^must be .*, got ") as caught:
            kind(text)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
        assert ", ," not in str(caught.value) and "at least 0 and above" not in str(caught.value)


def test_devices(capsys):
    parser = make_parser("A script.")
    add_device(parser)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--device", "toaster"])
    assert "must be a device of torch on this machine" in capsys.readouterr().err
    assert find_device(parser.parse_args(["--device", "cpu"])) == torch.device("cpu")
    if not torch.accelerator.is_available():
        assert find_device(parser.parse_args([])) == find_device(parser.parse_args(["--device", "auto"]))
        assert find_device(parser.parse_args([])) == torch.device("cpu")


def test_options_that_need_or_contradict_each_other(capsys):
    parser = make_parser("A command.")
    for name in ("--one", "--two"):
        parser.add_argument(name)
    parser.add_range(parser.add_argument, "--crop", (0.0, 1.0), "range")
    parser.needs(two="one")
    parser.contradict("one", "crop")
    assert parser.parse_args(["--one", "1", "--two", "2"]).two == "2"
    for given, told in (
        ("--two 2", "--two needs --one"),
        ("--one 1 --crop 0.5 1", "--one and --crop contradict each other"),
        ("--crop 1 0.5", "--crop must be a range"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(given.split())
        assert told in capsys.readouterr().err


def test_a_protocol_does_not_say_where_to_write(tmp_path):
    parser = Parser("hieratok measure")
    for option in ("--size", "--json", "--save_npz"):
        parser.add_argument(option)
    parser.add_argument("--overwrite", action="store_true")
    add_protocol(parser)
    options = {"size": 8, "json": "a.json", "save_npz": "b.npz", "overwrite": True, "help": True}
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"protocol": {"command": "hieratok measure", "options": options}}))
    args = parser.parse_args(["--protocol", str(path)])
    assert (args.size, args.json, args.save_npz, args.overwrite) == ("8", None, None, False)


@pytest.mark.parametrize("options", [{"size": "many"}, {"sise": 8}])
def test_an_error_beside_a_protocol_names_its_file(options, tmp_path, capsys):
    parser = Parser("hieratok measure")
    parser.add_argument("--size", type=int)
    add_protocol(parser)
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"protocol": {"command": "hieratok measure", "options": options}}))
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--protocol", str(path)])
    assert "report.json" in capsys.readouterr().err
