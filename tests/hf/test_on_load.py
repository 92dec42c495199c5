"""Models that other programs load: by `sightline hf`, and by axolotl's plugin."""

import importlib
import sys
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel

import sightline.hf
from sightline.hf import on_load

CONFIG = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
)


@pytest.fixture
def directory(tmp_path) -> str:
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def checks(monkeypatch) -> list[bool]:
    """Values of `check` in calls of `enable`."""
    values: list[bool] = []

    def record(model, check) -> None:
        values.append(check)
        sightline.hf.enable(model, check=False)

    monkeypatch.setattr(on_load, "enable", record)
    return values


@pytest.fixture
def patched(monkeypatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", PreTrainedModel.__dict__["from_pretrained"])
    on_load.enable_on_load()


def test_a_model_loaded_by_the_name_is_enabled(directory, patched) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sightline")
    assert sightline.hf.is_enabled(model)
    tokens = torch.arange(8)[None]
    split = model(tokens, document_lengths=[[5, 3]]).logits
    assert torch.allclose(split[:, 5:], model(tokens[:, 5:]).logits, atol=1e-6)


def test_loading_info_is_returned_as_it_was(directory, patched) -> None:
    load = AutoModelForCausalLM.from_pretrained
    model, info = load(directory, attn_implementation="sightline", output_loading_info=True)
    assert sightline.hf.is_enabled(model) and not info["missing_keys"]


def test_a_model_loaded_by_another_name_stays_as_it_is(directory, patched) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa")
    assert not sightline.hf.is_enabled(model) and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("rank", "device", "checked"), [("0", "cpu", True), ("1", "cpu", False), ("0", "meta", False)])
def test_the_check_runs_where_the_weights_are(rank, device, checked, checks, monkeypatch) -> None:
    monkeypatch.setenv("RANK", rank)
    with torch.device(device):
        on_load.enable_loaded(AutoModelForCausalLM.from_config(CONFIG))
    assert checks == [checked]


def test_a_reward_model_is_enabled(directory, patched) -> None:
    load = AutoModelForSequenceClassification.from_pretrained
    model = load(directory, attn_implementation="sightline", num_labels=1)
    assert sightline.hf.is_enabled(model)


def test_axolotl_plugin(monkeypatch) -> None:
    """axolotl is not installed here: a module with its base class stands for it."""
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["axolotl.integrations.base"].BasePlugin = object  # type: ignore[attr-defined]
    plugin = importlib.import_module("sightline.hf.axolotl").SightlinePlugin()
    model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation="sdpa")
    plugin.post_model_load({}, model)
    assert sightline.hf.is_enabled(model) and model.config._attn_implementation == "sightline"
