"""Check a run before its first step, and open the files that it starts from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from sightline.config import DataConfig, LoggingConfig, Run
from sightline.data import SYNTHETIC_IMAGES, Documents, Tokenizer, is_dataset, load_documents, load_tokenizer
from sightline.data.synthetic_images import check_images
from sightline.data.tokenizer import check_vocab_size
from sightline.models import build_skeleton, family_of
from sightline.models.hf.directory import check_pretrained
from sightline.parallel.checks import check_run
from sightline.parallel.host import HostGroup
from sightline.training.metrics import check_wandb
from sightline.training.nested import flatten
from sightline.training.run_directory import settings
from sightline.training.same_on_all_ranks import check_same, versions


def check_start(run: Run, device: torch.device, host: HostGroup) -> str | None:
    """Check all that can be checked before a file is read or a process group is made. All ranks call this.

    Returns the attention backend of all ranks if it depends on the machine and not on the masks: on a CPU; else None.

    Raises:
        ValueError: if ranks differ in versions or options, or the run cannot work on this mesh, device or machine.
    """
    check_same(host, {**versions(), **flatten(settings(run))})
    backend = check_run(run, host.world, device)
    check_options(run)
    return agree_on_backend(run, backend, device, host) if device.type == "cpu" else None


def agree_on_backend(run: Run, backend: str, device: torch.device, host: HostGroup) -> str:
    """Return the attention backend of rank 0, which all ranks use. All ranks call this.

    backend  the attention backend that this rank would use by itself

    Raises:
        ValueError: on every rank, if one of them cannot use it; the message names the rank.
    """
    chosen, error = host.broadcast(backend), None
    if chosen != backend:
        try:
            check_run(use_backend(run, chosen), host.world, device)
        except ValueError as refused:
            error = refused
    failed = host.first_error(error)
    if failed is not None:
        rank, reason = failed
        raise ValueError(f"rank 0 uses the attention backend {chosen!r}, but rank {rank} cannot: {reason}")
    return chosen


def use_backend(run: Run, backend: str) -> Run:
    """Return the run with another attention backend."""
    return dataclasses.replace(run, attention=dataclasses.replace(run.attention, backend=backend))


def check_options(run: Run) -> None:
    """Check the options that are used after the data are read, some of them only at the end of the run.

    Raises:
        ValueError: if one of them cannot work with this model or on this machine.
    """
    if run.checkpoint.export:
        family = family_of(run.model)
        if family.hf is None:
            raise ValueError(
                f"checkpoint.export writes a Hugging Face directory, but the family {family.name} has no Hugging Face "
                "format; use --checkpoint.no-export, or pass hf=HuggingFace(...) to the Family"
            )
        family.hf.config_to_hf(run.model)  # raises if the format has no field for an option of the model
    check_wandb(run.logging)
    if run.data.source == SYNTHETIC_IMAGES:
        check_images(build_skeleton(run.model).image_sizes)


def open_files(run: Run, tokenizer: Path | None, pretrained: Path | None) -> Tokenizer | None:
    """Check the files that the run starts from, and return its tokenizer: None if one is trained on the documents.

    pretrained  the directory of pretrained weights to start from

    Raises:
        ValueError: if the tokenizer or the pretrained weights are missing, or do not fit the model and the options.
    """
    opened = open_tokenizer(tokenizer, run.model.vocab_size)
    if opened is not None:
        check_prompt(run.logging, opened)
    if pretrained is not None:
        try:
            check_pretrained(run.model, pretrained)
        except ValueError as error:
            raise ValueError(f"model_from {pretrained} cannot be used: {error}") from error
    return opened


def read_documents(data: DataConfig, host: HostGroup) -> Documents:
    """Read the documents on every rank; those of a Hugging Face dataset first on one rank of each machine."""
    if is_dataset(data):
        return host.first_of_each_machine(lambda: load_documents(data))
    return load_documents(data)


def open_tokenizer(path: Path | None, vocab_size: int) -> Tokenizer | None:
    """Load the tokenizer at `path`; without a path, return None: one is trained on the documents.

    Raises:
        ValueError: if it is missing, or the vocabulary of the model is too small for it or to train one.
    """
    if path is None:
        check_vocab_size(vocab_size)
        return None
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{path} has {tokenizer.vocab_size} tokens, but the vocabulary of the model has only {vocab_size}; "
            f"use --model.vocab-size {tokenizer.vocab_size}"
        )
    return tokenizer


def check_prompt(logging: LoggingConfig, tokenizer: Tokenizer) -> None:
    """Check that the prompt of the final sample has tokens.

    Raises:
        ValueError: if it has none.
    """
    if logging.sample_tokens and not tokenizer.encode_prompt(logging.sample_prompt):
        raise ValueError(
            f"logging.sample-prompt {logging.sample_prompt!r} has no tokens in the run's tokenizer; expected at least "
            'one character: use --logging.sample-prompt "The", or --logging.sample-tokens 0 for no sample'
        )
