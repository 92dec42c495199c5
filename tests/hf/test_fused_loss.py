import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, Trainer, TrainingArguments

from sightline.hf.chunked_logits import ChunkedLogits
from sightline.hf.fused_loss import disable_fused_loss, enable_fused_loss
from tests.support.hf_models import VOCABULARY, tiny_model
from tests.support.processes import run_on_ranks

FAMILIES = {
    **{name: {} for name in ("llama", "qwen3", "mistral", "gemma3_text", "deepseek_v3", "llama4_text", "olmo3")},
    **{
        name: {}
        for name in ("glm4", "phi3", "gpt2", "phi", "Gemma3ForConditionalGeneration", "Qwen3VLForConditionalGeneration")
    },
    "gemma2": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.3},
    "minicpm3": {},
    "gpt_oss": {"output_router_logits": True},
    "mixtral": {"output_router_logits": True},
    "qwen3_moe": {"output_router_logits": True},
}


@functools.cache
def _model(name: str) -> PreTrainedModel:
    return tiny_model(name, **FAMILIES[name])


def pair(name: str = "gemma2") -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a model and a copy with the fused loss."""
    plain, fused = copy.deepcopy(_model(name)), copy.deepcopy(_model(name))
    enable_fused_loss(fused)
    return plain, fused


def batch() -> dict[str, Tensor]:
    """Return 2 rows of 24 tokens, of which some have no label."""
    tokens = torch.randint(3, VOCABULARY - 20, (2, 24), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[0, :5] = -100
    return {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}


def step(model: nn.Module, **inputs: Any) -> Any:
    """Run forward and backward and return the output of the forward."""
    model.zero_grad()
    output = model(**(batch() | {"use_cache": False} | inputs))
    output.loss.backward()
    return output


def gradients(model: nn.Module) -> list[Tensor]:
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]


def assert_equal(plain: nn.Module, fused: nn.Module, tolerance: float = 1e-5, **inputs: Any) -> None:
    """Run a step of both, the second one in chunks, and compare losses and gradients."""
    expected, output = step(plain, **inputs), step(fused, **inputs)
    assert isinstance(output.logits, ChunkedLogits) and isinstance(expected.logits, Tensor)
    torch.testing.assert_close(output.loss, expected.loss, rtol=tolerance / 10, atol=0)
    wanted, found = gradients(plain), gradients(fused)
    assert len(wanted) == len(found) > 0
    noise = 1e-3 * max(grad.norm() for grad in wanted)  # gradients that are 0 but for rounding
    for grad, other in zip(found, wanted, strict=True):
        assert (grad - other).norm() <= tolerance * (other.norm() + noise)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_equal_the_plain_loss(name: str) -> None:
    assert_equal(*pair(name))


SHIFTED = torch.cat([batch()["labels"][:, 1:], torch.full((2, 1), -100)], dim=1)


@pytest.mark.parametrize(
    "inputs",
    [
        {"num_items_in_batch": 77},
        {"num_items_in_batch": torch.tensor(77), "shift_labels": SHIFTED},
        {"labels": torch.full((2, 24), -100), "num_items_in_batch": 77},
        {"return_dict": True, "logits_to_keep": slice(None), "ignore_index": -100},
    ],
    ids=["items", "shifted", "no labels", "arguments"],
)
def test_arguments_of_the_loss(inputs: dict[str, Any]) -> None:
    assert_equal(*pair(), **inputs)


def test_mean_over_no_labels_is_nan_without_gradients() -> None:
    plain, fused = pair()
    labels = torch.full((2, 24), -100)
    assert step(plain, labels=labels).loss.isnan() and step(fused, labels=labels).loss.isnan()
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in gradients(plain) + gradients(fused))


@pytest.mark.parametrize("without", ["labels", "gradients"])
def test_other_forwards_return_the_logits(without: str) -> None:
    plain, fused = pair()
    inputs = batch() if without == "gradients" else {"input_ids": batch()["input_ids"]}
    with torch.set_grad_enabled(without == "labels"):
        output = fused(**inputs)
        assert torch.equal(output.logits, plain(**inputs).logits) and output.logits.requires_grad == (
            without == "labels"
        )


def test_generation_is_unchanged() -> None:
    plain, fused = pair()
    step(fused)
    arguments = {"max_new_tokens": 5, "do_sample": False}
    prompt = {"input_ids": batch()["input_ids"][:, :6], "attention_mask": batch()["attention_mask"][:, :6]}
    assert torch.equal(fused.generate(**prompt, **arguments), plain.generate(**prompt, **arguments))


def test_float64() -> None:
    plain, fused = pair()
    assert_equal(plain.double(), fused.double(), tolerance=1e-6)  # transformers computes the loss in float32


@pytest.mark.parametrize("kind", ["autocast", "bfloat16 model"])
def test_bfloat16_is_no_less_exact(kind: str) -> None:
    """The fused logits are in float32, while transformers rounds its logits to bfloat16."""
    plain, fused = pair()
    exact, _ = pair()
    step(exact)
    models = [plain.bfloat16(), fused.bfloat16()] if kind == "bfloat16 model" else [plain, fused]
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        losses = [step(model).loss for model in models]
    assert losses[0].dtype == losses[1].dtype
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)
    distances = [
        sum((a.float() - b).norm() / b.norm() for a, b in zip(gradients(m), gradients(exact), strict=True))
        for m in models
    ]
    assert distances[1] <= distances[0] * 1.05


class LargestTensor(TorchDispatchMode):
    """Records the most elements of a tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor) and not value.is_meta:
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("name", ["llama", "gemma2", "Gemma3ForConditionalGeneration"])
def test_logits_of_all_tokens_never_exist(name: str) -> None:
    vocabulary, tokens = 4096, torch.randint(3, VOCABULARY - 20, (1, 600))  # more tokens than a chunk
    model = tiny_model(name, **FAMILIES[name], vocab_size=vocabulary)
    inputs = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
    for change, exist in ((disable_fused_loss, True), (enable_fused_loss, False)):
        change(model)
        with LargestTensor() as largest:
            step(model, **inputs)
        assert (largest.elements >= tokens.numel() * vocabulary) == exist


