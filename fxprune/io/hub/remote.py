"""Folders on a hub, through ``huggingface_hub``: its endpoint, token and cache are those that it is set up with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fxprune.errors import InputError, WriteError, check_installed, first_line

_READ = ("*.json", "*.safetensors", "*.py", "*.md")


def check_repository(name: str) -> None:
    """Refuse what cannot be the name of a repository, before anything is sent.

    Raises:
        InputError: it is none, or ``huggingface_hub`` is not installed.
    """
    check_installed("hub", "huggingface_hub")
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"push_to_hub={name!r} is no name of a repository, such as 'user/name': {error}") from None


def upload(folder: Path, files: Sequence[str], name: str, private: bool) -> None:
    """Send files of a folder, in one commit; the repository is made if it is not there.

    Raises:
        WriteError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        message = "A network pruned by fxprune"
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=[*files], commit_message=message)
    except Exception as error:  # of the network, of the hub, of the library's checks
        raise WriteError(
            f"{name!r} could not be sent to the hub: {_said(error)}. The folder {str(folder)!r} is complete."
        ) from error


def download(name: str, revision: str | None) -> Path:
    """The folder in the cache where the files of a repository are.

    Raises:
        InputError: the hub cannot be reached, or has none of that name.
    """
    check_installed("hub", "huggingface_hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*_READ]))
    except Exception as error:
        raise InputError(f"there is no folder {name!r}, and the hub does not give one: {_said(error)}") from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
