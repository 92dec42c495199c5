"""Bad input, kind by kind: each is rejected before data are read, in one line with the value and the remedy."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from sightline import config
from sightline.attention import BACKENDS
from sightline.cli import main as cli
from sightline.config import Run
from sightline.data import Documents, train_tokenizer
from sightline.models import Family, Llama3Config
from sightline.models.llama3 import Llama3
from sightline.training import metrics, setup

TRAIN = "train llama3-debug --output-dir {out} "
BAD_INPUT: dict[str, tuple[str, list[str]]] = {
    # options of one section; a row that starts with an option is for `train`
    "learning rate nan": ("--optimizer.learning-rate nan", ["optimizer.learning-rate must be a finite", "nan"]),
    "learning rate inf": ("--optimizer.learning-rate inf", ["optimizer.learning-rate must be a finite", "inf"]),
    "learning rate negative": ("--optimizer.learning-rate -1", ["learning-rate must be greater than 0", "-1.0"]),
    "learning rate zero": ("--optimizer.learning-rate 0", ["learning-rate must be greater than 0, got 0.0"]),
    "weight decay nan": ("--optimizer.weight-decay nan", ["optimizer.weight-decay must be a finite number"]),
    "gradient norm inf": ("--optimizer.max-grad-norm inf", ["optimizer.max-grad-norm must be a finite number"]),
    "beta nan": ("--optimizer.betas nan 0.9", ["optimizer.betas must be a finite number", "nan"]),
    "beta one": ("--optimizer.betas 0.9 1", ["optimizer.betas must be in [0, 1)", "1.0"]),
    "eps nan": ("--optimizer.eps nan", ["optimizer.eps must be a finite number, got nan"]),
    "warm-up negative": ("--optimizer.warmup-steps -1", ["optimizer.warmup-steps must be at least 0, got -1"]),
    "seed negative": ("--seed -1", ["seed must be at least 0 and less than 2^64", "-1"]),
    "seed above 64 bits": ("--seed 18446744073709551616", ["seed must be at least 0", "18446744073709551616"]),
    "steps zero": ("--training.steps 0", ["training.steps must be greater than 0, got 0"]),
    "steps huge": ("--training.steps 1000000000000", ["training.steps must be at most 2147483647", "1000000000000"]),
    "rows huge": ("--training.global-batch-size 2147483648", ["training.global-batch-size must be at most"]),
    "length huge": ("--training.sequence-length 1099511627776", ["training.sequence-length must be at most"]),
    "length one": ("--training.sequence-length 1", ["training.sequence-length must be at least 2"]),
    "timeout zero": ("--parallel.timeout 0", ["parallel.timeout must be greater than 0, got 0"]),
    "timeout huge": ("--parallel.timeout 1000000", ["parallel.timeout must be at most 604800 seconds (one week)"]),
    "resume empty": ("--checkpoint.resume ''", ["checkpoint.resume is empty", "--checkpoint.resume auto"]),
    "resume nowhere": ("--checkpoint.resume {out}/x", ["/x does not exist; expected the directory of a run"]),
    "keep zero": ("--checkpoint.keep 0", ["checkpoint.keep must be greater than 0, got 0"]),
    "sample tokens negative": ("--logging.sample-tokens -1", ["logging.sample-tokens must be at least 0, got -1"]),
    "prompt not UTF-8": ("--logging.sample-prompt \udcff", ["logging.sample-prompt '\\udcff' contains bytes"]),
    "wandb empty": ("--logging.wandb ''", ["logging.wandb is empty", "--logging.wandb NAME"]),
    "validation rows": ("--validation.rows 0", ["validation.rows must be greater than 0, got 0"]),
    "source empty": ("--data.source ''", ["data.source is empty", "--data.source PATH"]),
    "model size zero": ("--model.num-heads 0", ["model.num-heads must be greater than 0, got 0"]),
    "model number nan": ("--model.norm-eps nan", ["model.norm-eps must be a finite number, got nan"]),
    # options together, with the model, the mesh and the machine
    "vocabulary too small": ("--model.vocab-size 100", ["100 tokens is too small", "--model.vocab-size 258"]),
    "images, text model": ("--data.source synthetic-images", ["'synthetic-images'", "text-only", "--data.source"]),
    "micro-batch": ("--training.micro-batch-size 3", ["not divisible by training.micro-batch-size 3"]),
    "mesh": ("--parallel.tensor 2", ["tensor 2 is 2, which does not divide the 1 processes"]),
    "offload": ("--parallel.offload", ["parallel.offload", "--parallel.no-offload"]),
    "backend": (
        "--training.device cpu --attention.backend flex",
        ["--attention.backend", "'flex': flex does not train on a CPU", "backends: sdpa, ", "tiled, reference"],
    ),
    "no CUDA": ("--training.device cuda", ["training.device is 'cuda'", "--training.device cpu"]),
    "no wandb": ("--logging.wandb mine", ["logging.wandb 'mine' needs the package wandb", "pip install"]),
    "export without a format": (
        "train tests.test_bad_input:OWN_FAMILY --output-dir {out} --checkpoint.export",
        ["checkpoint.export", "the family own has no Hugging Face format", "--checkpoint.no-export"],
    ),
    # files and directories
    "output is a file": ("train llama3-debug --output-dir {file}", ["file.txt is a file", "--output-dir"]),
    "output below a file": ("train llama3-debug --output-dir {file}/a/b", ["file.txt is a file", "--output-dir"]),
    "output in a special directory": (
        "train llama3-debug --output-dir /proc/sightline/run",
        ["output_dir /proc/sightline/run cannot be written", "--output-dir"],
    ),
    "source nowhere": ("--data.source {out}/none", ["data.source", "/none' does not exist"]),
    "tokenizer nowhere": ("--data.tokenizer {out}/none", ["no tokenizer at", "/none", "--data.tokenizer PATH"]),
    "tokenizer is another file": ("--data.tokenizer {file}", ["file.txt is not a Hugging Face tokenizer.json"]),
    "tokenizer too large": ("--data.tokenizer {tokenizer} --model.vocab-size 260", ["use --model.vocab-size"]),
    "prompt without tokens": (
        "--data.tokenizer {tokenizer} --logging.sample-prompt ''",
        ["logging.sample-prompt '' has no tokens", "--logging.sample-tokens 0"],
    ),
    "model_from nowhere": ("--model-from {out}/none", ["none/config.json does not exist"]),
    # other commands
    "plan, rows zero": ("plan llama3-debug --rows 0", ["--rows must be greater than 0", "got 0"]),
    "plan, processes zero": ("plan llama3-debug --processes 0", ["--processes must be greater than 0", "got 0"]),
    "plan, processes negative": ("plan llama3-debug --processes -4", ["--processes must be greater than 0", "got -4"]),
    "plan, GPU": ("plan llama3-debug --gpu H1000", ["unknown --gpu 'H1000'", "H100"]),
    "plan, recipe": ("plan llama9", ["unknown recipe 'llama9'", "llama3-debug"]),
    "plan, mesh": ("plan llama3-debug --processes 4 --parallel.tensor 3", ["which does not divide the 4 processes"]),
    "plan, length": ("plan llama3-debug --training.sequence-length 0", ["sequence-length must be at least 2", "got 0"]),
    "generate, temperature": ("generate {out} --temperature nan", ["temperature must be 0 (greedy decoding)"]),
    "generate, top-p": ("generate {out} --top-p 1.5", ["top-p must be greater than 0 and at most 1", "1.5"]),
    "generate, top-k": ("generate {out} --top-k 0", ["top-k must be at least 1 token, got 0"]),
    "generate, tokens": ("generate {out} --max-new-tokens -1", ["max-new-tokens must be at least 0, got -1"]),
    "generate, seed": ("generate {out} --seed -1", ["seed must be at least 0 and less than 2^64"]),
    "generate, directory": ("generate {out}/none", ["/none does not exist"]),
    "convert, shards": ("convert {out} {out}/hf --max-shard-bytes 0", ["--max-shard-bytes must be at least 1, got 0"]),
    "convert, output": ("convert {out} {file}", ["file.txt is a file", "choose another OUTPUT"]),
    "masks, row": ("masks 'causal(1, 8)' --row -1", ["--row must be at least 0, got -1"]),
    "masks, row too large": ("masks 'causal(1, 8)' --row 3", ["row 3 is not in this mask of 1 rows"]),
    "masks, block": ("masks 'causal(1, 8)' --block-size 0", ["--block-size must be at least 1, got 0"]),
    "masks, width": ("masks 'causal(1, 8)' --width 3", ["--width must be at least 24, got 3"]),
    "masks, length": ("masks llama3-debug --sequence-length 0", ["--sequence-length must be at least 2, got 0"]),
    "unknown command": ("trian llama3-debug", ["unknown command 'trian'", "train"]),
}  # fmt: skip


class OwnConfig(Llama3Config):
    """Config of a family without a Hugging Face format."""


OWN = Family(name="own", model=Llama3, config=OwnConfig)
OWN_FAMILY = Run(
    model=OwnConfig(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=32, vocab_size=300)
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 300 tokens without a token that begins a document."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained = train_tokenizer(Documents.from_texts(["some text about words and more words " * 20] * 4), 300)
    trained._begin = None
    trained.save(path)
    return path


def output_of(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """Run a command as a user does; return its exit code and what it writes to standard error."""
    with pytest.raises(SystemExit) as ended:
        cli.main(shlex.split(command))
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input_is_rejected_in_one_line(
    kind: str, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_documents(data: config.DataConfig) -> Documents:
        if data.source.endswith("none"):
            return load_documents(data)
        raise AssertionError("data were read before the bad input was rejected")

    load_documents = setup.load_documents
    monkeypatch.setattr(setup, "load_documents", read_documents)
    monkeypatch.setattr(metrics, "wandb", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "file.txt").write_text("a file")
    (tmp_path / "out").mkdir()
    command, expected = BAD_INPUT[kind]
    command = TRAIN + command if command.startswith("--") else command
    values = {"out": tmp_path / "out", "file": tmp_path / "file.txt", "tokenizer": tokenizer}
    code, text = output_of(command.format(**values), capsys)
    assert code in (1, 2), text
    assert text.startswith("error: ") and text.count("\n") == 1, text
    for part in expected:
        assert part in text, text


def test_an_output_directory_without_permission_is_rejected(tmp_path, monkeypatch, capsys) -> None:
    """Tests may run as root, who may write everywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    code, text = output_of(f"train llama3-debug --output-dir {tmp_path}/a/b", capsys)
    assert code == 2 and f"output_dir {tmp_path}/a/b cannot be written: {tmp_path} is not writable" in text
    assert not (tmp_path / "a").exists()


def test_an_unexpected_error_of_a_file_is_one_line(tmp_path, monkeypatch, capsys) -> None:
    def fail(argv: list[str]) -> None:
        raise IsADirectoryError(21, "Is a directory", str(tmp_path))

    monkeypatch.setattr("sightline.cli.train.main", fail)
    assert output_of("train llama3-debug", capsys) == (1, f"error: {tmp_path}: Is a directory\n")


@pytest.mark.parametrize("backend", [backend.name for backend in BACKENDS])
def test_plan_and_train_reject_the_same_backends(backend, tmp_path, monkeypatch, capsys) -> None:
    """A backend that the device cannot run is rejected by both commands with the same line."""

    class Accepted(Exception):
        pass

    def stop(*args: object) -> None:
        raise Accepted

    monkeypatch.setattr(setup, "load_documents", stop)
    monkeypatch.setattr("sightline.planning.estimate.build_skeleton", stop)
    lines = []
    for command in ("train", "plan"):
        options = f"llama3-debug --output-dir {tmp_path} --training.device cpu --attention.backend {backend}"
        try:
            lines.append(output_of(f"{command} {options}", capsys))
        except Accepted:
            lines.append(None)
    assert lines[0] == lines[1]
