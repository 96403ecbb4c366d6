"""One folder for both libraries: one name for the weights, one `config.json`, and the way to the Hub."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any, TypeVar

from filelock import FileLock
from huggingface_hub import constants, is_offline_mode
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import safe_open

from ..utils.choices import QUANTIZER_FILE, TRAINING_FILE
from ..utils.files import name_when_full, read_json
from .configuration_hieratok import HieraTokConfig, complete_saved, pipeline_hint
from .saved_code import OWN_CODE, add_code, to_json

__all__ = [
    "BACKBONE",
    "WEIGHTS_STEM",
    "HubUploadMixin",
    "check_indices",
    "check_kind",
    "finish_save",
    "index_for_transformers",
    "link_or_copy",
    "load_whole",
    "name_in_errors",
    "share_between_libraries",
    "stage_folder",
    "stale_weights",
    "variant_of",
]

WEIGHTS_STEM = "diffusion_pytorch_model"
"""How names of weights begin: diffusers looks for no other, and transformers takes any that an index of its names."""

BACKBONE = "HieraTokBackbone"
"""The class in the `architectures` of a `config.json` whose weights are the encoder alone."""

_TRANSFORMERS_STEM = "model"
_WEIGHTS = re.compile(rf"({_TRANSFORMERS_STEM}|{WEIGHTS_STEM})([.-].*)?\.(safetensors|bin)(\.index(\..*)?\.json)?")
_LAST = ("config.json", "model_index.json")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")

# What a save has beside the files of a folder: all that is written but not whole, then whole, then on its way. Nobody
# else may have such names, because what bears them is moved or deleted.
_STAGE, _WHOLE, _MOVING = ".hieratok-saving-", ".hieratok-saved", ".hieratok-moving"
_LOCK = ".hieratok-saving.lock"
_ATTEMPTS = 10

AnyPath = TypeVar("AnyPath", bound=PurePath)
Loaded = TypeVar("Loaded")


class HubUploadMixin:
    """Save and upload, the only way up to `hieratok_hf.hub` from the models and the pipeline."""

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """
        Upload the model or the pipeline, a model card and the code that loads it without the package, in one commit.

        The arguments, results and errors are those of `hieratok_hf.hub.push.push_model`.
        """
        from ..hub.push import push_model

        return push_model(self, repo_id, **kwargs)

    @contextmanager
    def _stage_and_push(self, folder: str | os.PathLike[str], arguments: dict[str, Any]) -> Iterator[Path]:
        """Stage a save as `stage_folder` does, take what concerns a push out of its `arguments`, and push if asked."""
        names = ("repo_id", "commit_message", "private", "create_pr", "token")
        hub_arguments = {name: arguments.pop(name) for name in names if name in arguments}
        is_pushed = arguments.pop("push_to_hub", False)
        _check_names(arguments)
        if arguments.get("variant"):
            hub_arguments["variant"] = arguments["variant"]
        with stage_folder(folder) as stage:
            yield stage
            if OWN_CODE is not None:
                add_code(stage, OWN_CODE.read_text(encoding="utf-8"))
        if is_pushed:
            self.push_to_hub(**{"repo_id": Path(folder).resolve().name, **hub_arguments})


def _check_names(arguments: dict[str, Any]) -> None:
    """Raise `ValueError` for a `variant` or `max_shard_size` that no file can have; a size of `None` is the usual."""
    variant = arguments.get("variant")
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"[\w-]+", variant)):
        raise ValueError(f"`variant` must be None or a name of letters, digits, '_' and '-', got {variant!r}.")
    if arguments.get("max_shard_size") is None:
        arguments.pop("max_shard_size", None)
    elif not re.fullmatch(r"0*[1-9]\d*|[\d.]*[1-9][\d.]*\s*[kmgtKMGT][bB]", str(arguments["max_shard_size"])):
        given = arguments["max_shard_size"]
        raise ValueError(f"`max_shard_size` must be a positive number of bytes, or text such as '5GB', got {given!r}.")


@contextmanager
def stage_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """
    Give a temporary folder whose files take the place of those of `folder` once the block has ended well.

    Weights that an earlier save left behind go. If the block raises or the process dies in it, `folder` is as it was,
    there or not; if the process dies later, the next save or `load_whole` ends what it began. Saves of several
    processes wait for each other.

    Raises:
        OSError: The folder cannot be written, or the disk is full.
        ValueError: `folder` is empty text, no path or a file, or has a folder in the place of a file.
    """
    if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
        raise ValueError(f"`save_directory` must name a folder, got {folder!r}.")
    target = Path(folder)
    if target.is_file():
        raise ValueError(f"`save_directory` must be a folder, got the file {str(target)!r}.")
    existed = target.is_dir()
    target.mkdir(parents=True, exist_ok=True)
    try:
        with name_when_full(target), _alone(target):
            for killed in filter(_is_own, target.glob(f"{_STAGE}*")):  # to remove a pipe would wait for ever
                shutil.rmtree(killed, ignore_errors=True)
            stage = Path(tempfile.mkdtemp(prefix=_STAGE, dir=target))
            try:
                yield stage
                _make_ready(stage, target)
                stage.rename(target / _WHOLE)
            except BaseException:
                shutil.rmtree(stage, ignore_errors=True)
                raise
            _put_in_place(target)
    finally:
        if not existed and not any(target.iterdir()):
            target.rmdir()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep every other save from a folder until the block or the process ends, after the last one is complete."""
    with FileLock(folder / _LOCK):
        try:
            _put_in_place(folder)
            yield
        finally:
            (folder / _LOCK).unlink(missing_ok=True)


