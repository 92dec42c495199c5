"""What layers state about themselves, and its sums over a module."""

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
"""The parameters of a layer that are no matrices, by their name in it."""
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


@pytest.mark.parametrize("name", OTHER)
def test_roles_of_every_family(name: str) -> None:
    facts = parameter_info(build_skeleton(name))
    assert [fact.name for fact in facts] == [key for key, _ in build_skeleton(name).named_parameters()]
    roles: dict[Role, set[str]] = {role: {fact.name for fact in facts if fact.role is role} for role in Role}
    assert roles[Role.VOCABULARY] == {"embedding.weight", "output.weight"}
    assert {re.sub(r"^layers\.\d+\.", "", key) for key in roles[Role.OTHER]} - OTHER[name] == {
        "norm.weight",
        *OUTSIDE.get(name, ()),
    }
    assert OTHER[name] <= {key.split(".", 2)[-1] for key in roles[Role.OTHER]}
    assert all(key.startswith(("layers.", "vision.", "projector.")) for key in roles[Role.MATRIX])


def test_a_tied_weight_is_the_vocabulary_s_once() -> None:
    facts = parameter_info(build_skeleton(replace(MODELS["llama3-debug"], tied_embeddings=True)))
    assert [fact.name for fact in facts if fact.role is Role.VOCABULARY] == ["embedding.weight"]


class Unstated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.mix = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 2))


def test_a_module_that_states_nothing_is_refused_and_not_guessed() -> None:
    words = (
        r"inner \(Unstated\) has the parameters scale, mix and .*MATRICES = \('scale',\) or MATRICES = \(\) for none"
    )
    with pytest.raises(ValueError, match=words):
        parameter_info(nn.ModuleDict({"inner": Unstated()}))
    with pytest.raises(ValueError, match="does not state which of them are matrices"):
        flops_per_token(Unstated())
    assert matrices_of(nn.ModuleDict({"norm": nn.LayerNorm(2)})) == ()  # without parameters of its own


def test_experts_count_as_far_as_a_token_meets_them() -> None:
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
def test_the_work_of_a_model_is_that_of_its_layers_and_its_output(name: str) -> None:
    model = build_skeleton(name)
    work = sum(flops_per_token(layer) for layer in model.layers.values()) + flops_per_token(model.output)
    assert work == model.flops_per_token() and flops_per_token(model.embedding) == 0


@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        (MODELS["llama3-debug"], {"attention": (2, 2)}),
        (MODELS["llama4-debug"], {"chunked": (3, 2), "full": (1, 2)}),
        (MODELS["gpt_oss-debug"], {"window": (1, 2), "full": (1, 2)}),
        (MODELS["deepseek_v3-debug"], {"attention": (2, 4)}),
        (MTP, {"attention": (3, 4)}),  # the layer that predicts one token further attends too
        (MODELS["qwen3_next-debug"], {"attention": (1, 2)}),  # three of four layers have a memory
        (MODELS["vlm-debug"], {"encoder": (2, 4), "decoder": (2, 2)}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_and_head_groups_of_each_mask(config: object, shapes: dict[str, tuple[int, int]]) -> None:
    model = build_skeleton(config)
    assert {mask: model.attention_shape(mask) for mask in shapes} == shapes
    assert sum(model.flops_per_pair(mask) for mask in shapes) == sum(
        layer.flops_per_pair() for layer in attention_layers(model)
    )
    assert all(isinstance(layer, AttentionLayer) for layer in attention_layers(model))


def test_heads_of_recurrent_layers() -> None:
    config = MODELS["qwen3_next-debug"]
    assert build_skeleton(config).context_parallel_heads == config.linear_num_key_heads == 2
    assert build_skeleton(replace(config, full_attention_interval=1)).context_parallel_heads is None
    assert build_skeleton("llama3-debug").context_parallel_heads is None
