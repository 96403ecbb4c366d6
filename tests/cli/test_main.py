"""Tests of `hieratok`: what it lists, how soon, and what it says of what it does not know."""

import argparse
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from scripts import ROOT, load_script

from hieratok_hf import __version__
from hieratok_hf.cli.main import COMMANDS, main, parse
from hieratok_hf.cli.parsing import make_parser

HIERATOK = Path(sys.executable).with_name("hieratok")


def parsers():
    """The parser of every command, and of every script of the benchmarks."""
    for name, command in COMMANDS.items():
        command.add_arguments(parser := make_parser(command.summary))
        yield pytest.param(parser, id=name)
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        if hasattr(script := load_script("benchmarks", path.stem), "main"):
            yield pytest.param(script, id=path.stem)


@pytest.mark.parametrize("parser", [*parsers()])
def test_help_tells_of_every_argument_and_its_default(parser, monkeypatch):
    if not isinstance(parser, argparse.ArgumentParser):
        found = []

        def keep(parser, *_):
            found.append(parser)
            raise SystemExit

        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", keep)
        with pytest.raises(SystemExit):
            parser.main([])
        (parser,) = found
    for action in parser._actions:
        assert action.help, action.dest
        shown = "" if action.help == argparse.SUPPRESS else parser._get_formatter()._expand_help(action)
        if action.default not in (None, argparse.SUPPRESS, [], {}) and not isinstance(action.default, bool) and shown:
            values = action.default if isinstance(action.default, (list, tuple)) else [action.default]
            assert " ".join(map(str, values)) in shown, action.dest


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_a_module_and_a_page_of_help(name, capsys):
    if name == "app":
        pytest.importorskip("gradio")
    assert callable(import_module(f"hieratok_hf.cli.{name.replace(' ', '_').replace('-', '_')}").main)
    with pytest.raises(SystemExit, match="0"):
        main([*name.split(), "--help"])
    told = capsys.readouterr().out
    assert told.startswith(f"usage: hieratok {name} ") and COMMANDS[name].summary.split()[0] in told


@pytest.mark.parametrize("given", [["--help"], ["-h"], []])
def test_the_list_has_every_command_under_its_group(given, capsys):
    assert main(given) == (0 if given else 2)
    told = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert re.search(rf"^{command.group}:\n(?:  .*\n)*?  {name} +{re.escape(command.summary)}$", told, re.M), name
    assert main(["convert", "--help"]) == 0 and "reconstruct" not in capsys.readouterr().out
    assert "--version" in told


def test_the_page_of_commands_has_every_one():
    page = (ROOT / "docs" / "commands.md").read_text()
    assert [name for name in COMMANDS if f"`hieratok {name}" not in page] == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("recon", "did you mean 'reconstruct'?"),
        ("train_dit --size dit-s", "did you mean 'train-dit'?"),
        ("convert", "usage"),
        ("convert detox", "convert has no command 'detox': did you mean 'detok'?"),
        ("zzz", "no command 'zzz': there are reconstruct, "),
        ("--model x", "no command '--model'"),
        ("train --output x --modell y --data z", "unrecognized arguments: --modell y: did you mean --model?"),
        ("decode a b --scales 2", "--scales 2: did you mean --num_scales? ("),
        ("cache --data x --output y --limit 3", "unrecognized arguments: --limit 3 ("),
        ("train --output x", "the following arguments are required: --data"),
    ],
)
def test_what_is_unknown_is_one_line_with_the_nearest_name(given, told, capsys):
    try:
        assert main(given.split()) == 2
    except SystemExit as stop:
        assert stop.code == 2
    printed = capsys.readouterr()
    assert told in (printed.out if told == "usage" else printed.err)
    assert printed.err.count("error") == printed.err.count("\n") == (told != "usage")


def test_the_list_and_the_help_do_not_wait_for_torch():
    """The command as it is installed, and a process that finds no torch."""
    for arguments in (["--help"], ["train", "--help"], ["export", "--help"], ["recon"], ["push"]):
        code = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = sys.modules["diffusers"] = None
sys.argv[1:] = {arguments}
from hieratok_command import main
sys.exit(main())
"""
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert ended.returncode == (0 if "--help" in arguments else 2), ended.stderr
    told = subprocess.run([HIERATOK, "--version"], capture_output=True, text=True, check=True).stdout
    assert told == f"hieratok_hf {__version__}\n"


def test_the_package_is_whole_once_a_command_runs(tmp_path):
    ended = subprocess.run(
        [HIERATOK, "push", tmp_path, "me/x", "--dry_run", "--license", "mit"], capture_output=True, text=True
    )
    assert ended.returncode == 2 and re.fullmatch(r"error: .*load test.*\n", ended.stderr), ended.stderr


@pytest.mark.parametrize(("line", "expected"), [("rec", "reconstruct"), ("train --crop", "--crop_sizes")])
def test_a_shell_completes_names(line, expected, tmp_path):
    pytest.importorskip("argcomplete")
    line = f"hieratok {line}"
    answer = tmp_path / "answer"
    shell = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    shell |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_IFS": "\n"}
    subprocess.run([HIERATOK], env={**os.environ, **shell}, check=True)
    assert expected in [word.strip() for word in answer.read_text().splitlines()]


def test_arguments_of_another_command_are_parsed_alone():
    assert parse("cache", ["--data", "x", "--output", "y"]).kind == "moments"


def test_an_interrupted_command_ends_with_one_line(monkeypatch, capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("hieratok_hf.cli.info.main", interrupt)
    assert main(["info", "hieratok-tiny"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
