from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from sightline import Batch
from sightline.generation import SamplingConfig, generate, stream
from sightline.generation.sampling import sample
from sightline.layers import KeyValueCache
from sightline.masks import AttentionMask, document, sliding_window
from sightline.models import Llama3, build_model


class Letters:
    """Tokenizer in which token i is the character i, and `end` ends a document."""

    def __init__(self, end: int = -1) -> None:
        self.eos_id = end

    def encode_prompt(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids)


class Bytes(Letters):
    """Tokenizer in which token i is the byte i, so that a character has up to four tokens."""

    def encode_prompt(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


class Windowed(Llama3):
    """A model with a sliding window of 4 tokens, and a dict of masks."""

    def __init__(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*args, **kwargs)
        for layer in self.layers.values():
            layer.mask_name = "window"

    def get_attention_masks(self, batch: Batch, tokenizer: object = None) -> dict[str, AttentionMask]:  # type: ignore[override]
        return {"window": sliding_window(*batch.shape, 4) & document(batch.document_ids)}


class Scripted(torch.nn.Module):
    """A model that generates the bytes of a fixed text after a prompt of one token."""

    suppress_tokens = ()
    layers: ClassVar = {"0": SimpleNamespace(mask_name="attention")}

    def __init__(self, text: bytes) -> None:
        super().__init__()
        self.text = text
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def get_attention_masks(self, batch: Batch, tokenizer: object = None) -> AttentionMask:
        return document(batch.document_ids)

    def new_cache(self) -> dict[str, KeyValueCache]:
        return {}

    def forward(self, tokens: Tensor, *, positions: Tensor, **rest) -> Tensor:  # type: ignore[no-untyped-def]
        logits = torch.zeros(1, tokens.shape[1], 256)
        logits[0, -1, self.text[int(positions[0, -1])]] = 1.0
        return logits


def make_model(kind: type[Llama3] = Llama3) -> Llama3:
    torch.manual_seed(0)
    model = kind(build_model("llama3-debug").config)
    model.init_weights()
    return model


def one_document(ids: list[int]) -> Batch:
    return Batch.from_documents([ids], length=len(ids))


def uncached_logits(model: Llama3, ids: list[int]) -> Tensor:
    batch = one_document(ids)
    masks = model.get_attention_masks(batch)
    with torch.no_grad():
        return model(batch.tokens, attention_masks=masks, positions=batch.positions)[0]


@pytest.mark.parametrize("kind", [Llama3, Windowed])
def test_cached_text_equals_uncached_text(kind: type[Llama3]) -> None:
    model = make_model(kind)
    ids = Letters().encode_prompt("hello world")
    expected = []
    for _ in range(20):
        expected.append(int(uncached_logits(model, ids + expected)[-1].argmax()))
    text = generate(model, Letters(), "hello world", SamplingConfig(max_new_tokens=20, temperature=0))
    assert text == Letters().decode(expected)
    assert len(set(text)) > 5, "the text must not be constant"


@pytest.mark.parametrize("kind", [Llama3, Windowed])
def test_cached_logits_equal_uncached_logits(kind: type[Llama3]) -> None:
    model, ids = make_model(kind), list(range(100, 113))
    expected, cache = uncached_logits(model, ids), {name: KeyValueCache() for name in model.layers}
    for first, last in ((0, 6), (6, 7), (7, 8), (8, 13)):
        batch, new = one_document(ids[:last]), torch.arange(first, last)
        masks = model.get_attention_masks(batch)
        part = {"window": masks["window"].take_queries(new)} if kind is Windowed else masks.take_queries(new)
        with torch.no_grad():
            logits = model(batch.tokens[:, new], attention_masks=part, positions=batch.positions[:, new], cache=cache)
        torch.testing.assert_close(logits[0], expected[first:last], atol=1e-5, rtol=1e-5)


def test_window_changes_logits() -> None:
    """Otherwise, the tests above would pass without the window."""
    ids = list(range(100, 113))
    assert not torch.allclose(uncached_logits(make_model(), ids)[-1], uncached_logits(make_model(Windowed), ids)[-1])


def test_stops_at_end_token_and_at_max_new_tokens() -> None:
    model = make_model()
    twelve = SamplingConfig(max_new_tokens=12, temperature=0)
    text = generate(model, Letters(), "ab", twelve)
    assert len(text) == 12
    end = ord(text[5])
    assert generate(model, Letters(end), "ab", twelve) == text[: text.index(chr(end))]
    assert generate(model, Letters(), "ab", SamplingConfig(max_new_tokens=0)) == ""


def test_seed_determines_text() -> None:
    model = make_model()
    texts = [
        generate(model, Letters(), "ab", SamplingConfig(max_new_tokens=16, temperature=1.5, seed=s)) for s in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    before = torch.random.get_rng_state()
    generate(model, Letters(), "ab", SamplingConfig(max_new_tokens=3, seed=5))
    assert torch.equal(torch.random.get_rng_state(), before), "generation does not change the global random state"


def test_pieces_concatenate_to_the_text_and_gradients_stay_enabled() -> None:
    model = make_model()
    pieces = stream(model, Letters(), "ab", SamplingConfig(max_new_tokens=9))
    first = next(pieces)
    assert torch.is_grad_enabled()
    assert first + "".join(pieces) == generate(model, Letters(), "ab", SamplingConfig(max_new_tokens=9))


def test_pieces_do_not_split_characters() -> None:
    text = "aé€😀b"
    model = Scripted(text.encode())
    pieces = list(stream(model, Bytes(), "x", SamplingConfig(max_new_tokens=11, temperature=0)))
    assert pieces == ["a", "é", "€", "😀", "b"]
    truncated = list(stream(model, Bytes(), "x", SamplingConfig(max_new_tokens=8, temperature=0)))
    assert truncated == ["a", "é", "€", "\ufffd"], "an incomplete character is returned at the end"
    broken = Scripted(b"\xe2\x82a\xffb")
    assert "".join(stream(broken, Bytes(), "x", SamplingConfig(max_new_tokens=5, temperature=0))) == "\ufffda\ufffdb"


def sample_many(probabilities: list[float], **options: Any) -> set:
    generator = torch.Generator().manual_seed(0)
    logits, sampling = torch.tensor(probabilities).log(), SamplingConfig(**{"temperature": 1.0, **options})
    return {sample(logits, sampling, generator) for _ in range(300)}


def test_top_k_and_top_p_keep_the_most_likely() -> None:
    p = [0.05, 0.5, 0.15, 0.3]
    assert sample_many(p) == {0, 1, 2, 3}
    assert sample_many(p, temperature=0) == {1}
    assert sample_many(p, top_k=1) == {1}
    assert sample_many(p, top_k=3) == {1, 2, 3}
    assert sample_many(p, top_k=99) == {0, 1, 2, 3}
    assert sample_many(p, top_p=0.01) == {1}
    assert sample_many(p, top_p=0.45) == {1}
    assert sample_many(p, top_p=0.7) == {1, 3}, "0.5 + 0.3 is the first sum to reach 0.7"
    assert sample_many(p, top_p=0.9) == {1, 2, 3}
    assert sample_many(p, top_k=2, top_p=0.9) == {1, 3}
    assert sample_many(p, temperature=0.01) == {1}


def test_sampling_follows_the_probabilities() -> None:
    generator, logits = torch.Generator().manual_seed(0), torch.tensor([0.2, 0.8]).log()
    fraction = sum(sample(logits, SamplingConfig(temperature=1.0), generator) for _ in range(2000)) / 2000
    assert fraction == pytest.approx(0.8, abs=0.04)
    fraction = sum(sample(logits, SamplingConfig(temperature=2.0), generator) for _ in range(2000)) / 2000
    assert fraction == pytest.approx(2 / 3, abs=0.04)  # sqrt(0.8) / (sqrt(0.8) + sqrt(0.2))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": -0.1}, "temperature must be 0 .* or greater, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 .* got nan"),
        ({"top_p": 0.0}, "top-p must be greater than 0 and at most 1 .*got 0.0"),
        ({"top_p": 1.5}, "top-p .*got 1.5"),
        ({"top_k": 0}, "top-k must be at least 1 token, got 0"),
        ({"max_new_tokens": -1}, "max-new-tokens must be at least 0, got -1"),
    ],
)
def test_invalid_options_raise(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SamplingConfig(**options)


def test_prompt_without_tokens_raises_before_generation() -> None:
    with pytest.raises(ValueError, match="the prompt '' has no tokens"):
        stream(make_model(), Letters(), "")
