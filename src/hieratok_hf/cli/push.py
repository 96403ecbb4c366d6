"""Upload a saved tokenizer or pipeline to the Hugging Face Hub, tested first and in one commit."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import diffusers
import transformers

from ..hub.card import license_of
from ..hub.folder import add_card, prepare_folder, select_files
from ..hub.push import HubError, push_folder
from ..shipped import resolve_model
from ..utils.files import read_json
from .main import parse
from .terminal import Problem, one_line, run_script


def card_of(args: Namespace, folder: Path) -> dict[str, Any]:
    """Collect what the options and the folder say for the model card."""
    reports = []
    for path in args.results:
        try:
            report = read_json(path)
        except (OSError, ValueError) as error:
            raise Problem(f"--results {str(path)!r} cannot be read: {one_line(error)}") from error
        if report is None:
            raise Problem(f"--results {str(path)!r} is no file")
        reports.append(report)
    try:
        training = args.training.read_text(encoding="utf-8") if args.training else None
    except (OSError, ValueError) as error:
        raise Problem(f"--training {str(args.training)!r} cannot be read: {one_line(error)}") from error
    if (license := args.license or license_of(folder)) is None:
        raise Problem("--license is needed, such as mit: neither README.md nor training.json in the folder names one")
    facts = {name: getattr(args, name) for name in ("result_name", "base_model", "datasets", "hardware")}
    return {**facts, "license": license, "results": reports, "training": training}


def run(args: Namespace) -> list[str]:
    """Push, or with `--dry_run` only prepare, and return the lines to print."""
    folder = resolve_model(args.folder)
    try:
        left_out = [f"  left out: {name}" for name in select_files(folder)[1]]
        card = None if args.no_card else card_of(args, Path(folder))
        if args.dry_run:
            with prepare_folder(folder, not args.no_code) as stage:
                if card is not None:
                    add_card(stage, args.repo_id, args.tags, **card)
                paths = {path.relative_to(stage).as_posix(): path for path in stage.rglob("*") if path.is_file()}
                sizes = {name: path.stat().st_size for name, path in sorted(paths.items())}
                readme = paths["README.md"].read_text(encoding="utf-8") if "README.md" in paths else ""
            lines = [f"{len(sizes)} files, {sum(sizes.values()) / 1e6:.1f} MB, to {args.repo_id} in one commit:"]
            lines += [f"  {size:>12,}  {name}" for name, size in sizes.items()]
            left_out = [line for line in left_out if line.removeprefix("  left out: ") not in sizes]  # written anew
            shown = ["", "README.md:", *(f"  {line}".rstrip() for line in readme.splitlines()), ""] if readme else []
            return [*lines, *left_out, *shown, "the folder passes its load test; nothing was sent"]
        names = ("private", "token", "revision", "create_pr", "commit_message", "tags")
        options = {name: getattr(args, name) for name in names}
        told = push_folder(folder, args.repo_id, card=card, remote_code=not args.no_code, **options)
    except (HubError, OSError, ValueError) as error:
        raise Problem(one_line(error)) from error
    return [*left_out, f"done: {told.pr_url or told.commit_url}"]


def main(argv: list[str] | None = None) -> int:
    args = parse("push", argv)
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    return run_script(run, args)
