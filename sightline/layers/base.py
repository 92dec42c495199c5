"""Base classes of layers and the properties that layers declare: matrices, FLOPs, sharding for parallelism.

MFU, the optimizers, tensor and context parallelism and the pipeline split read these declarations instead of guessing
from shapes or names. A module with parameters outside its submodules lists in the class attribute `MATRICES` those that
multiply a token; stacked weights [E, out, in] are E matrices. All other parameters are norms, biases and the like.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import nn

from sightline.layers.cache import KeyValueCache
from sightline.layers.linear import Linear


class TensorParallelLayer(nn.Module):
    """A layer whose output is a sum over heads or channels, so that tensor parallelism can shard it.

    Each rank computes `forward` on all tokens with its shards of the weights; the sum of the results over the ranks is
    the output of the full layer. `forward` must therefore take numbers of heads and channels from the weights' shapes.
    """

    SHARD_DIMS: ClassVar[dict[str, int]] = {}
    """The dim along which each weight is sharded, by name of the parameter or of its module. All other parameters are
    replicated on every rank."""
    PARTIAL_SUMS: ClassVar[tuple[str, ...]] = ()
    """Replicated parameters that are added to the output: each rank adds 1 / degree of them."""

    def tensor_parallel_units(self) -> dict[str, int]:
        """Return the number of indivisible units to shard across ranks, by name: `{"key/value heads": 8}`."""
        raise NotImplementedError

    def flops_per_token(self) -> float:
        """See the function of this name. Layers override it if a token does not use each matrix exactly once."""
        return _flops_of_matrices(self)


class AttentionLayer(TensorParallelLayer):
    """A layer whose queries attend to keys under a mask."""

    def new_cache(self) -> KeyValueCache:
        """Return an empty cache for generation."""
        return KeyValueCache()

    def flops_per_pair(self) -> float:
        """Return the forward and backward FLOPs of one visible (query, key) pair.

        Each head takes 6 per channel for q k and 6 per channel for p v: 2 forward and 4 backward. Recomputation in the
        backward of a kernel does not count (PaLM's convention, arXiv 2204.02311).
        """
        raise NotImplementedError

    def kernel_requirements(self) -> dict[str, Any]:
        """Return what the attention kernel must support: fields of `sightline.attention.KernelRequirements`.

        `sinks`, `head_dim` and `value_dim` are required; `softcap` defaults to False.
        """
        raise NotImplementedError

    def num_kv_heads(self) -> int:
        """Return the number of key/value heads, each shared by a group of query heads."""
        raise NotImplementedError


class RecurrentLayer(TensorParallelLayer):
    """A layer that processes full rows in order and resets its state where the mask starts a new document.

    Under context parallelism, each rank computes a shard of the heads for all tokens of a row.
    """

    def context_parallel_heads(self) -> int:
        """Return the number of heads that context parallelism can shard across ranks."""
        raise NotImplementedError


class OutputProjection(Linear):
    """Linear layer from hidden states to logits, without bias: one row for each token of the vocabulary."""


class Role(Enum):
    """The role of a parameter in its layer."""

    MATRIX = auto()
    """One matrix [out, in] that multiplies a token, or a stack of them [E, out, in]."""
    VOCABULARY = auto()
    """Embedding or output projection: one row for each token of the vocabulary."""
    OTHER = auto()
    """Norms, biases, sinks, convolutions, learned positions, ..."""

    @property
    def decays(self) -> bool:
        """Whether weight decay applies to the parameter."""
        return self is not Role.OTHER


class ParameterInfo(NamedTuple):
    """A parameter of a model with its name and its role."""

    name: str
    parameter: nn.Parameter
    role: Role


class HasModules(Protocol):
    """A model, or the part of a model on this rank."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...


def parameter_info(model: HasModules) -> list[ParameterInfo]:
    """Return the trainable parameters in the order of `named_parameters()`, each once.

    Raises:
        ValueError: if a module does not declare its matrices; see `matrices_of`.
    """
    found: dict[int, ParameterInfo] = {}
    for prefix, module in model.named_modules():
        matrices = matrices_of(module, prefix)
        vocabulary = isinstance(module, nn.Embedding | OutputProjection)
        for key, p in module.named_parameters(recurse=False):
            role = Role.MATRIX if key in matrices else Role.OTHER
            if vocabulary and key == "weight":
                role = Role.VOCABULARY
            if p.requires_grad:
                found.setdefault(id(p), ParameterInfo(f"{prefix}.{key}".lstrip("."), p, role))
    return list(found.values())


def matrices_of(module: nn.Module, name: str = "") -> tuple[str, ...]:
    """Return the names of a module's parameters that multiply a token, without those of its submodules.

    Raises:
        ValueError: if the module has parameters outside its submodules and does not declare which of them are matrices.
    """
    if isinstance(module, nn.Linear):
        return ("weight",)
    if isinstance(module, nn.Embedding | nn.LayerNorm | nn.RMSNorm):
        return ()
    declared = getattr(type(module), "MATRICES", None)
    if declared is None:
        keys = [key for key, _ in module.named_parameters(recurse=False)]
        if keys:
            raise ValueError(
                f"{name or 'the module'} ({type(module).__name__}) has the parameters {', '.join(keys)} and does not "
                "declare which of them are matrices; set its class attribute MATRICES, for example "
                f"MATRICES = ({keys[0]!r},) or MATRICES = () for none"
            )
    return declared or ()


def flops_per_token(module: nn.Module) -> float:
    """Return the forward and backward FLOPs of one token in the matrix products of a module, without attention scores.

    Each element of a matrix that multiplies the token counts 6: 2 forward, 4 backward. Embedding lookups count 0.
    """
    return module.flops_per_token() if isinstance(module, TensorParallelLayer) else _flops_of_matrices(module)


def _flops_of_matrices(module: nn.Module) -> float:
    matrices = matrices_of(module)
    elements = sum(p.numel() for name, p in module.named_parameters(recurse=False) if name in matrices)
    return 6.0 * elements + sum(flops_per_token(child) for child in module.children())


def attention_layers(module: nn.Module) -> list[AttentionLayer]:
    """Return the attention layers of a module, in order."""
    return [layer for layer in module.modules() if isinstance(layer, AttentionLayer)]


def kernel_requirements(module: nn.Module) -> dict[str, Any]:
    """Return the features that a kernel needs to run every attention layer of a module: fields of
    `KernelRequirements`."""
    needs = [layer.kernel_requirements() for layer in attention_layers(module)]
    return {
        "sinks": any(need["sinks"] for need in needs),
        "head_dim": max((need["head_dim"] for need in needs), default=None),
        "value_dim": max((need["value_dim"] for need in needs), default=None),
        "softcap": any(need.get("softcap", False) for need in needs),
    }
