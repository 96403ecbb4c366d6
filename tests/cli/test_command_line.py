"""Tests of what the commands share: checks, reports, processes, and streams that fail."""

import argparse
import contextlib
import io
import os
import sys
from unittest.mock import Mock

import pytest
import torch
from accelerate import PartialState

from hieratok_hf.cli.command_line import describe_machine, load_or_explain, run_on_processes, run_training
from hieratok_hf.cli.parsing import make_parser
from hieratok_hf.cli.terminal import Problem, run_script
from hieratok_hf.training.report import say
from hieratok_hf.utils.extras import missing_extra

pytestmark = pytest.mark.usefixtures("script_surroundings")


def test_what_cannot_be_loaded_is_named():
    assert load_or_explain(lambda name, more: (name, more), "--model", "x", 2) == ("x", 2)
    with pytest.raises(Problem, match=r"--model 'x' cannot be loaded: .*such key"):
        load_or_explain(Mock(side_effect=KeyError("no\nsuch key")), "--model", "x")


def test_the_machine_is_named():
    facts = describe_machine(torch.device("cpu"), 2)
    assert facts["device"] == "cpu" and facts["torch"] == torch.__version__ and facts["processes"] == 2
    assert facts["cpu"]


RUNNERS = [(run_script, None), (run_on_processes, None), (run_on_processes, torch.device("cpu"))]


@pytest.mark.parametrize(("runner", "device"), RUNNERS)
def test_a_script_prints_lines_or_its_problem(runner, device, capsys):
    run = Mock(side_effect=[["a", "b"], Problem("no such thing"), missing_extra("SSIM", "torchmetrics")])
    args = argparse.Namespace(device=device)
    assert [runner(run, args) for _ in range(3)] == [0, 2, 2]
    errors = ["error: no such thing\n", "error: SSIM needs torchmetrics: pip install 'hieratok_hf[eval]'\n"]
    assert capsys.readouterr() == ("a\nb\n", "".join(errors))
    given = run.call_args.args
    assert given[0] is args and [type(x) for x in given[1:]] == [PartialState] * (runner is run_on_processes)


@pytest.fixture
def closed_pipe():
    """The end of a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), open(writer, "w") as file:
        yield file


def lines_of(args):
    return ["Größe 數字 \udcff"] * 5000


def test_a_reader_that_has_left_is_no_error(tmp_path, closed_pipe, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", closed_pipe)
    make_parser("A script.")
    assert run_script(lines_of, argparse.Namespace()) == 0
    assert run_training(lambda args: say("a step"), argparse.Namespace(output=tmp_path)) == 0
    with pytest.raises(SystemExit, match="0"):
        make_parser("A script.").parse_args(["--help"])
    monkeypatch.setattr(sys, "stderr", closed_pipe)
    assert run_script(lambda args: fail("nobody hears it"), argparse.Namespace()) == 2


def fail(text):
    raise Problem(text)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_standard_output_is_one_line(tmp_path, monkeypatch, capsys):
    def read_help(run, args):
        with pytest.raises(SystemExit) as stop:
            make_parser("A script." * 2000).parse_args(["--help"])
        return stop.value.code

    for run in (run_script, run_training, read_help):
        with contextlib.suppress(OSError), open("/dev/full", "w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            make_parser("A script.")
            assert run(lambda args: print("x") or ["x"], argparse.Namespace(output=tmp_path)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: the standard output cannot be written: ") and error.count("\n") == 1


def test_terminals_of_ascii_and_of_nothing_take_every_line(monkeypatch):
    ascii = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    for stream in (ascii, None):
        monkeypatch.setattr(sys, "stdout", stream)
        make_parser("Größe")
        assert run_script(lines_of, argparse.Namespace()) == 0
    assert ascii.buffer.getvalue().startswith(b"Gr\\xf6\\xdfe")
    sys.stdout.close()


def test_errors_of_a_training_become_the_status(tmp_path, capsys):
    def fail(args):
        raise args.error

    output = tmp_path / "runs"
    assert run_training(lambda args: None, argparse.Namespace(output=output)) == 0
    for error in (FloatingPointError("not finite"), ImportError("lpips"), OSError("full"), ValueError("wrong")):
        assert run_training(fail, argparse.Namespace(output=output, error=error)) == 2
        assert capsys.readouterr().err == f"error: {error}\n"
    assert run_training(fail, argparse.Namespace(output=output, error=KeyboardInterrupt())) == 130
    assert "--resume" in capsys.readouterr().err
    with pytest.raises(KeyError):
        run_training(fail, argparse.Namespace(output=output, error=KeyError("a defect")))
    assert not output.exists()
