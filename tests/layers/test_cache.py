import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.layers import KeyValueCache, RecurrentCache
from sightline.layers.cache import stack_caches


def test_cache_returns_all_appended_tokens() -> None:
    cache = KeyValueCache()
    keys, values = torch.randn(2, 2, 3, 50, 4)
    start = 0
    for count in (5, 1, 1, 7, 30, 6):
        new = slice(start, start + count)
        k, v = cache.append(keys[:, :, new], values[:, :, new])
        start += count
        assert cache.length == start
        assert torch.equal(k, keys[:, :, :start]) and torch.equal(v, values[:, :, :start])


def test_capacity_doubles() -> None:
    cache = KeyValueCache()
    token = torch.randn(1, 1, 1, 2)
    addresses = [cache.append(token, token)[0].data_ptr() for _ in range(64)]
    moves = [i for i in range(1, 64) if addresses[i] != addresses[i - 1]]
    assert set(moves) <= {1, 2, 4, 8, 16, 32}


def test_earlier_results_do_not_change() -> None:
    cache = KeyValueCache()
    first, _ = cache.append(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    cache.append(torch.zeros(1, 1, 9, 2), torch.zeros(1, 1, 9, 2))
    assert torch.equal(first, torch.ones(1, 1, 2, 2))


def test_recurrent_cache_returns_previous_inputs() -> None:
    cache, x = RecurrentCache(), torch.arange(1.0, 9.0).view(1, 8, 1)
    previous = [cache.append_inputs(x[:, start:end], 3)[0, :, 0].tolist() for start, end in ((0, 1), (1, 3), (3, 8))]
    assert previous == [[0, 0, 0], [0, 0, 1], [1, 2, 3]]
    assert cache.append_inputs(x, 3)[0, :, 0].tolist() == [6, 7, 8]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_random_operations_equal_lists_of_columns(data: st.DataObject) -> None:
    """Joined caches of rows of different lengths, after any appends, drops and selections of rows."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    texts, caches = [], []
    for length in lengths:
        cache, text = KeyValueCache(), torch.randn(1, 2, length, 3, generator=generator)
        cache.append(text, 2 * text[..., :1])
        texts.append(torch.nn.functional.pad(text, (0, 0, max(lengths) - length, 0)))
        caches.append({"layer": cache})
    expected, first = torch.cat(texts), 0
    (cache,) = stack_caches(caches).values()
    assert isinstance(cache, KeyValueCache)
    for action in data.draw(st.lists(st.sampled_from(["append", "drop", "select"]), max_size=25)):
        if action == "append":
            new = torch.randn(len(expected), 2, data.draw(st.integers(1, 3)), 3, generator=generator)
            expected = torch.cat([expected, new], dim=2)
            cache.append(new, 2 * new[..., :1])
        elif action == "drop":
            count = data.draw(st.integers(0, expected.shape[2]))
            first, expected = first + count, expected[:, :, count:]
            cache.drop_first(first)
        else:
            rows = data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, unique=True))
            expected = expected[rows]
            cache.select(torch.tensor(rows))
        keys, values = cache.tensors()
        assert torch.equal(keys, expected) and torch.equal(values, 2 * expected[..., :1])
        assert (cache.first, cache.length) == (first, expected.shape[2])


def test_dropped_columns_free_their_memory() -> None:
    cache, token = KeyValueCache(), torch.zeros(1, 1, 1, 2)
    cache.append(torch.zeros(1, 1, 1000, 2))
    for step in range(300):
        cache.drop_first(991 + step)
        assert cache.append(token)[0].shape[2] == 10
        assert cache._buffers[0].shape[2] <= 20


def test_recurrent_caches_are_joined_and_selected() -> None:
    caches = [RecurrentCache() for _ in range(2)]
    for number, cache in enumerate(caches):
        cache.append_inputs(torch.full((1, 5, 2), float(number)), 3)
        cache.state = torch.full((1, 1, 2, 2), float(number))
    (joined,) = stack_caches([{"layer": cache} for cache in caches]).values()
    assert isinstance(joined, RecurrentCache)
    joined.select(torch.tensor([1]))
    assert joined.state is not None and joined.state.unique().tolist() == [1.0]
    assert joined.append_inputs(torch.zeros(1, 1, 2), 3).unique().tolist() == [1.0]