def test_gradient_checkpointing() -> None:
    plain, fused = pair()
    fused.train().gradient_checkpointing_enable()
    assert_equal(plain.train(), fused)


def test_torch_compile() -> None:
    plain, fused = (tiny_model("granite", logits_scaling=4.0, num_hidden_layers=1) for _ in range(2))
    enable_fused_loss(fused)
    assert_equal(plain, torch.compile(fused, backend="eager"))


def test_deep_copy_is_independent() -> None:
    plain, fused = pair()
    fused_copy = copy.deepcopy(fused)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    assert_equal(plain, fused_copy)
    disable_fused_loss(fused)
    assert isinstance(step(fused_copy).logits, ChunkedLogits)


def test_disable_reverts_everything() -> None:
    plain, fused = pair()
    enable_fused_loss(fused)  # a second call changes nothing
    disable_fused_loss(fused)
    assert vars(fused).keys() == vars(plain).keys() and type(fused.lm_head) is nn.Linear
    assert torch.equal(step(fused).logits, step(plain).logits)
    disable_fused_loss(fused)


def test_saved_model_has_no_trace(tmp_path: Path) -> None:
    for model, name in zip(pair(), ("plain", "fused"), strict=True):
        model.save_pretrained(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "fused").iterdir())
    for name in files:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "fused" / name).read_bytes()


