"""Context parallelism in models of transformers: losses, logits and gradients of each document alone, on 2 and 4 ranks.

All cases of one number of ranks share a launch of processes, and each returns its figures or the error it raised.
"""

import copy
import re
import tempfile
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.big_modeling import _attach_context_parallel_hooks
from torch import Tensor, nn

from sightline.hf import context_parallel, enable
from sightline.hf.context import LocalTokens
from sightline.hf.documents import Documents
from sightline.hf.layer_masks import build_masks, layer_types
from sightline.masks import causal, document
from sightline.parallel.context.plan import plan_context
from tests.support.hf_models import document_ids, packed_rows, tiny_model
from tests.support.processes import run_on_ranks

FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt_oss", "llama4_text", "deepseek_v3", "olmo3", "gemma2", "qwen3_moe"]
ON_4_RANKS = ["llama", "gpt_oss", "llama4_text"]
LAYOUTS = ((61, 90, 9, 35), (35, 9, 151))  # 195 tokens: no number of ranks divides them
IDS = document_ids(*LAYOUTS)
BATCH = packed_rows(*LAYOUTS)
BATCH |= {"labels": BATCH["input_ids"].masked_fill(BATCH["position_ids"] == 0, -100)}
COUNT = int((BATCH["labels"] != -100).sum())


def train_alone(model: nn.Module) -> tuple[float, Tensor]:
    """Return loss and logits [B, S, V] of each document in a forward of its own, and add their gradients."""
    logits = torch.stack(
        [
            torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in row.split(lengths)])
            for row, lengths in zip(BATCH["input_ids"], LAYOUTS, strict=True)
        ]
    )
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), BATCH["labels"][:, 1:].flatten(), reduction="sum") / COUNT
    loss.backward()
    return float(loss.detach()), logits.detach()


def train_divided(model: nn.Module, batch: dict[str, Any]) -> tuple[float, Tensor, LocalTokens]:
    """Return the loss of all ranks, the logits and arguments of this one, and add the gradients of all ranks."""
    with context_parallel(model, dist.group.WORLD, batch) as local:
        out = model(**local)
    out.loss.backward()
    loss = out.loss.detach().clone()
    dist.all_reduce(loss)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(parameter.grad)
    return float(loss), out.logits.detach(), local


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def gradient_error(model: nn.Module, expected: list[Tensor]) -> float:
    """Return the largest difference of a gradient, relative to the largest gradient."""
    errors = [(grad - other).abs().max() for grad, other in zip(gradients(model), expected, strict=True)]
    return float(max(errors) / max(other.abs().max() for other in expected))


def logits_error(logits: Tensor, local: LocalTokens, expected: Tensor) -> float:
    real = local.index < expected.shape[1]
    index = local.index.clamp(max=expected.shape[1] - 1)[..., None].expand_as(logits)
    return float((logits - expected.gather(1, index))[real].abs().max())


def one_process(name: str) -> dict[str, Any]:
    """Return loss, logits and gradients of each document alone, and the gradients of the enabled model on full rows."""
    alone = tiny_model(name)
    whole = enable(copy.deepcopy(alone))
    loss, logits = train_alone(alone)
    whole(**BATCH, num_items_in_batch=COUNT, use_cache=False).loss.backward()
    return {"loss": loss, "logits": logits, "alone": gradients(alone), "whole": gradients(whole)}


def compare_family(name: str, expected: dict[str, Any]) -> dict[str, float]:
    model = enable(tiny_model(name))
    loss, logits, local = train_divided(model, BATCH)
    masks = build_masks(model, Documents(F.pad(IDS, (0, 1), value=-1).int(), "document_ids"))
    ranks = dist.get_world_size()
    plan = plan_context(masks, ranks, layers=layer_types(model))
    return {
        "loss": abs(loss - expected["loss"]) / expected["loss"],
        "logits": logits_error(logits, local, expected["logits"]),
        "gradients alone": gradient_error(model, expected["alone"]),
        "gradients": gradient_error(model, expected["whole"]),
        "local tokens": local.index.shape[1],
        "received": int(plan.received_keys().sum()) / (len(masks) * 2 * 196 * (ranks - 1)),  # of an all-gather
    }


def compare_checkpointing(name: str) -> list[float]:
    """Return the gradient differences of both kinds of gradient checkpointing from none."""
    model = enable(tiny_model(name)).train()
    plain = copy.deepcopy(model)
    train_divided(plain, BATCH)
    errors = []
    for reentrant in (False, True):
        again = copy.deepcopy(model)
        again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        train_divided(again, BATCH)
        errors.append(gradient_error(again, gradients(plain)))
    return errors


