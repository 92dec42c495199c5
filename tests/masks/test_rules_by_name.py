"""Masks of other libraries as expressions of rules, each equal to its FlexAttention `mask_mod`.

The functions are evaluated for every pair of indices under `torch.vmap`, as FlexAttention evaluates them.
"""

import itertools

import pytest
import torch
from torch.nn.attention.flex_attention import and_masks, create_mask, or_masks

from sightline.masks import (
    AttentionMask,
    bidirectional,
    bigbird,
    block_causal,
    block_diffusion,
    causal,
    chunked,
    dilated_window,
    document,
    document_visibility,
    global_tokens,
    prefix_lm,
    prefix_tree,
    shared_prefix,
    sliding_window,
    token_tree,
)

S = 24
LENGTHS = (7, 1, 12, 4)
IDS = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[None]
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
INDEX = torch.arange(S)[None]
ZEROS = torch.zeros_like(INDEX)
Entry = tuple[str, AttentionMask, object]


def per_token(values: torch.Tensor):
    """Return lookups of a token attribute [1, S] by the index of the query and of the key."""
    return lambda index: values[0, index]


ids, positions = per_token(IDS), per_token(POSITIONS)


def is_causal(b, h, q, kv):
    return kv <= q


def same_document(b, h, q, kv):
    return ids(q) == ids(kv)


def windows() -> list[Entry]:
    def two_sided(b, h, q, kv):
        return (q - kv).abs() <= 3

    def window(b, h, q, kv):
        return kv > q - 5

    def by_position(b, h, q, kv):
        return same_document(b, h, q, kv) & (positions(kv) > positions(q) - 5) & (positions(kv) <= positions(q))

    def dilated(b, h, q, kv):
        return ((q - kv).abs() <= 6) & ((q - kv) % 2 == 0)

    def strided(b, h, q, kv):
        return (kv > q - 4) | ((q - kv) % 4 == 0)

    return [
        ("attention-gym sliding_window", sliding_window(1, S, left=4), and_masks(window, is_causal)),
        ("attention-gym dilated_sliding_window", dilated_window(1, S, 2, left=6, right=6), dilated),
        ("attention-gym dilated causal", dilated_window(1, S, 2, left=6), and_masks(dilated, is_causal)),
        ("MagiAttention SLIDING_WINDOW", sliding_window(1, S, left=3, right=3), two_sided),
        ("MagiAttention SLIDING_WINDOW_CAUSAL", sliding_window(1, S, left=4), and_masks(window, is_causal)),
        ("FlashMask sliding window", sliding_window(1, S, 5), and_masks(window, is_causal)),
        ("transformers sliding_window_causal", sliding_window(1, S, 5), and_masks(window, is_causal)),
        ("transformers sliding_window_bidirectional", sliding_window(1, S, left=3, right=3), two_sided),
        ("transformers sliding window, packed", sliding_window(1, S, 5) & document(IDS), by_position),
        (
            "Sparse Transformer strided",
            dilated_window(1, S, 4) | sliding_window(1, S, 4),
            and_masks(strided, is_causal),
        ),
    ]


def rectangles() -> list[Entry]:
    """Slices of 10 queries and 24 keys, aligned at the bottom right: the last queries of a row of 24 tokens."""
    last, first = torch.arange(14, 24), torch.arange(10)
    return [
        ("MagiAttention FULL", sliding_window(1, S, right=None).take_queries(last), lambda b, h, q, kv: kv >= 0),
        ("MagiAttention CAUSAL", causal(1, S).take_queries(last), lambda b, h, q, kv: kv <= q + 14),
        (
            "MagiAttention INVCAUSAL",
            sliding_window(1, S, left=0, right=None).take_queries(first),
            lambda b, h, q, kv: kv >= q,
        ),
        (
            "MagiAttention BICAUSAL",
            sliding_window(1, S, left=0, right=14).take_queries(first),
            lambda b, h, q, kv: (kv >= q) & (kv <= q + 14),
        ),
    ]


