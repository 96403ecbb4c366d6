"""What the example scripts share."""

import argparse
import json
from unittest import mock

import pytest
import torch

from hieratok_hf.cli.command_line import (
    Problem,
    add_device,
    load_or_explain,
    machine,
    positive,
    run_on_processes,
    run_script,
    run_training,
    write_report,
)

pytestmark = pytest.mark.usefixtures("script_surroundings")


def test_options_are_checked_and_what_cannot_be_loaded_is_named(capsys):
    assert positive("3") == 3
    for text in ("0", "-1", "1.5", "three"):
        with pytest.raises(ValueError):
            positive(text)
    parser = argparse.ArgumentParser()
    add_device(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--device", "toaster"])
    assert "got 'toaster'" in capsys.readouterr().err
    assert parser.parse_args(["--device", "cpu"]).device == torch.device("cpu")
    assert load_or_explain(lambda name, more: (name, more), "--model", "x", 2) == ("x", 2)
    for error, named in ((KeyError("no\nsuch  key"), "no.*such key"), (MemoryError(), "MemoryError")):
        with pytest.raises(Problem, match=f"--model 'x' cannot be loaded: .*{named}"):
            load_or_explain(mock.Mock(side_effect=error), "--model", "x")


def test_reports_are_json_and_written_whole(tmp_path):
    facts, path = machine(torch.device("cpu"), 2), tmp_path / "report.json"
    assert (facts["device"], facts["torch"], facts["processes"]) == ("cpu", torch.__version__, 2) and facts["cpu"]
    write_report(path, {"psnr": float("inf"), "rows": [{"a": float("nan"), "b": 1.5}], "path": tmp_path})
    assert json.loads(path.read_text()) == {"psnr": None, "rows": [{"a": None, "b": 1.5}], "path": str(tmp_path)}
    with pytest.raises(Problem, match=r"--json '.*missing.*' cannot be written"):
        write_report(tmp_path / "missing" / "report.json", {})
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_lines_are_printed_and_problems_become_the_status(capsys):
    def run(args, state=None):
        if args.text == "bad":
            raise Problem("it cannot be done")
        return [args.text, type(state).__name__]

    for start, name in ((run_script, "NoneType"), (run_on_processes, "PartialState")):
        for device in (None, torch.device("cpu")):
            assert start(run, argparse.Namespace(device=device, text="good")) == 0
            assert capsys.readouterr() == (f"good\n{name}\n", "")
        assert start(run, argparse.Namespace(device=None, text="bad")) == 2
        assert capsys.readouterr() == ("", "error: it cannot be done\n")


def test_errors_of_a_training_become_the_status(capsys):
    def fail(args):
        raise args.error

    assert run_training(lambda args: None, argparse.Namespace()) == 0
    for error in (FloatingPointError("not finite"), ImportError("lpips"), OSError("full"), ValueError("wrong")):
        assert run_training(fail, argparse.Namespace(error=error)) == 2
        assert capsys.readouterr().err == f"error: {error}\n"
    with pytest.raises(KeyError):
        run_training(fail, argparse.Namespace(error=KeyError("a defect")))
