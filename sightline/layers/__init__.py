"""The parts models are built of. Each takes plain tensors; attention takes the mask its caller lowered."""

from sightline.layers.attention import GroupedQueryAttention
from sightline.layers.cache import KeyValueCache
from sightline.layers.loss import linear_cross_entropy
from sightline.layers.mlp import SwiGLU
from sightline.layers.norm import RMSNorm
from sightline.layers.rope import Llama3RopeScaling, Rotation, build_rotation, rope_frequencies, rotate

__all__ = [
    "GroupedQueryAttention",
    "KeyValueCache",
    "Llama3RopeScaling",
    "RMSNorm",
    "Rotation",
    "SwiGLU",
    "build_rotation",
    "linear_cross_entropy",
    "rope_frequencies",
    "rotate",
]
