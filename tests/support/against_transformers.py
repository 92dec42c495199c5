"""Comparison of each family with its reference, the transformers model, run on one unpacked document at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline import Batch
from sightline.generation import SamplingConfig, generate
from sightline.models import family_of, load_pretrained, save_pretrained
from sightline.training.step import named_masks

LOGITS = 1e-4
GRADIENTS = 1e-3  # relative to the largest element of each gradient


def random_theirs(model: type, config: Any, spread: float = 0.15) -> nn.Module:
    """Build a transformers model with random weights, none 0 or 1, so that missing or swapped weights are detected."""
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    theirs = model(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter + spread * torch.randn_like(parameter))
    return theirs


def as_ours(theirs: Any, directory: Path) -> Any:
    """Save a transformers model with transformers and load it with Sightline."""
    theirs.save_pretrained(directory)
    return load_pretrained(directory)


def random_documents(lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def run(model: Any, batch: Batch, *, labels: bool = False) -> Tensor:
    return model(
        batch.tokens,
        attention_masks=model.get_attention_masks(batch),
        positions=batch.positions,
        labels=batch.labels if labels else None,
    )


def pieces(batch: Batch) -> Iterator[tuple[int, Tensor]]:
    """Yield (row, token indices) of every document of the batch."""
    for row in range(batch.shape[0]):
        for number in range(int(batch.document_ids[row].max()) + 1):
            yield row, (batch.document_ids[row] == number).nonzero()[:, 0]


def assert_same_model(ours: Any, theirs: Any, documents: list[list[int]], length: int) -> None:
    """Compare the logits of all tokens and all gradients: ours from packed rows, theirs from single documents."""
    batch = Batch.from_documents(documents, length=length)
    packed = [(row, index) for row, index in pieces(batch)]
    assert [batch.tokens[row, index].tolist() for row, index in packed] == documents, "a document was split"
    ours.zero_grad()
    theirs.zero_grad()

    logits, loss = run(ours, batch), run(ours, batch, labels=True)
    their_loss = torch.zeros(())
    for row, index in packed:
        tokens = batch.tokens[row, index][None]
        expected = theirs(input_ids=tokens, use_cache=False).logits[0]
        torch.testing.assert_close(logits[row, index], expected, atol=LOGITS, rtol=0)
        their_loss = their_loss + F.cross_entropy(expected[:-1], tokens[0, 1:], reduction="sum")
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=0)

    loss.backward()
    their_loss.backward()
    assert_same_gradients(ours, theirs)


def assert_same_gradients(ours: Any, theirs: Any) -> None:
    """Compare the gradients of all parameters, converted to the same layout by the weight mapping of the family."""
    our_grads = {name: parameter.grad for name, parameter in ours.named_parameters()}
    mapping = list(family_of(ours.config).hf.weights(ours.config))
    their_grads = dict(_their_grads(theirs, {weight.theirs for weight in mapping}))
    weights = [weight for weight in mapping if weight.ours in our_grads]
    assert {weight.ours for weight in weights} == set(our_grads)
    assert {weight.theirs for weight in weights} == set(their_grads)
    for weight in weights:
        actual, expected = our_grads[weight.ours], their_grads[weight.theirs]
        assert actual is not None and expected is not None, weight
        actual, expected = weight.of_ours(actual), weight.of_theirs(expected)
        largest = expected.abs().max().item()
        unused_expert = ".experts." in weight.theirs and largest == 0.0  # an expert that received no token
        assert unused_expert or largest > 1e-6, f"{weight.theirs} has a zero gradient, so nothing is compared"
        torch.testing.assert_close(
            actual, expected, atol=GRADIENTS * largest, rtol=0, msg=lambda m, w=weight: f"{w}: {m}"
        )


def _their_grads(theirs: Any, names: set[str]) -> Iterator[tuple[str, Tensor | None]]:
    """Yield gradients by their names in checkpoints, where some models have one tensor per expert, not a fused one."""
    for name, parameter in theirs.named_parameters():
        experts, _, kind = name.rpartition(".")
        if name in names or not experts.endswith(".experts"):
            yield name, parameter.grad
            continue
        for e in range(len(parameter)):
            grad = None if parameter.grad is None else parameter.grad[e]
            if kind == "gate_up_proj" and grad is not None:
                yield f"{experts}.{e}.gate_proj.weight", grad.chunk(2)[0]
                yield f"{experts}.{e}.up_proj.weight", grad.chunk(2)[1]
            else:
                yield f"{experts}.{e}.{kind}.weight", grad


def assert_round_trip(ours: Any, theirs: Any, model: type, tokens: Tensor, directory: Path) -> None:
    """Save with Sightline, load with transformers: equal logits, and bitwise equal weights."""
    save_pretrained(ours, directory)
    config = model.config_class.from_pretrained(directory)
    config._attn_implementation = "eager"
    reloaded = model.from_pretrained(directory, config=config).eval()
    state, before = reloaded.state_dict(), theirs.state_dict()
    assert list(state) == list(before) and all(torch.equal(state[name], before[name]) for name in state)
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids=tokens).logits, theirs(input_ids=tokens).logits)


def assert_cached_logits(ours: Any, tokens: list[int], cuts: Sequence[int]) -> None:
    """Compare the logits of a document computed in pieces with a cache to those of the full document."""
    with torch.no_grad():
        full_logits = run(ours, Batch.from_documents([tokens], length=len(tokens)))[0]
        cache, first = ours.new_cache(), 0
        for last in (*cuts, len(tokens)):
            batch, new = Batch.from_documents([tokens[:last]], length=last), torch.arange(first, last)
            masks = named_masks(ours.get_attention_masks(batch))
            masks = {name: mask.take_queries(new) for name, mask in masks.items()}
            positions = batch.positions[:, new]
            logits = ours(batch.tokens[:, new], attention_masks=masks, positions=positions, cache=cache)
            torch.testing.assert_close(logits[0], full_logits[first:last], atol=LOGITS, rtol=0)
            first = last


class Numbers:
    """Tokenizer whose text is the token ids, each followed by a space."""

    eos_id = -1

    def encode_prompt(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"{token} " for token in ids)


def assert_greedy_text(ours: Any, tokens: list[int], count: int) -> None:
    """Compare generated text with greedy decoding that recomputes the full text for every token."""
    text = list(tokens)
    with torch.no_grad():
        for _ in range(count):
            text.append(int(run(ours, Batch.from_documents([text], length=len(text)))[0, -1].argmax()))
    generated = generate(ours, Numbers(), Numbers().decode(tokens), SamplingConfig(max_new_tokens=count, temperature=0))
    assert generated == Numbers().decode(text[len(tokens) :])


def assert_no_leakage(ours: Any, batch: Batch, row: int, changed: int) -> None:
    """Perturb one token: only the logits of its document from this token on change.

    In float64 with a tolerance, since experts multiply the tokens of all documents at once, and their number may change
    rounding. The gradients of the other documents' logits with respect to this document must be exactly 0.
    """
    ours = ours.double()
    tokens = batch.tokens.clone()
    tokens[row, changed] = (tokens[row, changed] + 1) % ours.config.vocab_size
    same = batch.document_ids == batch.document_ids[row, changed]
    same[torch.arange(len(same)) != row] = False

    affected = same.clone()
    affected[:, :changed] = False

    before, after = run(ours, batch), run(ours, replace(batch, tokens=tokens))
    assert torch.equal((before - after).abs().amax(dim=-1) > 1e-12, affected)

    h = ours.embedding(batch.tokens)
    masks = ours.get_attention_masks(batch)
    logits = ours.forward_embedded(h, attention_masks=masks, positions=batch.positions, labels=None, cache=None)
    (grads,) = torch.autograd.grad(logits[~same].square().sum(), h)
    assert torch.equal(grads[same], torch.zeros_like(grads[same])) and grads[~same].abs().sum() > 0
