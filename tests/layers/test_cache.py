import torch

from sightline.layers import KeyValueCache, RecurrentCache


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
