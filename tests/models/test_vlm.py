"""The vision-language model against LFM2-VL of transformers with a Llama decoder: each document and each image alone.
Also leakage tests through patches, spans and the cache."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration

from sightline import Batch
from sightline.config import LoggingConfig, ValidationConfig
from sightline.generation import SamplingConfig, generate
from sightline.models import VLM, VisionConfig, VLMConfig, build_model, load_pretrained, save_pretrained
from sightline.models.llama3 import LLAMA3
from sightline.models.vlm import VLM_FAMILY
from sightline.recipes import RECIPES
from sightline.training.metrics import read_metrics
from tests.support.against_transformers import as_ours, count_parameters, random_theirs
from tests.support.small_runs import train_quietly

IMAGE = 95  # the image token
PATCH_CHANNELS = 12  # 2 x 2 pixels of 3 colors
FIELDS = ("tokens", "labels", "document_ids", "positions")

Image = tuple[int, int]  # height and width in patches
Document = list[int | Image]  # token ids and images, in order
DOCUMENTS: list[Document] = [
    [1, 2, (2, 4), 3, 4, 5, (4, 4), 6],
    [7, (2, 2), (6, 2), 8, 9, 10],  # two images side by side
    [11, 12, 13],
    [(4, 6), 14, 15, 16, 17],
]
TEXTS: list[Document] = [[20, 21, 22], [23, 24]]
LENGTH = 40


def ids_of(document: Document, merge: int) -> list[int]:
    """Return the token ids, with the image tokens of each image."""
    ids: list[int] = []
    for part in document:
        ids += [part] if isinstance(part, int) else [IMAGE] * (part[0] * part[1] // merge**2)
    return ids


def images_of(documents: Sequence[Document]) -> list[Image]:
    return [part for document in documents for part in document if not isinstance(part, int)]


def pixels(size: Image) -> Tensor:
    """Return the patches of an image; images of equal size are equal."""
    return torch.randn(
        size[0] * size[1], PATCH_CHANNELS, generator=torch.Generator().manual_seed(10 * size[0] + size[1])
    )


def make_batch(rows: Sequence[Sequence[Document]], merge: int = 2) -> Batch:
    """Make one row per list of documents. Padding patches are 9; their value must not matter."""
    texts = [Batch.from_documents([ids_of(document, merge) for document in row], LENGTH) for row in rows]
    assert all(text.shape == (1, LENGTH) for text in texts), "the documents of a row must fit"
    images = [images_of(row) for row in rows]
    grid = torch.zeros(len(rows), 1 + max(len(sizes) for sizes in images), 2, dtype=torch.int64)
    patches = torch.full((len(rows), 80, PATCH_CHANNELS), 9.0)
    for row, sizes in enumerate(images):
        if sizes:
            row_patches = torch.cat([pixels(size) for size in sizes])
            patches[row, : len(row_patches)] = row_patches
            grid[row, : len(sizes)] = torch.tensor(sizes)
    fields = {name: torch.cat([getattr(text, name) for text in texts]) for name in FIELDS}
    fields["labels"] = fields["labels"].masked_fill(fields["labels"] == IMAGE, -100)
    return Batch(**fields, extra={"patches": patches, "patch_grid": grid})


def run(model: VLM, batch: Batch, *, labels: bool = False) -> Tensor:
    return model(
        batch.tokens,
        attention_masks=model.get_attention_masks(batch),
        positions=batch.positions,
        labels=batch.labels if labels else None,
        **batch.extra,
    )


def make_theirs(*, tied: bool = False, merge: int = 2) -> nn.Module:
    text = {
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "tie_word_embeddings": tied,
    }
    vision = {
        "model_type": "siglip2_vision_model",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": 2,
        "num_patches": 9,
        "vision_use_head": False,
    }
    config = Lfm2VlConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        projector_hidden_size=40,
        downsample_factor=merge,
        tie_word_embeddings=tied,
    )
    return random_theirs(Lfm2VlForConditionalGeneration, config)


def run_theirs(theirs: nn.Module, document: Document, merge: int = 2) -> Tensor:
    """Return the logits [n, V] of one document alone, with a dense mask built pair by pair."""
    ids, images = ids_of(document, merge), images_of([document])
    spans: list[int] = []
    for number, part in enumerate(document):
        spans += [-1] if isinstance(part, int) else [number] * (part[0] * part[1] // merge**2)
    index = range(len(ids))
    visible = torch.tensor([[k <= q or (spans[q] >= 0 and spans[q] == spans[k]) for k in index] for q in index])
    extra = {}
    if images:
        values = nn.utils.rnn.pad_sequence([pixels(size) for size in images], batch_first=True)
        real = nn.utils.rnn.pad_sequence([torch.ones(h * w, dtype=torch.int64) for h, w in images], batch_first=True)
        extra = {"pixel_values": values, "pixel_attention_mask": real, "spatial_shapes": torch.tensor(images)}
    bias = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    tokens = torch.tensor([ids])
    return theirs(input_ids=tokens, attention_mask=bias[None, None], use_cache=False, **extra).logits[0]


def assert_same_model(ours: VLM, theirs: nn.Module, rows: Sequence[Sequence[Document]], merge: int = 2) -> None:
    """Compare the logits of all tokens and the gradients of all parameters."""
    batch = make_batch(rows, merge)
    logits, loss = run(ours, batch), run(ours, batch, labels=True)
    their_loss = torch.zeros(())
    for row, documents in enumerate(rows):
        first = 0
        for document in documents:
            expected = run_theirs(theirs, document, merge)
            span = slice(first, first + len(expected))
            torch.testing.assert_close(logits[row, span], expected, atol=1e-4, rtol=0)
            their_loss += F.cross_entropy(expected, batch.labels[row, span], reduction="sum")
            first += len(expected)
        assert (batch.document_ids[row] >= 0).sum() == first
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=0)

    loss.backward()
    their_loss.backward()
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    weights = list(VLM_FAMILY.hf.weights(ours.config))
    assert {weight.theirs for weight in weights} == set(grads)
    assert {weight.ours for weight in weights} == {name for name, _ in ours.named_parameters()}
    for weight in weights:
        mine, other = ours.get_parameter(weight.ours).grad, grads[weight.theirs]
        if weight.ours.endswith(
            "key.bias"
        ):  # shifts all scores of a query equally: its gradient is only rounding error
            assert mine.abs().max() < 1e-4 and other.abs().max() < 1e-4
            continue
        largest = other.abs().max().item()
        assert largest > 1e-3, f"{weight.theirs} has no gradient, so the comparison proves nothing"
        torch.testing.assert_close(mine, other, atol=1e-3 * largest, rtol=0, msg=lambda m, w=weight: f"{w}: {m}")


@pytest.mark.parametrize("tied", [False, True])
def test_packed_equals_transformers_on_each_document(tmp_path: Path, tied: bool) -> None:
    theirs = make_theirs(tied=tied)
    ours = as_ours(theirs, tmp_path)
    assert type(ours) is VLM and (ours.output is None) == tied
    assert_same_model(ours, theirs, [DOCUMENTS, TEXTS])


def test_single_document_equals_transformers(tmp_path: Path) -> None:
    theirs = make_theirs()
    assert_same_model(as_ours(theirs, tmp_path), theirs, [DOCUMENTS[1:2]])


def test_merge_size_1_allows_one_patch_and_odd_sizes(tmp_path: Path) -> None:
    theirs = make_theirs(merge=1)
    documents: list[Document] = [[1, (1, 1), 2, 3], [4, (3, 5), (1, 1), 5], [(2, 3), 6, 7]]
    assert_same_model(as_ours(theirs, tmp_path), theirs, [documents, [[8, (1, 1), 9]]], merge=1)


def test_transformers_loads_saved_model(tmp_path: Path) -> None:
    theirs = make_theirs()
    ours = as_ours(theirs, tmp_path / "theirs")
    save_pretrained(ours, tmp_path / "ours")
    back = Lfm2VlForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    state, before = back.state_dict(), theirs.state_dict()
    assert list(state) == list(before) and all(torch.equal(state[name], before[name]) for name in state)
    for document in DOCUMENTS:
        torch.testing.assert_close(run_theirs(back, document), run_theirs(theirs, document), atol=1e-5, rtol=0)
    assert load_pretrained(tmp_path / "ours").config == ours.config


@pytest.fixture(scope="module")
def ours() -> VLM:
    torch.manual_seed(0)
    vision = VisionConfig(
        hidden_size=24, num_layers=2, num_heads=4, intermediate_size=40, patch_size=2, position_grid_size=3
    )
    text = replace(LLAMA3.presets["debug"], vocab_size=96, hidden_size=32, intermediate_size=48)
    model = build_model(
        VLMConfig(**{**vars(text), "image_token_id": IMAGE, "vision": vision, "projector_hidden_size": 40})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def span(batch: Batch, number: int) -> Tensor:
    """Return the mask, bool [B, S], of the tokens of one image of row 0."""
    counts = (batch.extra["patch_grid"][0].prod(dim=1) // 4).tolist()
    tokens = (batch.tokens[0] == IMAGE).nonzero()[:, 0].split([n for n in counts if n])[number]
    mask = torch.zeros_like(batch.tokens, dtype=torch.bool)
    mask[0, tokens] = True
    return mask


@pytest.mark.parametrize("number", range(5))
def test_changed_patch_affects_only_its_image_and_later_tokens(ours: VLM, number: int) -> None:
    batch = make_batch([DOCUMENTS, TEXTS])
    patches = batch.extra["patches"].clone()
    sizes = batch.extra["patch_grid"][0].prod(dim=1)
    patches[0, int(sizes[: number + 1].sum()) - 1] += 1.0  # the image's last patch
    changed = (run(ours, batch) != run(ours, replace(batch, extra={**batch.extra, "patches": patches}))).any(dim=2)
    image = span(batch, number)
    document = batch.document_ids == batch.document_ids[image][0]
    document[1] = False
    expected = document & (image.cumsum(dim=1) > 0)
    assert torch.equal(changed, expected), "only tokens of the image and later tokens of its document may change"


def test_gradients_stay_in_the_document(ours: VLM) -> None:
    batch = make_batch([DOCUMENTS, TEXTS])
    patches = batch.extra["patches"].clone().requires_grad_()
    logits = run(ours, replace(batch, extra={**batch.extra, "patches": patches}))
    (grads,) = torch.autograd.grad(logits[0, batch.document_ids[0] == 1].square().sum(), patches)
    nonzero = grads.abs().sum(dim=2) > 0
    first = 8 + 16  # patches of the first document's images
    expected = torch.zeros_like(nonzero)
    expected[0, first : first + 4 + 12] = True
    assert torch.equal(nonzero, expected)


def test_changed_text_token_affects_only_its_document(ours: VLM) -> None:
    batch = make_batch([DOCUMENTS, TEXTS])
    tokens = batch.tokens.clone()
    tokens[0, 0] = 50
    changed = (run(ours, batch) != run(ours, replace(batch, tokens=tokens))).any(dim=2)
    expected = batch.document_ids == 0
    expected[1] = False
    assert torch.equal(changed, expected)


def test_rows_are_independent_and_padding_patches_do_not_matter(ours: VLM) -> None:
    batch = make_batch([DOCUMENTS, TEXTS, [[1, (2, 2), 2]]])
    logits = run(ours, batch)
    for row in range(3):
        torch.testing.assert_close(run(ours, batch[row : row + 1]), logits[row : row + 1], atol=1e-5, rtol=0)
    clean = batch.extra["patches"].masked_fill(batch.extra["patches"] == 9.0, 0.0)
    assert torch.equal(run(ours, replace(batch, extra={**batch.extra, "patches": clean})), logits)


def test_batch_without_images_equals_text(ours: VLM) -> None:
    batch = make_batch([TEXTS])
    bare = replace(batch, extra={})
    assert list(ours.get_attention_masks(bare)) == ["decoder"]
    assert torch.equal(run(ours, bare), run(ours, batch))
    ours.zero_grad()
    run(ours, batch, labels=True).backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in ours.vision.parameters())


def test_masks_pair_by_pair(ours: VLM) -> None:
    batch = make_batch([[[1, (2, 4), (2, 2), 2], [(2, 2), 3]]])
    masks = ours.get_attention_masks(batch)
    decoder = """
        x......
        xxx....
        xxx....
        xxxx...
        xxxxx..
        .....x.
        .....xx
    """
    expected = torch.tensor([[c == "x" for c in line.strip()] for line in decoder.strip().splitlines()])
    dense = masks["decoder"].to_dense()[0]
    assert torch.equal(dense[:7, :7], expected) and dense.sum() == expected.sum()
    images = torch.block_diag(torch.ones(8, 8), torch.ones(4, 4), torch.ones(4, 4), torch.zeros(64, 64)).bool()
    assert torch.equal(masks["encoder"].to_dense()[0], images)


def test_loss_under_bfloat16_autocast_is_close(ours: VLM) -> None:
    batch = make_batch([DOCUMENTS, TEXTS])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = run(ours, batch, labels=True)
    torch.testing.assert_close(loss, run(ours, batch, labels=True), atol=0, rtol=2e-2)


def test_masks_split_by_rows(ours: VLM) -> None:
    """Pipeline parallelism splits every tensor of a mask along B."""
    batch = make_batch([DOCUMENTS, TEXTS, [[1, (2, 2), 2]]])
    masks = ours.get_attention_masks(batch)
    for row in range(3):
        for name, mask in ours.get_attention_masks(batch[row : row + 1]).items():
            assert mask.equal(masks[name][row])


def test_pipeline_stage_without_embedding_needs_no_encoder(ours: VLM) -> None:
    batch = make_batch([DOCUMENTS, TEXTS])
    inputs = {
        "attention_masks": ours.get_attention_masks(batch),
        "positions": batch.positions,
        **batch.extra,
    }
    first, last = (build_model(ours.config) for _ in range(2))
    for stage in (first, last):
        stage.load_state_dict(ours.state_dict())
    del first.layers["1"]
    first.norm = first.output = None
    del last.layers["0"]
    last.embedding = last.vision = last.projector = None
    assert torch.equal(last(first(batch.tokens, **inputs), **inputs), run(ours, batch))


class Letters:
    """A tokenizer with one token per letter."""

    eos_id = 94

    def encode_prompt(self, text: str) -> list[int]:
        return [ord(letter) - 32 for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(token + 32) for token in ids)


def test_generation_uses_prompt_images_and_never_generates_image_tokens(ours: VLM) -> None:
    document: Document = [1, (2, 4), 3, (4, 2)]
    batch, ids = make_batch([[document]]), ids_of(document, 2)
    greedy = SamplingConfig(max_new_tokens=8, temperature=0.0)
    text = Letters().encode_prompt(generate(ours, Letters(), ids, greedy, extra=batch.extra))
    expected = list(ids)
    with torch.no_grad():
        for _ in range(8):
            text_batch = Batch.from_documents([expected], len(expected))
            logits = run(ours, replace(text_batch, extra=batch.extra))[0, -1]
            logits[IMAGE] = -torch.inf
            if int(logits.argmax()) == Letters.eos_id:
                break
            expected.append(int(logits.argmax()))
    assert text == expected[len(ids) :] and len(text) > 2

    with torch.no_grad():
        ours.output.weight[IMAGE] *= 100.0  # the likeliest token if its logit is positive
    sampled = Letters().encode_prompt(
        generate(ours, Letters(), ids, SamplingConfig(max_new_tokens=20), extra=batch.extra)
    )
    with torch.no_grad():
        ours.output.weight[IMAGE] /= 100.0
    assert sampled and IMAGE not in sampled


def with_extra(batch: Batch, **changed: Tensor) -> Batch:
    return replace(batch, extra={**batch.extra, **changed})


def test_invalid_patches_raise(ours: VLM) -> None:
    batch = make_batch([[[1, (2, 4), (2, 2), 2], [(2, 2), 3]]])
    grid, patches = batch.extra["patch_grid"], batch.extra["patches"]
    cases = [
        (with_extra(batch, patch_grid=grid[:, :2]), r"row 0 has 4 image tokens \(95\); expected 3 from its patch_grid"),
        (with_extra(batch, patch_grid=grid + 1), r"multiples of 2 \(spatial-merge-size\), got \[3, 5\]; resize"),
        (with_extra(batch, patch_grid=grid * 8), "patch_grid has 1024 patches in a row, but patches has only 80"),
        (with_extra(batch, patch_grid=grid.float()), r"must be integers \[B, N, 2\].*torch.float32"),
        (with_extra(batch, patches=patches[..., :9]), r"must be \[B, P, 12\].*got \(1, 80, 9\)"),
        (with_extra(batch, patches=patches[:, :79]), r"multiple of 4.*got \(1, 79, 12\)"),
        # the image of 2 x 6 would start in the first document and end in the second
        (
            with_extra(batch, patch_grid=torch.tensor([[[2, 2], [2, 6]]])),
            "row 0 has an image whose tokens are not contiguous",
        ),
    ]
    for invalid, message in cases:
        with pytest.raises(ValueError, match=message):
            ours.get_attention_masks(invalid)

    class Other:
        image_id = 7

    with pytest.raises(ValueError, match="tokenizer's image token is 7, but the model's is 95"):
        ours.get_attention_masks(batch, Other())


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"image_token_id": 8192}, "image-token-id 8192 is not in the vocabulary of 8192 tokens; use .* 8191"),
        ({"spatial_merge_size": 0}, "model.spatial-merge-size must be greater than 0, got 0"),
        ({"num_kv_heads": 3}, "not divisible by model.num-kv-heads 3"),
    ],
)
def test_invalid_config_raises(fields: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        VLMConfig(**fields)


def test_invalid_vision_config_raises() -> None:
    with pytest.raises(ValueError, match=r"model.vision.hidden-size 130 is not divisible by model.vision.num-heads 4"):
        VisionConfig(hidden_size=130)
    with pytest.raises(ValueError, match=r"model.vision.patch-size must be greater than 0, got 0"):
        VisionConfig(patch_size=0)


def test_unsupported_hf_config_raises() -> None:
    hf = VLM_FAMILY.hf.config_to_hf(VLM_FAMILY.presets["debug"])
    assert VLM_FAMILY.config_from_hf(hf) == replace(VLM_FAMILY.presets["debug"], head_dim=16)
    for changed, text in [
        ({"text_config": {**hf["text_config"], "model_type": "lfm2"}}, "model_type = 'lfm2'.*expected 'llama'"),
        ({"vision_config": {**hf["vision_config"], "hidden_act": "gelu"}}, "hidden_act = 'gelu'"),
        ({"projector_use_layernorm": False}, "projector_use_layernorm = False"),
    ]:
        with pytest.raises(ValueError, match=text):
            VLM_FAMILY.config_from_hf({**hf, **changed})


@pytest.mark.parametrize("size", list(VLM_FAMILY.presets))
def test_parameter_count_equals_transformers(size: str) -> None:
    with torch.device("meta"):
        ours = build_model(f"vlm-{size}")
        hf = VLM_FAMILY.hf.config_to_hf(VLM_FAMILY.presets[size])
        theirs = Lfm2VlForConditionalGeneration(Lfm2VlConfig(**hf))
    theirs.tie_weights()
    assert count_parameters(ours) == count_parameters(theirs)


def test_flops(ours: VLM) -> None:
    assert (ours.flops_per_pair("encoder"), ours.flops_per_pair("decoder")) == (12.0 * 24 * 2, 12.0 * 32 * 2)
    text = build_model(replace(LLAMA3.presets["debug"], vocab_size=96, hidden_size=32, intermediate_size=48))
    assert ours.flops_per_token() == text.flops_per_token()


def test_loss_falls_with_the_tiny_recipe(tmp_path: Path) -> None:
    """30 training steps with shorter rows."""
    recipe = RECIPES["vlm-tiny"]
    run = replace(
        recipe,
        output_dir=tmp_path,
        training=replace(recipe.training, steps=30, sequence_length=96, device="cpu"),
        validation=ValidationConfig(every=30, rows=2),
        logging=LoggingConfig(tensorboard=False, sample_tokens=4),
    )
    train_quietly(run)
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert len(losses) == 30 and sum(losses[-5:]) / 5 < 0.3 * losses[0]


def test_text_model_raises_for_image_data(tmp_path: Path) -> None:
    run = replace(RECIPES["llama3-debug"], output_dir=tmp_path, data=RECIPES["vlm-tiny"].data)
    with pytest.raises(ValueError, match=r"'synthetic-images' contains images, but this model is text-only; .*vlm"):
        train_quietly(run)