def _make_ready(stage: Path, target: Path) -> None:
    """Write files of a stage through to the disk, each with the permissions of the file that it replaces."""
    probe = stage / _LOCK  # safetensors hides its own files from all other users
    probe.touch()
    usual = probe.stat().st_mode
    probe.unlink()
    for name in _files(stage):
        place = target / name
        if place.is_dir() or (place.parent.exists() and not place.parent.is_dir()):
            raise ValueError(f"`save_directory` must have room for the file {str(name)!r}, got a folder at its place.")
        with (stage / name).open("rb") as file:
            os.fsync(file.fileno())
        (stage / name).chmod((place.stat().st_mode if place.is_file() else usual) & 0o777)


def _files(folder: Path) -> list[Path]:
    """List files in a folder as paths relative to it, in the order of their moves: what names others comes last."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(paths, key=lambda path: (_LAST.index(path.name) if path.name in _LAST else -1, _is_index(path)))


def _is_index(path: PurePath) -> bool:
    return ".index" in path.suffixes


def _is_own(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink()


def _put_in_place(folder: Path) -> None:
    """Go on from wherever a save stands that has written everything, until all of it is in its place."""
    whole, moving = folder / _WHOLE, folder / _MOVING
    if _is_own(whole):
        new = _files(whole)
        there = [
            path.relative_to(folder)
            for part in {path.parent for path in new}
            for path in (folder / part).glob("*")
            if not _is_own(path)  # a folder is nothing that a save wrote
        ]
        # Without an index, nobody takes new shards and old ones for one model.
        old = [*filter(_is_index, new), *stale_weights(there, new)]
        for path in sorted(old, key=_is_index, reverse=True):
            (folder / path).unlink(missing_ok=True)
        whole.rename(moving)
    if _is_own(moving):
        for path in _files(moving):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(moving / path, folder / path)
        shutil.rmtree(moving)


def finish_save(folder: Path) -> None:
    """
    End a save to a folder that was killed after everything was written and before all of it was in its place.

    Raises:
        OSError: The folder cannot be written.
        ValueError: A part of the folder is a symbolic link, which may lead anywhere.
    """
    killed = [folder / name for name in (_WHOLE, _MOVING) if _is_own(folder / name)]
    parts: set[Path] = set()
    for stage in killed:
        with suppress(FileNotFoundError):  # another process ends it at this moment
            parts |= {folder / part for path in _files(stage) for part in list(path.parents)[:-1]}
    if links := [part for part in parts if part.is_symlink()]:
        raise ValueError(f"{str(folder)!r} holds a save that was killed, and {str(links[0])!r} is a symbolic link.")
    if not killed:
        return
    try:
        with _alone(folder):
            pass
    except OSError as error:
        raise OSError(
            f"{str(folder)!r} holds a save that was killed half way, and cannot be written to end it: {error}"
        ) from error


def load_whole(name_or_path: str | os.PathLike[str], subfolder: str | None, load: Callable[[], Loaded]) -> Loaded:
    """
    Load a folder as one save left it: end one that was killed, and load again where another one came between.

    Raises:
        OSError: `finish_save` raises it, or the folder is saved to all the time.
        ValueError: `name_or_path` is no path or empty, or `finish_save` raises it.
    """
    if not isinstance(name_or_path, (str, os.PathLike)) or not os.fspath(name_or_path):
        raise ValueError(
            f"`pretrained_model_name_or_path` must name a folder or a repository of the Hub, got {name_or_path!r}."
        )
    folder = Path(name_or_path, subfolder or "")
    for attempt in range(_ATTEMPTS):
        for place in (folder, folder.parent):
            finish_save(place)
        with ExitStack() as locks:
            # Saves to a model's folder and to its pipeline's wait, where this process may write.
            for place in (folder.parent, folder) if attempt else ():
                if any((place / name).is_file() for name in _LAST) and os.access(place, os.W_OK):
                    locks.enter_context(_alone(place))
            before = _stamps(folder)
            try:
                loaded = load()
            except Exception:
                if _stamps(folder) == before:
                    raise
            else:
                if _stamps(folder) == before:
                    return loaded
    raise OSError(f"{str(folder)!r} changed each of {_ATTEMPTS} times that it was loaded.")


def _stamps(folder: Path) -> set[tuple[Path, int, int]]:
    """Tell files of weights and configurations from those that another save puts in their place."""
    stamps = set()
    for path in (*folder.glob("*"), *folder.glob("[!.]*/*")):  # stages of saves come and go
        if path.name in (*_LAST, QUANTIZER_FILE) or _WEIGHTS.fullmatch(path.name):
            with suppress(FileNotFoundError):
                stat = path.stat()
                stamps.add((path, stat.st_ino, stat.st_mtime_ns))
    return stamps


def stale_weights(there: Iterable[AnyPath], written: Iterable[AnyPath]) -> list[AnyPath]:
    """
    Find what a save which wrote `written` makes obsolete: weights beside it of the same variant, and levels of latents
    and the record of a training beside weights, or a pipeline, that have none.
    """
    there, new = list(there), set(written)
    weights = {path for path in new if _WEIGHTS.fullmatch(path.name)}
    replaced = {(path.parent, variant_of(path.name)) for path in weights}
    others = [path for path in there if _WEIGHTS.fullmatch(path.name) and path not in weights]
    stale = [path for path in others if (path.parent, variant_of(path.name)) in replaced]
    folders = {path.parent for path in new if path in weights or path.name == "model_index.json"}
    facts = [path for path in there if path.name in (QUANTIZER_FILE, TRAINING_FILE) and path not in new]
    return stale + [path for path in facts if path.parent in folders]


def variant_of(name: str) -> str:
    """Read `"fp16"` in `model.fp16-00001-of-00002.safetensors`, `model.safetensors.index.fp16.json`, and else `""`."""
    name = _SHARD.sub("", name).removesuffix(".json")
    name = name.replace(".safetensors", "").replace(".bin", "").replace(".index", "")
    return name.partition(".")[2]


@contextmanager
def name_in_errors(name_or_path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an `OSError` of a model that is neither a folder nor to be had from the Hub name it and the way out."""
    try:
        yield
    except OSError as error:
        if Path(name_or_path).is_dir():
            raise
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, HfHubHTTPError):
            cause = cause.__cause__ or cause.__context__
        if is_offline_mode():
            todo = "Unset HF_HUB_OFFLINE once to download it"
        elif isinstance(cause, GatedRepoError):
            todo = f"Ask for access at {constants.ENDPOINT}/{name_or_path} and log in with `hf auth login`"
        elif isinstance(cause, RepositoryNotFoundError | RevisionNotFoundError):
            todo = "Check its name and `revision`, and log in with `hf auth login` if it is private"
        else:
            todo = "Connect to the internet once to download it"
        raise OSError(
            f"Could not load {str(name_or_path)!r}: it is neither a local folder nor available from the Hub. {todo}, "
            f"set HF_HOME to an existing cache, or pass a folder. Original error: {cause or error}"
        ) from error


