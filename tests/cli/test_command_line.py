"""What the example scripts share."""

import argparse
import json

import pytest
import torch
from accelerate import PartialState

from hieratok_hf.cli.command_line import (
    Problem,
    add_device,
    load_or_explain,
    machine,
    one_line,
    positive,
    run_on_processes,
    run_script,
    run_training,
    write_report,
)

pytestmark = pytest.mark.usefixtures("script_surroundings")


def test_errors_become_one_line():
    assert one_line(ValueError("several\n  lines of\ttext")) == "several lines of text"
    assert one_line(MemoryError()) == "MemoryError"


def test_whole_numbers_from_one():
    assert positive("3") == 3
    for text in ("0", "-1", "1.5", "three"):
        with pytest.raises(ValueError):
            positive(text)


def test_what_cannot_be_loaded_is_named():
    assert load_or_explain(lambda name, more: (name, more), "--model", "x", 2) == ("x", 2)

    def fail(name):
        raise KeyError("no\nsuch key")

    with pytest.raises(Problem, match=r"--model 'x' cannot be loaded: .*such key"):
        load_or_explain(fail, "--model", "x")


def test_reports_are_json_and_written_whole(tmp_path):
    path = tmp_path / "report.json"
    write_report(path, {"psnr": float("inf"), "rows": [{"a": float("nan"), "b": 1.5}], "path": tmp_path})
    assert json.loads(path.read_text()) == {"psnr": None, "rows": [{"a": None, "b": 1.5}], "path": str(tmp_path)}
    with pytest.raises(Problem, match=r"--json '.*missing.*' cannot be written"):
        write_report(tmp_path / "missing" / "report.json", {})
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_the_machine_is_named():
    facts = machine(torch.device("cpu"), 2)
    assert facts["device"] == "cpu" and facts["torch"] == torch.__version__ and facts["processes"] == 2
    assert facts["cpu"]


def test_lines_are_printed_and_problems_become_the_status(capsys):
    seen = []

    def run(args, state):
        seen.append((args.text, type(state)))
        if args.text == "bad":
            raise Problem("it cannot be done")
        return [args.text, "more"]

    given = argparse.Namespace(device=torch.device("cpu"), text="good")
    assert run_on_processes(run, given) == 0
    assert capsys.readouterr().out == "good\nmore\n"
    assert run_on_processes(run, argparse.Namespace(device=None, text="bad")) == 2
    assert capsys.readouterr() == ("", "error: it cannot be done\n")
    parser = argparse.ArgumentParser()
    add_device(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--device", "toaster"])
    assert "must be a device of torch, such as cuda or cpu, got 'toaster'" in capsys.readouterr().err
    assert parser.parse_args(["--device", "cpu"]).device == torch.device("cpu")
    assert seen == [("good", PartialState), ("bad", PartialState)]


def test_errors_of_a_training_become_the_status(capsys):
    def fail(args):
        raise args.error

    assert run_training(lambda args: None, argparse.Namespace()) == 0
    for error in (FloatingPointError("not finite"), ImportError("lpips"), OSError("full"), ValueError("wrong")):
        assert run_training(fail, argparse.Namespace(error=error)) == 2
        assert capsys.readouterr().err == f"error: {error}\n"
    with pytest.raises(KeyError):
        run_training(fail, argparse.Namespace(error=KeyError("a defect")))


def test_lines_are_printed_and_a_problem_is_the_exit_status(capsys):
    assert run_script(lambda args: [f"a {args.x}", "b"], argparse.Namespace(x=1)) == 0
    assert capsys.readouterr() == ("a 1\nb\n", "")

    def fail(args):
        raise Problem("no such thing")

    assert run_script(fail, argparse.Namespace()) == 2
    assert capsys.readouterr() == ("", "error: no such thing\n")
