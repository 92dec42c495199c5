"""Benchmarks inside transformers: their contestants compute the same."""

from collections.abc import Iterator

import pytest
import torch

from benchmarks import huggingface


@pytest.fixture(autouse=True)
def short_documents(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    row = [torch.randint(2, 8192, (n,), generator=generator).tolist() for n in (30, 50, 48)]
    monkeypatch.setattr(huggingface, "documents_of", lambda length: [row] * 3)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", ["trl", "trainer", "gemma2"])
def test_contestants_have_equal_losses(case: str) -> None:
    maker = huggingface.model_step if case == "gemma2" else huggingface.trainer_step
    losses = [maker(case, contestant, 128)() for contestant in ("stock", "sightline", "fused")]
    assert losses[1:] == pytest.approx(losses[:1] * 2, abs=2e-5)


def test_mask_work() -> None:
    assert 0 < huggingface.mask_work(128) < 1
