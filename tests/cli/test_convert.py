import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from sightline import Batch
from sightline.cli.main import run
from sightline.models import VLM, load_pretrained
from sightline.training import trainer
from sightline.training.loading import load
from tests.support.small_runs import write_corpus

SHORT = (
    "--training.steps=2",
    "--training.sequence-length=48",
    "--training.global-batch-size=2",
    "--training.micro-batch-size=1",
    "--training.device=cpu",
    "--validation.every=0",
    "--logging.no-tensorboard",
    "--logging.sample-tokens=0",
)
TOKENS = torch.tensor([[5, 260, 44, 301, 7, 9, 310, 2]])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(corpus, run directory) of a small llama."""
    directory = tmp_path_factory.mktemp("convert")
    corpus = write_corpus(directory / "corpus")
    options = ("--model.vocab-size=320", "--model.hidden-size=32", "--model.intermediate-size=48")
    assert (
        run(["train", "llama3-debug", f"--data.source={corpus}", f"--output-dir={directory / 'run'}", *SHORT, *options])
        == 0
    )
    return corpus, directory / "run"


def logits_of(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    batch = Batch.from_documents(tokens.tolist(), length=tokens.shape[1])
    with torch.no_grad():
        return model(batch.tokens, attention_masks=model.get_attention_masks(batch), positions=batch.positions)


def test_a_run_becomes_a_model_and_a_tokenizer_for_transformers(trained, tmp_path, capsys) -> None:
    assert run(["convert", str(trained[1]), str(tmp_path / "hf")]) == 0
    assert f"wrote the model of {trained[1]}/checkpoints/step-2 to {tmp_path}/hf" in capsys.readouterr().out
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ours = load(trained[1], device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, logits_of(ours.model), atol=1e-5, rtol=0)
    assert theirs.config.max_position_embeddings == 48
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (ours.tokenizer.bos_id, ours.tokenizer.eos_id)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "def test() -> None: pass"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ours.tokenizer.encode(text)[1:-1]
    assert tokenizer.eos_token_id == ours.tokenizer.eos_id


def test_from_hugging_face_through_training_and_back(trained, tmp_path, monkeypatch, capsys) -> None:
    corpus, llama = trained
    start, directory, back = tmp_path / "start", tmp_path / "run", tmp_path / "back"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=330,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=24,
        tie_word_embeddings=True,
        max_position_embeddings=77,
    )
    Qwen3ForCausalLM(config).save_pretrained(start)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (start / name).write_bytes((llama / name).read_bytes())
    (start / "chat_template.jinja").write_text("{{ messages }}")
    (start / "generation_config.json").write_text('{"temperature": 0.3}')

    begun_with = []
    original = trainer.Trainer.train

    def train(self: trainer.Trainer) -> None:
        begun_with.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        original(self)

    monkeypatch.setattr(trainer.Trainer, "train", train)
    command = [
        "train",
        "qwen3-debug",
        f"--model-from={start}",
        f"--data.source={corpus}",
        f"--output-dir={directory}",
        *SHORT,
    ]
    assert run(command) == 0
    read = load_pretrained(start).state_dict()
    assert all(torch.equal(begun_with[0][name], tensor) for name, tensor in read.items())
    assert json.loads((directory / "config.json").read_text())["model"]["head_size"] == 24
    assert (directory / "tokenizer.json").read_text() == (llama / "tokenizer.json").read_text()

    assert run(["convert", str(directory), str(back)]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(back).eval()
    ours = load(directory, device="cpu").model
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, logits_of(ours), atol=1e-5, rtol=0)
    assert not torch.equal(ours.embedding.weight, read["embedding.weight"]), "it trained"
    assert theirs.config.max_position_embeddings == 77
    assert theirs.generation_config.temperature == 0.3
    assert (back / "chat_template.jinja").read_text() == "{{ messages }}"

    # Continued, it goes on from its own checkpoint and not from where it began.
    assert run([*command, "--training.steps=3"]) == 0
    assert torch.equal(begun_with[1]["norm.weight"], ours.norm.weight)
    capsys.readouterr()
    assert run(["train", "qwen3-debug", *command[3:], "--training.steps=3"]) == 2
    assert f"--model-from {start}" in capsys.readouterr().err


def test_a_hugging_face_directory_in_another_precision(trained, tmp_path) -> None:
    assert run(["convert", str(trained[1]), str(tmp_path / "wide")]) == 0
    assert run(["convert", str(tmp_path / "wide"), str(tmp_path / "half"), "--dtype=bfloat16"]) == 0
    wide, half = load_pretrained(tmp_path / "wide"), load_pretrained(tmp_path / "half")
    assert half.output.weight.dtype == torch.bfloat16
    assert torch.equal(half.output.weight, wide.output.weight.bfloat16())
    assert (tmp_path / "half" / "tokenizer.json").is_file()


def test_an_encoder_and_a_decoder_become_one_model(trained, tmp_path) -> None:
    assert run(["convert", str(trained[1]), str(tmp_path / "text")]) == 0
    vision = Siglip2VisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, patch_size=4, num_patches=16
    )
    theirs = Siglip2VisionModel(vision)
    theirs.save_pretrained(tmp_path / "vision")
    options = ["--vision", str(tmp_path / "vision")]
    assert run(["convert", str(tmp_path / "text"), str(tmp_path / "seeing"), *options]) == 0
    seeing, text = load_pretrained(tmp_path / "seeing"), load_pretrained(tmp_path / "text")
    assert type(seeing) is VLM and seeing.config.image_token_id == 319
    assert torch.equal(seeing.vision.positions, theirs.embeddings.position_embedding.weight)
    torch.testing.assert_close(logits_of(seeing), logits_of(text), atol=0, rtol=0)
    assert (tmp_path / "seeing" / "tokenizer.json").is_file()
    assert run(["convert", str(trained[1]), str(tmp_path / "other"), *options]) == 2, (
        "a run is no Hugging Face directory"
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere", "out"], "nowhere does not exist; expected the directory of a run or one of its checkpoints"),
        (["hf", "hf"], "hf already contains model weights; choose another directory"),
    ],
)
def test_refusals(trained, tmp_path, capsys, monkeypatch, arguments: list[str], told: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["convert", str(trained[1]), "hf"]) == 0
    assert run(["convert", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_a_start_that_does_not_fit_is_refused(trained, tmp_path, capsys) -> None:
    corpus, llama = trained
    assert run(["convert", str(llama), str(tmp_path / "hf")]) == 0
    command = ["train", "llama3-debug", f"--model-from={tmp_path / 'hf'}", f"--data.source={corpus}", *SHORT]
    assert run([*command, f"--output-dir={tmp_path / 'run'}", "--model.intermediate-size=64"]) == 2
    told = capsys.readouterr().err
    assert "model.layers.0.mlp.gate_proj.weight in" in told
    assert "has shape (48, 32); expected (64, 32)" in told
    assert run(["train", "llama3-debug", "--model-from=nowhere"]) == 2
    assert "nowhere/config.json does not exist; expected a Hugging Face directory" in capsys.readouterr().err