def check_kind(folder: Path, needs_config: bool = True, needs_decoder: bool = True) -> None:
    """
    Check the `config.json` of a folder before a library reads it, and leave what is no folder to the libraries.

    Raises:
        OSError: There is none, or it is no JSON object.
        ValueError: It is that of another architecture, or of a backbone where a decoder is needed.
    """
    path = folder / "config.json"
    if path.is_file():
        try:
            values = read_json(path)
        except (ValueError, RecursionError) as error:
            raise OSError(f"{str(path)!r} must be a JSON object: {error}") from error
        made_for = complete_saved(values or {}).get("architectures")
        if needs_decoder and made_for == [BACKBONE]:
            raise ValueError(
                f"{str(folder)!r} must hold a whole model, got a backbone, without a decoder: load it by {BACKBONE}, "
                f"or pass the whole model's folder, of which {BACKBONE}.from_pretrained takes what it needs."
            )
    elif folder.is_dir() and needs_config:
        raise OSError(f"{str(folder)!r} has no config.json{pipeline_hint(folder)}.")


def check_indices(folder: Path) -> None:
    """
    Check the indices of weights in a folder before a library opens what they name.

    Raises:
        OSError: One is no JSON object, or names a file that is not there.
        ValueError: One names no files, or a file elsewhere.
    """
    for path in folder.glob("*.safetensors.index*.json"):
        try:
            weight_map = (read_json(path) or {}).get("weight_map")
        except (ValueError, RecursionError) as error:
            raise OSError(f"{str(path)!r} must be a JSON object: {error}") from error
        names = [*weight_map.values()] if isinstance(weight_map, dict) else []
        for name in dict.fromkeys(map(repr, names)) or ["nothing"]:
            if not re.fullmatch(r"'[^\\/:]+\.safetensors'", name):
                raise ValueError(f"{str(path)!r} must name files beside it, got {name}.")
            if not (folder / name[1:-1]).is_file():
                raise OSError(f"{str(path)!r} names {name}, which is not there.")


