"""`from_mask_mod` compared with the function called for each pair and with `create_mask`; `mask_mod` for any K."""

import shutil
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, create_block_mask, create_mask, or_masks

from sightline.attention import attend
from sightline.masks import AttentionMask, causal
from sightline.masks import mask_mod as mask_mod_module
from sightline.masks.mask_mod import pack_bits
from tests.support.random_masks import assert_canonical, expressions, scattered_masks

B, Q, T = 2, 5, 7
GENERATOR = torch.Generator().manual_seed(0)
TAGS = torch.rand(T, 4, generator=GENERATOR) < 0.4
ROW_TAGS = torch.rand(B, T, 4, generator=GENERATOR) < 0.4
IDS = torch.randint(0, 3, (B, T), generator=GENERATOR)
WINDOWS = torch.tensor([1, 3])
WEIGHTS = torch.rand(T, generator=GENERATOR, requires_grad=True)
EDGES = torch.tensor([2, 4])
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

SCALAR_MASK_MODS: dict[str, MaskMod] = {
    "vectors compared and reduced": lambda b, h, q, k: (TAGS[q] & TAGS[k]).any(),
    "stack": lambda b, h, q, k: torch.stack([q - k, k - q]).max() < 3,
    "cat": lambda b, h, q, k: torch.cat([q[None], k[None]]).max() < 3,
    "table of each row": lambda b, h, q, k: (ROW_TAGS[b, q] & ROW_TAGS[b, k]).any(),
    "full slice": lambda b, h, q, k: (ROW_TAGS[b, q, :] & ROW_TAGS[b, k, :]).any(),
    "slice between indices": lambda b, h, q, k: (ROW_TAGS[b, :, q % 4] & ROW_TAGS[b, :, k % 4]).sum() > 1,
    "part of a vector": lambda b, h, q, k: TAGS[q, 1:].any() & (q >= k),
    "new dimension": lambda b, h, q, k: (TAGS[q, None] & TAGS[k, None]).any(),
    "ellipsis": lambda b, h, q, k: ROW_TAGS[..., q % 4].sum() > k,
    "numbers among indices": lambda b, h, q, k: ROW_TAGS[1, q, 2] | ROW_TAGS[0, k, -1],
    "chained indices": lambda b, h, q, k: IDS[b][q] == IDS[b][k],
    "gather": lambda b, h, q, k: (IDS[b].gather(0, q[None]) == IDS[b].gather(0, k[None])).all(),
    "window of each row": lambda b, h, q, k: (q - k < WINDOWS[b]) & (q >= k),
    "bucketize": lambda b, h, q, k: torch.bucketize(q, EDGES) == torch.bucketize(k, EDGES),
    "where": lambda b, h, q, k: torch.where(q > 3, k < 2, q >= k),
    "floats": lambda b, h, q, k: (q / 3).floor() == (k / 3).floor(),
    "parameters": lambda b, h, q, k: WEIGHTS[q] > WEIGHTS[k],
    "constant": lambda b, h, q, k: torch.tensor(True),
    "only b": lambda b, h, q, k: b > 0,
    "shape of h": lambda b, h, q, k: (q >= k) if h.dim() == 0 else (q < k),
}


@pytest.mark.parametrize("name", SCALAR_MASK_MODS)
def test_functions_of_scalar_indices(name: str) -> None:
    mask_mod = SCALAR_MASK_MODS[name]
    scalars = [[torch.tensor(i) for i in range(size)] for size in (B, Q, T)]
    head = torch.tensor(0)
    expected = torch.tensor([[[mask_mod(b, head, q, k) for k in scalars[2]] for q in scalars[1]] for b in scalars[0]])
    mask = AttentionMask.from_mask_mod(mask_mod, B, Q, T)
    assert torch.equal(mask.to_dense(), expected)
    assert torch.equal(create_mask(mask_mod, B, 1, Q, T, device="cpu")[:, 0], expected)
    assert_canonical(mask)


def causal_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def window_mod(size: int) -> MaskMod:
    return lambda b, h, q, k: (q - k).abs() <= size


def document_mod(ids: Tensor) -> MaskMod:
    return lambda b, h, q, k: ids[b, q] == ids[b, k]


def prefix_mod(lengths: Tensor) -> MaskMod:
    return lambda b, h, q, k: k < lengths[b]


