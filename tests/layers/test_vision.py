"""The encoder against transformers' Siglip2VisionModel, which takes one image per row."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from sightline.layers.vision import (
    Projector,
    VisionConfig,
    VisionEncoder,
    interpolation_weights,
    locate_patches,
    merge_order,
)
from sightline.masks import document
from sightline.models.hf.vlm import vision_weights
from tests.support.lowering import lowered

CONFIG = VisionConfig(
    hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, patch_size=2, position_grid_size=4
)
PATCH_CHANNELS = 12
GRID = torch.tensor([[[3, 5], [1, 1], [2, 9]], [[6, 2], [0, 0], [0, 0]], [[0, 0], [0, 0], [0, 0]]])
LENGTH = 40  # the rows contain 34, 12 and 0 patches


def images_of(grid: Tensor) -> list[tuple[int, int, int, int]]:
    """Return (row, first patch, height, width) of each image."""
    found = []
    for row, images in enumerate(grid.tolist()):
        first = 0
        for height, width in images:
            if height * width:
                found.append((row, first, height, width))
            first += height * width
    return found


def make_theirs() -> nn.Module:
    torch.manual_seed(0)
    config = Siglip2VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        patch_size=2,
        num_patches=16,
        vision_use_head=False,
    )
    config._attn_implementation = "eager"
    theirs = Siglip2VisionModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return theirs


def make_ours(theirs: nn.Module) -> VisionEncoder:
    ours = VisionEncoder(CONFIG)
    state = theirs.state_dict()
    ours.load_state_dict({ours_: state[theirs_] for theirs_, ours_ in names()})
    return ours


def names() -> list[tuple[str, str]]:
    """Return pairs of parameter names, theirs and ours."""
    weights = vision_weights(CONFIG, "")
    return [(weight.theirs, weight.ours.removeprefix("vision.")) for weight in weights]


def run(encoder: VisionEncoder, patches: Tensor, grid: Tensor = GRID) -> Tensor:
    positions = locate_patches(grid, patches.shape[1])
    return encoder(patches, positions, lowered(document(positions.image)))


def make_patches() -> Tensor:
    return torch.randn(len(GRID), LENGTH, PATCH_CHANNELS, generator=torch.Generator().manual_seed(1))


def test_packed_equals_transformers_per_image() -> None:
    theirs = make_theirs()
    ours, patches = make_ours(theirs), make_patches()
    features = run(ours, patches)
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    loss, their_loss = torch.zeros(()), torch.zeros(())
    for row, first, height, width in images_of(GRID):
        image = slice(first, first + height * width)
        values = patches[row, image][None]
        expected = theirs(
            pixel_values=values,
            pixel_attention_mask=torch.ones(values.shape[:2], dtype=torch.int64),
            spatial_shapes=torch.tensor([[height, width]]),
        ).last_hidden_state[0]
        torch.testing.assert_close(features[row, image], expected, atol=1e-4, rtol=0)
        loss = loss + (features[row, image] * weight[row, image]).sum()
        their_loss = their_loss + (expected * weight[row, image]).sum()

    loss.backward()
    their_loss.backward()
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert {theirs_ for theirs_, _ in names()} == set(grads)
    assert {ours_ for _, ours_ in names()} == {name for name, _ in ours.named_parameters()}
    for theirs_, ours_ in names():
        actual, expected = ours.get_parameter(ours_).grad, grads[theirs_]
        if ours_.endswith("key.bias"):  # it shifts all scores of a query equally, so its gradient is only rounding
            assert actual.abs().max() < 1e-4 and expected.abs().max() < 1e-4
            continue
        largest = expected.abs().max().item()
        assert largest > 1e-2, f"{theirs_} has no gradient to compare"
        torch.testing.assert_close(actual, expected, atol=1e-3 * largest, rtol=0, msg=lambda m, n=ours_: f"{n}: {m}")


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize(("row", "patch"), [(0, 0), (0, 14), (0, 15), (0, 33), (1, 5), (0, 34), (2, 0)])
def test_perturbed_patch_changes_only_its_image(backend: str, row: int, patch: int) -> None:
    ours, patches = make_ours(make_theirs()), make_patches()
    perturbed = patches.clone()
    perturbed[row, patch] += 1.0
    positions = locate_patches(GRID, LENGTH)
    mask = lowered(document(positions.image), backend=backend)
    changed = (ours(patches, positions, mask) != ours(perturbed, positions, mask)).any(dim=2)
    expected = positions.image == positions.image[row, patch]
    expected[torch.arange(3) != row] = False
    if positions.image[row, patch] < 0:  # no patch attends to padding
        expected = torch.zeros_like(expected).index_put_((torch.tensor(row), torch.tensor(patch)), torch.tensor(True))
    assert torch.equal(changed, expected)


def test_locate_patches() -> None:
    positions = locate_patches(torch.tensor([[[2, 3], [0, 0], [1, 1]]]), 9)
    assert positions.image.tolist() == [[0, 0, 0, 0, 0, 0, 2, -1, -1]]
    assert positions.first.tolist() == [[0, 0, 0, 0, 0, 0, 6, 7, 7]]
    assert positions.row.tolist()[0][:7] == [0, 0, 0, 1, 1, 1, 0]
    assert positions.column.tolist()[0][:7] == [0, 1, 2, 0, 1, 2, 0]
    assert positions.height.tolist()[0][:7] == [2] * 6 + [1]
    assert positions.width.tolist()[0][:7] == [3] * 6 + [1]


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (3, 7), (9, 2), (16, 16), (2, 31), (1, 4), (7, 1)])
def test_interpolation_equals_torch(size: tuple[int, int]) -> None:
    """One axis at a time: to a width of 1 and another height at once, torch 2.13 repeats the first row."""
    learned = torch.randn(1, 5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = interpolation_weights(locate_patches(torch.tensor([[size]]), size[0] * size[1]), 4)[0]

    kind = {"mode": "bilinear", "align_corners": False, "antialias": True}
    across = F.interpolate(learned, size=(4, size[1]), **kind)
    twice = F.interpolate(torch.cat([across, across], dim=3), size=(size[0], 2 * size[1]), **kind)
    expected = twice[0, :, :, : size[1]].flatten(1).T
    torch.testing.assert_close(weights.double() @ learned[0].flatten(1).T, expected, atol=1e-6, rtol=0)
    assert torch.allclose(weights.sum(dim=1), torch.ones(len(weights)))


def test_merge_order_literal() -> None:
    positions = locate_patches(torch.tensor([[[2, 4], [2, 2]], [[4, 2], [0, 0]]]), 16)
    assert merge_order(positions, 2).tolist() == [
        [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    ]
    assert merge_order(positions, 1).tolist() == [list(range(16))] * 2


def test_projected_token_depends_only_on_its_patches() -> None:
    torch.manual_seed(0)
    projector = Projector(vision_hidden_size=6, projector_hidden_size=10, hidden_size=8, merge_size=2)
    projector.init_weights()
    positions = locate_patches(torch.tensor([[[2, 4], [2, 2]]]), 16)
    features = torch.randn(1, 16, 6, requires_grad=True)
    projected = projector(features, positions)
    assert projected.shape == (1, 4, 8)
    for token, patches in enumerate([{0, 1, 4, 5}, {2, 3, 6, 7}, {8, 9, 10, 11}]):
        (grads,) = torch.autograd.grad(projected[0, token].square().sum(), features, retain_graph=True)
        assert set(grads[0].abs().sum(dim=1).nonzero()[:, 0].tolist()) == patches


def test_initial_spread() -> None:
    torch.manual_seed(0)
    encoder = VisionEncoder(VisionConfig(num_layers=2, position_grid_size=16))
    for parameter in encoder.parameters():
        nn.init.constant_(parameter, torch.nan)
    encoder.init_weights()
    state = encoder.state_dict()
    expected = {
        "embedding.weight": 192**-0.5,
        "positions": 128**-0.5,
        "layers.0.attention.query.weight": 128**-0.5,
        "layers.1.attention.output.weight": 128**-0.5 / 2,
        "layers.1.up.weight": 128**-0.5,
        "layers.0.down.weight": 512**-0.5 / 2,
    }
    assert {name: state[name].std().item() for name in expected} == pytest.approx(expected, rel=0.03)
    assert all(torch.equal(value, torch.zeros_like(value)) for name, value in state.items() if name.endswith("bias"))
    assert all(
        torch.equal(value, torch.ones_like(value)) for name, value in state.items() if name.endswith("norm.weight")
    )
