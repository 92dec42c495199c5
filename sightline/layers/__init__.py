"""Building blocks of the models. All take plain tensors; attention and recurrent layers also take a lowered mask."""

from sightline.layers.attention import GroupedQueryAttention
from sightline.layers.base import (
    AttentionLayer,
    OutputProjection,
    RecurrentLayer,
    TensorParallelLayer,
    attention_layers,
    flops_per_token,
    kernel_requirements,
)
from sightline.layers.cache import KeyValueCache, LayerCache, RecurrentCache
from sightline.layers.linear import Linear
from sightline.layers.loss import add_gradient_of, linear_cross_entropy
from sightline.layers.losses import LOSSES, Loss, compute_loss, get_loss
from sightline.layers.mla import MultiHeadLatentAttention
from sightline.layers.mlp import SwiGLU
from sightline.layers.moe import Experts, MoE, Router, routers_of
from sightline.layers.norm import RMSNorm, ZeroCenteredRMSNorm
from sightline.layers.recurrence import GatedDeltaNet
from sightline.layers.rope import Llama3RopeScaling, Rotation, YarnScaling, build_rotation, rope_frequencies, rotate

__all__ = [
    "LOSSES",
    "AttentionLayer",
    "Experts",
    "GatedDeltaNet",
    "GroupedQueryAttention",
    "KeyValueCache",
    "LayerCache",
    "Linear",
    "Llama3RopeScaling",
    "Loss",
    "MoE",
    "MultiHeadLatentAttention",
    "OutputProjection",
    "RMSNorm",
    "RecurrentCache",
    "RecurrentLayer",
    "Rotation",
    "Router",
    "SwiGLU",
    "TensorParallelLayer",
    "YarnScaling",
    "ZeroCenteredRMSNorm",
    "add_gradient_of",
    "attention_layers",
    "build_rotation",
    "compute_loss",
    "flops_per_token",
    "get_loss",
    "kernel_requirements",
    "linear_cross_entropy",
    "rope_frequencies",
    "rotate",
    "routers_of",
]