def dilated_mod(stride: int) -> MaskMod:
    return lambda b, h, q, k: (q - k) % stride == 0


def neighborhood_mod(width: int, radius: int) -> MaskMod:
    """Keys at most `radius` rows and columns away on a grid of `width` columns."""
    return lambda b, h, q, k: ((q // width - k // width).abs() <= radius) & ((q % width - k % width).abs() <= radius)


def relative_mod(inner: MaskMod, starts: Tensor, ids: Tensor) -> MaskMod:
    """A mask_mod applied to positions inside documents."""

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (ids[q] == ids[k]) & inner(b, h, q - starts[ids[q]], k - starts[ids[k]])

    return mask_mod


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 24), st.integers(0, 2**31), st.sampled_from([1, 50, 2**21]), st.data())
def test_combined_functions_equal_create_mask(rows: int, length: int, seed: int, pairs: int, data) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 3, (rows, length), generator=generator)
    ordered = ids[0].sort().values
    starts = torch.searchsorted(ordered, torch.arange(3))
    parts = [
        causal_mod,
        window_mod(data.draw(st.integers(0, 5))),
        document_mod(ids),
        prefix_mod(torch.randint(0, length + 1, (rows,), generator=generator)),
        dilated_mod(data.draw(st.integers(1, 4))),
        neighborhood_mod(data.draw(st.integers(1, 6)), 1),
        relative_mod(window_mod(2), starts, ordered),
        causal(rows, length).mask_mod,
    ]
    mask_mod = data.draw(st.sampled_from(parts))
    for _ in range(data.draw(st.integers(0, 3))):
        join = data.draw(st.sampled_from([and_masks, or_masks]))
        mask_mod = join(mask_mod, data.draw(st.sampled_from(parts)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_mod_module, "PAIRS_PER_STEP", pairs)
        mask = AttentionMask.from_mask_mod(mask_mod, rows, length, length)
    assert torch.equal(mask.to_dense(), create_mask(mask_mod, rows, 1, length, length, device="cpu")[:, 0])
    assert_canonical(mask)


def branches_on_q(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k < 2 if q > 3 else q >= k


def branches_on_h(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k if h == 0 else q < k


@pytest.mark.parametrize(
    ("mask_mod", "message"),
    [
        (lambda b, h, q, k: (q >= k) & (h < 2), "from h, but all heads share"),
        (lambda b, h, q, k: q - k < torch.tensor([3])[h], "from h, but all heads share"),
        (branches_on_h, r"torch\.vmap with scalar tensors b, h"),
        (branches_on_q, "data-dependent control flow"),
        (lambda b, h, q, k: q >= k and k > 0, "without if, and, or"),
        (lambda b, h, q, k: q - k < [1, 3][b], "or lists"),
        (lambda b, h, q, k: torch.tensor(int(q) > 1), r"int\(\)"),
        (lambda b, h, q, k: torch.rand(()) < 0.5, "random"),
        (lambda b, h, q, k: WINDOWS[q] > 0, "IndexError: index 2 is out of bounds"),
        (lambda b, h, q: q > 0, "TypeError.*positional arguments"),
        (lambda b, h, q, k: TAGS[q] & TAGS[k], r"scalar bool tensor for a pair, got torch.bool \(4,\).*\.any\(\)"),
        (lambda b, h, q, k: torch.where(q >= k, 0.0, -torch.inf), r"got torch.float32 \(\)"),
        (lambda b, h, q, k: (q >= k).int(), r"got torch.int32 \(\)"),
        (lambda b, h, q, k: 1, "got int"),
        (lambda b, h, q, k: None, "got NoneType"),
        (
            lambda b, h, q, k: torch.zeros((), dtype=torch.bool, device="meta"),
            "on 'meta', expected 'cpu'",
        ),
        (causal(1, 4), "must be a function of .b, h, q_idx, kv_idx."),
    ],
)
def test_functions_that_are_refused(mask_mod, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        AttentionMask.from_mask_mod(mask_mod, B, Q, T)


def test_errors_of_the_function_itself_are_kept() -> None:
    def fails(b, h, q, k):
        raise ValueError("no such layout")

    with pytest.raises(ValueError, match=r"^no such layout$"):
        AttentionMask.from_mask_mod(fails, B, Q, T)


def test_a_python_bool_is_a_constant() -> None:
    assert AttentionMask.from_mask_mod(lambda b, h, q, k: True, 2, 3, 5).visible_pairs().tolist() == [15, 15]
    assert AttentionMask.from_mask_mod(lambda b, h, q, k: False, 2, 3, 5).visible_pairs().tolist() == [0, 0]


def test_the_head_of_a_function_can_be_fixed() -> None:
    windows = torch.tensor([2, 4])

    def window_of_head(b, h, q, k):
        return (q - k < windows[h]) & (q >= k)

    expected = create_mask(window_of_head, 1, 2, 8, 8, device="cpu")
    for head in range(2):
        fixed = AttentionMask.from_mask_mod(lambda b, h, q, k: window_of_head(b, torch.tensor(head), q, k), 1, 8, 8)  # noqa: B023
        assert torch.equal(fixed.to_dense()[0], expected[0, head])


def test_blocks_of_queries_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function is called once per block, and an error counts the queries of all blocks."""
    monkeypatch.setattr(mask_mod_module, "PAIRS_PER_STEP", 100)
    calls = []

    def more_intervals_from_query_12(b, h, q, k):
        calls.append(None)
        return torch.where(q < 12, k % 5 == 0, (k % 2 == 0) | (q == 13) & (k == 1))

    mask = AttentionMask.from_mask_mod(more_intervals_from_query_12, 1, 20, 20)
    assert len(calls) == 4 and mask.intervals == 10  # 5 queries x 20 keys a block
    with pytest.raises(ValueError, match=r"needs K=10 intervals \(row 0, query 12\), more than max_intervals=3"):
        AttentionMask.from_mask_mod(more_intervals_from_query_12, 1, 20, 20, max_intervals=3)


@settings(max_examples=60, deadline=None)
@given(expressions(), st.integers(1, 4))
def test_mask_mod_of_any_number_of_intervals(pair, compared: int) -> None:
    """The comparison and the table of bits return the dense mask, on both sides of the limit."""
    mask, dense = pair
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_mod_module, "MAX_COMPARED_INTERVALS", compared - 1)
        mask_mod = mask.mask_mod
        assert torch.equal(create_mask(mask_mod, mask.shape[0], 1, *mask.shape[1:], device="cpu")[:, 0], dense)
        assert AttentionMask.from_mask_mod(mask_mod, *mask.shape).equal(mask)


@settings(max_examples=60, deadline=None)
@given(scattered_masks(longest=100), st.sampled_from([1, 9, 2**20]))
def test_packed_bits(mask: AttentionMask, words_per_step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_mod_module, "WORDS_PER_STEP", words_per_step)
        words = pack_bits(mask.start, mask.stop, mask.key_length)
    assert words.dtype == torch.int32 and words.shape[2] == -(-mask.key_length // 32)
    bits = (words[..., None] >> torch.arange(32, dtype=torch.int32)) & 1
    assert torch.equal(bits.flatten(2)[..., : mask.key_length].bool(), mask.to_dense())
    assert not bits.flatten(2)[..., mask.key_length :].any()


def test_block_mask_of_many_intervals() -> None:
    dense = torch.rand(2, 150, 200, generator=torch.Generator().manual_seed(1)) < 0.4
    dense[:, :40, 64:160] = True
    dense[:, 70] = False
    mask = AttentionMask.from_dense(dense)
    assert mask.intervals > 32
    actual = mask.to_block_mask(32)
    expected = create_block_mask(lambda b, h, q, k: dense[b, q, k], 2, None, 150, 200, device="cpu", BLOCK_SIZE=32)
    assert torch.equal(actual.to_dense(), expected.to_dense())
    assert torch.equal(actual.full_kv_num_blocks, expected.full_kv_num_blocks) and expected.full_kv_num_blocks.sum() > 0
    assert torch.equal(create_mask(actual.mask_mod, 2, 1, 150, 200, device="cpu")[:, 0], dense)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_compiled_kernel_of_many_intervals() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(1, 128, 128, generator=generator) < 0.3
    dense[:, 5] = False
    mask = AttentionMask.from_dense(dense)
    assert mask.intervals > 16
    q, k, v = (torch.randn(1, 2, 128, 16, generator=generator) for _ in range(3))
    with torch.no_grad():
        out, expected = (attend(q, k, v, mask, backend=backend) for backend in ("flex", "reference"))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
