import torch

from sightline.layers import RMSNorm, ZeroCenteredRMSNorm


def test_rms_norm_literal() -> None:
    norm = RMSNorm(4, eps=0.0)
    norm.init_weights()
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, -4.0, 0.0, 0.0]])  # root mean squares 1 and 2.5
    torch.testing.assert_close(norm(x), torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.2, -1.6, 0.0, 0.0]]))


def test_zero_input_and_weight() -> None:
    norm = RMSNorm(2, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 10.0]))
    assert torch.equal(norm(torch.zeros(1, 2)), torch.zeros(1, 2))
    torch.testing.assert_close(norm(torch.tensor([[5.0, 5.0]])), torch.tensor([[2.0, 10.0]]))


def test_zero_centered_norm_scales_by_one_plus_weight() -> None:
    norm = ZeroCenteredRMSNorm(2, eps=0.0)
    norm.init_weights()
    assert torch.equal(norm.weight, torch.zeros(2))
    x = torch.tensor([[5.0, -5.0]])
    torch.testing.assert_close(norm(x), torch.tensor([[1.0, -1.0]]))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -1.0]))
    torch.testing.assert_close(norm(x), torch.tensor([[1.5, 0.0]]))
