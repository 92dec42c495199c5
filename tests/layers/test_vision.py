"""The encoder against transformers' Siglip2VisionModel, which takes every image in a row of its own."""

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
NUMBERS = 12  # of a patch
GRID = torch.tensor([[[3, 5], [1, 1], [2, 9]], [[6, 2], [0, 0], [0, 0]], [[0, 0], [0, 0], [0, 0]]])
LENGTH = 40  # the rows hold 34, 12 and 0 patches


def images_of(grid: Tensor) -> list[tuple[int, int, int, int]]:
    """(row, first patch, height, width) of every image."""
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
    """Theirs and ours."""
    weights = vision_weights(CONFIG, "")
    return [(weight.theirs, weight.ours.removeprefix("vision.")) for weight in weights]


def run(encoder: VisionEncoder, patches: Tensor, grid: Tensor = GRID) -> Tensor:
    places = locate_patches(grid, patches.shape[1])
    return encoder(patches, places, lowered(document(places.image)))


def make_patches() -> Tensor:
    return torch.randn(len(GRID), LENGTH, NUMBERS, generator=torch.Generator().manual_seed(1))


def test_packed_images_equal_transformers_image_by_image() -> None:
    theirs = make_theirs()
    ours, patches = make_ours(theirs), make_patches()
    features = run(ours, patches)
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    loss, their_loss = torch.zeros(()), torch.zeros(())
    for row, first, height, width in images_of(GRID):
        own = slice(first, first + height * width)
        values = patches[row, own][None]
        expected = theirs(
            pixel_values=values,
            pixel_attention_mask=torch.ones(values.shape[:2], dtype=torch.int64),
            spatial_shapes=torch.tensor([[height, width]]),
        ).last_hidden_state[0]
        torch.testing.assert_close(features[row, own], expected, atol=1e-4, rtol=0)
        loss = loss + (features[row, own] * weight[row, own]).sum()
        their_loss = their_loss + (expected * weight[row, own]).sum()

    loss.backward()
    their_loss.backward()
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert {theirs_ for theirs_, _ in names()} == set(grads)
    assert {ours_ for _, ours_ in names()} == {name for name, _ in ours.named_parameters()}
    for theirs_, ours_ in names():
        mine, other = ours.get_parameter(ours_).grad, grads[theirs_]
        if ours_.endswith("key.bias"):  # it moves all scores of a query alike: nothing but rounding
            assert mine.abs().max() < 1e-4 and other.abs().max() < 1e-4
            continue
        largest = other.abs().max().item()
        assert largest > 1e-2, f"{theirs_} learns nothing, so the comparison is none"
        torch.testing.assert_close(mine, other, atol=1e-3 * largest, rtol=0, msg=lambda m, n=ours_: f"{n}: {m}")


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize(("row", "patch"), [(0, 0), (0, 14), (0, 15), (0, 33), (1, 5), (0, 34), (2, 0)])
def test_needle_a_patch_is_seen_by_its_image_alone(backend: str, row: int, patch: int) -> None:
    ours, patches = make_ours(make_theirs()), make_patches()
    needle = patches.clone()
    needle[row, patch] += 1.0
    places = locate_patches(GRID, LENGTH)
    mask = lowered(document(places.image), backend=backend)
    changed = (ours(patches, places, mask) != ours(needle, places, mask)).any(dim=2)
    own = places.image == places.image[row, patch]
    own[torch.arange(3) != row] = False
    if places.image[row, patch] < 0:  # nobody sees padding
        own = torch.zeros_like(own).index_put_((torch.tensor(row), torch.tensor(patch)), torch.tensor(True))
    assert torch.equal(changed, own)


def test_places() -> None:
    places = locate_patches(torch.tensor([[[2, 3], [0, 0], [1, 1]]]), 9)
    assert places.image.tolist() == [[0, 0, 0, 0, 0, 0, 2, -1, -1]]
    assert places.first.tolist() == [[0, 0, 0, 0, 0, 0, 6, 7, 7]]
    assert places.row.tolist()[0][:7] == [0, 0, 0, 1, 1, 1, 0]
    assert places.column.tolist()[0][:7] == [0, 1, 2, 0, 1, 2, 0]
    assert places.height.tolist()[0][:7] == [2] * 6 + [1]
    assert places.width.tolist()[0][:7] == [3] * 6 + [1]


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (3, 7), (9, 2), (16, 16), (2, 31), (1, 4), (7, 1)])
def test_positions_are_interpolated_as_torch_does(size: tuple[int, int]) -> None:
    """Axis by axis: to a width of 1 and another height at once, torch 2.13 repeats the first line instead."""
    learned = torch.randn(1, 5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = interpolation_weights(locate_patches(torch.tensor([[size]]), size[0] * size[1]), 4)[0]

    kind = {"mode": "bilinear", "align_corners": False, "antialias": True}
    across = F.interpolate(learned, size=(4, size[1]), **kind)
    twice = F.interpolate(torch.cat([across, across], dim=3), size=(size[0], 2 * size[1]), **kind)
    expected = twice[0, :, :, : size[1]].flatten(1).T
    torch.testing.assert_close(weights.double() @ learned[0].flatten(1).T, expected, atol=1e-6, rtol=0)
    assert torch.allclose(weights.sum(dim=1), torch.ones(len(weights)))


def test_merging_puts_neighbours_together() -> None:
    places = locate_patches(torch.tensor([[[2, 4], [2, 2]], [[4, 2], [0, 0]]]), 16)
    assert merge_order(places, 2).tolist() == [
        [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    ]
    assert merge_order(places, 1).tolist() == [list(range(16))] * 2


def test_a_projected_token_is_made_of_its_own_patches() -> None:
    torch.manual_seed(0)
    projector = Projector(channels=6, hidden=10, width=8, merge=2)
    projector.init_weights()
    places = locate_patches(torch.tensor([[[2, 4], [2, 2]]]), 16)
    features = torch.randn(1, 16, 6, requires_grad=True)
    projected = projector(features, places)
    assert projected.shape == (1, 4, 8)
    for token, patches in enumerate([{0, 1, 4, 5}, {2, 3, 6, 7}, {8, 9, 10, 11}]):
        (grads,) = torch.autograd.grad(projected[0, token].square().sum(), features, retain_graph=True)
        assert set(grads[0].abs().sum(dim=1).nonzero()[:, 0].tolist()) == patches


def test_fresh_weights_have_the_stated_spread() -> None:
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
