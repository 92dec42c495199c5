"""Batches of prompts of unequal length, for every family, against the full text of each prompt without a cache."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from sightline import Batch
from sightline.data import pack_patches
from sightline.generation import SamplingConfig, generate, generate_batch
from sightline.generation.masks import Prompt, StepMasks, new_token_masks
from sightline.generation.tokens import generate_tokens
from sightline.layers import KeyValueCache
from sightline.masks import AttentionMask, causal, document, global_tokens, named_masks, sliding_window
from sightline.models import Llama3, build_model, config_of
from tests.support.against_transformers import Numbers

MODELS = [
    *("llama3-debug", "qwen3-debug", "qwen3-debug-moe", "gpt_oss-debug", "deepseek_v3-debug"),
    *("llama4-debug", "qwen3_next-debug", "vlm-debug"),
]
LENGTHS = (1, 7, 40, 19)
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0)


@cache
def make_model(name: str, **fields: Any) -> Any:
    """Build a model in float64, so that no rounding decides between two tokens."""
    torch.manual_seed(1)
    model = build_model(replace(config_of(name), **fields)).double().eval()
    return model


def short_windows(name: str) -> Any:
    """Return the model with windows and chunks that are shorter than the prompts."""
    fields = {"gpt_oss-debug": {"sliding_window": 6}, "llama4-debug": {"attention_chunk_size": 9}}
    return make_model(name, **fields.get(name, {}))


def random_prompts(lengths: tuple[int, ...] = LENGTHS, vocab_size: int = 500) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def uncached_text(model: Any, prompt: list[int], count: int, extra: dict[str, Tensor] | None = None) -> list[int]:
    """Greedy decoding that computes the full text for every token."""
    text = list(prompt)
    for _ in range(count):
        batch = replace(Batch.from_rows([row_of(text)]), extra=extra or {})
        masks = model.get_attention_masks(batch)
        logits = model(batch.tokens, attention_masks=masks, positions=batch.positions, **batch.extra)[0, -1]
        logits[list(model.suppress_tokens)] = -torch.inf
        text.append(int(logits.argmax()))
    return text[len(prompt) :]


def row_of(text: list[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    return text, [-100] * len(text), [0] * len(text), list(range(len(text)))


class Ending(Numbers):
    """Tokenizer with an end token."""

    def __init__(self, eos_id: int) -> None:
        self.eos_id = eos_id


@pytest.mark.parametrize("name", MODELS)
def test_batch_equals_full_texts(name: str) -> None:
    model, prompts = short_windows(name), random_prompts()
    expected = [uncached_text(model, prompt, 12) for prompt in prompts]
    assert len({token for text in expected for token in text}) > 8, "the texts must not be constant"
    texts = generate_batch(model, Numbers(), prompts, GREEDY)
    assert texts == [Numbers().decode(text) for text in expected]
    assert generate(model, Numbers(), prompts[2], GREEDY) == texts[2]


@pytest.mark.parametrize("name", ["llama3-debug", "gpt_oss-debug", "qwen3_next-debug"])
def test_rows_end_independently(name: str) -> None:
    """The end token is one that row 2 generates as its fourth; other rows go on, and no forward has the ended row."""
    model, prompts = short_windows(name), random_prompts()
    full = [uncached_text(model, prompt, 12) for prompt in prompts]
    end = full[2][3]
    expected = [text[: text.index(end)] if end in text else text for text in full]
    steps = list(generate_tokens(model, Ending(end), [Prompt(p, {}) for p in prompts], GREEDY))
    assert [[new[row] for new in steps if row in new] for row in range(4)] == expected
    assert len(expected[2]) <= 3 and max(map(len, expected)) == len(steps)
    assert all(2 not in new for new in steps[len(expected[2]) :])


def test_all_rows_end_at_once() -> None:
    model, prompt = short_windows("llama3-debug"), random_prompts()[1]
    end = uncached_text(model, prompt, 1)[0]
    assert generate_batch(model, Ending(end), [prompt, prompt], GREEDY) == ["", ""]
    assert generate_batch(model, Numbers(), [], GREEDY) == []
    assert generate_batch(model, Numbers(), [prompt], SamplingConfig(max_new_tokens=0)) == [""]


@pytest.mark.parametrize("name", ["llama3-debug", "qwen3_next-debug"])
def test_a_row_samples_as_alone(name: str) -> None:
    model, prompts = short_windows(name), random_prompts()
    sampling = SamplingConfig(max_new_tokens=10, temperature=1.3, top_p=0.95, seed=2**64 - 2)
    texts = generate_batch(model, Numbers(), prompts, sampling)
    seeds = [2**64 - 2, 2**64 - 1, 0, 1]
    alone = [generate(model, Numbers(), p, replace(sampling, seed=s)) for p, s in zip(prompts, seeds, strict=True)]
    assert texts == alone
    same_prompt = generate_batch(model, Numbers(), [prompts[1]] * 3, sampling)
    assert len(set(same_prompt)) == 3, "rows with the same prompt have different seeds"


def test_float32_batch_equals_float32_alone() -> None:
    torch.manual_seed(1)
    model = build_model("qwen3-debug-moe").eval()
    texts = generate_batch(model, Numbers(), random_prompts(), GREEDY)
    assert texts == [generate(model, Numbers(), prompt, GREEDY) for prompt in random_prompts()]


def test_images_in_a_batch() -> None:
    """Prompts with two images, one image and none; in the third place, a prompt of text only."""
    model = make_model("vlm-debug")
    image, rng = model.config.image_token_id, torch.Generator().manual_seed(3)

    def pixels(*sizes: tuple[int, int]) -> dict[str, Tensor]:
        images = [torch.randint(256, (h, w, 3), generator=rng, dtype=torch.uint8).numpy() for h, w in sizes]
        packed = pack_patches([images], model.config.vision.patch_size)
        return {"patches": packed["patches"].double(), "patch_grid": packed["patch_grid"]}

    side = model.config.vision.patch_size * model.config.spatial_merge_size  # one image token
    extras = [pixels((side, 2 * side), (side, side)), pixels((2 * side, 2 * side)), {}]
    prompts = [[5, image, image, 7, image, 8], [image] * 4 + [3, 4], [9, 10, 11]]
    expected = [uncached_text(model, p, 8, e) for p, e in zip(prompts, extras, strict=True)]
    eight = replace(GREEDY, max_new_tokens=8)
    texts = generate_batch(model, Numbers(), prompts, eight, extras=extras)
    assert texts == [Numbers().decode(text) for text in expected]
    swapped = generate_batch(model, Numbers(), [prompts[0]], eight, extras=[pixels((side, 2 * side), (side, side))])
    assert swapped[0] != texts[0], "the images make no difference"


@pytest.mark.parametrize(
    ("name", "mask_name", "most"), [("gpt_oss-debug", "window", 6), ("llama4-debug", "chunked", 9)]
)
def test_windows_and_chunks_bound_the_cache(name: str, mask_name: str, most: int, monkeypatch: Any) -> None:
    """Layers with a window keep as many keys as a query attends to; the others keep all keys."""
    model, lengths = short_windows(name), {}
    append = KeyValueCache.append

    def spy(self: KeyValueCache, *new: Tensor) -> tuple[Tensor, ...]:
        tensors = append(self, *new)
        lengths.setdefault(id(self), []).append((tensors[0].shape[2], self._buffers[0].shape[2]))
        return tensors

    monkeypatch.setattr(KeyValueCache, "append", spy)
    generate(model, Numbers(), random_prompts()[2], SamplingConfig(max_new_tokens=40, temperature=0))
    for layer, sizes in zip(model.layers.values(), lengths.values(), strict=True):
        lengths_, capacities = zip(*sizes[1:], strict=True)  # the first has the prompt
        if layer.mask_name == mask_name:
            assert max(lengths_) == most and max(capacities) <= 4 * most
        else:
            assert lengths_ == tuple(range(41, 41 + len(lengths_)))


class GlobalAndWindow(Llama3):
    """K = 2: the first tokens of the document are global, the others attend to a window."""

    def get_attention_masks(self, batch: Batch, tokenizer: object = None) -> AttentionMask:
        rows, length = batch.shape
        window = sliding_window(rows, length, 3) | global_tokens(batch.positions < 2)
        return window & causal(rows, length) & document(batch.document_ids)


def make_global() -> GlobalAndWindow:
    model = GlobalAndWindow(build_model("llama3-debug").config)
    model.init_weights()
    return model.double()


def test_masks_of_several_intervals() -> None:
    model, prompts = make_global(), random_prompts()
    texts = generate_batch(model, Numbers(), prompts, GREEDY)
    assert texts == [Numbers().decode(uncached_text(model, prompt, 12)) for prompt in prompts]


@pytest.mark.parametrize("name", ["gpt_oss-debug", "llama4-debug", "global"])
def test_step_masks_are_the_masks_of_the_full_text(name: str) -> None:
    model = make_global() if name == "global" else short_windows(name)
    prompts = [Prompt(ids, {}) for ids in random_prompts()]
    steps, rows = StepMasks(model, None, prompts, 15), [0, 1, 2, 3]
    for step in range(15):
        if step == 6:
            steps.select(torch.tensor([0, 2]))
            rows = [0, 2]
        for mask_name, mask in steps.at(step).items():
            assert mask.equal(AttentionMask.from_dense(mask.to_dense())), "not canonical"
            first = steps.first_column(mask_name, step)
            for row, dense in zip(rows, mask.to_dense(), strict=True):
                full = new_token_masks(model, None, prompts[row], [0] * (step + 1))[mask_name].to_dense()[0, -1]
                padded = torch.cat([full.new_zeros(steps.width - len(prompts[row].ids)), full])
                assert torch.equal(dense[0], padded[first:]) and not padded[:first].any()


class TagMask(Llama3):
    """A mask that depends on the values of tokens: even tokens are in one span, odd ones in another."""

    def get_attention_masks(self, batch: Batch, tokenizer: object = None) -> AttentionMask:
        return causal(*batch.shape) & document((batch.tokens % 2).int())


def test_masks_of_generated_tokens_are_refused() -> None:
    model = TagMask(build_model("llama3-debug").config)
    model.init_weights()
    with pytest.raises(ValueError, match="mask 'attention' of a TagMask depends on the generated tokens"):
        generate(model, Numbers(), random_prompts()[2], GREEDY)


@pytest.mark.parametrize("name", MODELS)
def test_last_token_only(name: str) -> None:
    model, batch = make_model(name), Batch.from_documents(random_prompts((12, 8)), length=20)
    inputs = {"attention_masks": named_masks(model.get_attention_masks(batch)), "positions": batch.positions}
    with torch.no_grad():
        full, last = (model(batch.tokens, **inputs, last_token_only=only) for only in (False, True))
    torch.testing.assert_close(last, full[:, -1:], atol=1e-12, rtol=0)


def test_wrong_arguments_are_refused() -> None:
    model = make_model("llama3-debug")
    with pytest.raises(ValueError, match="expected a list of prompts, got the text '1 2'"):
        generate_batch(model, Numbers(), "1 2")
    with pytest.raises(ValueError, match="got 1 extras for 2 prompts; expected one for each"):
        generate_batch(model, Numbers(), ["1", "2"], extras=[{}])
    with pytest.raises(ValueError, match=r"the prompt \[\] has no tokens"):
        generate_batch(model, Numbers(), [[1], []])
