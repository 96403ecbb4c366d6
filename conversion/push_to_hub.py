"""Upload a saved tokenizer or pipeline to the Hugging Face Hub, tested first and in one commit."""

import argparse
import sys
from pathlib import Path
from typing import Any

import diffusers
import transformers

from hieratok_hf.cli.command_line import Problem, make_parser, one_line, refuse_unused, run_script
from hieratok_hf.hub.folder import add_card, prepare_folder, select_files
from hieratok_hf.hub.push import HubError, push_folder
from hieratok_hf.shipped import SHIPPED, resolve_model
from hieratok_hf.utils.files import read_json


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("folder", help=f"saved by either library, or one of {', '.join(SHIPPED)}")
    add("repo_id", help="user/name, or name for your own; made if it is not there")
    add("--private", action="store_true", default=None, help="of a repository that is made")
    add("--revision", help="a branch, made if it is not there (main)")
    add("--create_pr", action="store_true", help="open a pull request instead")
    add("--commit_message", help="message of the one commit; it names the model unless given")
    add("--token", help="of the Hub; what `hf auth login` has stored unless given")
    add("--no_code", action="store_true", help="leave out the code that loads it without this package")
    add("--no_card", action="store_true", help="leave the model card as it is")
    results = "reports by --json of examples/evaluate_tokenizer.py, of a pipeline by examples/evaluate_generation.py"
    add("--results", type=Path, nargs="+", default=[], help=f"{results}; their figures go into the card")
    add("--result_name", help="the model among several of a report")
    add("--license", default="apache-2.0", help="of the weights, the Hub's identifier (apache-2.0)")
    add("--base_model", help="Hub id of the model that training went on from")
    add("--datasets", nargs="+", default=[], help="Hub ids of the training data")
    add("--training", type=Path, help="a Markdown file about the training, for the card")
    add("--hardware", help="what the training ran on and for how long, for the card")
    add("--tags", nargs="+", default=[], help="further tags of the card")
    add("--dry_run", action="store_true", help="test the folder, print what would be sent, and send nothing")
    args = parser.parse_args(argv)
    of_card = ("results", "result_name", "license", "base_model", "datasets", "training", "hardware", "tags")
    if args.no_card and (given := [name for name in of_card if getattr(args, name) != parser.get_default(name)]):
        parser.error(f"--no_card and --{given[0]} contradict each other")
    refuse_unused(parser, args, result_name="results")
    return args


def card_of(args: argparse.Namespace) -> dict[str, Any]:
    """Collect what the options say for the model card."""
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
    return {
        "results": reports,
        "result_name": args.result_name,
        "license": args.license,
        "base_model": args.base_model,
        "datasets": args.datasets,
        "training": training,
        "hardware": args.hardware,
    }


def run(args: argparse.Namespace) -> list[str]:
    """Push, or with `--dry_run` only prepare, and return the lines to print."""
    folder = resolve_model(args.folder)
    card = None if args.no_card else card_of(args)
    try:
        left_out = [f"  left out: {name}" for name in select_files(folder)[1]]
        if args.dry_run:
            with prepare_folder(folder, not args.no_code) as stage:
                if card is not None:
                    add_card(stage, args.repo_id, args.tags, **card)
                paths = {path.relative_to(stage).as_posix(): path for path in stage.rglob("*") if path.is_file()}
                sizes = {name: path.stat().st_size for name, path in sorted(paths.items())}
            lines = [f"{len(sizes)} files, {sum(sizes.values()) / 1e6:.1f} MB, to {args.repo_id} in one commit:"]
            lines += [f"  {size:>12,}  {name}" for name, size in sizes.items()]
            left_out = [line for line in left_out if line.removeprefix("  left out: ") not in sizes]  # written anew
            return [*lines, *left_out, "the folder passes its load test; nothing was sent"]
        told = push_folder(
            folder,
            args.repo_id,
            private=args.private,
            token=args.token,
            revision=args.revision,
            create_pr=args.create_pr,
            commit_message=args.commit_message,
            tags=args.tags,
            card=card,
            remote_code=not args.no_code,
        )
    except (HubError, OSError, ValueError) as error:
        raise Problem(one_line(error)) from error
    return [*left_out, f"done: {told.pr_url or told.commit_url}"]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    return run_script(run, args)


if __name__ == "__main__":
    sys.exit(main())
