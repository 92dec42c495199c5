"""Models of the Hugging Face Hub by name: download to the local cache."""

from __future__ import annotations

import fcntl
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors

TIMEOUT = 10
"""Seconds to wait for the first answer of the Hub."""


def is_hub_name(path: Path) -> bool:
    """Return whether a path that does not exist is the name of a model on the Hub, such as `Qwen/Qwen3-0.6B`.

    If the first part is a folder here, a path is meant: `runs/llama3-tiny` before the run has started.
    """
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(path))) and not path.parent.exists()


@cache
def download(name: str, patterns: tuple[str, ...]) -> Path:
    """Download the files of a Hub model that match `patterns` to the cache of huggingface_hub; return their directory.

    Processes of one machine take turns: the first one downloads, the others find the files in the cache.

    Raises:
        ValueError: if there is no such model, no permission or no connection; the message says what to do.
    """
    try:
        with _turn():
            return Path(_find(name, allow_patterns=list(patterns), ignore_patterns=["*/*", "consolidated*"]))
    except Exception as error:  # connections fail with the errors of several libraries
        raise ValueError(f"{name} is no directory here, and {_reason(name, error)}") from error


def _find(name: str, **options: Any) -> str:
    """Return the directory of the newest files of a model; without a connection, of those that are in the cache."""
    try:
        huggingface_hub.HfApi().model_info(name, timeout=TIMEOUT)  # `snapshot_download` waits forever for an answer
    except errors.HfHubHTTPError:
        raise
    except Exception:
        with suppress(Exception):
            return huggingface_hub.snapshot_download(name, local_files_only=True, **options)
        raise
    return huggingface_hub.snapshot_download(name, **options)


@contextmanager
def _turn() -> Iterator[None]:
    """Wait until no other process of this machine downloads."""
    directory = Path(constants.HF_HUB_CACHE)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".sightline.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, or the process ends
        yield


def _reason(name: str, error: Exception) -> str:
    """Return why a download failed, and what to do, as the end of a sentence."""
    if isinstance(error, errors.GatedRepoError):
        return (
            f"on the Hugging Face Hub it is gated: accept its terms on https://huggingface.co/{name}, run `hf auth "
            "login`, and try again"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "the Hugging Face Hub has no model of that name: check the spelling; if the model is private, run `hf auth "
            "login`"
        )
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return (
        f"it cannot be downloaded from the Hugging Face Hub ({reason}). On a machine with a connection, run "
        f"`hf download {shlex.quote(name)} --local-dir DIRECTORY`, then use DIRECTORY in place of the name"
    )
