import torch

from sightline.layers import KeyValueCache, RecurrentCache


def test_cache_returns_all_that_was_appended() -> None:
    cache = KeyValueCache()
    keys, values = torch.randn(2, 2, 3, 50, 4)
    begin = 0
    for count in (5, 1, 1, 7, 30, 6):
        new = slice(begin, begin + count)
        k, v = cache.append(keys[:, :, new], values[:, :, new])
        begin += count
        assert cache.length == begin
        assert torch.equal(k, keys[:, :, :begin]) and torch.equal(v, values[:, :, :begin])


def test_room_doubles() -> None:
    cache = KeyValueCache()
    token = torch.randn(1, 1, 1, 2)
    homes = [cache.append(token, token)[0].data_ptr() for _ in range(64)]
    moves = [i for i in range(1, 64) if homes[i] != homes[i - 1]]
    assert set(moves) <= {1, 2, 4, 8, 16, 32}


def test_what_was_returned_before_stays() -> None:
    cache = KeyValueCache()
    first, _ = cache.append(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    cache.append(torch.zeros(1, 1, 9, 2), torch.zeros(1, 1, 9, 2))
    assert torch.equal(first, torch.ones(1, 1, 2, 2))


def test_a_recurrent_cache_gives_the_inputs_before_and_keeps_no_more() -> None:
    cache, x = RecurrentCache(), torch.arange(1.0, 9.0).view(1, 8, 1)
    given = [cache.append_inputs(x[:, begin:end], 3)[0, :, 0].tolist() for begin, end in ((0, 1), (1, 3), (3, 8))]
    assert given == [[0, 0, 0], [0, 0, 1], [1, 2, 3]]
    assert cache.append_inputs(x, 3)[0, :, 0].tolist() == [6, 7, 8]