def compare_full_rows(name: str, batch: dict[str, Any]) -> dict[str, float]:
    """Compare with the same enabled model on full rows."""
    model = enable(tiny_model(name))
    whole = copy.deepcopy(model)
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    out = whole(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
    loss = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    loss.backward()
    divided, logits, local = train_divided(model, batch)
    return {
        "loss": abs(divided - float(loss.detach())) / float(loss.detach()),
        "logits": logits_error(logits, local, out.logits.detach()),
        "gradients": gradient_error(model, gradients(whole)),
    }


def shared_prompt() -> dict[str, Any]:
    """Return a prompt of 30 tokens, two responses of 20 and 25, and 6 tokens that continue the first."""
    lengths = (30, 20, 25, 6)
    ids = document_ids(lengths)
    positions = torch.cat([torch.arange(start, start + n) for start, n in zip((0, 30, 30, 50), lengths, strict=True)])
    tokens = packed_rows(lengths)["input_ids"]
    return {
        "input_ids": tokens,
        "position_ids": positions[None],
        "document_ids": ids,
        "prefix_ids": torch.tensor([0, 0, 0, 1])[ids],
        "labels": tokens,
    }


def compare_compiled() -> float:
    """Return the gradient difference of a compiled model of one layer."""
    model = enable(tiny_model("llama", num_hidden_layers=1))
    plain = copy.deepcopy(model)
    train_divided(plain, BATCH)
    train_divided(torch.compile(model, backend="eager"), BATCH)
    return gradient_error(model, gradients(plain))


def compare_fused() -> float:
    """Return the gradient difference of a model whose head computes its loss in chunks."""
    fused = enable(tiny_model("gemma2"), fused_loss=True)
    plain = enable(tiny_model("gemma2"))
    train_divided(fused, BATCH)
    train_divided(plain, BATCH)
    return gradient_error(fused, gradients(plain))


def embedded(model: nn.Module) -> dict[str, Any]:
    inputs = {name: value for name, value in BATCH.items() if name != "input_ids"}
    return {**inputs, "inputs_embeds": model.get_input_embeddings()(BATCH["input_ids"])}


def compare_embedded() -> float:
    """Return the gradient difference between tokens and their embeddings as inputs."""
    model = enable(tiny_model("llama"))
    plain = copy.deepcopy(model)
    train_divided(plain, BATCH)
    train_divided(model, embedded(model))
    return gradient_error(model, gradients(plain))


def shift(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + output.roll(1, dims=1)


def planted(fault: str) -> nn.Module:
    """Return a model that cannot be divided."""
    model = enable(tiny_model("llama"))
    if fault == "tokens":
        model.model.layers[1].mlp.register_forward_hook(shift)
    elif fault == "positions":
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "position_ids": None}), with_kwargs=True
        )
    elif fault == "loss":
        function = model.loss_function
        model.loss_function = lambda *args, shift_labels=None, **kwargs: function(*args, **kwargs)
    return model


def run_block(model: nn.Module, batch: dict[str, Any], **more: Any) -> None:
    with context_parallel(model, dist.group.WORLD, batch) as local:
        model(**local, **more)


def other_rows() -> None:
    tokens = BATCH["input_ids"].clone()
    tokens[1, 7] += dist.get_rank()
    run_block(enable(tiny_model("llama")), BATCH | {"input_ids": tokens})


def outside_of_the_block() -> None:
    model = enable(tiny_model("llama"))
    with context_parallel(model, dist.group.WORLD, BATCH) as local:
        pass
    model(**local)


def hooks_of_accelerate() -> None:
    model = enable(tiny_model("llama"))
    _attach_context_parallel_hooks(model)
    model(**BATCH)


def llama() -> nn.Module:
    return enable(tiny_model("llama"))


MASK = causal(2, 195) & document(IDS)
REFUSALS: dict[str, tuple[str, Callable[[], Any]]] = {
    "other rows": (r"ranks \[1\] of the context-parallel group have other rows", other_rows),
    "accelerate": ("as accelerate's context parallelism does", hooks_of_accelerate),
    "outside of the block": ("call the model inside of the block", outside_of_the_block),
    "not enabled": ("LlamaForCausalLM is not enabled", lambda: run_block(tiny_model("llama"), BATCH)),
    "a planted shift": ("depend on the order", lambda: run_block(planted("tokens"), BATCH)),
    "ignored positions": ("depend on the order", lambda: run_block(planted("positions"), BATCH)),
    "a loss of its own": ("its loss is", lambda: run_block(planted("loss"), BATCH)),
    "recurrence": (
        "has recurrent layers",
        lambda: run_block(enable(tiny_model("qwen3_next")), BATCH),
    ),
    "temperature": (
        "attn_temperature_tuning",
        lambda: run_block(enable(tiny_model("llama4_text", floor_scale=128)), BATCH),
    ),
    "routers": (
        "auxiliary loss",
        lambda: run_block(enable(tiny_model("qwen3_moe")), BATCH | {"output_router_logits": True}),
    ),
    "no positions": (
        "needs position_ids",
        lambda: run_block(llama(), {k: v for k, v in BATCH.items() if k != "position_ids"}),
    ),
    "images": ("cannot divide pixel_values", lambda: run_block(llama(), BATCH | {"pixel_values": torch.zeros(1, 3)})),
    "dense mask": (
        "cannot divide an attention_mask",
        lambda: run_block(llama(), BATCH | {"attention_mask": MASK.to_dense()}),
    ),
    "cache": ("fills no cache", lambda: run_block(llama(), BATCH | {"use_cache": True})),
    "masks": (
        "no mask for layers of type sliding_attention",
        lambda: run_block(enable(tiny_model("gemma2")), BATCH | {"attention_masks": MASK}),
    ),
    "documents inside": (
        "inside of context_parallel",
        lambda: run_block(llama(), BATCH, document_ids=torch.zeros(2, 98, dtype=torch.int32)),
    ),
}