def share_between_libraries(stage: Path, config: HieraTokConfig, for_transformers: bool = False) -> None:
    """
    Turn what either library has saved to `stage` into the folder that both load.

    Weights get the name that diffusers looks for, transformers finds them as `index_for_transformers` says (with
    `keep_own_name` where `for_transformers`), and `config.json` gets the keys of both, with the values of `config`.
    """
    for path in sorted(stage.glob(f"{_TRANSFORMERS_STEM}*.safetensors*")):
        renamed = path.rename(stage / _for_diffusers(path.name))
        if path.suffix == ".json":
            index = json.loads(renamed.read_text())
            index["weight_map"] = {key: _for_diffusers(name) for key, name in index["weight_map"].items()}
            renamed.write_text(to_json(index))

    from diffusers import __version__  # which takes half a second, and loading a model needs it not

    index_for_transformers(stage, keep_own_name=for_transformers)
    config_path = stage / "config.json"
    if not config_path.exists():
        return
    plain = config.to_dict()
    merged = {
        **json.loads(config_path.read_text()),
        **{key: plain[key] for key in (*config.model_fields, "model_type", "transformers_version")},
        **config.pipeline_facts,
        "architectures": ["HieraTokModel"],
        "_class_name": "AutoencoderHieraTok",
        "_diffusers_version": __version__,
    }
    # The files say their own names; a second place could only disagree. So would the dtype of one of several variants.
    has_variant = any(variant_of(path.name) for path in stage.glob(f"{WEIGHTS_STEM}*"))
    # Code that stays where the model came from is not named.
    for key in ("transformers_weights", "_name_or_path", "auto_map", *(["dtype"] if has_variant else [])):
        merged.pop(key, None)
    config_path.write_text(to_json(merged))


def index_for_transformers(folder: Path, keep_own_name: bool = False) -> None:
    """
    Let transformers find the weights that have diffusers' names in a folder, through an index.

    With `keep_own_name`, weights in one file get transformers' own name instead, for other tools that look for it.
    """
    indices = {path.name: read_json(path) for path in folder.glob(f"{WEIGHTS_STEM}.safetensors.index*.json")}
    for path in folder.glob(f"{WEIGHTS_STEM}*.safetensors"):
        if _SHARD.search(path.name):
            continue
        second_name = folder / (_TRANSFORMERS_STEM + path.name.removeprefix(WEIGHTS_STEM))
        if keep_own_name:
            link_or_copy(path, second_name)
        else:
            second_name.unlink(missing_ok=True)
            with safe_open(path, "pt") as weights:
                index = {"metadata": {}, "weight_map": dict.fromkeys(weights.keys(), path.name)}
            variant = f".{variant_of(path.name)}" if variant_of(path.name) else ""
            indices[f"{WEIGHTS_STEM}.safetensors.index{variant}.json"] = index
    for name, found in indices.items():
        alias = folder / (_TRANSFORMERS_STEM + name.removeprefix(WEIGHTS_STEM))
        alias.write_text(to_json(found))


def link_or_copy(path: Path, target: Path) -> None:
    """Give a file a second name where the file system has such, and copy it where not."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def _for_diffusers(name: str) -> str:
    return WEIGHTS_STEM + name.removeprefix(_TRANSFORMERS_STEM)