def packed() -> list[Entry]:
    lengths = torch.tensor([[3] * 7 + [1] + [5] * 12 + [0] * 4])
    same, plain = document(IDS), causal(1, S)
    padded = torch.tensor([[-1] * 3 + [0] * 21])
    real = per_token(padded >= 0)
    spans = torch.repeat_interleave(torch.tensor([-1, 0, -1, 1, -1]), torch.tensor([4, 5, 3, 6, 6]))[None]
    span = per_token(spans)
    shifted = (INDEX - 3).clamp(min=0)

    def prefix(b, h, q, kv):
        return positions(kv) < lengths[0, kv]

    def row_prefix(b, h, q, kv):
        return kv < 9

    def same_chunk(b, h, q, kv):
        return positions(q) // 4 == positions(kv) // 4

    def left_padded_chunk(b, h, q, kv):
        return ((q - 3) // 4 == (kv - 3) // 4) & real(q) & real(kv)

    def same_span(b, h, q, kv):
        return (span(q) == span(kv)) & (span(q) >= 0)

    causal_document = and_masks(is_causal, same_document)
    prefix_document = and_masks(or_masks(prefix, is_causal), same_document)
    prefix_row, spans_causal = or_masks(row_prefix, is_causal), or_masks(same_span, is_causal)
    prefix_mask = prefix_lm(INDEX, torch.full_like(INDEX, 9)) | plain
    documents_prefix = (prefix_lm(POSITIONS, lengths) | plain) & same
    window = sliding_window(1, S, 5)
    return [
        *((f"{library} causal", plain, is_causal) for library in ("attention-gym", "FlashMask", "transformers")),
        *(
            (f"{library} causal document", plain & same, causal_document)
            for library in ("attention-gym", "FlashMask", "MagiAttention", "transformers")
        ),
        *(
            (f"{library} full document", same, same_document)
            for library in ("attention-gym", "FlashMask", "MagiAttention", "transformers")
        ),
        *(
            (f"{library} prefix LM", prefix_mask, prefix_row)
            for library in ("attention-gym", "FlashMask", "MagiAttention")
        ),
        ("transformers PaliGemma prefix", prefix_mask, prefix_row),
        *(
            (f"{library} prefix LM document", documents_prefix, prefix_document)
            for library in ("attention-gym", "FlashMask", "MagiAttention")
        ),
        ("transformers bidirectional", sliding_window(1, S, right=None), lambda b, h, q, kv: q >= 0),
        ("transformers padding, keys", document(ZEROS, padded), lambda b, h, q, kv: real(kv)),
        (
            "transformers chunked, left padding",
            chunked(shifted, 4) & plain & document(padded),
            and_masks(left_padded_chunk, is_causal),
        ),
        (
            "transformers chunked, packed",
            chunked(POSITIONS, 4) & plain & same,
            and_masks(same_chunk, causal_document),
        ),
        ("transformers blockwise overlay", bidirectional(spans) | plain, spans_causal),
        (
            "transformers images in text, window",
            bidirectional(spans) | window,
            or_masks(same_span, lambda b, h, q, kv: (kv > q - 5) & (kv <= q)),
        ),
        ("transformers cross-attention", document(ZEROS, IDS.clamp(max=2) - 1), lambda b, h, q, kv: ids(kv) == 1),
        (
            "FlashMask hash sparse",
            document(INDEX % 3) & plain,
            and_masks(lambda b, h, q, kv: q % 3 == kv % 3, is_causal),
        ),
    ]


def global_and_random() -> list[Entry]:
    chosen = torch.zeros(1, S, dtype=torch.bool)
    chosen[0, [0, 1, 11]] = True
    flag, first = per_token(chosen), INDEX < 3
    summary = torch.where(INDEX % 4 == 3, 0, -1)
    random = bigbird(1, S, 3, num_random_blocks=2, seed=5)
    random_blocks = random.to_dense()[0, ::3, ::3]
    ends = (INDEX < 3) | (INDEX >= S - 3)

    def big_bird(b, h, q, kv):
        block_q, block_kv = q // 3, kv // 3
        near, end = (block_q - block_kv).abs() <= 1, per_token(ends)
        return near | end(q) | end(kv) | random_blocks[block_q, block_kv]

    def window(b, h, q, kv):
        return (kv - q <= 2) & (q - kv <= 3)

    def any_global(b, h, q, kv):
        return flag(q) | flag(kv)

    def leading(b, h, q, kv):
        return (q < 3) | (kv < 3)

    def sink(b, h, q, kv):
        return (kv < 3) | (kv > q - 5)

    def fixed(b, h, q, kv):
        return (q // 4 == kv // 4) | (kv % 4 == 3)

    two_sided = sliding_window(1, S, left=3, right=2)
    return [
        ("attention-gym global_sliding_window", global_tokens(chosen) | two_sided, or_masks(window, any_global)),
        ("MagiAttention GLOBAL_SLIDING_WINDOW", global_tokens(first) | two_sided, or_masks(window, leading)),
        ("FlashMask global sliding window", global_tokens(first) | two_sided, or_masks(window, leading)),
        ("transformers Longformer", global_tokens(chosen) | two_sided, or_masks(window, any_global)),
        ("transformers BigBird", random | global_tokens(ends), big_bird),
        (
            "attention-gym sink",
            (global_tokens(first) | sliding_window(1, S, 5)) & causal(1, S),
            and_masks(sink, is_causal),
        ),
        (
            "Sparse Transformer fixed",
            (chunked(INDEX, 4) | document(ZEROS, summary)) & causal(1, S),
            and_masks(fixed, is_causal),
        ),
    ]


def blocks() -> list[Entry]:
    half = torch.arange(12).repeat(2)[None]
    copies = torch.repeat_interleave(torch.tensor([0, 1]), 12)[None]
    table = torch.eye(4, dtype=torch.bool)[None].clone()
    table[0, 3] = True
    sparse = torch.tensor([[True, False, False], [True, True, False], [False, True, True]])
    skipped = ~torch.eye(4, dtype=torch.bool)[None]
    skipped[0, [0, 2], [0, 2]] = True  # documents 1 and 3 are not attended to by themselves

    def block_diffusion_mod(b, h, q, kv):
        block_q, block_kv, noisy_q, noisy_kv = (q % 12) // 4, (kv % 12) // 4, q < 12, kv < 12
        within = (block_q == block_kv) & (noisy_q == noisy_kv)
        return within | (~noisy_kv & torch.where(noisy_q, block_kv < block_q, block_kv <= block_q))

    def block_causal_document(b, h, q, kv):
        return same_document(b, h, q, kv) & (positions(kv) // 4 <= positions(q) // 4)

    def in_context(b, h, q, kv):
        return (ids(q) == ids(kv)) | (ids(q) == 3)

    def qk_sparse(b, h, q, kv):
        return ~((ids(q) == ids(kv)) & ((ids(q) == 1) | (ids(q) == 3)))

    return [
        (
            "attention-gym block_diffusion",
            block_diffusion(copies, torch.ones_like(copies), half, 4),
            block_diffusion_mod,
        ),
        ("MagiAttention BLOCK_CAUSAL_DOCUMENT", block_causal(POSITIONS, 4) & document(IDS), block_causal_document),
        ("MagiAttention varlen block causal", bidirectional(IDS) | causal(1, S), lambda b, h, q, kv: ids(kv) <= ids(q)),
        *(
            (
                f"{library} causal blockwise",
                document_visibility(IDS, table) & causal(1, S),
                and_masks(in_context, is_causal),
            )
            for library in ("FlashMask", "MagiAttention")
        ),
        ("FlashMask QK sparse", document_visibility(IDS, skipped) & causal(1, S), and_masks(qk_sparse, is_causal)),
        (
            "attention-gym VSA",
            document_visibility(INDEX // 8, sparse[None]),
            lambda b, h, q, kv: sparse[q // 8, kv // 8],
        ),
    ]


def prefixes_and_trees() -> list[Entry]:
    prompts = torch.tensor([0, 0, 0, 3])[IDS]
    prompt = per_token(prompts)
    parents = torch.tensor([-1, 0, 1, 1, 3, 3, 0])
    ancestor = torch.eye(7, dtype=torch.bool)
    for token in range(1, 7):
        ancestor[token] |= ancestor[parents[token]]
    chains = torch.arange(12)[None] - 1
    chains[0, ::4] = -1
    depth = torch.tensor([0, 0, 1, 0])[IDS]
    path = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]).bool()

    def shares(b, h, q, kv):
        return (ids(q) == ids(kv)) | (prompt(q) == ids(kv))

    def tree(b, h, q, kv):
        return (kv < 5) | ancestor[q, (kv - 5).clamp(min=0)]

    def training(b, h, q, kv):
        token = kv - 5
        return (token < 0) | ((token // 4 == q // 4) & (token % 4 <= q % 4))

    shared = shared_prefix(IDS, prompts) & causal(1, S)
    return [
        *(
            (f"{library} shared prefix", shared, and_masks(shares, is_causal))
            for library in ("attention-gym", "FlashMask", "MagiAttention")
        ),
        (
            "prompt tree",
            prefix_tree(IDS, depth) & causal(1, S),
            and_masks(lambda b, h, q, kv: path[ids(q), ids(kv)], is_causal),
        ),
        ("attention-gym JetSpec tree", token_tree(parents[None], 5), tree),
        ("attention-gym JetSpec training", token_tree(chains, 5), training),
    ]


SECTIONS = (windows, rectangles, packed, global_and_random, blocks, prefixes_and_trees)
ENTRIES = list(itertools.chain.from_iterable(section() for section in SECTIONS))


@pytest.mark.parametrize(("mask", "mask_mod"), [entry[1:] for entry in ENTRIES], ids=[entry[0] for entry in ENTRIES])
def test_expression_equals_the_mask_mod(mask: AttentionMask, mask_mod) -> None:
    _, queries, keys = mask.shape
    dense = create_mask(mask_mod, 1, 1, queries, keys, device="cpu")[0]
    assert torch.equal(mask.to_dense(), dense)
    assert dense.any()


def test_names_are_distinct() -> None:
    assert len({name for name, *_ in ENTRIES}) == len(ENTRIES)
