"""Upload of a model or a pipeline to the Hugging Face Hub: tested first, in one commit, nothing half."""

import contextlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, is_offline_mode
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..models.autoencoder_hieratok import AutoencoderHieraTok
from ..models.core import has_adapters
from ..models.image_processing_hieratok import HieraTokImageProcessorPil
from ..models.saving import stale_weights
from .folder import add_card, prepare_folder
from .scratch import scratch_folder

__all__ = ["HubError", "push_folder", "push_model"]

# The HTTP client's own base class of errors, of whichever client huggingface_hub uses.
_HTTP_ERRORS: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, RuntimeError)


class HubError(Exception):
    """Say why an upload did not happen, and what to do."""


def push_model(
    model: Any,
    repo_id: str,
    *,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    safe_serialization: bool = True,
    subfolder: str | None = None,
    commit_message: str | None = None,
    **upload: Any,
) -> CommitInfo:
    """
    Save a `HieraTokModel`, an `AutoencoderHieraTok` or a `HieraTokDiTPipeline` and push the folder.

    Args:
        model: One of the three.
        variant, max_shard_size (*optional*): Arguments of `save_pretrained`.
        safe_serialization (`bool`, defaults to `True`): Nothing but safetensors is pushed.
        subfolder (`str`, *optional*): Folder for a part of a pipeline; it gets neither card nor code.
        repo_id, commit_message, upload: Arguments of `push_folder`, which also says what it returns.

    Raises:
        ValueError: `safe_serialization` is `False`, or the tokenizer has adapters.
        HubError: The Hub refused, or could not be reached; the repository is as it was.
    """
    if not safe_serialization:
        raise ValueError("`safe_serialization` must be True: only safetensors are pushed.")
    tokenizer = model.vae if isinstance(model, DiffusionPipeline) else model
    if has_adapters(tokenizer):
        raise ValueError("The tokenizer has adapters: fuse them and unload them, or delete them, and push then.")
    with scratch_folder() as folder:
        if isinstance(model, DiffusionPipeline):
            model.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
        else:
            vae = model if isinstance(model, AutoencoderHieraTok) else AutoencoderHieraTok.from_core(model.core)
            vae.quantizer = model.quantizer
            vae.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
            HieraTokImageProcessorPil(size_divisor=vae.config.patch_size).save_pretrained(folder)
        if subfolder:
            upload |= {"subfolder": subfolder, "card": None, "remote_code": False}
        return push_folder(
            folder, repo_id, commit_message=commit_message or f"Upload {type(model).__name__}", **upload
        )


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    subfolder: str | None = None,
    tags: Sequence[str] | None = None,
    card: Mapping[str, Any] | None = MappingProxyType({}),
    remote_code: bool = True,
) -> CommitInfo:
    """
    Upload a saved folder in one commit, after it has passed its own load test.

    Files that the Hub has already, such as those of an upload that broke off, are not sent again. Weights of an
    earlier push that this one replaces are removed in the same commit; the folder itself is not changed. What goes and
    what stays, `hieratok_hf.hub.folder.select_files` tells.

    Args:
        folder (`str` or `os.PathLike`): A saved tokenizer or pipeline.
        repo_id (`str`): `"user/name"`, or `"name"` for one's own; it is made if it is not there.
        private (`bool`, *optional*): Whether a repository that is made is private.
        token (`str` or `bool`, *optional*): Token of the Hub; the one that `hf auth login` stored unless given.
        revision (`str`, *optional*): A branch, made of `"main"` if it is not there, or the `"refs/pr/1"` of a pull
            request; `"main"` unless given. A commit cannot be changed, so its id is refused.
        create_pr (`bool`, defaults to `False`): Open a pull request instead.
        commit_message, commit_description (`str`, *optional*): Title and text of the commit.
        subfolder (`str`, *optional*): Folder of the repository that the files go to.
        tags (`Sequence[str]`, *optional*): Further tags of the model card.
        card (`Mapping`, *optional*): Further arguments of `hieratok_hf.hub.card.model_card`; `None` for no card. The
            README.md of the folder, or else of the repository, keeps its text.
        remote_code (`bool`, defaults to `True`): Add the code that loads it without the package.

    Returns:
        `CommitInfo`: What the Hub says of the commit, a `str` with its URL.

    Raises:
        ValueError: `folder` is no saved tokenizer or pipeline, does not pass its load test, or has a link out of it in
            the place of a file; or `repo_id`, `revision`, `subfolder` or the card is wrong.
        HubError: The Hub refused, could not be reached, or got another push at the same time; no file of the
            repository has changed.
    """
    api, root = HfApi(token=token), PurePosixPath(subfolder or "")
    if repo_id is None:  # which `validate_repo_id` lets pass
        raise ValueError("`repo_id` must be 'user/name' or 'name', got None.")
    validate_repo_id(repo_id)
    if revision is not None and (not revision or re.fullmatch(r"[0-9a-f]{40}", revision)):
        raise ValueError(f"`revision` must be a branch, which a commit can be added to, got {revision!r}.")
    if root.is_absolute() or ".." in root.parts:
        raise ValueError(f"`subfolder` must be a folder in the repository, got {subfolder!r}.")
    with prepare_folder(folder, remote_code) as stage:
        if card is not None:
            has_own = (stage / "README.md").exists()
            add_card(stage, repo_id, tags or (), **card)  # what is wrong with it is told before anything is made
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not create_pr and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            head = api.model_info(repo_id, revision=revision)
            if card is not None and not has_own:
                (stage / "README.md").unlink()
                # The cache may be one that cannot be written.
                with scratch_folder() as cache, contextlib.suppress(EntryNotFoundError):
                    path = api.hf_hub_download(repo_id, "README.md", revision=head.sha, cache_dir=cache)
                    shutil.copyfile(path, stage / "README.md")
                add_card(stage, repo_id, tags or (), **card)
            files = {root / path.relative_to(stage).as_posix(): path for path in stage.rglob("*") if path.is_file()}
            there = [PurePosixPath(file.rfilename) for file in head.siblings or ()]
            # `upload_folder`, which also deletes, makes several commits where hf_xet is installed.
            operations: list[Any] = [CommitOperationAdd(str(name), path) for name, path in files.items()]
            operations += [CommitOperationDelete(str(name)) for name in stale_weights(there, files)]
            return api.create_commit(
                repo_id,
                operations,
                commit_message=commit_message or f"Upload {subfolder or Path(folder).resolve().name}",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=head.sha,  # or what somebody else pushes meanwhile would be mixed with this
            )
        except _HTTP_ERRORS as error:
            raise HubError(_advice(error, repo_id)) from error


def _advice(error: BaseException, repo_id: str) -> str:
    """Say in one line what went wrong, and what to do."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) and cause.response is not None else None
    what = " ".join(str(cause or error).split()) or type(error).__name__
    if is_offline_mode():
        todo = "HF_HUB_OFFLINE is set: unset it"
    elif isinstance(cause, GatedRepoError):
        todo = f"ask for access at {constants.ENDPOINT}/{repo_id}"
    elif status in (401, 403) or isinstance(cause, RepositoryNotFoundError):
        todo = "log in with `hf auth login`, or give a token that may write there"
    elif status in (409, 412):
        todo = "somebody else pushed at the same time: push again"
    elif status is None or status == 429 or status >= 500:
        todo = "push again: files that have arrived are not sent twice"
    else:
        todo = "nothing was changed"
    return f"{repo_id!r} was not pushed: {what} ({todo})."
