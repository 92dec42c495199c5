"""Parameter roles, FLOPs and head counts that layers declare, and their sums over a model."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from sightline.layers import AttentionLayer, attention_layers, flops_per_token
from sightline.layers.base import Role, matrices_of, parameter_info
from sightline.models import MODELS, build_skeleton

MTP = replace(MODELS["deepseek_v3-debug"], mtp_loss_weight=0.3)
NORMS = {"attention_norm.weight", "mlp_norm.weight"}
OTHER = {
    "llama3-debug": NORMS,
    "llama4-debug": NORMS,
    "qwen3-debug": NORMS | {"attention.query_norm.weight", "attention.key_norm.weight"},
    "qwen3-debug-moe": NORMS | {"attention.query_norm.weight", "attention.key_norm.weight"},
    "deepseek_v3-debug": NORMS | {"attention.query_norm.weight", "attention.kv_norm.weight"},
    "gpt_oss-debug": {
        *("attention_norm.weight", "attention.sinks", "moe_norm.weight", "moe.router.bias"),
        *(f"attention.{name}.bias" for name in ("query", "key", "value", "output")),
        *(f"moe.experts.{name}_bias" for name in ("gate", "up", "down")),
    },
    "qwen3_next-debug": {
        *("mixer_norm.weight", "mlp_norm.weight", "mixer.query_norm.weight", "mixer.key_norm.weight"),
        *(f"mixer.{name}" for name in ("convolution.weight", "A_log", "dt_bias", "norm.weight")),
    },
    "vlm-debug": NORMS,
}
"""Parameters of a layer that are not matrices, by their name in the layer."""
OUTSIDE = {
    "vlm-debug": {
        *("vision.positions", "vision.embedding.bias", "vision.norm.weight", "vision.norm.bias"),
        *("projector.norm.weight", "projector.norm.bias", "projector.up.bias", "projector.down.bias"),
        *(
            f"vision.layers.{i}.{name}"
            for i in (0, 1)
            for name in (
                *("attention_norm.weight", "attention_norm.bias", "mlp_norm.weight", "mlp_norm.bias", "up.bias"),
                *("down.bias", "attention.query.bias", "attention.key.bias", "attention.value.bias"),
                "attention.output.bias",
            )
        ),
    },
}
"""Parameters outside the layers that are not matrices."""


@pytest.mark.parametrize("name", OTHER)
def test_roles_of_every_family(name: str) -> None:
    infos = parameter_info(build_skeleton(name))
    assert [info.name for info in infos] == [key for key, _ in build_skeleton(name).named_parameters()]
    roles: dict[Role, set[str]] = {role: {info.name for info in infos if info.role is role} for role in Role}
    assert roles[Role.VOCABULARY] == {"embedding.weight", "output.weight"}
    assert {re.sub(r"^layers\.\d+\.", "", key) for key in roles[Role.OTHER]} - OTHER[name] == {
        "norm.weight",
        *OUTSIDE.get(name, ()),
    }
    assert OTHER[name] <= {key.split(".", 2)[-1] for key in roles[Role.OTHER]}
    assert all(key.startswith(("layers.", "vision.", "projector.")) for key in roles[Role.MATRIX])


def test_tied_embedding_is_listed_once() -> None:
    infos = parameter_info(build_skeleton(replace(MODELS["llama3-debug"], tied_embeddings=True)))
    assert [info.name for info in infos if info.role is Role.VOCABULARY] == ["embedding.weight"]


class Undeclared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.mix = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 2))


def test_module_without_matrices_is_an_error() -> None:
    words = (
        r"inner \(Undeclared\) has the parameters scale, mix and .*MATRICES = \('scale',\) or MATRICES = \(\) for none"
    )
    with pytest.raises(ValueError, match=words):
        parameter_info(nn.ModuleDict({"inner": Undeclared()}))
    with pytest.raises(ValueError, match="does not declare which of them are matrices"):
        flops_per_token(Undeclared())
    assert matrices_of(nn.ModuleDict({"norm": nn.LayerNorm(2)})) == ()  # all parameters are in submodules


def test_flops_count_selected_experts_only() -> None:
    config = MODELS["qwen3-debug-moe"]
    assert (config.num_experts, config.experts_per_token, config.hidden_size, config.intermediate_size) == (
        8,
        2,
        64,
        64,
    )
    attention = 64 * 32 * (4 + 2 + 2 + 4)
    assert flops_per_token(build_skeleton(config).layers["0"]) == 6 * (attention + 64 * 8 + 2 * 3 * 64 * 64)


@pytest.mark.parametrize("name", ["llama3-8b", "qwen3-30b-a3b", "gpt_oss-20b", "qwen3_next-80b-a3b"])
def test_model_flops_are_layers_plus_output(name: str) -> None:
    model = build_skeleton(name)
    flops = sum(flops_per_token(layer) for layer in model.layers.values()) + flops_per_token(model.output)
    assert flops == model.flops_per_token() and flops_per_token(model.embedding) == 0


@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        (MODELS["llama3-debug"], {"attention": (2, 2)}),
        (MODELS["llama4-debug"], {"chunked": (3, 2), "full": (1, 2)}),
        (MODELS["gpt_oss-debug"], {"window": (1, 2), "full": (1, 2)}),
        (MODELS["deepseek_v3-debug"], {"attention": (2, 4)}),
        (MTP, {"attention": (3, 4)}),  # the MTP module has an attention layer too
        (MODELS["qwen3_next-debug"], {"attention": (1, 2)}),  # three of four layers are recurrent
        (MODELS["vlm-debug"], {"encoder": (2, 4), "decoder": (2, 2)}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_attention_shape_of_each_mask(config: object, shapes: dict[str, tuple[int, int]]) -> None:
    model = build_skeleton(config)
    assert {mask: model.attention_shape(mask) for mask in shapes} == shapes
    assert sum(model.flops_per_pair(mask) for mask in shapes) == sum(
        layer.flops_per_pair() for layer in attention_layers(model)
    )
    assert all(isinstance(layer, AttentionLayer) for layer in attention_layers(model))


def test_context_parallel_heads() -> None:
    config = MODELS["qwen3_next-debug"]
    assert build_skeleton(config).context_parallel_heads == config.linear_num_key_heads == 2
    assert build_skeleton(replace(config, full_attention_interval=1)).context_parallel_heads is None
    assert build_skeleton("llama3-debug").context_parallel_heads is None