def message(case: Callable[[], Any]) -> str:
    try:
        case()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def families_of(ranks: int) -> list[str]:
    return FAMILIES if ranks == 2 else ON_4_RANKS


def all_figures(rank: int, path: str) -> dict[str, Any]:
    expected = torch.load(path)
    figures: dict[str, Any] = {
        name: compare_family(name, expected[name]) for name in families_of(dist.get_world_size())
    }
    run_on = torch.arange(195).expand(2, -1)  # positions that do not show documents
    sources = {
        "document_ids": {"document_ids": IDS},
        "document_lengths": {"document_lengths": [list(row) for row in LAYOUTS]},
        "attention_masks": {"attention_masks": MASK},
    }
    for name, source in sources.items():
        figures[name] = compare_full_rows("llama", BATCH | {"position_ids": run_on} | source)
    if dist.get_world_size() == 2:
        figures["checkpointing"] = {name: compare_checkpointing(name) for name in ("llama", "gpt_oss", "llama4_text")}
        figures["embedded"] = compare_embedded()
        figures["fused"] = compare_fused()
        figures["compiled"] = compare_compiled()
        figures["refusals"] = {name: message(case) for name, (_, case) in REFUSALS.items()}
    figures["prefixes"] = {
        name: compare_full_rows(name, shared_prompt()) for name in ("llama", "gpt_oss", "llama4_text")
    }
    return figures


@cache
def references() -> dict[str, dict[str, Any]]:
    return {name: one_process(name) for name in FAMILIES}


@cache
def figures_of(ranks: int) -> list[dict[str, Any]]:
    with tempfile.NamedTemporaryFile() as file:
        torch.save(references(), file.name)
        return run_on_ranks(ranks, all_figures, file.name)


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks in (2, 4) for name in families_of(ranks)])
def test_families_equal_each_document_alone(ranks: int, name: str) -> None:
    for figures in figures_of(ranks):
        found = figures[name]
        assert found["loss"] < 1e-6
        assert found["logits"] < 1e-4
        assert found["gradients alone"] < 1e-4
        assert found["gradients"] < 5e-6
        assert found["local tokens"] == 196 // ranks
        assert found["received"] < 0.9


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("source", ["document_ids", "document_lengths", "attention_masks"])
def test_stated_documents_and_masks_equal_full_rows(ranks: int, source: str) -> None:
    check(figures_of(ranks), lambda figures: figures[source])


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "llama4_text"])
def test_shared_prefixes_equal_full_rows(ranks: int, name: str) -> None:
    check(figures_of(ranks), lambda figures: figures["prefixes"][name])


def check(results: list[dict[str, Any]], select: Callable[[dict[str, Any]], dict[str, float]]) -> None:
    for figures in results:
        found = select(figures)
        assert found["loss"] < 1e-6
        assert found["logits"] < 2e-5
        assert found["gradients"] < 5e-6


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "llama4_text"])
def test_gradient_checkpointing_is_equal_to_the_bit(name: str) -> None:
    assert all(figures["checkpointing"][name] == [0.0, 0.0] for figures in figures_of(2))


def test_a_compiled_model_is_equal_to_the_bit() -> None:
    assert all(figures["compiled"] == 0.0 for figures in figures_of(2))


def test_fused_loss_equals_the_plain_loss() -> None:
    assert all(figures["fused"] < 5e-6 for figures in figures_of(2))


def test_embeddings_are_divided_like_tokens() -> None:
    assert all(figures["embedded"] < 5e-6 for figures in figures_of(2))


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_divided_is_refused_on_every_rank(name: str) -> None:
    pattern, _ = REFUSALS[name]
    for figures in figures_of(2):
        assert re.search(pattern, figures["refusals"][name])