@pytest.mark.parametrize("enabled", ["before", "after"])
def test_accelerate_converts_outputs(enabled: str) -> None:
    """accelerate wraps the forward in autocast, and converts its outputs to float32."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    plain, fused = copy.deepcopy(_model("gemma2")), copy.deepcopy(_model("gemma2"))
    if enabled == "before":
        enable_fused_loss(fused)
    plain, fused = accelerator.prepare(plain), accelerator.prepare(fused)
    enable_fused_loss(fused)
    expected, output = step(plain), step(fused)
    assert isinstance(output.logits, ChunkedLogits) and output.logits.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-3, atol=0)
    disable_fused_loss(fused)
    assert torch.equal(step(fused).logits, expected.logits)


LORA = {"target_modules": ["q_proj"], "init_lora_weights": False}


def with_adapters(model: PreTrainedModel, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**(LORA | options)))


@pytest.mark.parametrize("enabled", ["before", "after"])
def test_peft(enabled: str) -> None:
    plain, fused = with_adapters(_copy()), _copy()
    if enabled == "before":
        enable_fused_loss(fused)
    adapted = with_adapters(fused)
    enable_fused_loss(fused)
    assert_equal(plain, adapted)


def test_peft_trains_a_copy_of_the_head() -> None:
    plain, fused = pair()
    assert_equal(*(with_adapters(model, modules_to_save=["lm_head"]) for model in (plain, fused)))


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_heads_of_another_kind_are_refused(options: dict[str, Any]) -> None:
    adapted = with_adapters(_copy(), **options)
    with pytest.raises(ValueError, match=r"output head of Gemma2ForCausalLM is peft\..*fused_loss=False"):
        enable_fused_loss(adapted.get_base_model())
    assert isinstance(step(adapted).logits, Tensor)


def test_head_with_adapters_added_later_warns() -> None:
    """The sum of two products has no chunks: the logits are a tensor, and equal."""
    tokens = torch.randint(3, VOCABULARY - 20, (2, 300))
    inputs = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
    plain, fused = (with_adapters(model, target_modules=["lm_head"]) for model in pair())
    with pytest.warns(UserWarning, match="needs the logits of all tokens"):
        output = step(fused, **inputs)
    assert torch.equal(output.loss, step(plain, **inputs).loss)


def test_hooks_of_the_head_are_refused() -> None:
    model = _copy()
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ValueError, match="has hooks"):
        enable_fused_loss(model)


def test_model_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"output head of LlamaModel is .*NoneType"):
        enable_fused_loss(tiny_model(transformers.LlamaModel))


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(3, VOCABULARY - 20, (24,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def arguments(directory: Path) -> dict[str, Any]:
    return {
        **{"output_dir": str(directory), "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1},
        **{"gradient_accumulation_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True},
        **{"save_strategy": "no", "seed": 0, "learning_rate": 1e-3, "bf16": False, "gradient_checkpointing": False},
    }


def history(trainer: Trainer) -> list[dict[str, Any]]:
    trainer.train()
    timings = ("runtime", "per_second", "flos")
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in timings)}
        for entry in trainer.state.log_history
    ]


def test_trainer(tmp_path: Path) -> None:
    """Trainer gathers the logits of the evaluation, which are a tensor."""
    histories = []
    for model in pair():
        trainer = Trainer(
            model,
            TrainingArguments(**arguments(tmp_path), eval_strategy="steps", eval_steps=1),
            train_dataset=Rows(),
            eval_dataset=Rows(),
            compute_metrics=lambda x: {"accuracy": (x.predictions.argmax(-1)[:, :-1] == x.label_ids[:, 1:]).mean()},
        )
        histories.append(history(trainer))
    for entry, expected in zip(*histories, strict=True):
        assert entry == pytest.approx(expected, rel=1e-4)
    assert any("eval_accuracy" in entry for entry in histories[1])


RANKS_OPTIONS = [{}, {"find_unused_parameters": True}, {"static_graph": True}]


def train_on_ranks(rank: int) -> list[float]:
    """Return the differences of losses and gradients to those of the plain model, for DDP and FSDP2."""
    plain, _ = pair()
    for options in RANKS_OPTIONS:
        assert_equal(DistributedDataParallel(_copy()), DistributedDataParallel(pair()[1], **options))
    for enabled in ("before", "after"):
        fused = _copy()
        if enabled == "before":
            enable_fused_loss(fused)
        for layer in fused.model.layers:
            fully_shard(layer)
        fully_shard(fused)
        enable_fused_loss(fused)
        assert_equal(plain, fused)
        with pytest.raises(RuntimeError, match="read them before backward"):
            step(fused).logits.argmax(-1)
    _check_head_sharded_on_its_own()
    return [float(rank)]


def _check_head_sharded_on_its_own() -> None:
    fused, sharded = tiny_model("llama"), tiny_model("llama")
    enable_fused_loss(fused)
    fully_shard(fused.lm_head)
    fully_shard(fused)
    with pytest.raises(ValueError, match=r"shard the head with the root module"):
        step(fused)
    fully_shard(sharded.lm_head)
    with pytest.raises(ValueError, match=r"is torch.distributed.fsdp.*FSDPLinear"):
        enable_fused_loss(sharded)


def test_ddp_and_fsdp2() -> None:
    assert run_on_ranks(2, train_on_ranks) == [[0.0], [1.0]]


def _copy() -> PreTrainedModel:
    return copy.deepcopy(_model("gemma2"))
