"""Decode an archive of latents to files with the names and the sizes of the images that it was made of."""

import hashlib
import json
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from tqdm import tqdm

from ..data.latent_archive import LatentArchive, decode_record
from ..data.latent_file import LatentFile
from ..models.autoencoder_adapter import Codec, load_codec
from ..utils.images import encode_image
from .command_line import autocast, find_device, load_or_explain
from .encode import enable_tiling
from .main import parse
from .outputs import check_writable, lies_in, write_or_explain
from .terminal import Problem, one_line, run_script, tell_failures

MARK = ".hieratok-decode"  # a file that is there as long as others are missing
OPTIONS = ("model", "num_scales", "format", "quality", "mixed_precision")  # those that decide what the files hold


def open_archive(args: Namespace) -> tuple[LatentArchive, Codec]:
    """Open the archive of `args.archive`, and the autoencoder that decodes it by `args.num_scales` scales or all."""
    kind = LatentFile if os.path.isfile(args.archive) else LatentArchive
    archive: LatentArchive = load_or_explain(kind, "ARCHIVE", str(args.archive))
    if not (name := args.model or archive.settings["model"]):
        raise Problem(f"--model is needed: ARCHIVE {str(args.archive)!r} names none")
    codec: Codec = load_or_explain(load_codec, "--model", name, find_device(args))
    try:
        archive.check_encoder(codec)
    except ValueError as error:
        raise Problem(f"--model {name!r} is not that of the latents: {one_line(error)}") from error
    if archive.settings["tiling"]:
        enable_tiling(codec)
    count = len(codec.core.config.scale_factors) if codec.core else 1
    is_free = codec.core is not None and codec.core.config.scale_causal
    if args.num_scales and not (args.num_scales <= count if is_free else args.num_scales == count):
        expected = f"from 1 to {count}" if is_free else f"{count}, all that the model has"
        raise Problem(f"--num_scales must be {expected}, got {args.num_scales}")
    if codec.core is None:
        args.num_scales = None
    return archive, codec


def name_files(names: Sequence[str], file_format: str) -> list[str]:
    """Name the files of images: as they were, or with the suffix of a format, added where two would be one."""
    if file_format == "keep":
        return list(names)
    suffixes = (".jpg", ".jpeg") if file_format == "jpeg" else (f".{file_format}",)
    paths = [PurePosixPath(name) for name in names]
    plain = [str(path if path.suffix.lower() in suffixes else path.with_suffix(suffixes[0])) for path in paths]
    counts = Counter(plain)
    taken = {new for name, new in zip(names, plain) if new == name}
    taken |= {str(parent) for path in paths for parent in path.parents}
    files = []
    for name, new in zip(names, plain):
        if new != name:
            new = name + suffixes[0] if counts[new] > 1 or new in taken else new
            while new in taken:
                new += suffixes[0]
            taken.add(new)
        files.append(new)
    return files


def run(args: Namespace) -> tuple[list[str], int]:
    """Write the files, and return the lines to print and the exit status, 1 where an image failed."""
    where = f"FOLDER {str(args.folder)!r}"
    if lies_in(args.folder, args.archive):
        raise Problem(f"{where} must not lie in ARCHIVE {str(args.archive)!r}")
    archive, codec = open_archive(args)
    paths = [args.folder / name for name in name_files([x.name for x in archive.records], args.format)]
    options = [archive.fingerprint, *(getattr(args, name) for name in OPTIONS)]
    mark, token = args.folder / MARK, hashlib.sha256(json.dumps(options).encode()).hexdigest().encode()
    try:
        is_own = mark.is_file() and mark.read_bytes() == token
        there = [path for path in paths if path.is_file()]
    except OSError as error:  # of a name that is too long, too
        raise Problem(f"{where} cannot be written: {one_line(error)}") from error
    for path in [mark, *paths]:
        if not lies_in(path, args.folder):
            raise Problem(f"{where}: {str(path)!r} leads out of it by a link")
        if os.path.lexists(path) and not path.is_file():
            raise Problem(f"{where}: {str(path)!r} cannot be written: it is no file")
    is_begun = is_own and not args.overwrite
    if there and not (is_own or args.overwrite):
        raise Problem(f"{where}: {str(there[0])!r} is there already: add --overwrite, or take another folder")
    bar = {"total": len(paths), "unit": "image", "dynamic_ncols": True, "leave": False}
    damage = f"ARCHIVE {str(args.archive)!r} cannot be read"
    try:  # all of it before anything is written, in little time beside that of decoding
        for _ in tqdm(archive.iterate_stored(), desc="checking", **bar):
            pass
    except (OSError, ValueError) as error:
        raise Problem(f"{damage}: {one_line(error)}") from error
    for folder in dict.fromkeys([args.folder, *(path.parent for path in paths)]):
        check_writable("FOLDER", folder, folder=True)
    if is_own or not there:
        write_or_explain("FOLDER", mark, token)
    else:  # what is there is not of this decoding, and after a kill nobody could tell
        mark.unlink(missing_ok=True)

    device = find_device(args)
    failures: dict[str, str] = {}
    made = 0
    try:
        for path, (record, latent) in tqdm(zip(paths, archive), **bar):
            if is_begun and path.is_file():  # it is whole, as all that this command writes
                continue
            try:
                with autocast(args, device):
                    image = decode_record(codec, record, latent, args.num_scales)
                content = encode_image(image, path.name, quality=args.quality)
            except (OSError, ValueError, RuntimeError, MemoryError) as error:  # torch lacks memory with a RuntimeError
                failures[record.name] = one_line(error)
            else:
                write_or_explain("FOLDER", path, content)
                made += 1
    except (OSError, ValueError) as error:
        raise Problem(f"{damage}: {one_line(error)}") from error
    if not failures:
        mark.unlink(missing_ok=True)  # another process may have decoded the rest
    tell_failures(failures)
    passed = len(paths) - made - len(failures)
    told = f"{made} images written to {str(args.folder)!r}, {passed} were there, {len(failures)} failed"
    return [told], 1 if failures else 0


def main(argv: list[str] | None = None) -> int:
    return run_script(run, parse("decode", argv))
