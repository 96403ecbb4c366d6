"""Name the arguments of the commands that convert, export and upload weights."""

from argparse import Namespace
from pathlib import Path

from ...utils.choices import SHIPPED, SIZES
from ..parsing import DTYPES, Parser, add_device, add_report, json_object, positive
from .images import TOKENIZER

DETOK = "jjiaweiyang/l-DeTok/detok-BB-gamm3.0-m0.7.pth"
EXPORT_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}


def add_info(parser: Parser) -> None:
    add = parser.add_argument
    what = "a name of weights or of a size, a folder (model, pipeline, latents, training, exported programs), "
    what += "a .safetensors or .json file, or a Hub id in the cache"
    add("what", metavar="MODEL|LATENTS|FILE", help=what)
    add("--size", type=positive, help="side in pixels of the image that FLOPs are counted for; about 256 unless given")
    add_report(parser)


def add_convert_checkpoint(parser: Parser) -> None:
    add = parser.add_argument
    sources = "a file (.safetensors, its .index.json, .pt, .pth, .bin) or a folder of safetensors or training states"
    add("checkpoint", type=Path, metavar="CHECKPOINT", help=sources)
    add("output", type=Path, metavar="OUTPUT", help="a folder that is new or empty; with --to_raw a new .safetensors")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--size", choices=SIZES, help="a named size; the one whose shapes fit unless given")
    model.add_argument("--config", type=Path, metavar="FILE", help="a config.json")
    add("--override", type=json_object, default={}, metavar="JSON", help="other values of the configuration")
    add("--scale_factors", type=positive, nargs="+", help="other scales, as 8 4 2 1; 1 for a single one")
    add("--ema", action="store_true", help="take the averaged weights")
    add("--dtype", choices=DTYPES, help="dtype of the weights; that of the checkpoint unless given")
    add("--shard_size", default="10GB", help="largest file of weights, as 5GB")
    add("--dry_run", action="store_true", help="check everything, write nothing")
    add("--to_raw", action="store_true", help="the way back: a folder to a .safetensors with the core's own names")
    add("--fused", action="store_true", help="with --to_raw: one projection for queries, keys and values")
    parser.needs(fused="to_raw")
    # The way back takes the folder as it is.
    parser.contradict("to_raw", "size", "config", "override", "scale_factors", "ema", "dtype", "shard_size")


def add_convert_detok(parser: Parser) -> None:
    add = parser.add_argument
    add("output", type=Path, metavar="OUTPUT", help="folder to write, as hieratok-b")
    add("--weights", default=DETOK, help="a .pth, .pt or .safetensors file, or owner/name/file on the Hub")
    add("--revision", help="branch, tag or commit of the Hub repository")
    add("--ema", action="store_true", help="take the averaged weights of a file that has both")
    data = (
        "images whose latents are brought to mean 0 and deviation 1, once and for all; left as they are unless given"
    )
    add("--data", nargs="+", help=data)
    add("--split", default="train", help="split of folders and data sets; data without splits is train")
    add("--max_images", type=positive, default=2048, help="most of them to take, from all over the data")
    add("--dtype", choices=DTYPES, default="float32", help="dtype of the weights that are written")
    add("--dry_run", action="store_true", help="check the weights and write nothing")
    add_device(parser)
    parser.needs(split="data", max_images="data", device="data")


def add_export(parser: Parser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=TOKENIZER)
    add("output", type=Path, metavar="OUTPUT", help="folder to write; must not be there yet, or be empty")
    formats = list(EXPORT_SUFFIXES)
    add("--format", nargs="+", choices=formats, help="kinds of programs; both unless given, of int8 onnx alone")
    add(
        "--parts", nargs="+", choices=("encoder", "decoder"), default=["encoder", "decoder"], help="parts of the model"
    )
    scales = "numbers of scales to make a decoder of each for, of smaller images; all scales alone unless given"
    add("--num_scales", type=positive, nargs="+", help=scales)
    dtype = "dtype of weights, inputs and outputs; of int8 the weights alone, and products with them"
    add("--dtype", choices=("float32", "float16", "int8"), default="float32", help=dtype)
    opset = "version of ONNX's operators: 18 is the most widely read, 23 is faster, with attention as one operator"
    add("--opset", type=int, choices=(18, 23), default=18, help=opset)
    images = "folders of images whose PSNR is compared; two images of the package unless given"
    add("--data", nargs="+", help=images)
    add("--max_images", type=positive, default=64, help="take only the first images of the data")
    add("--dry_run", action="store_true", help="say what would be written, and write nothing")

    def check(args: Namespace) -> None:
        if args.num_scales and "decoder" not in args.parts:
            parser.error("--num_scales needs the decoder among --parts")
        args.format = list(dict.fromkeys(args.format or (["onnx"] if args.dtype == "int8" else formats)))
        if args.dtype == "int8" and "torch" in args.format:
            parser.error("--dtype int8 needs --format onnx")

    parser.checks.append(check)
    parser.needs(max_images="data")


def add_push(parser: Parser) -> None:
    add = parser.add_argument
    add("folder", metavar="FOLDER", help=f"saved by either library, or one of {', '.join(SHIPPED)}")
    add("repo_id", metavar="REPO_ID", help="user/name, or name for your own; made if it is not there")
    add("--private", action="store_true", default=None, help="make a repository that is new a private one")
    add("--revision", help="a branch, made if it is not there; main unless given")
    add("--create_pr", action="store_true", help="open a pull request instead")
    add("--commit_message", help="message of the one commit; it names the model unless given")
    add("--token", help="token of the Hub; what `hf auth login` has stored unless given")
    add("--no_code", action="store_true", help="leave out the code that loads it without this package")
    add("--no_card", action="store_true", help="leave the model card as it is")
    results = "reports by --json of `hieratok evaluate`, or of a pipeline by `hieratok evaluate-generation`"
    add("--results", type=Path, nargs="+", default=[], help=f"{results}; their figures go into the card")
    add("--result_name", help="the model among several of a report")
    text = "licence of the weights, the Hub's identifier, as mit; needed unless README.md or training.json names one"
    add("--license", help=text)
    add("--base_model", help="Hub id of the model that training went on from")
    add("--datasets", nargs="+", default=[], help="Hub ids of the training data")
    add("--training", type=Path, help="a Markdown file about the training, for the card")
    add("--hardware", help="what the training ran on and for how long, for the card")
    add("--tags", nargs="+", default=[], help="further tags of the card")
    add("--dry_run", action="store_true", help="test the folder, print what would be sent, and send nothing")
    of_card = ("results", "result_name", "license", "base_model", "datasets", "training", "hardware", "tags")
    parser.contradict("no_card", *of_card)
    parser.needs(result_name="results")
