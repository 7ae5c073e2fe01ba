"""Folders of the Hugging Face hub, by `hub:OWNER/NAME` or `hub:OWNER/NAME@REVISION`."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deltune.errors import StoreError

HUB = "hub:"
_NAME = r"[\w.-]+(/[\w.-]+)?"


def local(place: str | Path, files: Iterable[str]) -> Path:
    """The folder of a place: of one on the hub these files alone are fetched, once.

    Raises:
        StoreError: no such repository or revision, no access, no network.
    """
    if not isinstance(place, str) or not place.startswith(HUB):
        return Path(place)
    repo, at, revision = place.removeprefix(HUB).partition("@")
    if not re.fullmatch(_NAME, repo) or (at and not revision):
        raise StoreError(
            f"`{place}` is no place on the hub; write `hub:OWNER/NAME` or "
            "`hub:OWNER/NAME@REVISION`, or the path of a folder"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=[*files]))
    except Exception as error:  # the hub's, of requests and of the disk
        raise StoreError(
            f"`{place}` could not be fetched ({type(error).__name__}: {_first(error)}); check the "
            "name, the network, and for a private repository `hf auth login`"
        ) from error


def called(place: str | Path, revision: str | None = None) -> str | Path:
    """What transformers calls a model, a folder or `OWNER/NAME` on the hub, as a place.

    Raises:
        StoreError: a revision of a folder.
    """
    text = str(place)
    if not Path(place).exists() and not text.startswith(HUB) and re.fullmatch(_NAME, text):
        text = HUB + text
    if revision is None:
        return text if text.startswith(HUB) else place
    if not text.startswith(HUB) or "@" in text:
        raise StoreError(
            f"`{place}` is a folder or has its revision, and revision={revision!r} is asked for; "
            "give `OWNER/NAME` with a revision, or a folder without"
        )
    return f"{text}@{revision}"


def push(
    folder: Path, repo: str, *, private: bool | None, revision: str | None, message: str,
    token: str | None,
) -> str:  # fmt: skip
    """Uploads a folder, making the repository if there is none; the address of the commit.

    Raises:
        StoreError: no access, no network, a name that cannot be.
    """
    from huggingface_hub import HfApi

    try:
        api: Any = HfApi(token=token)
        made = api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(made.repo_id, branch=revision, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=made.repo_id, folder_path=folder, commit_message=message, revision=revision
            )
        )
    except Exception as error:  # the hub's, of requests and of the disk
        raise StoreError(
            f"nothing was pushed to `{repo}` ({type(error).__name__}: {_first(error)}); the delta "
            "is as it was: check the name, the network, and `hf auth login`"
        ) from error


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no more is said"
