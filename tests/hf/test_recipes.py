"""The recipes of docs/huggingface.md run as they are written, and their losses are those of each document alone."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import sightline.hf
from tests.support.hf import SIZES, build_gpt_oss, build_llama, build_tokenizer, random_documents, sum_of_losses

PAGE = (Path(__file__).parents[2] / "docs" / "huggingface.md").read_text()
MODEL, DATA = "Qwen/Qwen3-0.6B", "roneneldan/TinyStories"
DOCUMENTS = 8
"""Documents of the dataset: one batch of the recipes, so the first loss is that of all of them, in any order."""


class Example(NamedTuple):
    """A tiny model and a dataset on disk.

    loss   loss per label of the model before training, each document alone
    leaky  the same if documents attended to the ones before them in one row
    """

    model: str
    data: str
    loss: float
    leaky: float


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Example:
    directory = tmp_path_factory.mktemp("recipes")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.5, attn_implementation="eager")).eval()
    model.save_pretrained(directory / "model")
    build_tokenizer().save_pretrained(directory / "model")
    texts = [" ".join(map(str, tokens)) + " <eos>" for tokens in random_documents(DOCUMENTS, shortest=8)]  # TRL adds it
    (directory / "data").mkdir()
    (directory / "data" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    documents = [tokenizer(text)["input_ids"] for text in texts]
    with torch.no_grad():
        total, count = sum_of_losses(model, [{"input_ids": tokens} for tokens in documents])
        row = torch.tensor([[token for tokens in documents for token in tokens]])
        starts = torch.tensor([0, *map(len, documents)]).cumsum(0)[:-1]
        labels = row.index_fill(1, starts, -100)
        leaky = model(row, labels=labels, use_cache=False).loss
    return Example(str(directory / "model"), str(directory / "data"), float(total) / count, float(leaky))


def block(heading: str, language: str) -> str:
    """Return the first block of code in this language below a heading."""
    section = re.split(r"\n#+ ", PAGE.split(f"\n### {heading}\n")[1])[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)[0]


def execute(code: str, example: Example, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run a recipe with the tiny model and dataset and return its variables."""
    for old, new in {MODEL: example.model, DATA: example.data}.items():
        assert old in code
        code = code.replace(old, new)
    variables = names or {}
    exec(compile(code, "recipe", "exec"), variables)
    return variables


def check_trainer(trainer: Any, expected: float) -> None:
    assert sightline.hf.is_enabled(trainer.model)
    assert trainer.model.config._attn_implementation == "sightline"
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected, abs=1e-4)


TOKENS = torch.arange(3, 15)[None]
POSITIONS, IDS = torch.tensor([[*range(5), *range(7)]]), torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)
STARTS = torch.tensor([0, 5, 12], dtype=torch.int32)
STATEMENTS: list[dict[str, Any]] = [
    {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS, "max_length_q": 7, "max_length_k": 7},
    {"seq_idx": IDS},
    {"document_ids": IDS},
    {"document_lengths": [[5, 7]]},
]
CALLS: list[list[dict[str, Any]]] = [
    [{"position_ids": POSITIONS}],
    [{"position_ids": POSITIONS, "use_cache": False}],
    [{"position_ids": POSITIONS, "attention_mask": torch.ones_like(TOKENS)}],
    STATEMENTS,
    [{"attention_mask": IDS + 1}],
]
"""Arguments of each row of the page's table of calls, for a row of documents of 5 and 7 tokens."""


def set_attention(model: PreTrainedModel, column: str) -> PreTrainedModel:
    if column == "sightline, enabled":
        return sightline.hf.enable(model)
    model.set_attn_implementation(column)
    return model


@pytest.mark.parametrize(("family", "build"), [("Llama", build_llama), ("gpt-oss", build_gpt_oss)])
def test_table_of_calls(family, build) -> None:
    """Each cell holds what the call does, compared with each document alone."""
    table = PAGE.split("| arguments |")[1].split("\n\n")[0].splitlines()
    heads, *cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table if "---" not in line]
    assert len(cells) == len(CALLS)
    with torch.no_grad():
        alone = [build().eval()(part, use_cache=False).logits for part in TOKENS.split([5, 7], dim=1)]
        for index, column in enumerate(("eager", "sightline", "sightline, enabled")):
            assert heads[index].startswith(column)
            for (_, *texts), calls in zip(cells, CALLS, strict=True):
                for call in calls:
                    logits = set_attention(build().eval(), column)(TOKENS, **call).logits
                    verdict = "right" if torch.allclose(logits, torch.cat(alone, dim=1), atol=1e-5) else "leaks"
                    text = texts[index]
                    assert f"{verdict} in {family}" in text if "," in text else text.split(":")[0] == verdict


@pytest.fixture(autouse=True)
def offline_directory(tmp_path, monkeypatch) -> None:
    """Recipes write into the current directory and look nothing up on the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_leaks_would_change_the_loss(example) -> None:
    assert abs(example.loss - example.leaky) > 0.01


def test_five_lines(example) -> None:
    section = PAGE.split("\n## Five lines\n")[1]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line]) <= 5
    model = AutoModelForCausalLM.from_pretrained(example.model, attn_implementation="sightline")
    exec(code.replace(MODEL, example.model), variables := {"model": model})
    assert sightline.hf.is_enabled(variables["model"])


def test_plain_loop(example) -> None:
    losses: list[float] = []
    code = block("Plain loop", "python").replace(
        "loss.backward()", "losses.append(float(loss.detach())); loss.backward()"
    )
    execute(code, example, {"losses": losses})
    assert losses == [pytest.approx(example.loss, abs=1e-5)]


def test_trainer(example) -> None:
    code = block("Trainer", "python").replace("_size=8", '_size=8, max_steps=1, logging_steps=1, report_to="none"')
    check_trainer(execute(code, example)["trainer"], example.loss)


def test_trl_script_with_few_changed_lines(example) -> None:
    lines = block("TRL", "diff").splitlines()
    assert sum(line.startswith("+") for line in lines) <= 5
    code = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    settings = 'packing=True, bf16=False, max_steps=1, logging_steps=1, report_to="none"'
    trainer = execute(code.replace("packing=True", settings), example)["trainer"]
    check_trainer(trainer, example.loss)


def test_trl_command(example) -> None:
    """`sightline hf -- trl sft` from the command to the trained model, in the process that accelerate starts."""
    line = next(line for line in block("Commands of other tools", "console").splitlines() if " trl sft " in line)
    line = line.removeprefix("$ sightline")
    settings = "--max_steps 1 --logging_steps 1 --bf16 false --report_to none --use_cpu --max_length 64"
    words = shlex.split(f"{line} {settings}".replace(MODEL, example.model).replace(DATA, example.data))
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "sightline", *words]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    loss = float(re.findall(r"'loss': '?([0-9.]+)", done.stdout)[0])
    assert loss == pytest.approx(example.loss, abs=1e-3)
    assert "sightline" not in Path("trained", "config.json").read_text()
